"""Proof of ScatterMoE: no padding and no copies in expert order, so less memory and more tokens per second.

One mixture of MLPs, y[t] = sum_j gate[t, j] W2_e gelu(W1_e x[t]) with e = expert[t, j], trained one step at a time in
five ways that differ in what they copy and compute:

    block padding   rows copied in expert order, every expert's run padded to 128 (Megablocks' plan), same products
    capacity        rows copied to [E, largest load, C], one batched product; drop-free
    loop and mask   for each expert: find its tokens, gather, compute, add (transformers' plan)
    dense           every expert on every token
    ScatterMoE      indices sorted, rows read and written where they lie

Padding and copies cost what the sizes of experts and tokens make of them, so two mixtures are measured: few large
experts (E = 8, k = 2) and more of them (E = 32, k = 4), the latter the paper's own bench.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks

from foveate.engine.route import Route
from foveate.meter import Comparison, compare, count_flops
from foveate.ops.grouped_linear import grouped_linear
from foveate.proofs.evidence import Evidence, ProofContext, Row

SIZES = {"quick": (2048, 256, 256), "full": (4096, 512, 512)}
"""Tokens T, channels C, hidden channels H."""

MIXTURES = ((8, 2), (32, 4))
"""(E, k); the last is the one that the verdict is about."""

PAIRS = {"quick": 3, "full": 5}
BLOCK = 128
EXACT = 1e-12
SAVED_ALLOWED = 0.75
"""Share of block padding's memory for backward that ScatterMoE may keep."""

IMBALANCE_ALLOWED = 1.25
"""How much more time tokens that crowd on few experts may take than even ones."""


@dataclass(frozen=True)
class Mixture:
    """x [T, C], first [E, H, C], second [E, C, H], gate [T, k], expert [T, k]."""

    x: Tensor
    first: Tensor
    second: Tensor
    gate: Tensor
    expert: Tensor

    @property
    def leaves(self) -> tuple[Tensor, ...]:
        """What gradients are taken of."""
        return self.x, self.first, self.second, self.gate


Layer = Callable[[Mixture], Tensor]


def mixture(
    tokens: int, dim: int, hidden: int, experts: int, k: int, dice: torch.Generator, skewed: bool = False
) -> Mixture:
    """Random weights and tokens; experts drawn evenly, or by Zipf's law (expert e in proportion to 1 / (e + 1))."""
    device = dice.device

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=dice, device=device)

    odds = 1 / torch.arange(1, experts + 1, device=device) if skewed else torch.ones(experts, device=device)
    expert = torch.multinomial(odds.expand(tokens, -1), k, generator=dice)
    values = (
        normal(tokens, dim),
        normal(experts, hidden, dim) * dim**-0.5,
        normal(experts, dim, hidden) * hidden**-0.5,
        normal(tokens, k).softmax(1),
    )
    x, first, second, gate = (v.requires_grad_() for v in values)
    return Mixture(x, first, second, gate, expert)


def scattered(m: Mixture) -> Tensor:
    """ScatterMoE."""
    route = Route.of(m.expert, len(m.first))
    hidden = F.gelu(grouped_linear(m.x, m.first, route, grouped_out=True))
    return grouped_linear(hidden, m.second, route, gate=m.gate, grouped_in=True)


def block_padded(m: Mixture) -> Tensor:
    """Copies in expert order, padded to whole blocks, through the same matrix products."""
    route = Route.of(m.expert, len(m.first))
    counts = tuple(-(-count // BLOCK) * BLOCK for count in route.counts)
    rows = torch.arange(sum(counts), device=m.x.device)
    padded, place = Route(rows, counts), _places(route, counts)
    copies = m.x.new_zeros(len(rows), m.x.shape[1]).index_copy(0, place, m.x.index_select(0, route.items))
    hidden = F.gelu(grouped_linear(copies, m.first, padded, grouped_in=True, grouped_out=True))
    y = grouped_linear(hidden, m.second, padded, grouped_in=True, grouped_out=True)
    return _gated(y.index_select(0, place[route.inverse]), m.gate)


def capacity_padded(m: Mixture) -> Tensor:
    """Copies [E, largest load, C], one batched matrix product."""
    route, experts = Route.of(m.expert, len(m.first)), len(m.first)
    counts = (max(route.counts),) * experts
    place = _places(route, counts)
    copies = m.x.new_zeros(sum(counts), m.x.shape[1]).index_copy(0, place, m.x.index_select(0, route.items))
    y = F.gelu(copies.unflatten(0, (experts, -1)) @ m.first.mT) @ m.second.mT
    return _gated(y.flatten(0, 1).index_select(0, place[route.inverse]), m.gate)


def loop_and_mask(m: Mixture) -> Tensor:
    """Expert by expert, its tokens found by comparing."""
    y = torch.zeros_like(m.x)
    for e in range(len(m.first)):
        token, j = torch.where(m.expert == e)
        out = F.linear(F.gelu(F.linear(m.x[token], m.first[e])), m.second[e])
        y.index_add_(0, token, out * m.gate[token, j, None])
    return y


def dense(m: Mixture) -> Tensor:
    """Every expert on every token; the gates of those not chosen are zero."""
    weight = m.x.new_zeros(len(m.x), len(m.first)).scatter(1, m.expert, m.gate)
    y = torch.zeros_like(m.x)
    for e in range(len(m.first)):
        y = y + weight[:, e, None] * F.linear(F.gelu(F.linear(m.x, m.first[e])), m.second[e])
    return y


BASELINES: dict[str, Layer] = {
    "block padding": block_padded,
    "capacity": capacity_padded,
    "loop and mask": loop_and_mask,
    "dense": dense,
}


def prove(context: ProofContext) -> Evidence:
    """Check exactness in double precision, then train by each way against ScatterMoE."""
    apart = largest_error(context)
    tokens, dim, hidden = SIZES[context.mode]
    rows, clocks, saved = [], {}, {}
    for experts, k in MIXTURES:
        m = mixture(tokens, dim, hidden, experts, k, context.generator())
        few = (experts, k) == MIXTURES[0]
        baselines = {name: layer for name, layer in BASELINES.items() if few or layer is not dense}
        saved = {name: saved_bytes(layer, m) for name, layer in {**baselines, "ScatterMoE": scattered}.items()}
        clocks = {
            name: compare(partial(step, layer, m), partial(step, scattered, m), PAIRS[context.mode], flops=False)
            for name, layer in context.track(baselines.items(), f"{experts} experts, {k} per token")
        }
        for name, layer in baselines.items():
            rows.append(_row(f"{name}, E={experts}, k={k}", layer, m, saved[name], clocks[name], 0))
        rows.append(
            _row(f"ScatterMoE, E={experts}, k={k}", scattered, m, saved["ScatterMoE"], clocks["block padding"], 1)
        )
        if few:
            over_dense, over_loop = clocks["dense"].speedup, clocks["loop and mask"].speedup
    crowded = mixture(tokens, dim, hidden, *MIXTURES[-1], context.generator(), skewed=True)
    crowding = compare(
        partial(step, scattered, crowded), partial(step, scattered, m), PAIRS[context.mode], flops=False
    ).speedup
    padding = clocks["block padding"]
    kept = saved["ScatterMoE"] / saved["block padding"]
    peak = padding.memory_ratio
    return Evidence(
        system="scattermoe",
        claim="more throughput than block-padded copies at a fraction of their training memory, with no token dropped",
        rows=tuple(rows),
        claimed="1.38x the throughput at 66% of the training memory",
        measured=(
            f"{padding.speedup:.2f}x the throughput at {kept:.0%} of the memory kept for backward"
            + (f" ({1 / peak:.0%} at the peak)" if peak else "")
        ),
        holds=verdict(padding.speedup, kept, crowding, apart),
        notes=(
            f"One mixture of MLPs, {tokens} tokens of {dim} channels, {hidden} hidden, forward and backward. The "
            "paper's figures are of a 1.5 G-parameter language model on 8 A100.",
            f"Holds when, with E={MIXTURES[-1][0]} and k={MIXTURES[-1][1]}, a step is faster than with block padding, "
            f"keeps at most {SAVED_ALLOWED:.0%} of its floating-point values for backward, takes at most "
            f"{IMBALANCE_ALLOWED}x the time when tokens crowd, and output and gradients equal the dense mixture's to "
            f"{EXACT:g} in double precision (largest difference {apart:.1g}).",
            f"Tokens that crowd on few experts by Zipf's law take {crowding:.2f}x the time of even ones.",
            f"With E={MIXTURES[0][0]}, k={MIXTURES[0][1]}: {over_dense:.1f}x faster than dense (E / k is "
            f"{MIXTURES[0][0] / MIXTURES[0][1]:.0f}), {over_loop:.2f}x faster than loop and mask.",
            "Speed-ups are ScatterMoE's over each line. Peak memory holds the gradients of the weights, equal for all.",
            _padding_note(context),
        ),
        claimed_ratio=1.381,
        measured_ratio=padding.speedup,
    )


def verdict(speedup: float, kept: float, crowding: float, apart: float) -> bool:
    """Whether the claim holds.

    Args:
        speedup: time with block padding over ScatterMoE's.
        kept: bytes for backward over those of block padding.
        crowding: time with crowded over time with even experts.
        apart: largest difference from the dense mixture in double precision.
    """
    return speedup > 1 and kept <= SAVED_ALLOWED and crowding <= IMBALANCE_ALLOWED and apart <= EXACT


def largest_error(context: ProofContext) -> float:
    """Largest difference of output and gradients from the dense mixture's, in double precision, crowded or not."""
    errors = []
    for skewed in (False, True):
        single = mixture(37, 6, 9, 5, 2, context.generator(), skewed)
        x, first, second, gate = (v.detach().double().requires_grad_() for v in single.leaves)
        m = Mixture(x, first, second, gate, single.expert)
        results = []
        for layer in (scattered, dense):
            y = layer(m)
            results.append([y, *torch.autograd.grad(y.sin().sum(), m.leaves)])
        errors += [float((a - b).detach().abs().max()) for a, b in zip(*results, strict=True)]
    return max(errors)


def step(layer: Layer, m: Mixture) -> tuple[Tensor, ...]:
    """Forward and backward."""
    return torch.autograd.grad(layer(m).square().mean(), m.leaves)


def saved_bytes(layer: Layer, m: Mixture) -> int:
    """Bytes of floating-point values kept for backward beyond tokens, weights and gates themselves."""
    kept: list[Tensor] = []

    def keep(value: Tensor) -> Tensor:
        kept.append(value)
        return value

    with saved_tensors_hooks(keep, lambda value: value):
        y = layer(m)
    there = {v.untyped_storage().data_ptr() for v in m.leaves}
    storages = {v.untyped_storage().data_ptr(): v.untyped_storage().nbytes() for v in kept if v.is_floating_point()}
    del y
    return sum(size for place, size in storages.items() if place not in there)


def padded_rows(counts: tuple[int, ...]) -> tuple[int, int]:
    """Rows with every expert's run padded to whole blocks, and to the largest load.

    >>> padded_rows((128, 1, 0))
    (256, 384)
    """
    return sum(-(-count // BLOCK) * BLOCK for count in counts), max(counts) * len(counts)


def _padding_note(context: ProofContext) -> str:
    dice, slots, parts = context.generator(), 8192, []
    for experts in (8, 32, 128):
        for name, odds in (("even", torch.ones(experts)), ("Zipf", 1 / torch.arange(1, experts + 1))):
            drawn = torch.multinomial(odds.to(dice.device), slots, replacement=True, generator=dice)
            blocks, capacity = padded_rows(Route.of(drawn, experts).counts)
            parts.append(f"E={experts} {name} {blocks / slots:.2f}x and {capacity / slots:.1f}x")
    return f"Rows of {slots} slots padded to blocks of {BLOCK} and to the largest load: {'; '.join(parts)}."


def _places(route: Route, room: tuple[int, ...]) -> Tensor:
    """Where each slot in expert order lies when every expert has the room given. Shape: [S]."""
    device = route.order.device
    counts = torch.tensor(route.counts, device=device)
    shift = torch.tensor(room, device=device).cumsum(0) - torch.tensor(room, device=device) - counts.cumsum(0) + counts
    return torch.arange(len(route.order), device=device) + shift.repeat_interleave(counts)


def _gated(y: Tensor, gate: Tensor) -> Tensor:
    return (y.unflatten(0, gate.shape) * gate[..., None]).sum(1)


def _row(name: str, layer: Layer, m: Mixture, saved: int, clock: Comparison, side: int) -> Row:
    """Figures of one way; it is the baseline (side 0) or the method (side 1) of its comparison."""
    peak = clock.peak_bytes[side]
    with torch.no_grad():
        flops = count_flops(layer, m)
    return Row(
        name,
        gflops_forward=flops / 1e9,
        kept_for_backward_mb=saved / 1e6,
        **({} if peak is None else {"peak_mb": peak / 1e6}),
        step_ms=1e3 * sorted(clock.seconds[side])[len(clock.seconds[side]) // 2],
        speedup_over_it=1.0 if side else clock.speedup,
    )
