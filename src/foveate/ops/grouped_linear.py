"""Grouped expert linear: every row through the matrix of its own expert, read and written where the rows lie.

ParallelLinear of Tan et al. 2024, arXiv:2403.08245 (ScatterMoE). With slots s = t * k + j sorted by expert, place i
holds slot order[i] and belongs to expert e(i):

    y[i] = weight[e(i)] x[read(i)] + bias[e(i)]           read(i)  = i, order[i] or order[i] // k
    out[write(i)] = y[i]                                  write(i) = i or order[i]
    out[t] = sum_j gate[t, j] y[place of slot t * k + j]  where there is a gate

Only indices are sorted. Rows pass through one tile that fits a core's cache, so nothing of the size [S, C] exists but
what was asked for: no padding, no copy of x in expert order, and with a gate not even the k results of an item.

Backward needs neither y nor a sorted x. With d[i] = weight[e(i)].T dout[i], which it computes anyway,

    dgate[order[i]] = <x[read(i)], d[i]> + <bias[e(i)], dout[i]>     dx[read(i)] += gate d[i]
    dweight[e] = sum_i gate dout[i] x[read(i)].T                     dbias[e] = sum_i gate dout[i]

so x, weights and gate are all that is kept.

On the CPU a tile is gathered and multiplied by PyTorch; on CUDA the same is one Triton kernel
(`foveate.ops._grouped_triton`), where Triton is installed.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from foveate.errors import InputError
from foveate.ops import fast_allowed
from foveate.ops.threads import in_parts
from foveate.ops.tile import on_triton

_TILE = 1024
"""Rows at a time on the CPU: enough for a matrix product at full speed, few enough to stay in cache."""

Weights = Tensor | Sequence[Tensor]


class Sorted(Protocol):
    """Slots in expert order, as `foveate.engine.route.Route` holds them."""

    @property
    def order(self) -> Tensor: ...
    @property
    def counts(self) -> tuple[int, ...]: ...
    @property
    def fanout(self) -> int: ...
    @property
    def items(self) -> Tensor: ...
    @property
    def inverse(self) -> Tensor: ...
    def runs(self, chunk: int | None = None) -> Iterator[tuple[int, int, int]]: ...


def grouped_linear(
    x: Tensor,
    weight: Weights,
    route: Sorted,
    bias: Weights | None = None,
    *,
    gate: Tensor | None = None,
    grouped_in: bool = False,
    grouped_out: bool = False,
) -> Tensor:
    """Multiply every row by the matrix of its expert.

    Gradients reach x, weight, bias and gate; an expert without rows gets a gradient of exact zeros.

    Args:
        x: one row per item (read k times), or one per slot: in slot order, or in expert order with `grouped_in`.
        weight: matrices of the experts, stacked or one by one (which spares stacking those of separate layers).
        route: slots sorted by expert, E experts, S = T * k slots (`foveate.engine.route.Route.of`).
        bias: like weight.
        gate: weight of each item's experts; the k results of an item are summed by it.
        grouped_in, grouped_out: rows of x, of the result, are in expert order rather than in slot order.

    Shape: x [T, C] or [S, C], weight [E, O, C], bias [E, O], gate [T, k] -> [S, O], or [T, O] with a gate.
    Raises: InputError when shapes, dtypes or orders do not fit together.
    Source: Tan et al. 2024, arXiv:2403.08245, algorithms 1 and 2.

    >>> from foveate.engine.route import Route
    >>> route = Route.of(torch.tensor([1, 0, 1]), experts=2)
    >>> weight = torch.tensor([[[10.0]], [[-1.0]]])
    >>> grouped_linear(torch.tensor([[1.0], [2.0], [3.0]]), weight, route).flatten()
    tensor([-1., 20., -3.])
    """
    _check(x, weight, route, bias, gate, grouped_in, grouped_out)
    if not fast_allowed():
        return grouped_linear_reference(
            x, weight, route, bias, gate=gate, grouped_in=grouped_in, grouped_out=grouped_out
        )
    if torch.is_autocast_enabled(x.device.type):  # an autograd.Function is not cast by itself, as F.linear is
        low = torch.get_autocast_dtype(x.device.type)
        x, weight, bias = x.to(low), _cast(weight, low), None if bias is None else _cast(bias, low)
    form = Form(route, len(_flat(weight)), grouped_in, grouped_out)
    return _function(x).apply(x, gate, form, *_flat(weight), *(() if bias is None else _flat(bias)))


def grouped_linear_reference(
    x: Tensor,
    weight: Weights,
    route: Sorted,
    bias: Weights | None = None,
    *,
    gate: Tensor | None = None,
    grouped_in: bool = False,
    grouped_out: bool = False,
) -> Tensor:
    """`grouped_linear` in plain PyTorch: sort the rows, one dense layer per expert, put the results back."""
    read = _read(x, route, grouped_in)
    rows = x if read is None else x.index_select(0, read)
    parts = [
        F.linear(part, weight[e], None if bias is None else bias[e])
        for e, part in enumerate(rows.split(list(route.counts)))
    ]
    y = torch.cat(parts)
    if not grouped_out:
        y = y.index_select(0, route.inverse)
    if gate is not None:
        y = (y.unflatten(0, (-1, route.fanout)) * gate.unsqueeze(-1)).sum(1).to(y.dtype)
    return y


@dataclass(frozen=True, eq=False)
class Form:
    """How rows are read and written, and how the flat list of parameters is made of weights and biases.

    Args:
        weights: how many of the parameters are weights: 1 when they are stacked, else E.
    """

    route: Sorted
    weights: int
    grouped_in: bool
    grouped_out: bool

    def read(self, x: Tensor) -> Tensor | None:
        """Row of x at each place, or None when it is the place itself."""
        return _read(x, self.route, self.grouped_in)

    def tiles(self, device: torch.device) -> list[tuple[int, int, int]]:
        """(expert, start, stop) of the runs, cut to what a tile holds."""
        return list(self.route.runs(_TILE if device.type == "cpu" else None))

    def experts(self, parameters: Sequence[Tensor]) -> tuple[Sequence[Tensor], Sequence[Tensor]]:
        """Weights and biases by expert: those of a list, or slices of those that are stacked."""
        weights, biases = parameters[: self.weights], parameters[self.weights :]
        return (
            weights[0].unbind() if weights[0].dim() == 3 else weights,
            biases[0].unbind() if biases and biases[0].dim() == 2 else biases,
        )

    def stacked(self, parameters: Sequence[Tensor]) -> tuple[Tensor, Tensor | None]:
        """Weights [E, O, C] and biases [E, O]; those of a list are copied."""
        weights, biases = parameters[: self.weights], parameters[self.weights :]
        return (
            weights[0] if weights[0].dim() == 3 else torch.stack(list(weights)),
            None if not biases else biases[0] if biases[0].dim() == 2 else torch.stack(list(biases)),
        )

    def apart(self, parameters: Sequence[Tensor], weight: Tensor, bias: Tensor) -> list[Tensor]:
        """Stacked values as a flat list like that of the parameters."""
        weights, biases = parameters[: self.weights], parameters[self.weights :]
        return [
            *((weight,) if weights[0].dim() == 3 else weight.unbind()),
            *(() if not biases else (bias,) if biases[0].dim() == 2 else bias.unbind()),
        ]


def _read(x: Tensor, route: Sorted, grouped_in: bool) -> Tensor | None:
    """Row of x at each place in expert order, or None when it is the place itself. Shape: [S]."""
    if grouped_in:
        return None
    return route.items if len(x) * route.fanout == len(route.order) else route.order


def _function(x: Tensor) -> type[torch.autograd.Function]:
    """What computes it for tensors like x; Triton is imported by the first that needs it."""
    if not on_triton(x):
        return _GroupedLinear
    from foveate.ops._grouped_triton import GroupedTriton

    return GroupedTriton


class _GroupedLinear(torch.autograd.Function):
    """Tile by tile: gather rows, one matrix product, scatter."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, gate: Tensor | None, form: Form, *parameters: Tensor) -> Tensor:
        ctx.save_for_backward(x, gate, *parameters)
        ctx.form = form
        weights, biases = form.experts(parameters)
        route, read, tiles, o = form.route, form.read(x), form.tiles(x.device), weights[0].shape[0]
        rows, results = _Tile(x, x.shape[1], tiles), _Tile(x, o, tiles)
        share = None if gate is None else gate.flatten()[route.order]
        items = route.items if share is not None else route.order
        if share is None:
            out = x.new_empty(len(route.order), o)
        else:
            out = x.new_zeros(len(route.order) // route.fanout, o, dtype=_wide(x.dtype))
        for e, a, b in tiles:
            y = out[a:b] if form.grouped_out else results.first(b - a)
            if biases:
                torch.addmm(biases[e], rows.of(x, read, a, b), weights[e].T, out=y)
            else:
                torch.mm(rows.of(x, read, a, b), weights[e].T, out=y)
            if share is not None:
                _add(out, items[a:b], y, share[a:b])
            elif not form.grouped_out:
                out.index_copy_(0, items[a:b], y)
        return out.to(x.dtype)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, dout: Tensor) -> tuple[Any, ...]:
        x, gate, *parameters = ctx.saved_tensors
        form, (need_x, need_gate, _, *need) = ctx.form, ctx.needs_input_grad
        need_weight, need_bias = any(need[: form.weights]), any(need[form.weights :])
        weights, biases = form.experts(parameters)
        route, read, tiles = form.route, form.read(x), form.tiles(x.device)
        shared = read is not None and len(x) < len(route.order)  # several slots read the same row
        source = None if form.grouped_out else route.order if gate is None else route.items
        rows, ups, downs = _Tile(x, x.shape[1], tiles), _Tile(x, dout.shape[1], tiles), _Tile(x, x.shape[1], tiles)
        share = None if gate is None else gate.flatten()[route.order].to(x.dtype)
        dshare = None if share is None else torch.empty_like(share, dtype=_wide(x.dtype))
        dx = x.new_zeros(x.shape, dtype=_wide(x.dtype)) if shared else x.new_empty(x.shape)
        dparameters = [torch.zeros_like(p, memory_format=torch.contiguous_format) for p in parameters]
        dweights, dbiases = form.experts(dparameters)
        for e, a, b in tiles:
            up = ups.of(dout, source, a, b)
            row = rows.of(x, read, a, b) if need_weight or need_gate else None
            if need_x or need_gate:
                down = torch.mm(up, weights[e], out=dx[a:b] if read is None else downs.first(b - a))
            if dshare is not None and need_gate:
                assert row is not None
                dshare[a:b] = torch.linalg.vecdot(row, down)
                if biases:
                    dshare[a:b] += up @ biases[e]
            if need_x and shared:
                assert read is not None
                _add(dx, read[a:b], down, share if share is None else share[a:b])
            elif need_x:
                if share is not None:
                    down *= share[a:b, None]
                if read is not None:
                    dx.index_copy_(0, read[a:b], down)
            if share is not None and (need_weight or need_bias):
                up = torch.mul(up, share[a:b, None], out=ups.first(b - a))
            if need_weight:
                assert row is not None
                torch.addmm(dweights[e], up.T, row, out=dweights[e])
            if need_bias:
                dbiases[e].add_(up.sum(0))
        dgate = None
        if gate is not None and dshare is not None and need_gate:
            dgate = torch.empty_like(dshare).scatter_(0, route.order, dshare).view(gate.shape).to(gate.dtype)
        asked = [d if n else None for d, n in zip(dparameters, need, strict=True)]
        return dx.to(x.dtype) if need_x else None, dgate, None, *asked


class _Tile:
    """A buffer for the rows of the longest tile, [rows, width], made when first needed."""

    def __init__(self, like: Tensor, width: int, tiles: Sequence[tuple[int, int, int]]) -> None:
        self.like, self.shape = like, (max((b - a for _, a, b in tiles), default=0), width)
        self.buffer: Tensor | None = None

    def first(self, rows: int) -> Tensor:
        if self.buffer is None:
            self.buffer = self.like.new_empty(self.shape)
        return self.buffer[:rows]

    def of(self, x: Tensor, index: Tensor | None, start: int, stop: int) -> Tensor:
        """Rows start..stop of x, or those that the index names there."""
        if index is None:
            return x[start:stop]
        return torch.index_select(x, 0, index[start:stop], out=self.first(stop - start))


def _add(out: Tensor, index: Tensor, rows: Tensor, share: Tensor | None) -> None:
    """out[index[i]] += share[i] rows[i]."""
    if out.device.type == "cpu" and all(t is None or t.dtype == torch.float32 for t in (out, rows, share)):
        ones = torch.ones(1) if share is None else share
        po, pi, pr, ps = out.numpy(), index.numpy(), rows.detach().numpy(), ones.detach().numpy()
        in_parts(lambda a, b: _kernel()(po, pi, pr, ps, a, b), out.shape[1])
        return
    out.index_add_(0, index, (rows if share is None else rows * share[:, None]).to(out.dtype))


@cache
def _kernel() -> Any:
    import numba

    @numba.njit(nogil=True, fastmath={"contract"}, cache=True)
    def add(out, index, rows, share, start, stop):  # type: ignore[no-untyped-def]
        one = share.shape[0] == 1
        for i in range(index.shape[0]):
            target, row, weight = out[index[i]], rows[i], share[0 if one else i]
            for c in range(start, stop):
                target[c] += weight * row[c]

    return add


def _wide(dtype: torch.dtype) -> torch.dtype:
    """What sums are kept in."""
    return torch.float32 if dtype in (torch.bfloat16, torch.float16) else dtype


def _shapes(values: Weights) -> list[tuple[int, ...]]:
    """Shapes that occur among the experts, without taking a stack apart."""
    return sorted({tuple(values.shape[1:])} if isinstance(values, Tensor) else {tuple(v.shape) for v in values})


def _flat(values: Weights) -> tuple[Tensor, ...]:
    return (values,) if isinstance(values, Tensor) else tuple(values)


def _cast(values: Weights, dtype: torch.dtype) -> Weights:
    return values.to(dtype) if isinstance(values, Tensor) else [v.to(dtype) for v in values]


def _check(
    x: Tensor,
    weight: Weights,
    route: Sorted,
    bias: Weights | None,
    gate: Tensor | None,
    grouped_in: bool,
    grouped_out: bool,
) -> None:
    slots, experts, k = len(route.order), len(route.counts), route.fanout
    if x.dim() != 2 or x.shape[0] not in ((slots,) if grouped_in else (slots, slots // k)):
        wanted = f"[{slots}, C]" if grouped_in else f"[{slots // k}, C] or [{slots}, C]"
        raise InputError(f"The route holds {slots} slots, {k} per item; x has shape {tuple(x.shape)}, not {wanted}.")
    shapes = _shapes(weight)
    if len(weight) != experts or any(len(shape) != 2 or shape[1] != x.shape[1] for shape in shapes) or len(shapes) != 1:
        raise InputError(
            f"The route is for {experts} experts and x has {x.shape[1]} channels, so the weight is "
            f"[{experts}, O, {x.shape[1]}]; got {len(weight)} of shape {', '.join(map(str, shapes))}."
        )
    outputs = shapes[0][0]
    if bias is not None and (len(bias) != experts or _shapes(bias) != [(outputs,)]):
        raise InputError(
            f"The bias is [{experts}, {outputs}] like the weight; got {len(bias)} of shape "
            f"{', '.join(map(str, _shapes(bias)))}."
        )
    dtypes = {t.dtype for t in (x, *_flat(weight), *(() if bias is None else _flat(bias)))}
    if len(dtypes) > 1 and not torch.is_autocast_enabled(x.device.type):
        names = ", ".join(sorted(map(str, dtypes)))
        raise InputError(f"x, weight and bias are of one dtype, got {names}; convert one to the other with .to().")
    if gate is not None and gate.shape != (slots // k, k):
        raise InputError(f"The gate has shape {tuple(gate.shape)}, needed is [{slots // k}, {k}].")
    if gate is not None and grouped_out:
        raise InputError("A gate sums the results of an item, so they cannot stay in expert order; drop one of both.")
