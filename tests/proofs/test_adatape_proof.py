"""The proof of AdaTape: baselines are what they claim to be, and the verdict can fail."""

import torch

from foveate.meter import count_flops
from foveate.proofs import ProofContext
from foveate.proofs.encode import _tasks as tasks
from foveate.proofs.encode import adatape as proof

ODD = {"no tape": 0.5, "AdaTape": 0.95, "random tape": 0.6}
RIGHT = {"ViT": 0.5, "deeper ViT": 0.55, "AdaTape": 0.7, "random tape": 0.6, "ViT with finer patches": 0.8}


def test_the_verdict_needs_all_of_it():
    assert proof.verdict(ODD, RIGHT)
    for spoiled in ({"no tape": 0.7}, {"AdaTape": 0.85}, {"random tape": 0.96}):
        assert not proof.verdict(ODD | spoiled, RIGHT)
    for name in ("ViT", "deeper ViT", "random tape"):
        assert not proof.verdict(ODD, RIGHT | {name: 0.7})


def test_symbols_are_one_hot_and_their_label_is_the_parity_of_ones():
    x, odd = proof.symbols(3, 0, "cpu")(64)
    assert x.shape == (64, 3, 3, 3)
    assert torch.equal(x.sum(1), torch.ones(64, 3, 3))
    assert torch.equal(x[:, 2].sum((1, 2)) % 2, odd.float())
    assert set(odd.tolist()) == {0, 1}


def test_a_deeper_network_costs_at_least_as_much_as_the_longest_tape():
    x = torch.zeros(1, 3, 24, 24)
    taped, deeper = proof.network(24, tape=proof.TAPE).eval(), proof.network(24, depth=proof.DEEPER).eval()
    longest = taped.flops(proof.TAPE, (3, 3), (24, 24))
    assert longest <= count_flops(deeper, x)
    assert proof.network(24).reader.tokens == 0


def test_the_proof_runs(monkeypatch):
    values = {"STEPS": {"quick": 1}, "PARITY_STEPS": {"quick": 1}, "PARITY_BATCH": 4, "WIDTH": 16, "HEADS": 2}
    for name, value in values.items():
        monkeypatch.setattr(proof, name, value)
    few = tasks.drawn_digits(ProofContext(progress=False), 8)
    monkeypatch.setattr(proof, "drawn_digits", lambda context: few)
    monkeypatch.setattr(proof, "cifar", lambda context: few)
    evidence = proof.prove(ProofContext(progress=False))
    names = [row.name for row in evidence.rows]
    assert names == [
        *(f"parity, {name}" for name in ODD),
        *(f"digits, {name}" for name in RIGHT),
        *(f"CIFAR-10, {name}" for name in RIGHT),
    ]
    tapes = {row.name: row.metrics["tape"] for row in evidence.rows if row.name.startswith("digits")}
    assert tapes["digits, ViT"] == 0
    assert 2 <= tapes["digits, AdaTape"] <= proof.TAPE
    assert not evidence.holds
