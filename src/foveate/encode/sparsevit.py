"""SparseViT: a Swin transformer that computes only the windows with large activations, a different share per layer.

Chen, Liu, Tang, Yi, Zhao, Han 2023, "SparseViT: Revisiting Activation Sparsity for Efficient High-Resolution Vision
Transformer", arXiv:2303.17605.

A stage's map x [B, H, W, C] is measured once, where its first sparse block begins: a = mean_c |x|. A window of M x M
places scores the L2 norm of its M^2 values of a (places that only pad the map are 0), and of the n windows a block with
ratio r computes the K = floor(n (1 - r)) best, at least one, whole: norms, attention, MLP and residuals. The others
keep what they had. Shifted blocks have other windows, scored on the same a; so there are two orders of windows per
stage, and blocks of one kind compute nested sets. Nothing is learned for the choice, patch merging stays dense, and
r = 0 is the host's own block, bit for bit.

What each layer may leave out is

    given       `ratios`, per stage and block
    by rule     r_i = clip(p_i + t, 0, 0.95) with the one t that meets the budget; p is the pattern that the authors'
                search found (much in the first stage, more and more along the deepest one, little elsewhere)
    searched    `search`: evolution over ratios 0, 0.1 .. 0.8, one gene for each pair of blocks, ascending in a stage,
                under a limit of FLOPs or of measured time, worth being what the caller measures

Before a search, and before a final fine-tuning, `adaptation` trains the host with ratios drawn anew for each batch, so
that one set of weights tells how good every setting is.
"""

import random
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cache, partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from foveate.encode.sparsevit_ratios import Ratios, Sparsity, count, kept
from foveate.engine.allocate import Genome, evolve
from foveate.engine.budget import Budget
from foveate.engine.surgery import join, patch_forward
from foveate.errors import BudgetError, MissingExtraError
from foveate.hosts import swin
from foveate.hosts.plugin import Look, TokenHandle
from foveate.hosts.swin import OnMap, Swin, WindowBlock


@dataclass(frozen=True)
class Found:
    """What a search found: ratios, what the caller's measure says of them, and their FLOPs as a share of the host's."""

    ratios: Ratios
    worth: float
    share: float


class SparseViT(TokenHandle):
    """Let a Swin transformer compute only its most active windows.

    Args:
        model: a host known to `foveate.hosts.swin`, changed in place.
        budget: a share of the host's FLOPs, "20 GFLOPs" or "35 ms" per picture. Milliseconds are measured here, now.
        ratios: share of windows left out, per stage and block, in 0..1; with them the budget is not looked at.
        size: (H, W) in pixels that the budget is for; default what the host was made for.

    Raises: InputError for a model that is no such host, and for ratios that do not fit it; BudgetError for a budget
        that one window per block exceeds. The model is unchanged then.
    """

    def __init__(
        self,
        model: nn.Module,
        budget: Budget | float | str = 0.5,
        ratios: Sequence[Sequence[float]] | None = None,
        size: tuple[int, int] | None = None,
    ) -> None:
        host = swin(model)
        self.chooser = chooser = Chooser(host, size or host.pixels.size)
        budget = Budget.parse(budget)
        if ratios is not None:
            chooser.ratios = chooser.checked(ratios)
        elif budget.unit != "ms":
            chooser.ratios = chooser.within(budget)
        layers = [
            block.patch(partial(chooser.run, s, b))
            for s, stage in enumerate(host.stages)
            for b, block in enumerate(stage.blocks)
        ]
        super().__init__(join(layers), host, chooser.look)
        if ratios is None and budget.unit == "ms":
            try:
                chooser.ratios = chooser.within(budget)
            except BudgetError:
                self.remove()
                raise

    @property
    def ratios(self) -> Ratios:
        """Share of windows left out, per stage and block; may be set."""
        return self.chooser.ratios

    @ratios.setter
    def ratios(self, ratios: Sequence[Sequence[float]]) -> None:
        self.chooser.ratios = self.chooser.checked(ratios)

    @contextmanager
    def adaptation(self, seed: int = 0) -> Iterator[None]:
        """Train inside of this: each forward of the host in training mode draws its ratios anew.

        One of 0, 0.1 .. 0.8 for each pair of blocks, ascending within a stage. The ratios from before come back.
        """
        chooser, before, dice = self.chooser, self.ratios, random.Random(seed)
        handle = patch_forward(self.host.body, partial(chooser.drawn, dice))
        try:
            yield
        finally:
            handle.remove()
            chooser.ratios = before

    def search(
        self,
        worth: Callable[[], float],
        budget: Budget | float | str,
        *,
        population: int = 100,
        parents: int = 25,
        generations: int = 20,
        mutation: float = 0.1,
        seed: int = 0,
        progress: Callable[[int, float], None] | None = None,
    ) -> Found:
        """Find the ratios that are worth most within a budget, and leave them set.

        Args:
            worth: greater is better, e.g. accuracy; called with the host at the ratios to be judged.
            budget: as above. What is searched in milliseconds must also keep to 1.5 times that share in FLOPs, which
                spares most measurements.
            population, parents, generations, mutation, seed, progress: see `foveate.engine.allocate.evolve`.

        Raises: BudgetError when no ratios keep to the budget.
        """
        chooser, budget = self.chooser, Budget.parse(budget)
        cost, limit, before = *chooser.limit(budget), self.ratios
        loose = limit if budget.unit != "ms" else 1.5 * limit / cost(chooser.dense) * chooser.flops(chooser.dense)

        def value(genome: Genome) -> float:
            chooser.ratios = chooser.of_genome(genome)
            return worth()

        @cache
        def feasible(genome: Genome) -> bool:
            ratios = chooser.of_genome(genome)
            return chooser.flops(ratios) <= loose and (budget.unit != "ms" or cost(ratios) <= limit)

        try:
            best, found = evolve(
                value,
                chooser.options(),
                feasible=feasible,
                repair=chooser.ascending,
                start=chooser.starts(),
                population=population,
                parents=parents,
                generations=generations,
                mutation=mutation,
                seed=seed,
                progress=progress,
            )
        except BaseException:
            chooser.ratios = before
            raise
        chooser.ratios = chooser.of_genome(best)
        return Found(chooser.ratios, found, chooser.flops(chooser.ratios) / chooser.flops(chooser.dense))


@dataclass(frozen=True, eq=False)
class _Windows:
    """Where the windows of a kind lie on a map: rows of [H * W], [n, M * M]; None where nothing is padded or masked."""

    rows: Tensor
    mask: Tensor | None
    inside: Tensor | None


@dataclass(eq=False)
class _Seen:
    """What a stage knows while it runs: its measure, and the order of windows of each kind."""

    activity: Tensor | None = None
    order: dict[tuple[int, int], Tensor] = field(default_factory=dict)


class Chooser(Sparsity):
    """Choose windows while the host runs."""

    def __init__(self, host: Swin, size: tuple[int, int]) -> None:
        super().__init__(host, size)
        self.measure: Callable[[Tensor], Tensor] = activity
        self._seen, self._kinds = dict[int, _Seen](), dict[Any, _Windows]()
        self._record: list[tuple[WindowBlock, tuple[int, int], Tensor | None]] | None = None

    def run(self, stage: int, index: int, run: OnMap, x: Tensor) -> Tensor:
        """One block on the windows it keeps. Shape: [B, H, W, C]."""
        ratios, block = self.ratios[stage], self.host.stages[stage].blocks[index]
        if index == 0:
            self._seen[stage] = _Seen()
        grid = (x.shape[1], x.shape[2])
        n = count(block, grid)
        keep = kept(n, ratios[index])
        if keep == n:
            self._note(block, grid, None)
            return run(x)
        chosen = self._order(self._seen[stage], block, x)[:, :keep].sort(1).values
        self._note(block, grid, chosen)
        windows, batch = self._windows(block, grid, x), torch.arange(len(x), device=x.device)[:, None, None]
        rows = (windows.rows[chosen] + batch * (grid[0] * grid[1])).flatten()
        mask = None if windows.mask is None else windows.mask[chosen].flatten(0, 1)
        inside = None if windows.inside is None else windows.inside[chosen].flatten(0, 1)
        flat = x.flatten(0, 2)
        y = block.run(flat.index_select(0, rows).unflatten(0, (len(x) * keep, -1)), mask, inside).flatten(0, 1)
        if inside is not None:
            real = inside.flatten() > 0
            rows, y = rows[real], y[real]
        return flat.index_copy(0, rows, y.to(flat.dtype)).view_as(x)

    def _order(self, seen: _Seen, block: WindowBlock, x: Tensor) -> Tensor:
        """Windows of this kind, the most active first. Shape: -> [B, n]."""
        kind = block.size((x.shape[1], x.shape[2]))
        if seen.activity is None:
            seen.activity = self.measure(x)
        if kind not in seen.order:
            scores = block.cut(seen.activity).flatten(2).norm(dim=2)
            seen.order[kind] = scores.sort(dim=1, descending=True, stable=True).indices
        return seen.order[kind]

    def _windows(self, block: WindowBlock, grid: tuple[int, int], like: Tensor) -> _Windows:
        key = (*block.size(grid), grid, like.device, like.dtype)
        if key not in self._kinds:
            if len(self._kinds) > 64:  # pictures of ever new sizes
                self._kinds.clear()
            places = torch.arange(grid[0] * grid[1], device=like.device).view(1, *grid, 1)
            with torch.inference_mode(False), torch.no_grad():
                plain = torch.empty((), device=like.device, dtype=like.dtype)
                self._kinds[key] = _Windows(
                    block.cut(places)[0, :, :, 0], block.mask(grid, plain), block.inside(grid, plain)
                )
        return self._kinds[key]

    def _note(self, block: WindowBlock, grid: tuple[int, int], chosen: Tensor | None) -> None:
        if self._record is not None:
            self._record.append((block, grid, chosen))

    def look(self, pixels: Tensor) -> Look:
        """Run the host, and see which windows its blocks computed. Outlined are those of the first sparse block."""
        self._record = []
        try:
            with torch.no_grad():
                self.host.features(pixels)
            record = self._record
        finally:
            self._record = None
        size = record[0][1]
        effort, total, tokens, full = pixels.new_zeros(len(pixels), *size), 0.0, 0, 0
        boxes: tuple[Tensor, ...] = ()
        costs = [cost for stage in self.costs() for cost in stage]
        for (block, grid, chosen), cost in zip(record, costs, strict=True):
            n, side, each = count(block, grid), block.size(grid), cost.each
            computed = pixels.new_ones(len(pixels), *grid)
            if chosen is not None:
                cells = pixels.new_zeros(len(pixels), n).scatter(1, chosen, 1.0)
                computed = block.paste(cells[:, :, None, None].expand(-1, -1, side[0] ** 2, 1), grid)[..., 0]
                if not boxes and not side[1]:
                    boxes = tuple(_boxes(own, side[0] * self.host.patch, -(-grid[1] // side[0])) for own in chosen)
            tokens, full = tokens + (n if chosen is None else chosen.shape[1]), full + n
            effort += each * n * F.interpolate(computed[:, None], size)[:, 0]
            total += each * n
        return Look((tokens,) * len(pixels), full, effort / total, boxes, "windows")

    def drawn(self, dice: random.Random, forward: Callable[..., Any], *inputs: Any, **named: Any) -> Any:
        """The host's forward, with random ratios in training."""
        if self.host.model.training:
            self.ratios = self.of_genome(self.ascending(tuple(dice.randrange(n) for n in self.options())))
        return forward(*inputs, **named)


def activity(x: Tensor) -> Tensor:
    """Mean magnitude over channels, in float32 whatever is in use. Shape: [B, H, W, C] -> [B, H, W, 1]."""
    return x.detach().float().abs().mean(3, keepdim=True)


def _boxes(chosen: Tensor, side: int, across: int) -> Tensor:
    """Windows as xyxy in pixels. Shape: [K] -> [K, 4]."""
    corner = torch.stack([chosen % across, chosen // across], 1) * side
    return torch.cat([corner, corner + side], 1)


def conformance_example() -> tuple[nn.Module, tuple[Tensor]]:
    """A small Swin of transformers, and pictures."""
    try:
        from transformers import SwinConfig, SwinModel
    except ImportError as error:
        raise MissingExtraError("Swin needs transformers. Install it: pip install 'foveate[hosts]'") from error
    config: Any = SwinConfig(
        image_size=64, patch_size=4, embed_dim=16, depths=[2, 2], num_heads=[2, 4], window_size=4, initializer_range=0.2
    )
    return SwinModel(config).eval(), (torch.rand(2, 3, 64, 64),)
