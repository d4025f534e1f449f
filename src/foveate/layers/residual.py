"""Residual branches, and the residual block of super-resolution networks."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def add_(x: Tensor, y: Tensor) -> Tensor:
    """x + y; in place on x when no gradient can be asked for, which saves a pass over memory."""
    return x.add_(y) if not torch.is_grad_enabled() else x + y


def relu_(x: Tensor) -> Tensor:
    """ReLU; in place when no gradient can be asked for."""
    return x.relu_() if not torch.is_grad_enabled() else F.relu(x)


class Residual(nn.Module):
    """x + m(x); in training, m is left out for a share `drop` of the pictures (stochastic depth, arXiv:1603.09382).

    Shape: [B, ...] of four axes -> the same.
    """

    def __init__(self, m: nn.Module, drop: float = 0.0) -> None:
        super().__init__()
        self.m, self.drop = m, drop

    def forward(self, x: Tensor) -> Tensor:
        y = self.m(x)
        if self.training and self.drop:
            kept = torch.rand(len(x), 1, 1, 1, device=x.device) >= self.drop
            y = y * (kept / (1 - self.drop)).to(y.dtype)
        return add_(y, x)


class ResidualBlock(nn.Module):
    """x + res_scale * conv3x3(ReLU(conv3x3(x))), the block of EDSR (Lim et al. 2017, arXiv:1707.02921).

    Args:
        channels: C.
        res_scale: weight of the branch; 0.1 steadies very wide networks.

    Shape: [B, C, H, W] -> the same.
    """

    def __init__(self, channels: int, res_scale: float = 1.0) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(channels, channels, 3, padding=1), nn.ReLU(), nn.Conv2d(channels, channels, 3, padding=1)
        )
        self.res_scale = res_scale

    def forward(self, x: Tensor) -> Tensor:
        y = self.body[2](relu_(self.body[0](x)))
        return add_(y if self.res_scale == 1 else y * self.res_scale, x)
