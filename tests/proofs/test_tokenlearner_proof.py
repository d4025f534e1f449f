"""The proof of TokenLearner: ways to have few tokens differ as they should, and the verdict can fail."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from foveate.meter import Comparison, count_flops
from foveate.proofs import ProofContext
from foveate.proofs.encode import _tasks as tasks
from foveate.proofs.encode import tokenlearner as proof

RIGHT = {
    "dense": 0.9,
    "learned from block 1": 0.89,
    "pooled from block 1": 0.85,
    "random from block 1": 0.8,
    "learned from block 0": 0.85,
    "pooled from block 0": 0.6,
    "random from block 0": 0.3,
}


@given(st.sampled_from([*RIGHT, "share", "speedup", "efficiency"]))
@settings(deadline=None, max_examples=20)
def test_the_verdict_needs_all_of_it(spoiled):
    good = {"share": 0.33, "speedup": 1.9, "efficiency": 0.95}
    assert proof.verdict(RIGHT, **good)
    bad = {"dense": 0.92, "learned from block 1": 0.87, "random from block 1": 0.9, "learned from block 0": 0.39}
    bad |= {"pooled from block 0": 0.86, "random from block 0": 0.76}
    if spoiled in bad:
        assert not proof.verdict(RIGHT | {spoiled: bad[spoiled]}, **good)
    if spoiled in good:
        assert not proof.verdict(RIGHT, **good | {spoiled: 0.45 if spoiled == "share" else 0.8})


def test_pooled_tokens_are_means_of_cells_and_random_ones_patches():
    x = torch.randn(2, 12, 5)
    pooled = proof.Pooled(5, 4)(x, (2, 6))
    torch.testing.assert_close(pooled[:, 0], x[:, :3].mean(1))
    torch.testing.assert_close(pooled[:, 3], x[:, 9:].mean(1))
    drawn = proof.Drawn(5, 4)(x)
    hits = (drawn[:, :, None] == x[:, None]).all(-1)
    assert (hits.sum(-1) == 1).all()
    assert (hits.sum(1) <= 1).all()


def test_all_ways_cost_no_more_than_learning():
    spent = {way: count_flops(proof.network(24, way, 4, 1).eval(), torch.zeros(1, 3, 24, 24)) for way in proof.WAYS}
    assert spent["pooled"] == spent["random"] < spent["learned"]


def test_the_proof_runs(monkeypatch):
    for name, value in {"STEPS": {"quick": 1}, "WIDTH": 8, "DEPTH": 2, "HEADS": 2}.items():
        monkeypatch.setattr(proof, name, value)
    clock = Comparison(("a", "b"), ((0.3,), (0.1,)), (4e9, 1e9), (None, None))
    monkeypatch.setattr(proof, "timed", lambda context: clock)
    monkeypatch.setattr(proof, "cifar", lambda context: tasks.drawn_digits(context, 8))
    monkeypatch.setattr(proof, "CIFAR_STEPS", 1)
    monkeypatch.setattr(proof, "BUDGETS", (0.8,))
    monkeypatch.setattr(proof, "CIFAR_TOKENS", 2)
    evidence = proof.prove(ProofContext(progress=False))
    names = [row.name for row in evidence.rows]
    assert names[0] == "digits, dense"
    assert [n for n in names if n.startswith("CIFAR-10")] == [
        "CIFAR-10, dense",
        "CIFAR-10, learned at 0.8",
        "CIFAR-10, random at 0.8",
    ]
    assert evidence.measured_ratio == 4.0
    assert all(0 < row.metrics["flop_share"] <= 1 for row in evidence.rows if "flop_share" in row.metrics)
    assert not evidence.holds  # one step teaches nothing


def test_digits_are_drawn_anew_and_alike_for_a_seed():
    task = tasks.drawn_digits(ProofContext(progress=False), 50)
    (a, la), (b, lb), (c, _) = task.stream(3)(20), task.stream(3)(20), task.stream(4)(20)
    assert torch.equal(a, b)
    assert torch.equal(la, lb)
    assert not torch.equal(a, c)
    assert a.shape == (20, 3, 24, 24)
    assert not torch.equal(task.test[0][:20], a)
    empty = (torch.nn.functional.avg_pool2d(a[:, :1], 4) < -0.9).float().mean()
    assert 0.5 < empty < 0.95
    assert tasks.accuracy(lambda x: torch.nn.functional.one_hot(task.test[1], 10), task.test) == pytest.approx(1.0)
    assert tasks.cifar(ProofContext(progress=False)) is None
