import pytest

from foveate.proofs import ProofContext
from foveate.proofs.encode import atlas, fit_interleaved


@pytest.mark.parametrize(
    ("figures", "holds"),
    [
        ((1.33, 3.0, 0.2, 1.0), True),
        ((1.5, 3.0, 0.2, 1.0), False),
        ((1.33, 1.9, 0.2, 1.0), False),
        ((1.33, 3.0, 0.5, 1.0), False),
        ((1.33, 3.0, 0.2, 0.9), False),
    ],
)
def test_verdict_of_fit(figures, holds):
    assert fit_interleaved.verdict(*figures) == holds


@pytest.mark.parametrize(
    ("figures", "holds"),
    [
        (([1.8, 1.1], 3.0, 1.0, 0.02), True),
        (([1.4, 1.1], 3.0, 1.0, 0.02), False),
        (([1.8, 1.5], 3.0, 1.0, 0.02), False),
        (([1.8, 1.1], 1.5, 1.0, 0.02), False),
        (([1.8, 1.1], 3.0, 0.8, 0.02), False),
        (([1.8, 1.1], 3.0, 1.0, 0.3), False),
    ],
)
def test_verdict_of_atlas(figures, holds):
    assert atlas.verdict(*figures) == holds


def test_parts_meet_through_global_layers_alone():
    assert fit_interleaved.reach(ProofContext(), "(1)1(1)0") == 1
    assert fit_interleaved.reach(ProofContext(), "(1)0") == 1 / fit_interleaved.PARTS


def test_windows_meet_through_exchange_alone():
    assert atlas.sight(ProofContext(), atlas.WAYS["scales without exchange"]) == 1 / 64
