"""The selective scan of state-space models (Mamba, arXiv:2312.00752): a recurrence that the input steers.

For every channel d a state h of N numbers, with rates A < 0 of its own and a step delta, an input gate B and an output
gate C that depend on the token,

    h_t = e^{delta_t A} h_{t-1} + delta_t u_t B_t,        y_t = C_t . h_t + skip u_t.

Written with tensors, backward needs all states of all tokens [B, L, D, N] in memory, many times the input.
The compiled paths (Triton on a GPU, numba on the CPU) hold one state at a time and keep one per chunk of tokens;
backward runs a chunk again before it goes back through it:

    g_t = C_t dy_t + e^{delta_{t+1} A} g_{t+1},   du = delta B . g,   ddelta = u B . g + A . (g e^{delta A} h_{t-1}),
    dA = sum_t delta g e^{delta A} h_{t-1},       dB = sum_d delta u g,                   dC = sum_d dy h.

Where A is one number per head this is `foveate.ops.tile.linear_attention` with decays, made of matrix products.
"""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from foveate.errors import InputError
from foveate.ops import fast_allowed
from foveate.ops.threads import in_parts
from foveate.ops.tile import launch, on_triton, power_of_two

CHUNK = {"cuda": 64, "cpu": 32}
"""Tokens between the states that are kept for backward."""

BLOCK = {"cuda": 32, "cpu": 16}
"""Channels that one program, or one call of the compiled loop, scans together."""


def selective_scan(
    u: Tensor, delta: Tensor, a: Tensor, b: Tensor, c: Tensor, skip: Tensor | None = None
) -> Tensor:  # fmt: skip
    """Run the recurrence over the tokens.

    Args:
        u: what is read in.
        delta: step sizes, above 0 (a model's softplus is applied before).
        a: rates, below 0.
        b, c: how tokens enter and leave the states.
        skip: weights of u itself in the output; default none.

    Shape: u and delta [B, L, D], a [D, N], b and c [B, L, N], skip [D] -> [B, L, D].
    Raises: InputError for shapes or types that do not fit.

    >>> one = torch.ones(1, 3, 1)
    >>> selective_scan(one, one, torch.zeros(1, 1), one, one).flatten()
    tensor([1., 2., 3.])
    """
    _check(u, delta, a, b, c, skip)
    if _compiled(u, delta, a, b, c) and u.numel() and a.numel():
        y = _Scan.apply(u, delta, a, b, c)
    else:
        y = selective_scan_reference(u, delta, a, b, c)
    return y if skip is None else y + skip * u


def selective_scan_reference(
    u: Tensor, delta: Tensor, a: Tensor, b: Tensor, c: Tensor, skip: Tensor | None = None
) -> Tensor:  # fmt: skip
    """`selective_scan` in plain PyTorch, token by token."""
    h = u.new_zeros(len(u), *a.shape)
    ys = []
    for t in range(u.shape[1]):
        step = delta[:, t, :, None]
        h = (step * a).exp() * h + step * u[:, t, :, None] * b[:, t, None, :]
        ys.append((h @ c[:, t, :, None]).squeeze(-1))
    y = torch.stack(ys, 1) if ys else torch.zeros_like(u)
    return y if skip is None else y + skip * u


class _Scan(torch.autograd.Function):
    """The scan by Triton or numba; both keep and use the same states."""

    @staticmethod
    def forward(ctx: Any, *inputs: Tensor) -> Tensor:
        u, _, a, _, _ = given = [t.detach().contiguous() for t in inputs]
        (pictures, length, width), states = u.shape, a.shape[1]
        chunk, block = CHUNK[u.device.type], BLOCK[u.device.type]
        chunks = -(-length // chunk)
        y = torch.empty_like(u)
        starts = torch.empty(pictures, chunks, width, states, device=u.device)
        if on_triton(*given):
            from foveate.ops.tile.kernels.selective_scan import forward

            launch(
                forward, (pictures, -(-width // block)), *given, y, starts, length, width, states, chunks,
                T=chunk, TD=block, TN=power_of_two(states, 1), num_warps=4,
            )  # fmt: skip
        else:
            from foveate.ops.tile import _scan_cpu as loops

            arrays = [t.numpy() for t in (*given, y, starts)]
            _blocks(pictures, width, lambda i, j: loops.forward(*arrays, chunk, block, i, j))
        ctx.save_for_backward(*given, starts)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, ...]:
        *given, starts = ctx.saved_tensors
        u, delta, a, b, _ = given
        (pictures, length, width), states = u.shape, a.shape[1]
        chunk, block = CHUNK[u.device.type], BLOCK[u.device.type]
        dy = gradients[0].contiguous()
        du, ddelta = torch.empty_like(u), torch.empty_like(delta)
        da = torch.empty(pictures, width, states, device=u.device)
        db, dc = (torch.empty(pictures, -(-width // block), length, states, device=u.device) for _ in range(2))
        results = (du, ddelta, da, db, dc)
        if on_triton(*given):
            from foveate.ops.tile.kernels.selective_scan import backward

            scratch = torch.empty(pictures, chunk, width, states, device=u.device)
            launch(
                backward, (pictures, -(-width // block)), *given, dy, starts, scratch, *results,
                length, width, states, starts.shape[1], T=chunk, TD=block, TN=power_of_two(states, 1), num_warps=4,
            )  # fmt: skip
        else:
            from foveate.ops.tile import _scan_cpu as loops

            arrays = [t.numpy() for t in (*given, dy, starts, *results)]
            _blocks(pictures, width, lambda i, j: loops.backward(*arrays, chunk, block, i, j))
        return du, ddelta, da.sum(0).to(a.dtype), db.sum(1).to(b.dtype), dc.sum(1).to(b.dtype)


def _compiled(*given: Tensor) -> bool:
    on_cpu = all(t.device.type == "cpu" and t.dtype == torch.float32 for t in given)
    return on_triton(*given) or (fast_allowed() and on_cpu)


def _blocks(pictures: int, width: int, fn: Any) -> None:
    in_parts(fn, pictures * -(-width // BLOCK["cpu"]), 1)


def _check(u: Tensor, delta: Tensor, a: Tensor, b: Tensor, c: Tensor, skip: Tensor | None) -> None:
    fits = u.dim() == 3 and delta.shape == u.shape and a.dim() == 2 and len(a) == u.shape[2]
    if not fits or not b.shape == c.shape == (*u.shape[:2], a.shape[1]):
        raise InputError(
            f"a selective scan takes u and delta [B, L, D], a [D, N], b and c [B, L, N], got "
            f"{', '.join(str(tuple(t.shape)) for t in (u, delta, a, b, c))}."
        )
    if skip is not None and skip.shape != u.shape[2:]:
        raise InputError(f"skip is [{u.shape[2]}], one weight per channel, got {tuple(skip.shape)}.")
    if not u.is_floating_point() or not u.dtype == delta.dtype == b.dtype == c.dtype:
        raise InputError(f"a selective scan takes one floating-point type, got {u.dtype}, {delta.dtype}, {b.dtype}.")
