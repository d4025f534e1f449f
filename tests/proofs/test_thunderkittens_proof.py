"""Proof of ThunderKittens: bytes are counted rightly, errors are found, and the verdict can fail."""

import pytest
import torch

from foveate.meter import Comparison
from foveate.proofs import ProofContext
from foveate.proofs.ops import thunderkittens
from foveate.proofs.ops.thunderkittens import apart, exponent, order_row, traffic, verdict


@pytest.mark.parametrize(
    ("errors", "exponent", "speedup", "never_worse", "holds"),
    [
        ({"gemm float32": 1e-6, "gemm float16": 1e-3}, 1.1, 6.0, True, True),
        ({}, 1.1, 6.0, True, True),
        ({"gemm float32": 1e-4}, 1.1, 6.0, True, False),
        ({"gemm float16": 1e-2}, 1.1, 6.0, True, False),
        ({}, 1.4, 6.0, True, False),
        ({}, 1.1, 4.9, True, False),
        ({}, 1.1, 6.0, False, False),
    ],
)
def test_the_verdict_can_fail(errors, exponent, speedup, never_worse, holds):
    assert verdict(errors, exponent, speedup, never_worse) is holds


def test_every_kernel_of_pytorch_is_counted_with_what_it_reads_and_writes():
    x, weight = torch.ones(4, 8), torch.ones(8, 2)
    assert traffic(lambda: x @ weight) == 4 * (32 + 16 + 8)
    assert traffic(lambda: torch.relu(x @ weight).T) == 4 * (32 + 16 + 8 + 8 + 8)


def test_the_exponent_of_a_square_is_two(monkeypatch):
    def timed(baseline, method, *_, **__):
        times = [float(fn().shape[2]) ** 2 for fn in (baseline, method)]
        return Comparison(("a", "b"), ((times[0],), (times[1],)), None, (None, None))

    monkeypatch.setattr(thunderkittens, "compare", timed)
    assert exponent(ProofContext(), lambda q, k, v: q, 6) == pytest.approx(2)


def test_a_wrong_gradient_is_found():
    class Wrong(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x.sin()

        @staticmethod
        def backward(ctx, g):
            return g

    inputs = (torch.linspace(0, 1, 5),)
    assert apart(torch.sin, torch.sin, inputs, torch.float32, "cpu") == 0
    assert apart(Wrong.apply, torch.sin, inputs, torch.float32, "cpu") > 0.1


def test_orders_are_those_of_the_paper():
    metrics = order_row(64, 64).metrics
    assert metrics["tiles_loaded_row_by_row"] == 2082
    assert metrics["fewer_loads"] == pytest.approx(2.59, abs=0.01)
    assert order_row(32, 16).metrics["fewer_loads"] == 1


def test_the_proof_reports_what_it_measured(monkeypatch):
    def timed(baseline, method, *_, **__):
        return Comparison(("a", "b"), ((0.6,), (0.1,)), None, (None, None))

    monkeypatch.setattr(thunderkittens, "compare", timed)
    monkeypatch.setattr(thunderkittens, "kernel_errors", lambda _: {"gemm float32": 1e-7, "gemm float16": 1e-4})
    monkeypatch.setattr(thunderkittens, "LENGTHS", {"quick": (64, 128)})
    evidence = thunderkittens.prove(ProofContext(progress=False))
    assert evidence.measured_ratio == pytest.approx(6)
    assert "N^1.29" in evidence.measured
    assert evidence.holds
    assert any("No Triton kernel was timed" in note for note in evidence.notes)
    assert next(r for r in evidence.rows if r.name.endswith("384, fused")).metrics["fewer_bytes"] > 1.5
