"""Proof of FFTNet: the baselines are what they claim to be, and the verdict can fail."""

from functools import partial

import pytest
import torch

from foveate.encode.fftnet import FFTNet
from foveate.meter import count_parameters
from foveate.proofs import ProofContext
from foveate.proofs.encode import fftnet

FINE = {"time_slopes": (1.8, 1.25), "flop_slopes": (1.8, 1.25), "at_square": 10.0, "adaptive": 0.02, "fixed": 0.15}


@pytest.mark.parametrize(
    "broken",
    [
        {"time_slopes": (1.79, 1.0)},
        {"time_slopes": (2.0, 1.26)},
        {"flop_slopes": (1.79, 1.0)},
        {"flop_slopes": (2.0, 1.26)},
        {"at_square": 9.9},
        {"adaptive": 0.021},
        {"fixed": 0.149},
    ],
)
def test_the_verdict_needs_all_of_it(broken):
    assert fftnet.verdict(**FINE)
    assert not fftnet.verdict(**(FINE | broken))


def test_the_baseline_is_attention_as_it_is_written():
    torch.manual_seed(0)
    layer, x = fftnet.Attention(8, 2).double(), torch.randn(2, 5, 8, dtype=torch.float64)
    q, k, v = layer.qkv(x).chunk(3, -1)
    heads = []
    for h in (slice(0, 4), slice(4, 8)):
        weights = (q[..., h] @ k[..., h].mT / 2).softmax(-1)
        heads.append(weights @ v[..., h])
    torch.testing.assert_close(layer(x), layer.norm(x + layer.proj(torch.cat(heads, -1))))


def test_a_fixed_filter_cannot_tell_the_two_kinds_of_noise_apart():
    x, target = fftnet.noise(4000, torch.Generator().manual_seed(0))
    assert torch.equal(x[..., 0].abs(), torch.ones(4000, 32))
    spectrum = torch.fft.rfft(target[:, :, 1:], dim=1).abs()
    low = x[:, 0, 0] > 0
    assert spectrum[low, fftnet.LOW :].max() < 1e-4
    assert spectrum[~low, : fftnet.LOW].max() < 1e-4
    f, t = torch.fft.rfft(x, dim=1), torch.fft.rfft(target, dim=1)
    best = (t * f.conj()).real.sum((0, 2)) / f.abs().square().sum((0, 2))  # least squares, bin by bin
    error = torch.fft.irfft(f * best[None, :, None], n=32, dim=1) - target
    assert error.square().mean() > 0.2


def test_one_thread_is_given_back():
    before = torch.get_num_threads()
    with fftnet.one_thread():
        assert torch.get_num_threads() == 1
    assert torch.get_num_threads() == before


def test_the_proof_reports_system_and_baseline(monkeypatch):
    monkeypatch.setattr(fftnet, "LENGTHS", (16, 32, 64))
    monkeypatch.setattr(fftnet, "SQUARE", 32)
    monkeypatch.setattr(fftnet, "SECONDS", 0.0)
    monkeypatch.setattr(fftnet, "PAIRS", {"quick": (1, 1, 1)})
    monkeypatch.setattr(fftnet, "STEPS", {"quick": 2})
    tiny = partial(FFTNet, embed_dim=24, depth=2, num_heads=2, num_classes=3)
    monkeypatch.setattr(fftnet, "FFTNet", tiny)
    monkeypatch.setattr(fftnet, "_figure", lambda _: None)
    found = fftnet.prove(ProofContext(progress=False))
    rows = {row.name: row.metrics for row in found.rows}
    assert {"attention, 16 tokens", "mixer, 64 tokens", "mixer, 33 tokens", "attention, slope", "mixer, slope"} <= set(
        rows
    )
    assert any(note.startswith("Holds when") for note in found.notes)
    assert found.holds is False  # two steps teach nothing
    assert rows["FFTNet Base, 224 px"]["parameters"] == count_parameters(tiny())
    grown = rows["attention, 64 tokens"]["mflops"] - 4 * rows["attention, 16 tokens"]["mflops"]
    assert grown == pytest.approx(4 * 64 * (64**2 - 4 * 16**2) / 1e6)  # scores and sums are quadratic, the rest linear
