import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from foveate.layers.window import cut, fill_windows, mirrored, paste, wrapped

few = settings(deadline=None, max_examples=25)


@few
@given(st.integers(1, 2), st.integers(1, 3), st.integers(1, 3), st.integers(1, 5), st.data())
def test_pasting_undoes_cutting(batch, rows, columns, side, data):
    shift = data.draw(st.integers(0, side - 1))
    x = torch.rand(batch, rows * side, columns * side, 2)
    windows = cut(x, side, shift)
    assert windows.shape == (batch, rows, columns, side * side, 2)
    assert torch.equal(paste(windows, side, shift), x)
    row, column = rows - 1, 0
    rolled = x.roll((-shift, -shift), (1, 2))
    part = rolled[:, row * side : (row + 1) * side, column * side : (column + 1) * side]
    assert torch.equal(windows[:, row, column], part.flatten(1, 2))


def regions(height, width, side, shift):
    """Numbers of the nine regions of a shifted map, as Swin numbers them."""
    numbers, ends = torch.zeros(height, width), ((0, -side), (-side, -shift), (-shift, None))
    for n, ((a, b), (c, d)) in enumerate([(y, x) for y in ends for x in ends]):
        numbers[a:b, c:d] = n
    return numbers


@pytest.mark.parametrize(("rows", "columns"), [(1, 1), (1, 3), (4, 2)])
@pytest.mark.parametrize(("side", "every"), [(4, 1), (4, 2), (8, 2), (12, 3)])
def test_masks_are_those_of_swin_at_both_resolutions(rows, columns, side, every):
    shift = side // 2
    blocked = wrapped(side, shift, every)
    full = cut(regions(rows * side, columns * side, side, shift)[None, ..., None], side)[0, ..., 0]
    small = regions(rows * side // every, columns * side // every, side // every, shift // every)
    cells = cut(small[None, ..., None], side // every)[0, ..., 0]
    for y in range(rows):
        for x in range(columns):
            expected = full[y, x][:, None] != cells[y, x][None]
            assert torch.equal(blocked[int(y == rows - 1), int(x == columns - 1)], expected)
    assert not blocked.all(-1).any()  # every place sees something


def test_without_a_shift_nothing_is_blocked():
    assert not wrapped(4, 0).any()


@few
@given(st.integers(1, 9), st.integers(1, 40))
def test_mirrored_reads_a_triangle_wave(size, length):
    index = mirrored(size, length).tolist()
    at, step = 0, 1
    for found in index:
        assert found == at
        if size > 1:
            step = -step if not 0 <= at + step < size else step
            at += step


@few
@given(st.integers(1, 9), st.integers(1, 9), st.integers(1, 8))
def test_windows_are_filled_by_reflection(height, width, side):
    x = torch.rand(1, 3, height, width)
    filled = fill_windows(x, side)
    down, right = -height % side, -width % side
    assert filled.shape == (1, 3, height + down, width + right)
    assert torch.equal(filled[..., :height, :width], x)
    if down < height and right < width:
        assert torch.equal(filled, F.pad(x, (0, right, 0, down), mode="reflect"))
    assert torch.equal(filled, x[..., mirrored(height, height + down)[:, None], mirrored(width, width + right)])
