"""Stochastic Gumbel annealing: where draws fall, where they go, and that it finds what rounding misses."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from foveate.compress.sga import Rounding, anneal, gumbel_round, temperature


@settings(deadline=None, max_examples=30)
@given(st.integers(0, 2**31), st.floats(1e-8, 1.0))
def test_draws_lie_between_the_whole_numbers_around(seed: int, heat: float) -> None:
    generator = torch.Generator().manual_seed(seed)
    v = (10 * torch.randn(200, generator=generator)).requires_grad_()
    drawn = gumbel_round(v, heat, generator)
    assert ((drawn >= v.floor()) & (drawn <= v.ceil())).all()
    (grad,) = torch.autograd.grad(drawn.sum(), v)
    assert grad.isfinite().all()


def test_whole_numbers_stay() -> None:
    v = torch.tensor([-3.0, 0.0, 7.0], requires_grad=True)
    drawn = gumbel_round(v, 0.5)
    assert torch.equal(drawn, v)
    (grad,) = torch.autograd.grad(drawn.sum(), v)
    assert grad.isfinite().all()


def test_cold_it_is_plain_rounding_and_warm_it_is_not() -> None:
    generator = torch.Generator().manual_seed(0)
    v = 10 * torch.randn(2000, generator=generator)
    v = v[(v - v.floor() - 0.5).abs() > 0.05]
    assert torch.equal(gumbel_round(v, 1e-3, generator).round(), v.round())
    warm = gumbel_round(v, 0.5, generator).round() != v.round()
    assert 0.1 < warm.float().mean() < 0.5


def test_chances_follow_the_distances() -> None:
    """P(up) = sigmoid((atanh(share) - atanh(1 - share)) / temperature)."""
    share, heat = 0.6, 0.4
    v = torch.full((40_000,), share)
    up = (gumbel_round(v, heat, torch.Generator().manual_seed(1)) > 0.5).float().mean()
    expected = ((torch.tensor(share).atanh() - torch.tensor(1 - share).atanh()) / heat).sigmoid()
    assert up == pytest.approx(float(expected), abs=0.01)


def test_temperatures_fall() -> None:
    assert temperature(0.0) == temperature(200 / 3000) == 0.5
    assert temperature(1.0) == pytest.approx(0.5 * 2.718281828**-1.4)


def test_it_finds_what_rounding_misses() -> None:
    """Two halves that round to 0 each, wanted to sum to 1: one has to go up."""
    v = torch.full((20, 2), 0.45)

    def loss(rounding: Rounding) -> Tensor:
        return (rounding(v).sum(1) - 1).square().sum()

    before = loss(torch.round)
    anneal(loss, (v,), lambda step: step / 300, rate=0.02)
    assert not v.requires_grad
    assert float(before) == 20
    assert float(loss(torch.round)) <= 3


def test_it_ends_when_told_and_is_the_same_for_a_seed() -> None:
    found = []
    for seed in (0, 0, 1):
        v = torch.full((5,), 0.3)
        anneal(lambda rounding, v=v: rounding(v).sum(), (v,), lambda step: step / 7, seed=seed)
        found.append(v)
    assert torch.equal(found[0], found[1])
    assert not torch.equal(found[0], found[2])
    same = torch.full((5,), 0.3)
    anneal(lambda rounding: rounding(same).sum(), (same,), lambda step: 1.0)
    assert torch.equal(same, torch.full((5,), 0.3))
