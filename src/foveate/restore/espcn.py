"""ESPCN: all convolutions at low resolution, then a fixed permutation makes the picture larger.

Shi et al. 2016, "Real-Time Single Image and Video Super-Resolution Using an Efficient Sub-Pixel Convolutional Neural
Network", arXiv:1609.05158.

    h1 = tanh(conv5x5(y; 1 -> 64)),  h2 = tanh(conv3x3(h1; 64 -> 32)),  out = PS_s(conv3x3(h2; 32 -> s*s)),

PS_s(T)[c, y, x] = T[c*s*s + (y mod s)*s + x mod s, y//s, x//s] (eq. 4, PyTorch channel order). The last layer thus
holds one upscaling filter per output phase and feature map. Only the luminance Y goes through it; Cb and Cr are
enlarged by bicubic interpolation. Per low-resolution pixel it costs 25*64 + 9*64*32 + 9*32*s*s multiply-accumulates.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from foveate.errors import InputError
from foveate.layers.upscaler import Upscaler, enlarge
from foveate.ops.color import rgb_to_ycbcr, ycbcr_to_rgb


class ESPCN(Upscaler):
    """Three layers and a pixel shuffle, on the luminance.

    Args:
        scale: integer enlargement s.
        widths: features of the two hidden layers.
        residual: show the network the luminance less its local 9x9 mean (what it sees around a pixel), and add its
            output to the bicubically enlarged luminance. Not in the paper; it trains in minutes instead of days.
        activation: "tanh" (the paper's) or "relu", which trains faster with `residual`.

    Shape: [B, 3, h, w] RGB, or [B, 1, h, w] luminance, in 0..1 -> [B, 3 or 1, s*h, s*w].
    Raises: InputError for a scale that is no positive integer.
    """

    slug = "espcn"

    def __init__(
        self, scale: int = 3, widths: tuple[int, int] = (64, 32), residual: bool = False, activation: str = "tanh"
    ) -> None:
        super().__init__()
        if int(scale) != scale or scale < 1:
            raise InputError(f"ESPCN needs an integer scale of at least 1, got {scale!r}.")
        if activation not in ("tanh", "relu"):
            raise InputError(f"unknown activation {activation!r}; use 'tanh' or 'relu'.")
        phi = nn.Tanh if activation == "tanh" else nn.ReLU
        self.scale, self.residual, self.halo = int(scale), residual, 8
        self.body = nn.Sequential(
            nn.Conv2d(1, widths[0], 5, padding=2),
            phi(),
            nn.Conv2d(widths[0], widths[1], 3, padding=1),
            phi(),
        )
        self.last = nn.Conv2d(widths[1], self.scale**2, 3, padding=1)
        self.shuffle = nn.PixelShuffle(self.scale)
        if residual:
            for parameter in self.last.parameters():
                nn.init.zeros_(parameter)
        else:
            icnr_(self.last.weight, self.scale)
            nn.init.zeros_(self.last.get_parameter("bias"))  # unequal ones would show as a checkerboard

    def luminance(self, y: Tensor) -> Tensor:
        """Enlarge the luminance. Shape: [B, 1, h, w] -> [B, 1, s*h, s*w]."""
        if not self.residual:
            return self.shuffle(self.last(self.body(y)))
        detail = y - F.avg_pool2d(y, 9, stride=1, padding=4, count_include_pad=False)
        return self.shuffle(self.last(self.body(detail))) + enlarge(y, self.scale, "bicubic")

    def forward(self, x: Tensor) -> Tensor:
        if x.dim() != 4 or x.shape[1] not in (1, 3):
            raise InputError(f"ESPCN takes [B, 3, h, w] or [B, 1, h, w] pictures, got {tuple(x.shape)}.")
        if x.shape[1] == 1:
            return self.luminance(x)
        ycbcr = rgb_to_ycbcr(x)
        return ycbcr_to_rgb(torch.cat([self.luminance(ycbcr[:, :1]), enlarge(ycbcr[:, 1:], self.scale, "bicubic")], 1))

    def parameter_groups(self, lr: float) -> list[dict]:
        """Parameters for an optimiser: the last layer learns ten times slower, as published."""
        return [
            {"params": list(self.body.parameters()), "lr": lr},
            {"params": list(self.last.parameters()), "lr": 0.1 * lr},
        ]


def icnr_(weight: Tensor, scale: int) -> Tensor:
    """Start all s*s phases of a sub-pixel convolution equal, which leaves no checkerboard (Aitken et al. 2017).

    Args:
        weight: [C*s*s, n, k, k], changed in place; each group of s*s filters gets the first filter of the group.
    """
    with torch.no_grad():
        groups = weight.unflatten(0, (-1, scale**2))
        groups.copy_(groups[:, :1].clone().expand_as(groups))
    return weight


def as_transposed(weight: Tensor, scale: int) -> Tensor:
    """The kernel of the transposed convolution (stride s) that equals a sub-pixel convolution.

    A k x k convolution with padding (k-1)/2 and C*s*s outputs followed by the pixel shuffle equals
    `F.conv_transpose2d(x, as_transposed(weight, s), stride=s, padding=s * (k - 1) // 2)`.

    Shape: [C*s*s, n, k, k] -> [n, C, k*s, k*s].
    """
    k = weight.shape[2]
    phases = weight.unflatten(0, (-1, scale, scale)).flip(4, 5)  # [C, s, s, n, k, k]
    return phases.permute(3, 0, 4, 1, 5, 2).reshape(weight.shape[1], -1, k * scale, k * scale)
