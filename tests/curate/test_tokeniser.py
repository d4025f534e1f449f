"""Tokenisers: the nearest words of features, at unit length where asked, and patches back to pictures."""

from pathlib import Path

import pytest
import torch
from torch import nn

from foveate.curate.tokeniser import PatchTokeniser, Tokeniser
from foveate.data import pictures
from foveate.errors import InputError


@pytest.fixture(scope="module")
def photos() -> torch.Tensor:
    picture = pictures.samples()["astronaut"][:, :256, :256]
    return picture.unfold(1, 32, 32).unfold(2, 32, 32).permute(1, 2, 0, 3, 4).flatten(0, 1).contiguous()


def test_lengths_do_not_matter_when_normalised() -> None:
    torch.manual_seed(0)
    book, x = torch.randn(7, 3) * torch.rand(7, 1), torch.randn(2, 3, 4, 5)
    tokens = Tokeniser(nn.Identity(), book, normalise=True)(x)
    assert torch.equal(tokens, Tokeniser(nn.Identity(), 9 * book, normalise=True)(0.1 * x))
    cosine = torch.einsum("bdhw,kd->bkhw", x, book / book.norm(dim=1, keepdim=True))
    assert torch.equal(tokens, cosine.argmax(1))
    with pytest.raises(InputError, match=r"\[B, 3, h, w\]"):
        Tokeniser(nn.Identity(), book)(torch.randn(1, 4, 2, 2))


def test_patches_go_to_the_nearest_word_and_back(photos: torch.Tensor) -> None:
    tokeniser = PatchTokeniser(4, 64, 12).fit(photos, rounds=5)
    tokens = tokeniser(photos)
    assert tokens.shape == (64, 8, 8)
    back = tokeniser.decode(tokens)
    assert back.shape == photos.shape
    assert (back - photos).square().mean() < 0.15 * (photos - photos.mean((0, 2, 3), keepdim=True)).square().mean()
    # Components are orthonormal, so a word decodes to a patch whose features are the word.
    assert torch.allclose(tokeniser.encoder(back), tokeniser.features(tokens), atol=1e-5)
    worse = PatchTokeniser(4, 8, 12).fit(photos, rounds=5)
    assert (worse.decode(worse(photos)) - photos).square().mean() > (back - photos).square().mean()


def test_words_are_sorted_by_use(photos: torch.Tensor) -> None:
    tokeniser = PatchTokeniser(4, 30, 6).fit(photos, rounds=3)
    counts = torch.bincount(tokeniser(photos).reshape(-1), minlength=30)
    assert (counts.diff() <= 0).float().mean() > 0.9
    assert len(tokeniser.keep(tokeniser(photos), 10).codebook) == 10
    tokeniser.keep(torch.tensor([4, 4, 2]))
    assert len(tokeniser.codebook) == 2


def test_saved_and_loaded_it_is_the_same(photos: torch.Tensor, tmp_path: Path) -> None:
    tokeniser = PatchTokeniser(4, 20, 6).fit(photos, rounds=2)
    tokeniser.save_pretrained(tmp_path)
    assert torch.equal(PatchTokeniser.from_pretrained(tmp_path)(photos), tokeniser(photos))


def test_settings_that_do_not_fit() -> None:
    with pytest.raises(InputError, match="dim is 1 to 48"):
        PatchTokeniser(4, 8, 49)
    with pytest.raises(InputError, match="of 4 pixels or more"):
        PatchTokeniser(4).fit(torch.rand(2, 3, 3, 3))
    with pytest.raises(InputError, match="codebook is"):
        Tokeniser(nn.Identity(), torch.rand(3))
