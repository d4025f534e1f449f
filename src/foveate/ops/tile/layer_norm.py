"""What stands between two layers of a pre-norm transformer, in one pass over memory.

    total = residual + dropout(x),        y = weight (total - mean) / sqrt(var + eps) + bias

Three kernels read and write each row several times; one reads x and the residual, and writes y and the total. Which
elements dropout keeps is a hash of a seed and the place (row, column), so backward computes the mask again instead of
keeping it, and a seed means the same mask on every device. On the CPU a compiled loop does the same where there is
dropout; without, PyTorch's own two kernels are as fast.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from foveate.errors import InputError
from foveate.ops import fast_allowed
from foveate.ops.threads import in_parts
from foveate.ops.tile import launch, on_triton, power_of_two

WIDEST = 16_384
"""The most channels that one program holds."""

LEAST_ROWS = 64
"""Rows that a thread is given at least."""

_WORD = 0xFFFFFFFF


def add_dropout_norm(
    x: Tensor, residual: Tensor, weight: Tensor, bias: Tensor, dropout: float = 0.0, seed: Tensor | int | None = None,
    eps: float = 1e-5,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Add a layer's output to the residual stream, and normalise the sum for the next layer.

    Args:
        dropout: the share of x that is dropped; the rest is scaled up. Pass 0 outside training.
        seed: which elements are dropped, 0 to 2**31 - 1; default drawn from PyTorch's generator.

    Shape: x and residual [..., C], weight and bias [C] -> (y, total), [..., C] each.
    Raises: InputError for shapes or types that do not fit, or a share outside 0..1.

    >>> y, total = add_dropout_norm(torch.tensor([[1.0, 3.0]]), torch.zeros(1, 2), torch.ones(2), torch.zeros(2))
    >>> y.round(decimals=3), total
    (tensor([[-1.,  1.]]), tensor([[1., 3.]]))
    """
    _check(x, residual, weight, bias, dropout)
    if seed is None or isinstance(seed, int):
        # A seed in memory of the device costs no waiting for it.
        drawn = torch.randint(2**31, (1,), device=x.device) if seed is None and dropout else seed or 0
        seed = torch.as_tensor(drawn, dtype=torch.int64, device=x.device).reshape(1)
    given = (x, residual, weight, bias)
    on_cpu = fast_allowed() and dropout > 0 and all(t.device.type == "cpu" and t.dtype == torch.float32 for t in given)
    if (on_cpu or (on_triton(*given) and x.shape[-1] <= WIDEST)) and x.numel():
        y, total = _Fused.apply(x.flatten(0, -2), residual.flatten(0, -2), weight, bias, dropout, seed, eps)
        return y.view(x.shape), total.view(x.shape)
    return add_dropout_norm_reference(x, residual, weight, bias, dropout, seed, eps)


def add_dropout_norm_reference(
    x: Tensor, residual: Tensor, weight: Tensor, bias: Tensor, dropout: float, seed: Tensor, eps: float = 1e-5
) -> tuple[Tensor, Tensor]:
    """`add_dropout_norm` in plain PyTorch."""
    if dropout:
        mask = kept(x.numel() // x.shape[-1], x.shape[-1], dropout, seed).view(x.shape)
        x = torch.where(mask, x * gain(dropout), 0)
    total = residual + x
    return F.layer_norm(total, total.shape[-1:], weight, bias, eps), total


def kept(rows: int, cols: int, dropout: float, seed: Tensor) -> Tensor:
    """Which elements dropout keeps. Shape: seed [1] -> [rows, cols], true for a share of 1 - dropout."""
    line = _scramble(torch.arange(rows, device=seed.device) & _WORD ^ _scramble(seed & _WORD))
    draw = _scramble(torch.arange(cols, device=seed.device) ^ line[:, None]) >> 8
    return draw >= _threshold(dropout)


def gain(dropout: float) -> float:
    """What kept elements are multiplied by."""
    return 0.0 if dropout >= 1 else 1 / (1 - dropout)


def _threshold(dropout: float) -> int:
    """Draws below it, of 2**24, are dropped."""
    return round(dropout * (1 << 24))


def _scramble(x: Tensor) -> Tensor:
    """A bijection of 32-bit words that leaves no pattern (the integers are 64 bits wide, the upper half empty)."""
    x = (x ^ (x >> 16)) * 0x7FEB352D & _WORD
    x = (x ^ (x >> 15)) * 0x846CA68B & _WORD
    return x ^ (x >> 16)


class _Fused(torch.autograd.Function):
    """The Triton kernels, or the compiled loops, on [rows, C]."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, residual: Tensor, weight: Tensor, bias: Tensor, dropout: float, seed: Tensor, eps: float
    ) -> tuple[Tensor, Tensor]:
        x, residual = x.contiguous(), residual.contiguous()
        y, total = torch.empty_like(x), torch.empty_like(x)
        mean, rstd = (torch.empty(len(x), dtype=torch.float32, device=x.device) for _ in range(2))
        tensors = (x, residual, weight.contiguous(), bias.contiguous(), seed, y, total, mean, rstd)
        rule = _threshold(dropout), gain(dropout)
        if on_triton(x):
            from foveate.ops.tile.kernels.layer_norm import forward

            launch(forward, (_programs(x),), *tensors, *x.shape, eps, *rule, **_options(x, dropout))
        else:
            from foveate.ops.tile import _norm_cpu as loops

            arrays = [t.detach().numpy() for t in tensors]
            in_parts(lambda i, j: loops.forward(*arrays, eps, *rule, i, j), len(x), LEAST_ROWS)
        ctx.save_for_backward(total, weight, mean, rstd, seed)
        ctx.dropout = dropout
        return y, total

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        total, weight, mean, rstd, seed = ctx.saved_tensors
        dy, dtotal = (g.contiguous() for g in gradients)
        dx, dresidual = torch.empty_like(total), torch.empty_like(total)
        tensors = (total, weight.contiguous(), mean, rstd, seed, dy, dtotal, dx, dresidual)
        rule = _threshold(ctx.dropout), gain(ctx.dropout)
        parts = _programs(total)
        sums = torch.empty(2, parts, total.shape[1], device=total.device)
        if on_triton(total):
            from foveate.ops.tile.kernels.layer_norm import backward

            launch(backward, (parts,), *tensors, *sums, *total.shape, *rule, **_options(total, ctx.dropout))
        else:
            from foveate.ops.tile import _norm_cpu as loops

            arrays = [t.detach().numpy() for t in (*tensors, *sums)]
            in_parts(lambda i, j: loops.backward(*arrays, *rule, i, j), parts, 1)
        dweight, dbias = sums.sum(1).to(weight.dtype)
        return dx, dresidual, dweight, dbias, None, None, None


def _programs(x: Tensor) -> int:
    """Programs of a launch, or runs of rows that the compiled backward adds up on their own."""
    if not x.is_cuda:
        return min(len(x), 3 if on_triton(x) else 8)
    return min(len(x), 8 * torch.cuda.get_device_properties(x.device).multi_processor_count)


def _options(x: Tensor, dropout: float) -> dict[str, Any]:
    width = power_of_two(x.shape[1])
    return {"DROP": dropout > 0, "TC": width, "num_warps": 4 if width <= 2048 else 8}


def _check(x: Tensor, residual: Tensor, weight: Tensor, bias: Tensor, dropout: float) -> None:
    if x.dim() < 2 or residual.shape != x.shape or not weight.shape == bias.shape == x.shape[-1:]:
        raise InputError(
            f"add_dropout_norm takes x and residual [..., C], weight and bias [C], got {tuple(x.shape)}, "
            f"{tuple(residual.shape)}, {tuple(weight.shape)} and {tuple(bias.shape)}."
        )
    if not x.dtype == residual.dtype == weight.dtype == bias.dtype or not x.is_floating_point():
        raise InputError(f"add_dropout_norm takes one floating-point type, got {x.dtype}, {residual.dtype}.")
    if not 0 <= dropout <= 1:
        raise InputError(f"dropout is a share of 0 to 1, got {dropout}.")
