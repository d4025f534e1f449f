"""Spatial shift: neighbourhood mixing without parameters or multiplications."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from foveate.errors import InputError

EIGHT = ((-1, 0), (1, 0), (0, -1), (0, 1), (1, 1), (1, -1), (-1, 1), (-1, -1))
"""SCNet's order of (dy, dx); weights depend on it."""

FOUR = ((-1, 0), (1, 0), (0, -1), (0, 1))


class SpatialShift(nn.Module):
    """Move each group of channels one step in a direction of its own.

    out[:, i, y, x] = x[:, i, y + dy_i, x + dx_i], zero outside the picture. Equal to a depth-wise convolution with
    one-hot kernels; linear, and its adjoint is the shift by the opposite vectors.

    Args:
        directions: (dy, dx) of each group; the channels are divided evenly among them.
        step: pixels per shift.
        identity: one more group, the last, stays where it is.
        circular: wrap around rather than pad with zeros.

    Shape: [B, C, H, W] -> the same; C divisible by the number of groups.
    Raises: InputError when C does not divide evenly.
    """

    def __init__(
        self,
        directions: tuple[tuple[int, int], ...] = EIGHT,
        step: int = 1,
        identity: bool = False,
        circular: bool = False,
    ) -> None:
        super().__init__()
        self.directions = directions + (((0, 0),) if identity else ())
        self.step, self.circular = step, circular

    def forward(self, x: Tensor) -> Tensor:
        groups = len(self.directions)
        if x.shape[1] % groups:
            raise InputError(
                f"a shift in {groups} groups needs channels divisible by {groups}, got {x.shape[1]}; change the width."
            )
        p = self.step
        if self.circular:
            shifts = [(-dy * p, -dx * p) for dy, dx in self.directions]
            parts = zip(x.chunk(groups, 1), shifts, strict=True)
            return torch.cat([part.roll(shift, (2, 3)) for part, shift in parts], 1)
        h, w = x.shape[2:]
        padded = F.pad(x, (p, p, p, p)).chunk(groups, 1)
        return torch.cat(
            [
                part[:, :, p + dy * p : p + dy * p + h, p + dx * p : p + dx * p + w]
                for part, (dy, dx) in zip(padded, self.directions, strict=True)
            ],
            1,
        )
