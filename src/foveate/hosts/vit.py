"""What a vision transformer is, whoever wrote it: patches, positions, blocks, head, and where to take hold of them.

    x = [prefix, E(patches) + positions]                    [B, P + N, C], after a norm where the host has one
    x = x + scale1(attention(norm1(x)))                     in every block
    x = x + scale2(mlp(norm2(x)))
    y = head(pool(norm(x)))

A description holds the host's own modules and never changes them; each `patch` returns a handle that undoes it. Plain
dataclasses with methods, no closures: so a patched model can be copied, and the copy is patched by itself.
"""

from bisect import bisect_right
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from foveate.engine.budget import Budget
from foveate.engine.surgery import Handle, find, name_of, patch_forward
from foveate.errors import BudgetError, InputError
from foveate.hosts.picture import Pixels
from foveate.layers.patch import resample_positions

Attend = Callable[[Tensor, Tensor, Tensor, float], Tensor]
"""(q, k, v [B, h, N, d], dropout) -> [B, h, N, d]."""


@dataclass(frozen=True, eq=False)
class Attention:
    """Attention of one block.

    Attributes:
        module: the host's own; its input is norm1(x).
        heads: h.
        qkv: three linear layers, or one that gives queries, keys and values in this order.
        out: the last linear layer.
        dropped: share of attention weights dropped in training.
        paired: whether the block expects (output, weights) from the module.
    """

    module: nn.Module
    heads: int
    qkv: tuple[nn.Linear, ...]
    out: nn.Linear
    dropped: float = 0.0
    paired: bool = False

    def project(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Queries, keys and values. Shape: [B, N, C] -> three of [B, h, N, d]."""
        parts = [layer(x) for layer in self.qkv] if len(self.qkv) == 3 else self.qkv[0](x).chunk(3, -1)
        q, k, v = (part.unflatten(-1, (self.heads, -1)).transpose(1, 2) for part in parts)
        return q, k, v

    def finish(self, y: Tensor, x: Tensor) -> Tensor:
        """Join heads and apply the last layer; x is what `project` was given. Shape: [B, h, N, d] -> [B, N, C]."""
        return self.out(y.transpose(1, 2).flatten(2))

    def run(self, x: Tensor, attend: Attend) -> Tensor:
        """The whole of attention, with another function in the middle. Shape: [B, N, C] -> [B, N, C]."""
        return self.finish(attend(*self.project(x), self.dropped if self.module.training else 0.0), x)

    def patch(self, attend: Attend) -> Handle:
        """Let `attend` run in the middle of the host's attention; masks are refused."""
        return patch_forward(self.module, partial(self._forward, attend))

    def _forward(self, attend: Attend, _: Any, hidden_states: Tensor, *masks: Any, **more: Any) -> Any:
        if any(mask is not None for mask in (*masks, more.get("attention_mask"), more.get("attn_mask"))):
            raise InputError("attention masks cannot be combined with chosen tokens; leave the mask out.")
        y = self.run(hidden_states, attend)
        return (y, None) if self.paired else y


@dataclass(frozen=True, eq=False)
class Block:
    """One block: x + scale1(attention(norm1(x))), then x + scale2(mlp(norm2(x)))."""

    module: nn.Module
    norm1: nn.Module
    attention: Attention
    norm2: nn.Module
    mlp: nn.Module
    scale1: nn.Module
    scale2: nn.Module

    def patch(self, fn: Callable[[Callable[[Tensor], Tensor], Tensor], Tensor]) -> Handle:
        """Let fn(run, x) run in the place of the block, where run(x) is the block as it was. Shape: [B, N, C]."""
        return patch_forward(self.module, partial(_around, fn))

    def flops(self, tokens: int) -> int:
        """FLOPs on one sequence: all linear layers, and the two products of attention."""
        linear = [m for m in self.module.modules() if isinstance(m, nn.Linear)]
        width = self.attention.out.in_features
        return 2 * tokens * sum(m.weight.numel() for m in linear) + 4 * tokens**2 * width


@dataclass(frozen=True, eq=False)
class ViT:
    """A plain vision transformer inside someone's model. Made by `foveate.hosts.vit(model)`.

    Attributes:
        model: what the user has.
        body: the transformer in it (the model itself, or e.g. model.vit).
        patches: the convolution that makes tokens of patches.
        blocks: in order.
        norm: after the last block.
        head: the classifier, or None.
        pixels: how pictures are normalised, and the size that the host was made for.
    """

    model: nn.Module
    body: nn.Module
    patches: nn.Conv2d
    blocks: tuple[Block, ...]
    norm: nn.Module
    head: nn.Module | None
    pixels: Pixels

    # What an adapter says.

    @property
    def antialias(self) -> bool:
        """Whether the host smooths positions where it shrinks them."""
        return False

    def prefix(self) -> Tensor:
        """Tokens before the patches (class token, registers) with their positions, [1, P, C]."""
        raise InputError(f"{type(self).__name__} does not say its prefix; define it.")

    def table(self) -> Tensor:
        """Learned positions of patches in raster order, on `native_grid`: [1, N, C]."""
        raise InputError(f"{type(self).__name__} does not say its positions; define them.")

    def patch_embedding(self, embed: Callable[[Tensor], Tensor]) -> Handle:
        """Let embed(pixels [B, 3, H, W]) -> [B, N', C] make the tokens that enter the blocks (before a norm there)."""
        raise InputError(f"{type(self).__name__} does not say where its embedding is; define it.")

    def tokens(self, pixels: Tensor) -> Tensor:
        """Tokens after the last norm. Shape: [B, 3, H, W] -> [B, P + N, C]."""
        raise InputError(f"{type(self).__name__} does not say how it runs; define it.")

    # What follows from it.

    @property
    def patch(self) -> int:
        """Side of a patch in pixels."""
        return int(self.patches.stride[0])

    @property
    def width(self) -> int:
        """C, channels of a token."""
        return self.patches.out_channels

    @property
    def prefixes(self) -> int:
        """P, the number of tokens before the patches."""
        return self.prefix().shape[1]

    @property
    def native_grid(self) -> tuple[int, int]:
        """Rows and columns of patches at the size the host was made for."""
        return self.pixels.size[0] // self.patch, self.pixels.size[1] // self.patch

    def grid(self, pixels: Tensor) -> tuple[int, int]:
        """Rows and columns of patches of these pictures.

        Raises: InputError for another rank or number of channels, or sides that are no multiples of the patch.
        """
        if pixels.dim() != 4 or pixels.shape[1] != self.patches.in_channels or pixels.numel() == 0:
            channels = self.patches.in_channels
            raise InputError(f"expected pictures [B, {channels}, H, W], got shape {tuple(pixels.shape)}; reshape them.")
        h, w = pixels.shape[2:]
        if h % self.patch or w % self.patch:
            raise InputError(f"sides must be multiples of the patch of {self.patch} pixels, got {h} x {w}; resize.")
        return h // self.patch, w // self.patch

    def positions(self, grid: tuple[int, int]) -> Tensor:
        """Positions of patches on a grid, resampled as the host itself does it. Shape: [1, h * w, C]."""
        table = self.table()
        if grid == self.native_grid or self.antialias:
            return resample_positions(table, self.native_grid, grid)
        plane = table.unflatten(1, self.native_grid).permute(0, 3, 1, 2)
        return F.interpolate(plane, grid, mode="bicubic").flatten(2).mT

    def embed(self, pixels: Tensor) -> Tensor:
        """Tokens as they enter the blocks. Shape: [B, 3, H, W] -> [B, P + N, C]."""
        grid = self.grid(pixels)
        patches = self.patches(pixels).flatten(2).mT + self.positions(grid)
        return torch.cat([self.prefix().expand(len(pixels), -1, -1), patches], 1)

    def features(self, pixels: Tensor) -> Tensor:
        """Patch tokens as a map. Shape: [B, 3, H, W] -> [B, C, h, w]."""
        return self.tokens(pixels)[:, self.prefixes :].mT.unflatten(2, self.grid(pixels))

    def name_of(self, module: nn.Module) -> str:
        """The dotted name of a module, as `foveate.engine.surgery.replace(host.model, ...)` takes it."""
        return name_of(self.model, module)

    def drop_paths(self) -> list[nn.Module]:
        """Modules that drop whole pictures from a residual branch in training."""
        return list(find(self.body, lambda _, m: float(getattr(m, "drop_prob", 0.0) or 0.0) > 0).values())

    def flops(self, patches: int, grid: tuple[int, int]) -> int:
        """FLOPs of one picture when so many patch tokens (beside the prefix) go through the blocks."""
        embedding = 2 * grid[0] * grid[1] * self.patches.weight.numel()
        return embedding + sum(block.flops(self.prefixes + patches) for block in self.blocks)

    def affordable(self, budget: Budget, grid: tuple[int, int], overhead: Callable[[int], float] | None = None) -> int:
        """The most patch tokens per picture that a budget allows.

        A share is of the FLOPs of all N patch tokens, of which attention's part is quadratic; so half of them buys
        more than half of the tokens. "64 tokens" buys 64 patch tokens.

        Args:
            overhead: FLOPs of deciding and merging, at a number of patch tokens below N; default none.

        Raises: BudgetError for a budget in another unit than share, GFLOPs or tokens, or one for less than a token.
        """
        total = grid[0] * grid[1]
        full = self.flops(total, grid)
        share = budget.share_of(tokens=total, gflops=full / 1e9)
        if budget.unit == "tokens" or share == 1:
            count = int(total if share == 1 else budget.amount)
        else:
            beside = overhead or (lambda patches: 0.0)
            count = bisect_right(range(total), share * full, key=lambda n: self.flops(n, grid) + beside(n)) - 1
        if count < 1:
            raise BudgetError(f"A budget of {budget} does not pay for one token of this {type(self.model).__name__}.")
        return count


def _around(
    fn: Callable[[Callable[[Tensor], Tensor], Tensor], Tensor],
    forward: Callable[..., Tensor],
    hidden_states: Tensor,
    *more: Any,
    **named: Any,
) -> Tensor:
    return fn(lambda x: forward(x, *more, **named), hidden_states)
