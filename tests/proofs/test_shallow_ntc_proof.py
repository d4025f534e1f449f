"""Proof of shallow decoders: its parts measure what they say, and the verdict can fail."""

import io

import numpy as np
import pytest
import torch
from PIL import Image

from foveate.compress.transforms import TwoLayer
from foveate.data import pictures
from foveate.proofs import ProofContext
from foveate.proofs.compress import shallow_ntc as proof


def test_the_verdict_needs_all_of_it() -> None:
    assert proof.verdict(5.0, 1.2, 0.95)
    for broken in ((4.9, 1.0, 1.0), (9.0, 1.21, 1.0), (9.0, 1.0, 0.9)):
        assert not proof.verdict(*broken)


def test_the_published_ratio_is_counted() -> None:
    spent = {name: proof.flops_per_pixel(*parts) for name, parts in proof.published().items()}
    assert spent["deep"] / spent["two-layer"] == pytest.approx(217_940 / 41_032, rel=0.01)
    assert spent["JPEG-like"] == pytest.approx(32_788, rel=0.01)


def test_training_and_test_pictures_come_from_different_halves() -> None:
    train, test = proof.halves(ProofContext())
    photographs = dict(ProofContext().photographs())
    for name, left, crop in zip(proof.NAMES, train, test, strict=True):
        whole = photographs[name]
        assert torch.equal(left, whole[:, :, : left.shape[2]])
        assert left.shape[2] + crop.shape[3] <= whole.shape[2]
        assert crop.shape == (1, 3, proof.TEST, proof.TEST)


def test_training_lowers_the_cost_and_annealing_lowers_it_further(monkeypatch: pytest.MonkeyPatch) -> None:
    context = ProofContext(progress=False)
    train, test = proof.halves(context)
    x, found = test[0][..., :64, :64], []
    for steps in (0, 25):
        monkeypatch.setitem(proof.STEPS, "quick", steps)
        torch.manual_seed(0)
        coder = proof.trained(TwoLayer(proof.LATENTS), train[:1], context)
        found.append(proof.cost(coder, x, 0, 0))
    assert found[1] < 0.9 * found[0]
    assert proof.cost(coder, x, 25, 0) < found[1]


def test_a_rival_gets_as_many_bytes_and_no_more() -> None:
    picture = pictures.samples()["coffee"][:, 100:260, 200:400]
    image = Image.fromarray((picture * 255).round().byte().permute(1, 2, 0).numpy())
    stream = io.BytesIO()
    image.save(stream, "JPEG", quality=40, **proof.RIVALS["JPEG"])
    size = stream.tell()
    exact = proof.rival(picture, size, "JPEG")
    assert proof.rival(picture, size - 200, "JPEG") < exact < proof.rival(picture, size + 200, "JPEG")
    decoded = torch.from_numpy(np.array(Image.open(stream))).permute(2, 0, 1) / 255
    assert exact == pytest.approx(-10 * float((decoded - picture).square().mean().log10()), abs=0.01)
