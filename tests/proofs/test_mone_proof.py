"""The proof of MoNE: baselines are what they claim to be, and the verdict can fail."""

import pytest
import torch

from foveate.encode.mone import capacities
from foveate.meter import Comparison, count_flops
from foveate.proofs import ProofContext
from foveate.proofs.encode import _tasks as tasks
from foveate.proofs.encode import mone as proof

RIGHT = {"dense": 0.9, "routed": 0.89, "at random": 0.7, "all narrow": 0.6}


def test_the_verdict_needs_all_of_it():
    good = {"ink": 0.2, "speedup": 1.9, "efficiency": 0.85}
    assert proof.verdict(RIGHT, **good)
    for spoiled in ({"dense": 0.93}, {"at random": 0.88}, {"all narrow": 0.89}):
        assert not proof.verdict(RIGHT | spoiled, **good)
    for name, value in {"ink": capacities(0.3)[-1], "speedup": 1.6, "efficiency": 0.75}.items():
        assert not proof.verdict(RIGHT, **good | {name: value})


def test_routing_at_random_spends_as_much_and_ignores_the_router():
    net, x = proof.network(24).eval(), torch.rand(2, 3, 24, 24)
    net.mixture.shares = capacities(0.3)
    spent = count_flops(net, x)
    with torch.no_grad():
        assert torch.equal(net(x), net(x))
        net.mixture.prefer = proof.at_random
        assert not torch.equal(net(x), net(x))
    assert count_flops(net, x) == spent
    net.mixture.shares = proof.NARROW
    net(x)
    assert (net.mixture.expert == 1).all()


def test_ink_is_what_is_drawn():
    net = proof.network(24).eval()
    net.mixture.shares = capacities(0.3)
    pictures = torch.full((1, 3, 24, 24), -1.0)
    pictures[:, :, 4:8, :16] = 0.5  # four patches
    wide = torch.zeros(1, 36, 4)
    wide[0, [6, 7], 3] = 1.0  # two of them, and there are two places
    net.mixture.prefer = lambda r: wide
    assert proof.ink_share(net, pictures) == pytest.approx(0.5)


def test_the_proof_runs(monkeypatch):
    values = {"STEPS": {"quick": 1}, "WIDTH": 16, "DEPTH": 1, "HEADS": 2, "CIFAR_STEPS": 1, "BUDGETS": (1.0, 0.7)}
    for name, value in values.items():
        monkeypatch.setattr(proof, name, value)
    clock = Comparison(("a", "b"), ((0.3,), (0.1,)), (4e9, 1e9), (None, None))
    monkeypatch.setattr(proof, "timed", lambda context, budget: clock)
    monkeypatch.setattr(proof, "cifar", lambda context: tasks.drawn_digits(context, 8))
    evidence = proof.prove(ProofContext(progress=False))
    names = [row.name for row in evidence.rows]
    assert names[:4] == [f"digits, {name}" for name in RIGHT]
    assert [n for n in names if n.startswith("CIFAR-10")] == [
        f"CIFAR-10, {name}" for name in ("dense", "routed at 1", "routed at 0.7", "at random at 1", "at random at 0.7")
    ]
    assert evidence.measured_ratio == pytest.approx(3.0)
    assert not evidence.holds
