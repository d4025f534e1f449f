import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from foveate.engine.tiles import Tile, blend, blend_weights, merge, plan, split, stream
from foveate.errors import InputError

sizes = st.integers(1, 30)
dtypes = [torch.uint8, torch.uint16, torch.int32, torch.bool, torch.bfloat16, torch.float64]


@st.composite
def plans(draw):
    height, width, tile, overlap = draw(sizes), draw(sizes), draw(st.integers(1, 25)), draw(st.integers(0, 9))
    seed = draw(st.none() | st.integers(0, 99))
    generator = None if seed is None else torch.Generator().manual_seed(seed)
    equal = draw(st.booleans())
    return height, width, tile, overlap, equal, plan(height, width, tile, overlap, equal=equal, generator=generator)


def net(scale, seed=0):
    """Two padded convolutions and an upsampler, with whole numbers so that every order of summing is exact."""
    torch.manual_seed(seed)
    layers = [nn.Conv2d(1, 3, 5, padding=2), nn.ReLU(), nn.Conv2d(3, scale**2, 3, padding=1), nn.PixelShuffle(scale)]
    model = nn.Sequential(*layers).double().requires_grad_(False)
    for p in model.parameters():
        p.copy_(torch.randint(-4, 5, p.shape))
    return model  # reaches 3 pixels


@settings(deadline=None, max_examples=100)
@given(plans())
def test_cores_are_a_partition_and_windows_hold_their_context(drawn):
    height, width, tile, overlap, equal, tiles = drawn
    covered = torch.zeros(height, width, dtype=torch.int64)
    for t in tiles:
        x0, y0, x1, y1 = t.core
        wx0, wy0, wx1, wy1 = t.window
        covered[y0:y1, x0:x1] += 1
        assert 0 < x1 - x0 <= tile
        assert 0 < y1 - y0 <= tile
        assert 0 <= wx0 <= max(0, x0 - overlap)
        assert 0 <= wy0 <= max(0, y0 - overlap)
        assert min(width, x1 + overlap) <= wx1 <= width
        assert min(height, y1 + overlap) <= wy1 <= height
        if not equal:
            assert wx1 - wx0 <= x1 - x0 + 2 * overlap
            assert wy1 - wy0 <= y1 - y0 + 2 * overlap
    assert bool((covered == 1).all())
    if equal:
        assert len({(t.window[2] - t.window[0], t.window[3] - t.window[1]) for t in tiles}) == 1


@settings(deadline=None, max_examples=50)
@given(plans(), st.sampled_from(dtypes), st.sampled_from([(), (2,), (1, 3)]))
def test_merge_undoes_split(drawn, dtype, lead):
    height, width, *_, tiles = drawn
    x = torch.randint(0, 200, (*lead, height, width)).to(dtype)
    back = merge(split(x, tiles), tiles)
    assert back.dtype == dtype
    assert torch.equal(back, x)


@settings(deadline=None, max_examples=25)
@given(plans(), st.integers(1, 2))
def test_blend_weights_are_a_partition_of_unity(drawn, scale):
    height, width, *_, tiles = drawn
    weights = blend_weights(tiles, scale)
    total = torch.zeros(height * scale, width * scale)
    for weight, t in zip(weights, tiles, strict=True):
        (where,) = split(total, [t], scale)
        where += weight
    torch.testing.assert_close(total, torch.ones_like(total))
    assert all(bool((w > 0).all()) for w in weights)


@settings(deadline=None, max_examples=25)
@given(plans(), st.integers(1, 2))
def test_blending_what_was_split_gives_it_back(drawn, scale):
    height, width, *_, tiles = drawn
    x = torch.rand(2, height, width).repeat_interleave(scale, 1).repeat_interleave(scale, 2)
    torch.testing.assert_close(blend(split(x, tiles, scale), tiles, scale), x)
    levels = (x * 255).round().to(torch.uint8)
    assert torch.equal(blend(split(levels, tiles, scale), tiles, scale), levels)


def test_blend_fades_linearly_across_the_shared_band():
    tiles = plan(1, 16, tile=8, overlap=2)
    faded = blend([torch.zeros(1, 10), torch.ones(1, 10)], tiles)
    expected = torch.tensor([0.0] * 6 + [0.125, 0.375, 0.625, 0.875] + [1.0] * 6)
    torch.testing.assert_close(faded[0], expected)


@settings(deadline=None, max_examples=30)
@given(plans(), st.integers(1, 3))
def test_tiled_equals_untiled_when_the_context_covers_the_reach(drawn, scale):
    height, width, tile, overlap, equal, _ = drawn
    tiles = plan(height, width, tile, 3 + overlap, equal=equal)
    model = net(scale)
    x = torch.randint(0, 9, (1, 1, height, width)).double()
    assert torch.equal(merge([model(w) for w in split(x, tiles)], tiles, scale), model(x))


def test_too_little_context_shows():
    model, x, tiles = net(2), torch.randint(1, 9, (1, 1, 20, 20)).double(), plan(20, 20, 8, 2)
    assert not torch.equal(merge([model(w) for w in split(x, tiles)], tiles, 2), model(x))


@settings(deadline=None, max_examples=25)
@given(sizes, sizes, st.integers(1, 25), st.integers(1, 3))
def test_stream_equals_untiled_and_goes_from_top_to_bottom(height, width, tile, scale):
    model = net(scale)
    x = torch.randint(0, 9, (1, 1, height, width)).double()
    bands, tops, reads = [], [], []

    def read(x0, y0, x1, y1):
        reads.append(y0)
        return x[..., y0:y1, x0:x1]

    def write(y, band):
        tops.append(y)
        bands.append(band)

    stream(read, model, write, height, width, tile, halo=3, scale=scale)
    assert torch.equal(torch.cat(bands, -2), model(x))
    assert tops == [tile * scale * i for i in range(len(bands))]
    assert reads == sorted(reads)
    assert all(b.shape[-2] <= tile * scale for b in bands)


def test_random_grids_follow_their_generator():
    def grid(seed):
        return plan(50, 50, 16, generator=torch.Generator().manual_seed(seed))

    assert grid(1) == grid(1)
    assert len({tuple(grid(s)) for s in range(8)}) > 4
    assert all(g.core == g.window for g in grid(3))


def test_errors_say_what_was_passed():
    with pytest.raises(InputError, match="3 x 0"):
        plan(0, 3, 8)
    with pytest.raises(InputError, match="got 0 and 1"):
        plan(3, 3, 0, 1)
    with pytest.raises(InputError, match="whole plan"):
        merge([], [])
    tile = Tile((0, 0, 4, 4), (0, 0, 4, 4))
    with pytest.raises(InputError, match=r"2 times is 8 x 8 pixels, but its result has shape \(4, 4\)"):
        merge([torch.zeros(4, 4)], [tile], scale=2)
    with pytest.raises(InputError, match="8 x 8"):
        blend([torch.zeros(4, 4)], [tile], scale=2)
    with pytest.raises(InputError, match="8 x 8"):
        stream(lambda *box: torch.zeros(4, 4), lambda w: w, lambda y, band: None, 4, 4, 8, 0, scale=2)
