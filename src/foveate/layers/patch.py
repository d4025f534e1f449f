"""From pictures to tokens: one linear map per patch, and learned positions resampled to another grid."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from foveate.errors import InputError


class PatchEmbed(nn.Module):
    """Map every patch x patch square to a token by a convolution whose stride is its kernel.

    Sides that the patch does not divide are padded with zeros on the right and at the bottom.

    Args:
        channels: of the picture.
        dim: D, of a token.
        patch: side in pixels.

    Shape: [B, C, H, W] -> [B, D, ceil(H / patch), ceil(W / patch)]; `.flatten(2).mT` makes it tokens [B, N, D].
    """

    def __init__(self, channels: int, dim: int, patch: int) -> None:
        super().__init__()
        self.proj = nn.Conv2d(channels, dim, patch, patch)

    def forward(self, x: Tensor) -> Tensor:
        patch = self.proj.stride[0]
        down, across = -x.shape[2] % patch, -x.shape[3] % patch
        return self.proj(F.pad(x, (0, across, 0, down)) if down or across else x)


def resample_positions(positions: Tensor, old: tuple[int, int], new: tuple[int, int]) -> Tensor:
    """Resample learned positions, row by row, from one grid (rows, columns) to another by bicubic interpolation.

    Tokens before the grid (a class token) keep their positions.

    Shape: positions [1, P + old rows * columns, D] -> [1, P + new rows * columns, D].
    Raises: InputError when there are fewer positions than the old grid holds.
    """
    prefix = positions.shape[1] - old[0] * old[1]
    if prefix < 0:
        raise InputError(
            f"{positions.shape[1]} positions do not fill a grid of {old}; pass the grid they were made for."
        )
    if old == new:
        return positions
    head, grid = positions[:, :prefix], positions[:, prefix:].unflatten(1, old).permute(0, 3, 1, 2)
    grid = F.interpolate(grid.float(), size=new, mode="bicubic", antialias=True).to(positions.dtype)
    return torch.cat([head, grid.flatten(2).mT], 1)
