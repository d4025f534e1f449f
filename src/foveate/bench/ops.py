"""The operators that `foveate bench ops` times. A new one takes a function that makes its `Case`, and a line below.

Inputs are random and float32; those of operators that run on a GPU alone are bfloat16, which is what they are for.
"""

from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Generator, Tensor

from foveate.bench.case import CPU, FORWARD, Case, Operator, Way, plain
from foveate.encode.fftnet import SpectralMixer
from foveate.ops import gaussians, subpixel, triangular_conv, wavelet
from foveate.ops.gathered import gathered
from foveate.ops.large_depthwise import large_depthwise
from foveate.ops.neighbourhood_attention import neighbourhood_attention, neighbourhood_reference
from foveate.ops.tile.attention import attention
from foveate.ops.tile.gemm import gemm
from foveate.ops.tile.linear_attention import linear_attention
from foveate.ops.tile.selective_scan import selective_scan
from foveate.proofs.encode.fftnet import Attention
from foveate.proofs.ops import scattermoe

GPU = ("cuda",)


def experts(dice: Generator, tokens: int) -> Case:
    """A mixture of MLPs, against copies padded to the largest load or to blocks, and against a loop over experts."""
    dim, count, k = 512, 8, 2
    m = scattermoe.mixture(tokens, dim, dim, count, k, dice)

    def of(layer: scattermoe.Layer) -> Way:
        return Way(lambda x, first, second, gate: layer(scattermoe.Mixture(x, first, second, gate, m.expert)))

    others = {name: of(layer) for name, layer in scattermoe.BASELINES.items() if layer is not scattermoe.dense}
    return Case(f"{tokens:,} x {dim}, {k} of {count} experts", m.leaves, of(scattermoe.scattered).call, others)


def spectral_mixer(dice: Generator, tokens: int) -> Case:
    """FFTNet's layer, against self-attention with its projections."""
    x = normal(dice, 1, tokens, 64)
    mixer, other = SpectralMixer(64, tokens, 4).to(x.device), Attention(64, 4).to(x.device)
    return Case(f"{tokens:,} x 64", (x,), mixer, {"attention": Way(other, values=None)})


def solve(dice: Generator, side: int) -> Case:
    """The inverse of a 3 x 3 convolution along anti-diagonals, against pixel by pixel, compiled and not."""
    weight = 0.05 * normal(dice, 1, 4, 4, 3, 3)
    weight[..., -1, -1] = torch.eye(4, device=weight.device)

    def raster(y: Tensor, weight: Tensor) -> Tensor:
        return triangular_conv.triangular_solve(y, weight, sweep=triangular_conv.raster)

    others = {"raster": Way(raster), "raster, reference": Way(plain(raster))}
    inputs = normal(dice, 8, 4, side, side), weight
    return Case(f"8 x 4 x {side} x {side}", inputs, triangular_conv.triangular_solve, others)


def dwt(dice: Generator, side: int) -> Case:
    """Three levels of the Haar transform, against PyWavelets where it is installed."""
    others = {}
    try:
        import pywt
    except ImportError:
        pass
    else:

        def by_pywavelets(x: Tensor) -> list[Any]:
            return pywt.wavedec2(x.numpy(), "haar", mode="symmetric", level=3)

        others["PyWavelets"] = Way(by_pywavelets, _bands, backward=False)
    x = normal(dice, 4, 3, side, side)
    return Case(f"4 x 3 x {side} x {side}, 3 levels", (x,), lambda x: wavelet.wavedec2(x, 3), others)


def queries(dice: Generator, features: int) -> Case:
    """Two layers on every pair of a feature and an offset, without the hidden values in memory."""
    inputs = tuple(normal(dice, *shape) for shape in ((features, 64), (16, 64), (3, 64), (3,)))
    return Case(f"{features:,} features, 16 offsets, 64 hidden", inputs, subpixel.two_layers)


def aggregation(dice: Generator, kernel: int) -> Case:
    """A kernel of its own at every place, shared by the channels of a group, against unfold."""
    side, channels, groups = 56, 64, 8

    def unfolded(x: Tensor, weight: Tensor) -> Tensor:
        taps = F.unfold(x, kernel, padding=kernel // 2).view(1, groups, -1, kernel**2, side, side)
        return (taps * weight[:, :, None]).sum(3).flatten(1, 2)

    inputs = normal(dice, 1, channels, side, side), normal(dice, 1, groups, kernel**2, side, side)
    size = f"{side} x {side} x {channels}, {kernel} x {kernel}"
    return Case(size, inputs, lambda x, w: gathered(x, w, kernel_size=kernel), {"unfold": Way(unfolded)})


def deformed(dice: Generator, side: int) -> Case:
    """The same, 3 x 3, at places that are free."""
    offset = 2 * normal(dice, 1, 8, 9, 2, side, side)
    inputs = normal(dice, 1, 64, side, side), normal(dice, 1, 8, 9, side, side), offset
    return Case(f"{side} x {side} x 64, 3 x 3", inputs, lambda *inputs: gathered(*inputs, kernel_size=3))


def neighbours(dice: Generator, kernel: int) -> Case:
    """Attention to the pixels around each pixel; `gathered` copies all neighbours at once, the reference by rows."""
    side, heads = 96, 4

    def gather(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        q, k, v = (x.unflatten(1, (heads, -1)) for x in (q / 4, k, v))
        return neighbourhood_reference(q, k, v, None, kernel).flatten(1, 2)

    inputs = tuple(normal(dice, 1, 64, side, side) for _ in range(3))
    attend = partial(neighbourhood_attention, kernel_size=kernel, heads=heads)
    return Case(f"{side} x {side} x 64, {kernel} x {kernel}", inputs, attend, {"gathered": Way(gather)})


def depthwise(dice: Generator, kernel: int) -> Case:
    """Depth-wise convolution with a large kernel; the reference is PyTorch's."""
    inputs = normal(dice, 1, 128, 28, 28), normal(dice, 128, 1, kernel, kernel)
    return Case(f"28 x 28 x 128, {kernel} x {kernel}", inputs, large_depthwise)


def drawing(dice: Generator, side: int) -> Case:
    """A picture as the sum of Gaussians, one for every 64 pixels."""
    count = side * side // 64
    centres = side * torch.rand(count, 2, generator=dice, device=dice.device)
    conics = torch.tensor([0.05, 0.01, 0.08], device=dice.device).repeat(count, 1)
    grid = gaussians.Grid(side, side)
    inputs = centres, conics, normal(dice, count, 3)

    def draw(centres: Tensor, conics: Tensor, colours: Tensor) -> Tensor:
        return gaussians.render(centres, conics, colours, grid, "cut")

    return Case(f"{side} x {side}, {count:,} Gaussians", inputs, draw)


def scan(dice: Generator, tokens: int) -> Case:
    """The recurrence of a state-space layer; the reference goes token by token."""
    u, delta, b, c = (normal(dice, 1, tokens, width) for width in (128, 128, 16, 16))
    inputs = u, delta.abs() / 8, -normal(dice, 128, 16).abs(), b, c
    return Case(f"{tokens:,} x 128, 16 states", inputs, selective_scan)


def linear_mixing(dice: Generator, tokens: int) -> Case:
    """Causal linear attention in chunks; the reference forms all pairs."""
    inputs = tuple(normal(dice, 1, 4, tokens, 32) for _ in range(3))
    return Case(f"{tokens:,} tokens, 4 heads of 32", inputs, linear_attention)


def softmax_mixing(dice: Generator, tokens: int) -> Case:
    """Attention by tiles, against PyTorch's; the reference holds the matrix of scores."""
    inputs = tuple(normal(dice, 4, 16, tokens, 64).bfloat16() for _ in range(3))
    return Case(
        f"{tokens:,} tokens, 64 heads of 64", inputs, attention, {"PyTorch": Way(F.scaled_dot_product_attention)}
    )


def product(dice: Generator, side: int) -> Case:
    """A matrix product with bias and GELU; the reference is PyTorch's, one after the other."""
    inputs = tuple(normal(dice, *shape).bfloat16() for shape in ((side, side), (side, side), (side,)))
    return Case(f"{side} x {side} x {side}", inputs, lambda a, b, bias: gemm(a, b / side**0.5, bias, "gelu"))


PIXELS, KERNEL = "pixels of a side", "pixels of a kernel's side"
SPECTRAL = tuple(256 << i for i in range(7))

OPERATORS = {
    operator.name: operator
    for operator in (
        Operator("grouped-linear", experts, "tokens", (256, 1024, 4096)),
        Operator("spectral-mixer", spectral_mixer, "tokens", SPECTRAL, devices=CPU),
        Operator("triangular-solve", solve, PIXELS, (16, 32, 64), devices=CPU),
        Operator("wavelet", dwt, PIXELS, (64, 256, 1024), devices=CPU),
        Operator("subpixel-queries", queries, "features", (1024, 4096, 16384), (FORWARD,), CPU),
        Operator("gathered", aggregation, KERNEL, (3, 5, 7)),
        Operator("gathered-with-offsets", deformed, PIXELS, (14, 28, 56)),
        Operator("neighbourhood-attention", neighbours, KERNEL, (3, 9, 13), devices=CPU),
        Operator("large-depthwise", depthwise, KERNEL, (13, 31, 51), devices=CPU),
        Operator("gaussians", drawing, PIXELS, (64, 128, 256)),
        Operator("selective-scan", scan, "tokens", (64, 256, 1024)),
        Operator("linear-attention", linear_mixing, "tokens", (256, 1024, 4096)),
        Operator("tile-attention", softmax_mixing, "tokens", (256, 1024, 4096), devices=GPU),
        Operator("tile-gemm", product, "rows", (512, 2048, 8192), devices=GPU),
    )
}
"""By name, in the order of the report."""


def normal(dice: Generator, *shape: int) -> Tensor:
    """Standard normal numbers on the generator's device."""
    return torch.randn(*shape, generator=dice, device=dice.device)


def _bands(levels: list[Any]) -> list[Tensor]:
    """PyWavelets' coefficients as `wavedec2` gives them."""
    low, *details = levels
    return [torch.from_numpy(low), *(torch.stack([torch.from_numpy(b) for b in bands], 2) for bands in details)]
