import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from foveate.errors import InputError
from foveate.ops import triangular_conv as ops
from foveate.ops import use
from foveate.ops.triangular_conv import (
    ORDERS,
    raster,
    solve_compiled,
    solve_reference,
    triangular_conv,
    triangular_solve,
    wavefront,
)

ALL = tuple(ORDERS)
SIDES, SEEDS = st.integers(1, 13), st.integers(0, 2**32 - 1)


def kernels(groups, c, k, seed=0, dtype=torch.float32):
    """Weights from N(0, 0.05^2) with unit lower triangular last taps."""
    w = 0.05 * torch.randn(groups, c, c, k, k, generator=torch.Generator().manual_seed(seed), dtype=dtype)
    w[..., -1, -1] = w[..., -1, -1].tril(-1) + torch.eye(c, dtype=dtype)
    return w


def noise(*shape, seed=0, dtype=torch.float32):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def matrix(weight, order, h, w):
    """The convolution of [C, h, w] as a matrix [C h w, C h w]."""
    size = weight.shape[1] * h * w
    return triangular_conv(torch.eye(size, dtype=weight.dtype).view(size, -1, h, w), weight, (order,)).flatten(1).T


def test_a_value_follows_the_equation():
    w, x = kernels(1, 2, 3), noise(1, 2, 4, 5)
    padded = F.pad(x, (2, 0, 2, 0))
    i, j = 2, 3
    value = sum(w[0, 1, c, a, b] * padded[0, c, i + a, j + b] for c in range(2) for a in range(3) for b in range(3))
    torch.testing.assert_close(triangular_conv(x, w)[0, 1, i, j], value)


@given(st.integers(1, 3), st.integers(1, 3), SIDES, SIDES, st.sampled_from([2, 3, 5]), SEEDS)
@settings(deadline=None, max_examples=25)
def test_the_inverse_gives_the_input_back_for_all_orders_and_sizes(b, c, h, w, k, seed):
    weight, x = kernels(4, c, k, seed), noise(b, 4 * c, h, w, seed=seed)
    y = triangular_conv(x, weight, ALL)
    torch.testing.assert_close(triangular_solve(y, weight, ALL), x, atol=1e-5, rtol=0)
    with use("reference"):
        torch.testing.assert_close(triangular_solve(y, weight, ALL), x, atol=1e-5, rtol=0)


@given(st.integers(1, 19), st.integers(1, 2), st.integers(1, 5), SIDES, SIDES, st.integers(1, 4), SEEDS)
@settings(deadline=None, max_examples=30)
def test_compiled_and_plain_wavefront_and_raster_agree(b, g, c, h, w, k, seed):
    weight, y = kernels(g, c, k, seed), noise(b, g, c, h, w, seed=seed)
    expected = solve_reference(y, weight, raster)
    for solve in (solve_reference, solve_compiled):
        for sweep in (wavefront, raster):
            torch.testing.assert_close(solve(y, weight, sweep), expected, atol=1e-5, rtol=1e-5)


def test_a_run_longer_than_the_lanes_of_the_compiled_loop():
    weight, y = kernels(1, 2, 3), noise(11, 1, 2, 40, 33)
    assert ops._LANES < 8 * 33
    torch.testing.assert_close(solve_compiled(y, weight), solve_reference(y, weight), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("order", ALL)
@pytest.mark.parametrize("k", [2, 3])
def test_the_wavefront_is_the_dense_solve(order, k):
    weight, y = kernels(1, 2, k), noise(3, 2, 4, 5)
    dense = torch.linalg.solve(matrix(weight, order, 4, 5), y.flatten(1).T).T.view_as(y)
    torch.testing.assert_close(triangular_solve(y, weight, (order,)), dense, atol=1e-5, rtol=0)


@pytest.mark.parametrize("order", ALL)
def test_the_jacobian_is_triangular_in_scan_order_with_determinant_1(order):
    weight = kernels(1, 2, 3, dtype=torch.float64)
    jacobian = torch.autograd.functional.jacobian(
        lambda x: triangular_conv(x, weight, (order,)), noise(1, 2, 4, 4, dtype=torch.float64)
    )
    by_pixel = jacobian.view(2, 4, 4, 2, 4, 4).flip([axis - 3 * half for axis in ORDERS[order] for half in (0, 1)])
    scanned = by_pixel.permute(1, 2, 0, 4, 5, 3).reshape(32, 32)
    assert torch.equal(scanned, scanned.tril())
    assert abs(torch.linalg.slogdet(scanned)[1]) < 1e-12
    assert torch.equal(scanned.diagonal(), torch.ones(32, dtype=torch.float64))


@pytest.mark.parametrize("order", ALL)
def test_other_corners_are_mirrored_pictures(order):
    weight, x = kernels(1, 3, 3, dtype=torch.float64), noise(2, 3, 5, 6, dtype=torch.float64)
    mirrored = triangular_conv(x.flip(ORDERS[order]), weight).flip(ORDERS[order])
    torch.testing.assert_close(triangular_conv(x, weight, (order,)), mirrored, atol=1e-14, rtol=0)


@given(st.integers(1, 20), st.integers(1, 20), st.integers(2, 5))
@settings(deadline=None, max_examples=25)
def test_a_sweep_visits_every_pixel_once_after_those_it_needs(h, w, k):
    for sweep, steps in ((wavefront, h + w - 1), (raster, h * w)):
        way = sweep(h, w, k)
        when = {p: step for step, (start, n) in enumerate(way.runs) for p in range(start, start + n)}
        place = {(i, j): way.origin + i * way.up + j * way.left for i in range(h) for j in range(w)}
        assert len(way.runs) == steps
        assert sorted(when) == sorted(place.values())
        assert max(when) < way.length
        for (i, j), p in place.items():
            for u in range(k):
                for v in range(k):
                    behind = p - u * way.up - v * way.left
                    assert behind >= 0
                    if (u, v) != (0, 0) and i >= u and j >= v:
                        assert when[behind] < when[p]
                    elif (u, v) != (0, 0):
                        assert behind not in when  # the padding is never written


@pytest.mark.parametrize("path", ["fast", "reference"])
def test_gradients_are_right_and_can_be_taken_twice(path):
    weight, y = kernels(2, 2, 2, dtype=torch.float64), noise(1, 4, 2, 3, dtype=torch.float64)
    weight.requires_grad_()
    y.requires_grad_()
    orders = ("tr", "bl")
    with use(path):
        assert torch.autograd.gradcheck(lambda a, w: triangular_conv(a, w, orders), (y, weight))
        assert torch.autograd.gradcheck(lambda a, w: triangular_solve(a, w, orders), (y, weight))
        small = noise(1, 1, 2, 2, dtype=torch.float64).requires_grad_()
        kernel = kernels(1, 1, 2, dtype=torch.float64).requires_grad_()
        assert torch.autograd.gradgradcheck(triangular_solve, (small, kernel))


def test_any_invertible_last_tap_will_do():
    weight, x = kernels(1, 3, 3), noise(1, 3, 6, 5)
    weight[..., -1, -1] = torch.tensor([[0.0, 2, 0], [1, 0, 0.5], [0, 1, 1]])
    torch.testing.assert_close(triangular_solve(triangular_conv(x, weight), weight), x, atol=1e-4, rtol=0)
    weight[..., -1, -1] = 0
    for path in ("fast", "reference"):
        with use(path), pytest.raises(InputError, match="no inverse"):
            triangular_solve(x, weight)


def test_half_precision_is_computed_in_single():
    weight, y = kernels(1, 2, 3).bfloat16(), noise(1, 2, 6, 6).bfloat16()
    x = triangular_solve(y, weight)
    assert x.dtype == torch.bfloat16
    assert torch.equal(x, triangular_solve(y.float(), weight.float()).bfloat16())


def test_the_fast_path_is_taken_on_the_cpu_and_can_be_switched_off(monkeypatch):
    taken = []
    monkeypatch.setattr(ops, "solve_compiled", lambda y, *_: taken.append("fast") or y)
    monkeypatch.setattr(ops, "solve_reference", lambda y, *_: taken.append("reference") or y)
    triangular_solve(noise(1, 2, 3, 3), kernels(1, 2, 3))
    with use("reference"):
        triangular_solve(noise(1, 2, 3, 3), kernels(1, 2, 3))
    assert taken == ["fast", "reference"]


def test_an_empty_batch_stays_empty():
    assert triangular_solve(torch.zeros(0, 2, 3, 3), kernels(1, 2, 3)).shape == (0, 2, 3, 3)


@pytest.mark.parametrize("call", [triangular_conv, triangular_solve])
def test_what_does_not_fit_is_refused_by_shape(call):
    weight = kernels(2, 3, 3)
    with pytest.raises(InputError, match=r"\[B, 6, H, W\].*\(1, 5, 4, 4\)"):
        call(torch.zeros(1, 5, 4, 4), weight, ("tl", "tr"))
    with pytest.raises(InputError, match=r"G = 1.*\(2, 3, 3, 3, 3\)"):
        call(torch.zeros(1, 6, 4, 4), weight, ("tl",))
    with pytest.raises(InputError, match=r"'xx'.*tl, tr, bl, br"):
        call(torch.zeros(1, 6, 4, 4), weight, ("tl", "xx"))
    with pytest.raises(InputError, match="no pixels"):
        call(torch.zeros(1, 6, 0, 4), weight, ("tl", "tr"))
