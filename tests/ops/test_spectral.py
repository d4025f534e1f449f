import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from foveate.errors import InputError
from foveate.ops import spectral, use
from foveate.ops.spectral import at_length, mix, mix_affine, mix_reference, modrelu

SEEDS = st.integers(0, 2**32 - 1)


def operands(batch, n, width, heads, shared, seed, dtype=torch.float32):
    random = torch.Generator().manual_seed(seed)
    bins = n // 2 + 1
    x = torch.randn(batch, n, width * heads, generator=random)
    gain = torch.randn(1 if shared else batch, heads, bins, generator=random)
    bias = torch.randn(heads, bins, generator=random) / 4
    return [t.to(dtype) for t in (x, gain, bias)]


@given(st.integers(1, 3), st.integers(1, 33), st.integers(1, 9), st.integers(1, 4), st.booleans(), SEEDS)
@settings(deadline=None, max_examples=40)
def test_the_fast_path_and_its_gradients_are_those_of_the_reference(batch, n, width, heads, shared, seed):
    given_, towards = operands(batch, n, width, heads, shared, seed), torch.linspace(-1, 1, batch * n * width * heads)
    found = []
    for path in ("fast", "reference"):
        with use(path):
            leaves = [t.clone().requires_grad_() for t in given_]
            y = mix(*leaves)
            found.append([y, *torch.autograd.grad((y.flatten() * towards).sum(), leaves)])
    for fast, plain in zip(*found, strict=True):
        # A magnitude on the threshold may fall to either side; nothing else may differ.
        torch.testing.assert_close(fast, plain, atol=2e-5, rtol=1e-4)


@given(st.integers(1, 3), st.integers(1, 33), st.integers(1, 5), SEEDS)
@settings(deadline=None, max_examples=25)
def test_bfloat16_is_the_rounded_result(batch, n, heads, seed):
    x, gain, bias = operands(batch, n, 2, heads, False, seed, torch.bfloat16)
    y = mix(x, gain, bias)
    assert y.dtype == torch.bfloat16
    assert torch.equal(y, mix(x.float(), gain.float(), bias.float()).bfloat16())
    with use("reference"):
        torch.testing.assert_close(mix(x, gain, bias), y, atol=2e-2, rtol=2e-2)


def test_many_heads_are_shared_among_threads_without_gaps(monkeypatch):
    parts = []

    def in_three(fn, length, least):
        for i in range(3):
            parts.append((length * i // 3, length * (i + 1) // 3))
            fn(*parts[-1])

    monkeypatch.setattr(spectral, "in_parts", in_three)
    x, gain, bias = operands(3, 20, 2, 5, False, 0)
    torch.testing.assert_close(mix(x, gain, bias), mix_reference(x, gain, bias), atol=1e-5, rtol=1e-5)
    assert parts == [(0, 5), (5, 10), (10, 15)]


@pytest.mark.parametrize("n", [1, 2, 7, 8])
def test_gradients_of_the_reference_are_those_of_finite_differences(n):
    x, gain, bias = operands(2, n, 2, 2, n == 8, 0, torch.float64)
    leaves = [t.requires_grad_() for t in (x, gain.abs() + 1, bias.abs() / 9)]
    leaves = [t.detach().requires_grad_() for t in leaves]
    assert torch.autograd.gradcheck(mix, leaves)
    assert torch.autograd.gradcheck(mix_affine, (leaves[0], leaves[1], leaves[1].detach() / 3))


@given(st.integers(1, 40), SEEDS)
@settings(deadline=None, max_examples=25)
def test_a_filter_of_ones_gives_back_the_tokens_at_even_and_odd_lengths(n, seed):
    x = operands(2, n, 3, 2, True, seed)[0]
    ones, zeros = torch.ones(1, 2, n // 2 + 1), torch.zeros(2, n // 2 + 1)
    torch.testing.assert_close(mix(x, ones, zeros), x, atol=1e-5, rtol=0)


@given(st.integers(2, 24), st.integers(0, 30), SEEDS)
@settings(deadline=None, max_examples=25)
def test_without_a_threshold_it_is_a_circulant_matrix_with_an_even_kernel(n, shift, seed):
    x, gain, _ = operands(1, n, 2, 2, True, seed, torch.float64)
    zeros = torch.zeros(2, n // 2 + 1, dtype=torch.float64)
    y = mix(x, gain, zeros, eps=0.0)
    for h in range(2):
        kernel = torch.fft.irfft(gain[0, h].to(torch.complex128), n=n)
        torch.testing.assert_close(kernel, kernel.flip(0).roll(1), atol=1e-12, rtol=0)
        matrix = torch.stack([kernel.roll(i) for i in range(n)], 1)
        torch.testing.assert_close(y[..., 2 * h : 2 * h + 2], matrix @ x[..., 2 * h : 2 * h + 2], atol=1e-10, rtol=0)
    torch.testing.assert_close(mix(x.roll(shift, 1), gain, zeros, eps=0.0), y.roll(shift, 1), atol=1e-10, rtol=0)


@given(st.integers(1, 24), SEEDS)
@settings(deadline=None, max_examples=25)
def test_shifts_commute_with_the_threshold_too(n, seed):
    x, gain, bias = operands(2, n, 2, 2, False, seed, torch.float64)
    torch.testing.assert_close(mix(x.roll(3, 1), gain, bias), mix(x, gain, bias).roll(3, 1), atol=1e-9, rtol=0)


@given(SEEDS, st.floats(-2, 2))
@settings(deadline=None, max_examples=25)
def test_modrelu_keeps_phases_and_silences_small_magnitudes(seed, bias):
    z = torch.randn(50, dtype=torch.complex128, generator=torch.Generator().manual_seed(seed))
    out, b = modrelu(z, torch.tensor(bias, dtype=torch.float64)), bias
    open_ = z.abs() + b > 1e-9
    torch.testing.assert_close(out[open_].angle(), z[open_].angle())
    torch.testing.assert_close(out[open_].abs(), z[open_].abs() + b, atol=1e-4, rtol=1e-4)
    assert not out[z.abs() + b <= 0].any()


@pytest.mark.parametrize("path", ["fast", "reference"])
@pytest.mark.parametrize("bias", [-0.5, 0.0, 0.5])
@pytest.mark.parametrize("eps", [1e-6, 0.0])
def test_silence_gives_silence_and_finite_gradients(path, bias, eps):
    x = torch.zeros(1, 6, 2, requires_grad=True)
    gain, b = torch.ones(1, 1, 4, requires_grad=True), torch.full((1, 4), bias, requires_grad=True)
    with use(path):
        y = mix(x, gain, b, eps)
        assert not y.any()
        y.sum().backward()
    if eps:
        assert all(torch.isfinite(t.grad).all() for t in (x, gain, b))


def test_the_affine_filter_is_its_definition():
    x, gain, _ = operands(2, 7, 2, 2, False, 0, torch.float64)
    offset = operands(2, 7, 2, 2, False, 1, torch.float64)[1]
    expected = torch.empty_like(x)
    for i in range(2):
        for c in range(4):
            u = torch.fft.rfft(x[i, :, c], norm="ortho") * gain[i, c // 2] + offset[i, c // 2]
            size = u.abs()
            gelu = size * 0.5 * (1 + torch.erf(size / math.sqrt(2)))
            expected[i, :, c] = torch.fft.irfft(u * gelu / (size + 1e-6), n=7, norm="ortho")
    torch.testing.assert_close(mix_affine(x, gain, offset), expected)


def test_a_filter_read_at_another_length_keeps_its_response_per_frequency():
    for built, n in ((16, 32), (17, 16), (9, 40), (12, 5)):
        frequency = torch.arange(built // 2 + 1, dtype=torch.float64) / built
        found = at_length(2 - 3 * frequency, built, n)
        wanted = (torch.arange(n // 2 + 1, dtype=torch.float64) / n).clamp(max=(built // 2) / built)
        torch.testing.assert_close(found, 2 - 3 * wanted)
    values = torch.randn(3, 5)
    assert at_length(values, 8, 8) is values


@pytest.mark.parametrize(
    ("x", "gain", "bias", "message"),
    [
        ((2, 8), (1, 2, 5), (2, 5), r"tokens \[B, N, C\]"),
        ((2, 0, 4), (1, 2, 1), (2, 1), "not empty"),
        ((2, 8, 4), (1, 3, 5), (3, 5), "heads dividing 4"),
        ((2, 8, 4), (1, 2, 4), (2, 4), r"\[2 or 1, heads, 5\].*\(1, 2, 4\)"),
        ((2, 8, 4), (3, 2, 5), (2, 5), "2 or 1"),
        ((2, 8, 4), (1, 2, 5), (1, 5), r"bias \[heads, 5\]"),
    ],
)
def test_shapes_that_do_not_fit_are_refused(x, gain, bias, message):
    with pytest.raises(InputError, match=message):
        mix(torch.zeros(x), torch.zeros(gain), torch.zeros(bias))
