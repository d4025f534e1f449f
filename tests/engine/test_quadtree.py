import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from foveate.engine.quadtree import coarse_grid, cover, cover_within
from foveate.errors import BudgetError, InputError


@st.composite
def scored(draw):
    """Scores with many ties, on grids that coarse cells need not fill."""
    scales, seed = draw(st.integers(1, 3)), draw(st.integers(0, 1000))
    grid = tuple(draw(st.integers(2**scales, 2**scales + 6)) for _ in range(2))
    dice = torch.Generator().manual_seed(seed)
    shapes = [coarse_grid(grid, s) for s in range(1, scales + 1)]
    return [torch.randint(5, (2, *shape), generator=dice).float() for shape in shapes], grid


def naive(scores, grid, thresholds):
    """Cells of one picture as (scale, row, column), by walking through them."""
    covered, found = set(), []
    for s in range(len(scores), 0, -1):
        h, w = coarse_grid(grid, s)
        for row in range(h):
            for column in range(w):
                inside = {(row * 2**s + i, column * 2**s + j) for i in range(2**s) for j in range(2**s)}
                if scores[s - 1][row, column] < thresholds[s - 1] and not inside & covered:
                    covered |= inside
                    found.append((s, row, column))
    fine = [(0, i, j) for i in range(grid[0]) for j in range(grid[1]) if (i, j) not in covered]
    return sorted(fine + found)


@settings(deadline=None, max_examples=40)
@given(scored(), st.lists(st.integers(0, 5), min_size=3, max_size=3))
def test_cells_are_those_that_walking_through_them_takes(given_scores, thresholds):
    scores, grid = given_scores
    tree = cover(scores, grid, thresholds[: len(scores)])
    for i in range(2):
        cells = [(s, *place) for s, mask in enumerate(tree.masks) for place in mask[i].nonzero().tolist()]
        assert cells == naive([s[i] for s in scores], grid, thresholds)


@settings(deadline=None, max_examples=40)
@given(scored(), st.integers(0, 5))
def test_every_base_cell_is_covered_once_by_its_owner(given_scores, threshold):
    scores, grid = given_scores
    tree = cover(scores, grid, [threshold] * len(scores))
    area = sum(mask.flatten(1).sum(1) * 4**s for s, mask in enumerate(tree.masks))
    assert area.tolist() == [grid[0] * grid[1]] * 2
    for i in range(2):
        boxes = tree.boxes(i)
        assert len(boxes) == tree.lengths[i]
        row, column = torch.meshgrid(*(torch.arange(n) for n in grid), indexing="ij")
        x0, y0, x1, y1 = boxes[tree.owner[i]].unbind(-1)
        assert bool(((x0 <= column) & (column < x1) & (y0 <= row) & (row < y1)).all())
        assert torch.equal(x1 - x0, 2 ** tree.scales[i])


@settings(deadline=None, max_examples=40)
@given(scored(), st.floats(0, 1), st.sampled_from([0.0, 1.0, 2.5]))
def test_a_budget_is_met_by_no_more_joining_than_needed(given_scores, share, step):
    scores, grid = given_scores
    total = grid[0] * grid[1]
    least = int(cover([torch.zeros_like(s[:1]) for s in scores], grid, [1.0] * len(scores)).lengths)
    cells = least + round(share * (total - least))
    lengths = cover_within(scores, grid, cells, step).lengths
    assert bool((lengths <= cells).all())
    assert bool((lengths > cells - (4 ** len(scores) - 1)).all())


@settings(deadline=None, max_examples=40)
@given(scored(), st.integers(1, 60), st.sampled_from([0.0, 1.5]))
def test_without_ties_joining_to_a_budget_is_a_threshold(given_scores, cells, step):
    scores, grid = given_scores
    scores = [s + torch.arange(s.numel()).view(s.shape) * 1e-3 + i * 1e-4 for i, s in enumerate(scores)]
    try:
        tree = cover_within(scores, grid, cells, step)
    except BudgetError:
        return
    shifted = [s + step * i for i, s in enumerate(scores)]
    for i in range(2):
        marks = [(float(v), bool(m)) for s, mask in zip(shifted, tree.masks[1:], strict=True)
                 for v, m in zip(s[i].flatten(), mask[i].flatten(), strict=True)]  # fmt: skip
        t = max((v for v, m in marks if m), default=-1.0) + 1e-6
        one = [s[i : i + 1] for s in scores]
        again = cover(one, grid, [t - step * j for j in range(len(scores))])
        assert all(torch.equal(a[0], b[i]) for a, b in zip(again.masks, tree.masks, strict=True))


@settings(deadline=None, max_examples=25)
@given(scored(), st.integers(0, 4))
def test_cells_become_fewer_as_thresholds_rise(given_scores, threshold):
    scores, grid = given_scores
    few = cover(scores, grid, [threshold + 1.0] * len(scores)).lengths
    assert bool((few <= cover(scores, grid, [float(threshold)] * len(scores)).lengths).all())


def test_equal_scores_join_in_raster_order_and_only_as_far_as_needed():
    tree = cover_within([torch.zeros(1, 2, 2)], (4, 4), 10)
    assert tree.masks[1].tolist() == [[[True, True], [False, False]]]


def test_a_budget_below_the_coarsest_cover_is_refused():
    with pytest.raises(BudgetError, match="coarsest cover has 4"):
        cover_within([torch.zeros(1, 2, 2)], (4, 4), 3)


def test_scores_that_do_not_fit_the_grid_are_refused():
    with pytest.raises(InputError, match=r"grid of \(4, 4\)"):
        cover([torch.zeros(1, 2, 3)], (4, 4), [1.0])
    with pytest.raises(InputError, match="thresholds"):
        cover([torch.zeros(1, 2, 2)], (4, 4), [])
