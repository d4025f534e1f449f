"""FInC Flow: invertible k x k convolutions whose inverse takes O(n) steps, in a flow with exact likelihood.

Kallappa, Nagar, Varma 2023, "FInC Flow: Fast and Invertible k x k Convolutions for Normalizing Flows", VISAPP,
arXiv:2301.09266.

A convolution padded at two sides only looks towards one corner (`foveate.ops.triangular_conv`). With a unit lower
triangular last tap M, its determinant is 1 and its inverse a forward substitution along anti-diagonals: 2n - 1
dependent steps on n x n pixels. Of the C^2 k^2 weights only C (C+1)/2 are fixed. The FInC unit splits the channels in
four groups that look towards the four corners; a 1 x 1 convolution mixes them. One step of the flow is

    FInC unit (log-det 0) -> ActNorm (-H W sum s) -> 1 x 1 convolution (H W log |det W|) -> coupling (sum log s'),

one level is squeeze 2 x 2, K steps, and (all but the last) a coupling after which half of the channels leave for
N(0, I). The likelihood of a picture v in (0, 1)^D is exact:

    log p(v) = log N(z) + sum of log-dets + sum_d log (1 - 2a) / (s_d (1 - s_d)),  s = a + (1 - 2a) v,

the last term that of the logit in front. Sampling runs all of it backwards.
"""

import math
from typing import Self

import torch
import torch.nn.functional as F
from huggingface_hub import PyTorchModelHubMixin
from torch import Generator, Tensor, nn

from foveate.errors import InputError
from foveate.ops.triangular_conv import ORDERS, triangular_conv, triangular_solve

GROUPS = tuple(ORDERS)
"""The corners that the four groups of an FInC unit look towards."""


class FInCUnit(nn.Module):
    """Four invertible k x k convolutions, one per quarter of the channels and corner. The log-determinant is 0.

    Only free weights are parameters: C^2 k^2 - C (C+1)/2 per group of C channels, so no optimiser, weight decay or
    averaging can move the fixed ones and lose the inverse.

    Args:
        channels: a multiple of 4.
        kernel: k, at least 2.

    Shape: [B, channels, H, W] -> the same.
    Raises: InputError for other channels or kernels.
    """

    where: Tensor
    fixed: Tensor

    def __init__(self, channels: int, kernel: int = 3) -> None:
        super().__init__()
        if channels < 4 or channels % 4:
            raise InputError(
                f"an FInC unit needs a multiple of 4 channels, got {channels}. Squeeze the picture before."
            )
        if kernel < 2:
            raise InputError(f"an FInC unit needs a kernel of at least 2 x 2, got {kernel}.")
        c = channels // 4
        free = torch.ones(c, c, kernel, kernel, dtype=torch.bool)
        free[..., -1, -1] = torch.ones(c, c).tril(-1).bool()
        fixed = torch.zeros(c, c, kernel, kernel)
        fixed[..., -1, -1] = torch.eye(c)
        self.shape = (4, c, c, kernel, kernel)
        self.register_buffer("where", free.flatten().nonzero()[:, 0], persistent=False)
        self.register_buffer("fixed", fixed.flatten(), persistent=False)
        self.free = nn.Parameter(0.05 * torch.randn(4, int(free.sum())))

    @property
    def weight(self) -> Tensor:
        """The kernels, all as for order "tl". Shape: [4, C, C, k, k]."""
        return self.fixed.expand(4, -1).index_copy(1, self.where, self.free).view(self.shape)

    def forward(self, x: Tensor) -> Tensor:
        return triangular_conv(x, self.weight, GROUPS)

    def inverse(self, y: Tensor) -> Tensor:
        """The x that `forward` maps to y, in H + W - 1 dependent steps."""
        return triangular_solve(y, self.weight, GROUPS)


class ActNorm(nn.Module):
    """(x - m) exp(-s) per channel; the first batch in training sets m and s to give mean 0 and variance 1.

    Shape: [B, C, H, W] -> the same, log-det [].
    """

    ready: Tensor

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.shift = nn.Parameter(torch.zeros(channels, 1, 1))
        self.log_scale = nn.Parameter(torch.zeros(channels, 1, 1))
        self.register_buffer("ready", torch.tensor(False))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        if self.training and not self.ready:
            with torch.no_grad():
                self.shift.copy_(x.mean((0, 2, 3))[:, None, None])
                self.log_scale.copy_((x.std((0, 2, 3), unbiased=False) + 1e-6).log()[:, None, None])
                self.ready.fill_(True)
        y = (x - self.shift) * (-self.log_scale).exp()
        return y, -x.shape[2] * x.shape[3] * _wide(self.log_scale).sum()

    def inverse(self, y: Tensor) -> Tensor:
        return y * self.log_scale.exp() + self.shift


class ChannelMix(nn.Module):
    """Invertible 1 x 1 convolution, a random rotation at first. Shape: [B, C, H, W] -> the same, log-det []."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.linalg.qr(torch.randn(channels, channels))[0])

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        y = F.conv2d(x, self.weight[:, :, None, None])
        return y, x.shape[2] * x.shape[3] * torch.linalg.slogdet(_wide(self.weight))[1]

    def inverse(self, y: Tensor) -> Tensor:
        inverse = torch.linalg.inv(_wide(self.weight)).to(y.dtype)
        return F.conv2d(y, inverse[:, :, None, None])


class AffineCoupling(nn.Module):
    """The first half of the channels says how to scale and shift the second: y2 = x2 exp(log s) + t.

    log s = 2 tanh(h / 2) lies in -2..2, and (h, t) alternate in the output of three convolutions. The last one is zero
    at first and multiplied by exp(3 g) with a learned gain g per channel.

    Args:
        channels: even.
        hidden: width of the convolutions.

    Shape: [B, C, H, W] -> the same, log-det [B].
    """

    def __init__(self, channels: int, hidden: int) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(channels // 2, hidden, 3, padding=1),
            nn.ReLU(),
            nn.Conv2d(hidden, hidden, 1),
            nn.ReLU(),
        )
        self.last = nn.Conv2d(hidden, channels, 3, padding=1)
        self.gain = nn.Parameter(torch.zeros(channels, 1, 1))
        nn.init.zeros_(self.last.weight)
        nn.init.zeros_(self.last.bias)  # type: ignore[arg-type]

    def _scale_and_shift(self, x1: Tensor) -> tuple[Tensor, Tensor]:
        h = self.last(self.body(x1)) * (3 * self.gain).exp()
        return 2 * torch.tanh(h[:, 0::2] / 2), h[:, 1::2]

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        x1, x2 = x.chunk(2, 1)
        log_s, t = self._scale_and_shift(x1)
        return torch.cat([x1, x2 * log_s.exp() + t], 1), _wide(log_s).sum((1, 2, 3))

    def inverse(self, y: Tensor) -> Tensor:
        y1, y2 = y.chunk(2, 1)
        log_s, t = self._scale_and_shift(y1)
        return torch.cat([y1, (y2 - t) * (-log_s).exp()], 1)


class FlowStep(nn.Module):
    """FInC unit, ActNorm, 1 x 1 convolution, coupling. Shape: [B, C, H, W] -> the same, log-det [B]."""

    def __init__(self, channels: int, hidden: int, kernel: int) -> None:
        super().__init__()
        self.unit = FInCUnit(channels, kernel)
        self.norm = ActNorm(channels)
        self.mix = ChannelMix(channels)
        self.coupling = AffineCoupling(channels, hidden)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        x, by_norm = self.norm(self.unit(x))
        x, by_mix = self.mix(x)
        x, by_coupling = self.coupling(x)
        return x, by_norm + by_mix + by_coupling

    def inverse(self, y: Tensor) -> Tensor:
        return self.unit.inverse(self.norm.inverse(self.mix.inverse(self.coupling.inverse(y))))


class Level(nn.Module):
    """Squeeze 2 x 2, flow steps, and where half of the channels leave afterwards, a coupling of the two halves.

    Shape: [B, C, H, W] -> [B, 4*C, H/2, W/2], log-det [B].
    """

    def __init__(self, channels: int, steps: int, hidden: int, kernel: int, leave: bool) -> None:
        super().__init__()
        self.steps = nn.ModuleList(FlowStep(4 * channels, hidden, kernel) for _ in range(steps))
        if leave:
            self.steps.append(AffineCoupling(4 * channels, hidden))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        x = F.pixel_unshuffle(x, 2)
        changes = []
        for step in self.steps:
            x, change = step(x)
            changes.append(change)
        return x, torch.stack(changes).sum(0)

    def inverse(self, y: Tensor) -> Tensor:
        for step in reversed(self.steps):
            y = step.inverse(y)  # type: ignore[operator]
        return F.pixel_shuffle(y, 2)


class FInCFlow(nn.Module, PyTorchModelHubMixin):
    """A density over pictures: exact log-likelihood one way, samples the other.

    The paper trains 2 levels of 16 steps on MNIST (1 channel), 3 of 32 on CIFAR-10, 2 to 3 of 16 to 48 on ImageNet,
    with Adam on `bits_per_dim(x).mean()` at 1e-3, decayed by 0.99 per epoch.

    Args:
        channels: of the pictures.
        levels: L; sides must be multiples of 2^L.
        steps: K, flow steps per level.
        hidden: width of the couplings.
        kernel: k of the invertible convolutions.
        size: (height, width) of samples, where `sample` is not told otherwise.
        alpha: how far the logit stays from 0 and 1.

    Shape: pictures [B, channels, H, W] in 0..1 -> log-likelihood [B] in nats, of the density over the unit cube.
    Raises: InputError for sizes that make no flow.
    """

    def __init__(
        self,
        channels: int = 3,
        levels: int = 3,
        steps: int = 32,
        hidden: int = 512,
        kernel: int = 3,
        size: tuple[int, int] = (32, 32),
        alpha: float = 1e-6,
    ) -> None:
        super().__init__()
        if min(channels, levels, steps, hidden) < 1:
            raise InputError(
                "a flow needs at least one of each, got "
                f"channels={channels}, levels={levels}, steps={steps}, hidden={hidden}."
            )
        if not 0 < alpha < 0.5:
            raise InputError(f"alpha must lie between 0 and 0.5, got {alpha}; 1e-6 is usual.")
        self.channels, self.levels, self.alpha = channels, levels, alpha
        self.height, self.width = size
        self._check_sides(*size)
        widths = [channels * 2**level for level in range(levels)]
        self.blocks = nn.ModuleList(Level(c, steps, hidden, kernel, c != widths[-1]) for c in widths)

    @property
    def dtype(self) -> torch.dtype:
        """Type of the weights."""
        return next(self.parameters()).dtype

    @property
    def device(self) -> torch.device:
        """Where the weights lie."""
        return next(self.parameters()).device

    def forward(self, x: Tensor) -> Tensor:
        """The log-likelihood. Shape: [B, C, H, W] -> [B]."""
        latents, log_det = self.encode(x)
        return log_det + sum((-0.5 * (_wide(z).square() + math.log(2 * math.pi))).sum((1, 2, 3)) for z in latents)

    def encode(self, x: Tensor) -> tuple[list[Tensor], Tensor]:
        """Map pictures to what is standard normal under the flow.

        Shape: [B, C, H, W] -> one [B, C_l, H / 2^l, W / 2^l] per level l = 1..L, as many numbers in all; log-det [B].
        Raises: InputError for pictures of another rank, channel number, range or side.
        """
        self._check(x)
        s = self.alpha + (1 - 2 * self.alpha) * _wide(x)
        log_det = (math.log1p(-2 * self.alpha) - s.log() - torch.log1p(-s)).sum((1, 2, 3))
        x = (s.log() - torch.log1p(-s)).to(self.dtype)
        latents = []
        for level in self.blocks:
            x, change = level(x)
            log_det = log_det + change
            if level is not self.blocks[-1]:
                x, z = x.chunk(2, 1)
                latents.append(z)
        return [*latents, x], log_det

    def decode(self, latents: list[Tensor]) -> Tensor:
        """The pictures that `encode` maps to these latents. Raises: InputError for another number of latents."""
        if len(latents) != self.levels:
            raise InputError(f"expected {self.levels} latents, one per level, got {len(latents)}.")
        x = latents[-1][:, :0]
        for level, z in zip(reversed(self.blocks), reversed(latents), strict=True):
            x = level.inverse(torch.cat([x, z], 1))  # type: ignore[operator]
        return (torch.sigmoid(x) - self.alpha) / (1 - 2 * self.alpha)

    @torch.no_grad()
    def sample(
        self,
        count: int = 1,
        size: tuple[int, int] | None = None,
        temperature: float = 1.0,
        generator: Generator | None = None,
    ) -> Tensor:
        """Draw pictures.

        Args:
            count: how many.
            size: (height, width); default that of the constructor.
            temperature: standard deviation of the latents; below 1, likelier pictures.
            generator: of random numbers, on the device of the weights.

        Returns: [count, C, H, W] in 0..1.
        Raises: InputError for a count, size or temperature that makes no picture.
        """
        height, width = size or (self.height, self.width)
        self._check_sides(height, width)
        if count < 1 or not temperature >= 0:
            raise InputError(f"sample needs count >= 1 and temperature >= 0, got {count} and {temperature}.")
        shapes = []
        for level in range(1, self.levels + 1):
            c = self.channels * 2 ** (level if level < self.levels else level + 1)
            shapes.append((count, c, height >> level, width >> level))
        draw = [torch.randn(s, generator=generator, dtype=self.dtype, device=self.device) for s in shapes]
        return self.decode([temperature * z for z in draw]).clamp(0, 1)

    def bits_per_dim(self, x: Tensor, generator: Generator | None = None) -> Tensor:
        """Bits per colour value of 8-bit pictures, an upper bound by uniform dequantisation; its mean is the loss.

        With v = (level + u) / 256, u uniform in 0..1:  8 - log2 p(v) / D.

        Shape: [B, C, H, W] in 0..1 (rounded to 256 levels) -> [B].
        """
        self._check(x)
        noise = torch.rand(x.shape, generator=generator, dtype=_wide(x).dtype, device=x.device)
        v = ((_wide(x) * 255).round() + noise) / 256
        return 8 - self(v) / (x[0].numel() * math.log(2))

    @torch.no_grad()
    def reconstruction_error(self, x: Tensor) -> float:
        """Largest |decode(encode(x)) - x|. The inverse is a recurrence: watch this while weights grow."""
        return float((self.decode(self.encode(x)[0]) - x).abs().max())

    def _check(self, x: Tensor) -> None:
        if x.dim() != 4 or x.shape[1] != self.channels or not x.numel():
            raise InputError(f"expected pictures [B, {self.channels}, H, W], got {tuple(x.shape)}.")
        self._check_sides(*x.shape[2:])
        low, high = x.detach().aminmax()
        if not (low >= 0 and high <= 1):
            raise InputError(
                f"expected values in 0..1, got {float(low):g} to {float(high):g}. Divide 8-bit values by 255."
            )

    def _check_sides(self, height: int, width: int) -> None:
        unit = 2**self.levels
        if height < unit or width < unit or height % unit or width % unit:
            raise InputError(
                f"{self.levels} levels halve the sides {self.levels} times and need multiples of {unit}, got "
                f"{height} x {width}. Crop or pad the picture, or use fewer levels."
            )

    @classmethod
    def conformance_example(cls, larger: bool = False) -> tuple[Self, tuple[Tensor]]:
        """A small flow whose couplings have left zero, and pictures for it."""
        model = cls(channels=3, levels=2, steps=2, hidden=8, size=(8, 8))
        for module in model.modules():
            if isinstance(module, AffineCoupling):
                nn.init.normal_(module.last.weight, std=0.05)
        return model, (torch.rand(2, 3, *((12, 16) if larger else (8, 8))),)


def _wide(x: Tensor) -> Tensor:
    """The tensor in at least float32, for sums and logarithms."""
    return x.to(torch.promote_types(x.dtype, torch.float32))
