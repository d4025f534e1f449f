"""The two-dimensional Haar wavelet transform: half the size, four times the channels, nothing lost.

A 2 x 2 block [[a, b], [c, d]] of a channel becomes one value in each of four bands,

    LL = (a + b + c + d) / 2      LH = (a + b - c - d) / 2
    HL = (a - b + c - d) / 2      HH = (a - b - c + d) / 2,

a mean and the changes down, across and along the diagonal; PyWavelets calls them cA, cH, cV and cD of "haar". The
4 x 4 matrix is orthogonal and symmetric, hence its own inverse: the same sums turn bands back into pixels, energy is
kept, and the gradient of each direction is the other direction. Further levels transform LL again.

An odd side gets one more row or column first, which the inverse leaves out: a copy of the last ("symmetric", so that
what is constant has no details) or zeros ("zero", so that energy is kept at every size). The names are PyWavelets'.
"""

from collections.abc import Sequence
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from foveate.errors import InputError
from foveate.ops import fast_allowed
from foveate.ops.threads import in_parts

MODES = {"symmetric": "replicate", "zero": "constant"}
"""How an odd side is made even, and what PyTorch calls it."""

LEAST_ROWS = 64
"""Rows that a thread is given at least."""


def dwt2(x: Tensor, mode: str = "symmetric") -> Tensor:
    """Split every channel into four bands of half the size.

    Args:
        mode: what an odd side is extended by, "symmetric" (its last row) or "zero".

    Shape: [B, C, H, W] -> [B, 4C, ceil(H/2), ceil(W/2)]: first the C channels' LL, then LH, HL and HH of the first
        channel, of the second, and so on.
    Raises: InputError for another rank or mode, for an empty picture, and for numbers that are not floating-point.

    >>> dwt2(torch.tensor([[[[1.0, 2.0], [3.0, 4.0]]]])).flatten()
    tensor([ 5., -2., -1.,  0.])
    """
    _check(x)
    if mode not in MODES:
        raise InputError(f"unknown mode {mode!r}; use one of {', '.join(map(repr, MODES))}.")
    down, across = x.shape[2] % 2, x.shape[3] % 2
    if down or across:
        x = F.pad(x, (0, across, 0, down), mode=MODES[mode])
    return _Analysis.apply(x) if _fast(x) else analysis_reference(x)


def idwt2(bands: Tensor, size: tuple[int, int] | None = None) -> Tensor:
    """Put the four bands of `dwt2` together again.

    Args:
        size: (H, W) of the result, for odd sides one less than twice that of the bands; default twice.

    Shape: [B, 4C, h, w] -> [B, C, H, W].
    Raises: InputError for channels that are not four times a number, or a size that the bands do not fit.
    """
    _check(bands)
    if bands.shape[1] % 4:
        raise InputError(f"bands come in fours, got {bands.shape[1]} channels; pass what dwt2 returned.")
    height, width = (2 * n for n in bands.shape[2:])
    size = size or (height, width)
    if size[0] not in (height - 1, height) or size[1] not in (width - 1, width):
        raise InputError(f"bands of {height // 2} x {width // 2} do not make {size[0]} x {size[1]}; halves round up.")
    x = _Synthesis.apply(bands) if _fast(bands) else synthesis_reference(bands)
    return x if tuple(size) == (height, width) else x[..., : size[0], : size[1]]


def wavedec2(x: Tensor, levels: int, mode: str = "symmetric") -> list[Tensor]:
    """Transform over several levels.

    Returns: [LL of the last level, details of the last level, ..., details of the first], as PyWavelets' wavedec2.
    Shape: [B, C, H, W] -> LL [B, C, h, w] and details [B, C, 3, h, w] (LH, HL, HH), h = ceil(H / 2**level).
    Raises: InputError for less than one level; see `dwt2`.
    """
    if levels < 1:
        raise InputError(f"wavedec2 needs at least one level, got {levels}.")
    details = []
    for _ in range(levels):
        x, detail = split(dwt2(x, mode))
        details.append(detail)
    return [x, *reversed(details)]


def waverec2(coefficients: Sequence[Tensor], size: tuple[int, int] | None = None) -> Tensor:
    """Invert `wavedec2`.

    Args:
        coefficients: as `wavedec2` returns them.
        size: (H, W) of the picture; default twice that of the finest details, so odd sides need it.

    Shape: -> [B, C, H, W].
    Raises: InputError for an empty list, and for coefficients that do not fit each other.
    """
    if len(coefficients) < 2:
        raise InputError(f"waverec2 needs LL and at least one level of details, got {len(coefficients)} tensors.")
    x, *details = coefficients
    for detail, finer in zip(details, [*details[1:], None], strict=True):
        if x.dim() != 4 or detail.shape != (*x.shape[:2], 3, *x.shape[2:]):
            raise InputError(f"details {tuple(detail.shape)} do not belong to LL {tuple(x.shape)}; see wavedec2.")
        bands = torch.cat((x, detail.flatten(1, 2)), 1)
        x = idwt2(bands, size if finer is None else (finer.shape[3], finer.shape[4]))
    return x


def split(bands: Tensor) -> tuple[Tensor, Tensor]:
    """LL and the details of one level. Shape: [B, 4C, h, w] -> views [B, C, h, w], [B, C, 3, h, w]."""
    channels = bands.shape[1] // 4
    return bands[:, :channels], bands[:, channels:].unflatten(1, (channels, 3))


def analysis_reference(x: Tensor) -> Tensor:
    """`dwt2` of even sides in plain PyTorch."""
    a, b = x[..., ::2, ::2], x[..., ::2, 1::2]
    c, d = x[..., 1::2, ::2], x[..., 1::2, 1::2]
    top, bottom, left, right = a + b, c + d, a - b, c - d
    details = torch.stack((top - bottom, left + right, left - right), 2).flatten(1, 2)
    return torch.cat((top + bottom, details), 1) / 2


def synthesis_reference(bands: Tensor) -> Tensor:
    """`idwt2` to even sides in plain PyTorch."""
    ll, details = split(bands)
    lh, hl, hh = details.unbind(2)
    top, bottom, left, right = ll + lh, ll - lh, hl + hh, hl - hh
    rows = (torch.stack((top + left, top - left), -1), torch.stack((bottom + right, bottom - right), -1))
    return torch.stack(rows, -3).flatten(-4, -3).flatten(-2) / 2


class _Analysis(torch.autograd.Function):
    """The compiled `dwt2` of even sides; what flows back through it is synthesised."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        b, channels, height, width = x.shape
        out = x.new_empty(b, 4 * channels, height // 2, width // 2)
        pixels, bands = x.detach().contiguous().numpy(), out.numpy()
        in_parts(lambda i, j: _kernels()["analysis"](pixels, bands, i, j), b * channels * height // 2, LEAST_ROWS)
        return out

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        return idwt2(gradients[0])


class _Synthesis(torch.autograd.Function):
    """The compiled `idwt2` to even sides; what flows back through it is analysed."""

    @staticmethod
    def forward(ctx: Any, bands: Tensor) -> Tensor:
        b, channels, h, w = bands.shape
        out = bands.new_empty(b, channels // 4, 2 * h, 2 * w)
        source, pixels = bands.detach().contiguous().numpy(), out.numpy()
        in_parts(lambda i, j: _kernels()["synthesis"](source, pixels, i, j), b * channels // 4 * h, LEAST_ROWS)
        return out

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        return dwt2(gradients[0])


def _check(x: Tensor) -> None:
    if x.dim() != 4 or not x.numel():
        raise InputError(f"a wavelet transform takes [B, C, H, W] with something in it, got shape {tuple(x.shape)}.")
    if not x.is_floating_point():
        raise InputError(f"a wavelet transform takes floating-point numbers, got {x.dtype}; convert with .float().")


def _fast(x: Tensor) -> bool:
    return fast_allowed() and x.device.type == "cpu" and x.dtype in (torch.float32, torch.float64)


@cache
def _kernels() -> dict[str, Any]:
    import numba

    compiled = numba.njit(nogil=True, cache=True)

    @compiled
    def analysis(x, out, start, stop):  # type: ignore[no-untyped-def]
        channels, h = x.shape[1], out.shape[2]
        half = x.dtype.type(0.5)
        for n in range(start, stop):
            b, c, y = n // h // channels, n // h % channels, n % h
            upper, lower = x[b, c, 2 * y], x[b, c, 2 * y + 1]
            first = channels + 3 * c
            ll, lh, hl, hh = out[b, c, y], out[b, first, y], out[b, first + 1, y], out[b, first + 2, y]
            for i in range(out.shape[3]):
                top, bottom = upper[2 * i] + upper[2 * i + 1], lower[2 * i] + lower[2 * i + 1]
                left, right = upper[2 * i] - upper[2 * i + 1], lower[2 * i] - lower[2 * i + 1]
                ll[i], lh[i] = half * (top + bottom), half * (top - bottom)
                hl[i], hh[i] = half * (left + right), half * (left - right)

    @compiled
    def synthesis(bands, out, start, stop):  # type: ignore[no-untyped-def]
        channels, h = out.shape[1], bands.shape[2]
        half = bands.dtype.type(0.5)
        for n in range(start, stop):
            b, c, y = n // h // channels, n // h % channels, n % h
            upper, lower = out[b, c, 2 * y], out[b, c, 2 * y + 1]
            first = channels + 3 * c
            ll, lh, hl, hh = bands[b, c, y], bands[b, first, y], bands[b, first + 1, y], bands[b, first + 2, y]
            for i in range(bands.shape[3]):
                top, bottom, left, right = ll[i] + lh[i], ll[i] - lh[i], hl[i] + hh[i], hl[i] - hh[i]
                upper[2 * i], upper[2 * i + 1] = half * (top + left), half * (top - left)
                lower[2 * i], lower[2 * i + 1] = half * (bottom + right), half * (bottom - right)

    return {"analysis": analysis, "synthesis": synthesis}
