"""LambdaNetworks: what surrounds a pixel is summarised as a small matrix, which is then applied to the pixel.

Bello 2021, "LambdaNetworks: Modeling Long-Range Interactions Without Attention", arXiv:2102.08602.

Attention keeps a weight for every pair of n queries and m contexts, in every head. A lambda layer keeps, per query, a
matrix of k x v, whatever m is. With h queries per pixel of depth k, values of depth v = d / h and intra-depth u,

    Q = BN(X W_q)  [B, n, h, k],    K = softmax_m(X W_k)  [B, m, k, u],    V = BN(X W_v)  [B, m, v, u]
    Lc    = sum_{m, u} K[m, :, u] V[m, :, u]^T          [B, k, v]         content: one for all queries
    Lp[n] = sum_{m, u} E[n, m, :, u] V[m, :, u]^T       [B, n, k, v]      position: one per query
    y[n, i] = Q[n, i] (Lc + Lp[n])                      [B, n, h, v]      one lambda serves the h queries of a pixel

The softmax runs over contexts, so content alone is linear attention, blind to where things are. Embeddings E depend on
the offset alone, E[n, m] = R[m - n], so with offsets up to r // 2 the position lambdas are a convolution from u to k
channels (the lambda convolution), done for each of the v value channels; on maps smaller than its kernel it is a
product with the matrix E, which then is the smaller one.

LambdaResNet is a bottleneck ResNet, some or all of whose 3x3 convolutions are lambda layers, averaged over 2x2 pixels
where the size is halved.
"""

import re
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from foveate.errors import InputError, WeightsError
from foveate.layers.classifier import ImageClassifier
from foveate.layers.fold import ConvNorm, fuse
from foveate.layers.residual import add_

_FIFTY: dict[str, Any] = {"depths": (3, 4, 6, 3), "widths": (64, 128, 256, 512), "lambdas": None}
_TIMM: dict[str, Any] = {"widths": (64, 128, 256, 512), "stem": "tiered", "reach": 9, "position_bias": True}

SIZES: dict[str, dict[str, Any]] = {
    "50": _FIFTY,
    "50-u4": _FIFTY | {"intra": 4, "reach": 7},
    "26t": _TIMM | {"depths": (2, 2, 2, 2), "lambdas": ((), (), (1,), (0, 1))},
    "26rpt": _TIMM | {"depths": (2, 2, 2, 2), "lambdas": ((), (), (1,), (0, 1)), "position_bias": False}
    | {"img_size": 256},
    "50ts": _TIMM | {"depths": (3, 4, 6, 3), "lambdas": ((), (3,), (1, 3, 5), (1,)), "activation": "silu"},
    "small": {"depths": (1, 1, 2), "widths": (16, 32, 64), "lambdas": None, "reach": 7, "stem": "3x3"},
}  # fmt: skip
"""The paper's LambdaNetwork-50 (78.4 and 78.9% on ImageNet), timm's hybrids, and one for pictures of 32 x 32."""

ACTIVATIONS: dict[str, type[nn.Module]] = {"relu": nn.ReLU, "silu": nn.SiLU}

_AT_ONCE = 1 << 22
"""Entries of lambdas that are held at a time where no gradient can be asked for."""

_TIMM_NAMES: dict[str, str | Callable[[re.Match[str]], str]] = {
    r"^stem\.conv(\d)\.": lambda m: f"stem.{2 * int(m[1]) - 2}.",
    r"\.conv1_1x1\.": ".first.",
    r"\.conv2_kxk\.": ".middle.",
    r"\.self_attn\.norm_q\.": ".self_attn.query.bn.",
    r"\.self_attn\.norm_v\.": ".self_attn.value.bn.",
    r"\.self_attn\.conv_lambda\.weight$": ".self_attn.position",
    r"\.self_attn\.pos_emb$": ".self_attn.position",
    r"\.self_attn\.conv_lambda\.bias$": ".self_attn.bias",
    r"\.self_attn\.": ".middle.0.",
    r"\.post_attn\.": ".middle.norm.",
    r"\.conv3_1x1\.": ".last.",
    r"\.conv\.": ".c.",
    r"^head\.fc\.": "head.",
}


def apply_lambdas(
    queries: Tensor, keys: Tensor, values: Tensor, embeddings: Tensor | None = None, mask: Tensor | None = None
) -> Tensor:
    """The definition above, for any contexts and embeddings.

    Args:
        queries, values: after their norms.
        keys: before the softmax; None of them count where `mask` is False.
        embeddings: E; without, content alone.
        mask: which contexts there are.

    Shape: queries [B, n, h, k], keys [B, m, k, u], values [B, m, v, u], embeddings [n, m, k, u], mask [m] ->
        [B, n, h, v].

    >>> q, k, v = torch.rand(2, 5, 3, 4), torch.rand(2, 7, 4, 1), torch.rand(2, 7, 6, 1)
    >>> apply_lambdas(q, k, v).shape
    torch.Size([2, 5, 3, 6])
    """
    if mask is not None:
        keys, values = keys[:, mask], values[:, mask]
        embeddings = None if embeddings is None else embeddings[:, mask]
    lambdas = torch.einsum("bmku,bmvu->bkv", keys.softmax(1), values)[:, None]
    if embeddings is not None:
        lambdas = lambdas + torch.einsum("nmku,bmvu->bnkv", embeddings, values)
    return queries @ lambdas


class LambdaLayer(nn.Module):
    """Let every pixel be transformed by what it sees of the whole map, and of where things are around it.

    Args:
        dim: channels.
        outputs: d, default `dim`.
        heads: h, queries per pixel.
        key_dim: k.
        intra: u.
        reach: r, or rows and columns of R, odd; None for content alone.
        content: False for position alone.
        bias: add a learned vector to the position lambdas of all pixels and values (timm has it, the paper has not).

    Shape: [B, dim, H, W] -> [B, outputs, H, W]. The map is the context of its own pixels.
    Raises: InputError for settings that do not fit.
    """

    def __init__(
        self,
        dim: int,
        outputs: int | None = None,
        heads: int = 4,
        key_dim: int = 16,
        intra: int = 1,
        reach: int | tuple[int, int] | None = 23,
        content: bool = True,
        bias: bool = False,
    ) -> None:
        super().__init__()
        outputs = outputs or dim
        sides = (reach, reach) if isinstance(reach, int) else reach
        if min(dim, outputs, heads, key_dim, intra) < 1 or outputs % heads:
            raise InputError(f"outputs must be a multiple of heads, all else positive; got {outputs=}, {heads=}.")
        if sides is not None and not (sides[0] % 2 and sides[1] % 2 and min(sides) > 0):
            raise InputError(f"reach must be odd, so that a pixel is in the middle of it; got {reach}.")
        if sides is None and (bias or not content):
            raise InputError(
                f"without positions (reach=None) there must be content and no bias; got {content=}, {bias=}."
            )
        self.heads, self.intra = heads, intra
        self.query = ConvNorm(dim, heads * key_dim)
        self.key = nn.Conv2d(dim, key_dim * intra, 1, bias=False) if content else None
        self.value = ConvNorm(dim, outputs // heads * intra)
        self.position = None if sides is None else nn.Parameter(torch.randn(key_dim, intra, *sides))
        self.bias = nn.Parameter(torch.zeros(key_dim)) if bias else None
        for conv, depth in ((self.query.c, key_dim), (self.key, 1), (self.value.c, 1)):
            if conv is not None:
                nn.init.normal_(conv.weight, std=(dim * depth) ** -0.5)

    def forward(self, x: Tensor) -> Tensor:
        queries = self.query(x).unflatten(1, (self.heads, -1)).flatten(3)  # [B, h, k, n]
        values = self.value(x).unflatten(1, (-1, self.intra))  # [B, v, u, H, W]
        y: Tensor | None = None
        if self.key is not None:
            keys = self.key(x).unflatten(1, (-1, self.intra)).flatten(3).softmax(3)
            summary = torch.einsum("bkum,bvum->bvk", keys, values.flatten(3))
            y = summary[:, None] @ queries  # [B, h, v, n]
        if self.position is not None:
            # Lambdas of some value channels at a time are made, applied and forgotten.
            size = queries.shape[0] * queries[0, 0].numel()
            step = values.shape[1] if torch.is_grad_enabled() else max(1, _AT_ONCE // size)
            seen = [torch.einsum("bhkn,bvkn->bhvn", queries, self.lambdas(v)) for v in values.split(step, 1)]
            around = torch.cat(seen, 2) if len(seen) > 1 else seen[0]
            y = around if y is None else add_(around, y)
        assert y is not None
        return y.flatten(1, 2).unflatten(2, x.shape[2:])

    def lambdas(self, values: Tensor) -> Tensor:
        """Position lambdas. Shape: values [B, v, u, H, W] -> [B, v, k, H * W]."""
        assert self.position is not None
        batch, depth, _, height, width = values.shape
        rows, columns = self.position.shape[2:]
        if height * width <= rows * columns:
            matrix = self.embeddings(height, width).permute(2, 0, 3, 1).flatten(2)  # [k, n, u * m]
            found = torch.einsum("knm,bvm->bvkn", matrix, values.flatten(2))
        else:
            maps = values.flatten(0, 1)
            found = F.conv2d(maps, self.position, padding=(rows // 2, columns // 2)).flatten(2)
            found = found.unflatten(0, (batch, depth))
        return found if self.bias is None else found + self.bias[:, None]

    def embeddings(self, height: int, width: int) -> Tensor:
        """E of a map, E[n, m] = R[m - n], zero beyond the reach. Shape: [n, m, k, u], n = m = height * width."""
        assert self.position is not None
        table: Tensor = self.position
        down, across = ((n - 1) - side // 2 for n, side in zip((height, width), table.shape[2:], strict=True))
        table = F.pad(table, (across, across, down, down))  # offsets up to the size of the map, where it is larger cut
        windows = table.unfold(2, height, 1).unfold(3, width, 1).flip(2, 3)  # [k, u, y, x, y', x']
        return windows.flatten(4).flatten(2, 3).permute(2, 3, 0, 1)


class Bottleneck(nn.Module):
    """1x1 convolution, `middle`, 1x1 convolution to four times the width, all with norms, and a residual.

    Args:
        inputs, width: channels before, and in the middle.
        stride: of `middle`, and of a 1x1 convolution on the shortcut where it is not 1 or the width changes.
        middle: with its norm; [B, width, H, W] -> [B, width, ceil(H / stride), ceil(W / stride)].
        activation: after each of the three, the last time after the sum.

    Shape: [B, inputs, H, W] -> [B, 4 * width, ceil(H / stride), ceil(W / stride)].
    """

    def __init__(self, inputs: int, width: int, stride: int, middle: nn.Module, activation: str) -> None:
        super().__init__()
        self.first, self.middle = ConvNorm(inputs, width), middle
        self.last = ConvNorm(width, 4 * width, gamma=0.0)
        plain = stride == 1 and inputs == 4 * width
        self.shortcut = nn.Identity() if plain else ConvNorm(inputs, 4 * width, 1, stride)
        self.act = ACTIVATIONS[activation]()

    def forward(self, x: Tensor) -> Tensor:
        y = self.last(self.act(self.middle(self.act(self.first(x)))))
        return self.act(add_(y, self.shortcut(x)))


class LambdaResNet(ImageClassifier):
    """Classify pictures.

    Args:
        size: a name of `SIZES`, whose settings the arguments below override.
        num_classes, in_chans: see `ImageClassifier`.
        depths, widths: blocks per stage, and their inner channels; each stage but the first halves the map.
        lambdas: per stage, which blocks have a lambda layer for their 3x3 convolution; default all.
        heads, key_dim, intra, reach: h, k, u, r.
        img_size: give layers a table of all offsets on the map that pictures of this size make, in place of `reach`.
        position_bias: see `LambdaLayer`.
        stem: "7x7", "tiered" (three 3x3), both to a quarter of the size, or "3x3", which keeps it.
        activation: "relu" or "silu".

    Shape: [B, in_chans, H, W] -> [B, num_classes], for any H and W; features [B, 4 * widths[-1], h, w].
    Raises: InputError for settings or pictures that do not fit.

    >>> net = LambdaResNet("small", num_classes=10).eval()
    >>> net(torch.zeros(2, 3, 32, 32)).shape, net.forward_features(torch.zeros(2, 3, 32, 32)).shape
    (torch.Size([2, 10]), torch.Size([2, 256, 8, 8]))
    """

    def __init__(
        self,
        size: str = "50",
        num_classes: int = 1000,
        in_chans: int = 3,
        depths: Sequence[int] | None = None,
        widths: Sequence[int] | None = None,
        lambdas: Sequence[Sequence[int]] | None = None,
        heads: int = 4,
        key_dim: int = 16,
        intra: int | None = None,
        reach: int | None = None,
        img_size: int | tuple[int, int] | None = None,
        position_bias: bool | None = None,
        stem: str | None = None,
        activation: str | None = None,
    ) -> None:
        if size not in SIZES:
            raise InputError(f"unknown size {size!r}; use one of {', '.join(map(repr, SIZES))}.")
        given = {"depths": depths, "widths": widths, "lambdas": lambdas, "intra": intra, "reach": reach, "stem": stem}
        given |= {"img_size": img_size, "position_bias": position_bias, "activation": activation}
        own: dict[str, Any] = {
            "intra": 1,
            "reach": 23,
            "stem": "7x7",
            "img_size": None,
            "position_bias": False,
            "activation": "relu",
        }
        own |= SIZES[size] | {name: value for name, value in given.items() if value is not None}
        layers, dims, act = own["depths"], own["widths"], own["activation"]
        chosen = [range(depth) for depth in layers] if own["lambdas"] is None else own["lambdas"]
        if not len(layers) == len(dims) == len(chosen) or min([*layers, *dims], default=0) < 1:
            raise InputError(f"depths, widths and lambdas must be as many; got {layers}, {dims}, {own['lambdas']}.")
        if act not in ACTIVATIONS or own["stem"] not in ("7x7", "tiered", "3x3"):
            raise InputError(
                f"got activation={act!r} and stem={own['stem']!r}; use {' or '.join(map(repr, ACTIVATIONS))}, and "
                "'7x7', 'tiered' or '3x3'."
            )
        super().__init__(4 * dims[-1], in_chans)
        self.stem = _stem(in_chans, dims[0], own["stem"], ACTIVATIONS[act])
        layer = partial(LambdaLayer, heads=heads, key_dim=key_dim, intra=own["intra"], bias=own["position_bias"])
        side = own["img_size"]
        grid: tuple[int, int] | None = None
        if side is not None:
            grid = (side, side) if isinstance(side, int) else (side[0], side[1])
        if grid and own["stem"] != "3x3":
            grid = _halved(_halved(grid))
        stages, before = [], dims[0]
        for i, (width, depth) in enumerate(zip(dims, layers, strict=True)):
            blocks = []
            for j in range(depth):
                stride = 2 if i and not j else 1
                middle: nn.Module = ConvNorm(width, width, 3, stride)
                if j in chosen[i]:
                    table = (2 * grid[0] - 1, 2 * grid[1] - 1) if grid else own["reach"]
                    middle = _with_norm(layer(width, reach=table), width, stride)
                blocks.append(Bottleneck(before, width, stride, middle, act))
                before = 4 * width
                grid = _halved(grid) if grid and stride == 2 else grid
            stages.append(nn.Sequential(*blocks))
        self.stages = nn.Sequential(*stages)
        self.reset_classifier(num_classes)

    def forward_features(self, x: Tensor) -> Tensor:
        """The last map, see Shape."""
        self.check(x)
        return self.stages(self.stem(x))

    def fuse(self) -> Self:
        """Fold batch norms into convolutions, in place; returns the network in eval mode.

        The norm after a lambda layer stays: its heads share their values, so nothing before it can take its factors.
        """
        return fuse(self)

    @classmethod
    def load_official(cls, state: Mapping[str, Tensor], activation: str = "relu") -> Self:
        """Build the network of timm's `lambda_resnet*` weights (the author has released none).

        Args:
            activation: which no shape tells; "silu" for lambda_resnet50ts.

        Raises: WeightsError when keys are missing or unknown.
        """
        try:
            mapped = _from_timm(state)
            network = cls(**_settings(mapped), activation=activation)
            network.load_state_dict(mapped)
        except (LookupError, RuntimeError, ValueError, TypeError) as error:
            raise WeightsError(
                f"no checkpoint of timm's lambda_resnets (keys begin with {sorted(state)[:3]}): {error}."
            ) from error
        return network.eval()

    @classmethod
    def conformance_example(cls, larger: bool = False) -> tuple["LambdaResNet", tuple[Tensor]]:
        """A small network that has left its beginning, where residual branches are zero, and noise of an odd size."""
        net = cls("small", num_classes=5, widths=(8, 16), depths=(1, 2), lambdas=((0,), (0,)), reach=5, intra=2)
        for module in net.modules():
            if isinstance(module, Bottleneck):
                nn.init.ones_(module.last.bn.weight)
        return net, (torch.rand(4, 3, *((27, 22) if larger else (17, 14))),)


def _halved(grid: tuple[int, int]) -> tuple[int, int]:
    return -(-grid[0] // 2), -(-grid[1] // 2)


def _with_norm(layer: LambdaLayer, width: int, stride: int) -> nn.Sequential:
    """A lambda layer and its norm, and between them the mean of 2x2 pixels where the map is halved."""
    parts = nn.Sequential(layer)
    if stride == 2:
        parts.append(nn.AvgPool2d(2, ceil_mode=True, count_include_pad=False))
    parts.add_module("norm", nn.BatchNorm2d(width))
    return parts


def _stem(inputs: int, width: int, kind: str, act: type[nn.Module]) -> nn.Sequential:
    if kind == "3x3":
        return nn.Sequential(ConvNorm(inputs, width, 3), act())
    pool = nn.MaxPool2d(3, 2, 1)
    if kind == "7x7":
        return nn.Sequential(ConvNorm(inputs, width, 7, 2), act(), pool)
    a, b = 3 * width // 8, width // 2
    thin = [ConvNorm(inputs, a, 3, 2), act(), ConvNorm(a, b, 3), act(), ConvNorm(b, width, 3), act()]
    return nn.Sequential(*thin, pool)


def _from_timm(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """timm's names as ours; the one convolution for queries, keys and values is taken apart."""
    mapped: dict[str, Tensor] = {}
    for key, value in state.items():
        if key.endswith("conv_lambda.weight"):
            value = value.squeeze(-1)
        elif key.endswith("pos_emb"):
            value = value.permute(2, 0, 1)[:, None]
        for old, new in _TIMM_NAMES.items():
            key = re.sub(old, new, key)
        mapped[key] = value
    for key in [key for key in mapped if key.endswith(".qkv.weight")]:
        name, weight = key.removesuffix("qkv.weight"), mapped.pop(key)
        sizes = [len(mapped[f"{name}query.bn.weight"]), len(mapped[f"{name}position"])]
        parts = weight.split([*sizes, len(weight) - sum(sizes)])
        mapped |= {
            f"{name}{n}": p for n, p in zip(("query.c.weight", "key.weight", "value.c.weight"), parts, strict=True)
        }
    return mapped


def _settings(mapped: Mapping[str, Tensor]) -> dict[str, Any]:
    """What the shapes of a state dict under our names tell."""
    blocks = sorted({tuple(map(int, key.split(".")[1:3])) for key in mapped if key.startswith("stages.")})
    stages = range(1 + max(i for i, _ in blocks))
    tables = {(i, j): mapped[n] for i, j in blocks if (n := f"stages.{i}.{j}.middle.0.position") in mapped}
    (i, j), table = next(iter(tables.items()))
    queries = len(mapped[f"stages.{i}.{j}.middle.0.query.bn.weight"])
    sides, head = {t.shape[2] for t in tables.values()}, mapped.get("head.weight")
    # A table of all offsets has 2 H - 1 rows, H being the map's height before the block halves it.
    full = (table.shape[2] + 1) // 2 * 4 * 2 ** (i if j or not i else i - 1)
    return {
        "num_classes": 0 if head is None else len(head),
        "in_chans": mapped["stem.0.c.weight"].shape[1],
        "depths": [sum(1 for i, _ in blocks if i == s) for s in stages],
        "widths": [len(mapped[f"stages.{s}.0.first.bn.weight"]) for s in stages],
        "lambdas": [[j for i, j in tables if i == s] for s in stages],
        "heads": queries // len(table),
        "key_dim": len(table),
        "reach": table.shape[2],
        "img_size": full if len(sides) > 1 else None,
        "position_bias": any(key.endswith("middle.0.bias") for key in mapped),
        "stem": "7x7" if mapped["stem.0.c.weight"].shape[2] == 7 else "tiered",
    }
