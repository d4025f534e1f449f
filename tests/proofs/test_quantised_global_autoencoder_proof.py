"""Proof of QG-VAE: the verdict can fail, the baseline is local and as large, and both see the same pictures."""

import pytest
import torch

from foveate.meter import count_parameters
from foveate.proofs import ProofContext
from foveate.proofs.compress import quantised_global_autoencoder as qg


@pytest.mark.parametrize(
    ("few", "many", "prefixes", "holds"),
    [
        (0.7, 0.85, [3.0, 2.0, 1.0], True),
        (0.7, 0.85, [], True),
        (0.7, 0.95, [3.0, 2.0, 1.0], False),
        (0.89, 0.85, [3.0, 2.0, 1.0], False),
        (0.7, 0.85, [3.0, 3.1, 1.0], False),
    ],
)
def test_the_verdict_needs_all_of_it(few: float, many: float, prefixes: list[float], holds: bool) -> None:
    assert qg.verdict(few, many, prefixes) is holds


@pytest.mark.parametrize("tokens", [qg.FEW, qg.MANY])
def test_both_have_as_many_tokens_and_parameters(tokens: int) -> None:
    x, sizes = torch.rand(2, 1, qg.SIDE, qg.SIDE), []
    for kind in ("patch", "global"):
        network = qg.build(kind, tokens)
        drawn, found = network(x)
        assert drawn.shape == x.shape
        assert found is not None
        assert found.codes.numel() == 2 * tokens
        assert network.quantiser.books.shape[1:] == (qg.WORDS, qg.DIM)
        sizes.append(count_parameters(network))
    assert 0.8 < sizes[0] / sizes[1] < 1.2


def test_a_patch_token_changes_a_window_only() -> None:
    torch.manual_seed(0)
    network = qg.PatchAutoencoder((2, 3), 8).eval()
    words = torch.randn(1, qg.DIM, 8, 8)
    other = words.clone()
    other[..., 0, 0] += 1
    moved = (network.decoder(words) != network.decoder(other))[0, 0]
    assert moved[:6, :6].float().mean() > 0.9
    assert not moved[25:].any()
    assert not moved[:, 25:].any()


def test_learned_and_tested_pictures_are_apart() -> None:
    context = ProofContext()
    faces, textures = qg.faces(context), qg.textures(context)
    assert (len(faces.learned), len(faces.tested)) == (70, 30)
    for pictures in (faces, textures):
        assert pictures.learned.shape[1:] == (1, qg.SIDE, qg.SIDE)
        assert float(torch.cdist(pictures.learned.flatten(1), pictures.tested.flatten(1)).min()) > 0.1
    assert qg.photographs(context) == {}


def test_pictures_come_in_the_same_order_for_the_same_seed() -> None:
    x = torch.rand(4, 1, qg.SIDE, qg.SIDE)
    first, second = (qg.shaken(x, torch.Generator().manual_seed(3)) for _ in range(2))
    assert torch.equal(first, second)
    assert first.shape == x.shape


def test_training_lowers_the_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(qg.STEPS, "quick", 20)
    monkeypatch.setattr(qg, "REVIVE", 5)
    monkeypatch.setattr(qg, "BATCH", 8)
    context = ProofContext()
    faces = qg.faces(context)
    mean = float((faces.tested - faces.learned.mean()).square().mean())
    network = qg.trained("patch", qg.FEW, faces, context)
    assert qg.error(network, faces.tested) < mean
    assert 0 < qg.used(network, faces.learned) <= 1
