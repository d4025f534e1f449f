"""Degradations: the low-resolution inputs of super-resolution benchmarks.

Published figures rest on one kernel, Keys' cubic with a = -1/2, stretched by the scale when it shrinks so that it also
removes what the smaller grid cannot hold (MATLAB's imresize, Pillow's BICUBIC):

    k(t) = 3/2 |t|^3 - 5/2 |t|^2 + 1             for |t| <= 1
         = -1/2 |t|^3 + 5/2 |t|^2 - 4 |t| + 2    for 1 < |t| < 2

At the border the weights that fall inside are renormalised (Pillow); MATLAB mirrors the picture there instead, which
changes only the outermost pixels. Keys 1981, "Cubic convolution interpolation for digital image processing".
"""

from typing import TypeVar

import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from foveate.errors import InputError

Raster = TypeVar("Raster", Tensor, Image.Image)


def mod_crop(x: Raster, scale: int) -> Raster:
    """Crop the right and lower edge so that both sides are multiples of the scale.

    Args:
        x: tensor [..., H, W] or PIL image.
        scale: integer factor, 1 or more.
    Raises: InputError when the scale is not a positive integer or exceeds a side.

    >>> import torch
    >>> mod_crop(torch.zeros(1, 3, 10, 13), 4).shape
    torch.Size([1, 3, 8, 12])
    """
    height, width = _size(x, scale)
    height, width = height // scale * scale, width // scale * scale
    return x[..., :height, :width] if isinstance(x, Tensor) else x.crop((0, 0, width, height))


def downscale(x: Raster, scale: int, rounded: bool = False) -> Raster:
    """Shrink by an integer factor with the antialiased bicubic of the benchmarks, after `mod_crop`.

    Args:
        x: tensor [B, C, H, W] in 0..1, or PIL image.
        scale: integer factor, 1 or more.
        rounded: clip to 0..1 and round to 8 bits, as if saved as PNG in between (a PIL result always is).
    Shape: [B, C, H, W] -> [B, C, H // scale, W // scale].
    Raises: InputError for a scale that does not fit or a tensor that is not [B, C, H, W].
    """
    x = mod_crop(x, scale)
    if not isinstance(x, Tensor):
        return x.resize((x.width // scale, x.height // scale), Image.Resampling.BICUBIC)
    small = _bicubic(x, x.shape[-2] // scale, x.shape[-1] // scale)
    return (small.clamp(0, 1) * 255).round() / 255 if rounded else small


def upscale(x: Raster, scale: int) -> Raster:
    """Enlarge by an integer factor with the same bicubic: the baseline that super-resolution is compared with.

    Args:
        x: tensor [B, C, H, W] (the result is not clipped), or PIL image.
        scale: integer factor, 1 or more.
    Shape: [B, C, H, W] -> [B, C, H * scale, W * scale].
    Raises: InputError for a scale that is not a positive integer or a tensor that is not [B, C, H, W].
    """
    height, width = _size(x, scale, shrink=False)
    if not isinstance(x, Tensor):
        return x.resize((width * scale, height * scale), Image.Resampling.BICUBIC)
    return _bicubic(x, height * scale, width * scale)


def _bicubic(x: Tensor, height: int, width: int) -> Tensor:
    if x.dim() != 4:
        raise InputError(f"Bicubic resampling needs a tensor [B, C, H, W], got shape {tuple(x.shape)}.")
    # antialias=True also selects a = -1/2; PyTorch's plain bicubic is a = -3/4.
    return F.interpolate(x, size=(height, width), mode="bicubic", antialias=True, align_corners=False)


def _size(x: Tensor | Image.Image, scale: int, shrink: bool = True) -> tuple[int, int]:
    height, width = (x.shape[-2], x.shape[-1]) if isinstance(x, Tensor) else (x.height, x.width)
    if not isinstance(scale, int) or scale < 1:
        raise InputError(f"A scale of {scale!r} cannot be used; pass a whole number, 1 or more.")
    if min(height, width) < (scale if shrink else 1):
        raise InputError(f"A picture of {width}x{height} pixels is too small for scale {scale}.")
    return height, width
