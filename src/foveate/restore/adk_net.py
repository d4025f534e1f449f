"""ADK-Net: reduce pictures as some camera or tool does, with a kernel for every pixel and colour learned from examples.

Pise, Ghosh 2025, "Learned Adaptive Kernels for High-Fidelity Image Downscaling", arXiv:2511.01620.

A network looks at the large picture and gives each small pixel (i, j) a K x K kernel per colour c, whose sum is 1:

    F = extractor(x) [B, C, h, w],    k_c = normalise(generator_c(F)) [B, K * K, h, w]
    y_c(i, j) = sum_ab k_c(i, j; a, b) x_c(i s + a - P, j s + b - P),      P = (K - s) / 2, x mirrored at its border

so what comes out is a weighted mean of what was there; nothing can be made up. K has the parity of the scale s, so the
window is centred on the small pixel, and is as wide as that of an antialiased bicubic, 4s or 4s - 1. Training minimises
|y - target| on pairs made by the downscaler to be imitated.

Normalisations: "signed" t - mean(t) + 1 / K^2 allows the negative lobes of sharp kernels, "softmax" keeps the result
within the window's range, "sum" clamps to 1e-6..1 and divides by the sum. The last layer begins with zeros: a box.

The paper's layers were not at hand; they follow its nearest open relative, the content adaptive resampler (Sun, Chen
2020), which has one kernel for all colours.
"""

from typing import Self

import torch
import torch.nn.functional as F
from huggingface_hub import PyTorchModelHubMixin
from torch import Tensor, nn

from foveate.data.degrade import downscale
from foveate.engine.tiles import merge, plan
from foveate.errors import InputError
from foveate.layers.upscaler import check_picture
from foveate.layers.window import mirrored
from foveate.ops.gathered import gathered, kernel_taps

NORMALISATIONS = ("signed", "softmax", "sum")

TILE = 128
"""Side of the parts in small pixels: kernels of the whole picture at once would take K * K times its memory."""


class ReflectedBlock(nn.Module):
    """x + conv3x3(LeakyReLU(conv3x3(x))), the map mirrored at its border. Shape: [B, C, H, W] -> the same."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels, channels, 3, padding=1, padding_mode="reflect")
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1, padding_mode="reflect")

    def forward(self, x: Tensor) -> Tensor:
        return x + self.conv2(F.leaky_relu(self.conv1(x), 0.2))


class ADKNet(nn.Module, PyTorchModelHubMixin):
    """The network; defaults are the full size.

    Args:
        scale: integer reduction s, 2 or more, with prime factors 2, 3 and 5.
        features: C.
        blocks: residual blocks of the extractor.
        trunk: residual blocks of each generator.
        kernel_size: K, of the parity of s; default 4s or, for odd s, 4s - 1.
        normalise: "signed", "softmax" or "sum".
        shared: one generator for all colours, as in the content adaptive resampler.

    Shape: [B, 3, H, W] in 0..1 -> [B, 3, ceil(H / s), ceil(W / s)]; what is missing to a multiple of s, and to K, is
        mirrored.
    Raises: InputError for settings that do not fit together.
    """

    slug = "adk-net"

    def __init__(
        self,
        scale: int = 2,
        features: int = 128,
        blocks: int = 5,
        trunk: int = 3,
        kernel_size: int | None = None,
        normalise: str = "signed",
        shared: bool = False,
    ) -> None:
        super().__init__()
        steps = _factors(scale)
        size = 4 * scale - scale % 2 if kernel_size is None else kernel_size
        if size < scale or (size - scale) % 2:
            raise InputError(
                f"kernel_size must be at least the scale and even or odd like it, or pictures move by half a pixel; "
                f"got {size} for scale {scale}."
            )
        if normalise not in NORMALISATIONS:
            raise InputError(f"unknown normalise {normalise!r}; use one of {', '.join(map(repr, NORMALISATIONS))}.")
        self.scale, self.kernel_size, self.normalise = scale, size, normalise
        thin = max(3, features // 2)
        self.conv_first = nn.Conv2d(3, thin, 5, padding=2, padding_mode="reflect")
        layers: list[nn.Module] = []
        for step in steps:
            layers += [nn.PixelUnshuffle(step), nn.Conv2d(thin * step**2, features, 1)]
            thin = features
        self.down = nn.Sequential(*layers)
        self.body = nn.Sequential(*(ReflectedBlock(features) for _ in range(blocks)))
        self.generators = nn.ModuleList(_generator(features, trunk, size**2) for _ in range(1 if shared else 3))
        # In small pixels: two per block, one for the last convolution, and the larger of the 5x5's reach and P.
        self.halo = 2 * (blocks + trunk) + 2 + -(-max(2, (size - scale) // 2) // scale)

    def kernels(self, x: Tensor) -> Tensor:
        """The kernel of each small pixel and colour.

        Shape: [B, 3, H, W] -> [B, 3, K * K, h, w], each K x K in row-major order; of a picture smaller than K, those of
            what it is mirrored to.
        """
        f = self.down(F.leaky_relu(self.conv_first(self._padded(x)), 0.2))
        f = f + self.body(f)
        t = torch.stack([generator(f) for generator in self.generators], 1)
        return self._normalised(t).expand(-1, 3, -1, -1, -1)

    def resample(self, x: Tensor, kernels: Tensor) -> Tensor:
        """Sum windows by kernels. Shape: x [B, 3, H, W], kernels [B or 1, 3, K * K, h, w] -> [B, 3, h, w]."""
        margin = (self.kernel_size - self.scale) // 2
        x = F.pad(self._padded(x), (margin,) * 4, mode="reflect") if margin else self._padded(x)
        return gathered(x, kernels, kernel_size=self.kernel_size, stride=self.scale, padding=0)

    def forward(self, x: Tensor) -> Tensor:
        h, w = (-(-n // self.scale) for n in x.shape[2:])
        return self.resample(x, self.kernels(x))[..., :h, :w]

    @torch.inference_mode()
    def reduce(self, x: Tensor, size: tuple[int, int] | None = None, tile: int = TILE) -> Tensor:
        """Reduce pictures, part by part.

        Args:
            x: pictures in 0..1.
            size: (h, w) of the result: the sides of x over the scale, rounded up (then x is mirrored beyond its border;
                the default) or down (then x is cut there).
            tile: side of the parts in small pixels; the result does not depend on it.

        Shape: [B, 3, H, W] -> [B, 3, h, w], not clipped.
        Raises: InputError for anything but pictures in 0..1, or another size.
        """
        check_picture(x)
        if float(x.min()) < -0.01 or float(x.max()) > 1.01:
            raise InputError(f"expected values in 0..1, got {float(x.min()):.3g} to {float(x.max()):.3g}.")
        s, sides = self.scale, x.shape[2:]
        wanted = tuple(-(-n // s) for n in sides) if size is None else tuple(size)
        if len(wanted) != 2 or any(w not in (n // s, -(-n // s)) for n, w in zip(sides, wanted, strict=True)):
            raise InputError(
                f"ADK-Net x{s} reduces {sides[0]} x {sides[1]} to {sides[0] / s:g} x {sides[1] / s:g}, rounded up "
                f"or down (height x width), got size {size}; pick weights of another scale, or another method."
            )
        h, w = wanted
        x = self._padded(x[..., : h * s, : w * s].to(next(self.parameters()).dtype))
        tiles = plan(x.shape[2] // s, x.shape[3] // s, tile, self.halo)
        parts = (self(x[..., s * y0 : s * y1, s * x0 : s * x1]) for x0, y0, x1, y1 in (t.window for t in tiles))
        return merge(parts, tiles)[..., :h, :w]

    def flops(self, x_size: tuple[int, int], size: tuple[int, int] | None = None) -> float:
        """FLOPs of reducing a picture of x_size (H, W), 2 per multiply-accumulate, without the overlap of parts."""
        from foveate.meter import count_flops

        h, w = (-(-n // self.scale) for n in x_size) if size is None else size
        side = 8 * self.scale
        weight = next(self.parameters())
        with torch.no_grad():
            spent = count_flops(self.forward, weight.new_zeros(1, 3, side, side))
        return spent / 64 * h * w

    @classmethod
    def pretrained(cls, scale: int, **changes: object) -> Self:
        """The network with the weights that come with foveate."""
        from foveate import weights

        return weights.load(cls.slug, scale, **changes)

    def _padded(self, x: Tensor) -> Tensor:
        """Whole groups of s x s pixels, and no fewer than a kernel has."""
        s, least = self.scale, self.kernel_size
        full = [-(-max(n, least) // s) * s for n in x.shape[-2:]]
        if full == list(x.shape[-2:]):
            return x
        rows, columns = (mirrored(n, m).to(x.device) for n, m in zip(x.shape[-2:], full, strict=True))
        return x[..., rows[:, None], columns]

    def _normalised(self, t: Tensor) -> Tensor:
        if self.normalise == "softmax":
            return t.softmax(2)
        if self.normalise == "signed":
            return t - t.mean(2, keepdim=True) + 1 / self.kernel_size**2
        t = (t + 1 / self.kernel_size**2).clamp(1e-6, 1)  # the zeros it begins with would have no gradient
        return t / t.sum(2, keepdim=True)


def describe(kernels: Tensor, scale: int) -> dict[str, Tensor]:
    """What kernels do, to look at: their centre of mass, spread and entropy.

    Args:
        kernels: as `ADKNet.kernels` gives them.
        scale: s, in whose units (small pixels) the first two are.

    Shape: [B, 3, K * K, h, w] -> x, y (0 is the pixel's middle), spread and entropy (in bits, of |k| / sum |k|),
        [B, 3, h, w] each.
    """
    side = round(kernels.shape[2] ** 0.5)
    places = (
        torch.tensor(kernel_taps(side, padding=0), dtype=kernels.dtype, device=kernels.device) - (side - 1) / 2
    ) / scale
    x, y = torch.einsum("bctij,tn->nbcij", kernels, places)
    share = kernels.abs() / kernels.abs().sum(2, keepdim=True)
    away = (places[:, 0, None, None] - x[:, :, None]).square() + (places[:, 1, None, None] - y[:, :, None]).square()
    spread = ((share * away).sum(2) / 2).sqrt()
    return {
        "x": x,
        "y": y,
        "spread": spread,
        "entropy": torch.special.entr(share).sum(2) / torch.log(share.new_tensor(2.0)),
    }


def sample_camera(x: Tensor, scale: int) -> Tensor:
    """A downscaler to be imitated, of another kind in every colour and in B of another kind at edges.

    Red is bicubic, antialiased, of a picture moved 0.3 pixels to the left; green the mean of s x s; blue a Gaussian of
    0.2 s pixels where the picture changes by more than 0.05 from pixel to pixel nearby, and of 0.6 s elsewhere.

    Shape: [B, 3, s*h, s*w] -> [B, 3, h, w].
    """
    red, green, blue = x.split(1, 1)
    moved = 0.7 * red + 0.3 * torch.cat([red[..., 1:], red[..., -1:]], 3)
    padded = F.pad(blue, (1, 1, 1, 1), mode="replicate")
    steps = (padded[..., 1:-1, 2:] - padded[..., 1:-1, :-2]).abs() + (
        padded[..., 2:, 1:-1] - padded[..., :-2, 1:-1]
    ).abs()
    edges = F.max_pool2d(steps / 2, scale) > 0.05
    sharp, soft = (_gaussian(blue, scale, sigma * scale) for sigma in (0.2, 0.6))
    return torch.cat([downscale(moved, scale), F.avg_pool2d(green, scale), torch.where(edges, sharp, soft)], 1)


def _gaussian(x: Tensor, scale: int, sigma: float) -> Tensor:
    """Samples of a Gaussian blur at the middle of s x s pixels. Shape: [B, 1, s*h, s*w] -> [B, 1, h, w]."""
    size = 4 * scale - scale % 2
    place = torch.arange(size, dtype=x.dtype, device=x.device) - (size - 1) / 2
    line = torch.exp(-place.square() / (2 * sigma**2))
    line = line / line.sum()
    x = F.pad(x, ((size - scale) // 2,) * 4, mode="reflect")
    return F.conv2d(F.conv2d(x, line.view(1, 1, 1, -1), stride=(1, scale)), line.view(1, 1, -1, 1), stride=(scale, 1))


def _generator(features: int, blocks: int, taps: int) -> nn.Sequential:
    last = nn.Conv2d(features, taps, 3, padding=1, padding_mode="reflect")
    nn.init.zeros_(last.weight)
    nn.init.zeros_(last.bias)  # type: ignore[arg-type]
    return nn.Sequential(*(ReflectedBlock(features) for _ in range(blocks)), last)


def _factors(scale: int) -> list[int]:
    """Steps of the reduction, twos first."""
    if not isinstance(scale, int) or scale < 2:
        raise InputError(f"ADK-Net reduces by a whole number, 2 or more, got {scale!r}.")
    steps, left = [], scale
    for prime in (2, 3, 5):
        while left % prime == 0:
            steps.append(prime)
            left //= prime
    if left > 1:
        raise InputError(f"ADK-Net reduces by numbers with prime factors 2, 3 and 5, got {scale}.")
    return steps
