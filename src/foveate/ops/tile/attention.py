"""Softmax attention that never holds the matrix of scores.

    out = softmax(scale q k^T) v

Blocks of keys pass by; a row keeps its largest score m, the sum l of 2^(s - m), and its output so far, and shrinks both
by 2^(m_old - m_new) when a larger score comes (scores hold a factor log2 e, because hardware has 2^x). Backward forms
the probabilities again from the saved log-sums, and with D = rowsum(dout * out)

    dS = P * (dout v^T - D),   dq = scale dS k,   dk = scale dS^T q,   dv = P^T dout.

A query that may see no key at all gets zeros. On the CPU this is PyTorch's own attention.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from foveate.errors import InputError
from foveate.ops import fast_allowed
from foveate.ops.tile import launch, on_triton, power_of_two

LOG2_E = 1.4426950408889634

WIDEST = 256
"""The most channels of a head that the kernel holds."""


def attention(
    q: Tensor, k: Tensor, v: Tensor, causal: bool = False, scale: float | None = None, lengths: Tensor | None = None
) -> Tensor:
    """Attend from queries to keys.

    Args:
        causal: query i sees keys 0 to i only.
        scale: of the scores; default C ** -0.5.
        lengths: how many keys of each batch element count; default all.

    Shape: q [B, H, N, C], k [B, H, M, C], v [B, H, M, D], lengths [B] integers -> [B, H, N, D].
    Raises: InputError for shapes or types that do not fit.

    >>> attention(torch.zeros(1, 1, 2, 4), torch.zeros(1, 1, 2, 4), torch.eye(2)[None, None], causal=True)[0, 0]
    tensor([[1.0000, 0.0000],
            [0.5000, 0.5000]])
    """
    _check(q, k, v, lengths)
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    if on_triton(q, k, v) and q.numel() and v.numel() and max(q.shape[-1], v.shape[-1]) <= WIDEST:
        heads = q.shape[1]
        full = torch.full((len(q),), k.shape[2], device=q.device)
        count = (full if lengths is None else lengths.to(q.device)).to(torch.int32).repeat_interleave(heads)
        flat = (t.flatten(0, 1).contiguous() for t in (q, k, v))
        return _Attention.apply(*flat, count, causal, scale).unflatten(0, (len(q), heads))
    if fast_allowed() and lengths is None:
        return F.scaled_dot_product_attention(q, k, v, is_causal=causal, scale=scale)
    return attention_reference(q, k, v, causal, scale, lengths)


def attention_reference(
    q: Tensor, k: Tensor, v: Tensor, causal: bool = False, scale: float | None = None, lengths: Tensor | None = None
) -> Tensor:
    """`attention` in plain PyTorch."""
    scores = (q @ k.mT) * (q.shape[-1] ** -0.5 if scale is None else scale)
    n, m = scores.shape[-2:]
    place = torch.arange(m, device=q.device)
    hidden = torch.zeros(1, 1, 1, m, dtype=torch.bool, device=q.device)
    if lengths is not None:
        hidden = place >= lengths.to(q.device).view(-1, 1, 1, 1)
    if causal:
        hidden = hidden | (place > torch.arange(n, device=q.device)[:, None])
    lowest = torch.finfo(scores.dtype).min  # finite, so that rows without keys have gradients
    p = scores.masked_fill(hidden, lowest).softmax(-1).masked_fill(hidden, 0)
    return p @ v


class _Attention(torch.autograd.Function):
    """The Triton kernels on [heads, tokens, channels]."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, count: Tensor, causal: bool, scale: float) -> Tensor:
        from foveate.ops.tile.kernels import attention as kernels

        out = q.new_empty(*q.shape[:2], v.shape[2])
        lse = torch.empty(q.shape[:2], dtype=torch.float32, device=q.device)
        options = _options(q, v, causal)
        grid = (-(-q.shape[1] // options["TN"]), len(q))
        sizes = (q.shape[1], k.shape[1], scale * LOG2_E, q.shape[2], v.shape[2])
        launch(kernels.forward, grid, q, k, v, count, out, lse, *sizes, **options)
        ctx.save_for_backward(q, k, v, count, out, lse)
        ctx.causal, ctx.scale = causal, scale
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        from foveate.ops.tile.kernels import attention as kernels

        q, k, v, count, out, lse = ctx.saved_tensors
        dout = gradients[0].contiguous()
        delta = (dout.float() * out.float()).sum(-1)
        dq, dk, dv = (torch.empty_like(t) for t in (q, k, v))
        options = _options(q, v, ctx.causal)
        sizes = (q.shape[1], k.shape[1], ctx.scale * LOG2_E, ctx.scale, q.shape[2], v.shape[2])
        given = (q, k, v, count, dout, lse, delta)
        grids = ((-(-t.shape[1] // options[side]), len(q)) for t, side in ((q, "TN"), (k, "TM")))
        launch(kernels.backward_queries, next(grids), *given, dq, *sizes, **options)
        launch(kernels.backward_keys, next(grids), *given, dk, dv, *sizes, **options)
        return dq, dk, dv, None, None, None


def _options(q: Tensor, v: Tensor, causal: bool) -> dict[str, Any]:
    """What the kernels are compiled for: numbers of 4 bytes, wide heads and the interpreter get smaller blocks."""
    from foveate.ops.tile import vocabulary

    widths = power_of_two(q.shape[2]), power_of_two(v.shape[2])
    side = 64 if q.is_cuda and q.itemsize == 2 and max(widths) <= 128 else 32
    return {
        "CAUSAL": causal, "ELEMENT": vocabulary.element(q), "PRECISION": vocabulary.precision(),
        "TN": side, "TM": side, "TC": widths[0], "TD": widths[1], "num_warps": 4,
    }  # fmt: skip


def _check(q: Tensor, k: Tensor, v: Tensor, lengths: Tensor | None) -> None:
    fits = q.dim() == k.dim() == v.dim() == 4 and q.shape[:2] == k.shape[:2] == v.shape[:2]
    if not fits or q.shape[3] != k.shape[3] or k.shape[2] != v.shape[2]:
        raise InputError(
            f"attention takes q [B, H, N, C], k [B, H, M, C] and v [B, H, M, D], got {tuple(q.shape)}, "
            f"{tuple(k.shape)} and {tuple(v.shape)}."
        )
    if not q.dtype == k.dtype == v.dtype or not q.is_floating_point():
        raise InputError(f"attention takes one floating-point type, got {q.dtype}, {k.dtype} and {v.dtype}.")
    if lengths is not None and (lengths.shape != q.shape[:1] or bool(((lengths < 0) | (lengths > k.shape[2])).any())):
        raise InputError(f"lengths are [{len(q)}] numbers of 0 to {k.shape[2]} keys, got {lengths.tolist()}.")
