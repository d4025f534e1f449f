"""The mean-scale hyperprior: latents coded under Gaussians that a few side latents describe.

Minnen, Balle, Toderici 2018, arXiv:1809.02736; side latents' density: Balle, Minnen, Singh, Hwang, Johnston 2018,
arXiv:1802.01436, appendix 6.1. Several rates in one network by gains: Cui et al. 2021, arXiv:2003.02012.

    z        =  down(y)                                        side latents at a quarter of the size
    k_z      =  round(2^b z)           p(k_z) from a learned density, one for each channel
    mu, i    =  up(2^-b k_z)
    k        =  round(2^a (y - mu))    p(k) = Phi((k + 1/2) / s) - Phi((k - 1/2) / s),  s = 0.11 * 2^((i + 8 a) / 8)
    y_hat    =  mu + 2^-a k

A rate is a pair of gains a [M], b [Z]; rates between the trained ones are straight lines between their gains. As s is
spaced in eighths of octaves, i + 8 a is the number of its table in `foveate.compress.scales`, and rates only shift it.
While training, noise stands for the rounding where bits are counted, and the rounding itself, its gradient passed
through, where values are used (the "mixed" way).
"""

import math
from collections.abc import Sequence
from itertools import pairwise
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from foveate.compress.transforms import Up, down

SMALLEST, OCTAVE, TOP = 0.11, 8, 90
"""The narrowest scale, tables to an octave, the last table."""


class Coded(NamedTuple):
    """What coding latents gives: their rounded values, and bits per picture of latents and side latents."""

    latents: Tensor
    bits: Tensor
    side_bits: Tensor


class AtLeast(torch.autograd.Function):
    """max(x, bound), whose gradient still passes below the bound where it points back up."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, bound: float) -> Tensor:
        ctx.save_for_backward(x)
        ctx.bound = bound
        return x.clamp(min=bound)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        (x,), (grad,) = ctx.saved_tensors, grads
        return grad * ((x >= ctx.bound) | (grad < 0)), None


def rounded(x: Tensor) -> Tensor:
    """The nearest whole numbers, with the gradient of x itself."""
    return x + (x.round() - x).detach()


def gaussian_bits(k: Tensor, index: Tensor) -> Tensor:
    """-log2 p(k) under the scale of a table; at most 30.

    Args:
        k: whole, or as noisy as one pleases.
        index: of the table, fractions allowed.
    """
    low = AtLeast.apply(index, 0.0).clamp(max=TOP)
    inverse = torch.exp2(-low / OCTAVE) / SMALLEST
    far = k.abs()
    mass = torch.special.ndtr((0.5 - far) * inverse) - torch.special.ndtr((-0.5 - far) * inverse)
    return -AtLeast.apply(mass, 2.0**-30).log2()


class Density(nn.Module):
    """A learned density for every channel, by its cumulative function.

    Four layers from 1 to 3, 3, 3 and 1 numbers, each x <- softplus(H) x + c and, but for the last, then
    x <- x + tanh(f) tanh(x), are monotone in x; their sigmoid is the cumulative function.

    Args:
        channels: Z.
        spread: how wide it starts.
    """

    def __init__(self, channels: int, spread: float = 10.0) -> None:
        super().__init__()
        sizes = (1, 3, 3, 3, 1)
        start = spread ** (1 / (len(sizes) - 1))
        self.matrices, self.shifts, self.bends = nn.ParameterList(), nn.ParameterList(), nn.ParameterList()
        for inputs, outputs in pairwise(sizes):
            value = math.log(math.expm1(1 / (start * outputs)))
            self.matrices.append(nn.Parameter(torch.full((channels, outputs, inputs), value)))
            self.shifts.append(nn.Parameter(torch.rand(channels, outputs, 1) - 0.5))
            if len(self.matrices) < len(sizes) - 1:
                self.bends.append(nn.Parameter(torch.zeros(channels, outputs, 1)))

    def logits(self, x: Tensor) -> Tensor:
        """Log odds of lying below x. Shape: [Z, 1, n] -> the same."""
        for matrix, shift, bend in zip(self.matrices, self.shifts, [*self.bends, None], strict=True):
            x = F.softplus(matrix) @ x + shift
            x = x if bend is None else x + bend.tanh() * x.tanh()
        return x

    def mass(self, x: Tensor, half: Tensor) -> Tensor:
        """Probability of the interval x - half to x + half. Shape: [Z, n] -> the same."""
        upper, lower = self.logits((x + half)[:, None]), self.logits((x - half)[:, None])
        sign = -(upper + lower).sign().detach()  # the side on which the sigmoid keeps its digits
        return (torch.sigmoid(sign * upper) - torch.sigmoid(sign * lower)).abs()[:, 0]


def hyper_analysis(latents: int, widths: Sequence[int], kernels: Sequence[int] = (1, 4, 4)) -> nn.Sequential:
    """Latents to side latents at a quarter of the size. Published: widths (320, 320, 320), kernels (3, 5, 5)."""
    a, b, side = widths
    return nn.Sequential(
        down(latents, a, kernels[0]), nn.ReLU(), down(a, b, kernels[1], 2), nn.ReLU(), down(b, side, kernels[2], 2)
    )


def hyper_synthesis(latents: int, widths: Sequence[int], kernels: Sequence[int] = (4, 4, 1)) -> nn.Sequential:
    """Side latents to means and table numbers, 2 M channels. Published: widths (320, 320, 480), kernels (5, 5, 3)."""
    side, a, b = widths
    return nn.Sequential(
        Up(side, a, kernels[0], 2), nn.ReLU(), Up(a, b, kernels[1], 2), nn.ReLU(), Up(b, 2 * latents, kernels[2])
    )


class MeanScaleHyperprior(nn.Module):
    """Code latents at one of several rates.

    Args:
        latents: M.
        widths: channels of the hyper-synthesis; the first is Z.
        rates: number of trained rates.

    Shape: y [B, M, H, W], H and W multiples of 4; rate [B] in 0 .. rates - 1.
    """

    def __init__(self, latents: int = 320, widths: tuple[int, int, int] = (48, 80, 112), rates: int = 6) -> None:
        super().__init__()
        self.down = hyper_analysis(latents, (widths[2], widths[1], widths[0]))
        self.up = hyper_synthesis(latents, widths)
        self.density = Density(widths[0])
        even = (torch.arange(rates) - (rates - 1) / 2)[:, None] / 2  # doubling lambda divides steps by root 2
        self.gains = nn.Parameter(even.repeat(1, latents))
        self.side_gains = nn.Parameter(even.repeat(1, widths[0]) / 2)

    def at(self, rate: Tensor) -> tuple[Tensor, Tensor]:
        """Gains a [B, M, 1, 1] and b [B, Z, 1, 1] of rates [B]."""
        low = rate.floor().long().clamp(0, max(len(self.gains) - 2, 0))
        share = (rate - low)[:, None]
        high = (low + 1).clamp(max=len(self.gains) - 1)
        a, b = (torch.lerp(g[low], g[high], share) for g in (self.gains, self.side_gains))
        return a[..., None, None], b[..., None, None]

    def describe(self, z: Tensor) -> tuple[Tensor, Tensor]:
        """Means and table numbers at gain 0. Shape: [B, Z, H, W] -> two of [B, M, 4 H, 4 W]."""
        mean, index = self.up(z).chunk(2, 1)
        return mean, index

    def side_bits(self, k: Tensor, b: Tensor) -> Tensor:
        """-log2 p of side latents times their gains. Shape: [B, Z, H, W] -> the same."""
        step = torch.exp2(-b).expand_as(k).transpose(0, 1).flatten(1)
        mass = self.density.mass(k.transpose(0, 1).flatten(1) * step, 0.5 * step)
        bits = -AtLeast.apply(mass, 2.0**-30).log2()
        return bits.view(k.shape[1], k.shape[0], *k.shape[2:]).transpose(0, 1)

    def forward(self, y: Tensor, rate: Tensor) -> Coded:
        a, b = self.at(rate)
        scaled = self.down(y) * torch.exp2(b)
        mean, index = self.describe(rounded(scaled) * torch.exp2(-b))
        left = (y - mean) * torch.exp2(a)
        noisy = self.training
        bits = gaussian_bits(_noisy(left) if noisy else left.round(), index + OCTAVE * a)
        side = self.side_bits(_noisy(scaled) if noisy else scaled.round(), b)
        return Coded(mean + rounded(left) * torch.exp2(-a), bits.sum((1, 2, 3)), side.sum((1, 2, 3)))


def _noisy(x: Tensor) -> Tensor:
    return x + torch.rand_like(x) - 0.5
