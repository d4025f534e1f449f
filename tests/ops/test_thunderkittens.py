"""Orders, pipelines and layouts of tiles: the paper's properties, and figures counted by hand."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from foveate.errors import InputError
from foveate.ops.thunderkittens import (
    GROUPS,
    SHAPES,
    STAGES,
    GemmPlan,
    Machine,
    best_group,
    conflicts,
    pipeline_seconds,
    super_m,
    swizzle,
    swizzle_width,
    wave_loads,
)

sides = st.integers(1, 40)


@settings(deadline=None, max_examples=50)
@given(height=sides, width=sides, group=st.integers(1, 50))
def test_super_m_takes_every_tile_once_and_numbers_as_arrays(height, width, group):
    tasks = np.arange(height * width)
    row, col = super_m(tasks, height, width, group)
    assert row.max() < height
    assert col.max() < width
    assert len(np.unique(row * width + col)) == height * width
    last = height * width - 1
    assert super_m(last, height, width, group) == (row[last], col[last])


def test_one_row_per_group_is_row_by_row_and_all_rows_are_column_by_column():
    tasks = np.arange(12)
    assert np.array_equal(super_m(tasks, 3, 4, 1), (tasks // 4, tasks % 4))
    assert np.array_equal(super_m(tasks, 3, 4, 3), (tasks % 3, tasks // 3))


def test_waves_of_a_block_need_fewer_tiles_than_waves_of_a_strip():
    loads = {(h, w, g): sum(wave_loads(h, w, 132, g)) for h, w in ((64, 64), (64, 32), (32, 16)) for g in (1, 12)}
    assert [loads[64, 64, g] for g in (1, 12)] == [2082, 804]
    assert [loads[64, 32, g] for g in (1, 12)] == [590, 428]
    assert [loads[32, 16, g] for g in (1, 12)] == [99, 113]


@settings(deadline=None, max_examples=50)
@given(height=sides, width=sides, concurrent=st.integers(1, 200))
def test_the_order_chosen_is_never_worse_than_row_by_row(height, width, concurrent):
    best = best_group(height, width, concurrent)
    assert best in GROUPS
    assert sum(wave_loads(height, width, concurrent, best)) <= sum(wave_loads(height, width, concurrent, 1))


def test_loads_run_ahead_as_far_as_there_are_stages():
    # Loads take 3, computing 1: one stage works a quarter of the time, four work always once the first load is there.
    used = [64 / pipeline_seconds(64, 3, 1, stages) for stages in STAGES]
    assert used == pytest.approx([0.25, 0.496, 0.727, 0.955], abs=1e-3)
    assert pipeline_seconds(64, 0, 1, 1) == 64
    assert pipeline_seconds(5, 10, 1, 5) == 15
    with pytest.raises(InputError, match="0 and 2"):
        pipeline_seconds(0, 1, 1, 2)


@pytest.mark.parametrize(("width", "unswizzled"), [(128, 8), (64, 4), (32, 2)])
def test_swizzling_keeps_every_byte_and_frees_the_banks(width, unswizzled):
    place = swizzle(np.arange(64 * width), width)
    assert np.array_equal(np.sort(place), np.arange(64 * width))
    assert np.array_equal(place.reshape(-1, 16) - place.reshape(-1, 16)[:, :1], np.tile(np.arange(16), (4 * width, 1)))
    assert conflicts(width, swizzled=False) == unswizzled
    assert conflicts(width) == 1


def test_the_widest_panel_that_divides_a_row():
    assert [swizzle_width(cols) for cols in (16, 32, 48, 64, 96, 128)] == [32, 64, 32, 128, 64, 128]
    with pytest.raises(InputError, match="17 numbers of 2 bytes"):
        swizzle_width(17)


def test_a_plan_is_the_cheapest_that_fits_and_follows_the_problem():
    machine = Machine()
    plan = GemmPlan.best(4096, 4096, 4096)
    others = [
        GemmPlan.of(4096, 4096, 4096, tile, stages, group, 2, machine)
        for tile in SHAPES
        for stages in STAGES
        for group in (1, plan.group)
        if stages * (tile[0] + tile[1]) * tile[2] * 2 <= machine.shared_bytes
    ]
    assert plan.seconds <= min(other.seconds for other in others)
    assert plan.seconds > 2 * 4096**3 / machine.tensor
    assert GemmPlan.best(16, 65536, 64).limit == "hbm"
    assert np.prod(GemmPlan.best(256, 256, 4096).tile[:2]) < np.prod(plan.tile[:2])
    depths = [GemmPlan.of(4096, 4096, 4096, (128, 128, 64), s, 1, 2, machine).seconds for s in STAGES]
    assert depths == sorted(depths, reverse=True)
    with pytest.raises(InputError, match="0 x 3 times 3 x 4"):
        GemmPlan.best(0, 4, 3)
