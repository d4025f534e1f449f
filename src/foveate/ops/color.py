"""Colour conversions of the super-resolution and coding literature.

`rgb_to_ycbcr` is the studio-range BT.601 conversion of MATLAB's `rgb2ycbcr`, on which published PSNR-Y figures rest:
Y = (65.481 R + 128.553 G + 24.966 B + 16) / 255 for R, G, B in 0..1, so Y lies in 16/255..235/255.
"""

import torch
from torch import Tensor

from foveate.errors import InputError

_FORWARD = ((65.481, 128.553, 24.966), (-37.797, -74.203, 112.0), (112.0, -93.786, -18.214))
_OFFSET = (16.0, 128.0, 128.0)


def _check_rgb(x: Tensor, name: str) -> None:
    if x.dim() < 3 or x.shape[-3] != 3:
        raise InputError(f"{name} needs [..., 3, H, W] with three channels, got shape {tuple(x.shape)}.")


def rgb_to_y(rgb: Tensor) -> Tensor:
    """Luminance Y of MATLAB's rgb2ycbcr.

    Shape: rgb [..., 3, H, W] in 0..1 -> [..., 1, H, W] in 16/255..235/255.
    Raises: InputError when there are not three channels.
    """
    _check_rgb(rgb, "rgb_to_y")
    weights = rgb.new_tensor(_FORWARD[0])[:, None, None] / 255
    return (rgb * weights).sum(-3, keepdim=True) + _OFFSET[0] / 255


def rgb_to_ycbcr(rgb: Tensor) -> Tensor:
    """MATLAB's rgb2ycbcr. Shape: [..., 3, H, W] in 0..1 -> [..., 3, H, W] in 0..1."""
    _check_rgb(rgb, "rgb_to_ycbcr")
    matrix = rgb.new_tensor(_FORWARD) / 255
    return torch.einsum("ij,...jhw->...ihw", matrix, rgb) + rgb.new_tensor(_OFFSET)[:, None, None] / 255


def ycbcr_to_rgb(ycbcr: Tensor) -> Tensor:
    """Inverse of `rgb_to_ycbcr`, not clipped. Shape: [..., 3, H, W] -> [..., 3, H, W]."""
    _check_rgb(ycbcr, "ycbcr_to_rgb")
    inverse = torch.linalg.inv(torch.tensor(_FORWARD, dtype=torch.float64) / 255).to(ycbcr)
    return torch.einsum("ij,...jhw->...ihw", inverse, ycbcr - ycbcr.new_tensor(_OFFSET)[:, None, None] / 255)
