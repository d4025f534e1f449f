"""Send each item to its expert and bring the results back in order, at the speed of dense work.

With e[t, j] the j-th expert of item t and s = t * k + j its slot, a stable sort of the slots by expert makes every
expert's items one contiguous run. Then

    y[t] = sum_j gate[t, j] * expert_{e[t, j]}(x[t])

costs one sort, one gather, one dense call per run, one scatter: no item is dropped, padded or copied twice, whatever
the imbalance. Long runs are cut into chunks, so that what an expert computes between its layers stays in cache. Experts
that are linear layers are not called one by one but run as one grouped linear layer (`foveate.ops.grouped_linear`).
The bookkeeping follows Tan et al. 2024, arXiv:2403.08245 (ScatterMoE).
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from foveate.errors import InputError
from foveate.ops.grouped_linear import grouped_linear

Expert = Callable[[Tensor], Tensor]

_CPU_CHUNK = 8192  # rows; 64 float32 channels of them are 2 MB, the size of a core's cache


@dataclass(frozen=True, eq=False)
class Route:
    """Hold which item goes to which expert, sorted once and used for as many layers as share it.

    Args:
        order: slots sorted by expert, [S]; slot s belongs to item s // fanout.
        counts: slots of each expert; they sum to S.
        fanout: k, experts per item.
    """

    order: Tensor
    counts: tuple[int, ...]
    fanout: int = 1

    @classmethod
    def of(cls, expert: Tensor, experts: int) -> "Route":
        """Sort items by expert.

        Args:
            expert: expert of each item, integers in 0..experts-1.
            experts: how many experts there are, E.

        Shape: expert [N] or [N, k].
        Raises: InputError for another rank or dtype, or an expert that does not exist.

        >>> Route.of(torch.tensor([1, 0, 1]), experts=2)
        Route(order=tensor([1, 0, 2]), counts=(1, 2), fanout=1)
        """
        if expert.dim() not in (1, 2) or expert.is_floating_point() or expert.is_complex():
            raise InputError(
                f"A route needs integer expert numbers [N] or [N, k], got {expert.dtype} {tuple(expert.shape)}."
            )
        flat = expert.flatten()
        if flat.numel():
            low, high = (int(v) for v in flat.aminmax())
            if low < 0 or high >= experts:
                raise InputError(f"There are experts 0 to {experts - 1}, but the route names {low} to {high}.")
        # Few experts fit a byte, and sorting bytes is several times faster than sorting int64.
        key = flat.to(torch.uint8 if experts <= 256 else torch.int64)
        order = key.sort(stable=True).indices
        counts = torch.bincount(flat.long(), minlength=experts).tolist()
        return cls(order, tuple(counts), expert.shape[1] if expert.dim() == 2 else 1)

    @property
    def items(self) -> Tensor:
        """Item of each slot in expert order, [S]."""
        return self.order if self.fanout == 1 else self.order // self.fanout

    @property
    def inverse(self) -> Tensor:
        """Place of each slot in expert order, [S]: `inverse[order[i]] == i`."""
        place = torch.arange(len(self.order), device=self.order.device)
        return torch.empty_like(place).scatter_(0, self.order, place)

    def runs(self, chunk: int | None = None) -> Iterator[tuple[int, int, int]]:
        """Walk through (expert, start, stop), the contiguous runs in expert order, cut to at most `chunk` slots."""
        start = 0
        for expert, count in enumerate(self.counts):
            for a in range(start, start + count, chunk or max(count, 1)):
                yield expert, a, min(a + (chunk or count), start + count)
            start += count


def dispatch(
    x: Tensor,
    expert: Tensor | Route,
    experts: Sequence[Expert],
    *,
    gate: Tensor | None = None,
    chunk: int | None = None,
    out_channels: int | None = None,
) -> Tensor:
    """Run each item through its expert, or its k experts.

    Gradients reach x, the gates and the experts' own parameters. An expert without items is not called. Where all
    experts are nn.Linear of one shape, none is: their weights go to `grouped_linear`, which neither sorts the items
    nor keeps k results of each, and one without items gets a gradient of zeros.

    Args:
        x: items; rows of channels, or whole patches or windows with further dimensions.
        expert: expert of each item, or a Route made before.
        experts: callables [n, ...] -> [n, ...'] that treat items independently of each other.
        gate: weight of each item's experts; needed when k > 1, optional when k is 1.
        chunk: greatest number of items in a call; default 8192 on the CPU and no limit elsewhere.
        out_channels: C', needed only where there may be no items and the experts refuse an empty batch.

    Shape: x [N, C] or [N, ...], expert [N] or [N, k], gate like expert -> [N, C'] or [N, ...'].
    Raises: InputError when shapes or experts do not match.

    >>> double, negate = (lambda v: 2 * v), (lambda v: -v)
    >>> dispatch(torch.tensor([[1.0], [2.0], [3.0]]), torch.tensor([0, 1, 0]), [double, negate]).flatten()
    tensor([ 2., -2.,  6.])
    """
    route = expert if isinstance(expert, Route) else Route.of(expert, len(experts))
    _check(x, route, experts, gate, chunk)
    if x.shape[0] == 0:
        return experts[0](x) if out_channels is None else x.new_zeros(0, out_channels)
    if layers := _linear_layers(x, experts, gate, out_channels):
        biases = [e.bias for e in layers if e.bias is not None]
        shares = None if gate is None else gate.reshape(len(x), route.fanout)
        return grouped_linear(x, [e.weight for e in layers], route, biases or None, gate=shares)
    if chunk is None and x.device.type == "cpu":
        chunk = _CPU_CHUNK
    if torch.is_grad_enabled():
        y = _gathered(x, route, experts, chunk, out_channels)
    else:
        y = _scattered(x, route, experts, chunk, out_channels)
    if gate is None:
        return y
    weight = gate.reshape(-1, *[1] * (y.dim() - 1))
    return (weight * y).unflatten(0, (-1, route.fanout)).sum(1)


def _linear_layers(
    x: Tensor, experts: Sequence[Expert], gate: Tensor | None, out_channels: int | None
) -> list[nn.Linear]:
    """The experts, where calling them would do no more than `grouped_linear` does; else none."""
    layers = [e for e in experts if type(e) is nn.Linear]
    if x.dim() != 2 or len(layers) < len(experts):
        return []
    shapes = {(e.weight.shape, e.bias is None) for e in layers}
    dtypes = {t.dtype for e in layers for t in (x, gate, e.weight, e.bias) if t is not None}
    alike = len(shapes) == len(dtypes) == 1 and out_channels in (None, layers[0].out_features)
    # Someone who watches a layer, or has put another function in its place, wants it to be called.
    hooks = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
    watched = any("forward" in vars(e) or any(getattr(e, name) for name in hooks) for e in layers)
    return layers if alike and not watched else []


def _gathered(x: Tensor, route: Route, experts: Sequence[Expert], chunk: int | None, channels: int | None) -> Tensor:
    """Results in slot order by one inverse permutation, whose gradient is again one gather."""
    items = route.items
    parts: list[Tensor] = []
    for e, start, stop in route.runs(chunk):
        parts.append(_run(experts[e], x.index_select(0, items[start:stop]), e, parts[0] if parts else None, channels))
    return torch.cat(parts).index_select(0, route.inverse)


def _scattered(x: Tensor, route: Route, experts: Sequence[Expert], chunk: int | None, channels: int | None) -> Tensor:
    """Results in slot order by writing each chunk to its places while it is still in cache."""
    items, out = route.items, None
    for e, start, stop in route.runs(chunk):
        y = _run(experts[e], x.index_select(0, items[start:stop]), e, out, channels)
        if out is None:
            out = y.new_empty(len(route.order), *y.shape[1:])
        out.index_copy_(0, route.order[start:stop], y)
    assert out is not None
    return out


def _run(expert: Expert, x: Tensor, number: int, like: Tensor | None, channels: int | None) -> Tensor:
    y = expert(x)
    shape = tuple(y.shape[1:])
    if y.shape[:1] != x.shape[:1]:
        raise InputError(f"Expert {number} was given {len(x)} items and returned shape {tuple(y.shape)}.")
    if like is not None and shape != tuple(like.shape[1:]):
        raise InputError(f"Expert {number} returns items of shape {shape}, an earlier one {tuple(like.shape[1:])}.")
    if channels is not None and shape[:1] != (channels,):
        raise InputError(f"Expert {number} returns items of shape {shape}, but out_channels is {channels}.")
    return y


def _check(x: Tensor, route: Route, experts: Sequence[Expert], gate: Tensor | None, chunk: int | None) -> None:
    slots = sum(route.counts)
    if len(route.counts) != len(experts):
        raise InputError(f"The route is for {len(route.counts)} experts, but {len(experts)} were given.")
    if x.dim() < 2 or x.shape[0] * route.fanout != slots:
        raise InputError(f"The route holds {slots} slots, {route.fanout} per item; x has shape {tuple(x.shape)}.")
    if gate is None and route.fanout > 1:
        raise InputError(f"With {route.fanout} experts per item dispatch needs a gate [N, {route.fanout}].")
    if gate is not None and (gate.numel() != slots or gate.shape[:1] != x.shape[:1]):
        raise InputError(f"The gate has shape {tuple(gate.shape)}, needed is [{x.shape[0]}, {route.fanout}].")
    if chunk is not None and chunk < 1:
        raise InputError(f"chunk is at least 1 item, got {chunk}.")
