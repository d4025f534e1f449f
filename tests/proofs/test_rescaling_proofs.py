"""The proofs of IARN and BAIRNet: verdicts that can fail, measures that are what they say, a run in small."""

from math import inf

import pytest
import torch

from foveate import ops
from foveate.layers.rescaler import quantise
from foveate.meter import count_parameters
from foveate.proofs import ProofContext
from foveate.proofs.restore import _rescaling as shared
from foveate.proofs.restore import bidirectional_rescaling, iarn
from foveate.restore.iarn import IARN


@pytest.fixture(autouse=True)
def reference():
    """No compiled kernels: sampling has tests of its own, and compiling takes longer than all of these."""
    with ops.use("reference"):
        yield


@pytest.mark.parametrize(
    ("gains", "over", "likeness", "apart", "holds"),
    [
        ([0.7, 0.15, 0.1], [1, 1, 1], 38, 1e-4, True),
        ([0.69, 0.15, 0.1], [1, 1, 1], 38, 1e-4, False),
        ([0.7, 0.14, 0.1], [1, 1, 1], 38, 1e-4, False),
        ([0.7, 0.15, 0.8], [1, 1, 1], 38, 1e-4, False),
        ([0.7, 0.15, 0.1], [1, -0.1, 1], 38, 1e-4, False),
        ([0.7, 0.15, 0.1], [1, 1, 1], 37.9, 1e-4, False),
        ([0.7, 0.15, 0.1], [1, 1, 1], 38, 2e-4, False),
    ],
)
def test_the_verdict_on_iarn_can_fail(gains, over, likeness, apart, holds):
    assert iarn.verdict(gains, over, likeness, apart, (0.7, 0.15), 38.0) is holds


@pytest.mark.parametrize(
    ("figures", "holds"),
    [
        ((0.85, 0.2, 33, 1.5, inf), True),
        ((0.86, 0.2, 33, 1.5, inf), False),
        ((0.85, 0.19, 33, 1.5, inf), False),
        ((0.85, 0.2, 32.9, 1.5, inf), False),
        ((0.85, 0.2, 33, 1.6, inf), False),
        ((0.85, 0.2, 33, 1.5, 1.4), False),
    ],
)
def test_the_verdict_on_bairnet_can_fail(figures, holds):
    assert bidirectional_rescaling.verdict(*figures, 0.85, 0.2) is holds


def test_a_round_trip_is_measured_on_8_bits():
    x = quantise(torch.rand(1, 3, 20, 20))
    assert shared.round_trip(shared.bicubic, shared.bicubic, [x], 1) == inf
    back = quantise(shared.bicubic(quantise(shared.bicubic(x, (10, 5))), (20, 20)))
    expected = float(-10 * (back - x).square().mean().log10())
    assert shared.round_trip(shared.bicubic, shared.bicubic, [x], 2, 4) == pytest.approx(expected, abs=1e-4)
    assert shared.likeness(shared.bicubic, [x], 2) == inf
    rounds = shared.repeated(shared.BICUBIC, [x], 2, 3)
    assert rounds[0] == pytest.approx(shared.round_trip(shared.bicubic, shared.bicubic, [x], 2))
    assert rounds[0] > rounds[2]


def test_the_baseline_of_iarn_has_no_fewer_parameters_by_more_than_a_hundredth_and_starts_at_bicubic():
    one_way, own = iarn.OneWay(), IARN(**iarn.CONFIG)
    assert 0.99 < count_parameters(one_way) / count_parameters(own) <= 1
    x = torch.rand(1, 3, 6, 7)
    torch.testing.assert_close(one_way(x, (9, 15)), shared.bicubic(x, (9, 15)))


@pytest.mark.parametrize("module", [iarn, bidirectional_rescaling])
def test_a_proof_of_one_step_does_not_hold(monkeypatch, module):
    monkeypatch.setattr(module, "STEPS", {"quick": 1})
    monkeypatch.setattr(module, "SIDE", {"quick": 16} if module is iarn else 16)
    monkeypatch.setattr(shared, "SIDE", 24)
    evidence = module.prove(ProofContext(progress=False))
    assert not evidence.holds
    assert [row.name for row in evidence.rows][:2] == ["bicubic", "one-way"]
