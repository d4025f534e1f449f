"""The proof of ACM: loads and ink are what they claim to be, and the verdict can fail."""

import pytest
import torch
from torch import nn

from foveate.encode.adaptive_computation_modules import AdaptiveComputationModules
from foveate.meter import Comparison
from foveate.proofs import ProofContext
from foveate.proofs.encode import _tasks as tasks
from foveate.proofs.encode import adaptive_computation_modules as proof

FOUND = {"dense": 0.9, "gates at 0.8": 0.9, "gates at 0.65": 0.89, "gates at 0.5": 0.89, "at random at 0.5": 0.8}
LOADS = {0.8: (0.7, 0.6), 0.65: (0.4, 0.45), 0.5: (0.25, 0.3)}


def test_the_verdict_needs_all_of_it():
    good = {"loads": LOADS, "ink": 1.5, "bent": 0.05, "efficiency": 0.85}
    assert proof.verdict(FOUND, **good)
    for spoiled in ({"dense": 0.95}, {"at random at 0.5": 0.89}):
        assert not proof.verdict(FOUND | spoiled, **good)
    for name, value in {"ink": 1.2, "bent": 0.2, "efficiency": 0.7}.items():
        assert not proof.verdict(FOUND, **good | {name: value})
    assert not proof.verdict(FOUND, **good | {"loads": LOADS | {0.5: (0.25, 0.46)}})
    assert not proof.verdict(FOUND, **good | {"loads": LOADS | {0.65: (0.4, 0.62)}})


def test_ink_is_what_is_drawn():
    torch.manual_seed(0)
    host = proof.VisionTransformer(24, 4, 48, 1, 2, num_classes=10, global_pool="avg").eval()
    handle = AdaptiveComputationModules(host, 0.8, projections=False, gate=2)
    handle.router.price = 0.0
    pictures = torch.full((1, 3, 24, 24), -1.0)
    pictures[:, :, 4:8, :16] = 0.5  # four patches
    inked = torch.zeros(1, 36, 5)
    inked[0, 6:10, 4] = inked[0, 10:, 2] = inked[0, :6, 2] = 1.0
    handle.router.prefer = lambda scores: inked
    share, ratio = proof.look(handle, pictures)
    assert ratio == pytest.approx(2.0)
    assert share == pytest.approx((4 * 4 + 32 * 2) / (36 * 4))


def test_the_proof_runs(monkeypatch):
    values = {"WIDTH": 32, "DEPTH": 1, "HEADS": 2, "GATE": 2, "TOKENS": 20, "CHANNELS": 32}
    values |= {name: {"quick": 1} for name in ("LEARN", "DISTIL", "PLACE", "TUNE")}
    for name, value in values.items():
        monkeypatch.setattr(proof, name, value)
    clock = Comparison(("a", "b"), ((0.3,), (0.1,)), (4e9, 1e9), (None, None))
    monkeypatch.setattr(proof, "timed", lambda context: clock)
    monkeypatch.setattr(proof, "compare", lambda *calls, pairs: [call() for call in calls] and clock)
    few = tasks.drawn_digits(ProofContext(progress=False), 8)
    monkeypatch.setattr(proof, "drawn_digits", lambda context: few)
    monkeypatch.setattr(proof, "cifar", lambda context: few)
    evidence = proof.prove(ProofContext(progress=False))
    names = [row.name for row in evidence.rows]
    assert names[:5] == [f"digits, {name}" for name in FOUND]
    assert [n for n in names if n.startswith("CIFAR-10")] == [f"CIFAR-10, {name}" for name in FOUND]
    assert evidence.measured_ratio == pytest.approx(0.75)
    assert not evidence.holds


def test_gates_of_what_is_timed_tell_tokens_apart(monkeypatch):
    seen = []

    def race(host, handle, x, pairs):
        with torch.no_grad(), handle.router.recording() as record:
            host(x)
        seen.extend(len(choice.runs.unique()) for choice in record)
        return None

    monkeypatch.setattr(proof, "race", race)
    monkeypatch.setattr(proof, "SIDE", 64)
    small = lambda *sizes, **more: tasks_host()  # noqa: E731
    monkeypatch.setattr(proof, "VisionTransformer", small)
    proof.timed(ProofContext(progress=False))
    assert len(seen) == 5
    assert min(seen) > 1


def tasks_host() -> nn.Module:
    from foveate.layers.transformer import VisionTransformer

    return VisionTransformer(64, 16, 192, 1, 3, num_classes=0)
