"""TokenLearner: from a block of a vision transformer on, a handful of learned tokens stand for all patches.

Ryoo, Piergiovanni, Arnab, Dehghani, Angelova 2021, "TokenLearner: What Can 8 Learned Tokens Do for Images and
Videos?", arXiv:2106.11297; versions, defaults and names are those of google-research/scenic, projects/token_learner.

Each of S tokens is a weighted sum of all N patch tokens, and the weights are a map computed from the tokens:

    version 1.1   a = softmax over N of (W2 gelu(W1 LN(x)))^T         [S, N], rows sum to 1
    version 1.0   a = sigmoid(four 3 x 3 convolutions of LN(x))       [S, N], sums grow with N
    y = a x                                                           [N, C] -> [S, C]

Blocks after it run on S tokens, so their cost nearly disappears. Where every position is needed again, each block
stands between a learner and a fuser instead, which writes its S tokens t back through maps of its own:

    x <- x + sigmoid(W2 gelu(W1 LN(x))) LN(M LN(t))                   [N, S] [S, C] -> [N, C], M [S, S] zero at first

so that an untrained block with a fuser leaves x as it is. Learned tokens have no positions, and none are added.

A budget says where learning stands: before the latest block that it pays for. With f(n) = 24 n C^2 + 4 n^2 C FLOPs of a
block, l of L blocks before it cost about (l f(N) + (L - l) f(S)) / (L f(N)) of the whole.
"""

import math
from bisect import bisect_left
from collections.abc import Callable
from functools import partial
from typing import Literal

import torch
from torch import Tensor, nn

from foveate.engine.budget import Budget
from foveate.engine.surgery import add, find, join, patch_forward
from foveate.errors import BudgetError, InputError
from foveate.hosts import vit
from foveate.hosts.plugin import Look, TokenHandle
from foveate.hosts.vit import ViT
from foveate.layers.transformer import MLP, VisionTransformer

Version = Literal["1.1", "1.0"]
Grid = tuple[int, int]


class TokenLearner(nn.Module):
    """Learn S tokens that stand for N.

    Args:
        dim: C.
        tokens: S.
        version: "1.1", or "1.0" as in the paper's tables.
        hidden: channels between the two layers of version 1.1.
        mean: let version 1.0 take means and not sums.

    Shape: [..., N, C] -> [..., S, C]; frames of a video are one more dimension in front.
    Raises: InputError for another version, for no tokens, or where 1.0 is given a number of tokens that is no square
        and no grid (rows, columns).

    >>> TokenLearner(16, tokens=3)(torch.zeros(2, 10, 16)).shape
    torch.Size([2, 3, 16])
    """

    def __init__(
        self, dim: int, tokens: int = 8, version: Version = "1.1", hidden: int = 64, mean: bool = False
    ) -> None:
        super().__init__()
        if version not in ("1.1", "1.0"):
            raise InputError(f"there are versions '1.1' and '1.0' of TokenLearner, not {version!r}.")
        if tokens < 1:
            raise InputError(f"at least one token is learned, got tokens={tokens}.")
        self.dim, self.tokens, self.version, self.mean = dim, tokens, version, mean
        self.norm = nn.LayerNorm(dim, eps=1e-6)
        if version == "1.1":
            self.gate = _gate(dim, hidden, tokens)
            return
        layers: list[nn.Module] = []
        for channels in (dim, tokens, tokens, tokens):
            layers += [nn.Conv2d(channels, tokens, 3, padding=1, bias=False), nn.GELU("tanh")]
        self.gate = nn.Sequential(*layers[:-1])

    def maps(self, x: Tensor, grid: Grid | None = None) -> Tensor:
        """Where each token looks. Shape: [..., N, C] -> [..., S, N]."""
        selected = self.norm(x)
        if self.version == "1.1":
            return self.gate(selected).mT.softmax(-1)
        rows, columns = grid or _square(x.shape[-2])
        picture = selected.mT.reshape(-1, self.dim, rows, columns)
        maps = self.gate(picture).sigmoid().reshape(*x.shape[:-2], self.tokens, rows * columns)
        return maps / maps.shape[-1] if self.mean else maps

    def forward(self, x: Tensor, grid: Grid | None = None) -> Tensor:
        return self.maps(x, grid) @ x

    def flops(self, n: int) -> int:
        """FLOPs on one picture of N tokens."""
        return 2 * n * (sum(p.numel() for p in self.gate.parameters() if p.dim() > 1) + self.tokens * self.dim)


class TokenFuser(nn.Module):
    """Write S tokens back onto N positions; exactly zero until it is trained.

    The norm after the zero matrix multiplies its first gradient by up to 1 / sqrt(1e-6) = 1000: clip gradients.

    Args:
        dim: C.
        tokens: S.
        hidden: channels between the two layers of the gate.

    Shape: tokens [..., S, C], x [..., N, C] -> [..., N, C], to be added to x.
    """

    def __init__(self, dim: int, tokens: int = 8, hidden: int = 64) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(dim, eps=1e-6), nn.LayerNorm(dim, eps=1e-6)
        self.mix = nn.Linear(tokens, tokens)
        self.norm, self.gate = nn.LayerNorm(dim, eps=1e-6), _gate(dim, hidden, tokens)
        nn.init.zeros_(self.mix.weight)
        nn.init.zeros_(self.mix.bias)

    def forward(self, tokens: Tensor, x: Tensor) -> Tensor:
        mixed = self.norm2(self.mix(self.norm1(tokens).mT).mT)
        return self.gate(self.norm(x)).sigmoid() @ mixed

    def flops(self, n: int) -> int:
        """FLOPs on one picture of N tokens."""
        dim, tokens = self.norm.normalized_shape[0], self.mix.in_features
        gate = sum(p.numel() for p in self.gate.parameters() if p.dim() > 1)
        return 2 * (dim * tokens**2 + n * (gate + tokens * dim))


class Bottleneck(nn.Module):
    """Run a block on learned tokens; with a fuser, on all positions that come back from them.

    Args:
        dim, tokens, version: see `TokenLearner`.
        fuse: whether there is a fuser.
    """

    def __init__(self, dim: int, tokens: int, version: Version, fuse: bool) -> None:
        super().__init__()
        self.learner = TokenLearner(dim, tokens, version)
        self.fuser = TokenFuser(dim, tokens) if fuse else None

    def forward(
        self, x: Tensor, block: Callable[[Tensor], Tensor], prefixes: int = 0, grid: Grid | None = None
    ) -> Tensor:
        """Prefix tokens go through the block as they are. Shape: [B, P + N, C] -> [B, P + S or N, C]."""
        prefix, patches = x[:, :prefixes], x[:, prefixes:]
        y = block(torch.cat([prefix, self.learner(patches, grid)], 1))
        if self.fuser is None:
            return y
        return torch.cat([y[:, :prefixes], patches + self.fuser(y[:, prefixes:], patches)], 1)

    def flops(self, n: int) -> int:
        """FLOPs beside the block's own, on one picture of N patches."""
        return self.learner.flops(n) + (0 if self.fuser is None else self.fuser.flops(n))


def bottlenecks(
    host: ViT,
    budget: Budget | float | str,
    tokens: int | None = None,
    layer: int | None = None,
    version: Version = "1.1",
    fuse: bool = False,
) -> tuple[int, list[Bottleneck]]:
    """Make what a transformer needs, and say before which block the first stands.

    Args:
        host: the transformer, at its own size of pictures.
        budget: a share of the host's FLOPs or GFLOPs. "16 tokens" is how many are learned, from the middle on.
        tokens: S; default 8, or where a layer is given as many as the budget pays for.
        layer: blocks that run on all patches; default as many as the budget pays for. With both, it is not looked at.

    Raises: BudgetError when learning before the first block costs more, or one token does from this layer on;
        InputError for a layer that is not there.
    """
    budget, depth, n = Budget.parse(budget), len(host.blocks), host.native_grid[0] * host.native_grid[1]
    if layer is not None and not 0 <= layer <= depth:
        raise InputError(f"layer is from 0 to the {depth} blocks of this model, got {layer}.")
    full = host.flops(n, host.native_grid)
    share = budget.share_of(gflops=full / 1e9, tokens=n)
    if budget.unit == "tokens":
        tokens, layer = tokens or max(1, int(budget.amount)), depth // 2 if layer is None else layer
    embedding = full - sum(block.flops(host.prefixes + n) for block in host.blocks)

    def stack(first: int, count: int) -> list[Bottleneck]:
        made = depth - first if fuse else min(1, depth - first)
        return [Bottleneck(host.width, count, version, fuse) for _ in range(made)]

    def cost(first: int, count: int) -> float:
        """As a share of the host."""
        with torch.device("meta"):
            beside = sum(one.flops(n) for one in stack(first, count))
        blocks = (block.flops(host.prefixes + (n if i < first else count)) for i, block in enumerate(host.blocks))
        return (embedding + sum(blocks) + beside) / full

    given, tokens = tokens, tokens or 8
    if layer is None:
        layer = next((first for first in range(depth, -1, -1) if cost(first, tokens) <= share), None)
    elif given is None and layer < depth:
        tokens = bisect_left(range(1, n + 1), True, key=lambda count: cost(layer, count) > share)
    if layer is None or tokens < 1:
        least = cost(0, tokens) if layer is None else cost(layer, 1)
        raise BudgetError(
            f"A budget of {budget} does not pay for learned tokens: they take a share of {least + 0.005:.2f} at least "
            "with these settings; ask for that, or learn them earlier, or fewer."
        )
    return layer, stack(layer, tokens)


class TokenLearnerViT(VisionTransformer):
    """A vision transformer that learns tokens on its way; its head reads the mean of what is left.

    Args:
        img_size, patch_size, embed_dim, depth, num_heads, mlp_ratio, num_classes, in_chans: see `VisionTransformer`.
        tokens, layer, budget: S, and the number of blocks before it; see `bottlenecks`. The published model for
            ImageNet has 16 from block 9 of 12 on.
        version: "1.1" or "1.0".
        fuse: run every block from there on between a learner and a fuser, so that features keep all positions.

    Shape: [B, in_chans, H, W] -> [B, num_classes]; features [B, S, C], or [B, N, C] with a fuser or where no block is
        left to run on learned tokens.

    >>> net = TokenLearnerViT(img_size=32, patch_size=4, embed_dim=48, depth=4, num_heads=3, num_classes=10)
    >>> net.layer, net.forward_features(torch.zeros(1, 3, 32, 32)).shape
    (1, torch.Size([1, 8, 48]))
    """

    def __init__(
        self,
        img_size: int = 224,
        patch_size: int = 16,
        embed_dim: int = 384,
        depth: int = 12,
        num_heads: int = 6,
        mlp_ratio: float = 4.0,
        num_classes: int = 1000,
        in_chans: int = 3,
        tokens: int | None = None,
        layer: int | None = None,
        budget: float | str = 0.5,
        version: Version = "1.1",
        fuse: bool = False,
    ) -> None:
        super().__init__(img_size, patch_size, embed_dim, depth, num_heads, mlp_ratio, num_classes, "avg", in_chans)
        for block in find(self.blocks, MLP).values():
            block.act = nn.GELU("tanh")  # Flax's default
        self.layer, made = bottlenecks(vit(self), budget, tokens, layer, version, fuse)
        self.token_learning = nn.ModuleList(made)

    def forward_features(self, x: Tensor) -> Tensor:
        """Tokens after the last norm."""
        self.check(x)
        patches = self.patch_embed(x)
        x, grid = self._pos_embed(patches), (patches.shape[2], patches.shape[3])
        for i, block in enumerate(self.blocks):
            around = self.token_learning[i - self.layer] if 0 <= i - self.layer < len(self.token_learning) else None
            x = block(x) if around is None else around(x, block, grid=grid)
        return self.norm(x)

    @classmethod
    def conformance_example(cls, larger: bool = False) -> tuple["TokenLearnerViT", tuple[Tensor]]:
        net = cls(32, 8, 24, 3, 3, 2.0, num_classes=5, tokens=3, layer=1)
        return net, (torch.rand(3, 3, *((45, 37) if larger else (32, 32))),)


def plugin(
    model: nn.Module,
    budget: Budget | float | str = 0.5,
    tokens: int | None = None,
    layer: int | None = None,
    version: Version = "1.1",
    fuse: bool = False,
) -> TokenHandle:
    """Let a vision transformer learn tokens on its way.

    What is learned starts untrained, so the model has to be fine-tuned (with a fuser, blocks from `layer` on do nothing
    at first). While it is applied the host holds `token_learning`, whose parameters train and save with it. Class
    token and registers go on beside the learned tokens.

    Args:
        model: a host known to `foveate.hosts.vit`, changed in place.
        budget, tokens, layer: S, and the number of blocks that run on all patches; see `bottlenecks`.
        version: "1.1" or "1.0".
        fuse: run every block from there on between a learner and a fuser.

    Raises: InputError for a model that is no such host or settings that do not fit; BudgetError for a budget that pays
        for nothing. The model is unchanged then.
    """
    host = vit(model)
    first, made = bottlenecks(host, budget, tokens, layer, version, fuse)
    learning = nn.ModuleList(made).to(host.patches.weight)
    chooser = _Chooser(host, first, made[0].learner.tokens if made else 0)
    handles = [add(host.body, "token_learning", learning), patch_forward(host.patches, chooser.watch)]
    pairs = zip(host.blocks[first:], made, strict=False)
    handles += [block.patch(partial(chooser.run, around)) for block, around in pairs]
    return TokenHandle(join(handles), host, chooser.look)


class _Chooser:
    """What the changed places tell each other during one call."""

    def __init__(self, host: ViT, layer: int, tokens: int) -> None:
        self.host, self.layer, self.tokens, self.prefixes = host, layer, tokens, host.prefixes
        self.grid: Grid = host.native_grid
        self.maps: Tensor | None = None
        self.looking = False

    def watch(self, forward: Callable[[Tensor], Tensor], pixels: Tensor) -> Tensor:
        y = forward(pixels)
        self.grid = (y.shape[-2], y.shape[-1])
        return y

    def run(self, around: Bottleneck, block: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
        if self.looking and self.maps is None:
            self.maps = around.learner.maps(x[:, self.prefixes :], self.grid)
        return around(x, block, self.prefixes, self.grid)

    def look(self, pixels: Tensor) -> Look:
        """How much all tokens of the first learner together look at each place, over the most that any place gets."""
        rows, columns = self.host.grid(pixels)
        self.looking = True
        try:
            self.host.tokens(pixels)
            maps = self.maps
        finally:
            self.looking, self.maps = False, None
        if maps is None:
            every = pixels.new_ones(len(pixels), rows, columns)
            return Look((rows * columns,) * len(pixels), rows * columns, every)
        seen = maps.detach().float().sum(1)
        effort = (seen / seen.amax(1, keepdim=True)).unflatten(1, (rows, columns))
        return Look((self.tokens,) * len(pixels), rows * columns, effort, unit=f"tokens from block {self.layer} on")


def _gate(dim: int, hidden: int, tokens: int) -> nn.Sequential:
    gate = nn.Sequential(nn.Linear(dim, hidden), nn.GELU("tanh"), nn.Linear(hidden, tokens))
    for parameter in gate.parameters():
        nn.init.xavier_uniform_(parameter) if parameter.dim() > 1 else nn.init.normal_(parameter, std=1e-6)
    return gate


def _square(n: int) -> Grid:
    side = math.isqrt(n)
    if side * side != n:
        raise InputError(f"version 1.0 needs to know the grid of {n} tokens, which is no square; pass (rows, columns).")
    return side, side
