"""Ratios of SparseViT: what they cost a Swin transformer, by rule from a budget, and as genomes of a search.

See `foveate.encode.sparsevit`. FLOPs of a block are linear in the windows it computes (what Swin v2 spends on its
positions comes on top), so those of one and two windows tell all.
"""

import math
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import nn

from foveate.engine.allocate import Genome, calibrate
from foveate.engine.budget import Budget
from foveate.errors import BudgetError, InputError
from foveate.hosts.swin import Swin, WindowBlock

Ratios = tuple[tuple[float, ...], ...]
"""Share of windows left out, per stage and block."""

LEVELS = 9
"""Ratios that are drawn and searched: 0, 0.1 .. 0.8."""

STEEPEST = 0.95
"""The largest ratio that the rule uses."""

FIRST, DEEPEST = 0.6, (0.2, 0.4, 0.5)
"""The authors' configuration B: the first stage, and pairs of blocks of the deepest; other stages are dense."""


@dataclass(frozen=True)
class Cost:
    """FLOPs of a block: of each window, whatever the windows, and of all `windows` as the host runs them."""

    each: int
    fixed: int
    windows: int
    dense: int

    def at(self, ratio: float) -> int:
        """With a ratio of the windows left out."""
        keep = kept(self.windows, ratio)
        return self.fixed + (self.dense if keep == self.windows else keep * self.each)


class Sparsity:
    """The ratios of a host, and what they cost.

    Args:
        size: (H, W) in pixels of the pictures that costs are of.
    """

    def __init__(self, host: Swin, size: tuple[int, int]) -> None:
        self.host, self.size = host, size
        self.ratios = self.dense
        self._costs: list[list[Cost]] | None = None

    @property
    def dense(self) -> Ratios:
        """Ratios of the host as it was."""
        return tuple((0.0,) * len(stage.blocks) for stage in self.host.stages)

    def checked(self, ratios: Sequence[Sequence[float]]) -> Ratios:
        """Ratios as the host takes them. Raises: InputError when they do not fit."""
        found = tuple(tuple(map(float, stage)) for stage in ratios)
        depths = tuple(len(stage.blocks) for stage in self.host.stages)
        if tuple(map(len, found)) != depths or not all(0 <= r < 1 for stage in found for r in stage):
            raise InputError(f"expected ratios from 0 to below 1 for stages of {depths} blocks, got {found}.")
        return found

    def costs(self) -> list[list[Cost]]:
        """What every block costs at the size of the budget."""
        if self._costs is None:
            self._costs = []
            grid = tuple(-(-side // self.host.patch) for side in self.size)
            for i, stage in enumerate(self.host.stages):
                grid = tuple(-(-side // 2) for side in grid) if i else grid
                self._costs.append([self._cost(block, (grid[0], grid[1]), stage.width) for block in stage.blocks])
        return self._costs

    def _cost(self, block: WindowBlock, grid: tuple[int, int], width: int) -> Cost:
        from foveate.meter import count_flops

        n, places = count(block, grid), block.size(grid)[0] ** 2
        with torch.no_grad():
            like = next(self.host.body.parameters())
            one, two = (count_flops(block.run, like.new_zeros(some, places, width)) for some in (1, 2))
        # The host's own MLP leaves out what only pads the map.
        padding = (n * places - grid[0] * grid[1]) * _linear(block.mlp)
        return Cost(two - one, 2 * one - two, n, n * (two - one) - padding)

    def flops(self, ratios: Ratios) -> int:
        """FLOPs of one picture of the budget's size."""
        spent, (h, w) = 0, (-(-side // self.host.patch) for side in self.size)
        spent += 2 * h * w * self.host.patches.weight.numel() + _linear(self.host.head)
        for i, (stage, costs, own) in enumerate(zip(self.host.stages, self.costs(), ratios, strict=True)):
            spent += sum(cost.at(r) for cost, r in zip(costs, own, strict=True))
            if i:
                h, w = -(-h // 2), -(-w // 2)
            # Merging works on the map after it, whether it lies at a stage's end or at the next one's beginning.
            merging = self.host.stages[i - 1].shrink if i and self.host.stages[0].shrink is not None else stage.shrink
            spent += h * w * _linear(merging) if i else 0
        return spent

    def seconds(self, ratios: Ratios, runs: int = 8) -> float:
        """Time of one picture of the budget's size in evaluation mode: the mean of the middle half of several runs."""
        from foveate.meter import time_call

        like, before, model = next(self.host.body.parameters()), self.ratios, self.host.model
        pixels = torch.rand(1, self.host.patches.in_channels, *self.size).to(like)
        modes, self.ratios = [(m, m.training) for m in model.modules()], ratios
        try:
            model.eval()
            with torch.no_grad():
                self.host.features(pixels)
                times = sorted(time_call(lambda: self.host.features(pixels)) for _ in range(runs))
        finally:
            self.ratios = before
            for module, mode in modes:
                module.training = mode
        return statistics.mean(times[runs // 4 : runs - runs // 4])

    def limit(self, budget: Budget) -> tuple[Callable[[Ratios], float], float]:
        """What is to be kept small, and how small: FLOPs, or milliseconds."""
        if budget.unit == "ms":
            return lambda ratios: 1e3 * self.seconds(ratios), budget.amount
        full = self.flops(self.dense)
        return self.flops, budget.share_of(gflops=full / 1e9) * full

    def within(self, budget: Budget) -> Ratios:
        """Ratios by rule. Raises: BudgetError when the steepest ones cost more."""
        cost, limit = self.limit(budget)
        pattern = self.pattern()

        def at(t: float) -> Ratios:
            return tuple(tuple(min(max(p + t, 0.0), STEEPEST) for p in stage) for stage in pattern)

        if cost(self.dense) <= limit:
            return self.dense
        lowest = max(max(stage) for stage in pattern)
        tolerance, floor = (1e-4 if budget.unit != "ms" else 0.02), cost(at(STEEPEST))
        if floor > limit:
            share = f"{floor / cost(self.dense):.2f} of the host's cost"
            raise BudgetError(f"A budget of {budget} does not pay for the fewest windows, {share}; ask for more.")
        return at(calibrate(lambda t: cost(at(t)), limit, -lowest, STEEPEST, tolerance))

    def pattern(self) -> Ratios:
        """The authors' configuration B, stretched to this host's stages."""
        stages = [[0.0] * len(stage.blocks) for stage in self.host.stages]
        if len(stages) > 1:
            stages[0] = [FIRST] * len(stages[0])
        if len(stages) > 2:
            deep = stages[-2]
            pairs = -(-len(deep) // 2)
            for i in range(len(deep)):
                place = (i // 2) * (len(DEEPEST) - 1) / max(1, pairs - 1)
                low = min(int(place), len(DEEPEST) - 2)
                deep[i] = DEEPEST[low] + (place - low) * (DEEPEST[low + 1] - DEEPEST[low])
        return tuple(tuple(stage) for stage in stages)

    def options(self) -> list[int]:
        """Values that each gene takes; a pair of blocks with a single window has no choice."""
        return [LEVELS if costs[2 * g].windows > 1 else 1 for costs in self.costs() for g in range(-(-len(costs) // 2))]

    def of_genome(self, genome: Genome) -> Ratios:
        """Ratios of one gene per pair of blocks, in tenths."""
        genes = iter(genome)
        return tuple(
            tuple(g / 10 for g in (next(genes) for _ in range(-(-len(stage.blocks) // 2))) for _ in range(2))[
                : len(stage.blocks)
            ]
            for stage in self.host.stages
        )

    def ascending(self, genome: Genome) -> Genome:
        """Genes of each stage in ascending order, so that its later blocks keep fewer windows."""
        found, start = [], 0
        for stage in self.host.stages:
            stop = start + -(-len(stage.blocks) // 2)
            found += sorted(genome[start:stop])
            start = stop
        return tuple(found)

    def starts(self) -> list[Genome]:
        """All uniform genomes."""
        return [tuple(min(level, n - 1) for n in self.options()) for level in range(LEVELS)]


def count(block: WindowBlock, grid: tuple[int, int]) -> int:
    """Windows of a block on a map."""
    side, _ = block.size(grid)
    return math.prod(-(-s // side) for s in grid)


def kept(windows: int, ratio: float) -> int:
    """Windows that are computed: floor(n (1 - r)), at least one.

    >>> kept(10, 0.9), kept(64, 0.6), kept(4, 0.95), kept(7, 0)
    (1, 25, 1, 7)
    """
    return max(1, math.floor(windows * (1 - ratio) + 1e-6))


def _linear(module: nn.Module | None) -> int:
    """FLOPs of a module's linear layers on one token."""
    layers = [] if module is None else [m for m in module.modules() if isinstance(m, nn.Linear)]
    return 2 * sum(layer.weight.numel() for layer in layers)
