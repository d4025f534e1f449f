"""Every fast path and its gradients, in single and in half precision, against the reference in double precision."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from foveate.ops import spectral, subpixel, triangular_conv, use, wavelet

SIDES = st.integers(1, 21)
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 2e-2}


@st.composite
def dwt(draw):
    mode, shape = draw(st.sampled_from(["symmetric", "zero"])), [draw(st.integers(1, 3)) for _ in range(2)]
    return lambda x: wavelet.dwt2(x, mode), [normal(*shape, draw(SIDES), draw(SIDES))]


@st.composite
def idwt(draw):
    batch, channels, height, width = draw(st.integers(1, 3)), draw(st.integers(1, 3)), draw(SIDES), draw(SIDES)
    bands = normal(batch, 4 * channels, -(-height // 2), -(-width // 2))
    return lambda x: wavelet.idwt2(x, (height, width)), [bands]


@st.composite
def pyramid(draw):
    levels, size = draw(st.integers(1, 3)), (draw(SIDES), draw(SIDES))
    return lambda x: wavelet.waverec2([2 * part for part in wavelet.wavedec2(x, levels)], size), [normal(2, 1, *size)]


@st.composite
def filtered(draw):
    batch, n, heads, width = (draw(st.integers(1, most)) for most in (3, 33, 4, 5))
    # A bias above zero makes gradients of small magnitudes as large as one likes, in every way of computing them.
    gain, bias = normal(draw(st.sampled_from([1, batch])), heads, n // 2 + 1), -normal(heads, n // 2 + 1).abs() - 0.1
    return spectral.mix, [normal(batch, n, heads * width), gain, bias / 4]


@st.composite
def solved(draw):
    batch, channels, height, width, kernel = (draw(st.integers(1, most)) for most in (9, 4, 13, 13, 4))
    orders = draw(st.lists(st.sampled_from(list(triangular_conv.ORDERS)), min_size=1, max_size=2))
    sweep = draw(st.sampled_from([triangular_conv.wavefront, triangular_conv.raster]))
    weight = 0.05 * normal(len(orders), channels, channels, kernel, kernel)
    weight[..., -1, -1] = weight[..., -1, -1].tril(-1) + torch.eye(channels)
    y = normal(batch, len(orders) * channels, height, width)
    return lambda y, w: triangular_conv.triangular_solve(y, w, orders, sweep), [y, weight]


@st.composite
def two_layers(draw):
    n, s, hidden, outputs = (draw(st.integers(1, most)) for most in (40, 16, 33, 6))
    return subpixel.two_layers, [normal(*shape) for shape in ((n, hidden), (s, hidden), (outputs, hidden), (outputs,))]


@st.composite
def hidden(draw):
    n, s, width = (draw(st.integers(1, most)) for most in (40, 16, 33))
    index = torch.randint(n * s, (draw(st.integers(1, 50)),)) if draw(st.booleans()) else None
    return lambda a, b: subpixel.hidden(a, b, index), [normal(n, width), normal(s, width)]


@st.composite
def last_layer(draw):
    n, width, outputs = (draw(st.integers(1, most)) for most in (60, 33, 6))
    return subpixel.last_layer, [normal(n, width), normal(outputs, width), normal(outputs)]


WITH_GRADIENTS = (dwt(), idwt(), pyramid(), filtered(), solved())
WITHOUT = (two_layers(), hidden(), last_layer())
"""What takes its reference where a gradient is asked for."""


def normal(*shape):
    return torch.randn(*shape, dtype=torch.float64)


def results(call, inputs, dtype, gradients):
    """The result without gradients, and where there are some, with them, and they."""
    leaves = [x.to(dtype).requires_grad_() for x in inputs]
    with torch.no_grad():
        alone = call(*leaves)
    if not gradients:
        return [alone]
    y = call(*leaves)
    towards = torch.linspace(-1, 1, y.numel(), dtype=torch.float64).view_as(y).to(torch.bfloat16).to(dtype)
    return [alone, y.detach(), *torch.autograd.grad(y, leaves, towards)]


def named(strategy):
    return strategy.wrapped_strategy.definition.__name__


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("drawn", WITH_GRADIENTS + WITHOUT, ids=named)
def test_results_and_gradients_are_those_of_the_reference(drawn, dtype):
    @settings(deadline=None, max_examples=25)
    @given(drawn, st.integers(0, 2**32 - 1))
    def law(drawn_case, seed):
        call, inputs = drawn_case
        torch.manual_seed(seed)
        inputs = [x.to(dtype).double() for x in inputs]  # the same numbers for both
        with use("reference"):
            exact = results(call, inputs, torch.float64, drawn in WITH_GRADIENTS)
        for found, wanted in zip(results(call, inputs, dtype, drawn in WITH_GRADIENTS), exact, strict=True):
            assert found.dtype == dtype
            assert (found.double() - wanted).abs().max() <= TOLERANCE[dtype] * max(1.0, float(wanted.abs().max()))

    law()
