"""Divisive normalisation of the first degree: each channel by a weighted sum of the magnitudes of all.

    GDN1    y_i = x_i / (beta_i + sum_j gamma_ij |x_j|)
    IGDN1   y_i = x_i * (beta_i + sum_j gamma_ij |x_j|)       beta, gamma >= 0

Johnston, Eban, Gordon, Balle 2019, Computationally Efficient Neural Image Compression, arXiv:1912.08771, section 3.1:
generalised divisive normalisation (Balle, Laparra, Simoncelli 2016, arXiv:1511.06281) with exponents 1, no root. Both
parameters are stored with any sign and their magnitude is used, which is exact in every arithmetic; none begins at 0,
where a magnitude has no slope.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class GDN1(nn.Module):
    """Normalise channels by each other, or undo it.

    Args:
        channels: C.
        inverse: multiply instead of dividing.

    Shape: [B, C, H, W] -> the same.
    """

    def __init__(self, channels: int, inverse: bool = False) -> None:
        super().__init__()
        self.inverse = inverse
        self.beta = nn.Parameter(torch.ones(channels))
        self.gamma = nn.Parameter(0.1 * torch.eye(channels) + 1e-3)

    def forward(self, x: Tensor) -> Tensor:
        norm = F.conv2d(x.abs(), self.gamma.abs()[:, :, None, None], self.beta.abs())
        return x * norm if self.inverse else x / norm.clamp(min=1e-6)
