# mypy: allow-untyped-defs
"""Grouped expert linear as Triton kernels: rows are read and written through their indices inside the matrix product.

After the kernels of Tan et al. 2024, arXiv:2403.08245. Slots sorted by expert are cut into tiles of one expert each, so
nothing is padded in memory: the last tile of an expert only leaves lanes idle. Two kernels serve all products,

    product    out[write(i)] = weight[e(i)] x[read(i)] + bias[e(i)]          forward; gradient of x, with weight.T
    outer      dweight[e] = sum_i share[i] up[up_read(i)] x[read(i)].T       dbias[e] = sum_i share[i] up[up_read(i)]

with sums in float32. The k results of an item are added in order, not by atomic additions: same input, same bits.
`foveate.ops.grouped_linear` imports this module where it is given CUDA tensors.
"""

from typing import TYPE_CHECKING, Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from foveate.ops.tile import launch
from foveate.ops.tile import vocabulary as tiles

if TYPE_CHECKING:
    from foveate.ops.grouped_linear import Form, Sorted

BLOCKS = {2: (128, 128, 32), 4: (64, 64, 32)}
"""Lanes of the two sides of a product and of the sum inside, by bytes of a number."""


class GroupedTriton(torch.autograd.Function):
    """`grouped_linear` for checked arguments of one type."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, gate: Tensor | None, form: "Form", *parameters: Tensor) -> Tensor:
        ctx.save_for_backward(x, gate, *parameters)
        ctx.form = form
        weight, bias = form.stacked(parameters)
        y = product(x, weight, form.route, bias, form.read(x), None if form.grouped_out else form.route.order)
        return y if gate is None else _mixed(y, gate)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, dout: Tensor) -> tuple[Any, ...]:
        x, gate, *parameters = ctx.saved_tensors
        form, (need_x, need_gate, _, *need) = ctx.form, ctx.needs_input_grad
        (weight, bias), route, read = form.stacked(parameters), form.route, form.read(x)
        source = None if form.grouped_out else route.order if gate is None else route.items
        share = None if gate is None else gate.flatten()[route.order].to(x.dtype)
        dx = dgate = None
        if need_x or need_gate:
            # What flows to each row that was read, before gates: in slot order, or in expert order where x is.
            down = product(dout, weight.mT, route, None, source, None if form.grouped_in else route.order)
            if gate is not None and need_gate:
                dgate = _gate_gradient(x, down, dout, bias, gate, form)
            if need_x and len(x) < len(down):
                dx = down.unflatten(0, (len(x), -1)).sum(1) if gate is None else _mixed(down, gate)
            elif need_x:
                dx = down
                if gate is not None and share is not None:
                    dx *= (share if form.grouped_in else gate.flatten().to(x.dtype))[:, None]
        grads: list[Tensor | None] = [None] * len(parameters)
        if any(need):
            dweight, dbias = outer(dout, x, route, source, read, share)
            parts = form.apart(parameters, dweight, dbias)
            grads = [part if asked else None for part, asked in zip(parts, need, strict=True)]
        return dx, dgate, None, *grads


def product(
    x: Tensor, weight: Tensor, route: "Sorted", bias: Tensor | None, read: Tensor | None, write: Tensor | None
) -> Tensor:
    """Multiply row read(i) by the matrix of the expert at place i, and write the result to row write(i).

    Args:
        read, write: int64 row of each place in expert order; None for the place itself.

    Shape: x [R, C], weight [E, O, C] with any strides, bias [E, O], read and write [S] -> [S, O].
    """
    m, n, k = BLOCKS[x.element_size()]
    out = x.new_empty(len(route.order), weight.shape[1])
    runs = torch.tensor(list(route.runs(m)), dtype=torch.int64).to(x.device)
    if out.numel():
        launch(
            _product, (len(runs), triton.cdiv(out.shape[1], n)),
            x, weight, None if bias is None else bias.contiguous(), out, read, write, runs,
            len(x), len(out), *weight.shape[1:], *x.stride(), *weight.stride(),
            M=m, N=n, K=k, ELEMENT=tiles.element(x), PRECISION=tiles.precision(), num_warps=n // 16,
        )  # fmt: skip
    return out


def outer(
    up: Tensor, x: Tensor, route: "Sorted", up_read: Tensor | None, read: Tensor | None, share: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Sum the outer products of two rows over the places of each expert, and the first rows themselves.

    Shape: up [R, O], x [Q, C], up_read, read and share [S] -> [E, O, C], [E, O].
    """
    n, k, m = BLOCKS[x.element_size()]  # rows are what is summed over
    experts = len(route.counts)
    dweight, dbias = x.new_empty(experts, up.shape[1], x.shape[1]), x.new_empty(experts, up.shape[1])
    edges = torch.tensor((0, *route.counts)).cumsum(0).to(x.device)
    launch(
        _outer, (triton.cdiv(up.shape[1], n), triton.cdiv(x.shape[1], k), experts),
        up, x, share, dweight, dbias, up_read, read, edges,
        len(up), len(x), *dweight.shape[1:], *up.stride(), *x.stride(),
        M=m, N=n, K=k, ELEMENT=tiles.element(x), PRECISION=tiles.precision(), num_warps=n // 16,
    )  # fmt: skip
    return dweight, dbias


def _mixed(rows: Tensor, gate: Tensor) -> Tensor:
    """Sum the rows of each item by its gates. Shape: [T * k, C], [T, k] -> [T, C]."""
    return (gate.to(rows.dtype)[:, None] @ rows.unflatten(0, gate.shape)).squeeze(1)


def _gate_gradient(x: Tensor, down: Tensor, dout: Tensor, bias: Tensor | None, gate: Tensor, form: "Form") -> Tensor:
    """<x, down> + <bias, dout> of every slot. Shape: [T, k]."""
    order = form.route.order
    if len(x) < len(down):
        slots = (down.unflatten(0, gate.shape) @ x[..., None]).squeeze(-1)
    else:
        places = torch.linalg.vecdot(x, down)
        slots = (torch.empty_like(places).scatter_(0, order, places) if form.grouped_in else places).view(gate.shape)
    if bias is not None:
        counts = torch.tensor(form.route.counts, device=order.device)
        expert = torch.arange(len(counts), device=order.device).repeat_interleave(counts)
        slots = slots + (dout @ bias.T).gather(1, torch.empty_like(order).scatter_(0, order, expert).view(gate.shape))
    return slots.to(gate.dtype)


@triton.jit
def _rows(index, place, live, beyond):
    """Row at each place; a dead lane is given one that lies outside."""
    row = place
    if index is not None:
        row = tl.load(index + place, mask=live, other=0)
    return tl.where(live, row, beyond)


@triton.jit
def _product(
    x, weight, bias, out, read, write, runs, height, slots, outs, width, x_row, x_col, w_expert, w_out, w_in,
    M: tl.constexpr, N: tl.constexpr, K: tl.constexpr, ELEMENT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    run = runs + 3 * tl.program_id(0)
    expert, start, stop = tl.load(run), tl.load(run + 1), tl.load(run + 2)
    place = start + tl.arange(0, M)
    source = _rows(read, place, place < stop, height)
    target = _rows(write, place, place < stop, slots)
    o = tl.program_id(1) * N + tl.arange(0, N)
    total = tl.zeros((M, N), tl.float32)
    for first in range(0, width, K):
        c = first + tl.arange(0, K)
        row = tiles.load(x, source, c, x_row, x_col, height, width).to(ELEMENT)
        matrix = tiles.load(weight + expert * w_expert, c, o, w_in, w_out, width, outs).to(ELEMENT)
        total = tiles.mma_AB(total, row, matrix, PRECISION)
    if bias is not None:
        total = tiles.add_row(total, tiles.load_vector(bias + expert * outs, o, 1, outs))
    tiles.store(out, total, target, o, outs, 1, slots, outs)


@triton.jit
def _outer(
    up, x, share, dweight, dbias, up_read, read, edges, above, height, outs, width, up_row, up_col, x_row, x_col,
    M: tl.constexpr, N: tl.constexpr, K: tl.constexpr, ELEMENT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    expert = tl.program_id(2).to(tl.int64)
    start, stop = tl.load(edges + expert), tl.load(edges + expert + 1)
    o, c = tl.program_id(0) * N + tl.arange(0, N), tl.program_id(1) * K + tl.arange(0, K)
    total, sums = tl.zeros((N, K), tl.float32), tl.zeros((N,), tl.float32)
    for first in range(start, stop, M):
        place = first + tl.arange(0, M)
        live = place < stop
        upper = tiles.load(up, _rows(up_read, place, live, above), o, up_row, up_col, above, outs).to(ELEMENT)
        row = tiles.load(x, _rows(read, place, live, height), c, x_row, x_col, height, width).to(ELEMENT)
        if share is not None:
            upper = tiles.mul_col(upper, tiles.load_vector(share, place, 1, stop)).to(ELEMENT)
        total = tiles.mma_AtB(total, upper, row, PRECISION)
        sums += tiles.col_sum(upper.to(tl.float32))
    tiles.store(dweight + expert * outs * width, total, o, c, width, 1, outs, width)
    if tl.program_id(1) == 0:
        tiles.store_vector(dbias + expert * outs, sums, o, 1, outs)
