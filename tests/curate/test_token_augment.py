"""Changes to tokens: what they keep, what they mix, and that the same dice do the same."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from foveate.curate import token_augment as augment
from foveate.errors import InputError


def _dice(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def test_synonyms_are_the_nearest_others() -> None:
    book = torch.tensor([[0.0], [1.0], [3.0], [3.5]])
    assert augment.synonyms(book, 2).tolist() == [[1, 2], [0, 2], [3, 1], [2, 1]]
    with pytest.raises(InputError, match="1 to 3"):
        augment.synonyms(book, 4)


def test_replacing() -> None:
    tokens, table = torch.randint(0, 9, (20, 8, 8)), torch.arange(9).view(9, 1)
    others = (torch.arange(9).view(9, 1) + 1) % 9
    assert torch.equal(augment.replace(tokens, others, 0.0, _dice()), tokens)
    assert torch.equal(augment.replace(tokens, table, 1.0, _dice()), tokens)
    assert torch.equal(augment.replace(tokens, others, 1.0, _dice()), (tokens + 1) % 9)
    share = (augment.replace(tokens, others, 0.25, _dice()) != tokens).float().mean()
    assert 0.2 < share < 0.3


@settings(deadline=None, max_examples=30)
@given(st.integers(0, 2**31), st.integers(4, 12), st.integers(4, 12))
def test_swapping_moves_tokens_and_loses_none(seed: int, height: int, width: int) -> None:
    tokens = torch.arange(5 * height * width).view(5, height, width)
    moved = augment.swap(tokens, _dice(seed), largest=0.5)
    assert torch.equal(moved.flatten(1).sort(1).values, tokens.flatten(1))
    # Twice what is moved is a square number, two squares of it, in every picture.
    for count in (moved != tokens).flatten(1).sum(1).tolist():
        assert (count / 2) ** 0.5 == round((count / 2) ** 0.5)


def test_an_exchange_of_squares_undoes_itself() -> None:
    tokens = torch.randint(0, 99, (2, 6, 7))
    first, second, side = torch.tensor([[0, 0], [1, 2]]), torch.tensor([[3, 4], [4, 2]]), torch.tensor([3, 2])
    once = augment.exchange_squares(tokens, first, second, side)
    assert torch.equal(once[0, :3, :3], tokens[0, 3:6, 4:7])
    assert torch.equal(once[1, 4:6, 2:4], tokens[1, 1:3, 2:4])
    assert torch.equal(augment.exchange_squares(once, first, second, side), tokens)


def test_cropping_words_is_cropping_one_hot_maps_and_looking_up() -> None:
    torch.manual_seed(0)
    tokens, book = torch.randint(0, 11, (3, 8, 8)), torch.randn(11, 5)
    hot = F.one_hot(tokens, 11).permute(0, 3, 1, 2).float()
    words = book[tokens].permute(0, 3, 1, 2)
    assert torch.allclose(torch.einsum("bkhw,kd->bdhw", hot, book), words)
    part = augment.boxes(3, _dice())
    looked_up = torch.einsum("bkhw,kd->bdhw", augment.crop(hot, part, 7), book)
    assert torch.allclose(looked_up, augment.crop(words, part, 7), atol=1e-5)


def test_crops_are_parts_of_the_picture() -> None:
    part = augment.boxes(500, _dice(), scale=(0.2, 0.6))
    assert (part[:, :2] >= 0).all()
    assert (part[:, :2] + part[:, 2:] <= 1 + 1e-6).all()
    area = part[:, 2] * part[:, 3]
    assert 0.19 < area.min() < area.max() < 0.61
    x = torch.rand(2, 3, 8, 8)
    assert torch.allclose(augment.crop(x, torch.tensor([[0, 0, 1, 1.0]] * 2), 8), x, atol=1e-6)
    quarter = augment.crop(x, torch.tensor([[0.5, 0, 0.5, 0.5]] * 2), 4)
    assert torch.allclose(quarter, x[:, :, :4, 4:], atol=1e-6)


def test_the_middle_is_28_of_32() -> None:
    at = torch.arange(32.0)
    assert augment.centre(at.expand(1, 1, 32, 32), 28)[0, 0, 0].tolist() == at[2:30].tolist()


def test_noise_and_exchange_change_half_of_the_pictures() -> None:
    torch.manual_seed(0)
    x = torch.randn(10, 4, 5, 5) * torch.rand(10, 4, 1, 1) + torch.randn(10, 4, 1, 1)
    for changed in (augment.noise(x, 1.0, _dice()), augment.exchange(x, _dice())):
        assert int((changed != x).flatten(1).any(1).sum()) == 5
    assert torch.equal(augment.noise(x, 0.0, _dice()), x)
    moved = augment.exchange(x, _dice())
    where = (moved != x).flatten(1).any(1)
    assert torch.allclose(moved.mean((2, 3))[where], x.flip(0).mean((2, 3))[where], atol=1e-4)
    assert torch.allclose(moved.std((2, 3))[where], x.flip(0).std((2, 3))[where], atol=1e-4)
    same = x[:1].expand(6, -1, -1, -1)
    assert torch.allclose(augment.exchange(same, _dice()), same, atol=1e-5)


@settings(deadline=None, max_examples=30)
@given(st.integers(0, 2**31))
def test_cutmix_mixes_targets_by_area(seed: int) -> None:
    x = torch.tensor([0.0, 1.0]).view(2, 1, 1, 1).expand(2, 1, 6, 5).clone()
    mixed, target = augment.cutmix(x, torch.tensor([0, 1]), 2, _dice(seed), smoothing=0.0)
    share = mixed[0].mean()
    assert torch.allclose(target, torch.stack([torch.stack([1 - share, share]), torch.stack([share, 1 - share])]))
    assert torch.allclose(mixed[1], 1 - mixed[0])


def test_without_cutmix_labels_are_smoothed_only() -> None:
    x = torch.rand(3, 2, 4, 4)
    mixed, target = augment.cutmix(x, torch.tensor([1, 0, 3]), 4, _dice(), alpha=0.0, smoothing=0.2)
    assert torch.equal(mixed, x)
    assert torch.allclose(target[0], torch.tensor([0.05, 0.85, 0.05, 0.05]))
