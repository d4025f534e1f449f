"""Matrix product with what often follows it, a bias and an activation, while the result is still in registers.

    y = act(a b + bias)

Its gradients are products again: with g = dy act'(a b + bias), da = g b^T, db = a^T g, dbias = sum over rows of g. The
kernel reads transposed operands in place. Output tiles are taken in an order that keeps few rows of a and columns of b
in use at a time, and in shapes that suit the problem (`foveate.ops.thunderkittens.GemmPlan`).
"""

from collections.abc import Callable
from functools import cache
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from foveate.errors import InputError
from foveate.ops.tile import launch, on_triton

if TYPE_CHECKING:
    from foveate.ops.thunderkittens import Machine

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {"relu": F.relu, "silu": F.silu, "gelu": F.gelu}

INTERPRETED = ((32, 32, 32), 2, 3)
"""Tile, rows per group and programs for the interpreter: so few that a program has several tiles."""


def gemm(a: Tensor, b: Tensor, bias: Tensor | None = None, activation: str | None = None) -> Tensor:
    """Multiply, add a bias, apply an activation: act(a @ b + bias).

    Args:
        activation: "relu", "silu" or "gelu" (with erf); None for none.

    Shape: a [..., M, K], b [K, N], bias [N] -> [..., M, N].
    Raises: InputError for shapes or types that do not fit, or an unknown activation.

    >>> gemm(torch.ones(2, 3), torch.ones(3, 1), torch.tensor([-5.0]), "relu").flatten()
    tensor([0., 0.])
    """
    _check(a, b, bias, activation)
    if not on_triton(a, b, bias) or not a.numel() or not b.numel():
        return gemm_reference(a, b, bias, activation)
    return _Gemm.apply(a.flatten(0, -2), b, bias, activation).unflatten(0, a.shape[:-1])


def gemm_reference(a: Tensor, b: Tensor, bias: Tensor | None = None, activation: str | None = None) -> Tensor:
    """`gemm` in plain PyTorch."""
    y = a @ b if bias is None else a @ b + bias
    return ACTIVATIONS[activation](y) if activation else y


class _Gemm(torch.autograd.Function):
    """The Triton product, forward and backward."""

    @staticmethod
    def forward(ctx: Any, a: Tensor, b: Tensor, bias: Tensor | None, activation: str | None) -> Tensor:
        keep = activation is not None and any(ctx.needs_input_grad)
        y, pre = _product(a, b, bias, activation, keep)
        ctx.save_for_backward(a, b, pre)
        ctx.activation = activation
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        a, b, pre = ctx.saved_tensors
        g = gradients[0]
        if ctx.activation:
            with torch.enable_grad():
                leaf = pre.requires_grad_()
                (g,) = torch.autograd.grad(ACTIVATIONS[ctx.activation](leaf), leaf, g)
        wanted = ctx.needs_input_grad
        da = _product(g, b.mT)[0] if wanted[0] else None
        db = _product(a.mT, g)[0] if wanted[1] else None
        return da, db, g.sum(0) if wanted[2] else None, None


def _product(
    a: Tensor, b: Tensor, bias: Tensor | None = None, activation: str | None = None, keep: bool = False
) -> tuple[Tensor, Tensor]:
    """act(a b + bias), and a b + bias where it is to be kept. Shape: [M, K], [K, N] -> [M, N] each."""
    from foveate.ops.thunderkittens import GemmPlan
    from foveate.ops.tile import vocabulary
    from foveate.ops.tile.kernels.gemm import gemm as kernel

    (rows, depth), cols = a.shape, b.shape[1]
    out = a.new_empty(rows, cols)
    pre = torch.empty_like(out) if keep else out
    tile, group, programs, stages = *INTERPRETED, 1
    if a.is_cuda:
        machine = machine_of(a.device.index)
        plan = GemmPlan.best(rows, cols, depth, a.itemsize, machine)
        tile, group, programs, stages = plan.tile, plan.group, machine.processors, plan.stages
    tasks = -(-rows // tile[0]) * -(-cols // tile[1])
    launch(
        kernel, (min(programs, tasks),), a, b, out if bias is None else bias.contiguous(), pre, out,
        rows, cols, depth, *a.stride(), *b.stride(), group,
        ACTIVATION=activation or "", BIAS=bias is not None, KEEP=keep, ELEMENT=vocabulary.element(a),
        PRECISION=vocabulary.precision(), TM=tile[0], TN=tile[1], TK=tile[2],
        num_warps=8 if tile[0] * tile[1] > 64 * 128 else 4, num_stages=stages,
    )  # fmt: skip
    return out, pre


@cache
def machine_of(index: int) -> "Machine":
    """The GPU of that number as far as it tells; rates that it does not tell are an H100's."""
    from foveate.ops.thunderkittens import Machine

    found = torch.cuda.get_device_properties(index)
    shared = getattr(found, "shared_memory_per_block_optin", 96 * 1024)
    return Machine(processors=found.multi_processor_count, shared_bytes=shared)


def _check(a: Tensor, b: Tensor, bias: Tensor | None, activation: str | None) -> None:
    if a.dim() < 2 or b.dim() != 2 or a.shape[-1] != b.shape[0]:
        raise InputError(f"gemm takes [..., M, K] and [K, N], got {tuple(a.shape)} and {tuple(b.shape)}.")
    if bias is not None and bias.shape != b.shape[1:]:
        raise InputError(f"gemm takes a bias [{b.shape[1]}], one per column of b, got {tuple(bias.shape)}.")
    if any(t is not None and t.dtype != a.dtype for t in (b, bias)):
        raise InputError(f"gemm takes numbers of one type, got {a.dtype} and {b.dtype}; convert one of them.")
    if activation is not None and activation not in ACTIVATIONS:
        raise InputError(f"unknown activation {activation!r}; use one of {', '.join(map(repr, ACTIVATIONS))}.")
