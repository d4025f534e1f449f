"""Where it is hard: maps that say how much is going on at each place of a picture.

All take images [B, C, H, W] (any number of channels; three are read as RGB, others are averaged) and work on their
luma. They compute in float32 at least, whatever the input's precision, because scores are compared with each other.

- `gradient`   |(S_x * y, S_y * y)| with Sobel kernels scaled to give the slope per pixel      [B, 1, H, W]
- `variance`   mean(y^2) - mean(y)^2 over a window                                             [B, 1, H, W]
- `entropy`    -sum_v p_v log2 p_v of each patch's grey-level histogram, in bits               [B, h, w]
- `saliency`   the spectral residual: what a log spectrum has beyond its own local average     [B, 1, H, W]
- `pool_patches` turns any map into one number per patch                                       [B, h, w]

Patches tile the picture from the top left; h = ceil(H / patch), and the last ones hold what is left.
"""

import math
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from foveate.errors import InputError

_LUMA = (0.299, 0.587, 0.114)
_SPECTRAL_SIDE, _SPECTRAL_SIGMA, _FLAT = 64, 2.5, 1e-4
_HISTOGRAM_CELLS = 1 << 22


def luma(x: Tensor) -> Tensor:
    """Give the grey picture that importance is measured on: full-range BT.601 luma of RGB, else the channel mean.

    Shape: x [B, C, H, W] floating point -> [B, 1, H, W], float32 or float64.
    Raises: InputError for another rank, an empty tensor or integers.
    """
    if x.dim() != 4 or x.numel() == 0:
        raise InputError(f"Importance needs images [B, C, H, W] that are not empty, got shape {tuple(x.shape)}.")
    if not x.is_floating_point():
        raise InputError(f"Importance needs floating point images in 0..1, got {x.dtype}; divide by the largest value.")
    x = x.to(torch.promote_types(x.dtype, torch.float32))
    if x.shape[1] == 3:
        return (x * x.new_tensor(_LUMA)[:, None, None]).sum(1, keepdim=True)
    return x.mean(1, keepdim=True)


def gradient(x: Tensor) -> Tensor:
    """Measure the Sobel gradient magnitude: a ramp that rises by s per pixel gives s.

    Shape: x [B, C, H, W] -> [B, 1, H, W]; the border is replicated.
    """
    y = F.pad(luma(x), (1, 1, 1, 1), mode="replicate")
    across = y[..., 2:] - y[..., :-2]
    down = y[..., 2:, :] - y[..., :-2, :]
    gx = (across[..., :-2, :] + 2 * across[..., 1:-1, :] + across[..., 2:, :]) / 8
    gy = (down[..., :-2] + 2 * down[..., 1:-1] + down[..., 2:]) / 8
    return torch.hypot(gx, gy)


def variance(x: Tensor, window: int = 7) -> Tensor:
    """Measure the variance in a square window around each pixel; windows are cut at the border.

    Args:
        window: side of the window in pixels, odd.

    Shape: x [B, C, H, W] -> [B, 1, H, W].
    """
    if window < 1 or window % 2 == 0:
        raise InputError(f"variance needs an odd window of at least 1 pixel, got {window}.")
    y = luma(x)
    y = y - y.mean((-2, -1), keepdim=True)  # the difference of two squares loses digits far from zero

    def mean(z: Tensor) -> Tensor:
        return F.avg_pool2d(z, window, stride=1, padding=window // 2, count_include_pad=False)

    return (mean(y * y) - mean(y) ** 2).clamp_min(0)


def entropy(x: Tensor, patch: int = 16, bins: int = 256) -> Tensor:
    """Measure the entropy of each patch's grey-level histogram, in bits.

    Args:
        patch: side of a patch in pixels.
        bins: number of grey levels; values outside 0..1 fall into the outermost bins.

    Shape: x [B, C, H, W] in 0..1 -> [B, ceil(H / patch), ceil(W / patch)], in 0..log2(min(bins, patch^2)).
    Source: the patch score of Choudhury et al. 2025, arXiv:2510.18091 (Adaptive Patch Transformers).
    """
    _check_patch(patch)
    if bins < 2:
        raise InputError(f"entropy needs at least 2 bins, got {bins}.")
    level = (luma(x)[:, 0] * bins).floor().long().clamp(0, bins - 1)
    batch, _, width = level.shape
    columns = torch.arange(width, device=x.device) // patch
    across = math.ceil(width / patch)
    # One histogram per patch of a whole picture would outgrow memory: a band of patch rows at a time.
    band = max(1, _HISTOGRAM_CELLS // (batch * across * bins))
    maps = []
    for part in level.split(band * patch, dim=1):
        rows = torch.arange(part.shape[1], device=x.device) // patch
        down = math.ceil(part.shape[1] / patch)
        image = torch.arange(batch, device=x.device)[:, None, None]
        cell = ((image * down + rows[:, None]) * across + columns) * bins + part
        count = torch.bincount(cell.flatten(), minlength=batch * down * across * bins)
        n = count.view(batch, down, across, bins).to(torch.float32)
        total = n.sum(-1)
        maps.append(total.log2() - torch.xlogy(n, n).sum(-1) / (total * math.log(2)))
    return torch.cat(maps, 1).clamp_min(0)


def saliency(x: Tensor) -> Tensor:
    """Measure spectral-residual saliency: the parts of the picture that its smooth log spectrum does not explain.

    With A and P the amplitude and phase of the picture shrunk to 64 pixels on its longer side,
    R = log A - mean_3x3(log A) and the map is a Gaussian blur (sigma 2.5) of |ifft(exp(R + iP))|^2, scaled to 0..1.
    A flat picture has no salient part and gives zeros.

    Shape: x [B, C, H, W] -> [B, 1, H, W] in 0..1.
    Source: Hou and Zhang, "Saliency Detection: A Spectral Residual Approach", CVPR 2007.
    """
    y = luma(x)
    height, width = y.shape[-2:]
    scale = _SPECTRAL_SIDE / max(height, width)
    small_size = (max(1, round(height * scale)), max(1, round(width * scale)))
    small = F.interpolate(y, small_size, mode="bilinear", align_corners=False, antialias=True)
    spectrum = torch.fft.fft2(small)
    log_amplitude = torch.log(spectrum.abs() + 1e-8)
    # A spectrum is periodic; any other border would make the map depend on which way the picture is turned.
    average = F.avg_pool2d(F.pad(log_amplitude, (1, 1, 1, 1), mode="circular"), 3, stride=1)
    residual = torch.polar(torch.exp(log_amplitude - average), spectrum.angle())
    energy = _blur(torch.fft.ifft2(residual).abs() ** 2)
    full = F.interpolate(energy, (height, width), mode="bilinear", align_corners=False)
    full = full / full.amax((-2, -1), keepdim=True).clamp_min(torch.finfo(full.dtype).tiny)
    spread = small.amax((-2, -1), keepdim=True) - small.amin((-2, -1), keepdim=True)
    return torch.where(spread > _FLAT, full, torch.zeros_like(full))


def pool_patches(map: Tensor, patch: int, reduce: Literal["mean", "max", "sum", "l2"] = "mean") -> Tensor:
    """Summarise a map by one number per patch.

    Args:
        map: a score per pixel (or per token of a grid).
        patch: side of a patch.
        reduce: "mean" over the pixels really there, "max", "sum", or "l2", the root of the sum of squares.

    Shape: map [B, 1, H, W] or [B, H, W] -> [B, ceil(H / patch), ceil(W / patch)].

    >>> pool_patches(torch.tensor([[[1.0, 3.0, 5.0]]]), 2)
    tensor([[[2., 5.]]])
    """
    _check_patch(patch)
    y = map[:, 0] if map.dim() == 4 and map.shape[1] == 1 else map
    if y.dim() != 3 or y.numel() == 0:
        raise InputError(f"pool_patches needs a map [B, 1, H, W] or [B, H, W], got shape {tuple(map.shape)}.")
    if reduce == "mean":
        return _sums(y, patch) / _sums(torch.ones_like(y[:1]), patch)
    if reduce == "max":
        return _grid(y, patch, -math.inf).amax((2, 4))
    if reduce == "sum":
        return _sums(y, patch)
    if reduce == "l2":
        return _sums(y * y, patch).sqrt()
    raise InputError(f"pool_patches reduces by 'mean', 'max', 'sum' or 'l2', got {reduce!r}.")


def _check_patch(patch: int) -> None:
    if patch < 1:
        raise InputError(f"A patch is at least 1 pixel wide, got {patch}.")


def _grid(y: Tensor, patch: int, fill: float) -> Tensor:
    height, width = y.shape[-2:]
    y = F.pad(y, (0, -width % patch, 0, -height % patch), value=fill)
    return y.view(y.shape[0], y.shape[1] // patch, patch, y.shape[2] // patch, patch)


def _sums(y: Tensor, patch: int) -> Tensor:
    return _grid(y, patch, 0.0).sum((2, 4))


def _blur(y: Tensor) -> Tensor:
    radius = math.ceil(3 * _SPECTRAL_SIGMA)
    taps = torch.arange(-radius, radius + 1, device=y.device, dtype=y.dtype)
    kernel = torch.exp(-0.5 * (taps / _SPECTRAL_SIGMA) ** 2)
    kernel = kernel / kernel.sum()
    y = F.conv2d(F.pad(y, (radius, radius, 0, 0), mode="replicate"), kernel.view(1, 1, 1, -1))
    return F.conv2d(F.pad(y, (0, 0, radius, radius), mode="replicate"), kernel.view(1, 1, -1, 1))
