"""Causal attention without softmax, in chunks: work linear in the tokens, and nearly all of it matrix products.

    out_t = sum_{i <= t} w_ti (q_t . k_i) v_i,        w_ti = exp(g_{i+1} + ... + g_t)

with log-decays g <= 0, one per head and token, or none (w = 1). Token by token it is a state S (C x D),

    S_t = e^{g_t} S_{t-1} + k_t v_t^T,    out_t = S_t^T q_t,

which no matrix unit likes; as a matrix of N x N weights it is quadratic. A chunk of T tokens takes from both, with
G_t = g_1 + ... + g_t counted within it:

    out = (tril(q k^T) * e^{G_t - G_i}) v + e^{G_t} q S,        S <- e^{G_T} S + sum_i e^{G_T - G_i} k_i v_i^T.

With decays this is also the state-space model of Mamba-2 (arXiv:2405.21060): q = C, k = B, v = dt x, g = dt A.
Gradients have the same form, forwards and backwards in time, so they are three more calls:

    dq = mix(dout, v, k),   dk = mix'(v, dout, q),   dv = mix'(k, q, dout),
    dg_s = sum_{t >= s} (q_t . dq_t - k_t . dk_t),

where mix' runs from the last token to the first. `taylor_features` makes q . k the second-order Taylor polynomial of
exp(q . k / sqrt(d)) (Based, arXiv:2402.18668).
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from foveate.errors import InputError
from foveate.ops import fast_allowed
from foveate.ops.tile import launch, on_triton, power_of_two

CHUNK = 64
"""Tokens per chunk: as many as a head has channels, give or take, balances the two products."""


def linear_attention(
    q: Tensor, k: Tensor, v: Tensor, decay: Tensor | None = None, normalize: bool = False, chunk: int = CHUNK
) -> Tensor:
    """Attend causally with weights q . k, which may fade with distance.

    Args:
        decay: g, logarithms of what is kept from one token to the next; default nothing is lost.
        normalize: divide by the sum of a query's weights, for features that make it positive.
        chunk: T; the result does not depend on it.

    Shape: q and k [B, H, N, C], v [B, H, N, D], decay [B, H, N] -> [B, H, N, D].
    Raises: InputError for shapes or types that do not fit, or a chunk below one token.

    >>> one = torch.ones(1, 1, 4, 1)
    >>> linear_attention(one, one, one).flatten()
    tensor([1., 2., 3., 4.])
    """
    _check(q, k, v, decay)
    if chunk < 1:
        raise InputError(f"a chunk has at least one token, got {chunk}.")
    if normalize:
        v = F.pad(v, (0, 1), value=1.0)
    out = _Mix.apply(q, k, v, decay, False, chunk) if fast_allowed() else linear_attention_reference(q, k, v, decay)
    return out[..., :-1] / out[..., -1:] if normalize else out


def linear_attention_reference(q: Tensor, k: Tensor, v: Tensor, decay: Tensor | None = None) -> Tensor:
    """`linear_attention` in plain PyTorch, by the matrix of all weights."""
    weights = q @ k.mT
    if decay is None:
        return weights.tril() @ v
    since = decay.cumsum(-1)
    apart = since[..., :, None] - since[..., None, :]
    later = torch.ones_like(weights, dtype=torch.bool).triu(1)
    return (weights * apart.masked_fill(later, -torch.inf).exp()) @ v


def linear_attention_recurrent(q: Tensor, k: Tensor, v: Tensor, decay: Tensor | None = None) -> Tensor:
    """`linear_attention` token by token, as it is written first above; what decoding does."""
    state = q.new_zeros(*q.shape[:2], q.shape[3], v.shape[3])
    outs = []
    for t in range(q.shape[2]):
        if decay is not None:
            state = state * decay[:, :, t, None, None].exp()
        state = state + k[:, :, t, :, None] * v[:, :, t, None, :]
        outs.append((q[:, :, t, None, :] @ state).squeeze(2))
    return torch.stack(outs, 2)


def taylor_features(x: Tensor) -> Tensor:
    """[1, x / d^(1/4), (x outer x) / sqrt(2 d)], so that phi(q) . phi(k) = 1 + s + s^2 / 2 with s = q . k / sqrt(d).

    Shape: [..., d] -> [..., 1 + d + d * d].
    """
    d = x.shape[-1]
    squares = (x[..., :, None] * x[..., None, :]).flatten(-2) / (2 * d) ** 0.5
    return torch.cat((torch.ones_like(x[..., :1]), x * d**-0.25, squares), -1)


class _Mix(torch.autograd.Function):
    """mix, or mix' where `reverse`; its gradients are itself again, any number of times."""

    @staticmethod
    def forward(
        ctx: Any, q: Tensor, k: Tensor, v: Tensor, decay: Tensor | None, reverse: bool, chunk: int
    ) -> Tensor:  # fmt: skip
        ctx.save_for_backward(q, k, v, decay)
        ctx.reverse, ctx.chunk = reverse, chunk
        if on_triton(q, k, v) and q.numel() and v.numel():
            return _tiled(q, k, v, decay, reverse)
        if not reverse:
            return _chunked(q, k, v, decay, chunk)
        if decay is not None:
            decay = F.pad(decay.flip(2)[:, :, :-1], (1, 0))
        return _chunked(q.flip(2), k.flip(2), v.flip(2), decay, chunk).flip(2)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, decay = ctx.saved_tensors
        (g,), same, other, chunk = gradients, ctx.reverse, not ctx.reverse, ctx.chunk
        dq = _Mix.apply(g, v, k, decay, same, chunk)
        dk = _Mix.apply(v, g, q, decay, other, chunk)
        dv = _Mix.apply(k, q, g, decay, other, chunk)
        if decay is None or not ctx.needs_input_grad[3]:
            return dq, dk, dv, None, None, None
        wide = torch.promote_types(q.dtype, torch.float32)
        rows, cols = ((a.to(wide) * b.to(wide)).sum(-1) for a, b in ((q, dq), (k, dk)))
        change = cols - rows if same else rows - cols
        ddecay = change.flip(-1).cumsum(-1).flip(-1)
        return dq, dk, dv, ddecay.to(decay.dtype), None, None


def _tiled(q: Tensor, k: Tensor, v: Tensor, decay: Tensor | None, reverse: bool) -> Tensor:
    """By the Triton kernel."""
    from foveate.ops.tile import vocabulary
    from foveate.ops.tile.kernels.linear_attention import mix

    heads, (n, c), d = q.shape[0] * q.shape[1], q.shape[2:], v.shape[3]
    widths = (min(64, power_of_two(c)), min(64, power_of_two(d)))
    blocks, columns = -(-c // widths[0]), -(-d // widths[1])
    out = q.new_empty(blocks, heads, n, d, dtype=torch.float32 if blocks > 1 else q.dtype)
    launch(
        mix, (heads, blocks, columns), *(t.contiguous() for t in (q, k, v, v if decay is None else decay)), out,
        n, c, d, REVERSE=reverse, DECAY=decay is not None, ELEMENT=vocabulary.element(q),
        PRECISION=vocabulary.precision(), T=64 if q.is_cuda and q.itemsize == 2 else 32, TC=widths[0], TD=widths[1],
        num_warps=4,
    )  # fmt: skip
    return out.sum(0).to(q.dtype).view(*v.shape)


def _chunked(q: Tensor, k: Tensor, v: Tensor, decay: Tensor | None, chunk: int) -> Tensor:
    """By chunks, all at once but for the states that pass from one to the next."""
    n = q.shape[2]
    chunk = max(1, min(chunk, n))
    short = -n % chunk
    q, k, v = (F.pad(t, (0, 0, 0, short)).unflatten(2, (-1, chunk)) for t in (q, k, v))
    weights = q @ k.mT
    if decay is None:
        added = k.mT @ v
        before = F.pad(added.cumsum(2)[:, :, :-1], (0, 0, 0, 0, 1, 0))
        return (weights.tril_().matmul(v) + q @ before).flatten(2, 3)[:, :, :n]
    since = F.pad(decay, (0, short)).unflatten(2, (-1, chunk)).cumsum(-1)
    whole = since[..., -1:]
    later = torch.ones(chunk, chunk, dtype=torch.bool, device=q.device).triu_(1)
    weights *= (since[..., :, None] - since[..., None, :]).masked_fill_(later, -torch.inf).exp_()
    added = k.mT @ (v * (whole - since).exp()[..., None])
    keep = whole.exp()[..., None]
    before = torch.zeros_like(added)
    for i in range(1, added.shape[2]):
        torch.addcmul(added[:, :, i - 1], keep[:, :, i - 1], before[:, :, i - 1], out=before[:, :, i])
    return (weights @ v + (q * since.exp()[..., None]) @ before).flatten(2, 3)[:, :, :n]


def _check(q: Tensor, k: Tensor, v: Tensor, decay: Tensor | None) -> None:
    if q.dim() != 4 or q.shape != k.shape or v.dim() != 4 or v.shape[:3] != q.shape[:3]:
        raise InputError(
            f"linear attention takes q and k [B, H, N, C] and v [B, H, N, D], got {tuple(q.shape)}, {tuple(k.shape)} "
            f"and {tuple(v.shape)}."
        )
    if decay is not None and decay.shape != q.shape[:3]:
        raise InputError(f"decays are [B, H, N] = {tuple(q.shape[:3])}, got {tuple(decay.shape)}.")
    if not q.dtype == k.dtype == v.dtype or not q.is_floating_point():
        raise InputError(f"linear attention takes one floating-point type, got {q.dtype}, {k.dtype} and {v.dtype}.")
