"""Numbers to few whole numbers and back, with gradients that pass through.

    round_through   rounds forwards, the identity backwards (straight-through, Bengio et al. 2013, arXiv:1308.3432)
    Affine          q = round(clamp((x - offset) / step, 0, 2^b - 1)), x^ = q step + offset, step and offset per channel
                    learned
    ResidualVQ      M codebooks in turn, each for what those before left over; x^ is the sum of M codewords, which are
                    found by k-means and learned

Each has `codes`, `values` (of codes) and a call that gives the quantised numbers with gradients.
"""

from typing import Self

import torch
from torch import Tensor

from foveate.errors import InputError
from foveate.layers.vector_quantise import kmeans, nearest


def round_through(x: Tensor) -> Tensor:
    """Round; gradients pass as if nothing had happened."""
    return x + (x.round() - x).detach()


class Affine:
    """A uniform quantiser for each channel.

    Args:
        step, offset: of each channel, [K].
        bits: b, codes are 0 to 2^b - 1.
    """

    def __init__(self, step: Tensor, offset: Tensor, bits: int) -> None:
        self.step, self.offset, self.bits = step, offset, bits
        self.top = 2**bits - 1

    @classmethod
    def of(cls, values: Tensor, bits: int, outside: float = 0.0) -> Self:
        """Span the range of values [N, K], but for the share `outside` at either end.

        >>> Affine.of(torch.tensor([[0.0], [3.0]]), 2).codes(torch.tensor([[0.9], [9.0]])).tolist()
        [[1], [3]]
        """
        if not 1 <= bits <= 16 or values.dim() != 2 or not len(values):
            raise InputError(f"Affine quantises [N, K] to 1..16 bits, got {tuple(values.shape)} and {bits}.")
        ordered = values.detach().sort(0).values
        cut = int(outside * len(values))
        low, high = ordered[cut], ordered[len(values) - 1 - cut]
        return cls(((high - low) / (2**bits - 1)).clamp_min(1e-6), low.clone(), bits)

    def __call__(self, values: Tensor) -> Tensor:
        """x^ with gradients to values, step and offset."""
        return round_through(((values - self.offset) / self.step).clamp(0, self.top)) * self.step + self.offset

    def codes(self, values: Tensor) -> Tensor:
        """Whole numbers. Shape: [N, K] -> [N, K] int64."""
        return ((values.detach() - self.offset) / self.step).clamp(0, self.top).round().long()

    def values(self, codes: Tensor) -> Tensor:
        """What codes stand for. Shape: [N, K] -> [N, K]."""
        return codes * self.step + self.offset


class ResidualVQ:
    """Codebooks in turn.

    Args:
        words: [M, B, D].
    """

    def __init__(self, words: Tensor) -> None:
        self.words = words

    @classmethod
    def of(cls, values: Tensor, stages: int, size: int, generator: torch.Generator, rounds: int = 10) -> Self:
        """Codebooks by k-means on values [N, D] and what remains of them."""
        books, rest = [], values.detach()
        for _ in range(stages):
            book = kmeans(rest[None], size, generator, rounds)[0]
            rest = rest - book[nearest(rest, book)]
            books.append(book)
        return cls(torch.stack(books))

    def __call__(self, values: Tensor) -> Tensor:
        """x^ with gradients to values and words."""
        return self.values(self.codes(values)) + (values - values.detach())

    def codes(self, values: Tensor) -> Tensor:
        """The nearest codeword of each stage. Shape: [N, D] -> [N, M] int64."""
        rest, codes = values.detach(), []
        for book in self.words:
            codes.append(nearest(rest, book))
            rest = rest - book[codes[-1]]
        return torch.stack(codes, 1)

    def values(self, codes: Tensor) -> Tensor:
        """Sums of codewords. Shape: [N, M] -> [N, D]."""
        return torch.stack([book[code] for book, code in zip(self.words, codes.unbind(1), strict=True)]).sum(0)
