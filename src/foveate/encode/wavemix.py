"""WaveMix: tokens are mixed at half size and below, where a wavelet transform takes them without losing anything.

Jeevan, Viswanathan, Sethi 2022, "WaveMix: A Resource-efficient Neural Network for Image Analysis", arXiv:2205.14375.

Mixing at full resolution is what costs memory and multiplications. A block on C channels with L levels first squeezes
them, A_0 = Conv1x1(C -> C/4)(x), then takes the Haar transform level by level (see `foveate.ops.wavelet`),

    X_l = [A_l, D_l] = dwt2(A_(l-1))   with C channels at 1 / 2^l of the size, for l = 1 .. L,

and climbs back from the coarsest level, each step doubling the size,

    y_L = F_L(X_L),    y_l = F_l([X_l, y_(l+1)]),    x <- x + y_1,
    F = Conv1x1(-> m C), GELU, dropout, Conv1x1(-> f), ConvTranspose4x4/2(-> C for l = 1, else C/2), BatchNorm.

L levels see 2^L pixels at once, so the receptive field doubles per level within one block, and since a block keeps the
size of its input, the same stack serves classes, maps and larger pictures. Sizes that 2^L does not divide are rounded
up on the way down and cropped on the way up.
"""

import math
import re
from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

from foveate.errors import InputError, WeightsError
from foveate.layers.classifier import ImageClassifier
from foveate.layers.residual import add_
from foveate.ops.wavelet import dwt2

_LITE = {"levels": 1, "stem": "strided", "num_classes": 10}

SIZES: dict[str, dict[str, Any]] = {
    "192/16": {"dim": 192, "depth": 16, "levels": 3},
    "lite-192/16": {"dim": 192, "depth": 16, "levels": 1},
    "places-256/12": {"dim": 256, "depth": 12, "levels": 2, "patch": 8, "num_classes": 365},
    "cifar-144/7": {"dim": 144, "depth": 7, **_LITE},
    "cifar-320/8": {"dim": 320, "depth": 8, **_LITE},
    "cifar-256/8": {"dim": 256, "depth": 8, **_LITE, "num_classes": 100},
    "lite-64/6": {"dim": 64, "depth": 6, **_LITE},
    "lite-32/7": {"dim": 32, "depth": 7, **_LITE, "upsample": "bilinear"},
    "lite-8/5": {"dim": 8, "depth": 5, **_LITE, "in_chans": 1},
    "lite-8/10": {"dim": 8, "depth": 10, **_LITE, "in_chans": 1, "upsample": "bilinear"},
}
"""Settings of the published classifiers, named width/depth: `WaveMix(**SIZES["192/16"])`."""

_OFFICIAL_NAMES = {
    r"^module\.": "",
    r"^conv\.": "stem.",
    r"^layers\.": "blocks.",
    r"^(expand|pool)\.": "head.",
    r"\.feedforward1?\.": ".mixers.0.",
    r"\.feedforward2\.": ".mixers.1.",
    r"\.feedforward3\.": ".mixers.2.",
    r"\.feedforward4\.": ".mixers.3.",
}

T = TypeVar("T", bound="WaveMix")


class Mixer(nn.Sequential):
    """F of the equations above, from cin to cout channels at twice the size.

    Args:
        inputs, hidden, outputs: cin, m C and cout.
        ff_dim: f.
        dropout: share of hidden values dropped in training.
        upsample: "transposed", or "bilinear": Conv1x1(-> cout) and bilinear enlargement in place of Conv1x1(-> f) and
            the transposed convolution.
    """

    def __init__(self, inputs: int, hidden: int, ff_dim: int, outputs: int, dropout: float, upsample: str) -> None:
        if upsample == "transposed":
            grow: nn.Module = nn.ConvTranspose2d(ff_dim, outputs, 4, stride=2, padding=1)
        else:
            grow, ff_dim = nn.Upsample(scale_factor=2, mode="bilinear"), outputs
        mix = [nn.Conv2d(inputs, hidden, 1), nn.GELU(), nn.Dropout(dropout), nn.Conv2d(hidden, ff_dim, 1)]
        super().__init__(*mix, grow, nn.BatchNorm2d(outputs))

    def fuse(self) -> None:
        """Fold the batch norm into the convolution before it, for inference."""
        conv, grow, norm = self.eval()[3], self[4], self[5]
        if isinstance(norm, nn.BatchNorm2d):
            if isinstance(grow, nn.ConvTranspose2d):
                self[4] = fuse_conv_bn_eval(grow, norm, transpose=True)
            elif isinstance(conv, nn.Conv2d):  # interpolation weights sum to one, so the norm may come before it
                self[3] = fuse_conv_bn_eval(conv, norm)
            self[5] = nn.Identity()


class WaveBlock(nn.Module):
    """y_1 of the equations above; the residual is the network's.

    Args:
        dim: C, a multiple of 4.
        levels: L.
        mult: m, the expansion of the hidden layers.
        ff_dim: f, channels before the transposed convolutions; default C.
        dropout: share of hidden values dropped in training.
        upsample: "transposed" (4x4 convolutions) or "bilinear", as in the authors' smallest networks.

    Shape: [B, C, H, W] -> the same, for any H and W.
    Raises: InputError for a width that is no multiple of 4, less than one level, or an unknown way to upsample.
    """

    def __init__(
        self,
        dim: int,
        levels: int = 1,
        mult: int = 2,
        ff_dim: int | None = None,
        dropout: float = 0.5,
        upsample: str = "transposed",
    ) -> None:
        super().__init__()
        if dim < 4 or dim % 4:
            raise InputError(f"WaveMix squeezes its channels by 4, so dim must be a multiple of 4, got {dim}.")
        if levels < 1:
            raise InputError(f"a WaveMix block needs at least one wavelet level, got levels={levels}.")
        if upsample not in ("transposed", "bilinear"):
            raise InputError(f"unknown upsample {upsample!r}; use 'transposed' or 'bilinear'.")
        self.reduction = nn.Conv2d(dim, dim // 4, 1)
        self.mixers = nn.ModuleList()  # F_1 first
        for level in range(1, levels + 1):
            inputs, outputs = dim if level == levels else dim + dim // 2, dim if level == 1 else dim // 2
            self.mixers.append(Mixer(inputs, dim * mult, ff_dim or dim, outputs, dropout, upsample))

    def forward(self, x: Tensor) -> Tensor:
        low, pyramid = self.reduction(x), []
        for _ in self.mixers:
            bands = dwt2(low)
            pyramid.append((bands, low.shape[2:]))
            low = bands[:, : low.shape[1]]
        y = x[:, :0]
        for mix in reversed(self.mixers):
            bands, (height, width) = pyramid.pop()
            y = mix(torch.cat((bands, y), 1) if y.numel() else bands)[..., :height, :width]
        return y

    def fuse(self) -> None:
        """Fold all batch norms, see `Mixer.fuse`."""
        for mix in self.mixers:
            if isinstance(mix, Mixer):
                mix.fuse()


class PatchStem(nn.Sequential):
    """Two 3x3 convolutions, one of a patch with its stride, GELU and BatchNorm.

    A picture that patches do not cover is extended by its last row and column.

    Shape: [B, inputs, H, W] -> [B, dim, ceil(H / patch), ceil(W / patch)].
    """

    def __init__(self, inputs: int, dim: int, patch: int) -> None:
        super().__init__(
            nn.Conv2d(inputs, dim // 4, 3, padding=1),
            nn.Conv2d(dim // 4, dim // 2, 3, padding=1),
            nn.Conv2d(dim // 2, dim, patch, patch),
            nn.GELU(),
            nn.BatchNorm2d(dim),
        )
        self.patch = patch

    def forward(self, x: Tensor) -> Tensor:
        down, across = -x.shape[2] % self.patch, -x.shape[3] % self.patch
        return super().forward(F.pad(x, (0, across, 0, down), mode="replicate") if down or across else x)


class WaveMix(ImageClassifier):
    """Classify pictures.

    Args:
        num_classes, in_chans: see `ImageClassifier`.
        dim, levels, mult, ff_dim, dropout, upsample: of every block, see `WaveBlock`; `levels_for` suggests levels.
        depth: number of blocks.
        stem: "patch" (`PatchStem`) for large pictures, "strided" (two 3x3 convolutions) for small ones.
        patch, stride: of the stem of that kind.

    Shape: [B, in_chans, H, W] -> [B, num_classes]; features [B, dim, h, w], h = ceil(H / patch) or ceil(H / stride^2).
    Raises: InputError for settings that do not fit, or an input of another shape.
    """

    def __init__(
        self,
        num_classes: int = 1000,
        in_chans: int = 3,
        dim: int = 192,
        depth: int = 16,
        levels: int = 3,
        mult: int = 2,
        ff_dim: int | None = None,
        dropout: float = 0.5,
        stem: str = "patch",
        patch: int = 4,
        stride: int = 1,
        upsample: str = "transposed",
    ) -> None:
        super().__init__(dim, in_chans)
        if stem not in ("patch", "strided") or patch < 1 or stride < 1:
            raise InputError(
                f"stem={stem!r} with patch={patch} and stride={stride}; use 'patch' or 'strided' and at least 1."
            )
        if stem == "patch":
            self.stem: nn.Module = PatchStem(in_chans, dim, patch)
        else:
            first = nn.Conv2d(in_chans, dim // 2, 3, stride, padding=1)
            self.stem = nn.Sequential(first, nn.Conv2d(dim // 2, dim, 3, stride, padding=1))
        self.shrinks = patch if stem == "patch" else stride**2
        self.blocks = nn.ModuleList(WaveBlock(dim, levels, mult, ff_dim, dropout, upsample) for _ in range(depth))
        self.reset_classifier(num_classes)

    def forward_features(self, x: Tensor) -> Tensor:
        """Features before pooling, see Shape."""
        self.check(x)
        x = self.stem(x)
        for block in self.blocks:
            x = add_(block(x), x)
        return x

    def fuse(self: T) -> T:
        """Fold batch norms for inference, in place; returns the network in eval mode."""
        for block in self.blocks:
            if isinstance(block, WaveBlock):
                block.fuse()
        return self.eval()

    @classmethod
    def load_official(cls: type[T], state: Mapping[str, Tensor], stride: int | None = None) -> T:
        """Build the network that an official checkpoint (pranavphoenix/WaveMix) was trained as.

        Args:
            state: keys `conv.*`, `layers.{i}.reduction.*`, `layers.{i}.feedforward*.*` and `pool.2.*`; for
                `WaveMixDense`, with the decoder under `expand.*` or `pool.*`.
            stride: of a strided stem, which no shape tells; default as in the class: 1 for the CIFAR classifiers, 2
                for segmentation. Super-resolution has 1.

        Raises: WeightsError when keys are missing or unknown.
        """
        mapped = dict(state)
        for old, new in _OFFICIAL_NAMES.items():
            mapped = {re.sub(old, new, key): value for key, value in mapped.items()}
        try:
            settings = _settings(mapped) | cls._head_settings(mapped) | ({} if stride is None else {"stride": stride})
            network = cls(**settings)
            network.load_state_dict(mapped)
        except (InputError, KeyError, RuntimeError) as error:
            raise WeightsError(
                f"no checkpoint of a {cls.__name__} (keys begin with {sorted(state)[:3]}): {error}. WaveMix is for "
                "classifiers, WaveMixDense for decoders."
            ) from error
        return network.eval()

    @staticmethod
    def _head_settings(mapped: dict[str, Tensor]) -> dict[str, Any]:
        for name in ("weight", "bias"):
            mapped[f"head.{name}"] = mapped.pop(f"head.2.{name}")  # it stands after pooling and reshaping
        return {"num_classes": len(mapped["head.bias"])}


class WaveMixDense(WaveMix):
    """Give every pixel its outputs: classes (segmentation), or the colours of a larger picture.

    After the blocks, 4x4 transposed convolutions double the size once per entry of `widths`, and a 1x1 convolution
    makes the outputs. The published networks:

        segmentation      WaveMixDense(classes)
        Cityscapes        WaveMixDense(20, dim=192, levels=3, dropout=0.5, stem="patch", widths=[128, 64])
        super-resolution  WaveMixDense(3, dim=144, depth=4, levels=1, stride=1, widths=[72])

    Args:
        num_classes: outputs per pixel; 0 leaves the decoder out.
        widths: channels after each doubling; default [dim / 2, dim / 4].
        others: see `WaveMix`.

    Shape: [B, in_chans, H, W] -> [B, num_classes, s*H, s*W], s = 2^len(widths) / the factor that the stem shrinks by.
    Raises: InputError for settings that do not fit, s no integer among them, or an input of another shape.
    """

    def __init__(
        self,
        num_classes: int,
        in_chans: int = 3,
        dim: int = 256,
        depth: int = 16,
        levels: int = 4,
        mult: int = 2,
        ff_dim: int | None = None,
        dropout: float = 0.0,
        stem: str = "strided",
        patch: int = 4,
        stride: int = 2,
        upsample: str = "transposed",
        widths: Sequence[int] | None = None,
    ) -> None:
        super().__init__(0, in_chans, dim, depth, levels, mult, ff_dim, dropout, stem, patch, stride, upsample)
        self.widths = [dim // 2, dim // 4] if widths is None else list(widths)
        self.scale, rest = divmod(2 ** len(self.widths), self.shrinks)
        if rest:
            raise InputError(
                f"{len(self.widths)} doublings do not undo a stem that shrinks {self.shrinks} times; give "
                f"{math.ceil(math.log2(self.shrinks))} widths, or another patch or stride."
            )
        self.reset_classifier(num_classes)

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """Decode features; with `pre_logits`, the features themselves."""
        return x if pre_logits else self.head(x)

    def forward(self, x: Tensor) -> Tensor:
        y = self.forward_head(self.forward_features(x))
        if not self.num_classes:
            return y
        return y[..., : self.scale * x.shape[2], : self.scale * x.shape[3]]

    def reset_classifier(self, num_classes: int) -> None:
        """Put in a new decoder for another number of outputs; 0 leaves it out."""
        super().reset_classifier(num_classes)
        if num_classes:
            channels = [self.num_features, *self.widths]
            grow = [nn.ConvTranspose2d(a, b, 4, stride=2, padding=1) for a, b in pairwise(channels)]
            self.head = nn.Sequential(*grow, nn.Conv2d(channels[-1], num_classes, 1)).to(next(self.parameters()))

    @staticmethod
    def _head_settings(mapped: dict[str, Tensor]) -> dict[str, Any]:
        last, *before = sorted((k for k in mapped if re.fullmatch(r"head\.\d\.bias", k)), reverse=True)
        return {"num_classes": len(mapped[last]), "widths": [len(mapped[key]) for key in reversed(before)]}


def levels_for(side: int) -> int:
    """Wavelet levels for pictures of about `side` pixels: 1 at 32, one more per doubling, at most 4.

    >>> [levels_for(side) for side in (28, 32, 64, 224, 512)]
    [1, 1, 2, 3, 4]
    """
    if side < 1:
        raise InputError(f"levels_for takes the side of a picture in pixels, got {side}.")
    return min(4, max(1, int(math.log2(side / 16))))


def conformance_example(larger: bool = False) -> tuple[WaveMix, tuple[Tensor]]:
    """A small classifier and pictures of an odd size."""
    side = 45 if larger else 30
    return WaveMix(5, dim=16, depth=2, levels=2, dropout=0.0), (torch.rand(2, 3, side, side + 7),)


def _settings(mapped: Mapping[str, Tensor]) -> dict[str, Any]:
    """What the shapes of a state dict under our names tell of the trunk."""
    first = "blocks.0.mixers.0"
    hidden, patch = len(mapped[f"{first}.0.bias"]), mapped.get("stem.2.weight")
    dim = mapped["blocks.0.reduction.weight"].shape[1]
    return {
        "in_chans": mapped["stem.0.weight"].shape[1],
        "dim": dim,
        "depth": len({key.split(".")[1] for key in mapped if key.startswith("blocks.")}),
        "levels": len({key.split(".")[3] for key in mapped if key.startswith("blocks.0.mixers.")}),
        "mult": hidden // dim,
        "ff_dim": len(mapped[f"{first}.3.bias"]),
        "upsample": "transposed" if f"{first}.4.weight" in mapped else "bilinear",
        **({"stem": "strided"} if patch is None else {"stem": "patch", "patch": patch.shape[2]}),
    }
