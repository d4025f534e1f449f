import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.autograd import gradcheck, gradgradcheck

from foveate.errors import InputError
from foveate.ops import use, wavelet
from foveate.ops.wavelet import dwt2, idwt2, split, wavedec2, waverec2

SIDES, SEEDS = st.integers(1, 21), st.integers(0, 2**32 - 1)
MODES = st.sampled_from(["symmetric", "zero"])

DIGITS = torch.tensor([[3.0, 1, 4, 1, 5], [9, 2, 6, 5, 3], [5, 8, 9, 7, 9]])[None, None]
BY_PYWAVELETS = {  # of DIGITS, by PyWavelets 1.8: dwt2(x, "haar", mode) as cA, cH, cV, cD
    "symmetric": [
        [[7.5, 8, 8], [13, 16, 18]],
        [[-3.5, -3, 2], [0, 0, 0]],
        [[4.5, 2, 0], [-3, 2, 0]],
        [[-2.5, 1, 0], [0, 0, 0]],
    ],
    "zero": [
        [[7.5, 8, 4], [6.5, 8, 4.5]],
        [[-3.5, -3, 1], [6.5, 8, 4.5]],
        [[4.5, 2, 4], [-1.5, 1, 4.5]],
        [[-2.5, 1, 1], [-1.5, 1, 4.5]],
    ],
}


def draw(shape, seed, dtype=torch.float32):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


@pytest.mark.parametrize("path", ["fast", "reference"])
@pytest.mark.parametrize("mode", BY_PYWAVELETS)
def test_bands_are_those_of_pywavelets(mode, path):
    with use(path):
        bands = dwt2(DIGITS, mode)
    torch.testing.assert_close(bands[0], torch.tensor(BY_PYWAVELETS[mode]), atol=1e-6, rtol=0)


@given(st.integers(1, 3), st.integers(1, 3), SIDES, SIDES, MODES, SEEDS)
@settings(deadline=None, max_examples=30)
def test_bands_are_those_of_pywavelets_where_it_is_installed(b, c, height, width, mode, seed):
    pywt = pytest.importorskip("pywt")
    x = draw((b, c, height, width), seed)
    low, detail = split(dwt2(x, mode))
    expected, details = pywt.dwt2(x.numpy(), "haar", mode=mode)
    torch.testing.assert_close(low, torch.from_numpy(expected), atol=2e-6, rtol=1e-6)
    for band, theirs in zip(detail.unbind(2), details, strict=True):
        torch.testing.assert_close(band, torch.from_numpy(theirs), atol=2e-6, rtol=1e-6)


@given(
    st.integers(1, 3), st.integers(1, 4), SIDES, SIDES, MODES, st.sampled_from([torch.float32, torch.float64]), SEEDS
)
@settings(deadline=None, max_examples=40)
def test_the_compiled_path_is_the_reference(b, c, height, width, mode, dtype, seed):
    x = draw((b, c, height, width), seed, dtype)
    fast = dwt2(x, mode)
    back = idwt2(fast, (height, width))
    with use("reference"):
        assert torch.equal(fast, dwt2(x, mode))
        assert torch.equal(back, idwt2(fast, (height, width)))


@given(SIDES, SIDES, st.integers(1, 5), MODES, SEEDS)
@settings(deadline=None, max_examples=40)
def test_every_size_is_reconstructed(height, width, levels, mode, seed):
    x = draw((2, 2, height, width), seed)
    coefficients = wavedec2(x, levels, mode)
    assert len(coefficients) == levels + 1
    assert coefficients[0].shape[2:] == (-(-height // 2**levels), -(-width // 2**levels))
    torch.testing.assert_close(waverec2(coefficients, (height, width)), x, atol=2e-6, rtol=0)


@given(SIDES, SIDES, st.integers(1, 4), SEEDS)
@settings(deadline=None, max_examples=30)
def test_energy_is_kept_with_zeros_beyond_the_edge(height, width, levels, seed):
    x = draw((1, 2, height, width), seed)
    energy = sum(c.square().sum() for c in wavedec2(x, levels, "zero"))
    torch.testing.assert_close(energy, x.square().sum(), atol=0, rtol=1e-5)


@given(SIDES, SIDES, st.integers(1, 4), st.floats(-100, 100, width=32))
@settings(deadline=None, max_examples=30)
def test_a_constant_has_no_details(height, width, levels, level):
    low, *details = wavedec2(torch.full((1, 1, height, width), level), levels)
    assert all(not detail.any() for detail in details)
    assert torch.equal(low, torch.full_like(low, level) * 2**levels)


def test_two_levels_sum_blocks_of_four():
    x = draw((1, 3, 16, 24), 0)
    blocks = x.unflatten(3, (6, 4)).unflatten(2, (4, 4)).sum((3, 5)) / 4
    torch.testing.assert_close(wavedec2(x, 2)[0], blocks, atol=1e-6, rtol=1e-6)


def test_details_are_interleaved_channel_by_channel():
    x = torch.zeros(1, 2, 2, 2)
    x[0, 1] = torch.tensor([[4.0, 2.0], [1.0, 0.0]])  # LL 3.5, LH 2.5, HL 1.5, HH 0.5
    assert dwt2(x).flatten().tolist() == [0, 3.5, 0, 0, 0, 2.5, 1.5, 0.5]


@pytest.mark.parametrize("path", ["fast", "reference"])
@pytest.mark.parametrize("mode", ["symmetric", "zero"])
@pytest.mark.parametrize("size", [(4, 6), (3, 5), (1, 2)])
def test_gradients_are_those_of_finite_differences(path, mode, size):
    x = draw((1, 2, *size), 0, torch.float64).requires_grad_()
    with use(path):
        bands = dwt2(x.detach(), mode).requires_grad_()
        assert gradcheck(lambda x: dwt2(x, mode), x)
        assert gradgradcheck(lambda x: dwt2(x, mode), x)
        assert gradcheck(lambda bands: idwt2(bands, size), bands)
        assert gradcheck(lambda x: waverec2(wavedec2(x, 2, mode), size), x)


def test_nothing_is_stored_for_the_gradient():
    held = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: held.append(t) or t, lambda t: t):
        dwt2(draw((1, 4, 6, 6), 0).requires_grad_())
    assert held == []


def test_views_and_other_memory_formats_are_read_right():
    x = draw((2, 3, 8, 10), 0)
    expected = dwt2(x)
    assert torch.equal(dwt2(x.to(memory_format=torch.channels_last)), expected)
    assert torch.equal(dwt2(x.mT.contiguous().mT), expected)
    assert torch.equal(idwt2(expected.to(memory_format=torch.channels_last)), idwt2(expected))


def test_many_rows_are_shared_among_threads_without_gaps(monkeypatch):
    monkeypatch.setattr(torch, "get_num_threads", lambda: 3)
    x = draw((3, 5, 46, 8), 0)
    with use("reference"):
        expected = dwt2(x)
    assert torch.equal(dwt2(x), expected)
    torch.testing.assert_close(idwt2(expected), x, atol=1e-6, rtol=0)


def test_bfloat16_and_half():
    x = draw((1, 2, 5, 7), 0)
    for dtype in (torch.bfloat16, torch.float16):
        bands = dwt2(x.to(dtype))
        assert bands.dtype == dtype
        torch.testing.assert_close(bands.float(), dwt2(x), atol=5e-2, rtol=2e-2)


@pytest.mark.parametrize(
    ("call", "says"),
    [
        (lambda: dwt2(torch.zeros(3, 4, 4)), r"\[B, C, H, W\].*\(3, 4, 4\)"),
        (lambda: dwt2(torch.zeros(1, 1, 0, 4)), "something in it"),
        (lambda: dwt2(torch.zeros(1, 1, 4, 4, dtype=torch.uint8)), "uint8; convert"),
        (lambda: dwt2(torch.zeros(1, 1, 4, 4), "reflect"), "'reflect'; use one of 'symmetric', 'zero'"),
        (lambda: idwt2(torch.zeros(1, 6, 2, 2)), "come in fours, got 6"),
        (lambda: idwt2(torch.zeros(1, 4, 2, 2), (5, 4)), "2 x 2 do not make 5 x 4"),
        (lambda: wavedec2(torch.zeros(1, 1, 4, 4), 0), "at least one level, got 0"),
        (lambda: waverec2([torch.zeros(1, 1, 4, 4)]), "got 1 tensors"),
        (lambda: waverec2([torch.zeros(1, 1, 4, 4), torch.zeros(1, 1, 3, 2, 2)]), "do not belong"),
    ],
)
def test_what_cannot_be_transformed_is_refused(call, says):
    with pytest.raises(InputError, match=says):
        call()


def test_the_fast_path_is_taken_where_it_can(monkeypatch):
    taken = []
    monkeypatch.setattr(wavelet, "in_parts", lambda *_: taken.append("fast"))
    x = draw((1, 1, 4, 4), 0)
    with use("reference"):
        dwt2(x)
    dwt2(x.bfloat16())
    assert taken == []
    idwt2(dwt2(x))
    assert taken == ["fast", "fast"]
