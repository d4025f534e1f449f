"""Transforms of learned codecs: pictures to latents, and latents to pictures at three prices.

    Analysis     convolutions with stride, bottleneck blocks and attention, after ELIC (He et al. 2022,
                 arXiv:2203.10886), where wanted beside a linear transform of whole patches
    JpegLike     one transposed convolution of stride 16: a learned block transform, overlapping where kernel > stride
    TwoLayer     h = IGDN1(up8(y)) + up8'(y),  x = up2(h), with 12 channels between
    Deep         four transposed convolutions with IGDN1 between them, as in the mean-scale hyperprior (Minnen, Balle,
                 Toderici 2018, arXiv:1809.02736); the heavy decoder that the shallow ones stand in for

All halve or double sizes exactly: a side n of latents is a side 16 n of the picture.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from foveate.layers.gdn import GDN1
from foveate.layers.residual import Residual

FACTOR = 16
"""Pixels per latent, along each side."""


def down(inputs: int, outputs: int, kernel: int, stride: int = 1) -> nn.Conv2d:
    """A convolution from a side n to n / stride."""
    return nn.Conv2d(inputs, outputs, kernel, stride, (kernel - stride + 1) // 2)


class Up(nn.ConvTranspose2d):
    """A transposed convolution from a side n to n * stride; what overlaps the border is cut off, more at the end."""

    def __init__(self, inputs: int, outputs: int, kernel: int, stride: int = 1) -> None:
        super().__init__(inputs, outputs, kernel, stride)

    def forward(self, x: Tensor, output_size: list[int] | None = None) -> Tensor:
        return self.cut(super().forward(x, output_size))

    def cut(self, full: Tensor) -> Tensor:
        """The part of the full result that belongs to the input's frame."""
        extra = self.kernel_size[0] - self.stride[0]
        first, last = extra // 2, extra - extra // 2
        return full[..., first : full.shape[-2] - last, first : full.shape[-1] - last]


def bottleneck(channels: int) -> Residual:
    """x + conv1x1(ReLU(conv3x3(ReLU(conv1x1(x))))), half as wide inside."""
    half = channels // 2
    return Residual(
        nn.Sequential(
            nn.Conv2d(channels, half, 1),
            nn.ReLU(),
            nn.Conv2d(half, half, 3, padding=1),
            nn.ReLU(),
            nn.Conv2d(half, channels, 1),
        )
    )


class Attention(nn.Module):
    """x + trunk(x) * sigmoid(conv1x1(branch(x))), trunk and branch of `blocks` bottlenecks each."""

    def __init__(self, channels: int, blocks: int = 3) -> None:
        super().__init__()
        self.trunk = nn.Sequential(*(bottleneck(channels) for _ in range(blocks)))
        self.branch = nn.Sequential(*(bottleneck(channels) for _ in range(blocks)), nn.Conv2d(channels, channels, 1))

    def forward(self, x: Tensor) -> Tensor:
        return x + self.trunk(x) * self.branch(x).sigmoid()


class Stage(NamedTuple):
    """A part of an analysis: a convolution with stride, bottlenecks, and attention where `attention` is above 0."""

    channels: int
    kernel: int
    stride: int
    blocks: int
    attention: int


ELIC = (Stage(192, 5, 2, 3, 0), Stage(192, 5, 2, 3, 3), Stage(192, 5, 2, 3, 0), Stage(320, 5, 2, 0, 3))
SMALL = (Stage(48, 8, 4, 2, 0), Stage(96, 4, 2, 3, 1), Stage(192, 4, 2, 2, 0))


class Analysis(nn.Module):
    """Pictures to latents.

    Args:
        stages: their strides multiply to 16.
        latents: M of a linear transform of whole 16x16 patches, which the stages then correct through a 1x1
            convolution; None for the stages alone, the last one's channels being the latents.

    Shape: [B, 3, 16 H, 16 W] -> [B, M, H, W].
    """

    def __init__(self, stages: Sequence[Stage] = SMALL, latents: int | None = 320) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        inputs = 3
        for channels, kernel, stride, blocks, attention in stages:
            layers += [down(inputs, channels, kernel, stride), *(bottleneck(channels) for _ in range(blocks))]
            if attention:
                layers.append(Attention(channels, attention))
            inputs = channels
        self.deep = nn.Sequential(*layers)
        self.linear = down(3, latents, FACTOR, FACTOR) if latents else None
        self.correction = nn.Conv2d(inputs, latents, 1) if latents else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        y = self.correction(self.deep(x))
        return y if self.linear is None else self.linear(x) + y


class JpegLike(nn.Module):
    """Latents to pictures by one transposed convolution of stride 16.

    Args:
        latents: M.
        kernel: 16 for blocks that do not overlap; 18 as published.

    Shape: [B, M, H, W] -> [B, 3, 16 H, 16 W].
    """

    def __init__(self, latents: int = 320, kernel: int = 18) -> None:
        super().__init__()
        self.up = Up(latents, 3, kernel, FACTOR)

    def forward(self, y: Tensor) -> Tensor:
        return self.up(y)


class TwoLayer(nn.Module):
    """Latents to pictures by two transposed convolutions, the first doubled, with IGDN1 on one of the two.

    Args:
        latents: M.
        hidden: channels between.
        kernels: of the layers, whose strides are 8 and 2.

    Shape: [B, M, H, W] -> [B, 3, 16 H, 16 W].
    """

    def __init__(self, latents: int = 320, hidden: int = 12, kernels: tuple[int, int] = (13, 5)) -> None:
        super().__init__()
        self.base = Up(latents, hidden, kernels[0], 8)
        self.skip = Up(latents, hidden, kernels[0], 8)
        self.gdn = GDN1(hidden, inverse=True)
        self.out = Up(hidden, 3, kernels[1], 2)

    def forward(self, y: Tensor) -> Tensor:
        return self.out(self.gdn(self.base(y)) + self.skip(y))


class Deep(nn.Sequential):
    """Latents to pictures by four transposed convolutions 5x5 of stride 2, IGDN1 after all but the last.

    Shape: [B, M, H, W] -> [B, 3, 16 H, 16 W].
    """

    def __init__(self, latents: int = 320, channels: int = 192) -> None:
        layers: list[nn.Module] = []
        for inputs in (latents, channels, channels):
            layers += [Up(inputs, channels, 5, 2), GDN1(channels, inverse=True)]
        super().__init__(*layers, Up(channels, 3, 5, 2))


def start_at_basis(analysis: Analysis, synthesis: TwoLayer | JpegLike, basis: Tensor, scale: float) -> None:
    """Begin as a block transform: latents are `scale` times the coefficients of an orthonormal basis.

    Shape: basis [M, 3, 16, 16].
    """
    with torch.no_grad():
        assert analysis.linear is not None
        for part in (*analysis.linear.parameters(), *analysis.correction.parameters()):
            part.zero_()
        analysis.linear.weight.copy_(scale * basis)
        if isinstance(synthesis, JpegLike):
            _centre(synthesis.up, basis / scale)
            return
        grain = 0.1  # shares the small numbers out between the layers, so that one learning rate suits both
        _centre(synthesis.skip, F.pixel_unshuffle(basis, 2) / (scale * grain))
        synthesis.base.weight.mul_(0.1)
        _centre(synthesis.out, grain * F.pixel_shuffle(torch.eye(12)[:, :, None, None], 2))


def _centre(up: Up, blocks: Tensor) -> None:
    """Weights that write a block [inputs, outputs, stride, stride] for each input, no two overlapping."""
    up.weight.zero_()
    if up.bias is not None:
        up.bias.zero_()
    first, side = (up.kernel_size[0] - up.stride[0]) // 2, up.stride[0]
    up.weight[:, :, first : first + side, first : first + side] = blocks
