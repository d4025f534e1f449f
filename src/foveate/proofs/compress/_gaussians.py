"""What the proofs of GaussianImage and Image-GS share: a tiled rasteriser in plain PyTorch, and pictures."""

from math import ceil

import torch
from torch import Tensor

from foveate.data import pictures
from foveate.ops.gaussians import drawn
from foveate.proofs.evidence import ProofContext

_SIDE, _CELLS = 16, 1 << 22


def tiled(centres: Tensor, conics: Tensor, colours: Tensor, height: int, width: int, reach: float) -> Tensor:
    """The mode "cut" in plain PyTorch, tile by tile: Gaussians binned by their boxes, lists padded to the longest.

    Shape: centres [N, 2], conics [N, 3], colours [N, C] -> [C, H, W].
    """
    down, across = ceil(height / _SIDE), ceil(width / _SIDE)
    a, b, c = conics.unbind(1)
    extent = reach * torch.stack([c, a], 1).sqrt() / (a * c - b * b).sqrt()[:, None]
    limit = torch.tensor([across, down])
    low = ((centres - extent) / _SIDE).floor().long().clamp_min(0)
    high = ((centres + extent) / _SIDE).floor().long().minimum(limit - 1)
    counts = (high - low + 1).clamp_min(0) * drawn(conics)[:, None]
    per = counts.prod(1)
    member = torch.arange(len(centres)).repeat_interleave(per)
    within = torch.arange(len(member)) - (per.cumsum(0) - per)[member]
    wide = counts[member, 0].clamp_min(1)
    tile = (low[member, 1] + within // wide) * across + low[member, 0] + within % wide
    tile, order = tile.sort(stable=True)
    sizes = torch.bincount(tile, minlength=down * across)
    slot = torch.arange(len(tile)) - (sizes.cumsum(0) - sizes)[tile]
    index = torch.full((down * across, max(1, int(sizes.max()))), -1)
    index[tile, slot] = member[order]
    pixel = torch.arange(_SIDE) + 0.5
    parts = []
    for first in range(0, len(index), step := max(1, _CELLS // (index.shape[1] * _SIDE**2))):
        own = index[first : first + step]
        at = torch.arange(first, first + len(own))
        chosen = own.clamp_min(0)
        dx = (at % across * _SIDE)[:, None, None] + pixel[:, None] - centres[chosen, 0][:, None]  # [t, x, L]
        dy = (at // across * _SIDE)[:, None, None] + pixel[:, None] - centres[chosen, 1][:, None]
        q = conics[chosen][:, None, None]
        dx, dy = dx[:, None], dy[:, :, None]
        half = (q[..., 0] * dx * dx + q[..., 2] * dy * dy) / 2 + q[..., 1] * dx * dy  # [t, y, x, L]
        seen = (half <= reach**2 / 2) & (own >= 0)[:, None, None]
        weights = torch.where(seen, torch.exp(-half), torch.zeros(()))
        parts.append(torch.einsum("tyxl,tlc->tcyx", weights, colours[chosen]))
    tiles = torch.cat(parts).view(down, across, -1, _SIDE, _SIDE)
    return tiles.permute(2, 0, 3, 1, 4).reshape(-1, down * _SIDE, across * _SIDE)[:, :height, :width]


def kodak(context: ProofContext) -> list[tuple[str, Tensor]]:
    """The pictures of kodak12 where they are at hand. Shape: [3, H, W] each."""
    folder = context.folder("kodak12")
    if folder is None:
        return []
    found = []
    for file, _ in pictures.list_pictures(folder):
        found.append((file.stem, pictures.load(file).rgb()[0].contiguous()))
    return found


def crop(picture: Tensor, side: int) -> Tensor:
    """A square from the middle. Shape: [3, H, W] -> [3, side, side]."""
    y, x = ((n - side) // 2 for n in picture.shape[1:])
    return picture[:, y : y + side, x : x + side].contiguous()
