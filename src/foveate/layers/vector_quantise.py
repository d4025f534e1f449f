"""Vectors to places in a codebook and back: nearest words, gradients past the choice, k-means, revival of unused words.

    code  k = argmin_j |v - e_j|^2         value  e_k, which gradients pass as if it were v (straight-through)
    loss  b |sg(v) - e_k|^2 + g |v - sg(e_k)|^2      sg: without gradient

Several codebooks side by side [C, K, D] quantise C kinds of vectors, each with its own words.
A word that no vector chose since the last look is put beside the word whose own gradient was largest, whose cell is so
cut in two (Elsner et al. 2024, arXiv:2407.11913). As only words in use can be cut, at most as many come back at a time.
"""

from typing import NamedTuple

import torch
from torch import Tensor, nn

from foveate.errors import InputError

_QUIET = 1e-6  # a gradient below is none


class Quantised(NamedTuple):
    """What a quantiser gives.

    Attributes:
        values: words, gradients pass to the vectors. Shape: [..., C, D].
        codes: int64 [..., C].
        loss: scalar.
    """

    values: Tensor
    codes: Tensor
    loss: Tensor


def nearest(values: Tensor, books: Tensor) -> Tensor:
    """Place of the nearest word, by |e|^2 - 2 v e.

    Shape: values [..., N, D], books [..., K, D] -> [..., N] int64.
    """
    return torch.sub(books.square().sum(-1)[..., None, :], values @ books.mT, alpha=2).argmin(-1)


def kmeans(values: Tensor, words: int, generator: torch.Generator, rounds: int = 10) -> Tensor:
    """Codebooks by Lloyd's algorithm from random vectors; a word without vectors moves to one that fits badly.

    Args:
        values: N vectors for each of C codebooks.
        words: K; where there are fewer vectors, some words are equal.
        rounds: of the algorithm.

    Shape: values [C, N, D] -> [C, K, D].
    Raises: InputError without vectors.
    """
    if values.dim() != 3 or not values.numel() or words < 1:
        raise InputError(f"kmeans takes vectors [C, N, D] and 1 word or more, got {tuple(values.shape)} and {words}.")
    books_count, count, dim = values.shape
    start = torch.randperm(count, generator=generator).to(values.device)
    books = values[:, start.repeat(-(-words // count))[:words]].clone()
    for _ in range(rounds):
        codes = nearest(values, books)
        mass = values.new_zeros(books_count, words).scatter_add_(1, codes, torch.ones_like(values[..., 0]))
        sums = torch.zeros_like(books).scatter_add_(1, codes[..., None].expand(-1, -1, dim), values)
        lost = (values - words_of(codes, books)).square().sum(-1)
        worst = lost.topk(min(words, count), dim=1).indices.repeat(1, -(-words // count))[:, :words]
        away = values.gather(1, worst[..., None].expand(-1, -1, dim))
        # The n-th empty word takes the n-th worst vector.
        rank = ((mass == 0).cumsum(1) - 1).clamp_min(0)
        spare = away.gather(1, rank[..., None].expand(-1, -1, dim))
        books = torch.where(mass[..., None] > 0, sums / mass[..., None].clamp_min(1), spare)
    return books


def words_of(codes: Tensor, books: Tensor) -> Tensor:
    """Words at their places. Shape: codes [C, N], books [C, K, D] -> [C, N, D]."""
    return books.gather(1, codes[..., None].expand(-1, -1, books.shape[-1]))


class VectorQuantiser(nn.Module):
    """Codebooks side by side, learned by gradients.

    Args:
        words: K, of each codebook.
        dim: D.
        books: C.
        follow: b of the loss, how fast words follow vectors.
        commit: g, how strongly vectors are drawn to their words.

    Shape: [B, C, D] -> `Quantised` of the same.
    Raises: InputError for sizes below 1 or vectors of another size.
    """

    strain: Tensor

    def __init__(self, words: int, dim: int, books: int = 1, follow: float = 0.25, commit: float = 1.0) -> None:
        super().__init__()
        if min(words, dim, books) < 1:
            raise InputError(f"a quantiser has at least 1 word, number and book, got {words=}, {dim=}, {books=}.")
        self.follow, self.commit = follow, commit
        self.books = nn.Parameter(torch.rand(books, words, dim) - 0.5)
        self.register_buffer("strain", torch.zeros(books, words), persistent=False)

    def forward(self, values: Tensor) -> Quantised:
        codes = self.codes(values)
        words = self.words(codes)
        loss = self.follow * (values.detach() - words).square().mean()
        loss = loss + self.commit * (values - words.detach()).square().mean()
        return Quantised(values + (words - values).detach(), codes, loss)

    def codes(self, values: Tensor) -> Tensor:
        """Places of the nearest words. Shape: [B, C, D] -> [B, C] int64."""
        if values.dim() != 3 or values.shape[1:] != (len(self.books), self.books.shape[2]):
            wanted = f"[B, {len(self.books)}, {self.books.shape[2]}]"
            raise InputError(f"expected vectors of shape {wanted}, got {tuple(values.shape)}; reshape them.")
        return nearest(values.detach().transpose(0, 1), self.books.detach()).T

    def words(self, codes: Tensor) -> Tensor:
        """What codes stand for. Shape: [B, C] -> [B, C, D]."""
        return words_of(codes.T, self.books).transpose(0, 1)

    @torch.no_grad()
    def start(self, values: Tensor, generator: torch.Generator, rounds: int = 10) -> None:
        """Put the words where vectors are, by k-means. Shape: [B, C, D]."""
        self.books.copy_(kmeans(values.transpose(0, 1).contiguous(), self.books.shape[1], generator, rounds))

    def observe(self) -> None:
        """Take the gradients of the last step into account; call it between `backward` and `zero_grad`."""
        if self.books.grad is not None:
            self.strain += self.books.grad.abs().mean(2)

    @torch.no_grad()
    def revive(self, generator: torch.Generator, spread: float = 1e-4) -> int:
        """Put words without gradients since the last call beside those with the largest, and forget all gradients.

        Returns: how many there were.
        """
        count = 0
        for book, strain in zip(self.books, self.strain, strict=True):
            idle, (most, order) = (strain == 0).nonzero()[:, 0], strain.sort(descending=True)
            pairs = min(len(idle), int((most > _QUIET).sum()))
            noise = torch.rand(pairs, book.shape[1], generator=generator).to(book) * 2 - 1
            book[idle[:pairs]] = book[order[:pairs]] + spread * noise
            count += pairs
        self.strain.zero_()
        return count
