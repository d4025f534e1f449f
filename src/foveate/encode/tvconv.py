"""TVNet: a face network in which every place has its own kernels.

Chen, He, Zhuo, Ma, Ha, Chan 2022, "TVConv: Efficient Translation Variant Convolution for Layout-aware Visual
Processing", arXiv:2203.10489.

A MobileNetV2 (Sandler et al. 2018) on aligned faces, whose depth-wise convolutions are TVConvs (see
`foveate.layers.varying_conv`): kernels vary over the map, are the same for all pictures, and are made by a small
network from learned maps, once and for all for inference (`fuse()`). The multiply-accumulates are those of depth-wise
convolutions. The network gives an embedding e; in training, classes have directions d_k, and the loss (AM-softmax) is
the cross-entropy of s (cos(e, d_k) - m [k is the class]).
"""

import re
from collections.abc import Mapping
from typing import Any, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from foveate.errors import InputError, WeightsError
from foveate.layers.classifier import ImageClassifier
from foveate.layers.fold import ConvNorm, fuse
from foveate.layers.residual import add_
from foveate.layers.varying_conv import TVConvNorm

STAGES = ((1, 16, 1, 1), (6, 24, 2, 2), (6, 32, 3, 2), (6, 64, 4, 2), (6, 96, 3, 1), (6, 160, 3, 2), (6, 320, 1, 1))
"""Of the face network: expansion, channels, blocks, stride of the first block."""

SIZES: dict[str, dict[str, Any]] = {f"x{width}": {"width": width} for width in (0.1, 0.2, 0.3, 0.5, 1.0)}
"""Settings of the published face networks: `TVNet(**SIZES["x0.1"])`."""


class Inverted(nn.Module):
    """MobileNetV2's block: widen, mix space channel by channel, narrow; with a residual where shapes allow it.

    Args:
        inputs, outputs: channels.
        expansion: how many times wider the middle is; 1 leaves the widening out.
        stride: of the mixing.
        mix: the mixing, on inputs * expansion channels.

    Shape: [B, inputs, H, W] -> [B, outputs, h, w].
    """

    def __init__(self, inputs: int, outputs: int, expansion: int, stride: int, mix: nn.Module) -> None:
        super().__init__()
        self.expand = ConvNorm(inputs, inputs * expansion) if expansion != 1 else None
        self.mix = mix
        self.project = ConvNorm(inputs * expansion, outputs)
        self.residual = stride == 1 and inputs == outputs

    def forward(self, x: Tensor) -> Tensor:
        y = x if self.expand is None else F.relu6(self.expand(x))
        y = self.project(F.relu6(self.mix(y)))
        return add_(y, x) if self.residual else y


class TVNet(ImageClassifier):
    """Embed aligned pictures, such as faces; with classes, compare the embedding with one direction for each.

    Args:
        num_classes: 0 gives the embedding; otherwise `scale` times the cosine of it with each class's direction, which
            is learned by `margin_loss`.
        in_chans: see `ImageClassifier`.
        width: multiplies all channels, which are rounded to multiples of 8.
        img_size: side or (height, width) of the pictures; no others are taken.
        embedding: values of an embedding.
        maps, hidden, layers, bias: of every `TVConv`.
        depthwise: have depth-wise convolutions instead, the network that this one improves on.
        dropout: share of the last features dropped in training.
        scale: of cosines.

    Shape: [B, in_chans, H, W] -> [B, num_classes] or [B, embedding]; features [B, 512, ceil(H / 16), ceil(W / 16)].
    Raises: InputError for an input of another shape.
    """

    def __init__(
        self,
        num_classes: int = 0,
        in_chans: int = 3,
        width: float = 1.0,
        img_size: int | tuple[int, int] = 96,
        embedding: int = 512,
        maps: int = 4,
        hidden: int = 64,
        layers: int = 3,
        bias: bool = False,
        depthwise: bool = False,
        dropout: float = 0.0,
        scale: float = 32.0,
    ) -> None:
        super().__init__(embedding, in_chans)
        self.img_size = (img_size, img_size) if isinstance(img_size, int) else (img_size[0], img_size[1])
        self.scale, size, inputs = scale, self.img_size, _rounded(32 * width)
        self.stem = ConvNorm(in_chans, inputs, 3)
        self.blocks = nn.ModuleList()
        for expansion, channels, blocks, stride in STAGES:
            for i in range(blocks):
                outputs, step, middle = _rounded(channels * width), stride if i == 0 else 1, inputs * expansion
                size = (-(-size[0] // step), -(-size[1] // step))
                if depthwise:
                    mix: nn.Module = ConvNorm(middle, middle, 3, step, middle)
                else:
                    mix = TVConvNorm(middle, size, stride=step, maps=maps, hidden=hidden, layers=layers, bias=bias)
                self.blocks.append(Inverted(inputs, outputs, expansion, step, mix))
                inputs = outputs
        last = _rounded(512 * max(1.0, width))
        self.tail = ConvNorm(inputs, last)
        self.norm, self.dropout = nn.BatchNorm2d(last), nn.Dropout(dropout)
        self.embed, self.embed_norm = nn.Linear(last, embedding), nn.BatchNorm1d(embedding)
        self._initialise()
        self.reset_classifier(num_classes)

    def _initialise(self) -> None:
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out")
            elif isinstance(module, nn.Linear):
                nn.init.normal_(module.weight, std=0.01)
                nn.init.zeros_(module.bias)

    def forward_features(self, x: Tensor) -> Tensor:
        """Features before pooling, see Shape."""
        self.check(x)
        if tuple(x.shape[2:]) != self.img_size:
            raise InputError(
                f"this network has kernels for pictures of {self.img_size[0]} x {self.img_size[1]}, got "
                f"{x.shape[2]} x {x.shape[3]}; resize the pictures, or build it with another img_size."
            )
        x = F.relu6(self.stem(x))
        for block in self.blocks:
            x = block(x)
        return F.relu6(self.tail(x))

    def pool(self, features: Tensor) -> Tensor:
        """The embedding. Shape: [B, 512, h, w] -> [B, embedding]."""
        return self.embed_norm(self.embed(self.dropout(self.norm(features)).mean((2, 3))))

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """Scaled cosines with the classes; the embedding itself with `pre_logits` or without classes."""
        x = self.pool(x)
        if pre_logits or not isinstance(self.head, nn.Linear):
            return x
        return self.scale * F.linear(F.normalize(x), F.normalize(self.head.weight))

    def reset_classifier(self, num_classes: int) -> None:
        """Put in new directions for another number of classes; 0 leaves them out."""
        super().reset_classifier(num_classes)
        if num_classes:
            self.head = nn.Linear(self.num_features, num_classes, bias=False).to(self.embed.weight)

    def margin_loss(self, logits: Tensor, labels: Tensor, margin: float = 0.35) -> Tensor:
        """AM-softmax (Wang et al. 2018): cross-entropy where the true class's cosine has to lead by a margin.

        Shape: logits [B, num_classes] as forward gives them, labels [B] -> scalar.
        """
        lead = F.one_hot(labels, logits.shape[1]) * (self.scale * margin)
        return F.cross_entropy(logits - lead, labels)

    def fuse(self) -> Self:
        """Make all kernels and fold all batch norms but the last two, in place; returns the network in eval mode."""
        return fuse(self)

    @classmethod
    def load_official(cls, state: Mapping[str, Any]) -> Self:
        """Build the face network that a checkpoint of JierunChen/TVConv was trained as.

        Args:
            state: keys `features.*` and `output_layer.*`, perhaps behind `model.`; or a checkpoint that holds them
                under "state_dict". Directions of classes (`head.*`) are left out.

        Raises: WeightsError when keys are missing or unknown.
        """
        try:
            mapped = _renamed(state.get("state_dict", state))
            network = cls(**_settings(mapped))
            network.load_state_dict(mapped)
        except (ValueError, KeyError, RuntimeError) as error:
            raise WeightsError(f"no checkpoint of a TVNet (keys begin with {sorted(state)[:3]}): {error}") from error
        return network.eval()


def conformance_example(larger: bool = False) -> tuple[TVNet, tuple[Tensor]]:
    """A small network and pictures of the odd size that it is for; larger inputs are more of them."""
    network = TVNet(5, width=0.1, img_size=(33, 30), embedding=16, hidden=8, layers=1)
    return network, (torch.rand(5 if larger else 3, 3, 33, 30),)


def _rounded(channels: float) -> int:
    """MobileNetV2's multiple of 8, at most a tenth below what was asked for."""
    near = max(8, int(channels + 4) // 8 * 8)
    return near if near >= 0.9 * channels else near + 8


def _renamed(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A state dict under our names. A block's children are numbered; those of the first have no widening."""
    sizes = ("TVConv_k", "TVConv_k_square", "stride", "channels", "h", "w")
    blocks = sum(count for _, _, count, _ in STAGES)
    names = {
        r"^model\.": "",
        r"^features\.0\.0\.": "stem.c.",
        r"^features\.0\.1\.": "stem.bn.",
        rf"^features\.{blocks + 1}\.0\.": "tail.c.",
        rf"^features\.{blocks + 1}\.1\.": "tail.bn.",
        r"^output_layer\.layer1\.(0\.)?": "norm.",
        r"^output_layer\.layer2\.0\.": "embed.",
        r"^output_layer\.layer2\.1\.": "embed_norm.",
        r"\.posi_map$": ".maps",
        r"\.weight_layers\.": ".generator.",
        r"\.bias_layers\.": ".shift.",
    }
    parts = {0: "expand.c", 1: "mix.c", 2: "project.c", 3: "project.bn"}
    mapped = {}
    for key, value in state.items():
        if key.startswith("head.") or key.rsplit(".", 1)[-1] in sizes:
            continue
        for old, new in names.items():
            key = re.sub(old, new, key)
        block = re.match(r"features\.(\d+)\.conv\.(\d+)\.(.*)", key)
        if block:
            index, child, rest = int(block[1]), int(block[2]), block[3]
            child += index == 1
            part = parts[child]
            if child < 2:
                which, rest = rest.split(".", 1)
                part = part if which == "0" else part.replace(".c", ".bn")
            key = f"blocks.{index - 1}.{part}.{rest}"
        mapped[key] = value
    return mapped


def _settings(mapped: Mapping[str, Tensor]) -> dict[str, Any]:
    """What the shapes of a state dict under our names tell; the width is that of the published network which has it."""
    maps = mapped.get("blocks.0.mix.c.maps")
    widths = [len(mapped[f"blocks.{i}.project.bn.bias"]) for i in range(sum(stage[2] for stage in STAGES))]
    expected = [(channels, blocks) for _, channels, blocks, _ in STAGES]
    for size in SIZES.values():
        if widths == [_rounded(channels * size["width"]) for channels, blocks in expected for _ in range(blocks)]:
            break
    else:
        raise KeyError(f"no published width has blocks of {widths} channels")
    settings = {**size, "in_chans": mapped["stem.c.weight"].shape[1], "embedding": len(mapped["embed.bias"])}
    if maps is None:
        return settings | {"depthwise": True}
    layers = {key.split(".")[5] for key in mapped if key.startswith("blocks.0.mix.c.generator.")}
    return settings | {
        "img_size": (maps.shape[2], maps.shape[3]),
        "maps": maps.shape[1],
        "hidden": len(mapped["blocks.0.mix.c.generator.0.0.weight"]),
        "layers": len(layers) - 2,
        "bias": "blocks.0.mix.c.shift.0.0.weight" in mapped,
    }
