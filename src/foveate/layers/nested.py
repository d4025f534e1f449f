"""Nested layers: a narrow token passes through a slice of the same matrix that wide tokens use whole.

Jain et al. 2024, arXiv:2407.19985 (Mixture of Nested Experts), after MatFormer (Devvrit et al. 2023, arXiv:2310.07707).

A token of width d <= D has D features all the same, of which it uses and changes the first d only:

    reading layer (query, key, value, first of an MLP)    h = x[:d] W[:, :d]^T + b            all outputs
    writing layer (after attention, last of an MLP)       y = [h W[:d]^T + b[:d], 0 ... 0]    d outputs, padded to D

so all tokens meet in attention and in the middle of MLPs at full width, and a token costs d / D of what it would in
both kinds of layers. With tokens sorted by width the rows that are at least as wide as d_j lie together, and

    h[rows >= j] += x[rows >= j, d_{j-1} : d_j] W[:, d_{j-1} : d_j]^T         y[rows >= j, d_{j-1} : d_j] = ...

takes one dense product per width, of slices that need no copy, and reads every weight once. With gradients it is one
product per width of just the rows that have it, which keeps less for the backward pass.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from foveate.engine.route import Route


@dataclass(frozen=True, eq=False)
class Nesting:
    """Hold which width each token of a batch has, sorted once for all layers.

    Rows in order are those of the narrowest width first, and of one width the first of every picture, then the second
    of every picture, and so on. So [T, C] is [N, B, C] too, and attention finds its pictures without a copy.

    Args:
        route: tokens of the batch sorted by width.
        widths: channels of each width, ascending.
        pictures: B.

    >>> nesting = Nesting.of(torch.tensor([[1, 0], [0, 1]]), (1, 2))
    >>> nesting.sort(torch.tensor([[[1.0], [2.0]], [[3.0], [4.0]]])).flatten()
    tensor([2., 3., 1., 4.])
    """

    route: Route
    widths: tuple[int, ...]
    pictures: int

    @classmethod
    def of(cls, width: Tensor, widths: Sequence[int]) -> "Nesting":
        """Sort tokens.

        Args:
            width: which of the widths each token has; all pictures have equally many of each.

        Shape: width [B, N].
        """
        pictures, tokens = width.shape
        counts = torch.bincount(width[0], minlength=len(widths)).tolist()
        first = torch.arange(pictures, device=width.device)[:, None] * tokens
        order = (first + width.to(torch.uint8).sort(dim=1, stable=True).indices).T.flatten()
        return cls(Route(order, tuple(pictures * count for count in counts)), tuple(widths), pictures)

    def sort(self, x: Tensor) -> Tensor:
        """Put tokens in order. Shape: [B, N, C] -> [T, C]."""
        return x.flatten(0, 1).index_select(0, self.route.order)

    def restore(self, x: Tensor) -> Tensor:
        """Undo `sort`. Shape: [T, C] -> [B, N, C]."""
        return x.index_select(0, self.route.inverse).unflatten(0, (self.pictures, -1))

    def runs(self) -> Iterator[tuple[int, slice]]:
        """Walk through (channels, rows that have so many)."""
        for i, start, stop in self.route.runs():
            yield self.widths[i], slice(start, stop)

    def bands(self) -> Iterator[tuple[slice, slice]]:
        """Walk through (channels, rows that have them)."""
        before, start = 0, 0
        for d, count in zip(self.widths, self.route.counts, strict=True):
            yield slice(before, d), slice(start, None)
            before, start = d, start + count

    def read(self, x: Tensor, layer: nn.Linear) -> Tensor:
        """Let each row give what it has. Shape: sorted [T, D] -> [T, O]."""
        weight, bias = layer.weight, layer.bias
        if _recorded(x):
            return torch.cat([F.linear(x[rows, :d], weight[:, :d], bias) for d, rows in self.runs()])
        out = x.new_zeros(len(x), len(weight)) if bias is None else bias.repeat(len(x), 1)
        for band, rows in self.bands():
            _add(out[rows], x[rows, band], weight[:, band])
        return out

    def write(self, x: Tensor, layer: nn.Linear) -> Tensor:
        """Let each row take what it can, zeros beyond. Shape: sorted [T, H] -> [T, D]."""
        weight, bias = layer.weight, layer.bias
        if _recorded(x):
            parts = ((d, F.linear(x[rows], weight[:d], None if bias is None else bias[:d])) for d, rows in self.runs())
            return torch.cat([F.pad(y, (0, len(weight) - d)) for d, y in parts])
        out = x.new_zeros(len(x), len(weight))
        for band, rows in self.bands():
            out[rows, band] = 0 if bias is None else bias[band]
            _add(out[rows, band], x[rows], weight[band])
        return out

    def attend(self, q: Tensor, k: Tensor, v: Tensor, dropout: float = 0.0) -> Tensor:
        """Attention within each picture, of rows in order. Shape: three of [1, h, T, d] -> [1, h, T, d]."""
        q, k, v = (t[0].unflatten(1, (-1, self.pictures)).permute(2, 0, 1, 3) for t in (q, k, v))
        y = F.scaled_dot_product_attention(q, k, v, dropout_p=dropout)
        return y.permute(1, 2, 0, 3).flatten(1, 2)[None]


def _recorded(x: Tensor) -> bool:
    """Whether results cannot be written in place: gradients are wanted, or types are cast on the way."""
    return torch.is_grad_enabled() or torch.is_autocast_enabled(x.device.type)


def _add(out: Tensor, x: Tensor, weight: Tensor) -> None:
    torch.addmm(out, x, weight.mT, out=out)
