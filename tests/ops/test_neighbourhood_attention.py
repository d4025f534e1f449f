import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.autograd import gradcheck

from foveate.errors import InputError
from foveate.meter import count_flops
from foveate.ops import neighbourhood_attention as module
from foveate.ops import use
from foveate.ops.neighbourhood_attention import neighbourhood_attention, neighbourhood_reference

PATHS = pytest.mark.parametrize("path", ["fast", "reference"])


def drawn(b, heads, d, h, w, side, bias=True, dtype=torch.float32, seed=0):
    dice = torch.Generator().manual_seed(seed)
    q, k, v = (torch.randn(b, heads * d, h, w, generator=dice, dtype=dtype) for _ in range(3))
    table = torch.randn(heads, 2 * side - 1, 2 * side - 1, generator=dice, dtype=dtype) if bias else None
    return q, k, v, table


def run(q, k, v, table, side, heads):
    """The result, and the gradients of all that is given."""
    given = [None if t is None else t.detach().clone().requires_grad_() for t in (q, k, v, table)]
    y = neighbourhood_attention(*given[:3], side, heads, given[3])
    up = torch.randn(y.shape, generator=torch.Generator().manual_seed(1), dtype=y.dtype)
    return [y.detach(), *torch.autograd.grad(y, [t for t in given if t is not None], up)]


@st.composite
def cases(draw):
    side = draw(st.sampled_from([1, 3, 5, 7]))
    b, heads, d = draw(st.integers(1, 2)), draw(st.integers(1, 3)), draw(st.integers(1, 6))
    h, w = (draw(st.integers(side, 12)) for _ in range(2))
    return (b, heads, d, h, w, side), draw(st.booleans()), draw(st.integers(0, 2**20))


@given(cases())
@settings(deadline=None, max_examples=40)
def test_the_compiled_path_and_its_gradients_are_the_reference(case):
    shape, bias, seed = case
    q, k, v, table = drawn(*shape, bias, seed=seed)
    with use("reference"):
        expected = run(q, k, v, table, shape[-1], shape[1])
    for ours, theirs in zip(run(q, k, v, table, shape[-1], shape[1]), expected, strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-5 * (1 + theirs.abs().max().item()), rtol=1e-5)


def test_gradients_of_the_reference():
    q, k, v, table = drawn(1, 2, 2, 4, 5, 3, dtype=torch.float64)
    inputs = [t.requires_grad_() for t in (q, k, v, table)]
    assert gradcheck(lambda q, k, v, t: neighbourhood_attention(q, k, v, 3, 2, t), inputs)


@PATHS
def test_by_the_definition_pixel_by_pixel(path):
    side, h, w = 3, 5, 6
    q, k, v, table = drawn(1, 1, 4, h, w, side)
    expected = torch.empty_like(v)
    for i in range(h):
        for j in range(w):
            top, left = min(max(i - 1, 0), h - side), min(max(j - 1, 0), w - side)
            near = (slice(top, top + side), slice(left, left + side))
            scores = (q[0, :, i, j, None, None] * k[0, :, *near]).sum(0) / 2
            rows, columns = top - i + side - 1, left - j + side - 1
            scores = scores + table[0, rows : rows + side, columns : columns + side]
            expected[0, :, i, j] = (scores.flatten().softmax(0).view(side, side) * v[0, :, *near]).sum((1, 2))
    with use(path):
        y = neighbourhood_attention(q, k, v, side, 1, table)
    torch.testing.assert_close(y, expected, atol=1e-5, rtol=1e-5)


@PATHS
def test_as_large_as_the_picture_it_is_full_self_attention(path):
    q, k, v, _ = drawn(2, 3, 4, 7, 7, 7)
    full = F.scaled_dot_product_attention(*(x.unflatten(1, (3, 4)).flatten(3).mT for x in (q, k, v)))
    with use(path):
        y = neighbourhood_attention(q, k, v, 7, 3)
    torch.testing.assert_close(y, full.mT.reshape(y.shape), atol=1e-5, rtol=1e-5)


@PATHS
def test_of_one_pixel_it_gives_the_values(path):
    q, k, v, table = drawn(1, 2, 3, 4, 5, 1)
    with use(path):
        torch.testing.assert_close(neighbourhood_attention(q, k, v, 1, 2, table), v, atol=1e-6, rtol=1e-6)


@PATHS
def test_without_queries_or_table_the_inside_is_the_box_mean(path):
    _, k, v, _ = drawn(1, 2, 3, 9, 8, 5)
    with use(path):
        y = neighbourhood_attention(torch.zeros_like(v), k, v, 5, 2)
    box = F.avg_pool2d(v, 5, 1)
    torch.testing.assert_close(y[..., 2:-2, 2:-2], box, atol=1e-6, rtol=1e-5)
    torch.testing.assert_close(y[..., 0, 0], box[..., 0, 0], atol=1e-6, rtol=1e-5)  # moved inside


@PATHS
def test_a_huge_bias_at_an_offset_shifts(path):
    q, k, v, table = drawn(1, 2, 3, 8, 9, 5)
    table[0, 4 + 2, 4 - 1], table[1, 4 - 2, 4 + 2] = 1e4, 1e4
    with use(path):
        y = neighbourhood_attention(q, k, v, 5, 2, table)[..., 2:-2, 2:-2]
    torch.testing.assert_close(y[:, :3], v[:, :3, 4:, 1:-3])
    torch.testing.assert_close(y[:, 3:], v[:, 3:, :-4, 4:])


@PATHS
def test_weights_sum_to_one_in_the_corners_too_however_large_the_scores(path):
    q, k, v, table = drawn(1, 2, 4, 6, 7, 3)
    with use(path):
        y = neighbourhood_attention(100 * q, 100 * k, torch.ones_like(v), 3, 2, table)
    torch.testing.assert_close(y, torch.ones_like(v), atol=1e-5, rtol=1e-5)


@PATHS
def test_the_scale_may_be_given(path):
    q, k, v, table = drawn(1, 2, 4, 5, 5, 3)
    with use(path):
        y = neighbourhood_attention(q, k, v, 3, 2, table, scale=0.25)
        torch.testing.assert_close(y, neighbourhood_attention(q / 2, k, v, 3, 2, table), atol=1e-6, rtol=1e-5)


def test_rows_at_a_time_change_nothing(monkeypatch):
    q, k, v, table = drawn(2, 2, 3, 8, 7, 3)
    whole = neighbourhood_reference(*(x.unflatten(1, (2, 3)) for x in (q, k, v)), table, 3).flatten(1, 2)
    monkeypatch.setattr(module, "GATHERED", 1)
    with use("reference"):
        y = neighbourhood_attention(q * 3**0.5, k, v, 3, 2, table)
    torch.testing.assert_close(y, whole, atol=1e-6, rtol=1e-5)


@PATHS
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(path, dtype):
    q, k, v, table = (t.to(dtype) for t in drawn(1, 2, 4, 6, 7, 3))
    with use(path):
        low = run(q, k, v, table, 3, 2)
        exact = run(*(t.float() for t in (q, k, v, table)), 3, 2)
    for a, b in zip(low, exact, strict=True):
        assert a.dtype == dtype
        torch.testing.assert_close(a.float(), b, atol=3e-2, rtol=2e-2)


def test_threads_share_the_work_without_gaps(monkeypatch):
    monkeypatch.setattr(torch, "get_num_threads", lambda: 3)
    given = drawn(1, 4, 3, 7, 8, 5)
    with use("reference"):
        expected = run(*given, 5, 4)
    for ours, theirs in zip(run(*given, 5, 4), expected, strict=True):
        torch.testing.assert_close(ours, theirs, atol=2e-5, rtol=1e-5)


def test_views_are_read_right():
    q, k, v, table = drawn(1, 2, 4, 6, 7, 3)
    expected = neighbourhood_attention(q, k, v, 3, 2, table)
    last = [x.to(memory_format=torch.channels_last) for x in (q, k, v)]
    assert torch.equal(neighbourhood_attention(*last, 3, 2, table.mT.contiguous().mT), expected)


def test_double_the_side_costs_four_times_as_much():
    cost = {s: count_flops(neighbourhood_attention, *drawn(1, 2, 4, 14, 15, s)[:3], s, 2) for s in (3, 7)}
    assert cost == {s: 2 * 2 * 8 * 14 * 15 * s * s for s in (3, 7)}


@pytest.mark.parametrize(
    ("shape", "settings", "message"),
    [
        ((1, 4, 6, 6), {"kernel_size": 4}, "must be odd, got 4"),
        ((1, 4, 6, 4), {"kernel_size": 5}, "5 x 5 neighbourhood does not fit in 6 x 4"),
        ((1, 4, 6, 6), {"kernel_size": 3, "heads": 3}, "3 heads do not divide 4"),
        ((4, 6, 6), {"kernel_size": 3}, r"\[B, C, H, W\]"),
        ((0, 4, 6, 6), {"kernel_size": 3}, r"\[B, C, H, W\]"),
        ((1, 4, 6, 6), {"kernel_size": 3, "bias": torch.zeros(1, 3, 3)}, r"\[1, 5, 5\], got \(1, 3, 3\)"),
    ],
)
def test_what_does_not_fit_is_refused(shape, settings, message):
    x = torch.zeros(shape)
    with pytest.raises(InputError, match=message):
        neighbourhood_attention(x, x, x, **settings)


def test_other_types_are_refused():
    x = torch.zeros(1, 1, 3, 3)
    with pytest.raises(InputError, match="of one type"):
        neighbourhood_attention(x, x.double(), x, 3)
    with pytest.raises(InputError, match="floating-point"):
        neighbourhood_attention(x.long(), x.long(), x.long(), 3)
