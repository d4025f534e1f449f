"""Proof of SeiT: the verdict can fail, and all classifiers share what they should."""

import io

import numpy as np
import pytest
import torch
from PIL import Image

from foveate.curate.seit import NONE
from foveate.meter import count_parameters
from foveate.proofs import ProofContext
from foveate.proofs.curate import seit

FINE = {"shrink": 12.0, "tokens": 50.0, "pixels": 55.0, "subset": 40.0}


@pytest.mark.parametrize("broken", [{"shrink": 9.0}, {"tokens": 49.0}, {"subset": 46.0}])
def test_the_verdict_needs_all_of_it(broken: dict[str, float]) -> None:
    assert seit.verdict(**FINE)
    assert not seit.verdict(**(FINE | broken))


def test_networks_differ_in_the_stem_alone() -> None:
    pixels, words = seit.network(3, 6), seit.network(seit.DIM, 6)
    first, second = pixels.stem(torch.rand(2, 3, 32, 32)), words.stem(torch.rand(2, seit.DIM, 8, 8))
    assert first.shape == second.shape == (2, seit.WIDTH, 4, 4)
    assert count_parameters(pixels.blocks) == count_parameters(words.blocks)


def test_textures_are_labelled_pieces_of_either_half() -> None:
    name, learned, tested, stored = seit.textures(ProofContext())
    assert "textures" in name
    assert (len(learned), len(tested)) == tuple(6 * count for count in seit.PIECES)
    assert learned.pictures.shape[1:] == (32, 32, 3)
    assert torch.bincount(learned.labels).tolist() == [seit.PIECES[0]] * 6
    whole = ProofContext().photographs()
    brick = (255 * dict(whole)["brick"].chunk(2, 2)[0]).round().byte().permute(1, 2, 0)
    piece = learned.pictures[learned.labels == 0][0]
    windows = brick.unfold(0, 32, 1).unfold(1, 32, 1)[:, :, 0]
    assert (windows == piece[..., 0]).all(3).all(2).any()
    assert 200 < stored < 2000
    assert seit.cifar(ProofContext()) is None


def test_bytes_of_png_are_those_of_png() -> None:
    _, learned, _, _ = seit.textures(ProofContext())
    one = learned.spread(1)
    stream = io.BytesIO()
    Image.fromarray(np.asarray(one.pictures[0, ..., 0])).save(stream, "PNG", optimize=True)
    assert seit.png_bytes(one) == stream.tell()


def test_a_classifier_of_tokens_learns(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(seit.STEPS, "quick", 8)
    monkeypatch.setattr(seit, "BATCH", 32)
    monkeypatch.setattr(seit, "NORMING", 3)
    torch.manual_seed(0)
    labels = torch.arange(3).repeat(32)
    tokens = torch.where(torch.rand(96, 8, 8) < 0.7, labels[:, None, None], torch.randint(0, 9, (96, 8, 8)))
    right = seit.from_tokens((tokens, labels), (tokens, labels), torch.randn(9, 5), NONE, ProofContext())
    assert right > 80
