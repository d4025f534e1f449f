"""The proof of WaveMix: the baseline is what it claims to be, costs are counted right, and the verdict can fail."""

import io
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from foveate.meter import Comparison, count_parameters
from foveate.proofs import ProofContext
from foveate.proofs.encode import wavemix as proof


def compared_once(*_: object, **__: object) -> Comparison:
    return Comparison(("a", "b"), ((0.2,), (0.1,)), None, (None, None))


def archive(file: Path, count: int) -> None:
    """A set of even pictures, sorted by class as CIFAR-10 is kept: class k has the grey 20 k."""
    labels = np.sort(np.arange(count) % 10).astype(np.uint8)
    streams = []
    for label in labels:
        stream = io.BytesIO()
        Image.new("RGB", (32, 32), (int(20 * label),) * 3).save(stream, "JPEG")
        streams.append(stream.getvalue())
    offsets = np.cumsum([0, *map(len, streams)])
    np.savez(file, bytes=np.frombuffer(b"".join(streams), np.uint8), offsets=offsets, labels=labels)


@pytest.mark.parametrize("mode", ["quick", "full"])
def test_the_proof_runs(mode: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(proof, "compare", compared_once)
    monkeypatch.setattr(proof, "STEPS", {mode: 2})
    monkeypatch.setattr(proof, "TESTED", {mode: 12})
    monkeypatch.setattr(proof, "TRAINED", 30)
    monkeypatch.setattr(proof, "MAP", 16)
    textures = [(name, torch.rand(3, 64, 80)) for name in proof.TEXTURES]
    monkeypatch.setattr(ProofContext, "photographs", lambda self: textures)
    for part in ("train", "test"):
        archive(tmp_path / f"cifar10_{part}_jpeg.npz", 40)
    evidence = proof.prove(ProofContext(full=mode == "full", data=tmp_path, progress=False))
    assert ("CIFAR-10" if mode == "full" else "Textures") in evidence.notes[-1]
    residual, wave, dropping, deep, _, _ = (row.metrics for row in evidence.rows)
    assert residual["parameters"] == 73_984
    assert wave["parameters"] == 83_344
    assert evidence.measured_ratio == pytest.approx(wave["gmacs"] / residual["gmacs"])
    assert wave["stored_mb"] < dropping["stored_mb"]
    assert wave["gmacs"] < deep["gmacs"] < residual["gmacs"]
    theirs, ours = (row.metrics["parameters"] for row in evidence.rows[-2:])
    assert 0.95 * ours < theirs <= ours


@given(st.floats(0, 1), st.floats(0, 1), st.floats(-10, 10))
@settings(deadline=None, max_examples=50)
def test_the_verdict_needs_all_three(macs: float, stored: float, lag: float) -> None:
    assert proof.verdict(macs, stored, lag) == (macs <= 0.33 and stored <= 0.75 and lag <= 5)
    assert not proof.verdict(0.34, stored, lag)
    assert not proof.verdict(macs, 0.76, lag)
    assert not proof.verdict(macs, stored, 5.1)


def test_the_residual_network_is_as_large_as_allowed() -> None:
    width = proof.matched_width(20_000, 6, 1)
    sizes = [count_parameters(proof.Residual(6, 1, w)) for w in (width, width + 1)]
    assert sizes[0] <= 20_000 < sizes[1]


def test_crops_are_standardised_and_know_their_picture() -> None:
    pictures = (torch.rand(40, 50), torch.linspace(0, 1, 64).expand(33, 64))
    x, labels = proof.crops_of(pictures, 0)(20)
    assert x.shape == (20, 1, 32, 32)
    assert set(labels.tolist()) == {0, 1}
    torch.testing.assert_close(x.mean((2, 3)), torch.zeros(20, 1), atol=1e-4, rtol=0)
    rows_alike = (x[:, 0] == x[:, 0, :1]).all((1, 2))
    assert torch.equal(rows_alike, labels == 1)
    again, _ = proof.crops_of(pictures, 0)(20)
    assert torch.equal(again, x)


def test_what_is_learned_and_what_is_measured_do_not_overlap() -> None:
    left, right = proof.halves(torch.arange(10.0).expand(2, 10))
    assert not set(left.flatten().tolist()) & set(right.flatten().tolist())
