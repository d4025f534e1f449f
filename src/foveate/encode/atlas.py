"""Atlas: every window attends to itself and to ever coarser views of all that lies around it.

Agrawal et al. 2025, "Atlas: Multi-Scale Attention Improves Long Context Image Modeling", arXiv:2503.12355.

A feature map X^1 is kept at several scales at once, X^l being max-pooled by s^(l-1), each cut into windows of k x k
tokens. A block of multi-scale attention, with weights of its own for every scale, does

    X^l      = X^l + MLP(place in the window)
    X^(l+1)  = X^(l+1) + MaxPool_s(X^l)                                            fine to coarse
    X^l      = X^l + attend(X^l;  own window, and the windows of all X^m, m > l, that cover it)     l = L .. 1
    X^l      = X^l + attend(X^l;  the window of X^(l-1) below the token)                            l = 2 .. L

the last two followed by X^l + MLP_l(norm(X^l)). With K = k^2 tokens a window and log N scales that is O(N K log N).
Stage j of the network runs its blocks on scales j .. L and then drops the finest: compute moves to the coarse scales,
and classes are read from the last. Windows find their coarse ones by place (the window at (i, j) lies in (i / s, j / s)
of the next scale); sides that windows do not divide are filled up with tokens that nobody sees.
"""

import math
from collections.abc import Sequence
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from foveate.errors import InputError
from foveate.layers.classifier import ImageClassifier
from foveate.layers.map_norm import MapNorm
from foveate.layers.residual import Residual
from foveate.layers.transformer import MLP

SIZES: dict[str, dict[str, int]] = {"s": {"dim": 384, "num_heads": 6}, "b": {"dim": 768, "num_heads": 12}}
"""Published widths; with patches of 16 pixels and windows of 16 x 16."""


def scales_for(tokens: int, window: int, pool: int) -> int:
    """How many scales it takes until one window holds all: ceil(log(N / K) / log S) + 1, K and S squares of the sides.

    >>> [scales_for(side * side, 16, 4) for side in (16, 64, 256, 1024)]
    [1, 2, 3, 4]
    """
    return max(0, math.ceil(math.log(tokens / window**2) / math.log(pool**2) - 1e-9)) + 1


class Cut:
    """How a map [B, H, W, C] is cut into windows, the last ones of a row or column filled up.

    Args:
        size: H, W.
        window: rows and columns of one.
    """

    def __init__(self, size: tuple[int, int], window: tuple[int, int]) -> None:
        self.size, self.window = size, window
        self.grid = tuple(-(-n // k) for n, k in zip(size, window, strict=True))

    def cut(self, x: Tensor) -> Tensor:
        """Shape: [B, H, W, C] -> [B, windows, tokens, C]."""
        (gh, gw), (kh, kw), (h, w) = self.grid, self.window, self.size
        x = F.pad(x, (0, 0, 0, gw * kw - w, 0, gh * kh - h))
        return x.unflatten(2, (gw, kw)).unflatten(1, (gh, kh)).transpose(2, 3).flatten(3, 4).flatten(1, 2)

    def paste(self, windows: Tensor) -> Tensor:
        """Undo `cut`. Shape: [B, windows, tokens, C] -> [B, H, W, C]."""
        x = windows.unflatten(2, self.window).unflatten(1, self.grid).transpose(2, 3).flatten(3, 4).flatten(1, 2)
        return x[:, : self.size[0], : self.size[1]]

    def inside(self, device: torch.device) -> Tensor | None:
        """Which tokens are not filling, [windows, tokens]; None where all are not."""
        if all(g * k == n for g, k, n in zip(self.grid, self.window, self.size, strict=True)):
            return None
        return self.cut(torch.ones(1, *self.size, 1, device=device))[0, :, :, 0] > 0

    def parents(self, coarse: "Cut", factor: int, device: torch.device) -> Tensor:
        """For each window, the one of a map coarser by `factor` that covers it."""
        rows, columns = (torch.arange(g, device=device) // factor for g in self.grid)
        return (rows[:, None] * coarse.grid[1] + columns).flatten()


class ScaleAttention(nn.Module):
    """What a scale has of its own: norms, projections and MLP, under the authors' names."""

    def __init__(self, dim: int, heads: int, mlp_ratio: float) -> None:
        super().__init__()
        self.norm1_q, self.norm1_kv, self.norm2 = (nn.LayerNorm(dim) for _ in range(3))
        self.attn = nn.ModuleDict(
            {"q": nn.Linear(dim, dim), "kv": nn.Linear(dim, 2 * dim), "proj": nn.Linear(dim, dim)}
        )
        self.mlp = MLP(dim, int(dim * mlp_ratio))
        self.heads = heads

    def offer(self, windows: Tensor) -> Tensor:
        """Keys and values. Shape: [B, n, K, C] -> [B, n, K, 2 C]."""
        return self.attn["kv"](self.norm1_kv(windows))

    def forward(self, windows: Tensor, offered: Tensor, seen: Tensor | None) -> Tensor:
        """Take from what is offered, then the MLP.

        Shape: windows [B, n, K, C], offered [B, n, M, 2 C], seen bool [n, M] or None -> [B, n, K, C].
        """
        b, n = windows.shape[:2]
        q = self.attn["q"](self.norm1_q(windows)).flatten(0, 1).unflatten(2, (self.heads, -1)).transpose(1, 2)
        k, v = offered.flatten(0, 1).unflatten(2, (2, self.heads, -1)).permute(2, 0, 3, 1, 4)
        mask = None if seen is None else seen.repeat(b, 1)[:, None, None]
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask).transpose(1, 2).flatten(2).unflatten(0, (b, n))
        windows = windows + self.attn["proj"](y)
        return windows + self.mlp(self.norm2(windows))


class PlaceMLP(nn.Module):
    """What the place in a window adds. Shape: (rows, columns) -> [rows, columns, C]."""

    def __init__(self, dim: int, hidden: int = 512) -> None:
        super().__init__()
        self.projector = nn.Sequential(nn.Linear(2, hidden), nn.ReLU(), nn.Linear(hidden, dim, bias=False))

    def forward(self, window: tuple[int, int]) -> Tensor:
        weight = next(self.parameters())
        y, x = ((torch.arange(n, device=weight.device) - n / 2) / (n / 2) for n in window)
        return self.projector(torch.stack([y[:, None].expand(window), x.expand(window)], -1).to(weight))


class MultiScaleAttention(nn.Module):
    """One block on several scales of a map.

    Args:
        dim: C.
        heads: of attention.
        scales: L.
        window: k, tokens along a window's side.
        pool: s, between scales; divides k.
        mlp_ratio: hidden channels of the MLPs over C.
        top_down, bottom_up: which ways of exchange there are, for ablations; without both, scales are windows alone.

    Shape: list of [B, H_l, W_l, C], sides of each the ceiling of the finer ones over s -> the same.
    """

    def __init__(
        self,
        dim: int,
        heads: int,
        scales: int,
        window: int = 16,
        pool: int = 4,
        mlp_ratio: float = 4.0,
        top_down: bool = True,
        bottom_up: bool = True,
    ) -> None:
        super().__init__()
        if window % pool or dim % heads or min(scales, pool) < 1:
            raise InputError(f"heads must divide dim, and pool the window; got {dim=}, {heads=}, {window=}, {pool=}.")
        self.window, self.pool, self.top_down, self.bottom_up = window, pool, top_down, bottom_up
        self.blocks = nn.ModuleList(ScaleAttention(dim, heads, mlp_ratio) for _ in range(scales))
        self.posemb = nn.ModuleList(PlaceMLP(dim) for _ in range(scales))

    def forward(self, maps: Sequence[Tensor]) -> list[Tensor]:
        if len(maps) != len(self.blocks):
            raise InputError(f"this block is made for {len(self.blocks)} scales, got {len(maps)}.")
        maps, device = list(maps), maps[0].device
        blocks = cast(list[ScaleAttention], list(self.blocks))
        cuts = [Cut(size, (min(self.window, size[0]), min(self.window, size[1]))) for size in map(_size, maps)]
        for i, place in enumerate(self.posemb):
            cut = cuts[i]
            tiled = place(cut.window).repeat(*cut.grid, 1)
            maps[i] = maps[i] + tiled[: cut.size[0], : cut.size[1]]
        if self.top_down or self.bottom_up:
            for i in range(len(maps) - 1):
                maps[i + 1] = maps[i + 1] + pooled(maps[i], self.pool)
        inside = [cut.inside(device) for cut in cuts]
        offered: dict[int, Tensor] = {}
        for i in reversed(range(len(maps))):
            block, cut = blocks[i], cuts[i]
            windows = cut.cut(maps[i])
            taken, seen = [block.offer(windows)], [inside[i]]
            for m in range(i + 1, len(maps)) if self.top_down else ():
                if m not in offered:
                    offered[m] = blocks[m].offer(cuts[m].cut(maps[m]))
                parents = cut.parents(cuts[m], self.pool ** (m - i), device)
                taken.append(offered[m][:, parents])
                known = inside[m]
                seen.append(None if known is None else known[parents])
            maps[i] = cut.paste(block(windows, torch.cat(taken, 2), _joined(seen, taken)))
        for i in range(1, len(maps)) if self.bottom_up else ():
            fine = cuts[i - 1]
            pieces = Cut(_size(maps[i]), tuple(-(-k // self.pool) for k in fine.window))  # type: ignore[arg-type]
            known = blocks[i - 1].offer(fine.cut(maps[i - 1]))
            below = pieces.cut(maps[i])
            maps[i] = pieces.paste(blocks[i](below, known, inside[i - 1]))
        return maps


def pooled(x: Tensor, factor: int) -> Tensor:
    """Largest values of squares. Shape: [B, H, W, C] -> [B, ceil(H / factor), ceil(W / factor), C]."""
    return F.max_pool2d(x.permute(0, 3, 1, 2), factor, factor, ceil_mode=True).permute(0, 2, 3, 1)


class Stem(nn.Module):
    """Convolutions down to a sixteenth, as in FasterViT. Shape: [B, in_chans, H, W] -> [B, dim, H / 16, W / 16]."""

    def __init__(self, in_chans: int, dim: int, depth: int = 3) -> None:
        super().__init__()
        first = dim // 4

        def block(width: int) -> nn.Module:
            layers = [nn.Conv2d(width, width, 3, 1, 1), nn.BatchNorm2d(width), nn.GELU()]
            return Residual(nn.Sequential(*layers, nn.Conv2d(width, width, 3, 1, 1), nn.BatchNorm2d(width)))

        def halve(inputs: int, outputs: int) -> nn.Module:
            return nn.Sequential(MapNorm(inputs), nn.Conv2d(inputs, outputs, 3, 2, 1, bias=False))

        self.conv0 = nn.Sequential(
            nn.Conv2d(in_chans, 64, 3, 2, 1, bias=False), nn.BatchNorm2d(64), nn.ReLU(),
            nn.Conv2d(64, first, 3, 2, 1, bias=False), nn.BatchNorm2d(first), nn.ReLU(),
        )  # fmt: skip
        self.conv1 = nn.Sequential(*(block(first) for _ in range(depth)))
        self.ds1 = halve(first, dim // 2)
        self.conv2 = nn.Sequential(*(block(dim // 2) for _ in range(depth)))
        self.ds2 = halve(dim // 2, dim)

    def forward(self, x: Tensor) -> Tensor:
        return self.ds2(self.conv2(self.ds1(self.conv1(self.conv0(x)))))


class Atlas(ImageClassifier):
    """Classify pictures of thousands of pixels.

    Args:
        num_classes, in_chans: see `ImageClassifier`.
        dim, num_heads: C and heads, the same at all scales.
        depths: blocks of each stage, one for each scale: (2, 10) for 1024 px, (2, 2, 8) for 4096 px.
        window, pool: k and s.
        mlp_ratio: hidden channels of the MLPs over C.
        stem_depth: residual blocks of each of the stem's two stages.

    Shape: [B, in_chans, H, W] -> [B, num_classes].
    Raises: InputError for settings or pictures that do not fit.
    """

    def __init__(
        self,
        num_classes: int = 1000,
        in_chans: int = 3,
        dim: int = 768,
        num_heads: int = 12,
        depths: Sequence[int] = (2, 10),
        window: int = 16,
        pool: int = 4,
        mlp_ratio: float = 4.0,
        stem_depth: int = 3,
    ) -> None:
        if not depths or min(depths) < 0:
            raise InputError(f"depths need a number of blocks for each scale, got {tuple(depths)}.")
        super().__init__(dim, in_chans)
        self.pool_factor, self.scales = pool, len(depths)
        self.patch_embed = Stem(in_chans, dim, stem_depth)
        self.stages = nn.ModuleList(
            nn.ModuleList(
                MultiScaleAttention(dim, num_heads, self.scales - j, window, pool, mlp_ratio) for _ in range(depth)
            )
            for j, depth in enumerate(depths)
        )
        self.readout_norm, self.fc_norm = nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.reset_classifier(num_classes)

    def forward_features(self, x: Tensor) -> Tensor:
        """The coarsest scale, after its norm, [B, h, w, C]."""
        self.check(x)
        finest = self.patch_embed(x).permute(0, 2, 3, 1)
        maps = [finest if i == 0 else pooled(finest, self.pool_factor**i) for i in range(self.scales)]
        for i, stage in enumerate(self.stages):
            if i:
                maps = maps[1:]
            for block in stage.children():
                maps = block(maps)
        return self.readout_norm(maps[0])

    def pool(self, features: Tensor) -> Tensor:
        return self.fc_norm(features.mean((1, 2)))


def _size(x: Tensor) -> tuple[int, int]:
    return x.shape[1], x.shape[2]


def _joined(seen: list[Tensor | None], taken: list[Tensor]) -> Tensor | None:
    """One mask over all that is taken, [windows, tokens]; None where everything is seen."""
    if all(mask is None for mask in seen):
        return None
    every = (
        part.new_ones(part.shape[1:3], dtype=torch.bool) if mask is None else mask
        for mask, part in zip(seen, taken, strict=True)
    )
    return torch.cat(list(every), 1)


def conformance_example(larger: bool = False) -> tuple[nn.Module, tuple[Tensor]]:
    """A small network and pictures for it."""
    network = Atlas(5, dim=16, num_heads=2, depths=(1, 1), window=4, pool=2, stem_depth=1)
    return network, (torch.rand(2, 3, *((150, 96) if larger else (96, 128))),)
