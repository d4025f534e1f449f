"""MLP layers on queries that are a feature plus one of S offsets: relu(a[n] + b[s]) and what follows.

The first layer on a query z = [feature n, offset s] is a sum of two terms, a [N, H] of the feature and b [S, H] of the
offset (with the bias). `hidden` forms relu(a[n] + b[s]) for given queries; `two_layers` applies one more layer without
ever writing the hidden values to memory:

    out[n, s, o] = sum_h relu(a[n, h] + b[s, h]) w[o, h] + bias[o].
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


def two_layers(a: Tensor, b: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """The second layer's output at every query.

    Shape: a [N, H], b [S, H], weight [O, H], bias [O] -> [N, S, O].
    """
    _check(a, b, weight)
    if len(bias) != len(weight):
        raise InputError(f"{len(weight)} outputs need as many biases, got {len(bias)}.")
    if not _fast(a, b, weight, bias) or len(weight) > _OUTPUTS:
        return two_layers_reference(a, b, weight, bias)
    n, s, o = len(a), len(b), len(weight)
    out = torch.empty(n, s, o)
    if n:
        pa, pb = a.contiguous().numpy(), b.contiguous().numpy()
        pw, pc, po = weight.contiguous().numpy(), bias.contiguous().numpy(), out.numpy()
        in_parts(lambda i, j: _two(o)(pa, pb, pw, pc, i, j, po), n, 256)
    return out


def two_layers_reference(a: Tensor, b: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """`two_layers` in plain PyTorch."""
    return torch.addmm(bias, hidden_reference(a, b), weight.T).view(len(a), len(b), len(weight))


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


@cache
def _two(outputs: int) -> Any:
    """The kernel for a number of outputs, each summed in a register of its own along H."""
    import numba
    import numpy as np

    @numba.njit(nogil=True, fastmath={"contract", "nsz", "arcp", "reassoc"}, cache=True)
    def two(a, b, weight, bias, start, stop, out):  # type: ignore[no-untyped-def]
        for n in range(start, stop):
            for s in range(b.shape[0]):
                t0 = t1 = t2 = t3 = np.float32(0)
                for h in range(a.shape[1]):
                    v = max(a[n, h] + b[s, h], np.float32(0))
                    t0 += v * weight[0, h]
                    if outputs > 1:
                        t1 += v * weight[1, h]
                    if outputs > 2:
                        t2 += v * weight[2, h]
                    if outputs > 3:
                        t3 += v * weight[3, h]
                out[n, s, 0] = t0 + bias[0]
                if outputs > 1:
                    out[n, s, 1] = t1 + bias[1]
                if outputs > 2:
                    out[n, s, 2] = t2 + bias[2]
                if outputs > 3:
                    out[n, s, 3] = t3 + bias[3]

    return two
