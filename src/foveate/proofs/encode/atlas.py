"""Proof of Atlas: nearly linear in the number of tokens, and no window is blind to what lies far off.

Cost. One block of multi-scale attention (windows of 4 x 4, pooling by 2, as many scales as it takes), one transformer
layer on all tokens with PyTorch's fused attention, and one of windows alone; 64 channels, maps of 16 x 16 tokens and
more. Slopes of log time over log N are fitted on the larger half.

Sight. On a map of 8 x 8 windows one token is changed at a time: which windows change with it after two blocks, of
windows alone, of scales without exchange, with the top-down way, and with both.
"""

from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from foveate.encode.atlas import MultiScaleAttention, pooled, scales_for
from foveate.layers.transformer import Block
from foveate.meter import Comparison, compare, count_flops, slope
from foveate.proofs.evidence import Evidence, ProofContext, Row

SIDES = {"quick": (16, 32, 64, 128), "full": (16, 32, 64, 128, 192)}
PAIRS = {16: 9, 32: 5, 64: 3, 128: 2, 192: 2}
DIM, HEADS, WINDOW, POOL = 64, 4, 4, 2
SLOPE, FULL_SLOPE, SPEEDUP = 1.4, 1.5, 2.0
"""The steepest growth of a block's time, the least of full attention's, and the least speed-up on the largest map."""

MAP, DEPTH = 32, 2
WAYS: dict[str, dict[str, Any]] = {
    "windows alone": {"scales": 1},
    "scales without exchange": {"scales": 4, "top_down": False, "bottom_up": False},
    "top-down": {"scales": 4, "bottom_up": False},
    "both ways": {"scales": 4},
}


class Scales(nn.Module):
    """A block on as many scales as a map has. Shape: [1, H, W, C] -> the same."""

    def __init__(self, scales: int, **settings: bool) -> None:
        super().__init__()
        self.block, self.scales = MultiScaleAttention(DIM, HEADS, scales, WINDOW, POOL, **settings), scales

    def forward(self, x: Tensor) -> Tensor:
        return self.block([x if i == 0 else pooled(x, POOL**i) for i in range(self.scales)])[0]


class Everywhere(nn.Module):
    """A transformer layer on all tokens. Shape: [1, H, W, C] -> the same."""

    def __init__(self) -> None:
        super().__init__()
        self.block = Block(DIM, HEADS)

    def forward(self, x: Tensor) -> Tensor:
        return self.block(x.flatten(1, 2)).view_as(x)


def prove(context: ProofContext) -> Evidence:
    """Fit slopes; see how far a token reaches."""
    rows, clocks, windows = [], {}, {}
    for side in context.track(SIDES[context.mode], "timing"):
        scales = scales_for(side * side, WINDOW, POOL)
        x = torch.randn(1, side, side, DIM, generator=context.generator(), device=context.device)
        many, alone, everywhere = (m.to(context.device).eval() for m in (Scales(scales), Scales(1), Everywhere()))
        clocks[side] = race(everywhere, many, x)
        windows[side] = race(alone, many, x).seconds[0]
        named = {"full attention": everywhere, "windows alone": alone, f"{scales} scales": many}
        times = (clocks[side].seconds[0], windows[side], clocks[side].seconds[1])
        for (name, module), seconds in zip(named.items(), times, strict=True):
            with torch.inference_mode():
                spent = count_flops(module, x)
            rows.append(Row(f"{name}, {side * side} tokens", gflops=spent / 1e9, ms=1e3 * min(seconds)))
    half = SIDES[context.mode][len(SIDES[context.mode]) // 2 :]
    growth = [slope({s * s: min(clocks[s].seconds[i]) for s in half}) for i in (0, 1)]
    largest = SIDES[context.mode][-1]
    faster = clocks[largest].speedup
    seen = {name: sight(context, way) for name, way in context.track(list(WAYS.items()), "looking")}
    rows += [Row(name, windows_reached=value) for name, value in seen.items()]
    return Evidence(
        system="atlas",
        claim="attention at many scales in O(N log N), in which every token sees everything",
        rows=tuple(rows),
        claimed="O(N log N); 4.3x faster training than ConvNeXt-B at 1024 px, 0.9 points below",
        measured=(
            f"time grows as N^{growth[1]:.2f}, full attention as N^{growth[0]:.2f}; {faster:.1f}x as fast at "
            f"{largest**2:,} tokens; a token reaches {seen['both ways']:.0%} of windows in {DEPTH} blocks, "
            f"{seen['windows alone']:.1%} where windows are alone"
        ),
        holds=verdict(growth, faster, seen["both ways"], seen["scales without exchange"]),
        notes=(
            f"Holds when time grows by at most N^{SLOPE}, full attention's by at least N^{FULL_SLOPE}, the block is "
            f"{SPEEDUP} times as fast as full attention at {largest**2:,} tokens, and a token reaches every window "
            "with both ways of exchange and its own alone without.",
            "The headline's 8 GPUs and ImageNet-100 are not tried; no ConvNeXt is trained here.",
        ),
        claimed_ratio=2.0,
        measured_ratio=growth[0] / growth[1],
    )


def verdict(growth: list[float], faster: float, both: float, none: float) -> bool:
    """Whether the claim holds.

    Args:
        growth: exponents of full attention's time and of the block's.
        faster: speed-up over full attention on the largest map.
        both, none: share of windows that a token reaches, with both ways of exchange and without any.
    """
    return growth[1] <= SLOPE and growth[0] >= FULL_SLOPE and faster >= SPEEDUP and both == 1 and none < 0.1


def race(baseline: nn.Module, module: nn.Module, x: Tensor) -> Comparison:
    """Both forwards in turn."""

    def run(one: nn.Module) -> None:
        with torch.inference_mode():
            one(x)

    return compare(partial(run, baseline), partial(run, module), PAIRS[x.shape[1]], flops=False)


def sight(context: ProofContext, way: dict[str, Any]) -> float:
    """Share of pairs of windows of which the second changes when a token of the first does."""
    torch.manual_seed(context.seed)
    settings = {key: value for key, value in way.items() if key != "scales"}
    blocks = [MultiScaleAttention(DIM, HEADS, way["scales"], WINDOW, POOL, **settings) for _ in range(DEPTH)]
    network = nn.ModuleList(blocks).to(context.device).eval()
    x = torch.randn(1, MAP, MAP, DIM, generator=context.generator(), device=context.device)

    def after(x: Tensor) -> Tensor:
        maps = [x if i == 0 else pooled(x, POOL**i) for i in range(way["scales"])]
        for block in network:
            maps = block(maps)
        return maps[0]

    with torch.inference_mode():
        before, seen, side = after(x), 0, MAP // WINDOW
        for place in range(0, side * side, 3):
            other = x.clone()
            other[0, place // side * WINDOW + 1, place % side * WINDOW + 2] += 3
            moved = (after(other) != before).any(3).view(side, WINDOW, side, WINDOW).any(3).any(1)
            seen += int(moved.sum())
    return seen / (len(range(0, side * side, 3)) * side * side)
