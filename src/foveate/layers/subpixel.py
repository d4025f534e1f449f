"""Enlarging features: convolutions and pixel shuffles, a factor of two or three at a time."""

from torch import nn

from foveate.errors import InputError


def subpixel_steps(channels: int, scale: int) -> list[nn.Module]:
    """The enlarging layers of EDSR: conv3x3 C -> C*f*f and a pixel shuffle for each factor f of the scale.

    Args:
        channels: C.
        scale: a power of two, or three.

    Shape: modules to be run in turn, [B, C, h, w] -> [B, C, s*h, s*w].
    Raises: InputError for other scales.

    >>> [type(m).__name__ for m in subpixel_steps(8, 4)]
    ['Conv2d', 'PixelShuffle', 'Conv2d', 'PixelShuffle']
    """
    power = scale.bit_length() - 1
    if scale != 3 and (scale < 1 or scale != 1 << power):
        raise InputError(f"pixel shuffles in steps enlarge by 2, 4, 8 and so on, or by 3; got {scale!r}.")
    steps: list[nn.Module] = []
    for factor in [3] if scale == 3 else [2] * power:
        steps += [nn.Conv2d(channels, channels * factor**2, 3, padding=1), nn.PixelShuffle(factor)]
    return steps
