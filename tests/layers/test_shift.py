import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from foveate.errors import InputError
from foveate.layers.shift import EIGHT, FOUR, SpatialShift

SIZES = st.integers(1, 6)
SEEDS = st.integers(0, 2**32 - 1)


def picture(channels, h, w, seed=0, dtype=torch.float32):
    return torch.randn(2, channels, h, w, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def one_hot_kernels(channels, directions, step):
    """The depth-wise kernels [C, 1, 2*step+1, 2*step+1] that do what the shift does."""
    kernels = torch.zeros(channels, 1, 2 * step + 1, 2 * step + 1)
    for c in range(channels):
        dy, dx = directions[c * len(directions) // channels]
        kernels[c, 0, step + dy * step, step + dx * step] = 1
    return kernels


def test_the_order_of_directions_is_the_published_one():
    assert EIGHT == ((-1, 0), (1, 0), (0, -1), (0, 1), (1, 1), (1, -1), (-1, 1), (-1, -1))


@given(SIZES, SIZES, st.integers(1, 2), st.sampled_from([EIGHT, FOUR]), st.booleans(), SEEDS)
@settings(deadline=None, max_examples=40)
def test_a_shift_is_a_depthwise_convolution_with_one_hot_kernels_bit_for_bit(h, w, step, directions, identity, seed):
    groups = directions + (((0, 0),) if identity else ())
    x = picture(2 * len(groups), h, w, seed)
    expected = F.conv2d(x, one_hot_kernels(x.shape[1], groups, step), padding=step, groups=x.shape[1])
    assert torch.equal(SpatialShift(directions, step, identity)(x), expected)


def test_a_marked_pixel_moves_against_its_direction():
    x = torch.zeros(1, 8, 3, 3)
    x[..., 1, 1] = 1
    for i, (dy, dx) in enumerate(EIGHT):
        assert SpatialShift()(x)[0, i, 1 - dy, 1 - dx] == 1


def test_there_is_nothing_to_learn():
    assert not list(SpatialShift().parameters())
    assert not SpatialShift().state_dict()


@given(SIZES, SIZES, SEEDS)
@settings(deadline=None, max_examples=25)
def test_a_shift_is_linear_and_loses_only_what_leaves_the_border(h, w, seed):
    x, y = picture(8, h, w, seed, torch.float64), picture(8, h, w, seed + 1, torch.float64)
    shift = SpatialShift()
    torch.testing.assert_close(shift(2 * x - 3 * y), 2 * shift(x) - 3 * shift(y))
    kept = 0.0
    for i, (dy, dx) in enumerate(EIGHT):
        rows, columns = slice(max(0, dy), h + min(0, dy)), slice(max(0, dx), w + min(0, dx))
        kept += x[:, i, rows, columns].square().sum()
    torch.testing.assert_close(shift(x).square().sum(), torch.as_tensor(kept, dtype=torch.float64))


@given(SIZES, SIZES, st.booleans(), SEEDS)
@settings(deadline=None, max_examples=25)
def test_the_adjoint_is_the_shift_by_the_opposite_vectors(h, w, circular, seed):
    x, y = picture(16, h, w, seed, torch.float64), picture(16, h, w, seed + 1, torch.float64)
    opposite = SpatialShift(tuple((-dy, -dx) for dy, dx in EIGHT), circular=circular)
    shift = SpatialShift(circular=circular)
    torch.testing.assert_close((shift(x) * y).sum(), (x * opposite(y)).sum())
    x.requires_grad_()
    (gradient,) = torch.autograd.grad(shift(x), x, y)
    torch.testing.assert_close(gradient, opposite(y))


@pytest.mark.parametrize("step", [1, 2])
def test_a_circular_shift_loses_nothing_and_differs_only_at_the_border(step):
    x = picture(16, 7, 6)
    circular, padded = SpatialShift(step=step, circular=True)(x), SpatialShift(step=step)(x)
    assert torch.equal(circular.flatten().sort().values, x.flatten().sort().values)
    inside = (..., slice(step, -step), slice(step, -step))
    assert torch.equal(circular[inside], padded[inside])
    assert not torch.equal(circular, padded)


@pytest.mark.parametrize(("directions", "identity", "channels"), [(EIGHT, False, 12), (FOUR, True, 8)])
def test_channels_that_do_not_divide_are_refused(directions, identity, channels):
    with pytest.raises(InputError, match=f"divisible by {len(directions) + identity}, got {channels}"):
        SpatialShift(directions, identity=identity)(torch.zeros(1, channels, 4, 4))
