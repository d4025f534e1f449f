"""Foveated perception: a picture as an eye sees it, sharp at the gaze and texture, or blur, away from it.

Deza, Konkle 2020, "Emergent Properties of Foveated Perceptual Systems", arXiv:2006.07991; the transform is that of
Deza, Jonnalagadda, Eckstein 2019, "Towards Metamerism via Foveated Style Transfer", arXiv:1705.10041.

Peripheral vision keeps statistics of regions that grow with eccentricity, not a blurred picture. With features
f = encode(x) and z = encode(noise in the picture's colours), each log-polar window i (`foveate.ops.foveation`) mixes
its features with noise that was given their mean and standard deviation per channel,

    f'_i = (1 - a_i) f + a_i ((z - mu_i(z)) / s_i(z) s_i(f) + mu_i(f)),   a_i = 2 / (1 + exp(-1.281 r_i)) - 1

with r_i the window's radius in degrees (1.281 was fitted to human observers) and a = 0 in the fovea; x' = decode(f').

Encoder and decoder are a Laplacian pyramid of four bands (what is left below them stays), which loses nothing and needs
no weights; the authors' are VGG-19 up to relu4_1 and a trained mirror of it, which may be given. Windows blend by their
values where the authors let later ones overwrite earlier ones, and the radius of a window is that of the whole window,
also where the picture cuts it.

For comparison, as in the paper: "blur" grows with eccentricity, "uniform" is the same everywhere, "reference" is
decode(encode(x)); `matched` finds blurs of equal mean SSIM.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from foveate.engine.allocate import calibrate
from foveate.errors import InputError
from foveate.ops.foveation import LogPolar, Places, collapse, laplacian, log_polar_mix, polar, varying_blur

KINDS = ("texture", "blur", "uniform", "reference")
BLURS = {"blur": 0.1, "uniform": 3.47 * 26 / 256}
"""Of neither kind's own: share of the eccentricity; and degrees, the authors' 3.47 pixels of 256."""

LEVELS = 4
SLOPE = 1.281

Encode = Callable[[Tensor], Sequence[Tensor]]
Decode = Callable[[Sequence[Tensor]], Tensor]


class FoveatedPerception(nn.Module):
    """See pictures with a gaze.

    A data transform: no parameters, any size, one picture or a batch, and the same result for the same seed.

    Args:
        kind: "texture", "blur", "uniform" or "reference".
        scale, degrees, fovea: see `foveate.ops.foveation.LogPolar`.
        blur: standard deviation, for "uniform" in degrees, for "blur" in degrees per degree of eccentricity.
        slope: how fast a window's share of noise grows with its radius.
        encode, decode: pictures [B, C, H, W] -> feature maps, each a power of two smaller, and back.
        seed: of the noise.

    Shape: [B, C, H, W] or [C, H, W] in 0..1 -> the same.
    Raises: InputError for settings or pictures that do not fit.

    >>> see = FoveatedPerception()
    >>> x = torch.rand(2, 3, 60, 80)
    >>> y = see(x, gaze=torch.tensor([[0.25, 0.5], [0.5, 0.5]]))
    >>> y.shape, torch.equal(y[0, :, 29:31, 19:21], x[0, :, 29:31, 19:21])
    (torch.Size([2, 3, 60, 80]), True)
    """

    def __init__(
        self,
        kind: str = "texture",
        scale: float = 0.4,
        degrees: float = 26.0,
        fovea: float = 0.25,
        blur: float | None = None,
        slope: float = SLOPE,
        encode: Encode | None = None,
        decode: Decode | None = None,
        seed: int = 0,
    ) -> None:
        super().__init__()
        if kind not in KINDS:
            raise InputError(f"there is no kind {kind!r}; use one of {', '.join(KINDS)}.")
        if (encode is None) != (decode is None):
            raise InputError("an encoder needs its decoder: give both encode and decode, or neither.")
        self.kind, self.windows = kind, LogPolar(scale, degrees, fovea)
        self.blur = BLURS.get(kind, 0.0) if blur is None else float(blur)
        if not (self.blur >= 0 and slope >= 0):
            raise InputError(f"blur and slope are 0 or more, got {self.blur} and {slope}.")
        self.seed = seed
        self.alpha = 2 / (1 + torch.exp(-slope * self.windows.radii())) - 1
        """Share of noise in the windows of each ring, [rings], in 0..1."""
        self.encode, self.decode = encode, decode
        self._places: dict[Any, Places] = {}

    def forward(self, x: Tensor, gaze: Tensor | None = None, seeds: Sequence[int] | None = None) -> Tensor:
        """See.

        Args:
            gaze: (x, y) as shares of width and height, [B, 2] or [2]; default the middle.
            seeds: of each picture's noise; default `seed`, `seed` + 1, ...
        """
        if x.dim() == 3:
            return self.forward(x[None], None if gaze is None else gaze.view(1, 2), seeds)[0]
        if x.dim() != 4 or not x.numel() or not x.is_floating_point():
            raise InputError(f"expected pictures [B, C, H, W] of floats in 0..1, got {x.dtype} {tuple(x.shape)}.")
        if not bool(torch.isfinite(x).all()):
            raise InputError("the picture holds NaN or infinite values; clean it first (torch.nan_to_num).")
        seeds = range(self.seed, self.seed + len(x)) if seeds is None else seeds
        if len(seeds) != len(x) or (gaze is not None and gaze.shape != (len(x), 2)):
            shape = None if gaze is None else tuple(gaze.shape)
            raise InputError(f"{len(x)} pictures take as many seeds and gazes [B, 2]; got {len(seeds)} and {shape}.")
        wide = x.to(torch.promote_types(x.dtype, torch.float32))
        gaze = gaze if gaze is None else gaze.to(x.device)
        return self._see(wide, gaze, seeds).to(x.dtype)

    def _see(self, x: Tensor, gaze: Tensor | None, seeds: Sequence[int]) -> Tensor:
        if self.kind != "texture":
            seen = self._decoded(self._encoded(x)) if self.encode else x
            return varying_blur(seen, self.sigma(x, gaze)) if self.kind != "reference" else seen
        features, noise = self._encoded(x), self._encoded(recoloured(_noise(x, seeds), x))
        eps, alpha = (1e-5 if self.encode else 1e-10), self.alpha.to(x.device)
        # What the pyramid leaves below its bands are means of windows rather than texture.
        mixing = len(features) if self.encode else len(features) - 1
        mixed = [
            log_polar_mix(f, z, self._placed(x, gaze, round(math.log2(x.shape[2] / f.shape[2]))), alpha, eps)
            for f, z in zip(features[:mixing], noise[:mixing], strict=True)
        ]
        seen = self._decoded([*mixed, *features[mixing:]]).clamp(0, 1)
        own = self._decoded(features) if self.encode else x
        return torch.where(self._placed(x, gaze, 0).ring[:, None] <= -1, own, seen)

    def sigma(self, x: Tensor, gaze: Tensor | None = None) -> Tensor:
        """Standard deviation of the blur in pixels at each place, 0 in the fovea of "blur". Shape: [B or 1, H, W]."""
        size = (x.shape[2], x.shape[3])
        pixels = max(size) / self.windows.degrees
        if self.kind == "uniform":
            return x.new_full((1, *size), self.blur * pixels)
        d = polar(size, gaze, self.windows.degrees)[0].to(x.device)
        return torch.where(d > self.windows.fovea, self.blur * pixels * d, 0.0).to(x.dtype)

    def _encoded(self, x: Tensor) -> list[Tensor]:
        if self.encode is not None:
            return list(self.encode(x))
        return laplacian(x, min(LEVELS, min(x.shape[2:]).bit_length() - 1))

    def _decoded(self, features: Sequence[Tensor]) -> Tensor:
        return collapse(features) if self.decode is None else self.decode(features)

    def _placed(self, x: Tensor, gaze: Tensor | None, level: int) -> Places:
        size = (x.shape[2], x.shape[3])
        if gaze is not None:
            return self.windows.places(size, gaze, level)
        key = (size, level, x.device)
        if key not in self._places:
            if len(self._places) > 64:  # pictures of ever new sizes
                self._places.clear()
            self._places[key] = self.windows.places(size, torch.full((1, 2), 0.5, device=x.device), level)
        return self._places[key]


def matched(kind: str, like: FoveatedPerception, pictures: Tensor, most: float = 16.0) -> FoveatedPerception:
    """A blur with the mean SSIM of another transform, both to that one's reference.

    Args:
        kind: "blur" or "uniform".
        like: the transform that is to be matched.
        pictures: [B, C, H, W] in 0..1.
        most: largest `blur` tried.
    """
    settings = like.windows.scale, like.windows.degrees, like.windows.fovea
    clear = FoveatedPerception("reference", *settings, encode=like.encode, decode=like.decode)(pictures)

    def made(blur: float) -> FoveatedPerception:
        return FoveatedPerception(kind, *settings, blur=blur, encode=like.encode, decode=like.decode)

    def lost(transform: FoveatedPerception) -> float:
        from foveate.meter import ssim

        return 1 - float(ssim(transform(pictures), clear).mean())

    return made(calibrate(lambda blur: lost(made(blur)), lost(like), 0.0, most, 1e-3))


def recoloured(noise: Tensor, like: Tensor) -> Tensor:
    """Noise with the mean, standard deviation and correlation of a picture's channels (CORAL). Shape: [B, C, H, W]."""
    (z, _, _), (_, mean, spread) = _standard(noise), _standard(like)
    roots = []
    for x, power in ((_standard(like)[0], 0.5), (z, -0.5)):
        covariance = x.flatten(2) @ x.flatten(2).mT + torch.eye(x.shape[1], device=x.device, dtype=x.dtype)
        values, vectors = torch.linalg.eigh(covariance)
        roots.append(vectors @ torch.diag_embed(values.clamp_min(1e-12) ** power) @ vectors.mT)
    return ((roots[0] @ roots[1]) @ z.flatten(2)).view_as(z) * spread + mean


def _standard(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    mean, spread = x.mean((2, 3), keepdim=True), x.std((2, 3), keepdim=True, unbiased=False)
    return (x - mean) / spread.clamp_min(1e-6), mean, spread


def _noise(x: Tensor, seeds: Sequence[int]) -> Tensor:
    """Normal noise, the same for a seed wherever a picture stands in its batch and on whatever device."""
    drawn = [torch.randn(x.shape[1:], generator=torch.Generator().manual_seed(int(s))) for s in seeds]
    return torch.stack(drawn).to(x.device, x.dtype)


def conformance_example() -> tuple[FoveatedPerception, tuple[Tensor]]:
    """Texture, on noise of an odd size."""
    return FoveatedPerception(), (torch.rand(2, 3, 45, 64),)
