"""Fitting Gaussians: where they go, that they get there, and that colours are the best ones."""

import math

import pytest
import torch

from foveate.compress import gaussian_fit as fits
from foveate.compress.gaussian_fit import (
    AXES,
    CHOLESKY,
    Fit,
    Splats,
    best_colours,
    density,
    pace,
    psnr,
    run,
    supersampled,
)
from foveate.ops.gaussians import Grid, render


def spot(height=24, width=32):
    """A dark picture with a bright slanted bar."""
    y, x = torch.meshgrid(torch.arange(height) + 0.5, torch.arange(width) + 0.5, indexing="ij")
    along, across = (x - 20 + y - 10) / 2**0.5, (y - 10 - x + 20) / 2**0.5
    return (0.1 + 0.8 * torch.exp(-(along**2) / 50 - across**2 / 4)).expand(3, -1, -1).contiguous()


def start(target, form=CHOLESKY, mode="cut", seed=0):
    return Fit(target, form, mode, torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("form", [CHOLESKY, AXES])
@pytest.mark.parametrize("mode", ["cut", "topk"])
def test_a_fit_nears_its_picture_and_says_how_near(form, mode):
    target = spot()
    fit, seen = start(target, form, mode), []
    stopped = run(fit, 20, pace(60), 0.5, report=lambda share, dB: bool(seen.append((share, dB))))
    assert not stopped
    assert len(fit.splats.centres) == 20
    assert psnr(fit.draw(), target) > 32
    assert [share for share, _ in seen] == [i / 60 for i in range(60)]
    assert seen[-1][1] == pytest.approx(psnr(fit.draw(), target), abs=0.5)


def test_a_fit_can_be_stopped():
    fit = start(spot())
    assert run(fit, 20, pace(60), 0.5, report=lambda share, dB: share > 0.1)
    assert 10 <= len(fit.splats.centres) < 20


def test_the_first_gaussians_follow_the_gradient_and_the_next_ones_the_error():
    target = torch.full((3, 40, 40), 0.5)
    target[:, :, 20:] = 0.9
    where = density(target, uniform=0.3)
    assert where.sum().item() == pytest.approx(1)
    assert where[:, 18:22].sum().item() == pytest.approx(0.7 + 0.3 * 0.1, abs=1e-3)
    assert torch.equal(density(torch.full((3, 4, 4), 0.5)), torch.full((4, 4), 1 / 16))
    fit = start(target)
    fit.grow(30, 30, density(target, 1.0))
    painted = fit.splats
    wrong = fit.draw().detach().clamp(0, 1).clone()
    wrong[:, 5:9, 30:34] = 0
    fit.target = wrong
    fits.grow_by_error(fit, 10)
    new = fit.splats.centres[len(painted.centres) :]
    assert ((new - torch.tensor([32.0, 7.0])).abs() < 4).all()


def test_momenta_stay_with_their_gaussians():
    fit = start(spot())
    fit.grow(8, 8, density(fit.target))
    for _ in range(3):
        fit.step(1.0)
    fit.grow(4, 12, density(fit.target))
    assert fit._age.flatten().tolist() == [3] * 8 + [0] * 4
    kept = fit.splats.centres[[1, 9]]
    fit.keep(torch.tensor([1, 9]))
    assert torch.equal(fit.splats.centres, kept)
    assert fit._age.flatten().tolist() == [3, 0]
    fit.step(1.0)
    assert all(len(a) == len(b) == 2 for a, b in fit._momenta)


@pytest.mark.parametrize("mode", ["cut", "topk"])
def test_best_colours_are_those_of_the_normal_equations(mode):
    target, g = spot(8, 9), torch.Generator().manual_seed(1)
    centres, conics = torch.rand(5, 2, generator=g) * 8, torch.tensor([0.1, 0.02, 0.2]).expand(5, 3).contiguous()

    def draw(colours):
        return render(centres, conics, colours, Grid(8, 9), mode)

    basis = torch.stack([draw(torch.eye(5)[:, [i]])[0].flatten() for i in range(5)], 1)
    exact = torch.linalg.lstsq(basis, target.flatten(1).T).solution
    found = best_colours(draw, torch.zeros(5, 3), target, 12, ridge=0.0)
    torch.testing.assert_close(draw(found), draw(exact), atol=1e-3, rtol=0)


def test_extra_values_learn_too():
    fit = start(torch.full((3, 8, 8), 0.5))
    fit.grow(6, 6, density(fit.target))
    gain = torch.tensor([0.1])
    fit.learn(gain, 0.2)
    reached = [
        fit.step(0.0001 if i == 0 else 0.3, lambda s: Splats(s.centres, s.shapes, s.colours * gain)) for i in range(40)
    ]
    assert gain.item() > 0.2
    assert not gain.requires_grad
    assert reached[-1] > reached[0]


def test_a_pace_of_steps_and_of_seconds():
    assert list(pace(4)) == [0, 0.25, 0.5, 0.75]
    shares = list(pace(10**9, seconds=0.01))
    assert shares[0] == 0
    assert all(0 <= share < 1 for share in shares)
    assert len(list(pace(10, seconds=1e-9))) == 1


def test_a_smaller_picture_averages_the_larger_one():
    splats = Splats(torch.rand(30, 2) * 16, CHOLESKY.start(torch.full((30,), 1.0)), torch.rand(30, 3) / 3)
    small = supersampled(splats, CHOLESKY, "cut", Grid.over(16, 16, (8, 8)))
    full = render(splats.centres, CHOLESKY.conic(splats.shapes), splats.colours, Grid(16, 16), "cut")
    torch.testing.assert_close(small, torch.nn.functional.avg_pool2d(full[None], 2)[0].clamp(0, 1))
    part = supersampled(splats, CHOLESKY, "cut", Grid.over(16, 16, (8, 8)).window(2, 3, 4, 5))
    torch.testing.assert_close(part, small[:, 3:8, 2:6])


@pytest.mark.parametrize("form", [CHOLESKY, AXES])
def test_round_gaussians_start_with_their_size_and_stay_possible(form):
    sizes = torch.tensor([0.5, 3.0])
    shapes = form.start(sizes)
    torch.testing.assert_close(form.conic(shapes)[:, [0, 2]], (1 / sizes.square())[:, None].expand(-1, 2))
    torch.testing.assert_close(form.size(shapes)[0][:, 0], sizes)
    wild = form.conic(form.bound(torch.tensor([[-3.0, 1e9, 0.0], [math.inf, 0.0, -1.0]])))
    assert torch.isfinite(wild).all()
