"""MLP layers on queries that are a feature plus one of S offsets: relu(a[n] + b[s]) and what follows.

The first layer on a query z = [feature n, offset s] is a sum of two terms, a [N, H] of the feature and b [S, H] of the
offset (with the bias). `hidden` forms relu(a[n] + b[s]) for given queries; `two_layers` applies one more layer without
ever writing the hidden values to memory:

    out[n, s, o] = sum_h relu(a[n, h] + b[s, h]) w[o, h] + bias[o].

`last_layer` is the end of a deeper MLP: ReLU, a narrow layer, and its rows put where they belong.
"""

from functools import cache
from typing import Any

import torch
from torch import Tensor

from foveate.errors import InputError
from foveate.ops import fast_allowed
from foveate.ops.threads import in_parts

_OUTPUTS = 4
"""Sums that the fast path of `two_layers` keeps in registers; more outputs take the reference."""


def _check(*tensors: Tensor) -> None:
    if any(t.dim() != 2 or t.shape[1] != tensors[0].shape[1] for t in tensors):
        raise InputError(f"features, offsets and weights need one width, got {[tuple(t.shape) for t in tensors]}.")


def _fast(*tensors: Tensor) -> bool:
    return (
        fast_allowed()
        and not torch.is_grad_enabled()
        and all(t.device.type == "cpu" and t.dtype == torch.float32 for t in tensors)
    )


def hidden(a: Tensor, b: Tensor, index: Tensor | None = None) -> Tensor:
    """relu(a[n] + b[s]) of all queries, or of those numbered n * S + s in `index`.

    Shape: a [N, H], b [S, H], index [M] int64 -> [N * S, H] or [M, H].
    """
    _check(a, b)
    if not _fast(a, b):
        return hidden_reference(a, b, index)
    m = len(a) * len(b) if index is None else len(index)
    out = torch.empty(m, a.shape[1])
    if m:
        pa, pb, po = a.contiguous().numpy(), b.contiguous().numpy(), out.numpy()
        if index is None:
            in_parts(lambda i, j: _kernels()["all"](pa, pb, i, j, po), len(a), 256)
        else:
            pi = index.numpy()
            in_parts(lambda i, j: _kernels()["some"](pa, pb, pi, i, j, po), m)
    return out


def hidden_reference(a: Tensor, b: Tensor, index: Tensor | None = None) -> Tensor:
    """`hidden` in plain PyTorch."""
    if index is None:
        return torch.relu(a[:, None] + b).flatten(0, 1)
    return torch.relu(a[index // len(b)] + b[index % len(b)])


def two_layers(a: Tensor, b: Tensor, weight: Tensor, bias: Tensor, out: Tensor | None = None) -> Tensor:
    """The second layer's output at every query.

    Fastest where the columns of `a` lie together (a.T is contiguous), as `foveate.layers.implicit.MLP.split` leaves it.

    Args:
        out: [N, S, O], contiguous, written to and returned; needs no gradient.

    Shape: a [N, H], b [S, H], weight [O, H], bias [O] -> [N, S, O].
    """
    _check(a, b, weight)
    if len(bias) != len(weight):
        raise InputError(f"{len(weight)} outputs need as many biases, got {len(bias)}.")
    n, s, o = len(a), len(b), len(weight)
    if out is not None and (out.shape != (n, s, o) or out.dtype != a.dtype or not out.is_contiguous()):
        raise InputError(f"out needs shape {(n, s, o)}, {a.dtype} and no gaps, got {tuple(out.shape)}, {out.dtype}.")
    if not _fast(a, b, weight, bias) or o > _OUTPUTS:
        values = two_layers_reference(a, b, weight, bias)
        return values if out is None else out.copy_(values)
    out = torch.empty(n, s, o) if out is None else out
    if n:
        pa, pb = a.T.contiguous().numpy(), b.contiguous().numpy()
        pw, pc, po = weight.contiguous().numpy(), bias.contiguous().numpy(), out.numpy()
        in_parts(lambda i, j: _two(o)(pa, pb, pw, pc, i, j, po), n, 256)
    return out


def two_layers_reference(a: Tensor, b: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """`two_layers` in plain PyTorch."""
    return torch.addmm(bias, hidden_reference(a, b), weight.T).view(len(a), len(b), len(weight))


def last_layer(
    x: Tensor, weight: Tensor, bias: Tensor, out: Tensor | None = None, index: Tensor | None = None
) -> Tensor:
    """relu(x) @ weight.T + bias.

    Args:
        out: [N, O], contiguous, written to and returned; needs no gradient.
        index: [M] int64, rows of `out` that the results go to; default all in order. Needs `out`.

    Shape: x [M, H], weight [O, H], bias [O] -> [M, O], or `out`.
    """
    _check(x, weight)
    m, o = len(x), len(weight)
    if out is not None and (out.shape[1:] != (o,) or not out.is_contiguous() or (index is None and len(out) != m)):
        raise InputError(f"out needs shape {(m, o)} and no gaps, got {tuple(out.shape)}.")
    if index is not None and (out is None or len(index) != m):
        raise InputError(f"{m} results need an `out` to go to, and as many places there; got {len(index)}.")
    if not _fast(x, weight, bias) or o > _OUTPUTS:
        values = torch.addmm(bias, torch.relu(x), weight.T)
        if out is None:
            return values
        return out.copy_(values) if index is None else out.index_copy_(0, index, values)
    out = torch.empty(m, o) if out is None else out
    if m:
        rows = torch.arange(m) if index is None else index
        arrays = [t.contiguous().numpy() for t in (x, weight, bias, rows)]
        in_parts(lambda i, j: _last(o)(*arrays, i, j, out.numpy()), m, 4096)
    return out


@cache
def _kernels() -> dict[str, Any]:
    import numba
    import numpy as np

    compiled = numba.njit(nogil=True, cache=True)

    @compiled
    def everything(a, b, start, stop, out):  # type: ignore[no-untyped-def]
        s_count = b.shape[0]
        for n in range(start, stop):
            for s in range(s_count):
                row = out[n * s_count + s]
                for h in range(a.shape[1]):
                    row[h] = max(a[n, h] + b[s, h], np.float32(0))

    @compiled
    def some(a, b, index, start, stop, out):  # type: ignore[no-untyped-def]
        s_count = b.shape[0]
        for i in range(start, stop):
            n = index[i] // s_count
            s = index[i] - n * s_count
            for h in range(a.shape[1]):
                out[i, h] = max(a[n, h] + b[s, h], np.float32(0))

    return {"all": everything, "some": some}


def _two(outputs: int) -> Any:
    from foveate.ops._subpixel_cpu import two_layers

    return two_layers(outputs)


@cache
def _last(outputs: int) -> Any:
    """The kernel of `last_layer` for a number of outputs, each summed in a register of its own along H."""
    import numba
    import numpy as np

    zero = np.float32(0)

    @numba.njit(nogil=True, fastmath={"contract", "nsz", "arcp", "reassoc"}, cache=True)
    def last(x, weight, bias, index, start, stop, out):  # type: ignore[no-untyped-def]
        for i in range(start, stop):
            t0 = t1 = t2 = t3 = zero
            for h in range(x.shape[1]):
                v = max(x[i, h], zero)
                t0 += v * weight[0, h]
                if outputs > 1:
                    t1 += v * weight[1, h]
                if outputs > 2:
                    t2 += v * weight[2, h]
                if outputs > 3:
                    t3 += v * weight[3, h]
            row = out[index[i]]
            row[0] = t0 + bias[0]
            if outputs > 1:
                row[1] = t1 + bias[1]
            if outputs > 2:
                row[2] = t2 + bias[2]
            if outputs > 3:
                row[3] = t3 + bias[3]

    return last
