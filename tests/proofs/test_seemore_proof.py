"""The proof of SeemoRe: its rival is SAFMN, its networks differ where they are said to, its verdict can fail."""

import pytest
import torch
import torch.nn.functional as F

from foveate.meter import Comparison, count_flops, count_parameters
from foveate.proofs import ProofContext
from foveate.proofs.restore import seemore as proof
from foveate.proofs.restore._shared import HELD_OUT
from foveate.restore.seemore import Experts

FINE = {"SAFMN": 0.0, "all experts": -0.05, "no experts": -0.05}


def compared_once(*_: object, **__: object) -> Comparison:
    return Comparison(("a", "b"), ((0.2,), (0.1,)), (200.0, 100.0), (None, None))


@pytest.mark.parametrize("mode", ["quick", "full"])
def test_it_runs(mode: str, monkeypatch: pytest.MonkeyPatch) -> None:
    dice = torch.Generator().manual_seed(0)
    photographs = [(name, torch.rand(3, 40, 44, generator=dice)) for name in (*HELD_OUT, "brick")]
    monkeypatch.setattr(ProofContext, "photographs", lambda self: photographs)
    monkeypatch.setattr(proof, "STEPS", {mode: 2})
    for name, value in {"TIMED": (16, 16), "BATCH": 1, "SIDE": 16}.items():
        monkeypatch.setattr(proof, name, value)
    monkeypatch.setattr(proof, "compare", compared_once)
    monkeypatch.setattr(proof, "published", lambda *_: (11.97, 13.56))
    evidence = proof.prove(ProofContext(full=mode == "full", progress=False))
    rows = {row.name: row.metrics for row in evidence.rows}
    assert len(rows) == (7 if mode == "quick" else 10)
    assert rows["no experts"]["parameters"] < rows["routed"]["parameters"] == rows["all experts"]["parameters"]
    assert evidence.measured_ratio == pytest.approx(11.97 / 13.56)
    work = {name: rows[name]["macs_per_input_pixel"] for name in ("no experts", "routed", "all experts")}
    assert work["no experts"] < work["routed"] < work["all experts"]
    assert "rank 8" in " ".join(evidence.notes)


def test_safmn_has_the_published_size() -> None:
    rival = proof.SAFMN(4)
    assert count_parameters(rival) == pytest.approx(240_000, rel=0.003)
    own, safmn = proof.published(proof.SeemoRe(4).eval(), rival, torch.zeros(1, 3, 32, 32))
    assert own / safmn == pytest.approx(12 / 13.6, rel=0.05)


def test_a_block_of_safmn_is_its_definition() -> None:
    torch.manual_seed(0)
    block, x = proof.SAFMBlock(8).double(), torch.rand(1, 8, 16, 24).double()
    y, parts = block.norm1(x), []
    for i, part in enumerate(y.split(2, 1)):
        small = block.looks[i](F.max_pool2d(part, 2**i))
        parts.append(small.repeat_interleave(2**i, 2).repeat_interleave(2**i, 3))
    mixed = x + F.gelu(block.mix(torch.cat(parts, 1))) * y
    torch.testing.assert_close(block(x), mixed + block.feed(block.norm2(mixed)))


def test_networks_differ_in_their_experts_only() -> None:
    found = proof.networks(full=True)
    assert list(found) == ["SAFMN", "no experts", "all experts", "routed", "rank 2", "rank 4", "rank 8"]
    kinds = {name: [m for m in n.modules() if isinstance(m, Experts)] for name, n in found.items()}
    assert [len(layers) for layers in kinds.values()] == [0, 0, 3, 3, 3, 3, 3]
    assert {layer.top for layer in kinds["all experts"]} == {3}
    assert {layer.top for layer in kinds["routed"]} == {1}
    assert all(n.base for n in found.values())
    x = torch.rand(1, 3, 16, 16)
    with torch.no_grad():
        assert count_flops(found["routed"].eval(), x) < count_flops(found["SAFMN"], x)


def test_evaluation_is_compared_with_training() -> None:
    network = proof.networks(full=False)["routed"]
    x = torch.rand(4, 3, 16, 16)
    assert proof.largest_difference(network, x) < 1e-12
    assert not network.training
    assert next(network.parameters()).dtype == torch.float32
    network.body[0]["local_block"].block.register_forward_hook(lambda m, _, out: (out[0] * (1 + m.training), out[1]))
    assert proof.largest_difference(network, x) > 1e-3


@pytest.mark.parametrize(
    "wrong",
    [
        {"gains": FINE | {"SAFMN": -0.01}},
        {"gains": FINE | {"all experts": -0.06}},
        {"gains": FINE | {"no experts": -0.06}},
        {"share": 0.6},
        {"apart": 1e-5},
        {"published": 0.91},
        {"small": 1.01},
    ],
)
def test_the_verdict_needs_all_of_it(wrong: dict) -> None:
    fine = {"gains": FINE, "margin": 0.05, "share": 8 / 14, "apart": 1e-6, "published": 0.9, "small": 1.0}
    assert proof.verdict(**fine)
    assert not proof.verdict(**(fine | wrong))
