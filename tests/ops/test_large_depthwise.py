import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from foveate.errors import InputError
from foveate.meter import count_flops
from foveate.ops import large_depthwise as op
from foveate.ops import use
from foveate.ops.large_depthwise import depthwise_fft, depthwise_reference, large_depthwise, path_for

ODD = st.integers(0, 12).map(lambda n: 2 * n + 1)
SEEDS = st.integers(0, 2**32 - 1)


def operands(batch, channels, height, width, rows, columns, seed, dtype=torch.float32):
    random = torch.Generator().manual_seed(seed)
    x = torch.randn(batch, channels, height, width, generator=random)
    weight = torch.randn(channels, 1, rows, columns, generator=random) / math.sqrt(rows * columns)
    return x.to(dtype), weight.to(dtype)


def both(way, x, weight):
    """The result and gradients of a way, and those of the reference in float64."""
    found = []
    for convolve, dtype in ((way, torch.float32), (depthwise_reference, torch.float64)):
        leaves = [t.to(dtype).requires_grad_() for t in (x, weight)]
        y = convolve(*leaves)
        towards = torch.linspace(-1, 1, y.numel(), dtype=dtype).view_as(y)
        found.append([y, *torch.autograd.grad(y, leaves, towards)])
    return found


@given(st.integers(1, 3), st.integers(1, 20), st.integers(1, 13), st.integers(1, 13), ODD, ODD, SEEDS)
@settings(deadline=None, max_examples=30)
def test_the_compiled_way_and_its_gradients_are_those_of_the_reference(b, channels, h, w, rows, columns, seed):
    x, weight = operands(b, channels, h, w, rows, columns, seed)
    for fast, plain in zip(*both(op._Compiled.apply, x, weight), strict=True):
        torch.testing.assert_close(fast.double(), plain, atol=2e-5, rtol=1e-5)


@given(st.integers(1, 2), st.integers(1, 4), st.integers(1, 13), st.integers(1, 13), ODD, ODD, SEEDS)
@settings(deadline=None, max_examples=20)
def test_the_spectral_way_and_its_gradients_are_those_of_the_reference(b, channels, h, w, rows, columns, seed):
    x, weight = operands(b, channels, h, w, rows, columns, seed)
    for fast, plain in zip(*both(depthwise_fft, x, weight), strict=True):
        torch.testing.assert_close(fast.double(), plain, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(("size", "kernel", "way"), [(20, 7, "conv"), (14, 27, "compiled"), (64, 63, "fft")])
def test_every_way_is_taken_where_it_is_the_cheapest(size, kernel, way):
    x, weight = operands(1, 3, size, size, kernel, kernel, 0)
    assert path_for(x, weight) == way
    bias = torch.arange(3.0)
    expected = depthwise_reference(x, weight, bias)
    torch.testing.assert_close(large_depthwise(x, weight, bias), expected, atol=1e-4, rtol=1e-4)
    with use("reference"):
        assert path_for(x, weight) == "conv"
        assert torch.equal(large_depthwise(x, weight, bias), expected)
    assert path_for(x.double(), weight.double()) == "conv"
    assert path_for(x.to("meta"), weight.to("meta")) == "conv"


def test_gradients_of_the_reference_are_those_of_finite_differences():
    x, weight = operands(2, 2, 4, 3, 5, 3, 0, torch.float64)
    leaves = [t.requires_grad_() for t in (x, weight, torch.ones(2, dtype=torch.float64))]
    assert torch.autograd.gradcheck(large_depthwise, leaves)
    assert torch.autograd.gradcheck(depthwise_fft, leaves)


def test_a_kernel_of_one_pixel_off_its_centre_moves_the_map():
    x, weight = torch.randn(1, 2, 9, 12), torch.zeros(2, 1, 13, 13)
    weight[0, 0, 6 + 2, 6 - 3] = 1
    weight[1, 0, 6, 6] = 1
    y = large_depthwise(x, weight)
    assert torch.equal(y[:, 0, :-2, 3:], x[:, 0, 2:, :-3])
    assert not y[:, 0, -2:].any()
    assert not y[:, 0, :, :3].any()
    assert torch.equal(y[:, 1], x[:, 1])


@pytest.mark.parametrize("kernel", [13, 31])
def test_inside_the_map_it_moves_with_its_input(kernel):
    x, weight = operands(1, 4, 8, 8, kernel, kernel, 0)
    wide = torch.zeros(2, 4, 48, 48)
    wide[0, :, 18:26, 20:28], wide[1, :, 21:29, 18:26] = x[0], x[0]
    first, second = large_depthwise(wide, weight)
    torch.testing.assert_close(first.roll((3, -2), (1, 2)), second, atol=1e-5, rtol=1e-4)


@given(st.integers(1, 3), st.integers(1, 20), st.integers(11, 15), SEEDS)
@settings(deadline=None, max_examples=25)
def test_half_precision_is_the_rounded_result(batch, channels, size, seed):
    x, weight = operands(batch, channels, size, size, 13, 13, seed, torch.bfloat16)
    y = large_depthwise(x, weight)
    assert y.dtype == torch.bfloat16
    assert torch.equal(y, large_depthwise(x.float(), weight.float()).bfloat16())
    with use("reference"):
        torch.testing.assert_close(large_depthwise(x, weight), y, atol=2e-2, rtol=2e-2)


def test_rows_are_shared_among_threads_without_gaps(monkeypatch):
    x, weight = operands(2, 20, 7, 9, 13, 11, 0)
    plain = both(op._Compiled.apply, x, weight)[1]

    def in_three(fn, length, least):
        for i in range(3):
            fn(length * i // 3, length * (i + 1) // 3)

    monkeypatch.setattr(op, "in_parts", in_three)
    for fast, expected in zip(both(op._Compiled.apply, x, weight)[0], plain, strict=True):
        torch.testing.assert_close(fast.double(), expected, atol=2e-5, rtol=1e-5)


def test_strided_inputs_and_empty_batches():
    x, weight = operands(2, 6, 12, 12, 13, 13, 0)
    expected = large_depthwise(x, weight)
    torch.testing.assert_close(large_depthwise(x.contiguous(memory_format=torch.channels_last), weight), expected)
    torch.testing.assert_close(large_depthwise(x.mT, weight.mT).mT, expected, atol=1e-5, rtol=1e-5)
    assert large_depthwise(x[:0], weight).shape == (0, 6, 12, 12)


def test_products_are_counted_whichever_way_is_taken():
    x, weight = operands(1, 3, 14, 14, 27, 27, 0)
    assert count_flops(large_depthwise, x, weight) == 2 * 3 * 14 * 14 * 27 * 27


@pytest.mark.parametrize(
    ("x", "weight", "bias", "message"),
    [
        ((1, 2, 8, 8), (2, 1, 4, 5), None, r"odd, got \(2, 1, 4, 5\)"),
        ((1, 2, 8, 8), (2, 2, 5, 5), None, r"\[C, 1, K, L\]"),
        ((1, 3, 8, 8), (2, 1, 5, 5), None, r"\[B, 2, H, W\], got \(1, 3, 8, 8\)"),
        ((2, 8, 8), (2, 1, 5, 5), None, r"\[B, 2, H, W\]"),
        ((1, 2, 8, 8), (2, 1, 5, 5), (3,), r"biases, got \(3,\)"),
    ],
)
def test_what_does_not_fit_is_refused(x, weight, bias, message):
    with pytest.raises(InputError, match=message):
        large_depthwise(torch.zeros(x), torch.zeros(weight), None if bias is None else torch.zeros(bias))
