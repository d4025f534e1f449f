"""xT: any vision backbone on pictures larger than it was made for, region by region, in bounded memory.

Gupta, Li, Zhu, Malik, Darrell, Mangalam 2024, "xT: Nested Tokenization for Larger Context in Large Images",
arXiv:2403.01915.

A picture is cut into r x c regions of the size R that the backbone likes, which it sees one by one, some at a time. Its
features of all regions are put back in their places, F [B, C, r h, c w], as if one picture had been seen. A light
model for long sequences then lets regions know of each other (2 layers; the last of C tokens is the class token, since
attention is causal):

    t = [W_in F + sincos(row, column), class],    t = t + Attention(RMSNorm(t)),   t = t + MLP(RMSNorm(t))
    F' = F + W_out t,    class' = mean of the regions' own class (or pooled) features + W_out t[-1]

W_out begins at zero, so that a trained host begins as one that pools over its regions; a new head reads t[-1] itself,
as in the paper. Attention is exact up to 4096 tokens and HyperAttention beyond (`foveate.layers.hyper_attention`);
layers may be Mamba's instead.

Memory: besides F there are never more than `at_once` regions in work. In training, where there are more, they are
computed again when their gradient is asked for (checkpoints); and only a share `gradients` of all regions, drawn anew
each time, carry any.

A budget buys regions: a picture is shrunk to the finest grid of regions that it pays for. Sides that are no multiples
of R are cut into equal parts, each resized to R.
"""

import math
from collections.abc import Callable, Sequence
from copy import copy
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from foveate.data.pictures import Source, load
from foveate.engine.budget import Budget
from foveate.engine.surgery import add, join, patch_method
from foveate.engine.tiles import Box
from foveate.errors import BudgetError, InputError, MissingExtraError
from foveate.hosts import swin, vit
from foveate.hosts.picture import IMAGENET, Pixels
from foveate.hosts.plugin import Look, TokenHandle
from foveate.layers.region_context import Context
from foveate.layers.residual import add_

Grid = tuple[int, int]

STRIDE = 32
"""Pixels per context token and side, as of the hierarchical backbones of the paper; finer features are averaged."""

STRETCH = 1.5
"""How much a budget may change the proportions of a picture."""


class XT(TokenHandle):
    """Let a backbone see larger pictures.

    While it is applied the host holds a `context` whose parameters train with it (with an nn.Sequential, only the
    handle does).

    Args:
        model: a host known to `foveate.hosts`, or any module that makes a map [B, C, h, w], or a list of maps of which
            the last is the coarsest, of pictures. Changed in place.
        budget: a share of the FLOPs of a picture's own regions, or "20 GFLOPs" per picture.
        region: R, side or (H, W) in pixels; default what the host was made for.
        channels: C, needed where the model is no known host.
        num_classes: give the host a head of xT's own; the model then returns classes [B, num_classes].
        dim, depth, kind: see `Context`.
        at_once: regions that are in work at a time.
        gradients: share of regions that carry gradients in training.

    Raises: InputError for settings that do not fit; BudgetError, when a picture is seen, for less than one region.
    """

    def __init__(
        self,
        model: nn.Module,
        budget: Budget | float | str = 1.0,
        region: int | tuple[int, int] | None = None,
        channels: int | None = None,
        num_classes: int = 0,
        dim: int | None = None,
        depth: int = 2,
        kind: str = "hyper",
        at_once: int = 4,
        gradients: float = 1.0,
    ) -> None:
        host, method, prefixes, last = _described(model, channels)
        size = host.pixels.size if region is None else (region, region) if isinstance(region, int) else region
        if min(size) < 1 or at_once < 1 or not 0 < gradients <= 1:
            raise InputError(
                f"a region has at least one pixel, one is in work at a time, and a share of them above 0 carries "
                f"gradients; got {size}, at_once={at_once}, gradients={gradients}."
            )
        budget = Budget.parse(budget)
        budget.share_of(gflops=1.0)
        dim = min(768, -(-host.width // 4) * 4) if dim is None else dim
        like = next(model.parameters(), torch.zeros(()))
        context = Context(host.width, dim, depth, kind, num_classes).to(like.device, like.dtype)
        nest = Nest(host.body, method, size, context, budget, at_once, gradients, _Layout(prefixes, last, size))
        # A Sequential would run it after its own layers; there the handle alone holds it.
        handles = [] if isinstance(model, nn.Sequential) else [add(model, "context", context)]
        handles.append(patch_method(host.body, method, nest.run))
        if num_classes:
            handles.append(patch_method(model, "forward", nest.classify))
        super().__init__(join(handles), host, nest.look)
        self.nest = nest

    @property
    def context(self) -> "Context":
        """What regions know of each other by."""
        return self.nest.context

    def encode(self, picture: Source) -> tuple[Tensor, Tensor]:
        """Run one picture of any kind without ever holding it whole in floating point.

        Returns: features [1, C, r h, c w] and the class feature of `Context`, [1, dim].
        """
        opened = load(picture)

        def read(_: int, box: Box) -> Tensor:
            x0, y0, x1, y1 = box
            return self.pixels.normalise(opened.window(y0, y1, x0, x1)[0].expand(-1, 3, -1, -1))

        like = next(self.context.parameters())
        seen = self.nest.see(read, 1, (opened.height, opened.width), like)
        return seen.main, seen.token


# ------------------------------------------------------------------------------------------------------- nesting


@dataclass(frozen=True, eq=False)
class _Seen:
    """Features in their places. Shape: main [B, C, H, W]; token [B, dim]; prefix [B, P, C], pooled [B, C'] or None."""

    main: Tensor
    token: Tensor
    change: Tensor
    prefix: Tensor | None
    pooled: Tensor | None
    levels: tuple[Tensor, ...]
    template: Any


@dataclass(frozen=True)
class _Layout:
    """How a backbone's outputs are read and written: prefix tokens, whether channels come last, size of a region."""

    prefixes: int
    last: bool
    region: tuple[int, int]

    def read(self, output: Any) -> tuple[tuple[Tensor | None, ...], Any]:
        """(main, prefix, pooled, *levels) and what it takes to write an output of this kind."""
        if isinstance(output, Tensor):
            return (*self._split(output), None), output[:0]
        if isinstance(output, list | tuple) and output and all(isinstance(t, Tensor) and t.dim() == 4 for t in output):
            return (*self._split(output[-1]), None, *output[:-1]), type(output)
        if not hasattr(output, "last_hidden_state"):
            raise InputError(f"expected features [B, C, h, w] of the backbone, got {type(output).__name__}.")
        levels = output.get("reshaped_hidden_states") or ()
        return (*self._split(output.last_hidden_state), output.get("pooler_output"), *levels), copy(output)

    def _split(self, y: Tensor) -> tuple[Tensor, Tensor | None]:
        if y.dim() == 4:
            return (y.permute(0, 3, 1, 2) if self.last else y), None
        tokens, (height, width) = y[:, self.prefixes :], self.region
        rows = round(math.sqrt(tokens.shape[1] * height / width))
        if y.dim() != 3 or not rows or tokens.shape[1] % rows:
            raise InputError(f"{tuple(y.shape)} are no features of a region of {self.region} pixels, [B, C, h, w].")
        return tokens.mT.unflatten(2, (rows, -1)), y[:, : self.prefixes] if self.prefixes else None

    def write(self, seen: _Seen) -> Any:
        """An output as the backbone gives it."""
        kind = seen.template
        if isinstance(kind, type):
            return kind((*seen.levels, seen.main))
        if isinstance(kind, Tensor) and kind.dim() == 4:
            return seen.main.permute(0, 2, 3, 1) if self.last else seen.main
        tokens = seen.main.flatten(2).mT
        if seen.prefix is not None:
            first = seen.prefix[:, :1] + seen.change[:, None]
            tokens = torch.cat([first, seen.prefix[:, 1:], tokens], 1)
        if isinstance(kind, Tensor):
            return tokens
        pooled = seen.pooled
        if pooled is not None and pooled.shape == seen.change.shape:
            pooled = pooled + seen.change
        fields: dict[str, Any] = {"last_hidden_state": tokens, "pooler_output": pooled}
        if seen.levels:
            fields["reshaped_hidden_states"] = seen.levels
        return type(kind)(**{name: value for name, value in fields.items() if value is not None})


@dataclass(eq=False)
class Nest:
    """Cut, run the backbone region by region, put back, and run the context."""

    body: nn.Module
    method: str
    region: tuple[int, int]
    context: Context
    budget: Budget
    at_once: int
    gradients: float
    layout: _Layout
    _costs: dict[Grid | None, int] = field(default_factory=dict)
    _forward: Callable[..., Any] | None = None
    _token: Tensor | None = None

    def __post_init__(self) -> None:
        self._forward = getattr(self.body, self.method)

    def run(self, forward: Callable[..., Any], pixels: Tensor, *more: Any, **named: Any) -> Any:
        """The backbone on pictures of any size. Shape: [B, 3, H, W]."""
        if pixels.dim() != 4 or not pixels.numel():
            raise InputError(f"expected pictures [B, 3, H, W], got shape {tuple(pixels.shape)}; reshape them.")

        def read(b: int, box: Box) -> Tensor:
            x0, y0, x1, y1 = box
            return pixels[b : b + 1, :, y0:y1, x0:x1]

        call = partial(forward, **named)
        seen = self.see(read, len(pixels), (pixels.shape[2], pixels.shape[3]), pixels, lambda x: call(x, *more))
        self._token = seen.token
        return self.layout.write(seen)

    def classify(self, forward: Callable[..., Any], *inputs: Any, **named: Any) -> Tensor:
        """Classes by the head of the context."""
        assert self.context.cls is not None
        forward(*inputs, **named)
        token, self._token = self._token, None
        y: Tensor = self.context.cls(token)
        return y

    def see(
        self,
        read: Callable[[int, Box], Tensor],
        batch: int,
        size: tuple[int, int],
        like: Tensor,
        forward: Callable[[Tensor], Any] | None = None,
    ) -> _Seen:
        """Run pictures given by a function that reads a box of one."""
        grid = self.grid(size)
        boxes = self.boxes(size, grid)
        items = [(b, box) for b in range(batch) for box in boxes]
        template: list[Any] = []

        def features(some: Sequence[int]) -> tuple[Tensor | None, ...]:
            x = torch.cat([self._fitted(read(*items[i])) for i in some]).to(like.device, like.dtype)
            parts, kind = self.layout.read((forward or self._forward)(x))  # type: ignore[misc]
            template[:] = [kind]
            return parts

        order, learning = list(range(len(items))), torch.is_grad_enabled()
        carrying = len(items)
        if learning and self.gradients < 1:
            order = torch.randperm(len(items)).tolist()
            carrying = math.ceil(len(items) * self.gradients)
        found, again = [], carrying > self.at_once
        for start, stop, learns in ((0, carrying, learning), (carrying, len(items), False)):
            for i in range(start, stop, self.at_once):
                some = order[i : min(i + self.at_once, stop)]
                with torch.set_grad_enabled(learns):
                    found.append(
                        checkpoint(features, some, use_reentrant=False) if learns and again else features(some)
                    )
        back = torch.tensor(order, device=like.device).argsort()
        parts = (None if p[0] is None else torch.cat(p)[back] for p in zip(*found, strict=True))
        main, prefix, pooled, *levels = parts
        assert main is not None
        change, token = self.context(unnest(self._pooled(main), batch, grid))
        own = [None if t is None else t.unflatten(0, (batch, -1)).mean(1) for t in (prefix, pooled)]
        outer = tuple(unnest(level, batch, grid) for level in levels if level is not None)
        added = self.context.output_proj(token)
        whole = add_(unnest(main, batch, grid), _enlarged(change, grid, main.shape[2:]))
        return _Seen(whole, token, added, own[0], own[1], outer, template[0])

    def _pooled(self, main: Tensor) -> Tensor:
        """Features as the context sees them, at most one token per STRIDE pixels. Shape: [n, C, h, w]."""
        height, width = (min(s, max(1, round(r / STRIDE))) for s, r in zip(main.shape[2:], self.region, strict=True))
        return main if main.shape[2:] == (height, width) else F.adaptive_avg_pool2d(main, (height, width))

    def _fitted(self, x: Tensor) -> Tensor:
        if tuple(x.shape[2:]) == self.region:
            return x
        return F.interpolate(x, self.region, mode="bicubic", antialias=True)

    def boxes(self, size: tuple[int, int], grid: Grid) -> list[Box]:
        """Equal parts of a picture in raster order."""
        edges = [[side * i // parts for i in range(parts + 1)] for side, parts in zip(size, grid, strict=True)]
        return [
            (x0, y0, x1, y1)
            for y0, y1 in zip(edges[0], edges[0][1:], strict=False)
            for x0, x1 in zip(edges[1], edges[1][1:], strict=False)
        ]

    def own_grid(self, size: tuple[int, int]) -> Grid:
        """Rows and columns of regions at a picture's own resolution."""
        rows, columns = (max(1, round(s / r)) for s, r in zip(size, self.region, strict=True))
        return rows, columns

    def grid(self, size: tuple[int, int]) -> Grid:
        """Rows and columns of regions that the budget pays for. Raises: BudgetError for less than one."""
        rows, columns = self.own_grid(size)
        if self.budget.unit == "share" and self.budget.amount == 1:
            return rows, columns
        full = self.flops((rows, columns))
        limit = self.budget.share_of(gflops=full / 1e9) * full
        shape = rows / columns
        fitting = [
            (r, c)
            for r in range(1, rows + 1)
            for c in range(1, columns + 1)
            if 1 / STRETCH <= r / c / shape <= STRETCH and self.flops((r, c)) <= limit
        ]
        if not fitting:
            least = self.flops((1, 1)) / 1e9
            raise BudgetError(
                f"A budget of {self.budget} pays for no region; one needs {least:.3g} GFLOPs. Ask for more."
            )
        return max(fitting, key=lambda g: (g[0] * g[1], -abs(math.log(g[0] / g[1] / shape))))

    def flops(self, grid: Grid) -> int:
        """FLOPs of one picture of so many regions."""
        return grid[0] * grid[1] * self._cost(None) + self._cost(grid)

    def _cost(self, grid: Grid | None) -> int:
        """FLOPs of one region, or of the context on a grid of regions."""
        from foveate.meter import count_flops

        if grid not in self._costs:
            like = next(self.context.parameters())
            with torch.no_grad():
                if grid is None:
                    self._costs[None] = count_flops(self._forward, like.new_zeros(1, 3, *self.region))  # type: ignore
                else:
                    size = [n * max(1, round(r / STRIDE)) for n, r in zip(grid, self.region, strict=True)]
                    self._costs[grid] = count_flops(
                        self.context, like.new_zeros(1, self.context.input_proj.in_features, *size)
                    )
        return self._costs[grid]

    def look(self, pixels: Tensor) -> Look:
        """Which regions are seen, and at what share of the picture's own resolution."""
        size = (pixels.shape[2], pixels.shape[3])
        grid, own = self.grid(size), self.own_grid(size)
        count, full = grid[0] * grid[1], own[0] * own[1]
        boxes = torch.tensor(self.boxes(size, grid), device=pixels.device)
        effort = pixels.new_full((len(pixels), 1, 1), count / full)
        return Look((count,) * len(pixels), full, effort, (boxes,) * len(pixels), "regions")


def _enlarged(x: Tensor, grid: Grid, size: Sequence[int]) -> Tensor:
    """Repeat places of a coarse map until each region has `size` of them."""
    wanted = (grid[0] * size[0], grid[1] * size[1])
    return x if tuple(x.shape[2:]) == wanted else F.interpolate(x, wanted, mode="nearest")


def unnest(regions: Tensor, batch: int, grid: Grid) -> Tensor:
    """Put maps of regions in their places. Shape: [B r c, C, h, w] -> [B, C, r h, c w]."""
    x = regions.unflatten(0, (batch, *grid)).permute(0, 3, 1, 4, 2, 5)
    return x.flatten(4, 5).flatten(2, 3)


def nest(x: Tensor, grid: Grid) -> Tensor:
    """Undo `unnest`. Shape: [B, C, r h, c w] -> [B r c, C, h, w]."""
    x = x.unflatten(3, (grid[1], -1)).unflatten(2, (grid[0], -1))
    return x.permute(0, 2, 4, 1, 3, 5).flatten(0, 2)


@dataclass(frozen=True, eq=False)
class Backbone:
    """A module that makes maps of pictures, described as far as xT needs it."""

    model: nn.Module
    width: int
    pixels: Pixels

    @property
    def body(self) -> nn.Module:
        """The model itself."""
        return self.model


def _described(model: nn.Module, channels: int | None) -> tuple[Any, str, int, bool]:
    """Host, the method that makes features, its prefix tokens, and whether channels come last."""
    if channels is not None:
        return Backbone(model, channels, Pixels(*IMAGENET, (256, 256), 1)), "forward", 0, False
    for describe in (vit, swin):
        try:
            host: Any = describe(model)
        except InputError:
            continue
        method = "forward_features" if hasattr(host.body, "forward_features") else "forward"
        return host, method, getattr(host, "prefixes", 0), method == "forward_features"
    raise InputError(f"{type(model).__name__} is no known host; say how many channels its features have (channels=).")


def conformance_example() -> tuple[nn.Module, tuple[Tensor]]:
    """A small DINOv2 of transformers, and pictures of 4 x 4 of its own size."""
    try:
        from transformers import Dinov2Config, Dinov2Model
    except ImportError as error:
        raise MissingExtraError("DINOv2 needs transformers. Install it: pip install 'foveate[hosts]'") from error
    config: Any = Dinov2Config(
        hidden_size=16, num_hidden_layers=2, num_attention_heads=2, image_size=32, patch_size=8, initializer_range=0.2
    )
    return Dinov2Model(config).eval(), (torch.rand(2, 3, 128, 128),)
