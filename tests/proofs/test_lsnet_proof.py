"""The proof of LSNet: the task is what it says, the baselines are, and the verdict can fail."""

import pytest
import torch
from torch import nn

from foveate.encode.lsnet import LSConv
from foveate.meter import Comparison, count_parameters
from foveate.proofs import ProofContext
from foveate.proofs.encode import lsnet as proof


@pytest.mark.parametrize("mode", ["quick", "full"])
def test_the_proof_runs(mode: str, monkeypatch: pytest.MonkeyPatch) -> None:
    clocks = iter([(0.3, 0.2), (0.9, 0.3)])  # unfolded against folded, ViT against folded

    def compared(*_: object, **__: object) -> Comparison:
        a, b = next(clocks)
        return Comparison(("a", "b"), ((a,), (b,)), None, (None, None))

    pytest.importorskip("transformers")
    monkeypatch.setattr(proof, "compare", compared)
    monkeypatch.setattr(proof, "STEPS", 2)
    monkeypatch.setattr(proof, "LONG", 3)
    monkeypatch.setattr(proof, "SEEDS", {mode: 2})
    monkeypatch.setattr(proof, "SIZES", {"t": {"widths": (8, 16, 16, 32), "depths": (0, 2, 2, 2)}})
    tiny = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
    monkeypatch.setattr(proof, "DEIT_TINY", tiny)
    evidence = proof.prove(ProofContext(full=mode == "full", progress=False))
    narrow, wide, ours, plain, folded, vit = (row.metrics for row in evidence.rows)
    assert [m["parameters"] for m in (narrow, wide, ours)] == [1313, 1953, 927]
    assert evidence.measured_ratio == pytest.approx(min(narrow["error"], wide["error"]) / ours["error"])
    assert ("error_after_long_training" in ours) == (mode == "full")
    pictures = proof.PICTURES[mode]
    rates = [pictures / s for s in (0.3, 0.2, 0.9)]
    assert [m["images_per_second"] for m in (plain, folded, vit)] == pytest.approx(rates)
    assert folded["parameters"] < plain["parameters"]
    assert "3.0x the throughput" in evidence.measured


def test_what_is_wanted_is_the_neighbour_that_markers_choose() -> None:
    x, wanted = proof.draw(3, torch.Generator().manual_seed(0))
    chosen = {True: 0, False: 0}
    for b, i, j in [(b, i, j) for b in range(3) for i in range(0, 14, 3) for j in range(1, 13)]:
        near = bool(x[b, 1, max(0, i - 3) : i + 4, max(0, j - 3) : j + 4].any())
        chosen[near] += 1
        assert wanted[b, 0, i, j] == x[b, 0, i, j - 1 if near else j + 1]
    assert min(chosen.values()) > 10
    assert wanted.var() > 0.7


def test_networks_of_a_seed_begin_alike_and_learn() -> None:
    def first(seed: int) -> nn.Module:
        return proof.network_of(lambda: LSConv(proof.CHANNELS), "cpu", seed)

    weights = [torch.cat([p.flatten() for p in first(seed).parameters()]) for seed in (0, 0, 1)]
    assert torch.equal(weights[0], weights[1])
    assert not torch.equal(weights[0], weights[2])
    assert proof.learn(first(0), 60, "cpu", 0) < 0.85 * proof.learn(first(0), 1, "cpu", 0)


def test_static_mixers_are_larger_than_the_ls_convolution() -> None:
    ours = count_parameters(LSConv(16))
    assert [count_parameters(proof.StaticMixer(16, k)) for k in (3, 7)] == [1248, 1888]
    assert ours == 862


@pytest.mark.parametrize(
    ("advantage", "speedup", "holds"),
    [(5.0, 1.5, True), (4.9, 3.0, False), (20.0, 1.4, False), (5.0, None, True), (1.0, None, False)],
)
def test_the_verdict(advantage: float, speedup: float | None, holds: bool) -> None:
    assert proof.verdict(advantage, speedup) is holds
