"""Token sequences of different lengths, end to end in one tensor: nothing is padded, so nothing is computed on padding.

A batch of B sequences of n_1 .. n_B tokens is values [T, C] with T = sum n_b, and the B lengths. Whatever treats tokens
one by one (linear layers, norms, MLPs) runs on `values` as it is; attention must not look across borders, which
`foveate.ops.packed_attention` sees to.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate

import torch
from torch import Tensor

from foveate.errors import InputError


@dataclass(frozen=True, eq=False)
class Packed:
    """Hold sequences end to end.

    Args:
        values: tokens of all sequences, [T, ...].
        lengths: tokens of each sequence; they sum to T.

    Raises: InputError when they do not.

    >>> p = Packed.of([torch.zeros(2, 3), torch.ones(1, 3)])
    >>> p.values.shape, p.lengths, p.offsets
    (torch.Size([3, 3]), (2, 1), (0, 2, 3))
    """

    values: Tensor
    lengths: tuple[int, ...]

    def __post_init__(self) -> None:
        if any(n < 0 for n in self.lengths) or sum(self.lengths) != len(self.values):
            raise InputError(f"Lengths {self.lengths} do not add up to the {len(self.values)} tokens given.")

    @classmethod
    def of(cls, sequences: Sequence[Tensor]) -> "Packed":
        """Put sequences [n_b, C] end to end."""
        return cls(torch.cat(list(sequences)), tuple(len(s) for s in sequences))

    @classmethod
    def select(cls, x: Tensor, keep: Tensor) -> "Packed":
        """Take the marked tokens of each sequence, in order. Shape: x [B, N, C], keep bool [B, N]."""
        if keep.dtype != torch.bool or keep.shape != x.shape[:2]:
            raise InputError(f"select needs marks bool {tuple(x.shape[:2])}, got {keep.dtype} {tuple(keep.shape)}.")
        return cls(x[keep], tuple(keep.sum(1).tolist()))

    @cached_property
    def offsets(self) -> tuple[int, ...]:
        """Where each sequence starts, and T at the end: B + 1 numbers."""
        return tuple(accumulate(self.lengths, initial=0))

    @property
    def item(self) -> Tensor:
        """The sequence that each token belongs to, [T]."""
        lengths = torch.tensor(self.lengths, device=self.values.device)
        return torch.arange(len(self.lengths), device=lengths.device).repeat_interleave(lengths)

    def replaced(self, values: Tensor) -> "Packed":
        """The same layout with other values. Shape: [T, ...]."""
        return Packed(values, self.lengths)

    def unbind(self) -> tuple[Tensor, ...]:
        """The sequences, as views."""
        return self.values.split(self.lengths)

    @property
    def mask(self) -> Tensor:
        """Which places of the padded form hold a token, bool [B, longest]."""
        lengths = torch.tensor(self.lengths, device=self.values.device)
        return torch.arange(max(self.lengths, default=0), device=lengths.device) < lengths[:, None]

    def padded(self, fill: float = 0.0) -> Tensor:
        """Sequences side by side, the short ones filled up. Shape: [B, longest, ...]."""
        return self.scattered(self.mask, fill)

    def scattered(self, keep: Tensor, fill: float | Tensor = 0.0) -> Tensor:
        """Put tokens back to where `select` took them from; `fill` is for the other places.

        Shape: keep bool [B, N] with lengths[b] marks in row b -> [B, N, ...].
        """
        out = self.values.new_empty(*keep.shape, *self.values.shape[1:])
        out[:] = fill
        out[keep] = self.values
        return out
