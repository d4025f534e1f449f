"""GSASR: a network turns a picture into 2-D Gaussians, which are drawn at any resolution.

Chen, Chen, Zhang, Zhang 2025, "Generalized and Efficient 2D Gaussian Splatting for Arbitrary-scale Super-Resolution",
arXiv:2501.06838.

An implicit picture asks an MLP for every output pixel. Here an encoder and a decoder (`foveate.restore.gsasr_decoder`)
run once at low resolution and give g * g Gaussians for every pixel, 9 numbers r each:

    sigma_v, sigma_h = (0.99999 sigmoid(r0, r1) + 1e-6) / 1.2       in low-resolution pixels
    rho = 0.999999 tanh(r2)      alpha = sigmoid(r3)      c = sigmoid(r4..6)      mu = (cell + 1/2 + (r7, r8)) / g

    I(p) = sum_n alpha_n c_n exp(-(u^2 - 2 rho u v + v^2) / (2 (1 - rho^2))),
           u = (p_x - mu_x) / sigma_h,   v = (p_y - mu_y) / sigma_v

The plane is measured in low-resolution pixels and an output pixel is a place of it, so that any scale, also a
different one in x and in y, only changes where the sum is looked at. The decoder is told 1 / s, s = sqrt(s_x s_y).

With `base` the sum is added to the picture enlarged by bicubic interpolation, and c = (r4..6) + x - mean3x3(x) has any
sign: Gaussians say only what interpolation lacks, begin by sharpening, and some minutes of training are enough. Without
the second term training ends at alpha = 0.
"""

import warnings
from collections.abc import Mapping, Sequence
from math import ceil, floor, log, pi, sqrt
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from foveate.engine.tiles import Box
from foveate.errors import InputError, WeightsError
from foveate.layers.encoders import ResidualEncoder
from foveate.layers.implicit import MLP
from foveate.layers.rescaler import Filter, Rescaler, Size, check_size, quantise, shrinks
from foveate.layers.upscaler import Read, check_picture
from foveate.layers.window import fill_windows
from foveate.ops.gaussians import Grid, render
from foveate.restore.gsasr_decoder import HEADS, GaussianDecoder

STEP = 1.2
"""The largest standard deviation, in low-resolution pixels, inverted."""

FAR = 6.0
"""Standard deviations that a Gaussian reaches; beyond them is 1.5e-8 of its colour."""

TERM = 30
"""FLOPs of a Gaussian at a pixel: the distance 9, the exponential 15, three colours 6."""

NEAR = ceil(FAR / STEP) + 1
"""Low-resolution pixels around a window whose Gaussians it draws: the widest may also have moved by one."""


class Gaussians(NamedTuple):
    """What is drawn: centres [B, N, 2], conics [B, N, 3], colours [B, N, 3], in low-resolution pixels."""

    centres: Tensor
    conics: Tensor
    colours: Tensor


class GSASR(Rescaler):
    """Enlargement by any factor, also a fractional one or one for each axis.

    Args:
        channels, blocks: of the encoder, EDSR's without upsampling.
        dim, heads, side, cross, among, density, expand, masked: of the decoder, see
            `foveate.restore.gsasr_decoder.GaussianDecoder`. The defaults are the released network.
        base: add the sum to the bicubically enlarged picture.
        isotropic: Gaussians as wide as they are high (an ablation).
        raster_ratio: how far a Gaussian reaches, as a share of half the picture; 0.1 in the paper. There a box is cut
            out of every Gaussian; here the widest end where the box does, all others at as many standard deviations.
            None for the whole Gaussian, 6 standard deviations.

    Shape: x [B, 3, h, w] in 0..1 -> [B, 3, floor(s h), floor(s w)], not clipped.
    Raises: InputError for numbers that do not fit.
    """

    slug = "gsasr"
    recipe = "recipes/gaussian_sr.py"

    def __init__(
        self,
        channels: int = 64,
        blocks: int = 16,
        dim: int = 180,
        heads: int = 6,
        side: int = 12,
        cross: Sequence[int] = (1, 2),
        among: Sequence[int] = (6, 6),
        density: int = 4,
        expand: int = 4,
        masked: bool = False,
        base: bool = False,
        isotropic: bool = False,
        raster_ratio: float | None = None,
    ) -> None:
        super().__init__()
        if raster_ratio is not None and not 0 < raster_ratio <= 1:
            raise InputError(f"raster_ratio is a share of half the picture, above 0 and up to 1, got {raster_ratio!r}.")
        self.encoder = ResidualEncoder(channels, blocks)
        self.decoder = GaussianDecoder(channels, dim, heads, side, cross, among, density, expand, masked)
        self.side, self.density, self.isotropic, self.raster_ratio = side, density, isotropic, raster_ratio
        self.base = Filter("bicubic") if base else None
        # Unmasked attention sees across the whole picture: as in the official code, large ones are cut all the same.
        self.halo = NEAR + (self.encoder.halo + self.decoder.halo if masked else 2)
        self.largest = 384 if masked else 480
        if base:
            self._begin()

    def _begin(self) -> None:
        """Begin where a short training gets somewhere: with a little sharpening, and nothing else.

        Layers keep the variance of what they are given, for with PyTorch's smaller weights the picture hardly reaches
        the Gaussians, which look at their own pixel. They would cover the plane evenly at alpha 2 pi (g sigma)^2 = 1,
        and begin at a quarter of that: of too much at the beginning, training only learns to be silent.
        """
        for module in self.modules():
            if isinstance(module, nn.Linear | nn.Conv2d):
                module.weight.data *= sqrt(3)
        self.decoder.focus()
        first = {"sigma": STEP / (sqrt(pi) * self.density), "alpha": 1 / 8}
        for name, head in self.decoder.heads.items():
            assert isinstance(head, MLP)
            last, share = head.linears[-1], first.get(name, 0.5)
            last.weight.data *= 0.01
            nn.init.constant_(last.bias, log(share / (1 - share)))

    # ------------------------------------------------------------------ the any-scale interface

    def enlarge(self, x: Tensor, size: Size) -> Tensor:
        """Draw pictures at another size.

        Args:
            size: (rows, columns).

        Shape: x [B, 3, h, w] in 0..1 -> [B, 3, *size], not clipped.
        Raises: InputError on a wrong shape or size. Warns where a side shrinks, for which there was no training.
        """
        check_picture(x)
        check_size(size)
        height, width = x.shape[2:]
        if shrinks((height, width), size):
            warnings.warn(f"GSASR enlarges; {width}x{height} to {size[1]}x{size[0]} shrinks a side.", stacklevel=2)
        found = self.gaussians(x, _scale((height, width), size))
        image = self.draw(found, Grid.over(height, width, size), self.reach((height, width), size)).to(x.dtype)
        return image if self.base is None else image + self.base.enlarge(x, size)

    def forward(self, x: Tensor, scale: float | tuple[float, float] = 4.0) -> Tensor:
        """Enlarge by a factor, or by one for rows and one for columns. Shape: see above."""
        sy, sx = scale if isinstance(scale, tuple) else (scale, scale)
        return self.enlarge(x, (floor(sy * x.shape[2]), floor(sx * x.shape[3])))

    def part(self, read: Read, source: Size, size: Size, box: Box, shrink: bool) -> Tensor:
        """Draw some pixels: the same as in the whole picture, at any scale, where the decoder is masked.

        The window is cut where the windows of attention are, and Gaussians are drawn at the places of the whole grid.
        """
        if shrink:
            return super().part(read, source, size, box, shrink)
        x0, y0, x1, y1 = box
        top, bottom = self._seen(source[0], size[0], y0, y1)
        left, right = self._seen(source[1], size[1], x0, x1)
        x = read(left, top, right, bottom)
        check_picture(x)
        found = self.gaussians(x, _scale(source, size))
        found = found._replace(centres=found.centres + found.centres.new_tensor([left, top]))
        grid = Grid.over(*source, size).window(x0, y0, x1 - x0, y1 - y0)
        image = self.draw(found, grid, self.reach(source, size)).to(x.dtype)
        return image if self.base is None else image + self.base.part(read, source, size, box, False)

    def _seen(self, source: int, target: int, first: int, end: int) -> tuple[int, int]:
        """The source pixels that some pixels depend on, as whole windows of attention."""
        low, high = floor(first * source / target) - self.halo, ceil(end * source / target) + self.halo
        return max(0, low // self.side * self.side), min(source, -(-high // self.side) * self.side)

    def flops(self, source: Size, size: Size) -> float:
        """FLOPs of an enlargement of one picture, 2 per multiply-accumulate, with Gaussians as wide as they can be."""
        from foveate.meter import count_flops

        if "flops_per_pixel" not in self.__dict__:
            example = torch.zeros(1, 3, self.side, self.side, dtype=self.dtype, device=self.device)
            with torch.no_grad():
                counted = count_flops(lambda: self.decoder(self.encoder(example), example.new_ones(1)))
            self.__dict__["flops_per_pixel"] = counted / self.side**2
        height, width = (-(-n // self.side) * self.side for n in source)
        covered = pi * (self.reach(source, size) / STEP) ** 2  # low-resolution pixels
        terms = min(covered, source[0] * source[1]) * self.density**2 * size[0] * size[1]
        base = 0.0 if self.base is None else self.base.flops(source, size)
        return self.__dict__["flops_per_pixel"] * height * width + TERM * terms + base

    # ------------------------------------------------------------------ what it does

    def gaussians(self, x: Tensor, scale: float) -> Gaussians:
        """The Gaussians of pictures, g * g for every pixel, also those that fill up windows of attention.

        Args:
            scale: what they will be enlarged by, the geometric mean of both axes.

        Shape: x [B, 3, h, w] -> see `Gaussians`.
        """
        x = fill_windows(x.to(self.dtype), self.side)
        numbers = self.decoder(self.encoder(x), x.new_full((len(x),), scale))
        return self.activate(numbers if self.base is None else numbers + self._detail(x))

    def _detail(self, x: Tensor) -> Tensor:
        """What bicubic interpolation smooths, for the colours of the Gaussians. Shape: -> [B, g * h, g * w, 9]."""
        assert self.base is not None
        detail = x - F.avg_pool2d(x, 3, 1, 1, count_include_pad=False)
        places = self.base.enlarge(detail, (self.density * x.shape[2], self.density * x.shape[3]))
        return F.pad(places.permute(0, 2, 3, 1), (4, 2))

    def activate(self, numbers: Tensor) -> Gaussians:
        """Gaussians from what the decoder says, in float32 at least. Shape: [B, g * h, g * w, 9] -> see `Gaussians`."""
        r = numbers if numbers.dtype == torch.float64 else numbers.float()
        rows, columns = (torch.arange(n, device=r.device, dtype=r.dtype) + 0.5 for n in r.shape[1:3])
        cells = torch.stack(torch.meshgrid(columns, rows, indexing="xy"), -1)
        centres = (cells + r[..., 7:]) / self.density
        vertical, horizontal = ((0.99999 * r[..., :2].sigmoid() + 1e-6) / STEP).unbind(-1)
        rho = 0.999999 * r[..., 2].tanh()
        if self.isotropic:
            horizontal, rho = vertical, torch.zeros_like(rho)
        spread = 1 / ((1 - rho) * (1 + rho))
        conics = [spread / horizontal**2, -rho * spread / (horizontal * vertical), spread / vertical**2]
        colours = r[..., 4:7].sigmoid() if self.base is None else r[..., 4:7]
        found = (centres, torch.stack(conics, -1), r[..., 3:4].sigmoid() * colours)
        return Gaussians(*(t.flatten(1, 2) for t in found))

    def draw(self, found: Gaussians, grid: Grid, reach: float = FAR) -> Tensor:
        """The sum of Gaussians at the places of a grid. Shape: -> [B, 3, rows, columns]."""
        return torch.stack([render(*one, grid, reach=reach) for one in zip(*found, strict=True)])

    def reach(self, source: Size, size: Size) -> float:
        """Standard deviations that Gaussians reach in a picture."""
        if self.raster_ratio is None:
            return FAR
        # The paper counts from the first to the last pixel centre.
        box = min(self.raster_ratio * (m - 1) / 2 * n / m for n, m in zip(source, size, strict=True))
        return min(FAR, max(STEP * box, 1e-3))

    # ------------------------------------------------------------------ official weights

    @classmethod
    def load_official(cls, encoder: Mapping[str, Tensor], decoder: Mapping[str, Tensor]) -> "GSASR":
        """Build the network of official checkpoints (ChrisDud0257/GSASR: EDSR-baseline, without rotary positions).

        Left out is what cannot matter: queries and keys of attention to one token, and the norms before them.

        Args:
            encoder, decoder: state dicts, also wrapped in {"params_ema": ...} or {"params": ...}.

        Raises: WeightsError when keys or shapes do not fit.
        """
        own: dict[str, Tensor] = {}
        for part, state in (("encoder", encoder), ("decoder", decoder)):
            inner: Mapping[str, Tensor] = state.get("params_ema", state.get("params", state))  # type: ignore[assignment]
            for key, value in inner.items():
                if name := _own_name(key):
                    token = ".in_proj_" in key
                    own[f"{part}.{name}"] = value[2 * len(value) // 3 :] if token else value
        try:
            model = cls(**_sizes(own))
            model.load_state_dict(own)
        except (KeyError, RuntimeError, ValueError, ZeroDivisionError) as error:
            raise WeightsError(f"the checkpoints are no GSASR with an EDSR-baseline encoder: {error}") from error
        return model.eval()


def reduced(x: Tensor, size: Size) -> Tensor:
    """The low-resolution twin of pictures, to train with: bicubic, rounded to 8 bits. Shape: [B, 3, *size]."""
    return quantise(Filter("bicubic").reduce(x, size))


def _scale(source: Size, size: Size) -> float:
    return sqrt(size[0] / source[0] * size[1] / source[1])


_NAMES = {
    "conv_first": "entry",
    "body": "blocks",
    "conv1": "body.0",
    "conv2": "body.2",
    "conv_after_body": "last",
    "window_crossattn_blocks": "cross",
    "gs_selfattn_blocks": "among",
    "mlp": "mlp.layers",
    "img_feat_proj": "project",
    "UPNet": "up",
    "scale_mlp": "scale.layers",
    **{f"mlp_block_{name}": f"heads.{name}.layers" for name in HEADS},
    "gs_cross_attn_scale": "scale",
    "in_proj_weight": "value.weight",
    "in_proj_bias": "value.bias",
    "out_proj": "out",
    "window_cross_attn": "attention",
    "gs_self_attn": "attention",
    "mlp_crossattn_scale": "mlp1",
    "mlp_crossattn": "mlp1",
    "mlp_crossattn_feature": "mlp2",
    "mlp_selfattn": "mlp2",
    "fc1": "layers.0",
    "fc2": "layers.2",
}
_NORMS = {
    "window_crossattn_blocks": {"norm1": "", "norm2": "norm1", "norm3": "norm2", "norm4": "norm3"},
    "gs_selfattn_blocks": {"norm3": "", "norm4": "norm1", "norm1": "norm2", "norm2": "norm3"},
}
"""What official names are called here, and which norm is which; those called "" cannot matter."""


def _own_name(key: str) -> str:
    """What a part of an official checkpoint is called here, "" for what is left out."""
    first, *_ = words = key.split(".")
    names = _NAMES | _NORMS.get(first, {}) | {"relative_position_index": ""}
    found = [names.get(word, word) for word in words]
    return ".".join(found) if all(found) else ""


def _sizes(state: Mapping[str, Tensor]) -> dict[str, Any]:
    """The arguments of a network, from its weights."""

    def count(pattern: str) -> int:
        found = [key[len(pattern) :].split(".")[0] for key in state if key.startswith(pattern)]
        return 1 + max((int(word) for word in found if word.isdigit()), default=-1)

    tokens, dim = state["decoder.gs_embedding"].shape
    attention = "decoder.cross.0.blocks.0.attention.relative_position_bias_table"
    layers = {name: (count(f"decoder.{name}."), count(f"decoder.{name}.0.blocks.")) for name in ("cross", "among")}
    return {
        "channels": len(state["encoder.entry.weight"]),
        "blocks": count("encoder.blocks."),
        "dim": dim,
        "heads": state[attention].shape[1],
        "side": round(sqrt(tokens)),
        **layers,
        "density": 3 if len(state["decoder.up.0.weight"]) == 9 * dim else 2 ** -(-count("decoder.up.") // 2),
        "expand": len(state["decoder.heads.sigma.layers.2.weight"]) // dim,
    }
