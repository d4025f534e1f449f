"""FlashInternImage: a convolutional network whose mixing is DCNv4.

Xiong, Li, Chen et al. 2024, arXiv:2401.06197; the network of InternImage (Wang et al. 2022, arXiv:2211.05778) with
`foveate.ops.dcnv4` in place of DCNv3.

Two strided convolutions bring a picture to a quarter of its size; four levels follow, each at half the size and twice
the width of the one before. A block is, before or after normalisation (LayerNorm over channels) and with or without
learned scales g,

    pre     x += g1 DCN(N(x)),   x += g2 MLP(N(x))
    post    x += g1 N(DCN(x)),   x += g2 N(MLP(x)).

A 1x1 convolution to 1.5 times the width, the mean over the map and a linear layer make the classes. Inside, maps are
[B, H, W, C], as linear layers want them.
"""

import re
from collections.abc import Mapping, Sequence
from typing import Any, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from foveate.errors import InputError, WeightsError
from foveate.layers.classifier import ImageClassifier
from foveate.layers.fold import ConvNorm, fuse
from foveate.layers.map_norm import MapNorm
from foveate.ops.dcnv4 import DCNv4

_POST: dict[str, Any] = {"depths": (4, 4, 21, 4), "post_norm": True, "layer_scale": 1e-5, "dw_kernel_size": 3}

SIZES: dict[str, dict[str, Any]] = {
    "t": {"channels": 64, "depths": (4, 4, 18, 4), "drop_path": 0.1},
    "s": {"channels": 80, **_POST, "drop_path": 0.4},
    "b": {"channels": 112, **_POST, "drop_path": 0.5, "offset_scale": 0.5},
    "l": {"channels": 160, **_POST, "depths": (5, 5, 22, 5), "drop_path": 0.1, "offset_scale": 2.0, "biases": True},
}
"""Settings of the published networks: `FlashInternImage(**SIZES["t"])`."""

_OFFICIAL_NAMES = {
    r"^patch_embed\.conv1\.": "stem.0.",
    r"^patch_embed\.norm1\.1\.": "stem.1.",
    r"^patch_embed\.conv2\.": "stem.3.",
    r"^patch_embed\.norm2\.1\.": "stem.4.",
    r"\.norm([12])\.0\.": r".norm\1.",
    r"\.mlp\.fc1\.": ".mlp.0.",
    r"\.mlp\.fc2\.": ".mlp.2.",
    r"\.downsample\.conv\.": ".shrink.0.",
    r"\.downsample\.norm\.1\.": ".shrink.1.",
    r"^levels\.(\d+)\.norm\.0\.": r"levels.\1.norm.",
    r"^conv_head\.0\.": "tail.0.c.",
    r"^conv_head\.1\.0\.": "tail.0.bn.",
}


class Block(nn.Module):
    """A DCNv4 and an MLP of four times the width, each with its norm, scale and residual.

    Args:
        dim, groups, offset_scale, dw_kernel_size: of the `DCNv4`.
        post_norm: normalise what a branch gives instead of what it takes.
        layer_scale: what g1 and g2 begin with; None for no g.
        drop: share of the pictures that a branch leaves out in training.
        biases: of the last layers of both branches.

    Shape: [B, H, W, C] -> the same.
    """

    def __init__(
        self,
        dim: int,
        groups: int,
        offset_scale: float,
        dw_kernel_size: int | None,
        post_norm: bool,
        layer_scale: float | None,
        drop: float,
        biases: bool,
    ) -> None:
        super().__init__()
        self.post_norm, self.drop = post_norm, drop
        self.norm1, self.norm2 = nn.LayerNorm(dim, eps=1e-6), nn.LayerNorm(dim, eps=1e-6)
        self.dcn = DCNv4(dim, groups, offset_scale=offset_scale, dw_kernel_size=dw_kernel_size, output_bias=biases)
        self.mlp = nn.Sequential(nn.Linear(dim, 4 * dim), nn.GELU(), nn.Linear(4 * dim, dim, bias=biases))
        if layer_scale is None:
            self.gamma1 = self.gamma2 = None
        else:
            self.gamma1 = nn.Parameter(torch.full((dim,), layer_scale))
            self.gamma2 = nn.Parameter(torch.full((dim,), layer_scale))

    def forward(self, x: Tensor) -> Tensor:
        x = x + self._branch(x, self.dcn, self.norm1, self.gamma1)
        return x + self._branch(x, self.mlp, self.norm2, self.gamma2)

    def _branch(self, x: Tensor, body: nn.Module, norm: nn.Module, gamma: Tensor | None) -> Tensor:
        y = norm(body(x)) if self.post_norm else body(norm(x))
        if gamma is not None:
            y = y * gamma
        if self.training and self.drop:
            y = y * F.dropout(y.new_ones(len(y), 1, 1, 1), self.drop)
        return y


class Level(nn.Module):
    """Blocks, a norm where blocks have theirs inside the branches, and a convolution to half the size."""

    def __init__(self, blocks: Sequence[Block], dim: int, norm: bool, shrink: bool) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(blocks)
        self.norm = nn.LayerNorm(dim, eps=1e-6) if norm else nn.Identity()
        down = [nn.Conv2d(dim, 2 * dim, 3, 2, 1, bias=False), MapNorm(2 * dim, eps=1e-6)]
        self.shrink = nn.Sequential(*(down if shrink else []))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """What the next level takes, and what this one found. Shape: [B, C, H, W] -> [B, 2C, h, w], [B, C, H, W]."""
        y = x.permute(0, 2, 3, 1)
        for block in self.blocks:
            y = block(y)
        found = self.norm(y).permute(0, 3, 1, 2)
        return self.shrink(found), found


class FlashInternImage(ImageClassifier):
    """Classify pictures.

    Args:
        num_classes, in_chans: see `ImageClassifier`.
        channels: C of the first level.
        depths: blocks of each level.
        groups: of each level; default 16 channels each.
        offset_scale, dw_kernel_size: of every `DCNv4`.
        post_norm, layer_scale, biases: of every `Block`.
        drop_path: share of pictures that the last block leaves out in training; it grows linearly from the first.

    Shape: [B, in_chans, H, W] -> [B, num_classes]; features [B, 1.5 * 8 * C, ceil(H / 32), ceil(W / 32)].
    Raises: InputError for settings that do not fit, or an input of another shape.
    """

    def __init__(
        self,
        num_classes: int = 1000,
        in_chans: int = 3,
        channels: int = 64,
        depths: Sequence[int] = (4, 4, 18, 4),
        groups: Sequence[int] | None = None,
        offset_scale: float = 1.0,
        dw_kernel_size: int | None = None,
        post_norm: bool = False,
        layer_scale: float | None = None,
        biases: bool = False,
        drop_path: float = 0.1,
    ) -> None:
        widths = [channels * 2**level for level in range(len(depths))]
        groups = [max(1, width // 16) for width in widths] if groups is None else list(groups)
        if len(groups) != len(depths) or not depths or channels % 2:
            raise InputError(
                f"give groups for each of {len(depths)} levels and an even width; got {groups}, {channels}."
            )
        super().__init__(widths[-1] * 3 // 2, in_chans)
        self.stem = nn.Sequential(
            nn.Conv2d(in_chans, channels // 2, 3, 2, 1),
            MapNorm(channels // 2, eps=1e-6),
            nn.GELU(),
            nn.Conv2d(channels // 2, channels, 3, 2, 1),
            MapNorm(channels, eps=1e-6),
        )
        drops = [drop_path * i / max(1, sum(depths) - 1) for i in range(sum(depths))]
        self.levels = nn.ModuleList()
        for i, (dim, depth, group) in enumerate(zip(widths, depths, groups, strict=True)):
            blocks = [
                Block(dim, group, offset_scale, dw_kernel_size, post_norm, layer_scale, drops.pop(0), biases)
                for _ in range(depth)
            ]
            self.levels.append(Level(blocks, dim, not post_norm, shrink=i + 1 < len(depths)))
        self.tail = nn.Sequential(ConvNorm(widths[-1], self.num_features), nn.GELU())
        self._initialise()
        self.reset_classifier(num_classes)

    def _initialise(self) -> None:
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.trunc_normal_(module.weight, std=0.02)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
        for module in self.modules():
            if isinstance(module, DCNv4):
                module.reset_parameters()

    def forward_levels(self, x: Tensor) -> list[Tensor]:
        """The maps of all levels, at a 4th, 8th, 16th ... of the size; sizes are rounded up."""
        self.check(x)
        x, maps = self.stem(x), []
        for level in self.levels:
            x, found = level(x)
            maps.append(found)
        return maps

    def forward_features(self, x: Tensor) -> Tensor:
        """Features before pooling, see Shape."""
        return self.tail(self.forward_levels(x)[-1])

    def fuse(self) -> Self:
        """Fold the batch norm before the head for inference, in place; returns the network in eval mode."""
        return fuse(self)

    @classmethod
    def load_official(cls, state: Mapping[str, Any], offset_scale: float | None = None) -> Self:
        """Build the network that an official checkpoint (OpenGVLab/DCNv4) was trained as.

        Args:
            state: keys `patch_embed.*`, `levels.*`, `conv_head.*`, `head.*`; or a checkpoint that holds them under
                "model".
            offset_scale: which no shape tells; default that of the published network of this width.

        Raises: WeightsError when keys are missing or unknown.
        """
        state = state.get("model", state)
        mapped = dict(state)
        for old, new in _OFFICIAL_NAMES.items():
            mapped = {re.sub(old, new, key): value for key, value in mapped.items()}
        try:
            settings = _settings(mapped)
            if offset_scale is None:
                published = [size for size in SIZES.values() if size["channels"] == settings["channels"]]
                offset_scale = published[0].get("offset_scale", 1.0) if published else 1.0
            network = cls(**settings, offset_scale=offset_scale)
            network.load_state_dict(mapped)
        except (ValueError, KeyError, RuntimeError) as error:
            raise WeightsError(
                f"no checkpoint of a FlashInternImage (keys begin with {sorted(state)[:3]}): {error}"
            ) from error
        return network.eval()


def _settings(mapped: Mapping[str, Tensor]) -> dict[str, Any]:
    """What the shapes of a state dict under our names tell."""
    levels = 1 + max(int(key.split(".")[1]) for key in mapped if key.startswith("levels."))
    depths = [
        len({key.split(".")[3] for key in mapped if key.startswith(f"levels.{level}.blocks.")})
        for level in range(levels)
    ]
    first = "levels.0.blocks.0."
    look = mapped.get(f"{first}dcn.offset_mask_dw.weight")
    channels = len(mapped["stem.3.bias"])
    return {
        "num_classes": len(mapped.get("head.bias", ())),
        "in_chans": mapped["stem.0.weight"].shape[1],
        "channels": channels,
        "depths": depths,
        "dw_kernel_size": None if look is None else look.shape[-1],
        "post_norm": "levels.0.norm.weight" not in mapped,
        "layer_scale": 1e-5 if f"{first}gamma1" in mapped else None,
        "biases": f"{first}dcn.output_proj.bias" in mapped,
    }
