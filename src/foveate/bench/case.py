"""What is timed: an operator on an input of some size, by its fast path and by every other way to the same result.

Every other way runs in turn with the fast path (`foveate.meter.compare`), so that each ratio comes from one run. The
reference needs no entry: it is the same call while fast paths are switched off. A "backward" pass is a forward and a
backward one, the gradients of all inputs being asked for.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Generator, Tensor
from torch.utils._pytree import tree_leaves

from foveate import ops
from foveate.meter import compare, time_call
from foveate.proofs import ProofContext, environment

SECONDS = {"quick": 0.3, "full": 2.0}
"""What the pairs of one comparison may take, about."""

PAIRS = (3, 25)
"""The least and the most pairs of one comparison."""

FORWARD, BACKWARD = "forward", "backward"
CPU, ALL = ("cpu",), ("cpu", "cuda")

Call = Callable[..., Any]
Entry = dict[str, Any]


def _same(result: Any) -> Any:
    return result


@dataclass(frozen=True)
class Way:
    """Another way to what an operator does.

    Args:
        call: takes the inputs that the operator takes.
        values: turns what it returns into what the operator returns, outside the clock; None where it computes
            something else that serves the same end, as attention does beside another mixer.
        backward: whether gradients can be had.
    """

    call: Call
    values: Callable[[Any], Any] | None = _same
    backward: bool = True


@dataclass(frozen=True)
class Case:
    """An operator on one input.

    Args:
        size: the input in words, such as "4,096 tokens of 512".
        inputs: what the operator and every other way are called with.
        call: the operator.
        baselines: other ways by name; the reference is always one of them.
    """

    size: str
    inputs: tuple[Tensor, ...]
    call: Call
    baselines: Mapping[str, Way] = field(default_factory=dict)

    def ways(self, direction: str) -> dict[str, Way]:
        """The reference, then the baselines that have such a pass."""
        others = {name: way for name, way in self.baselines.items() if direction == FORWARD or way.backward}
        return {"reference": Way(plain(self.call)), **others}


@dataclass(frozen=True)
class Operator:
    """An entry of the list in `foveate.bench.ops`.

    Args:
        name: as in `--op`.
        build: makes the case from a generator (on the device to be used) and n.
        unit: what n counts.
        sizes: n of each case, small to large; the short run takes the first two.
        passes: FORWARD, BACKWARD or both.
        devices: where it has a fast path.
    """

    name: str
    build: Callable[[Generator, int], Case]
    unit: str
    sizes: tuple[int, ...]
    passes: tuple[str, ...] = (FORWARD, BACKWARD)
    devices: tuple[str, ...] = ALL


def measured(operators: Iterable[Operator], context: ProofContext) -> Iterator[Entry]:
    """Time operators on the context's device, one entry for each other way of each pass at each size.

    An entry is `Comparison.to_dict()`, the other way first, with op, pass, size, n, unit, against, device, mode,
    environment, and apart: the largest difference of values over the largest value, None where they are not the same.
    """
    device, where = torch.device(context.device).type, environment(context.device)
    builds = [
        (operator, n)
        for operator in operators
        if device in operator.devices
        for n in (operator.sizes[:2] if context.quick else operator.sizes)
    ]
    for operator, n in context.track(builds, f"operators on {device}"):
        case = operator.build(context.generator(), n)
        for direction in operator.passes:
            for against, way in case.ways(direction).items():
                yield {
                    "op": operator.name,
                    "pass": direction,
                    "size": case.size,
                    "n": n,
                    "unit": operator.unit,
                    "against": against,
                    "device": device,
                    "mode": context.mode,
                    **_compared(case, way, against, direction, SECONDS[context.mode]),
                    "environment": where,
                }


def apart(values: Any, expected: Any) -> float:
    """Largest difference over the largest expected value; of several tensors, the worst. Infinite for other shapes.

    >>> apart([torch.tensor([1.0, 2.0])], (torch.tensor([1.0, 4.0]),))
    0.5
    """
    found, wanted = ([torch.as_tensor(leaf).detach().double() for leaf in tree_leaves(v)] for v in (values, expected))
    if not found or [v.shape for v in found] != [v.shape for v in wanted]:
        return float("inf")
    return max(float((a - b).abs().max() / b.abs().max().clamp_min(1e-30)) for a, b in zip(found, wanted, strict=True))


def plain(call: Call) -> Call:
    """The same call while fast paths are switched off."""

    def run(*inputs: Tensor) -> Any:
        with ops.use("reference"):
            return call(*inputs)

    return run


def _step(call: Call, inputs: tuple[Tensor, ...]) -> Callable[[], Any]:
    """Forward and backward: the result and the gradients of the inputs."""
    leaves = [x.detach().requires_grad_() for x in inputs]

    def step() -> Any:
        with torch.enable_grad():
            y = call(*leaves)
            parts = tree_leaves(y)
            return y, torch.autograd.grad(parts, leaves, [torch.ones_like(part) for part in parts])

    return step


@torch.no_grad()
def _compared(case: Case, way: Way, against: str, direction: str, seconds: float) -> Entry:
    if direction == FORWARD:
        theirs, ours = (lambda: way.call(*case.inputs)), (lambda: case.call(*case.inputs))
    else:
        theirs, ours = _step(way.call, case.inputs), _step(case.call, case.inputs)
    # A first run of each compiles what is to be compiled.
    expected, found = theirs(), ours()
    difference = None if way.values is None else apart(found, way.values(expected))
    del expected, found
    least, most = PAIRS
    pairs = int(seconds / max(time_call(theirs) + time_call(ours), 1e-9))
    clock = compare(theirs, ours, min(max(pairs, least), most), 0, (against, "fast"), flops=False)
    return {**clock.to_dict(), "apart": difference}
