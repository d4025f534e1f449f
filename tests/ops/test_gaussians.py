"""Gaussians to pixels: the equations, the fast paths against the reference, gradients, grids and windows."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from foveate.errors import InputError
from foveate.ops import gaussians as ops
from foveate.ops import use
from foveate.ops.gaussians import MODES, Grid, conic_of_cholesky, conic_of_scale, reach_of, render

SEEDS = st.integers(0, 2**32 - 1)


def some(count, height, width, seed=0, channels=3, dtype=torch.float64, widest=4.0):
    g = torch.Generator().manual_seed(seed)
    centres = torch.rand(count, 2, generator=g, dtype=dtype) * torch.tensor([width + 8, height + 8], dtype=dtype) - 4
    inverse = 1 / (0.6 + (widest - 0.6) * torch.rand(count, 2, generator=g, dtype=dtype))
    conics = conic_of_scale(inverse, math.pi * torch.rand(count, generator=g, dtype=dtype))
    return centres, conics, torch.randn(count, channels, generator=g, dtype=dtype)


def both(gaussians, grid, mode, upstream, **options):
    """Picture and gradients by the fast path in float32 and by the reference in float64."""
    found = []
    for path, dtype in (("fast", torch.float32), ("reference", torch.float64)):
        leaves = [t.to(dtype, copy=True).requires_grad_() for t in gaussians]
        with use(path):
            out = render(*leaves, grid, mode, **options)
            found.append((out.detach(), *torch.autograd.grad(out, leaves, upstream.to(dtype))))
    return found


def settled(gaussians, grid, mode, k=10):
    """Pixels [h, w] where rounding decides neither what is within reach nor which are the k largest."""
    centres, conics, _ = gaussians
    dx = grid.xs()[:, None] - centres[:, 0]
    dy = (grid.ys()[:, None] - centres[:, 1])[:, None]
    half = (conics[:, 0] * dx * dx + conics[:, 2] * dy * dy) / 2 + conics[:, 1] * dx * dy
    if mode == "sum":
        return torch.ones(half.shape[:2], dtype=torch.bool)
    fine = ((half - reach_of(1 / 255 if mode == "cut" else 1e-4) ** 2 / 2).abs() > 1e-3).all(-1)
    if mode == "topk" and half.shape[-1] > k:
        near = half.sort(-1).values[..., k - 1 : k + 1]
        fine &= near[..., 1] - near[..., 0] > 1e-3
    return fine


@pytest.mark.parametrize("path", ["fast", "reference"])
def test_values_follow_the_equations(path):
    centres, conics, colours = some(30, 6, 7, dtype=torch.float32)
    p = torch.tensor([3.5, 2.5])
    a = torch.stack(
        [
            torch.exp(-(d := p - m) @ torch.tensor([[q[0], q[1]], [q[1], q[2]]]) @ d / 2)
            for m, q in zip(centres, conics, strict=True)
        ]
    )
    with use(path):
        plain, cut, top = (render(centres, conics, colours, Grid(6, 7), mode, k=3)[:, 2, 3] for mode in MODES)
    torch.testing.assert_close(plain, a @ colours, atol=1e-5, rtol=1e-4)
    assert ((a > 0) & (a < 1 / 255)).any()
    torch.testing.assert_close(cut, torch.where(a < 1 / 255, 0, a) @ colours, atol=1e-5, rtol=1e-4)
    best, index = a.topk(3)
    torch.testing.assert_close(top, best @ colours[index] / (1e-4 + best.sum()), atol=1e-5, rtol=1e-4)


@given(st.integers(0, 60), st.integers(1, 150), st.integers(1, 40), st.sampled_from(MODES), st.integers(1, 4), SEEDS)
@settings(deadline=None, max_examples=40)
def test_the_fast_path_equals_the_reference_forwards_and_backwards(count, height, width, mode, channels, seed):
    gaussians = some(count, height, width, seed, channels)
    grid = Grid(height, width)
    fine = settled(gaussians, grid, mode, 4)
    upstream = torch.randn(channels, height, width, generator=torch.Generator().manual_seed(seed)) * fine
    fast, exact = both(gaussians, grid, mode, upstream, k=4)
    torch.testing.assert_close(fast[0].double() * fine, exact[0] * fine, atol=2e-5, rtol=1e-4)
    for found, expected in zip(fast[1:], exact[1:], strict=True):
        size = max(1.0, float(expected.abs().max())) if expected.numel() else 1.0
        torch.testing.assert_close(found.double(), expected, atol=1e-4 * size, rtol=1e-3)


@pytest.mark.parametrize("mode", MODES)
def test_triton_equals_the_compiled_path(interpreted, mode, monkeypatch):
    from foveate.ops import _gaussians_cpu, _gaussians_triton

    gaussians = [t.float() for t in some(20, 20, 35, 3)]
    gaussians[1][4] = torch.tensor([1.0, 2.0, 1.0])
    upstream = torch.randn(3, 20, 35, generator=torch.Generator().manual_seed(0))
    found = []
    for engine, device in ((_gaussians_cpu, "cpu"), (_gaussians_triton, interpreted)):
        monkeypatch.setattr(ops, "_engine", lambda *_, engine=engine: engine)
        leaves = [t.to(device).requires_grad_() for t in gaussians]
        out = render(*leaves, Grid(20, 35, row=2, dx=1.5), mode, k=3)
        found.append([t.cpu() for t in (out.detach(), *torch.autograd.grad(out, leaves, upstream.to(device)))])
    for expected, other in zip(*found, strict=True):
        torch.testing.assert_close(other, expected, atol=1e-4 * max(1, float(expected.abs().max())), rtol=1e-3)


@pytest.mark.parametrize("mode", MODES)
def test_gradients_of_the_reference(mode):
    leaves = [t.requires_grad_() for t in some(6, 4, 5, 1, 2)]
    assert torch.autograd.gradcheck(lambda *g: render(*g, Grid(4, 5), mode, k=3), leaves)
    assert torch.autograd.gradcheck(
        lambda *g: render(conics=conic_of_cholesky(g[1]), centres=g[0], colours=g[2], grid=Grid(4, 5)),
        [leaves[0], torch.rand(6, 3, dtype=torch.float64).add(0.5).requires_grad_(), leaves[2]],
    )


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("threads", [1, 2])
def test_a_window_is_cut_from_the_whole_bit_by_bit_on_any_number_of_threads(mode, threads):
    gaussians = [t.float() for t in some(200, 90, 70, 2)]
    before = torch.get_num_threads()
    whole = render(*gaussians, Grid(90, 70), mode)
    try:
        torch.set_num_threads(threads)
        assert torch.equal(render(*gaussians, Grid(90, 70), mode), whole)
        assert torch.equal(render(*gaussians, Grid(90, 70).window(11, 13, 37, 66), mode), whole[:, 13:79, 11:48])
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("mode", MODES)
def test_three_times_the_size_shows_the_same_values_between_new_ones(mode):
    gaussians = some(40, 12, 17, 4)
    small, large = render(*gaussians, Grid.over(12, 17), mode), render(*gaussians, Grid.over(12, 17, (36, 51)), mode)
    torch.testing.assert_close(large[:, 1::3, 1::3], small, atol=1e-9, rtol=1e-9)


def test_pixels_may_look_at_their_corner():
    gaussians = some(9, 5, 6)
    corner = render(*gaussians, Grid(5, 6, centre=0))
    torch.testing.assert_close(corner, render(gaussians[0] + 0.5, *gaussians[1:], Grid(5, 6)))


def test_sums_are_additive_and_order_free():
    centres, conics, colours = (t.float() for t in some(80, 30, 30))
    whole = render(centres, conics, colours, Grid(30, 30), "cut")
    parts = [render(centres[i], conics[i], colours[i], Grid(30, 30), "cut") for i in (slice(33), slice(33, None))]
    torch.testing.assert_close(sum(parts), whole, atol=1e-5, rtol=1e-5)
    order = torch.randperm(80, generator=torch.Generator().manual_seed(0))
    for mode in MODES:
        first, second = (render(centres[i], conics[i], colours[i], Grid(30, 30), mode) for i in (slice(None), order))
        torch.testing.assert_close(first, second, atol=1e-5, rtol=1e-5)


def test_all_of_the_gaussians_are_the_top_k_when_k_is_large():
    centres, conics, colours = (t.float() for t in some(12, 20, 20))
    a = render(centres, conics, torch.ones(12, 1), Grid(20, 20), reach=4.0)
    expected = render(centres, conics, colours, Grid(20, 20), reach=4.0) / (1e-4 + a)
    for k in (12, 40):
        found = render(centres, conics, colours, Grid(20, 20), "topk", k=k, reach=4.0)
        torch.testing.assert_close(found, expected, atol=1e-6, rtol=1e-5)


def test_equal_colours_make_that_colour_wherever_there_is_a_gaussian():
    centres, conics, _ = (t.float() for t in some(12, 20, 20))
    found = render(centres, conics, torch.full((12, 1), 0.7), Grid(20, 20), "topk")
    near = render(centres, conics, torch.ones(12, 1), Grid(20, 20)) > 0.1
    torch.testing.assert_close(found[near], torch.full_like(found[near], 0.7), atol=1e-3, rtol=0)


def test_two_ways_to_say_a_covariance():
    inverse, angle = torch.tensor([[0.5, 0.2], [1.0, 3.0]]).double(), torch.tensor([0.3, 2.0]).double()
    conics = conic_of_scale(inverse, angle)
    a, b, c = conics.unbind(1)
    matrices = torch.stack([torch.stack([a, b], 1), torch.stack([b, c], 1)], 1)
    along = torch.stack([angle.cos(), angle.sin()], 1)
    torch.testing.assert_close(torch.einsum("ni,nij,nj->n", along, matrices, along), inverse[:, 0].square())
    factor = torch.linalg.cholesky(matrices.inverse())
    again = conic_of_cholesky(torch.stack([factor[:, 0, 0], factor[:, 1, 0], factor[:, 1, 1]], 1))
    torch.testing.assert_close(again, conics)


@pytest.mark.parametrize("path", ["fast", "reference"])
def test_what_is_no_ellipse_draws_nothing_and_gets_no_gradient(path):
    centres = torch.tensor([[2.0, 2.0]] * 4)
    conics = torch.tensor([[1.0, 0, 1], [0, 0, 1], [1, 1, 1], [-1, 0, -1]], requires_grad=True)
    with use(path):
        out = render(centres, conics, torch.ones(4, 1), Grid(4, 4), "cut")
        alone = render(centres[:1], conics[:1], torch.ones(1, 1), Grid(4, 4), "cut")
        (grad,) = torch.autograd.grad(out.sum(), conics)
    torch.testing.assert_close(out, alone)
    assert grad[0].abs().min() > 0 or grad[0, 1] == 0
    assert not grad[1:].any()


def test_thin_and_huge_gaussians_and_far_places():
    centres = torch.tensor([[10.0, 10.0], [1e7, -1e7], [5.0, 5.0]])
    conics = conic_of_scale(torch.tensor([[1e-6, 2.0], [1.0, 1.0], [1e-5, 1e-5]]), torch.tensor([0.4, 0, 0]))
    for mode in MODES:
        fast, exact = both((centres, conics, torch.ones(3, 1)), Grid(20, 20), mode, torch.ones(1, 20, 20))
        assert torch.isfinite(fast[0]).all()
        inner = (slice(None), slice(2, 18), slice(2, 18))
        torch.testing.assert_close(fast[0].double()[inner], exact[0][inner], atol=6e-3, rtol=1e-2)


def test_none_is_a_black_picture():
    empty = torch.zeros(0, 2), torch.zeros(0, 3), torch.zeros(0, 3)
    for mode in MODES:
        assert not render(*empty, Grid(3, 4), mode).any()


def test_the_fast_path_is_for_float32_and_can_be_switched_off(monkeypatch):
    gaussians = [t.float() for t in some(3, 5, 5)]
    monkeypatch.setattr(ops, "render_reference", lambda *_: "reference")
    assert render(*gaussians, Grid(5, 5)) != "reference"
    assert render(*(t.double() for t in gaussians), Grid(5, 5)) == "reference"
    with use("reference"):
        assert render(*gaussians, Grid(5, 5)) == "reference"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"centres": torch.zeros(4, 3)}, r"\[N, 2\].*\(4, 3\)"),
        ({"colours": torch.zeros(3, 3)}, r"\[N, C\].*\(3, 3\)"),
        ({"conics": torch.zeros(4, 3).double()}, "share one.*float64"),
        ({"mode": "mean"}, "'mean'.*'sum', 'cut', 'topk'"),
        ({"k": 0}, "k=0"),
        ({"eps": 0.0}, "eps=0.0"),
        ({"reach": -1.0}, "-1.0"),
    ],
)
def test_what_makes_no_sense_is_refused(change, message):
    given_ = {
        "centres": torch.zeros(4, 2),
        "conics": torch.ones(4, 3),
        "colours": torch.zeros(4, 3),
        "grid": Grid(2, 2),
    }
    with pytest.raises(InputError, match=message):
        render(**(given_ | change))


def test_a_grid_needs_pixels_and_distance():
    with pytest.raises(InputError, match="3x0"):
        Grid(0, 3)
    with pytest.raises(InputError, match="0 apart"):
        Grid(2, 3, dx=0)
