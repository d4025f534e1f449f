"""Mixing along a sequence through its spectrum: a real filter per head and frequency, and a threshold on magnitudes.

With F = rfft(x) along N tokens (norm "ortho", K = N // 2 + 1 bins k of frequency k / N), a real gain W and bias b,

    u = W F,    z = u relu(|u| + b) / (|u| + eps),    y = irfft(z, n=N).

modReLU (Arjovsky et al. 2016, arXiv:1511.06464) silences a bin whose magnitude is below -b and keeps the phase of the
others. With b = 0 the map is a circular convolution with the kernel irfft(W) (norm "backward"), even as W is real: it
can blur or sharpen, not move. N log N operations where a matrix takes N^2.

`mix_affine` is a smooth relative with an offset o added to the spectrum: z = u gelu(|u|) / (|u| + eps), u = W F + o.

Transforms run in float32 at least, because FFTs in half precision exist on some devices and for powers of two only. The
fast CPU path forms z of `mix`, and its gradients, in one pass over the spectrum. FFTs like lengths of small factors: a
prime N, such as the 197 tokens of 14 x 14 patches and a class token, takes several times as long as its neighbours.
"""

from collections.abc import Callable
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from foveate.errors import InputError
from foveate.ops import fast_allowed
from foveate.ops.threads import in_parts

EPS = 1e-6
"""Keeps modReLU finite where the spectrum is zero; costs that much, relatively, where magnitudes are 1."""


def mix(x: Tensor, gain: Tensor, bias: Tensor, eps: float = EPS) -> Tensor:
    """Filter tokens in the frequency domain, with modReLU: y = irfft(modrelu(gain * rfft(x), bias)).

    Args:
        gain: W, one response per picture or one for all, shared by the C / H channels of a head.
        bias: b of modReLU.

    Shape: x [B, N, C], gain [B or 1, H, K], bias [H, K] with K = N // 2 + 1 -> [B, N, C] in the type of x.
    Raises: InputError when the shapes do not fit.
    """
    _check(x, gain, bias)
    wide = [t.to(torch.promote_types(t.dtype, torch.float32)) for t in (x, gain, bias)]
    if not _fast(*wide):
        return mix_reference(x, gain, bias, eps)
    return _Mixed.apply(*wide, eps).to(x.dtype)


def mix_reference(x: Tensor, gain: Tensor, bias: Tensor, eps: float = EPS) -> Tensor:
    """`mix` in plain PyTorch."""
    return _through(x, gain.shape[1], lambda f: modrelu(f * _per_bin(gain), _per_bin(bias), eps))


def mix_affine(x: Tensor, gain: Tensor, offset: Tensor, eps: float = EPS) -> Tensor:
    """Filter tokens in the frequency domain with a gain, a real offset, and GELU of the magnitudes.

    Shape: x [B, N, C], gain and offset [B or 1, H, K] with K = N // 2 + 1 -> [B, N, C] in the type of x.
    Raises: InputError when the shapes do not fit.
    """
    _check(x, gain, offset[0])
    return _through(x, gain.shape[1], lambda f: _gelu_of_size(f * _per_bin(gain) + _per_bin(offset), eps))


def modrelu(z: Tensor, bias: Tensor, eps: float = EPS) -> Tensor:
    """z relu(|z| + bias) / (|z| + eps): shrink magnitudes by -bias, keep phases.

    Shape: z complex, bias real and broadcast against it -> as z.

    >>> modrelu(torch.tensor([3 + 4j, 0.1j]), torch.tensor(-1.0), eps=0.0)
    tensor([2.4000+3.2000j, 0.0000+0.0000j])
    """
    size = z.abs()
    return z * (torch.relu(size + bias) / (size + eps if eps else size.clamp_min(torch.finfo(size.dtype).tiny)))


def at_length(values: Tensor, built: int, n: int) -> Tensor:
    """Values per bin of a sequence of `built` tokens, read at the frequencies of one of n tokens (linear between bins).

    Shape: [..., built // 2 + 1] -> [..., n // 2 + 1].

    >>> at_length(torch.tensor([0.0, 1.0, 2.0]), 4, 8)
    tensor([0.0000, 0.5000, 1.0000, 1.5000, 2.0000])
    """
    if n == built:
        return values
    last = built // 2
    place = torch.arange(n // 2 + 1, device=values.device, dtype=torch.float64) * (built / n)
    place = place.clamp(max=last)  # an odd length has no bin at the highest frequency of an even one
    low = place.floor().long()
    part = (place - low).to(values.dtype)
    return torch.lerp(values[..., low], values[..., (low + 1).clamp(max=last)], part)


def _through(x: Tensor, heads: int, change: Callable[[Tensor], Tensor]) -> Tensor:
    """Change the spectrum of tokens. Shape: x [B, N, C], change [B, K, H, C / H] -> the same."""
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    spectrum = torch.fft.rfft(wide, dim=1, norm="ortho").unflatten(2, (heads, -1))
    return torch.fft.irfft(change(spectrum).flatten(2), n=x.shape[1], dim=1, norm="ortho").to(x.dtype)


def _per_bin(values: Tensor) -> Tensor:
    """Values of heads and bins, beside a spectrum. Shape: [..., H, K] -> [..., K, H, 1]."""
    return values.to(torch.promote_types(values.dtype, torch.float32)).mT[..., None]


def _gelu_of_size(z: Tensor, eps: float) -> Tensor:
    size = z.abs()
    return z * (F.gelu(size) / (size + eps))


def _check(x: Tensor, gain: Tensor, bias: Tensor) -> None:
    if x.dim() != 3 or not x.numel() or not x.is_floating_point():
        raise InputError(f"expected float tokens [B, N, C] that are not empty, got {x.dtype} {tuple(x.shape)}.")
    batch, n, channels = x.shape
    fits = gain.dim() == 3 and gain.shape[0] in (1, batch) and channels % gain.shape[1] == 0
    if not fits or gain.shape[2] != n // 2 + 1 or bias.shape != gain.shape[1:]:
        raise InputError(
            f"tokens {tuple(x.shape)} take a gain [{batch} or 1, heads, {n // 2 + 1}], heads dividing {channels}, and "
            f"a bias [heads, {n // 2 + 1}]; got {tuple(gain.shape)} and {tuple(bias.shape)}. See at_length for other N."
        )


def _fast(*tensors: Tensor) -> bool:
    return (
        fast_allowed()
        and not torch.compiler.is_compiling()
        and all(t.device.type == "cpu" and t.dtype == torch.float32 for t in tensors)
    )


class _Mixed(torch.autograd.Function):
    """`mix` in float32, and its gradients.

    Transforms and threshold run along memory, on [B, C, N] and [B, C, K]. Backward: rfft and irfft are each other's
    adjoints but for the bins that stand for two frequencies (all but 0 and N / 2); their factors 2 and 1/2 cancel on
    the way through, and a 2 is left in the gradients of gain and bias.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, gain: Tensor, bias: Tensor, eps: float) -> Tensor:
        spectrum = torch.fft.rfft(_turned(x.detach()), norm="ortho").contiguous()
        ctx.save_for_backward(spectrum, gain, bias)
        ctx.eps, ctx.length = eps, x.shape[1]
        arrays, z = _arrays(spectrum, gain, bias), spectrum.new_empty(spectrum.shape)
        out = torch.view_as_real(z).numpy()
        in_parts(lambda i, j: _kernels()["forward"](*arrays, eps, i, j, out), len(bias) * len(x), 1)
        return _turned(torch.fft.irfft(z, n=x.shape[1], norm="ortho"))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        spectrum, gain, bias = ctx.saved_tensors
        batch, n = len(spectrum), ctx.length
        g = torch.view_as_real(torch.fft.rfft(_turned(grads[0]), norm="ortho").contiguous()).numpy()
        arrays, d_spectrum = _arrays(spectrum, gain, bias), spectrum.new_empty(spectrum.shape)
        # One value per picture, head and bin; pictures are summed afterwards, so that threads share nothing.
        sums = gain.new_zeros(2, batch, *bias.shape)
        out = (torch.view_as_real(d_spectrum).numpy(), *sums.numpy())
        in_parts(lambda i, j: _kernels()["backward"](*arrays, ctx.eps, g, i, j, *out), len(bias) * batch, 1)
        sums[..., 1 : (n + 1) // 2] *= 2
        d_x = _turned(torch.fft.irfft(d_spectrum, n=n, norm="ortho"))
        return d_x, sums[0].sum_to_size(gain.shape), sums[1].sum(0), None


def _turned(x: Tensor) -> Tensor:
    """Transposed in memory. Shape: [B, M, N] -> [B, N, M]."""
    out = x.new_empty(x.mT.shape)
    for one, turned in zip(x, out, strict=True):  # PyTorch transposes a matrix in blocks, but not a stack of them
        turned.copy_(one.T)
    return out


def _arrays(spectrum: Tensor, gain: Tensor, bias: Tensor) -> tuple[Any, Any, Any]:
    """The operands as NumPy arrays, complex numbers as pairs."""
    gain, bias = gain.detach().contiguous(), bias.detach().contiguous()
    return torch.view_as_real(spectrum).numpy(), gain.numpy(), bias.numpy()


@cache
def _kernels() -> dict[str, Any]:
    import numba
    import numpy as np

    compiled = numba.njit(nogil=True, fastmath={"contract", "nsz", "arcp", "reassoc"}, cache=True, error_model="numpy")
    tiny, zero, one = np.finfo(np.float32).tiny, np.float32(0), np.float32(1)

    @compiled
    def forward(f, gain, bias, eps, start, stop, out):  # type: ignore[no-untyped-def]
        heads, small = bias.shape[0], np.float32(eps)
        width = f.shape[1] // heads
        for unit in range(start, stop):
            i, h = unit // heads, unit % heads
            w, b = gain[i % gain.shape[0], h], bias[h]
            for c in range(h * width, (h + 1) * width):
                for k in range(f.shape[2]):
                    re, im = w[k] * f[i, c, k, 0], w[k] * f[i, c, k, 1]
                    size = np.sqrt(re * re + im * im)
                    s = max(size + b[k], zero) / max(size + small, tiny)
                    out[i, c, k, 0] = s * re
                    out[i, c, k, 1] = s * im

    @compiled
    def backward(f, gain, bias, eps, g, start, stop, d_f, d_gain, d_bias):  # type: ignore[no-untyped-def]
        # z = s(|u|) u with s = relu(|u| + b) / (|u| + eps), so dz = s du + u s' d|u|, s' = (eps - b) / (|u| + eps)^2.
        heads, small = bias.shape[0], np.float32(eps)
        width = f.shape[1] // heads
        for unit in range(start, stop):
            i, h = unit // heads, unit % heads
            w, b, d_w, d_b = gain[i % gain.shape[0], h], bias[h], d_gain[i, h], d_bias[i, h]
            for c in range(h * width, (h + 1) * width):
                for k in range(f.shape[2]):
                    fr, fi = f[i, c, k, 0], f[i, c, k, 1]
                    gr, gi = g[i, c, k, 0], g[i, c, k, 1]
                    re, im = w[k] * fr, w[k] * fi
                    size = np.sqrt(re * re + im * im)
                    over = one / max(size + small, tiny)
                    along = (gr * re + gi * im) * over if size + b[k] > zero else zero
                    s = max(size + b[k], zero) * over
                    t = along * (small - b[k]) * over / max(size, tiny)
                    dr, di = s * gr + t * re, s * gi + t * im
                    d_f[i, c, k, 0] = w[k] * dr
                    d_f[i, c, k, 1] = w[k] * di
                    d_w[k] += dr * fr + di * fi
                    d_b[k] += along

    return {"forward": forward, "backward": backward}
