"""How close two pictures are: PSNR, SSIM and MS-SSIM, one value per picture of a batch, differentiable.

    PSNR    = 10 log10(peak^2 / mean((x - y)^2))
    SSIM    = mean of l * cs,  l = (2 mu_x mu_y + C1) / (mu_x^2 + mu_y^2 + C1)
                               cs = (2 s_xy + C2) / (s_xx + s_yy + C2),  C_i = (K_i peak)^2
    MS-SSIM = mean(l * cs at scale 5)^w5 * product over scales 1..4 of mean(cs)^w_j

Means, variances and covariance are weighed by an 11 x 11 Gaussian of sigma 1.5, and only windows that lie wholly
inside the picture count, as in Wang, Bovik, Sheikh, Simoncelli 2004 (doi 10.1109/TIP.2003.819861). Between scales the
picture is halved by a 2 x 2 mean, an odd last row or column being repeated, as in Wang, Simoncelli, Bovik 2003 (doi
10.1109/ACSSC.2003.1292216), whose weights are used. Channels are treated alike and averaged.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from foveate.errors import InputError
from foveate.ops.color import rgb_to_y

MS_SSIM_WEIGHTS = (0.0448, 0.2856, 0.3001, 0.2363, 0.1333)


def psnr(x: Tensor, y: Tensor, border: int = 0, peak: float = 1.0) -> Tensor:
    """Peak signal-to-noise ratio in dB, infinite for equal pictures.

    Args:
        border: pixels left out on every side; the custom in super-resolution is the scale.
        peak: the value of white.

    Shape: x, y [B, C, H, W] -> [B].
    Raises: InputError when the two do not match, are not floating point, or nothing is left inside the border.

    >>> psnr(torch.full((1, 3, 8, 8), 0.5), torch.full((1, 3, 8, 8), 0.6))
    tensor([20.0000])
    """
    x, y = _pair("psnr", x, y, border, peak)
    return 10 * torch.log10(peak**2 / (x - y).square().mean((1, 2, 3)))


def psnr_y(x: Tensor, y: Tensor, border: int = 0, round_to_8bit: bool = False) -> Tensor:
    """PSNR in dB on the luminance of MATLAB's rgb2ycbcr, the figure that super-resolution papers report.

    Args:
        border: pixels left out on every side; the custom is the scale.
        round_to_8bit: first clip both to 0..1 and round them to the 256 levels a file would hold. Rounding has no
            gradient, so leave it off in a loss.

    Shape: x, y [B, 3, H, W] in 0..1 -> [B].
    Raises: InputError as `psnr`, or when there are not three channels.
    """
    x, y = _pair("psnr_y", x, y, border, 1.0)
    if round_to_8bit:
        x, y = ((t.clamp(0, 1) * 255).round() / 255 for t in (x, y))
    return psnr(rgb_to_y(x), rgb_to_y(y))


def ssim(
    x: Tensor,
    y: Tensor,
    border: int = 0,
    peak: float = 1.0,
    window: int = 11,
    sigma: float = 1.5,
    k1: float = 0.01,
    k2: float = 0.03,
) -> Tensor:
    """Structural similarity, 1 for equal pictures.

    Args:
        border: pixels left out on every side.
        peak: the value of white.
        window: side of the Gaussian window, odd.
        sigma: its standard deviation in pixels.
        k1, k2: stabilisers of the published definition.

    Shape: x, y [B, C, H, W] -> [B].
    Raises: InputError as `psnr`, or when a side inside the border is shorter than the window.

    >>> float(ssim(torch.zeros(1, 1, 16, 16), torch.zeros(1, 1, 16, 16)))
    1.0
    """
    x, y = _pair("ssim", x, y, border, peak)
    _check_window("ssim", x, window, sigma, minimum=window)
    similarity, _ = _similarity(x, y, peak, window, sigma, k1, k2)
    return similarity.mean(1)


def ms_ssim(
    x: Tensor,
    y: Tensor,
    peak: float = 1.0,
    weights: tuple[float, ...] = MS_SSIM_WEIGHTS,
    window: int = 11,
    sigma: float = 1.5,
    k1: float = 0.01,
    k2: float = 0.03,
    eps: float = 0.0,
    per_pixel: bool = False,
) -> Tensor:
    """Multi-scale structural similarity, 1 for equal pictures.

    A scale whose mean contrast-structure term is negative counts as 0, for a real power of it does not exist.

    Args:
        peak: the value of white.
        weights: exponent of each scale, the finest first; five by default.
        window, sigma, k1, k2: as in `ssim`.
        eps: each term t counts as (t + eps) / (1 + eps), which bounds the slope of its power near 0; for losses.
        per_pixel: multiply the scales at every place and average at the end, as Snell et al. 2015 write it, instead
            of multiplying their averages; the maps of coarser scales are interpolated where the finest one has pixels.

    Shape: x, y [B, C, H, W] with sides of at least 161 (five scales, window 11) -> [B].
    Raises: InputError as `ssim`; for a picture too small it names the minimum.
    """
    x, y = _pair("ms_ssim", x, y, 0, peak)
    if not weights:
        raise InputError("ms_ssim got no weights. Pass one exponent per scale, or leave the published five.")
    _check_window("ms_ssim", x, window, sigma, minimum=(window - 1) * 2 ** (len(weights) - 1) + 1)
    result: Tensor | None = None
    for scale, weight in enumerate(weights):
        similarity, contrast = _maps(x, y, peak, window, sigma, k1, k2)
        last = scale == len(weights) - 1
        term = similarity if last else contrast
        if not per_pixel:
            term = term.mean((2, 3), keepdim=True)
        elif result is not None:
            term = _on_finest(term, scale, window, result.shape[2:])
        # relu, not clamp: its gradient at 0 is 0, where that of the power is infinite.
        factor = ((F.relu(term) + eps) / (1 + eps)) ** weight
        result = factor if result is None else result * factor
        if not last:
            x, y = _halve(x), _halve(y)
    assert result is not None
    return result.mean((1, 2, 3))


def _similarity(
    x: Tensor, y: Tensor, peak: float, window: int, sigma: float, k1: float, k2: float
) -> tuple[Tensor, Tensor]:
    """Mean of l * cs and mean of cs over all windows. Shape: [B, C, H, W] -> two of [B, C]."""
    similarity, contrast = _maps(x, y, peak, window, sigma, k1, k2)
    return similarity.mean((2, 3)), contrast.mean((2, 3))


def _maps(x: Tensor, y: Tensor, peak: float, window: int, sigma: float, k1: float, k2: float) -> tuple[Tensor, Tensor]:
    """l * cs and cs of every window. Shape: [B, C, H, W] -> two of [B, C, H - window + 1, W - window + 1]."""
    offsets = torch.arange(window, dtype=x.dtype, device=x.device) - window // 2
    gauss = torch.exp(-offsets.square() / (2 * sigma**2))
    gauss = gauss / gauss.sum()
    maps = torch.cat([x, y, x * x, y * y, x * y], 1)
    c = maps.shape[1]
    # Two depthwise passes: a picture per channel runs several times faster than a picture per batch entry.
    rows = F.conv2d(maps, gauss.view(1, 1, 1, -1).expand(c, 1, 1, -1), groups=c)
    blurred = F.conv2d(rows, gauss.view(1, 1, -1, 1).expand(c, 1, -1, 1), groups=c)
    mu_x, mu_y, xx, yy, xy = blurred.chunk(5, 1)
    c1, c2 = (k1 * peak) ** 2, (k2 * peak) ** 2
    contrast = (2 * (xy - mu_x * mu_y) + c2) / (xx - mu_x.square() + yy - mu_y.square() + c2)
    luminance = (2 * mu_x * mu_y + c1) / (mu_x.square() + mu_y.square() + c1)
    return luminance * contrast, contrast


def _on_finest(coarse: Tensor, scale: int, window: int, size: Sequence[int]) -> Tensor:
    """Interpolate the map of a scale at the pixels of the finest map; its border is repeated.

    Pixel i of a map is the window around pixel i + m of its picture, m = window // 2, whose centre is at
    (i + m + 1/2) 2^scale on the finest grid.
    """
    at = []
    for length, wanted in zip(coarse.shape[2:], size, strict=True):
        middle = torch.arange(wanted, dtype=coarse.dtype, device=coarse.device) + window // 2 + 0.5
        at.append((2 * (middle / 2**scale - window // 2) / length) - 1)
    grid = torch.stack(torch.meshgrid(*at, indexing="ij")[::-1], -1)
    grid = grid.expand(len(coarse), -1, -1, -1)
    return F.grid_sample(coarse, grid, mode="bilinear", padding_mode="border", align_corners=False)


def _halve(x: Tensor) -> Tensor:
    h, w = x.shape[-2:]
    return F.avg_pool2d(F.pad(x, (0, w % 2, 0, h % 2), mode="replicate"), 2)


def _pair(who: str, x: Tensor, y: Tensor, border: int, peak: float) -> tuple[Tensor, Tensor]:
    """Check two batches, bring them to one precision of at least float32, and cut the border off."""
    for t in (x, y):
        if not isinstance(t, Tensor):
            raise InputError(f"{who} got {type(t).__name__}, expected a tensor [B, C, H, W]. Convert it first.")
        if t.dim() != 4:
            raise InputError(f"{who} got shape {tuple(t.shape)}, expected [B, C, H, W]. Add the missing axes.")
        if not t.is_floating_point():
            raise InputError(f"{who} got {t.dtype}, expected floating point in 0..1. Divide 8-bit values by 255.")
    if x.shape != y.shape:
        raise InputError(f"{who} got shapes {tuple(x.shape)} and {tuple(y.shape)}. Crop or resize them to match.")
    if not peak > 0:
        raise InputError(f"{who} got peak={peak!r}. Pass the value of white, such as 1.0.")
    if border < 0:
        raise InputError(f"{who} got border={border}. Pass the pixels to leave out on every side, 0 or more.")
    b, c, h, w = x.shape
    if b * c == 0 or min(h, w) <= 2 * border:
        raise InputError(f"{who} got shape {tuple(x.shape)} and border {border}: nothing is left. Use a larger one.")
    dtype = torch.promote_types(torch.promote_types(x.dtype, y.dtype), torch.float32)
    inside = (..., slice(border, h - border), slice(border, w - border))
    return x[inside].to(dtype), y[inside].to(dtype)


def _check_window(who: str, x: Tensor, window: int, sigma: float, minimum: int) -> None:
    if window < 1 or window % 2 == 0 or not sigma > 0:
        raise InputError(f"{who} got window={window} and sigma={sigma}. Pass an odd window and a sigma above 0.")
    h, w = x.shape[-2:]
    if min(h, w) < minimum:
        raise InputError(f"{who} got {w} x {h} pixels, expected at least {minimum} x {minimum}. Use a larger picture.")
