"""Quadtree tokens: one coarse cell where it is easy, many fine ones where it is hard.

The base grid has h x w cells; scale s joins 2^s x 2^s of them, floor(h / 2^s) x floor(w / 2^s) cells from the top left
(what is left at the border stays fine). Each coarse cell has a score, low where it is easy, and a cell is taken when

    score < threshold of its scale        and no larger cell that holds it is taken,

so the cells taken cover every base cell exactly once. With one knob t for all scales, threshold_s = t - step (s - 1),
the number of cells never rises with t. Order of cells everywhere: picture, then scale from fine to coarse, then raster.

Source of the rule: Choudhury et al. 2025, arXiv:2510.18091 (Adaptive Patch Transformers).
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
import torch.nn.functional as F
from torch import Tensor

from foveate.errors import BudgetError, InputError


@dataclass(frozen=True, eq=False)
class Quadtree:
    """Hold which cells were taken, for a batch of pictures.

    Args:
        masks: one per scale from fine to coarse, bool [B, h_s, w_s]; masks[0] is of the base grid.

    >>> tree = cover([torch.tensor([[[1.0, 5.0]]])], (2, 4), thresholds=[3.0])
    >>> tree.lengths.tolist(), tree.scales[0].tolist()
    ([5], [[1, 1, 0, 0], [1, 1, 0, 0]])
    """

    masks: tuple[Tensor, ...]

    @property
    def grid(self) -> tuple[int, int]:
        """Rows and columns of the base grid."""
        return self.masks[0].shape[1], self.masks[0].shape[2]

    @cached_property
    def chosen(self) -> Tensor:
        """Marks over all cells of all scales, bool [B, M]: `candidates[tree.chosen]` are the cells in order."""
        return torch.cat([mask.flatten(1) for mask in self.masks], 1)

    @property
    def lengths(self) -> Tensor:
        """Cells of each picture, [B]."""
        return self.chosen.sum(1)

    @property
    def owner(self) -> Tensor:
        """Which cell, counted within its picture, covers each base cell; int64 [B, h, w]."""
        place = self.chosen.cumsum(1) - 1
        parts = place.split([mask[0].numel() for mask in self.masks], 1)
        places = [part.view(mask.shape) for part, mask in zip(parts, self.masks, strict=True)]
        return self._spread(places)

    @property
    def scales(self) -> Tensor:
        """The scale of the cell that covers each base cell, int64 [B, h, w]."""
        return self._spread([torch.full_like(mask, s, dtype=torch.int64) for s, mask in enumerate(self.masks)])

    def boxes(self, picture: int) -> Tensor:
        """Cells of one picture as xyxy in base cells, [n, 4]."""
        found = []
        for s, mask in enumerate(self.masks):
            row, column = mask[picture].nonzero(as_tuple=True)
            found.append(torch.stack([column, row, column + 1, row + 1], 1) * 2**s)
        return torch.cat(found)

    def _spread(self, values: Sequence[Tensor]) -> Tensor:
        out = torch.zeros_like(values[0])
        for s, (value, mask) in enumerate(zip(values, self.masks, strict=True)):
            out = torch.where(_finer(mask, s, self.grid), _finer(value, s, self.grid), out)
        return out


def coarse_grid(grid: tuple[int, int], scale: int) -> tuple[int, int]:
    """Rows and columns of whole cells at a scale."""
    return grid[0] >> scale, grid[1] >> scale


def cover(scores: Sequence[Tensor], grid: tuple[int, int], thresholds: Sequence[float | Tensor]) -> Quadtree:
    """Take cells from coarse to fine.

    Args:
        scores: of scales 1, 2, ..., each [B, h >> s, w >> s].
        grid: (h, w) of the base grid.
        thresholds: one per score, a number or a tensor that broadcasts against it.

    Raises: InputError for scores that do not fit the grid.
    """
    _check(scores, grid, len(thresholds))
    taken = torch.zeros(len(scores[0]), *grid, dtype=torch.bool, device=scores[0].device)
    masks = []
    for s in range(len(scores), 0, -1):
        h, w = coarse_grid(grid, s)
        # A larger cell covers all of this one or nothing, so one base cell of it tells.
        mask = (scores[s - 1] < thresholds[s - 1]) & ~taken[:, :: 2**s, :: 2**s][:, :h, :w]
        taken |= _finer(mask, s, grid)
        masks.append(mask)
    return Quadtree((~taken, *masks[::-1]))


def cover_within(scores: Sequence[Tensor], grid: tuple[int, int], cells: int, step: float = 0.0) -> Quadtree:
    """Take the easiest cells of each picture until it has at most so many.

    Cells join in the order of score + step (s - 1), equal ones in raster order, and no more of them than needed. So
    every picture ends less than one coarsest cell below the number asked for.

    Args:
        scores, grid: as for `cover`.
        cells: allowed per picture.
        step: by how much the threshold of a scale lies below that of the next finer one.

    Raises: BudgetError when even the coarsest cells are more than allowed; InputError as `cover`.
    """
    _check(scores, grid, len(scores))
    b, total = len(scores[0]), grid[0] * grid[1]
    flat = torch.cat([score.flatten(1) + step * i for i, score in enumerate(scores)], 1)
    order = flat.argsort(dim=1, stable=True)
    rank = torch.empty_like(order).scatter_(1, order, torch.arange(flat.shape[1], device=flat.device).expand(b, -1))
    ranks = [part.view(s.shape) for part, s in zip(rank.split([s[0].numel() for s in scores], 1), scores, strict=True)]

    # A cell saves 4^s - 1 cells from its own turn on, until the turn of the first larger cell that holds it.
    saved = torch.zeros(b, flat.shape[1] + 1, dtype=torch.int64, device=flat.device)
    until = torch.full((b, *grid), flat.shape[1], dtype=torch.int64, device=flat.device)
    for s in range(len(scores), 0, -1):
        begin, (h, w) = ranks[s - 1], coarse_grid(grid, s)
        end = until[:, :: 2**s, :: 2**s][:, :h, :w]
        gain = torch.where(begin < end, 4**s - 1, 0).flatten(1)
        saved.scatter_add_(1, begin.flatten(1), gain).scatter_add_(1, end.flatten(1), -gain)
        lower = _finer(begin, s, grid)
        until = torch.where(_finer(torch.ones_like(begin, dtype=torch.bool), s, grid), until.minimum(lower), until)
    left = total - saved[:, :-1].cumsum(1)
    # The number left before each turn falls from turn to turn; so many turns still leave too many.
    turns = (left > cells).sum(1) + (total > cells)
    if bool((turns > flat.shape[1]).any()):
        raise BudgetError(f"{cells} cells cannot cover a picture: its coarsest cover has {int(left[:, -1].max())}.")
    return cover([r.float() for r in ranks], grid, [turns.view(-1, 1, 1)] * len(scores))


def _finer(value: Tensor, scale: int, grid: tuple[int, int]) -> Tensor:
    """Repeat cells over the base cells they cover; zero where there is none. Shape: [B, h_s, w_s] -> [B, h, w]."""
    if scale == 0:
        return value
    fine = value.repeat_interleave(2**scale, 1).repeat_interleave(2**scale, 2)
    return F.pad(fine, (0, grid[1] - fine.shape[2], 0, grid[0] - fine.shape[1]))


def _check(scores: Sequence[Tensor], grid: tuple[int, int], thresholds: int) -> None:
    shapes = [tuple(score.shape[1:]) for score in scores]
    if not scores or shapes != [coarse_grid(grid, s + 1) for s in range(len(scores))] or thresholds != len(scores):
        raise InputError(
            f"A quadtree over a grid of {grid} needs scores [B, h >> s, w >> s] and a threshold for each scale s = 1, "
            f"2, ..., got scores {shapes} and {thresholds} thresholds."
        )
