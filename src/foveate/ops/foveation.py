"""Pictures as an eye sees them that looks at one point: sharp there, blurred or mere texture elsewhere.

Both work on a Laplacian pyramid with the symmetric kernel k = (1, 3, 3, 1) / 8 (replicated border, sides round up):

    G_0 = x,   G_l+1 = reduce(G_l),   band_l = G_l - expand(G_l+1),   x = collapse(bands, G_L)

`varying_blur`: G_l put back to full size is x blurred by a kernel of variance V_l = (4^l - 1) / 2 square pixels. A mix
of neighbouring levels has the mixed variance, so at a place that asks for a standard deviation s, band_l is weighed by

    keep_l = clamp((V_l+1 - s^2) / (V_l+1 - V_l), 0, 1)

and the kernel has exactly variance s^2 where s is constant. Where s = 0 the picture stays as it is, bit for bit.

`log_polar_mix`: around the gaze lie windows that are products of raised cosines of log eccentricity d and angle
(Freeman, Simoncelli 2011), w_e = 2 asinh(scale / 2) wide in ln d and 2 pi / sectors in angle, so that diameter over
eccentricity is `scale` everywhere. They sum to 1 at each place, of which at most four are not 0; the windows of ring n
lie around d = fovea exp(w_e (n + 1)), and what is nearer belongs to the fovea. In window i, with means mu and standard
deviations s weighted by it,

    T_i = (z - mu_i(z)) / s_i(z) s_i(f) + mu_i(f),     out = sum_i window_i ((1 - a_i) f + a_i T_i)

so statistics are those of f and arrangement is that of z. With the four windows of each place known, all of it costs
a few operations per pixel whatever the number of windows. On the CPU, compiled loops take the place of PyTorch.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from foveate.errors import InputError
from foveate.ops import fast_allowed
from foveate.ops.threads import in_parts

LEAST_ROWS = 64
"""Rows that a thread is given at least."""

# --------------------------------------------------------------------------------------------------------- pyramid


def reduce(x: Tensor) -> Tensor:
    """Half the size. Shape: [B, C, H, W] -> [B, C, ceil(H / 2), ceil(W / 2)]."""
    if not _fast(x):
        return reduce_reference(x)
    out = x.new_empty(*x.shape[:2], -(-x.shape[2] // 2), -(-x.shape[3] // 2))
    _rows(_kernels().reduce, out, x, out)
    return out


def expand(x: Tensor, size: Sequence[int]) -> Tensor:
    """Twice the size, or one row or column less. Shape: [B, C, h, w] -> [B, C, *size]."""
    return F.interpolate(x, scale_factor=2, mode="bilinear")[..., : size[0], : size[1]]


def reduce_reference(x: Tensor) -> Tensor:
    """`reduce` as a convolution."""
    kernel = x.new_tensor((1.0, 3.0, 3.0, 1.0)) / 8
    x = F.pad(x, (1, 1 + x.shape[3] % 2, 1, 1 + x.shape[2] % 2), mode="replicate")
    weight = (kernel[:, None] * kernel).expand(x.shape[1], 1, 4, 4)
    return F.conv2d(x, weight, stride=2, groups=x.shape[1])


def laplacian(x: Tensor, levels: int) -> list[Tensor]:
    """Bands from the finest on, and what is left. Shape: [B, C, H, W] -> levels + 1 maps.

    Raises: InputError for another rank, an empty picture, integers, or levels below 0.
    """
    _check(x)
    if levels < 0:
        raise InputError(f"a pyramid has 0 or more levels, got {levels}.")
    bands = []
    for _ in range(levels):
        small = reduce(x)
        bands.append(_with_expanded(x, small, -1.0))
        x = small
    return [*bands, x]


def collapse(bands: Sequence[Tensor]) -> Tensor:
    """Undo `laplacian`.

    >>> x = torch.rand(1, 3, 13, 10)
    >>> torch.allclose(collapse(laplacian(x, 3)), x, atol=1e-6)
    True
    """
    x = bands[-1]
    for band in reversed(bands[:-1]):
        x = _with_expanded(band, x, 1.0)
    return x


def _with_expanded(x: Tensor, small: Tensor, sign: float) -> Tensor:
    """x + sign * expand(small)."""
    if not (_fast(x) and _fast(small)):
        return x + sign * expand(small, x.shape[2:])
    out = torch.empty_like(x, memory_format=torch.contiguous_format)
    _rows(_kernels().add_expanded, out, x, small, out, float(sign))
    return out


# ------------------------------------------------------------------------------------------------------------ blur


def varying_blur(x: Tensor, sigma: Tensor) -> Tensor:
    """Blur each place by its own standard deviation.

    Args:
        sigma: in pixels, 0 or more; deviations above half of what halves the shorter side to one pixel are cut.

    Shape: x [B, C, H, W], sigma [B or 1, H, W] -> [B, C, H, W].
    Raises: InputError for shapes that do not fit, or a sigma that is negative or not finite.
    """
    _check(x)
    if sigma.dim() != 3 or sigma.shape[1:] != x.shape[2:] or len(sigma) not in (1, len(x)):
        raise InputError(f"pictures {tuple(x.shape)} take sigma [B or 1, H, W], got {tuple(sigma.shape)}.")
    most = float(sigma.max())
    if not (math.isfinite(most) and float(sigma.min()) >= 0):
        raise InputError("sigma must be finite and 0 or more everywhere.")
    levels = 0
    while variance(levels) < most**2 and min(x.shape[2:]) >> levels > 1:
        levels += 1
    if levels == 0:
        return x.clone()
    bands, wanted = laplacian(x, levels), sigma[:, None].to(x.dtype).square()
    for i in range(levels):
        keep = ((variance(i + 1) - wanted) / (variance(i + 1) - variance(i))).clamp(0, 1)
        bands[i] = bands[i] * keep
        wanted = F.avg_pool2d(F.pad(wanted, (0, wanted.shape[3] % 2, 0, wanted.shape[2] % 2), mode="replicate"), 2)
    return torch.where(sigma[:, None] == 0, x, collapse(bands))


def variance(level: int) -> float:
    """V_l in square pixels.

    >>> [variance(l) for l in range(4)]
    [0.0, 1.5, 7.5, 31.5]
    """
    return (4.0**level - 1) / 2


def blur_reference(x: Tensor, sigma: Tensor, radius: int) -> Tensor:
    """Blur each place by a Gaussian of its own, tap by tap: what `varying_blur` comes near to, at great cost.

    Args:
        radius: of the window in pixels, three times the largest sigma or more.
    """
    offsets = torch.arange(-radius, radius + 1, dtype=x.dtype, device=x.device)
    narrow = sigma[:, None].to(x.dtype).clamp_min(1e-3)
    padded = F.pad(x, (radius,) * 4, mode="replicate")
    total, weights = torch.zeros_like(x), torch.zeros_like(narrow)
    for i, dy in enumerate(offsets):
        for j, dx in enumerate(offsets):
            weight = torch.exp(-(dy**2 + dx**2) / (2 * narrow.square()))
            total += weight * padded[..., i : i + x.shape[2], j : j + x.shape[3]]
            weights += weight
    return total / weights


# --------------------------------------------------------------------------------------------------------- windows


@dataclass(frozen=True)
class LogPolar:
    """Pooling windows around a gaze.

    Args:
        scale: diameter over eccentricity; about 0.25 in the visual cortex's first area, 0.5 in its second.
        degrees: visual angle of the longer side.
        fovea: eccentricity in degrees from which the first ring counts.
    """

    scale: float = 0.4
    degrees: float = 26.0
    fovea: float = 0.25

    def __post_init__(self) -> None:
        if not (0 < self.scale <= 4 and self.degrees > 0 and 0 < self.fovea < self.degrees):
            raise InputError(f"scale lies above 0 and up to 4, and 0 < fovea < degrees; got {self}.")

    @property
    def width(self) -> float:
        """w_e, in ln d."""
        return 2 * math.asinh(self.scale / 2)

    @property
    def rings(self) -> int:
        """Rings that reach across the diagonal of a square picture, and one."""
        return math.ceil(math.log(math.sqrt(2) * self.degrees / self.fovea) / self.width) + 1

    @property
    def sectors(self) -> int:
        """Windows of a ring."""
        return max(1, round(2 * math.pi / self.width))

    def radii(self) -> Tensor:
        """Radius in degrees of the windows of each ring: that of a disc of the area where the window is above 1/2."""
        steps = (torch.arange(400, dtype=torch.float64) + 0.5) / 400 * 1.5 - 0.75
        profile = 1 - _fade(steps.abs())
        wide = 2 * math.pi / self.sectors
        inside = (profile[:, None] * profile > 0.5) * torch.exp(2 * self.width * steps)[:, None]
        area = float(inside.sum()) * (1.5 / 400) ** 2 * self.width * wide
        centres = self.fovea * torch.exp(self.width * torch.arange(1, self.rings + 1, dtype=torch.float64))
        return (centres * math.sqrt(area / math.pi)).float()

    def places(self, size: tuple[int, int], gaze: Tensor | None = None, level: int = 0) -> "Places":
        """Where the pixels of a level of a pyramid lie among the windows.

        Args:
            size: (H, W) of the picture.
            gaze: (x, y) as shares of width and height, [B, 2]; default the middle, for all pictures.
        """
        d, angle = polar(size, gaze, self.degrees, level)
        depth = (d.clamp_min(1e-6) / self.fovea).log() / self.width - 1
        turn = _stepped(angle * (self.sectors / (2 * math.pi)) - 0.25) % self.sectors
        turn = torch.where(turn < self.sectors, turn, 0.0)  # a remainder may be rounded up to the whole
        return Places(_stepped(depth).clamp(-1, self.rings - 1), turn, self.rings, self.sectors)


@dataclass(frozen=True, eq=False)
class Places:
    """Of each pixel, a number between rings and one between sectors; the fractions are the weights of the next ones.

    Attributes:
        ring: -1, the fovea, to rings - 1, float32 [B or 1, h, w].
        sector: 0 to below `sectors`, the same.
    """

    ring: Tensor
    sector: Tensor
    rings: int
    sectors: int

    def windows(self) -> tuple[Tensor, Tensor]:
        """The four windows of each pixel, ring by ring from the fovea (which counts as one ring), and their weights.

        Shape: [B, h w, 4] both.
        """
        ring, sector = self.ring.flatten(1), self.sector.flatten(1)
        r0, s0 = ring.floor(), sector.floor()
        parts = []
        for r, s in ((0, 0), (0, 1), (1, 0), (1, 1)):
            row = (r0 + 1 + r).clamp(max=self.rings).long()
            weight = (ring - r0 if r else 1 - ring + r0) * (sector - s0 if s else 1 - sector + s0)
            parts.append((row * self.sectors + (s0.long() + s) % self.sectors, weight))
        index, weight = (torch.stack(t, -1) for t in zip(*parts, strict=True))
        return index, weight


def polar(
    size: tuple[int, int], gaze: Tensor | None = None, degrees: float = 26.0, level: int = 0
) -> tuple[Tensor, Tensor]:
    """Eccentricity in degrees and angle in radians of each pixel of a level of a pyramid.

    Args:
        size, gaze: as `LogPolar.places`.

    Shape: [B or 1, h, w] both. Raises: InputError for a gaze of another shape.
    """
    gaze = torch.full((1, 2), 0.5) if gaze is None else gaze
    if gaze.dim() != 2 or gaze.shape[1] != 2:
        raise InputError(f"a gaze is (x, y) in 0..1 for each picture, [B, 2]; got shape {tuple(gaze.shape)}.")
    step = 2**level
    offsets = []
    for side, at in zip(size, (gaze[:, 1], gaze[:, 0]), strict=True):
        middles = (torch.arange(-(-side // step), device=gaze.device, dtype=torch.float32) + 0.5) * step
        offsets.append((middles - at[:, None].float() * side) * (degrees / max(size)))
    y, x = offsets[0][:, :, None], offsets[1][:, None, :]
    return torch.hypot(x, y), torch.atan2(y, x)


def log_polar_mix(f: Tensor, z: Tensor, places: Places, alpha: Tensor, eps: float = 1e-10) -> Tensor:
    """Give z the statistics that f has in each window, and mix the two.

    Args:
        f, z: features and noise.
        places: of their pixels.
        alpha: share of noise in the windows of each ring, [rings]; the fovea has none, nor have windows with less than
            two pixels in them.
        eps: added to variances.

    Shape: [B, C, h, w] both -> the same.
    Raises: InputError for shapes that do not fit.
    """
    _check(f)
    if f.shape != z.shape or places.ring.shape[1:] != f.shape[2:] or len(places.ring) not in (1, len(f)):
        shapes = tuple(f.shape), tuple(z.shape), tuple(places.ring.shape)
        raise InputError(f"features, noise and places must be of one size, got {shapes}.")
    if alpha.shape != (places.rings,):
        raise InputError(f"expected a share of noise for each of {places.rings} rings, got {tuple(alpha.shape)}.")
    if not (_fast(f) and _fast(z)):
        return mix_reference(f, z, places, alpha, eps)
    out = torch.empty_like(f, memory_format=torch.contiguous_format)
    kernel, (batch, channels) = _kernels().mix, f.shape[:2]
    ring, sector = (t.float().expand(batch, -1, -1).contiguous().numpy() for t in (places.ring, places.sector))
    arrays = [t.detach().contiguous().numpy() for t in (f, z)]
    shares = alpha.double().numpy()
    in_parts(
        lambda i, j: kernel(*arrays, out.numpy(), ring, sector, shares, places.sectors, eps, i, j), batch * channels, 1
    )
    return out


def mix_reference(f: Tensor, z: Tensor, places: Places, alpha: Tensor, eps: float = 1e-10) -> Tensor:
    """`log_polar_mix` in plain PyTorch, on any device, with gradients."""
    batch, channels, windows = len(f), f.shape[1], (places.rings + 1) * places.sectors
    index, weight = (t.expand(batch, -1, -1).flatten(1) for t in places.windows())
    weight = weight.double()

    def total(values: Tensor) -> Tensor:
        """Sums per window of values [B, n, h w 4]."""
        empty = values.new_zeros(batch, values.shape[1], windows)
        return empty.scatter_add(2, index[:, None].expand_as(values), values)

    mass, squares = total(torch.stack([weight, weight.square()], 1)).unbind(1)
    enough = mass.square() >= 2 * squares * (mass > 0)
    share = torch.cat([alpha.new_zeros(1), alpha]).double().repeat_interleave(places.sectors) * (enough & (mass > 0))
    both = torch.cat([f, z], 1).double().flatten(2).repeat_interleave(4, 2)
    mass = mass[:, None].clamp_min(1e-30)
    mean = total(both * weight[:, None]) / mass
    spread = ((total(both.square() * weight[:, None]) / mass - mean.square()).clamp_min(0) + eps).sqrt()
    gain = spread[:, :channels] / spread[:, channels:]
    shift = mean[:, :channels] - gain * mean[:, channels:]

    def at_pixels(table: Tensor) -> Tensor:
        picked = table.gather(2, index[:, None].expand(-1, table.shape[1], -1)) * weight[:, None]
        return picked.unflatten(2, (-1, 4)).sum(3).unflatten(2, f.shape[2:])

    share = share[:, None]
    out = f * (1 - at_pixels(share)) + z * at_pixels(share * gain) + at_pixels(share * shift)
    return out.to(f.dtype)


def _stepped(x: Tensor) -> Tensor:
    """Whole numbers stay; between them the fraction is the weight of the next window."""
    whole = x.floor()
    return whole + _fade(x - whole)


def _fade(x: Tensor) -> Tensor:
    """Weight of the next window at a fraction x: 0 up to 1/4, 1 from 3/4 on, a raised cosine between."""
    return torch.cos(math.pi * (x.clamp(0.25, 0.75) - 0.75)).square()


def _check(x: Tensor) -> None:
    if x.dim() != 4 or not x.numel() or not x.is_floating_point():
        raise InputError(f"expected pictures [B, C, H, W] of floats, got {x.dtype} of shape {tuple(x.shape)}.")


def _fast(x: Tensor) -> bool:
    plain = x.device.type == "cpu" and x.dtype == torch.float32
    return plain and fast_allowed() and not (x.requires_grad and torch.is_grad_enabled())


def _rows(kernel: Callable[..., None], out: Tensor, *arguments: Any) -> None:
    """Run a kernel on the rows of `out`."""
    given = [a.detach().contiguous().numpy() if isinstance(a, Tensor) else a for a in arguments]
    in_parts(lambda i, j: kernel(*given, i, j), out.shape[0] * out.shape[1] * out.shape[2], LEAST_ROWS)


def _kernels() -> Any:
    from foveate.ops import _foveation_cpu

    return _foveation_cpu
