"""Depth-wise convolution with very large kernels, up to and beyond the size of the map.

Each channel has a kernel of its own, odd in height and width, and the map keeps its size (zeros around it):

    y[b, c, i, j] = bias[c] + sum_{u, v} w[c, u, v] x[b, c, i + u - K // 2, j + v - L // 2].

PyTorch's CPU convolution is made for kernels of a few pixels; with 31 x 31 it reaches a fraction of what the processor
can do, and with 27 x 27 on a 14 x 14 map three of four of its products are with the zeros outside. There are two other
ways to the same values:

    compiled   Channels are taken 16 at a time and lie innermost, [C / 16, H, W, 16], so that vectors run over channels
               and fit every shape. One kernel, `correlate`, keeps 6 neighbouring outputs in registers while it walks
               over the taps that touch the map, and no others. The gradient of the map is the same convolution with the
               kernels mirrored; that of the kernels is `correlate` again, output and map in other roles.
    FFT        A product of spectra, whose cost does not grow with the kernel once that is larger than the map.

Half precision is computed in float32 on the CPU: a sum of 961 products in bfloat16 would keep two digits.
"""

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from foveate.errors import InputError
from foveate.ops import fast_allowed
from foveate.ops.threads import in_parts

SMALL = 10
"""Up to this side of a kernel PyTorch's convolution is as fast (it has code of its own for small ones)."""

FFT_COST = 11
"""What a step of a transform, n of n log2 n, takes in multiply-accumulates of the compiled loop (measured)."""

LANES, TILE = 16, 6
"""Channels side by side, and outputs that are found at once: 12 vectors of 8 floats, which 16 registers hold."""

_ROWS = 8
"""Rows that a thread is given at least."""


def large_depthwise(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """Convolve every channel with its own kernel, at stride 1, the map keeping its size.

    Shape: x [B, C, H, W], weight [C, 1, K, L] with K and L odd, bias [C] -> [B, C, H, W].
    Raises: InputError for even kernels, which have no centre, and for shapes that do not fit.

    >>> x, weight = torch.rand(1, 2, 7, 7), torch.zeros(2, 1, 13, 13)
    >>> weight[:, :, 6, 6] = 1
    >>> torch.equal(large_depthwise(x, weight), x)
    True
    """
    check(x, weight, bias)
    way = path_for(x, weight)
    if way == "conv":
        return depthwise_reference(x, weight, bias)
    wide = x.float(), weight.float()
    y = _Compiled.apply(*wide) if way == "compiled" else depthwise_fft(*wide)
    return (y if bias is None else y + bias[:, None, None]).to(x.dtype)


def path_for(x: Tensor, weight: Tensor) -> str:
    """Which way `large_depthwise` goes, by what each costs: "conv" (PyTorch's), "compiled" or "fft"."""
    cpu = x.device.type == "cpu" and weight.device.type == "cpu"
    if not (fast_allowed() and cpu) or torch.compiler.is_compiling() or x.dtype == torch.float64 or not x.numel():
        return "conv"
    if max(weight.shape[2:]) < SMALL:
        return "conv"
    sides = list(zip(x.shape[2:], (k // 2 for k in weight.shape[2:]), strict=True))
    # Along a side of n pixels a kernel of reach r meets the map n (2 r + 1) times, less what lies outside at both ends.
    products = len(x) * math.prod(n * (2 * min(r, n - 1) + 1) - min(r, n - 1) * (min(r, n - 1) + 1) for n, r in sides)
    points = math.prod(_smooth(n + min(r, n - 1)) for n, r in sides)
    steps = (2 * len(x) + 1) * points * math.log2(points + 1)  # there and back again, and the kernel's
    return "fft" if products > FFT_COST * steps else "compiled"


def depthwise_reference(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """`large_depthwise` as PyTorch's convolution."""
    height, width = weight.shape[2:]
    return F.conv2d(x, weight, bias, padding=(height // 2, width // 2), groups=len(weight))


def depthwise_fft(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """`large_depthwise` through Fourier transforms."""
    # Taps that reach no pixel are left out, so that what wraps around needs no more room than map and kernel.
    reach = [min(k // 2, n - 1) for k, n in zip(weight.shape[2:], x.shape[2:], strict=True)]
    rows, columns = (slice(k // 2 - r, k // 2 + r + 1) for k, r in zip(weight.shape[2:], reach, strict=True))
    kernel = weight[:, 0, rows, columns].flip(1, 2)
    size = [_smooth(n + r) for n, r in zip(x.shape[2:], reach, strict=True)]
    product = torch.fft.rfft2(x, s=size) * torch.fft.rfft2(kernel, s=size)
    # Outputs begin `reach` further on: wrapped values fall on the first `reach` of them, which are not read.
    y = torch.fft.irfft2(product, s=size)[..., reach[0] : reach[0] + x.shape[2], reach[1] : reach[1] + x.shape[3]]
    return y.contiguous() if bias is None else y + bias[:, None, None]


def check(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> None:
    """Refuse what does not fit. Raises: InputError."""
    if weight.dim() != 4 or weight.shape[1] != 1 or not (weight.shape[2] % 2 and weight.shape[3] % 2):
        raise InputError(f"expected kernels [C, 1, K, L] with K and L odd, got {tuple(weight.shape)}; pad even ones.")
    if x.dim() != 4 or x.shape[1] != len(weight):
        raise InputError(f"{len(weight)} kernels take a map [B, {len(weight)}, H, W], got {tuple(x.shape)}.")
    if bias is not None and bias.shape != weight.shape[:1]:
        raise InputError(f"{len(weight)} kernels take as many biases, got {tuple(bias.shape)}.")


class _Compiled(torch.autograd.Function):
    """The compiled convolution in float32, and its gradients."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight)
        return _convolve(x.detach(), weight.detach())

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, Tensor | None]:
        x, weight = ctx.saved_tensors
        d_x = _convolve(gradients[0], weight.flip(2, 3)) if ctx.needs_input_grad[0] else None
        d_weight = _weight_gradient(x, gradients[0], weight.shape) if ctx.needs_input_grad[1] else None
        return d_x, d_weight


def _convolve(x: Tensor, weight: Tensor) -> Tensor:
    from foveate.ops import _large_depthwise_cpu as kernels

    _, channels, height, width = x.shape
    source, taps = _blocks(x, TILE - 1), _blocks(weight.transpose(0, 1), 0)
    out = source.new_empty(len(source), height, -(-width // TILE) * TILE, LANES)
    arrays = source.numpy(), taps.numpy(), out.numpy()
    in_parts(lambda i, j: kernels.convolve(*arrays, width, i, j), len(out) * height, _ROWS)
    return _channels(out[:, :, :width], channels)


def _weight_gradient(x: Tensor, gradient: Tensor, shape: torch.Size) -> Tensor:
    from foveate.ops import _large_depthwise_cpu as kernels

    channels, _, height, width = shape
    source, towards = _blocks(x, TILE - 1), _blocks(gradient, 0)
    out = source.new_zeros(-(-channels // LANES), height, -(-width // TILE) * TILE, LANES)
    arrays = source.numpy(), towards.numpy(), out.numpy()
    in_parts(lambda i, j: kernels.weigh(*arrays, width, i, j), len(out) * height, _ROWS)
    return _channels(out[:, :, :width], channels).transpose(0, 1)


def _blocks(x: Tensor, edge: int) -> Tensor:
    """Channels innermost, LANES at a time, and `edge` zeros left and right.

    Shape: [B, C, H, W] -> [B * ceil(C / LANES), H, W + 2 edge, LANES].
    """
    batch, channels, height, width = x.shape
    blocks, rest = -(-channels // LANES), -channels % LANES
    make = torch.zeros if edge or rest else torch.empty
    out = make(batch, blocks, height, width + 2 * edge, LANES)
    if rest:
        x = F.pad(x, (0, 0, 0, 0, 0, rest))
    out[:, :, :, edge : edge + width] = x.unflatten(1, (blocks, LANES)).permute(0, 1, 3, 4, 2)
    return out.flatten(0, 1)


def _channels(blocks: Tensor, channels: int) -> Tensor:
    """Undo `_blocks` without an edge. Shape: [B * n, H, W, LANES] -> [B, C, H, W]."""
    x = blocks.unflatten(0, (-1, -(-channels // LANES))).permute(0, 1, 4, 2, 3).flatten(1, 2)
    return x[:, :channels].contiguous()


def _smooth(n: int) -> int:
    """The smallest number from n on with no prime factor above 5, which FFTs are fast at.

    >>> [_smooth(n) for n in (7, 71, 90, 97)]
    [8, 72, 90, 100]
    """
    while True:
        rest = n
        for prime in (2, 3, 5):
            while rest % prime == 0:
                rest //= prime
        if rest == 1:
            return n
        n += 1
