"""The mean-scale hyperprior: masses sum to one, bits are those of the coder's tables, rates are lines between gains."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from foveate.compress.hyperprior import (
    OCTAVE,
    TOP,
    AtLeast,
    Density,
    MeanScaleHyperprior,
    gaussian_bits,
    rounded,
)
from foveate.compress.scales import SCALES, gaussian_tables


@pytest.fixture
def prior() -> MeanScaleHyperprior:
    torch.manual_seed(0)
    return MeanScaleHyperprior(6, (3, 4, 5), rates=4).eval()


@pytest.mark.parametrize("index", [0.0, 8.5, 40.0])
def test_masses_of_a_scale_sum_to_one(index: float) -> None:
    k = torch.arange(-300.0, 301).double()
    mass = torch.exp2(-gaussian_bits(k, torch.tensor(index).double()))
    assert float(mass[mass > 2**-29].sum()) == pytest.approx(1, abs=1e-5)


def test_table_numbers_mean_the_coders_tables() -> None:
    """What training counts as bits is what the range coder's tables charge, to their precision."""
    for index in (0, 20, 45, TOP):
        table = gaussian_tables()[index]
        reach = min(3, int(3 * SCALES[index] / 4096))
        k = np.arange(-reach, reach + 1)
        charged = [table.bits([int(one)]) for one in k]
        counted = gaussian_bits(torch.from_numpy(k).double(), torch.tensor(float(index)))
        assert np.allclose(charged, counted.numpy(), rtol=0.01, atol=0.01)
    assert len(gaussian_tables()) == TOP + 1


@settings(deadline=None, max_examples=20)
@given(st.integers(0, 2**31), st.floats(0.3, 3.0))
def test_a_density_rises_and_its_masses_sum_to_one(seed: int, half: float) -> None:
    torch.manual_seed(seed)
    density = Density(2)
    for bend in density.bends:
        torch.nn.init.normal_(bend)
    x = torch.linspace(-50, 50, 400).expand(2, -1)
    with torch.no_grad():
        logits = density.logits(x[:, None])[:, 0]
        assert (logits.diff(dim=1) > 0).all()
        steps = torch.arange(-400, 401) * 2 * half
        mass = density.mass(steps.expand(2, -1), torch.full((2, 1), half))
    assert torch.allclose(mass.sum(1), torch.ones(2), atol=1e-3)


def test_rounding_and_bounds_pass_gradients_where_they_should() -> None:
    x = torch.tensor([-1.4, 0.2, 2.6], requires_grad=True)
    y = rounded(x)
    assert torch.equal(y, torch.tensor([-1.0, 0.0, 3.0]))
    assert torch.equal(torch.autograd.grad(y.sum(), x)[0], torch.ones(3))
    for sign, expected in ((1.0, [0.0, 1.0, 1.0]), (-1.0, [-1.0, -1.0, -1.0])):
        (grad,) = torch.autograd.grad((sign * AtLeast.apply(x, 0.0)).sum(), x)
        assert grad.tolist() == expected


def test_rates_lie_on_lines_between_gains(prior: MeanScaleHyperprior) -> None:
    torch.nn.init.normal_(prior.gains)
    a, b = prior.at(torch.tensor([0.0, 1.25, 3.0]))
    assert a.shape == (3, 6, 1, 1)
    assert b.shape == (3, 3, 1, 1)
    gains = prior.gains.detach()
    expected = torch.stack([gains[0], 0.75 * gains[1] + 0.25 * gains[2], gains[3]])
    assert torch.allclose(a[..., 0, 0], expected)
    one = MeanScaleHyperprior(6, (3, 4, 5), rates=1)
    assert torch.equal(one.at(torch.zeros(2))[0], torch.zeros(2, 6, 1, 1))


def test_finer_steps_cost_more_bits_and_round_less(prior: MeanScaleHyperprior) -> None:
    y = 3 * torch.randn(1, 6, 8, 8)
    with torch.no_grad():
        results = [prior(y, torch.tensor([rate])) for rate in (0.0, 1.5, 3.0)]
    bits = [float(r.bits) for r in results]
    errors = [float((r.latents - y).square().mean()) for r in results]
    assert bits == sorted(bits)
    assert errors == sorted(errors, reverse=True)
    gain = prior.at(torch.tensor([3.0]))[0]
    assert ((results[2].latents - y).abs() <= 0.5001 * torch.exp2(-gain)).all()


def test_noise_stands_for_rounding_in_training_only(prior: MeanScaleHyperprior) -> None:
    y, rate = 3 * torch.randn(1, 6, 8, 8), torch.tensor([1.0])
    calm = [prior(y, rate) for _ in range(2)]
    assert torch.equal(calm[0].bits, calm[1].bits)
    noisy = [prior.train()(y, rate) for _ in range(2)]
    assert not torch.equal(noisy[0].bits, noisy[1].bits)
    assert torch.equal(noisy[0].latents, calm[0].latents)
    (noisy[0].bits + noisy[0].side_bits + noisy[0].latents.sum()).sum().backward()
    assert all(p.grad is not None for p in prior.parameters())


def test_a_wider_scale_by_an_octave_is_eight_tables(prior: MeanScaleHyperprior) -> None:
    k = torch.tensor([4.0])
    assert float(gaussian_bits(2 * k, torch.tensor(40.0 + OCTAVE))) == pytest.approx(
        float(gaussian_bits(k, torch.tensor(40.0))) + 1, abs=0.02
    )
