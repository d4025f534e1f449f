"""Encoders of super-resolution networks: the picture at low resolution -> one feature vector per low-resolution pixel.

Each maps [B, 3, h, w] to [B, channels, h, w] and states `halo`, the radius in pixels of what one feature sees, so that
a picture can be cut into tiles with exactly that much context and give the same features as the whole.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from foveate.layers.residual import ResidualBlock, add_


class ResidualEncoder(nn.Module):
    """Entry convolution, residual blocks, closing convolution, long skip (SRResNet without normalisation, EDSR).

    Args:
        channels: C.
        blocks: number of residual blocks.
    """

    def __init__(self, channels: int = 32, blocks: int = 4) -> None:
        super().__init__()
        self.channels, self.halo = channels, 2 * blocks + 2
        self.entry = nn.Conv2d(3, channels, 3, padding=1)
        self.blocks = nn.Sequential(*(ResidualBlock(channels) for _ in range(blocks)))
        self.last = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.entry(x)
        return add_(self.last(self.blocks(x)), x)


class FSRCNNEncoder(nn.Module):
    """FSRCNN's feature extraction, shrinking, mapping and expanding layers (Dong et al. 2016, arXiv:1608.00367).

    Args:
        channels: d, features of the first and last layer.
        shrink: s, features of the mapping layers.
        maps: m, number of 3x3 mapping layers; none has an activation between, one PReLU follows them all.
    """

    def __init__(self, channels: int = 48, shrink: int = 12, maps: int = 4) -> None:
        super().__init__()
        self.channels, self.halo = channels, 2 + maps
        self.head_conv = nn.Sequential(nn.Conv2d(3, channels, 5, padding=2), nn.PReLU())
        mapping = [nn.Conv2d(shrink, shrink, 3, padding=1) for _ in range(maps)]
        self.body_conv = nn.Sequential(
            nn.Sequential(nn.Conv2d(channels, shrink, 1), nn.PReLU()),
            *mapping,
            nn.PReLU(),
            nn.Sequential(nn.Conv2d(shrink, channels, 1), nn.PReLU()),
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.body_conv(self.head_conv(x))


class _Fuse(nn.Sequential):
    """1x1 convolution without bias, batch norm, ReLU."""

    def __init__(self, inputs: int, outputs: int) -> None:
        norm_and_relu = nn.Sequential(nn.BatchNorm2d(outputs), nn.ReLU())
        super().__init__(nn.Conv2d(inputs, outputs, 1, bias=False), *norm_and_relu)


class _EfficientResidual(nn.Module):
    """CARN-M's residual unit: two grouped 3x3 convolutions and a 1x1, ReLU after the sum."""

    def __init__(self, channels: int, groups: int) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(channels, channels, 3, padding=1, groups=groups),
            nn.ReLU(),
            nn.Conv2d(channels, channels, 3, padding=1, groups=groups),
            nn.ReLU(),
            nn.Conv2d(channels, channels, 1),
        )

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.body(x) + x)


def _cascade(x: Tensor, units: list[nn.Module], fuses: list[nn.Module]) -> Tensor:
    """Run units in turn, each on the fusion of all that came before it (CARN's cascading)."""
    seen, out = x, x
    for unit, fuse in zip(units, fuses, strict=True):
        seen = torch.cat([seen, unit(out)], dim=1)
        out = fuse(seen)
    return out


class _CascadingBlock(nn.Module):
    """The same residual unit three times, all earlier outputs concatenated and fused each time."""

    def __init__(self, channels: int, groups: int) -> None:
        super().__init__()
        self.b1 = _EfficientResidual(channels, groups)
        self.c1, self.c2, self.c3 = (_Fuse(channels * n, channels) for n in (2, 3, 4))

    def forward(self, x: Tensor) -> Tensor:
        return _cascade(x, [self.b1] * 3, [self.c1, self.c2, self.c3])


class CARNEncoder(nn.Module):
    """CARN-M: three cascading blocks, themselves cascaded (Ahn et al. 2018, arXiv:1803.08664).

    Args:
        channels: features.
        groups: groups of the 3x3 convolutions.
        mean: RGB mean taken from the input (CARN was trained on DIV2K's).
    """

    mean: Tensor

    def __init__(
        self, channels: int = 52, groups: int = 4, mean: tuple[float, float, float] = (0.4488, 0.4371, 0.4040)
    ) -> None:
        super().__init__()
        self.channels, self.halo = channels, 19
        self.register_buffer("mean", torch.tensor(mean).view(3, 1, 1), persistent=False)
        self.entry = nn.Conv2d(3, channels, 3, padding=1)
        self.b1, self.b2, self.b3 = (_CascadingBlock(channels, groups) for _ in range(3))
        self.c1, self.c2, self.c3 = (_Fuse(channels * n, channels) for n in (2, 3, 4))

    def forward(self, x: Tensor) -> Tensor:
        x = self.entry(x - self.mean)
        return _cascade(x, [self.b1, self.b2, self.b3], [self.c1, self.c2, self.c3])


ENCODERS = {"residual": ResidualEncoder, "fsrcnn": FSRCNNEncoder, "carn": CARNEncoder}
