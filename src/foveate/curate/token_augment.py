"""Changes to tokens and to their features that leave the class as it is, for learning without pixels.

Park et al. 2023 (SeiT, arXiv:2303.11114) and Lee et al. 2024 (SeiT++, arXiv:2312.10105). On tokens [B, h, w]:

    replace    each token, with probability p, becomes one of the nearest words (Token-EDA's synonyms)
    swap       two squares without common tokens change places (Token-EDA's swap)

on features [B, D, h, w], for interpolating words is what interpolating one-hot maps and looking up comes to:

    crop       a random part, resampled bicubically to the size (Token-RRC)
    noise      one number for a channel and one for every feature, added (Emb-Noise)
    exchange   mean and spread of every channel become another picture's (SeiT++'s ColorAdapt)
    cutmix     a box of another picture, the target mixed by area (Yun et al. 2019, arXiv:1905.04899)

Dice are a CPU generator, so that the same seed does the same on every device.
"""

from math import log

import torch
import torch.nn.functional as F
from torch import Generator, Tensor

from foveate.errors import InputError

_TRIES = 16  # pairs of squares drawn for a swap


def synonyms(codebook: Tensor, count: int = 5) -> Tensor:
    """The nearest other words of every word. Shape: [K, D] -> int64 [K, count]."""
    if not 1 <= count < len(codebook):
        raise InputError(f"count must be 1 to {len(codebook) - 1}, the other words; got {count}.")
    apart = torch.cdist(codebook, codebook)
    return apart.fill_diagonal_(torch.inf).topk(count, largest=False).indices


def replace(tokens: Tensor, table: Tensor, p: float, dice: Generator) -> Tensor:
    """Put words of a table in the place of tokens. Shape: tokens [B, h, w], table [K, count] -> [B, h, w]."""
    chosen = torch.rand(tokens.shape, generator=dice) < p
    which = torch.randint(table.shape[1], tokens.shape, generator=dice)
    return torch.where(chosen.to(tokens.device), table[tokens, which.to(tokens.device)].to(tokens.dtype), tokens)


def swap(tokens: Tensor, dice: Generator, largest: float = 0.25) -> Tensor:
    """Exchange two squares of random size in every picture; where none without common tokens are found, nothing.

    Args:
        largest: side of a square over that of the grid, at most.

    Shape: [B, h, w] -> the same.
    """
    count, height, width = tokens.shape
    side = (torch.rand(count, 1, generator=dice) * largest * min(height, width)).round().long()
    room = torch.stack([height - side, width - side], 2) + 1  # [B, 1, 2]
    first, second = ((torch.rand(count, _TRIES, 2, generator=dice) * room).long() for _ in range(2))
    apart = ((first - second).abs() >= side[..., None]).any(2)
    best = apart.int().argmax(1)
    side = side[:, 0] * apart.any(1)
    rows = torch.arange(count)
    return exchange_squares(tokens, first[rows, best], second[rows, best], side)


def exchange_squares(tokens: Tensor, first: Tensor, second: Tensor, side: Tensor) -> Tensor:
    """Exchange squares. Shape: tokens [B, h, w], corners (y, x) [B, 2] twice, side [B] -> [B, h, w]."""
    _, height, width = tokens.shape
    y, x = torch.arange(height)[:, None], torch.arange(width)
    at = (y * width + x).expand(len(tokens), -1, -1)
    source = at
    for here, there in ((first, second), (second, first)):
        down, across = y - here[:, 0, None, None], x - here[:, 1, None, None]
        inside = (down >= 0) & (across >= 0) & (torch.maximum(down, across) < side[:, None, None])
        moved = at + ((there - here) * torch.tensor([width, 1])).sum(1)[:, None, None]
        source = torch.where(inside, moved, source)
    return tokens.flatten(1).gather(1, source.flatten(1).to(tokens.device)).view_as(tokens)


def boxes(
    count: int,
    dice: Generator,
    scale: tuple[float, float] = (0.08, 1.0),
    ratio: tuple[float, float] = (3 / 4, 4 / 3),
) -> Tensor:
    """Random parts of a picture as shares of its sides, (x, y, width, height). Shape: [count, 4]."""
    area = scale[0] + (scale[1] - scale[0]) * torch.rand(count, generator=dice)
    turn = torch.exp(log(ratio[0]) + (log(ratio[1]) - log(ratio[0])) * torch.rand(count, generator=dice))
    size = torch.stack([(area * turn).sqrt(), (area / turn).sqrt()], 1).clamp_max(1)
    return torch.cat([torch.rand(count, 2, generator=dice) * (1 - size), size], 1)


def crop(features: Tensor, part: Tensor, size: int) -> Tensor:
    """Resample a part of each picture bicubically. Shape: [B, D, h, w], part [B, 4] -> [B, D, size, size]."""
    origin, extent = part[:, :2] * 2 - 1 + part[:, 2:], part[:, 2:]
    matrix = features.new_zeros(len(features), 2, 3)
    matrix[:, [0, 1], [0, 1]], matrix[:, :, 2] = extent.to(features), origin.to(features)
    grid = F.affine_grid(matrix, [len(features), features.shape[1], size, size], align_corners=False)
    return F.grid_sample(features, grid, mode="bicubic", padding_mode="border", align_corners=False)


def centre(features: Tensor, size: int) -> Tensor:
    """The middle. Shape: [B, D, h, w] -> [B, D, size, size]."""
    top, left = ((n - size) // 2 for n in features.shape[2:])
    return features[..., top : top + size, left : left + size]


def noise(features: Tensor, strength: float, dice: Generator) -> Tensor:
    """Add noise to half of the pictures. Shape: [B, D, h, w] -> the same."""
    whole = torch.randn(*features.shape[:2], 1, 1, generator=dice) + torch.randn(features.shape, generator=dice)
    return features + (strength * whole * _half(len(features), dice)).to(features)


def exchange(features: Tensor, dice: Generator) -> Tensor:
    """Give half of the pictures the channels' mean and spread of those at the other end of the batch."""
    mean, spread = features.mean((2, 3), keepdim=True), features.std((2, 3), keepdim=True) + 1e-6
    other = (features - mean) / spread * spread.flip(0) + mean.flip(0)
    return torch.where(_half(len(features), dice).to(features.device), other, features)


def cutmix(
    features: Tensor, labels: Tensor, classes: int, dice: Generator, alpha: float = 1.0, smoothing: float = 0.1
) -> tuple[Tensor, Tensor]:
    """Put a box of the picture at the other end of the batch into each.

    Args:
        labels: [B].
        alpha: of the beta distribution of the share that is kept; 0 leaves the pictures as they are.
        smoothing: mass that goes to all classes alike.

    Returns: features, and targets [B, classes] that sum to 1.
    """
    target = F.one_hot(labels, classes).to(features.dtype) * (1 - smoothing) + smoothing / classes
    if not alpha:
        return features, target
    height, width = features.shape[2:]
    a, b = (torch._standard_gamma(torch.tensor(alpha), generator=dice) for _ in range(2))
    side = (1 - a / (a + b)).sqrt()
    (top, bottom), (left, right) = (_span(n, side, dice) for n in (height, width))
    mixed = features.clone()
    mixed[..., top:bottom, left:right] = features.flip(0)[..., top:bottom, left:right]
    share = (bottom - top) * (right - left) / (height * width)
    return mixed, (1 - share) * target + share * target.flip(0)


def _span(length: int, side: Tensor, dice: Generator) -> tuple[int, int]:
    """A stretch about a random place, cut off at the ends."""
    place, reach = int(torch.randint(length, (1,), generator=dice)), int(length * side) // 2
    return max(0, place - reach), min(length, place + reach)


def _half(count: int, dice: Generator) -> Tensor:
    """Half of a batch, at random. Shape: bool [count, 1, 1, 1]."""
    return (torch.randperm(count, generator=dice) < count // 2)[:, None, None, None]
