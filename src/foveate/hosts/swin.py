"""What a Swin transformer is, whoever wrote it: stages of blocks that attend within windows, every other one shifted.

A block cuts its map [B, H, W, C] into windows of M x M after rolling it by its shift, and, with f attention, runs

    v1    x = x + f(norm1(x)),   x = x + mlp(norm2(x))             v2    x = x + norm1(f(x)),   x = x + norm2(mlp(x))

Neither step looks across a window, so any set of windows can be run by itself: `cut`, choose, `run`, `paste`. Places
that only pad the map to whole windows are zero where attention sees them, as in the hosts.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from foveate.engine.surgery import Handle, name_of
from foveate.errors import InputError
from foveate.hosts.picture import Pixels

OnMap = Callable[[Tensor], Tensor]
"""[B, H, W, C] -> [B, H, W, C]."""


@dataclass(frozen=True, eq=False)
class WindowBlock:
    """One block of a Swin transformer.

    Attributes:
        module: the host's own.
        drop1, drop2: what the host does to the two branches in training; whole windows are dropped here, not pictures.
    """

    module: nn.Module
    norm1: nn.Module
    attention: nn.Module
    norm2: nn.Module
    mlp: nn.Module
    drop1: nn.Module
    drop2: nn.Module
    post_norm = False
    """Whether norms come after attention and MLP (Swin v2)."""
    rolls_first = False
    """Whether the host rolls the map before it pads it."""

    # What an adapter says.

    def attend(self, windows: Tensor, mask: Tensor | None) -> Tensor:
        """The host's attention, a mask added to scores. Shape: [n, M * M, C], [n, M * M, M * M] -> [n, M * M, C]."""
        raise InputError(f"{type(self).__name__} does not say how it attends; define it.")

    def size(self, grid: tuple[int, int]) -> tuple[int, int]:
        """Side of a window and shift, on a map of this size."""
        raise InputError(f"{type(self).__name__} does not say its windows; define them.")

    def patch(self, fn: Callable[[OnMap, Tensor], Tensor]) -> Handle:
        """Let fn(run, x) run in the place of the block, where run(x) is the block as it was. Shape: [B, H, W, C]."""
        raise InputError(f"{type(self).__name__} does not say how it is called; define it.")

    # What follows from it.

    def cut(self, x: Tensor) -> Tensor:
        """Roll, pad and cut into windows in raster order. Shape: [B, H, W, C] -> [B, n, M * M, C]."""
        side, shift = self.size((x.shape[1], x.shape[2]))
        x = torch.roll(x, (-shift, -shift), (1, 2)) if shift and self.rolls_first else x
        x = F.pad(x, (0, 0, 0, -x.shape[2] % side, 0, -x.shape[1] % side))
        x = torch.roll(x, (-shift, -shift), (1, 2)) if shift and not self.rolls_first else x
        x = x.unflatten(2, (-1, side)).unflatten(1, (-1, side)).transpose(2, 3)
        return x.flatten(3, 4).flatten(1, 2)

    def paste(self, windows: Tensor, grid: tuple[int, int]) -> Tensor:
        """Undo `cut`. Shape: [B, n, M * M, C] -> [B, H, W, C]."""
        side, shift = self.size(grid)
        rows, columns = (-(-s // side) for s in grid)
        x = windows.unflatten(2, (side, side)).unflatten(1, (rows, columns)).transpose(2, 3)
        x = x.flatten(3, 4).flatten(1, 2)
        x = torch.roll(x, (shift, shift), (1, 2)) if shift and not self.rolls_first else x
        x = x[:, : grid[0], : grid[1]]
        return torch.roll(x, (shift, shift), (1, 2)) if shift and self.rolls_first else x

    def inside(self, grid: tuple[int, int], like: Tensor) -> Tensor | None:
        """1 at places of the map, 0 at padding, [n, M * M, 1]; None where there is no padding."""
        side, _ = self.size(grid)
        return None if grid[0] % side == grid[1] % side == 0 else self.cut(like.new_ones(1, *grid, 1))[0]

    def mask(self, grid: tuple[int, int], like: Tensor) -> Tensor | None:
        """What a shifted window adds to the scores of places that were not neighbours: -100; [n, M * M, M * M]."""
        side, shift = self.size(grid)
        if not shift:
            return None
        rows, columns = (torch.arange(-(-s // side) * side, device=like.device) for s in grid)
        parts = [(p >= len(p) - side).long() + (p >= len(p) - shift).long() for p in (rows, columns)]
        region = parts[0][:, None] * 3 + parts[1]
        region = region.unflatten(1, (-1, side)).unflatten(0, (-1, side)).transpose(1, 2).flatten(2).flatten(0, 1)
        return like.new_zeros(()).masked_fill(region[:, None] != region[:, :, None], -100.0)

    def run(self, windows: Tensor, mask: Tensor | None = None, inside: Tensor | None = None) -> Tensor:
        """The whole block on some windows: attention, MLP, norms and residuals.

        Args:
            mask, inside: rows of what `mask` and `inside` gave, for these windows.

        Shape: windows [n, M * M, C] -> the same.
        """
        y = windows if self.post_norm else self.norm1(windows)
        y = self.attend(y if inside is None else y * inside, mask)
        x = windows + self.drop1(self.norm1(y) if self.post_norm else y)
        return x + self.drop2(self.norm2(self.mlp(x)) if self.post_norm else self.mlp(self.norm2(x)))


@dataclass(frozen=True, eq=False)
class Stage:
    """Blocks on maps of one size. `shrink` is the host's patch merging: after the blocks, or before them in timm."""

    module: nn.Module
    blocks: tuple[WindowBlock, ...]
    width: int
    shrink: nn.Module | None


@dataclass(frozen=True, eq=False)
class Swin:
    """A Swin transformer inside someone's model. Made by `foveate.hosts.swin(model)`.

    Attributes: as `foveate.hosts.vit.ViT`, with stages in the place of blocks.
    """

    model: nn.Module
    body: nn.Module
    patches: nn.Conv2d
    stages: tuple[Stage, ...]
    norm: nn.Module
    head: nn.Module | None
    pixels: Pixels

    @property
    def patch(self) -> int:
        """Side of a patch in pixels."""
        return int(self.patches.stride[0])

    @property
    def blocks(self) -> tuple[WindowBlock, ...]:
        """All blocks, in order."""
        return tuple(block for stage in self.stages for block in stage.blocks)

    @property
    def width(self) -> int:
        """Channels of the features."""
        return self.stages[-1].width

    def features(self, pixels: Tensor) -> Tensor:
        """The last map, after the norm. Shape: [B, 3, H, W] -> [B, C, h, w]."""
        raise InputError(f"{type(self).__name__} does not say how it runs; define it.")

    def name_of(self, module: nn.Module) -> str:
        """The dotted name of a module, as `foveate.engine.surgery.replace(host.model, ...)` takes it."""
        return name_of(self.model, module)
