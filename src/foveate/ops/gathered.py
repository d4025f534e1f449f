"""The gathered dynamic kernel: each output is a weighted sum of samples, whose weights and places may be anything.

    y[b, c, p] = sum_t weight[b, g(c), t, p] x[b, c, p * stride + tap_t + offset[b, h(c), t, p]]

with x zero outside the picture. Many published operators are cases of it:

    weight            offset          operator
    fixed             none            depth-wise convolution
    of the position   none            translation-variant convolution (TVConv)
    of the content    none            involution, small-kernel aggregation (LSNet), adaptive kernels
    fixed             of the content  deformable depth-wise convolution
    of the content    of the content  DCNv3 (softmax over t), DCNv4 (any weights)

Offsets are in pixels and need not be whole: samples between pixels are bilinear, s(X, Y) = sum over the four pixels q
around (X, Y) of (1 - |X - q_x|)(1 - |Y - q_y|) x[q], and a place at X <= -1, X >= W, Y <= -1 or Y >= H gives 0 and no
gradient. Where a place is exactly on a pixel, the gradient of the offset is that towards the next one.

Channels share weights (G groups) and offsets (G' groups) by runs of neighbours, g(c) = c // (C / G), or for weights,
when interleaved, as LSNet does it, g(c) = c % G.
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from foveate.errors import InputError
from foveate.ops import fast_allowed
from foveate.ops.tile import on_triton

Pair = int | tuple[int, int]
Taps = tuple[tuple[float, float], ...]


class Geometry(NamedTuple):
    """Where samples lie before offsets: taps (x, y) around p * stride (down, across), for p in a map of some size."""

    taps: Taps
    stride: tuple[int, int]
    size: tuple[int, int]
    interleaved: bool


def gathered(
    x: Tensor,
    weight: Tensor,
    offset: Tensor | None = None,
    *,
    kernel_size: Pair | None = None,
    stride: Pair = 1,
    dilation: Pair = 1,
    padding: Pair | None = None,
    interleaved: bool = False,
    taps: Sequence[tuple[float, float]] | None = None,
) -> Tensor:
    """Sum the samples around each place by the weights of that place.

    Where the taps t lie is told by one of three: `kernel_size`, a grid in row-major order as in a convolution; `taps`,
    any list; or neither, when the offsets alone say it. Gradients reach x, weight and offset.

    Args:
        weight: of each channel group, tap and place; the first axis and the last two may be 1 (the same weights for
            all pictures, for all places).
        offset: shift of each tap in pixels of x, (x, y) like points; the first axis may be 1. None for no shift.
        kernel_size, stride, dilation, padding: as in `torch.nn.functional.conv2d`, one number or (vertical,
            horizontal); padding by default keeps the size (at stride 1, for odd kernels).
        interleaved: channel c has the weights of group c % G instead of c // (C / G).
        taps: (x, y) of each tap, relative to p * stride; whole numbers where there is no offset.

    Shape: x [B, C, H, W], weight [B, G, T, Ho, Wo], offset [B, G', T, 2, Ho, Wo] -> [B, C, Ho, Wo], where Ho and Wo are
        a convolution's for `kernel_size`, and those of offset and weight otherwise (ceil(H / stride) where these say
        none).
    Raises: InputError when shapes do not fit together.

    >>> x = torch.arange(4.0).view(1, 1, 1, 4)
    >>> gathered(x, torch.tensor([-1.0, 0.0, 1.0]).view(1, 1, 3, 1, 1), kernel_size=(1, 3)).flatten()
    tensor([ 1.,  2.,  2., -2.])
    >>> half = torch.tensor([0.5, 0.0]).view(1, 1, 1, 2, 1, 1).expand(1, 1, 1, 2, 1, 4)
    >>> gathered(x, torch.ones(1, 1, 1, 1, 1), half, kernel_size=1).flatten()
    tensor([0.5000, 1.5000, 2.5000, 1.5000])
    """
    if x.dim() != 4 or weight.dim() != 5:
        raise InputError(
            "gathered takes x [B, C, H, W] and weight [B, G, T, Ho, Wo], "
            f"got shapes {tuple(x.shape)} and {tuple(weight.shape)}."
        )
    down, across = _pair(stride)
    height, width = x.shape[2:]
    if kernel_size is not None:
        if taps is not None:
            raise InputError(f"Give kernel_size or taps, not both; got {kernel_size} and {len(taps)} taps.")
        places, rim = kernel_taps(kernel_size, dilation, padding), _rim(kernel_size, dilation, padding)
        height, width = height + rim[0], width + rim[1]
    elif offset is None and taps is None:
        raise InputError("Without kernel_size or taps the offsets say where to look; pass one of the three.")
    else:
        places = tuple(taps) if taps is not None else ((0.0, 0.0),) * weight.shape[2]
    size = (-(-height // down), -(-width // across))
    if kernel_size is None:
        known = weight if offset is None else offset
        size = size if known.shape[-2:] == (1, 1) else (known.shape[-2], known.shape[-1])
    geometry = Geometry(places, (down, across), size, interleaved)
    _check(x, weight, offset, geometry)
    dtype = torch.promote_types(x.dtype, weight.dtype)
    x, weight = x.to(dtype), weight.to(dtype)
    if fast_allowed() and kernel_size is not None and offset is None and weight.shape[3:] == (1, 1) != geometry.size:
        kernel, pads = _pair(kernel_size), _padding(kernel_size, dilation, padding)
        return _convolved(x, weight, kernel, (down, across), _pair(dilation), pads, interleaved)
    if offset is not None:
        offset = offset.to(torch.promote_types(dtype, torch.float32)).expand(len(x), -1, -1, -1, -1, -1)
    if not fast_allowed():
        return gathered_reference(x, weight, offset, geometry)
    if on_triton(x, weight):
        from foveate.ops._gathered_triton import gathered_triton

        return gathered_triton(x, weight, offset, geometry)
    if x.device.type == "cpu":
        low = dtype in (torch.float16, torch.bfloat16)
        y = _on_cpu(x.float() if low else x, weight.float() if low else weight, offset, geometry)
        return y.to(dtype)
    return gathered_reference(x, weight, offset, geometry)


def _on_cpu(x: Tensor, weight: Tensor, offset: Tensor | None, geometry: Geometry) -> Tensor:
    if offset is not None:
        from foveate.ops._gathered_cpu_sampled import sampled_cpu

        return sampled_cpu(x, weight, offset, geometry)
    if weight.shape[3:] != geometry.size:
        return gathered_reference(x, weight, None, geometry)
    from foveate.ops._gathered_cpu import shifted_cpu

    return shifted_cpu(x, weight, geometry)


def _convolved(
    x: Tensor,
    weight: Tensor,
    kernel: tuple[int, int],
    stride: tuple[int, int],
    dilation: tuple[int, int],
    padding: tuple[int, int],
    interleaved: bool,
) -> Tensor:
    """Weights that all places share are a depth-wise convolution, pictures with weights of their own more channels."""
    kernels = weight[:, channel_groups(x.shape[1], weight.shape[1], interleaved, x.device)].reshape(-1, 1, *kernel)
    wide = x.reshape(-1, len(kernels), *x.shape[2:])
    y = F.conv2d(wide, kernels, None, stride, padding, dilation, len(kernels))
    return y.view(*x.shape[:2], *y.shape[2:])


def gathered_reference(x: Tensor, weight: Tensor, offset: Tensor | None, geometry: Geometry) -> Tensor:
    """`gathered` in plain PyTorch, with a copy of x for every tap; its products are such as `foveate.meter` counts."""
    group = channel_groups(x.shape[1], weight.shape[1], geometry.interleaved, x.device)
    taps = range(weight.shape[2])
    samples = [_shifted(x, geometry, t) if offset is None else _sampled(x, offset[:, :, t], geometry, t) for t in taps]
    return torch.einsum("bctij,bctij->bcij", weight[:, group], torch.stack(samples, 2))


def kernel_taps(kernel_size: Pair, dilation: Pair = 1, padding: Pair | None = None) -> Taps:
    """Places (x, y) that a convolution kernel reads around p * stride, in row-major order.

    >>> kernel_taps((1, 3))
    ((-1, 0), (0, 0), (1, 0))
    """
    (kh, kw), (dy, dx) = _pair(kernel_size), _pair(dilation)
    py, px = _padding(kernel_size, dilation, padding)
    return tuple((j * dx - px, i * dy - py) for i in range(kh) for j in range(kw))


def square_offset(spread: Tensor, kernel_size: Pair, dilation: Pair = 1) -> Tensor:
    """Offsets that keep the square of the taps and only widen it: o_t = s tap_t, so taps lie at (1 + s) tap_t.

    Args:
        spread: s of each place; a constant s is a convolution of dilation (1 + s).

    Shape: spread [B, G', Ho, Wo] -> [B, G', T, 2, Ho, Wo] for `gathered`.
    """
    taps = torch.tensor(kernel_taps(kernel_size, dilation), dtype=spread.dtype, device=spread.device)
    return spread[:, :, None, None] * taps[:, :, None, None]


def round_offset(offset: Tensor) -> Tensor:
    """Whole offsets, so that samples need no interpolation; the gradient passes as if there were no rounding."""
    return offset.round().detach() + (offset - offset.detach())


def channel_groups(channels: int, groups: int, interleaved: bool, device: torch.device | None = None) -> Tensor:
    """g(c) of every channel. Shape: [C]."""
    index = torch.arange(channels, device=device)
    return index % groups if interleaved else index // (channels // groups)


def _shifted(x: Tensor, geometry: Geometry, t: int) -> Tensor:
    """Samples of one tap on whole pixels. Shape: [B, C, Ho, Wo]."""
    (across, down), (sy, sx), (height, width) = map(int, geometry.taps[t]), geometry.stride, geometry.size
    last_y, last_x = down + (height - 1) * sy, across + (width - 1) * sx
    edges = (max(0, -across), max(0, last_x + 1 - x.shape[3]), max(0, -down), max(0, last_y + 1 - x.shape[2]))
    padded = F.pad(x, edges)
    top, left = down + edges[2], across + edges[0]
    return padded[:, :, top : top + last_y - down + 1 : sy, left : left + last_x - across + 1 : sx]


def _sampled(x: Tensor, offset: Tensor, geometry: Geometry, t: int) -> Tensor:
    """Bilinear samples of one tap. Shape: offset [B, G', 2, Ho, Wo] -> [B, C, Ho, Wo]."""
    b, c, height, width = x.shape
    groups = offset.shape[1]
    across, down = geometry.taps[t]
    rows = torch.arange(geometry.size[0], device=x.device, dtype=offset.dtype) * geometry.stride[0] + down
    columns = torch.arange(geometry.size[1], device=x.device, dtype=offset.dtype) * geometry.stride[1] + across
    place_x, place_y = columns + offset[:, :, 0], rows[:, None] + offset[:, :, 1]
    inside = (place_x > -1) & (place_x < width) & (place_y > -1) & (place_y < height)
    place_x, place_y = (torch.where(inside, p, torch.zeros_like(p)) for p in (place_x, place_y))
    left, top = place_x.detach().floor(), place_y.detach().floor()
    right_share, lower_share = place_x - left, place_y - top
    pixels, shares, corners = x.reshape(b, groups, c // groups, height * width), [], []
    for dy, share_y in ((0, 1 - lower_share), (1, lower_share)):
        for dx, share_x in ((0, 1 - right_share), (1, right_share)):
            i, j = top.long() + dy, left.long() + dx
            there = inside & (i >= 0) & (i < height) & (j >= 0) & (j < width)
            index = (i.clamp(0, height - 1) * width + j.clamp(0, width - 1)).flatten(2)[:, :, None]
            corners.append(pixels.gather(3, index.expand(-1, -1, c // groups, -1)))
            shares.append((share_y * share_x * there).flatten(2).to(x.dtype))
    seen = torch.einsum("bgqp,bgcqp->bgcp", torch.stack(shares, 2), torch.stack(corners, 3))
    return seen.reshape(b, c, *geometry.size)


def _pair(value: Pair) -> tuple[int, int]:
    return (value, value) if isinstance(value, int) else value


def _padding(kernel_size: Pair, dilation: Pair, padding: Pair | None) -> tuple[int, int]:
    if padding is not None:
        return _pair(padding)
    (kh, kw), (dy, dx) = _pair(kernel_size), _pair(dilation)
    return dy * (kh - 1) // 2, dx * (kw - 1) // 2


def _rim(kernel_size: Pair, dilation: Pair, padding: Pair | None) -> tuple[int, int]:
    """By how much a convolution at stride 1 makes its input larger: twice the padding less the kernel's reach."""
    (kh, kw), (dy, dx) = _pair(kernel_size), _pair(dilation)
    py, px = _padding(kernel_size, dilation, padding)
    return 2 * py - dy * (kh - 1), 2 * px - dx * (kw - 1)


def _check(x: Tensor, weight: Tensor, offset: Tensor | None, geometry: Geometry) -> None:
    b, c = x.shape[:2]
    count, size = len(geometry.taps), geometry.size
    if not x.is_floating_point() or not weight.is_floating_point():
        raise InputError(f"gathered takes floating-point numbers, got {x.dtype} and {weight.dtype}; use .float().")
    if min(size) < 1 or not x.numel():
        raise InputError(f"Nothing comes out of x {tuple(x.shape)}: the result would be {size[0]} x {size[1]}.")
    batch, groups, taps, *plane = weight.shape
    if batch not in (1, b) or taps != count or groups < 1 or c % groups or tuple(plane) not in (size, (1, 1)):
        raise InputError(
            f"For x {tuple(x.shape)} and {count} taps the weight is [{b} or 1, G, {count}, {size[0]}, {size[1]}], or "
            f"[..., 1, 1], where G divides {c}; got {tuple(weight.shape)}."
        )
    if offset is None:
        if any(not math.isfinite(v) or v != int(v) for tap in geometry.taps for v in tap):
            raise InputError(f"Without offsets taps are whole numbers, got {geometry.taps}.")
        return
    if (
        offset.dim() != 6
        or offset.shape[0] not in (1, b)
        or offset.shape[1] < 1
        or c % offset.shape[1]
        or tuple(offset.shape[2:]) != (count, 2, *size)
    ):
        raise InputError(
            f"For x {tuple(x.shape)} and {count} taps the offset is [{b} or 1, G', {count}, 2, {size[0]}, {size[1]}], "
            f"where G' divides {c}; got {tuple(offset.shape)}."
        )
