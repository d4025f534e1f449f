import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from foveate.errors import BudgetError, InputError
from foveate.meter import count_flops
from foveate.ops.gathered import square_offset
from foveate.recognize.deformable_codesign import RUNGS, DeformConv
from foveate.recognize.deformable_cost import Layer, Machine, price, row_misses, rows_read, within


def smooth(shape, std, seed=0):
    """Random offsets that change slowly."""
    dice = torch.Generator().manual_seed(seed)
    low = torch.randn(*shape[:2], 6, 6, generator=dice)
    field = torch.nn.functional.interpolate(low, shape[2:], mode="bicubic", align_corners=True)
    return std * field / field.std()


def paper(rung, depthwise=True, **settings):
    """A layer of the published table: 64 x 64, 256 channels, depth-wise kernels alone."""
    return Layer(64, 64, None if depthwise else 256, 256, rung, depthwise=depthwise, **settings)


def test_multiply_accumulates_are_those_of_the_layers():
    x = torch.zeros(1, 6, 5, 7)
    full = count_flops(DeformConv(6, 8, "fixed"), x) // 2
    assert price(Layer(5, 7, 6, 8, "fixed", depthwise=False)).macs == full
    assert price(Layer(5, 7, 6, 8, "square")).macs == 6 * 8 * 35 + 9 * 8 * 35
    assert price(Layer(5, 7, None, 8, "square")).macs == 9 * 8 * 35


def test_each_rung_saves_something():
    free, bound, square = (price(paper(rung)) for rung in RUNGS[1:])
    rounded = price(paper("square", rounded=True))
    assert (free.offsets, bound.offsets, square.offsets) == (18 * 4096, 18 * 4096, 4096)
    assert free.scattered == 18 * 256 * 4096
    assert bound.scattered == square.scattered == 0
    assert bound.streamed == square.streamed == 2 * 256 * 4096  # every pixel in and out once
    assert bound.reads == 3 * square.reads == 6 * rounded.reads
    assert square.interpolation > rounded.interpolation == 0


def test_line_buffers_are_as_long_as_the_rungs_need():
    assert [paper(rung).lines for rung in RUNGS] == [3, None, 18, 18]
    assert paper("square", rounded=True).lines == 17


@given(st.sampled_from(["bound", "square"]), st.integers(0, 7), st.booleans(), st.integers(0, 99))
@settings(deadline=None, max_examples=25)
def test_the_window_of_a_line_buffer_holds_every_row(rung, bound, rounded, seed):
    offset = smooth((9, 2, 24, 20), 4, seed)
    if rung == "square":
        offset = square_offset(offset[None, :1, 0].clamp(0, bound), 3)[0, 0]
    offset = offset.clamp(-bound, bound)
    offset = offset.round() if rounded else offset
    rows = rows_read(offset)
    reach = [rows[r][rows[r] >= 0] - r for r in range(24)]
    low, high = min(int(r.min()) for r in reach), max(int(r.max()) for r in reach)
    assert low >= -1 - bound
    assert high <= 1 + bound
    assert high - low < Layer(24, 20, None, 4, rung, bound, rounded).lines


def test_a_cache_that_holds_the_picture_misses_each_row_once():
    assert row_misses(torch.zeros(9, 2, 16, 5), 16) == 16
    assert row_misses(torch.zeros(9, 2, 16, 5), 3) == 16
    assert row_misses(smooth((9, 2, 16, 12), 20), 16) <= 16


def test_a_cache_that_is_too_small_misses_every_row_anew():
    # Three rows are read in turn with room for two: from the second pixel of the middle row on all three are fetched.
    offset = torch.zeros(9, 2, 3, 8)
    assert row_misses(offset, 2) == 2 + 1 + 7 * 3
    assert row_misses(offset, 3) == 3


def test_the_simulation_follows_its_definition():
    offset, held, misses = smooth((9, 2, 10, 9), 2, seed=3), [], 0
    for row in rows_read(offset).flatten().tolist():
        if row < 0:
            continue
        if row in held:
            held.remove(row)
        else:
            misses += 1
            held = held[-3:]
        held.append(row)
    assert row_misses(offset, 4) == misses


def test_free_offsets_miss_where_bounded_ones_do_not():
    misses = row_misses(smooth((9, 2, 64, 64), 4), paper("bound").lines)
    assert misses >= 5 * 64


@pytest.mark.parametrize(
    ("rung", "depthwise", "published"),
    [  # milliseconds of the published table without a cache; the first three are what Machine is made of
        ("fixed", False, 43.1), ("fixed", True, 1.9), ("bound", True, 3.0),
        ("square", True, 2.1), ("free", True, 20.5), ("free", False, 59.0), ("square", False, 43.4),
    ],
)  # fmt: skip
def test_latencies_are_near_the_published_ones(rung, depthwise, published):
    assert 1e3 * price(paper(rung, depthwise)).seconds() == pytest.approx(published, rel=0.15)


def test_a_cache_helps_free_offsets():
    layer, offset = paper("free"), smooth((9, 2, 64, 64), 4)
    cached = price(layer, row_misses(offset, 40))
    assert cached.scattered == 0
    assert price(paper("bound")).seconds() <= cached.seconds() < price(layer).seconds()


def test_a_budget_chooses_the_freest_rung_that_fits():
    layer = paper("square")
    budgets = {"25 ms": "free", "5 ms": "bound", "2.2 ms": "square", "1.903 ms": "fixed"}
    assert {budget: within(budget, layer).rung for budget in budgets} == budgets
    assert within(1.0, layer).rung == "free"
    assert within(0.3, layer).rung == "bound"
    assert within("2.2 ms", layer, Machine(reads=1e15, bytes=1e15)).rung == "free"
    with pytest.raises(BudgetError, match=r"1.90 ms.*more than the 1.00 ms"):
        within("1 ms", layer)


@pytest.mark.parametrize(
    ("call", "says"),
    [
        (lambda: Layer(4, 4, 2, 2, "round"), "'round'"),
        (lambda: Layer(4, 4, None, 2, depthwise=False), "give inputs"),
        (lambda: row_misses(torch.zeros(9, 2, 4, 4), 0), "lines=0"),
        (lambda: row_misses(torch.zeros(1, 9, 2, 4, 4), 3), r"\[9, 2, H, W\]"),
    ],
)
def test_what_does_not_fit_is_refused(call, says):
    with pytest.raises(InputError, match=says):
        call()
