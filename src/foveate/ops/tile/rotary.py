"""Rotary positions (RoFormer, arXiv:2104.09864): pairs of channels turned by an angle that grows with the position.

    (x1, x2) -> (x1 cos - x2 sin, x2 cos + x1 sin),    angle_{n, j} = n base^(-2j / C)

with x1 and x2 the two halves of the channels. Products of queries and keys then depend on the distance alone. A turn's
transpose is the turn back, so the gradient is the same kernel with the sign of the sine changed.
"""

from typing import Any

import torch
from torch import Tensor

from foveate.errors import InputError
from foveate.ops.tile import launch, on_triton, power_of_two


def angles(length: int, channels: int, base: float = 10_000.0, device: Any = None) -> tuple[Tensor, Tensor]:
    """Cosines and sines of positions 0 to length - 1. Shape: [length, channels / 2] each, in float32."""
    if channels % 2:
        raise InputError(f"rotary positions turn pairs of channels, got {channels}; use an even number.")
    speed = base ** (-torch.arange(0, channels, 2, device=device).double() / channels)
    angle = torch.arange(length, device=device).double()[:, None] * speed
    return angle.cos().float(), angle.sin().float()


def rotary(x: Tensor, cosine: Tensor, sine: Tensor) -> Tensor:
    """Turn the channels of each token by its angles. The angles are constants: no gradient reaches them.

    Shape: x [B, H, N, C], cosine and sine [N, C / 2] -> [B, H, N, C].
    Raises: InputError for shapes that do not fit.

    >>> rotary(torch.tensor([[[[1.0, 0.0]]]]), torch.tensor([[0.0]]), torch.tensor([[1.0]])).flatten()
    tensor([0., 1.])
    """
    if x.dim() != 4 or not cosine.shape == sine.shape == (x.shape[2], x.shape[3] // 2) or x.shape[3] % 2:
        raise InputError(
            f"rotary takes x [B, H, N, C] with C even and angles [N, C / 2], got {tuple(x.shape)}, "
            f"{tuple(cosine.shape)} and {tuple(sine.shape)}."
        )
    if on_triton(x, cosine, sine) and x.numel():
        return _Rotary.apply(x, cosine.detach().contiguous(), sine.detach().contiguous(), 1.0)
    return rotary_reference(x, cosine.detach(), sine.detach())


def rotary_reference(x: Tensor, cosine: Tensor, sine: Tensor) -> Tensor:
    """`rotary` in plain PyTorch."""
    first, second = x.chunk(2, -1)
    return torch.cat((first * cosine - second * sine, second * cosine + first * sine), -1).to(x.dtype)


class _Rotary(torch.autograd.Function):
    """The Triton kernel; backward turns the other way."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, cosine: Tensor, sine: Tensor, sign: float) -> Tensor:
        from foveate.ops.tile.kernels.rotary import rotate

        ctx.save_for_backward(cosine, sine)
        ctx.sign = sign
        x = x.contiguous()
        out, half, tokens = torch.empty_like(x), x.shape[3] // 2, 32
        grid = (-(-x.shape[2] // tokens), x.shape[0] * x.shape[1])
        launch(rotate, grid, x, cosine, sine, out, x.shape[2], half, sign, TN=tokens, TH=power_of_two(half, 1))
        return out

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        return _Rotary.apply(gradients[0], *ctx.saved_tensors, -ctx.sign), None, None, None
