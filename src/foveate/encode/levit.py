"""LeViT: a transformer whose map of tokens shrinks from stage to stage, made of matrix products with folded norms.

Graham, El-Nouby, Touvron, Stock, Joulin, Jegou, Douze 2021, "LeViT: a Vision Transformer in ConvNet's Clothing for
Faster Inference", arXiv:2104.01136.

Convolutions of stride 2 turn 224 x 224 pixels into 14 x 14 tokens; three stages at 14 x 14, 7 x 7 and 4 x 4 follow. A
stage repeats x <- x + Attention(x), x <- x + MLP(x), made of linear layers that each have a batch norm (LN):

    Attention(x) = LN(hardswish(concat_heads(softmax(q k' / sqrt(D) + b) v)))      v is r = 2 times as wide as q and k
    MLP(x)       = LN(hardswish(LN(x)))                                            through 2 C channels

where b is learned per head and distance and alone says where a token is; see `foveate.layers.distance_attention`.
Between stages stands attention that shrinks, of every second row and column to all tokens, with r = 4 and without a
residual, as the number of channels changes. Two heads, one for the classes and one for a teacher's, are averaged.

For inference `fuse()` folds norms, the factor 1 / sqrt(D) and the two heads into linear maps and reads the tables once.
"""

import math
import re
from collections.abc import Mapping, Sequence
from functools import cache
from typing import Any, Self

import torch
from torch import Tensor, nn

from foveate.engine.budget import Budget
from foveate.errors import BudgetError, InputError, WeightsError
from foveate.layers import fold
from foveate.layers.classifier import ImageClassifier
from foveate.layers.distance_attention import Attention, LinearNorm, ShrinkingAttention
from foveate.layers.fold import ConvNorm, NormLinear
from foveate.layers.residual import Residual

SIZES: dict[str, dict[str, Any]] = {
    "128s": {"embed_dims": (128, 256, 384), "key_dim": 16, "num_heads": (4, 6, 8), "depths": (2, 3, 4)},
    "128": {"embed_dims": (128, 256, 384), "key_dim": 16, "num_heads": (4, 8, 12), "depths": (4, 4, 4)},
    "192": {"embed_dims": (192, 288, 384), "key_dim": 32, "num_heads": (3, 5, 6), "depths": (4, 4, 4)},
    "256": {"embed_dims": (256, 384, 512), "key_dim": 32, "num_heads": (4, 6, 8), "depths": (4, 4, 4)},
    "384": {"embed_dims": (384, 512, 768), "key_dim": 32, "num_heads": (6, 9, 12), "depths": (4, 4, 4)}
    | {"drop_path": 0.1},
}  # fmt: skip
"""Published sizes, from the fastest to the most accurate (76.6, 78.6, 80.0, 81.6, 82.6% on ImageNet)."""

_TIMM_NAMES = {
    r"^(head(?:_dist)?)\.linear\.": r"\1.l.",
    r"\.linear\.": ".c.",
    r"\.downsample\.attn_downsample\.": ".0.",
    r"\.downsample\.mlp\.": ".1.m.",
    r"\.blocks\.(\d+)\.attn\.": r".2.\1.0.m.",
    r"\.blocks\.(\d+)\.mlp\.": r".2.\1.1.m.",
    r"\.(proj|q)\.ln\.": r".\1.1.",
    r"\.ln1\.": ".0.",
    r"\.ln2\.": ".2.",
}
"""From timm's names to the official ones, but for the place of a block, which becomes numbers in the right order."""


class LeViT(ImageClassifier):
    """Classify pictures.

    Args:
        size: "128s", "128", "192", "256" or "384", whose settings the ones below override.
        num_classes, in_chans: see `ImageClassifier`.
        img_size: side or (height, width) in pixels that the tables of biases are made for. For pictures of other sizes
            they are resampled, and batch norms meet statistics that they do not know.
        patch_size: pixels per token and side, a power of two: 2 to the number of convolutions.
        embed_dims, key_dim, num_heads, depths: C per stage, D, heads and blocks per stage.
        drop_path: share of residual branches left out in training.
        distillation: have a second head to learn a teacher's classes. In training the network then returns
            (classes, teacher's classes), and in evaluation their mean.

    Shape: [B, in_chans, H, W] -> [B, num_classes]; features [B, N, C], N tokens of the last stage.
    Raises: InputError for settings or pictures that do not fit.

    >>> net = LeViT("128s", num_classes=10).eval()
    >>> net(torch.zeros(1, 3, 224, 224)).shape, net.forward_features(torch.zeros(1, 3, 224, 224)).shape
    (torch.Size([1, 10]), torch.Size([1, 16, 384]))
    """

    def __init__(
        self,
        size: str = "256",
        num_classes: int = 1000,
        in_chans: int = 3,
        img_size: int | tuple[int, int] = 224,
        patch_size: int = 16,
        embed_dims: Sequence[int] | None = None,
        key_dim: int | None = None,
        num_heads: Sequence[int] | None = None,
        depths: Sequence[int] | None = None,
        drop_path: float | None = None,
        distillation: bool = True,
    ) -> None:
        if size not in SIZES:
            raise InputError(f"unknown size {size!r}; use one of {', '.join(map(repr, SIZES))}.")
        given = {"embed_dims": embed_dims, "key_dim": key_dim, "num_heads": num_heads, "depths": depths}
        own = {"drop_path": 0.0} | SIZES[size] | {k: v for k, v in given.items() if v is not None}
        dims, heads, layers, width = (own[k] for k in ("embed_dims", "num_heads", "depths", "key_dim"))
        drop = own["drop_path"] if drop_path is None else drop_path
        if not len(dims) == len(heads) == len(layers) or not len(dims):
            raise InputError(f"embed_dims, num_heads and depths must be equally long; got {dims}, {heads}, {layers}.")
        if min(*dims, *heads, *layers, width) < 1 or width > min(dims):
            raise InputError(
                f"widths, heads and depths must be at least 1, and key_dim at most the narrowest width; got {own}."
            )
        halvings = patch_size.bit_length() - 1
        if patch_size < 2 or patch_size != 1 << halvings or dims[0] % (patch_size // 2):
            raise InputError(
                f"patch_size must be a power of two from 2 on, half of which divides the first width; got {patch_size} "
                f"and {dims[0]}."
            )
        super().__init__(dims[-1], in_chans)
        height, wide = (img_size, img_size) if isinstance(img_size, int) else img_size
        if min(height, wide) < 1:
            raise InputError(f"img_size must be at least 1, got {img_size}.")
        self.distillation = distillation
        channels = [in_chans, *(dims[0] >> i for i in reversed(range(halvings)))]
        stem: list[nn.Module] = []
        for i in range(halvings):
            stem += [ConvNorm(channels[i], channels[i + 1], 3, 2), nn.Hardswish()]
        self.patch_embed = nn.Sequential(*stem[:-1])
        grid = (-(-height // patch_size), -(-wide // patch_size))
        blocks: list[nn.Module] = []
        for i, dim in enumerate(dims):
            if i:
                blocks.append(ShrinkingAttention(dims[i - 1], width, dims[i - 1] // width, grid, dim))
                blocks.append(Residual(_mlp(dim), drop))
                grid = (-(-grid[0] // 2), -(-grid[1] // 2))
            for _ in range(layers[i]):
                blocks += [Residual(Attention(dim, width, heads[i], grid), drop), Residual(_mlp(dim), drop)]
        self.blocks = nn.Sequential(*blocks)
        self.reset_classifier(num_classes)

    def forward_features(self, x: Tensor) -> Tensor:
        """Tokens of the last stage. Shape: [B, in_chans, H, W] -> [B, N, C]."""
        self.check(x)
        # Channels last, so that tokens are rows of one matrix without a copy.
        x = self.patch_embed(x.contiguous(memory_format=torch.channels_last))
        return self.blocks(x.permute(0, 2, 3, 1).contiguous()).flatten(1, 2)

    def pool(self, features: Tensor) -> Tensor:
        """The mean of all tokens. Shape: [B, N, C] -> [B, C]."""
        return features.mean(1)

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Any:
        """Classes from tokens, see `distillation`; with `pre_logits`, the mean token."""
        x = self.pool(x)
        if pre_logits or self.head_dist is None:
            return x if pre_logits else self.head(x)
        found = self.head(x), self.head_dist(x)
        return found if self.training else (found[0] + found[1]) / 2

    def reset_classifier(self, num_classes: int) -> None:
        """Put in new heads for another number of classes; 0 leaves them out."""
        super().reset_classifier(num_classes)
        self.head_dist: nn.Module | None = None
        if num_classes:
            like = self.head.weight
            self.head = NormLinear(self.num_features, num_classes).to(like)  # type: ignore[arg-type]
            if self.distillation:
                self.head_dist = NormLinear(self.num_features, num_classes).to(like)  # type: ignore[arg-type]

    def fuse(self) -> Self:
        """Fold everything that is linear, for inference and in place; returns the network in eval mode."""
        fold.fuse(self)
        if self.head_dist is not None:
            mean: Any = self.head
            with torch.no_grad():
                for own, other in zip(mean.parameters(), self.head_dist.parameters(), strict=True):
                    own.copy_((own + other) / 2)
            self.head_dist = None
        return self

    @classmethod
    def load_official(cls, state: Mapping[str, Any]) -> Self:
        """Build the network of an official checkpoint (facebookresearch/LeViT), or of timm's `levit_*` weights.

        Args:
            state: the checkpoint, or what it has under "model"; of square pictures.

        Raises: WeightsError when keys are missing or unknown.
        """
        given = state.get("model", state)
        try:
            mapped = _official_names(given)
            network = cls(**_settings(mapped))
            network.load_state_dict(mapped)
        except (LookupError, RuntimeError, ValueError) as error:
            raise WeightsError(f"no checkpoint of LeViT (keys begin with {sorted(given)[:3]}): {error}.") from error
        return network.eval()

    @classmethod
    def conformance_example(cls, larger: bool = False) -> tuple["LeViT", tuple[Tensor]]:
        """A small network that has left its beginning, where residual branches are zero, and noise."""
        net = cls(
            num_classes=5, img_size=32, patch_size=4, embed_dims=(16, 24, 32), key_dim=8, num_heads=(2, 3, 4),
            depths=(1, 1, 1),
        )  # fmt: skip
        for module in net.modules():
            if isinstance(module, LinearNorm):
                nn.init.ones_(module.bn.weight)
        return net, (torch.rand(4, 3, *((45, 37) if larger else (32, 32))),)


def choose_size(budget: Budget | float | str, img_size: int = 224, batch: int = 1, device: str = "cpu") -> str:
    """The largest published size within a budget per batch: milliseconds on this machine, or GFLOPs.

    Args:
        budget: such as "30 ms", "2 GFLOPs", or a share of what the largest size costs in FLOPs.
        img_size, batch: side of the pictures, and how many at once.

    Raises: BudgetError when even the smallest size costs more.
    """
    from foveate.meter import measure

    limit, costs = Budget.parse(budget), {}
    for size in SIZES:
        if limit.unit == "ms":
            net, x = LeViT(size).fuse().to(device), torch.zeros(batch, 3, img_size, img_size, device=device)
            with torch.inference_mode():
                costs[size] = 1e3 * measure(net, x).seconds
            if costs[size] > limit.amount:
                break
        else:
            costs[size] = batch * gflops(size, img_size)
    largest = costs[next(reversed(costs))]
    most = limit.amount if limit.unit == "ms" else largest * limit.share_of(gflops=largest)
    fitting = [size for size, cost in costs.items() if cost <= most]
    if not fitting:
        first, cost = next(iter(costs.items()))
        unit = "ms" if limit.unit == "ms" else "GFLOPs"
        raise BudgetError(f"{budget!r} is below what LeViT-{first} costs, {cost:.3g} {unit}; give at least that much.")
    return fitting[-1]


@cache
def gflops(size: str, img_size: int = 224) -> float:
    """What a published size costs per picture."""
    from foveate.meter import count_flops

    with torch.device("meta"):
        return count_flops(LeViT(size).eval(), torch.zeros(1, 3, img_size, img_size)) / 1e9


def _mlp(dim: int) -> nn.Sequential:
    return nn.Sequential(LinearNorm(dim, 2 * dim), nn.Hardswish(), LinearNorm(2 * dim, dim, gamma=0.0))


def _official_names(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The weights under official names, whichever of the two sets of names they came under."""
    mapped = {key: value for key, value in state.items() if not key.endswith("attention_bias_idxs")}
    if not any(key.startswith("stages.") for key in mapped):
        return mapped
    mapped = {re.sub(r"^stem\.conv(\d)\.", _stem_name, key): value for key, value in mapped.items()}
    for old, new in _TIMM_NAMES.items():
        mapped = {re.sub(old, new, key): value for key, value in mapped.items()}
    found = {key: re.match(r"stages\.([\d.]+)\.(?=[a-z])", key) for key in mapped}
    order = sorted({tuple(int(n) for n in m[1].split(".")) for m in found.values() if m})
    blocks = {".".join(map(str, place)): i for i, place in enumerate(order)}
    return {
        f"blocks.{blocks[m[1]]}.{key[m.end() :]}" if (m := found[key]) else key:
        # The convolutional twins have 1x1 convolutions for linear layers.
        value.flatten(1) if value.shape[2:] == (1, 1) else value
        for key, value in mapped.items()
    }  # fmt: skip


def _stem_name(match: re.Match[str]) -> str:
    return f"patch_embed.{2 * int(match[1]) - 2}."


def _settings(mapped: Mapping[str, Tensor]) -> dict[str, Any]:
    """What the shapes of a state dict under official names tell."""
    stages: list[list[str]] = [[]]
    for i in range(1 + max(int(key.split(".")[1]) for key in mapped if key.startswith("blocks."))):
        if f"blocks.{i}.kv.c.weight" in mapped:
            stages.append([])
        elif f"blocks.{i}.m.qkv.c.weight" in mapped:
            stages[-1].append(f"blocks.{i}.m.")
    maps = [mapped[f"{stage[0]}qkv.c.weight"] for stage in stages]
    tables = [mapped[f"{stage[0]}attention_biases"] for stage in stages]
    patch = 2 ** sum(key.startswith("patch_embed.") and key.endswith(".c.weight") for key in mapped)
    return {
        "num_classes": len(mapped["head.l.bias"]),
        "in_chans": mapped["patch_embed.0.c.weight"].shape[1],
        "img_size": patch * math.isqrt(tables[0].shape[1]),
        "patch_size": patch,
        "embed_dims": [weight.shape[1] for weight in maps],
        "key_dim": len(maps[0]) // (4 * len(tables[0])),
        "num_heads": [len(table) for table in tables],
        "depths": [len(stage) for stage in stages],
        "distillation": "head_dist.l.bias" in mapped,
    }
