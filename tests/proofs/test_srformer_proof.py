"""The proof of SRFormer: its baselines are SwinIR and pooling, its stripes are stripes, its verdict can fail."""

import pytest
import torch

from foveate.meter import Comparison, count_parameters
from foveate.proofs import ProofContext
from foveate.proofs.restore import srformer as proof
from foveate.proofs.restore._shared import HELD_OUT
from foveate.restore.srformer import PermutedAttention


def compared_once(*_: object, **__: object) -> Comparison:
    return Comparison(("a", "b"), ((0.2,), (0.1,)), None, (None, None))


@pytest.mark.parametrize("mode", ["quick", "full"])
def test_it_runs(mode: str, monkeypatch: pytest.MonkeyPatch) -> None:
    dice = torch.Generator().manual_seed(0)
    photographs = [(name, torch.rand(3, 40, 44, generator=dice)) for name in (*HELD_OUT, "brick")]
    monkeypatch.setattr(ProofContext, "photographs", lambda self: photographs)
    monkeypatch.setattr(proof, "STEPS", {mode: 2})
    for name, value in {"MAP": 48, "BATCH": 1, "SIDE": 16}.items():
        monkeypatch.setattr(proof, name, value)
    monkeypatch.setattr(proof, "compare", compared_once)
    monkeypatch.setitem(proof.SIZES, "classical", proof.SIZES["light"])
    evidence = proof.prove(ProofContext(full=mode == "full", progress=False))
    rows = {row.name: row.metrics for row in evidence.rows}
    assert len(rows) == 13
    assert rows["layer, permuted, window 24"]["macs_per_place"] == 26_280
    assert rows["layer, plain, window 8"]["macs_per_place"] == 22_080
    assert not evidence.holds  # the light networks do not have the classical ones' ratio
    assert "1.19x the multiply-accumulates" in " ".join(evidence.notes)


@pytest.mark.parametrize(
    ("variant", "scale", "parameters", "gmacs"), [("light", 4, 929_628, 63.6), ("classical", 2, 11_752_487, 2868)]
)
def test_the_baseline_is_swinir(variant: str, scale: int, parameters: int, gmacs: float) -> None:
    model = proof.swinir(variant, scale)
    assert count_parameters(model) == parameters  # published: 930K and 11.75M
    if variant == "light":
        assert model.full_flops(720 // scale, 1280 // scale) / 2e9 == pytest.approx(gmacs, rel=0.02)


def test_pooling_averages_cells() -> None:
    torch.manual_seed(0)
    layer = proof.PooledAttention(8, 2, 4)
    kv = torch.randn(3, 16, 16)
    keys, values = layer.permute(kv)
    assert keys.shape == values.shape == (3, 4, 8)
    cell = kv.reshape(3, 4, 4, 16)[:, 2:, :2].mean((1, 2))
    torch.testing.assert_close(torch.cat([keys[:, 2], values[:, 2]], -1), cell)
    assert layer(torch.randn(1, 8, 8, 8)).shape == (1, 8, 8, 8)


def test_networks_differ_in_their_attention_only() -> None:
    found = proof.networks()
    kinds = {
        name: {(type(m).__name__, m.window, m.reduce) for m in n.modules() if isinstance(m, PermutedAttention)}
        for name, n in found.items()
    }
    assert list(kinds.values()) == [
        {("PermutedAttention", 8, 1)},
        {("PermutedAttention", 16, 2)},
        {("PooledAttention", 16, 2)},
    ]
    shifts = [[m.shift for m in n.modules() if isinstance(m, PermutedAttention)] for n in found.values()]
    assert shifts == [[0, 4, 0, 4], [0, 8, 0, 8], [0, 8, 0, 8]]


def test_stripes_repeat_with_their_period() -> None:
    first = proof.stripes(ProofContext(progress=False))[0]
    assert first.low.shape == (1, 3, 96, 96)
    row = first.high[0, 0, 0]
    apart = 9 * proof.SCALE / torch.cos(torch.tensor(0.3))  # along a row
    crossings = ((row[1:] > 0.5) & (row[:-1] <= 0.5)).nonzero()[:, 0].diff().float()
    assert (crossings - apart).abs().max() <= 1


@pytest.mark.parametrize(
    "wrong",
    [
        {"ratios": proof.EXACT | {24: 0.316}},
        {"speedup": 1.6},
        {"less": 0.98},
        {"fewer": 0.91},
        {"gain": -0.04},
        {"over_pooled": -0.06},
    ],
)
def test_the_verdict_needs_all_of_it(wrong: dict) -> None:
    fine = {"ratios": proof.EXACT, "speedup": 1.7, "less": 0.97, "fewer": 0.885, "gain": -0.03, "over_pooled": -0.05}
    assert proof.verdict(**fine, mode="full")
    assert not proof.verdict(**(fine | wrong), mode="full")
