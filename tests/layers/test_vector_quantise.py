"""Vectors to words: the nearest ones, gradients past them, k-means, and the revival of words that nobody chooses."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from foveate.errors import InputError
from foveate.layers.vector_quantise import VectorQuantiser, kmeans, nearest, words_of


@settings(deadline=None, max_examples=30)
@given(st.integers(0, 2**31), st.integers(1, 4), st.integers(1, 6), st.integers(1, 9), st.integers(1, 5))
def test_codes_are_those_of_a_search_one_by_one(seed: int, books: int, count: int, words: int, dim: int) -> None:
    torch.manual_seed(seed)
    values, book = torch.randn(books, count, dim).double(), torch.randn(books, words, dim).double()
    found = nearest(values, book)
    for c in range(books):
        for n in range(count):
            apart = [float((values[c, n] - word).square().sum()) for word in book[c]]
            assert apart[int(found[c, n])] == pytest.approx(min(apart), abs=1e-12)


def test_gradients_pass_as_if_nothing_had_happened_and_follow_both_losses() -> None:
    torch.manual_seed(0)
    quantiser = VectorQuantiser(5, 3, 2)
    values = torch.randn(4, 2, 3, requires_grad=True)
    found = quantiser(values)
    assert torch.allclose(found.values, quantiser.words(found.codes), atol=1e-6)
    weight = torch.randn(4, 2, 3)
    (gradient,) = torch.autograd.grad((found.values * weight).sum(), values, retain_graph=True)
    assert torch.equal(gradient, weight)
    (gradient,) = torch.autograd.grad(found.loss, values, retain_graph=True)
    words = quantiser.words(found.codes).detach()
    assert torch.allclose(gradient, 2 * (values - words).detach() / values.numel(), atol=1e-7)
    found.loss.backward()
    expected = torch.zeros_like(quantiser.books)
    for b in range(4):
        for c in range(2):
            expected[c, found.codes[b, c]] += 0.25 * 2 * (words - values)[b, c].detach() / values.numel()
    assert quantiser.books.grad is not None
    assert torch.allclose(quantiser.books.grad, expected, atol=1e-7)


def test_revived_words_lie_beside_used_ones_which_stay() -> None:
    torch.manual_seed(0)
    quantiser = VectorQuantiser(8, 4, 3)
    values = quantiser.books.detach()[:, [2, 5, 6]].transpose(0, 1) + 0.01 * torch.randn(3, 3, 4)
    before, drawn = quantiser.books.detach().clone(), quantiser(values).values.detach()
    quantiser(values).loss.backward()
    quantiser.observe()
    assert quantiser.revive(torch.Generator().manual_seed(0)) == 9  # three dead ones beside three used, in each book
    after = quantiser.books.detach()
    assert torch.equal(after[:, [2, 5, 6]], before[:, [2, 5, 6]])
    moved = (after != before).any(2)
    assert moved.sum(1).tolist() == [3, 3, 3]
    apart = torch.cdist(after, before[:, [2, 5, 6]]).amin(2)
    assert float(apart[moved].max()) <= 1e-4 * 4**0.5
    assert (quantiser(values).values - drawn).abs().max() < 1e-3
    assert quantiser.revive(torch.Generator()) == 0  # nothing was seen since


def test_words_of_kmeans_are_means_and_all_in_use() -> None:
    torch.manual_seed(0)
    # Most vectors are equal, so that most words start equal and all but one of them are without vectors.
    values = torch.cat([torch.zeros(2, 150, 3), 5 * torch.randn(2, 30, 3)], 1)
    lost = []
    for rounds in (0, 1, 30):
        found = kmeans(values, 6, torch.Generator().manual_seed(1), rounds)
        codes = nearest(values, found)
        lost.append(float((values - words_of(codes, found)).square().sum()))
    assert lost[0] > lost[1] > lost[2]
    for c in range(2):
        for k in range(6):
            assert torch.allclose(values[c, codes[c] == k].mean(0), found[c, k], atol=1e-4)
    assert kmeans(values[:, -2:], 5, torch.Generator(), 2).shape == (2, 5, 3)
    with pytest.raises(InputError, match="kmeans takes"):
        kmeans(values[0], 5, torch.Generator())


def test_start_puts_words_where_vectors_are() -> None:
    torch.manual_seed(0)
    quantiser, values = VectorQuantiser(4, 2, 3), torch.randn(60, 3, 2) * 5
    before = quantiser(values).loss.item()
    quantiser.start(values, torch.Generator().manual_seed(0))
    assert quantiser(values).loss.item() < 0.5 * before
    with pytest.raises(InputError, match=r"\[B, 3, 2\]"):
        quantiser(values[:, :2])
