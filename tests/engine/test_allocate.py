import itertools
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from foveate.engine.allocate import (
    calibrate,
    evolve,
    expert_choice,
    expert_preferred,
    knapsack,
    proportional_shares,
    threshold_for,
    top_k,
    top_p,
)
from foveate.errors import BudgetError, InputError

# Few distinct values, so that ties are the rule.
tied_rows = st.lists(st.sampled_from([0.0, 0.1, 0.25, 0.5, 1.0]), min_size=1, max_size=12)


@settings(deadline=None, max_examples=50)
@given(tied_rows, st.data())
def test_top_k_marks_exactly_the_k_best_and_the_first_of_equals(row, data):
    k = data.draw(st.integers(0, len(row)))
    expected = sorted(range(len(row)), key=lambda i: (-row[i], i))[:k]
    mask = top_k(torch.tensor([row, row[::-1]]), k)
    assert mask[0].nonzero().flatten().tolist() == sorted(expected)
    assert int(mask[1].sum()) == k


@settings(deadline=None, max_examples=50)
@given(tied_rows, st.floats(0.01, 1))
def test_top_p_is_the_smallest_set_that_reaches_the_mass(row, p):
    scores = torch.tensor(row) if any(row) else torch.ones(len(row))
    kept = top_p(torch.tensor(row), p)
    mass, total = scores[kept].double().sum(), scores.double().sum()
    assert mass >= p * total * (1 - 1e-12)
    assert kept.any()
    assert mass - scores[kept].double().min() < p * total
    assert not kept.any() or scores[kept].min() >= (scores[~kept].max() if (~kept).any() else 0)


def test_top_k_of_many_equals_takes_the_first():
    assert top_k(torch.zeros(10_000), 300).nonzero().flatten().tolist() == list(range(300))


def test_knapsack_spends_no_more_than_it_must():
    assert knapsack([[5, 5, 1], [2, 2]], [[3, 1, 0], [4, 0]], 9) == [1, 1]


def test_top_p_of_one_keeps_all_above_zero_row_by_row():
    scores = torch.tensor([[0.5, 0.0, 1e-9], [0.0, 0.0, 3.0]])
    assert top_p(scores, 1).tolist() == [[True, False, True], [False, False, True]]


def test_expert_choice_fills_every_expert():
    scores = torch.tensor([[0.9, 0.8], [0.1, 0.7], [0.5, 0.1]])
    assert expert_choice(scores, [2, 1]).tolist() == [[True, True], [False, False], [True, False]]


@settings(deadline=None, max_examples=50)
@given(st.integers(1, 9), st.integers(1, 4), st.data())
def test_expert_preferred_equals_taking_turns(n, experts, data):
    values = st.lists(st.sampled_from([-math.inf, 0.0, 0.5, 1.0]), min_size=experts, max_size=experts)
    rows = data.draw(st.lists(values, min_size=n, max_size=n))
    capacities, left = [n], n
    for _ in range(experts - 1):
        capacities.append(data.draw(st.integers(0, left)))
        left -= capacities[-1]
    expected, free = [0] * n, list(range(n))
    for e in range(experts - 1, 0, -1):
        for i in sorted(free, key=lambda i: (-rows[i][e], i))[: capacities[e]]:
            expected[i] = e
            free.remove(i)
    scores = torch.tensor(rows)
    assert expert_preferred(scores, capacities).tolist() == expected
    assert expert_preferred(torch.stack([scores.flip(0), scores]), capacities)[1].tolist() == expected


@settings(deadline=None, max_examples=100)
@given(tied_rows, st.floats(0, 1))
def test_threshold_lets_pass_as_many_as_it_may(row, share):
    scores = torch.tensor(row)
    t = threshold_for(scores, share)
    passed = int((scores > t).sum())
    allowed = math.floor(share * len(row) + 1e-6)
    assert passed <= allowed
    possible = [int((scores > s).sum()) for s in (*row, -math.inf, math.inf)]
    assert passed == max(p for p in possible if p <= allowed)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_threshold_stands_clear_of_the_scores(dtype):
    scores = torch.tensor([0.125, 0.5, 0.25, 1.0], dtype=dtype)
    assert threshold_for(scores, 0.5) == 0.375
    eps = torch.finfo(dtype).eps
    near = torch.tensor([1 + eps, 1 + 2 * eps], dtype=dtype)  # their middle rounds to the upper one
    assert int((near > threshold_for(near, 0.5)).sum()) == 1


def test_threshold_ends_and_odd_shares():
    scores = torch.arange(100.0)
    assert threshold_for(scores, 1) == -math.inf
    assert threshold_for(scores, 0) == math.inf
    assert threshold_for(scores, 0.29) == 70.5
    assert threshold_for(torch.tensor([0.7, 0.7, 0.7]), 0.5) == math.inf


@settings(deadline=None, max_examples=50)
@given(st.lists(st.floats(0, 1), min_size=1, max_size=20), st.floats(0, 20), st.booleans())
def test_calibrate_finds_the_largest_cost_within_the_target(steps, target, rising):
    def cost(t):
        return sum(s < t if rising else s > t for s in steps)

    t = calibrate(cost, target, lo=-0.5, hi=1.5)
    assert cost(t) <= target
    further = t + 1e-6 if rising else t - 1e-6
    assert cost(further) > target or cost(t) == len(steps)


def test_calibrate_names_the_floor():
    with pytest.raises(BudgetError, match=r"0\.1 cannot be met: the floor is 0\.3"):
        calibrate(lambda t: 0.3 + t, 0.1, 0, 1)
    assert calibrate(lambda t: 0.3 + t, 9, 0, 1) == 1


groups = st.lists(
    st.lists(st.tuples(st.integers(-1, 3), st.integers(0, 9)), min_size=1, max_size=4), min_size=0, max_size=5
)


@settings(deadline=None, max_examples=100)
@given(groups, st.integers(0, 40), st.sampled_from([1, 7]))
def test_knapsack_is_never_beaten_by_brute_force(options, capacity, unit):
    values = [[v for v, _ in g] for g in options]
    costs = [[c * unit for _, c in g] for g in options]

    def worth(choice):
        cost = sum(c[o] for c, o in zip(costs, choice, strict=True))
        return (sum(v[o] for v, o in zip(values, choice, strict=True)), -cost) if cost <= capacity else None

    everything = [worth(c) for c in itertools.product(*(range(len(g)) for g in options))]
    best = max((w for w in everything if w is not None), default=None)
    if best is None:
        with pytest.raises(BudgetError, match=f"cheapest options cost {sum(min(c) for c in costs)}"):
            knapsack(values, costs, capacity)
    else:
        assert worth(knapsack(values, costs, capacity)) == best


def test_knapsack_counts_in_common_units_so_bytes_are_fine():
    assert knapsack([[0, 2], [0, 3]], [[10**12, 3 * 10**12], [0, 2 * 10**12]], 4 * 10**12) == [0, 1]


@settings(deadline=None, max_examples=100)
@given(
    st.lists(
        st.tuples(st.floats(0.01, 100) | st.just(0.0), st.integers(0, 9), st.integers(0, 9)), min_size=1, max_size=8
    ),
    st.data(),
)
def test_proportional_shares_sum_exactly_within_bounds_and_in_order(parts, data):
    weights = [w for w, _, _ in parts]
    floors = [min(a, b) for _, a, b in parts]
    ceilings = [max(a, b) for _, a, b in parts]
    total = data.draw(st.integers(sum(floors), sum(ceilings)))
    shares = proportional_shares(weights, total, floors, ceilings)
    assert sum(shares) == total
    assert all(f <= s <= c for f, s, c in zip(floors, shares, ceilings, strict=True))
    free = [(w, s) for w, s, f, c in zip(weights, shares, floors, ceilings, strict=True) if f < s < c and w > 0]
    for (w1, s1), (w2, s2) in itertools.combinations(free, 2):
        # Each is less than one unit from scale * weight, so some one scale must fit both.
        assert max((s1 - 1) / w1, (s2 - 1) / w2) < min((s1 + 1) / w1, (s2 + 1) / w2) + 1e-9


def test_proportional_shares_of_known_cases():
    assert proportional_shares([30, 4, 0], 17) == [15, 2, 0]
    assert proportional_shares([1, 1, 1], 5) == [2, 2, 1]
    assert proportional_shares([0, 0], 4) == [2, 2]
    assert proportional_shares([1, 0], 10, ceilings=6) == [6, 4]
    assert proportional_shares([8, 1, 1], 10, floors=2) == [6, 2, 2]
    with np.errstate(all="raise"):
        assert proportional_shares([1e-320, 0, 1], 10) == [0, 0, 10]
    assert sum(proportional_shares(range(1, 2000), 10**12)) == 10**12


def test_evolve_finds_the_best_feasible_genome_and_asks_for_each_once():
    asked = []

    def fitness(genome):
        asked.append(genome)
        return -sum((g - w) ** 2 for g, w in zip(genome, (7, 2, 5), strict=True))

    def feasible(genome):
        return sum(genome) <= 12

    seen = []
    best, worth = evolve(
        fitness, [9, 9, 9], feasible=feasible, population=40, parents=10, generations=12, mutation=0.3, seed=1,
        progress=lambda generation, fit: seen.append((generation, fit)),
    )  # fmt: skip
    assert worth == -2
    assert feasible(best)
    assert all(feasible(g) for g in asked)
    assert len(asked) == len(set(asked))
    assert [g for g, _ in seen] == list(range(12))
    assert [f for _, f in seen] == sorted(f for _, f in seen)


def test_evolve_repairs_repeats_and_never_loses_the_start():
    def run(seed):
        return evolve(
            sum, [5] * 4, repair=lambda g: tuple(sorted(g)), start=[(4, 4, 4, 3)],
            population=5, parents=2, generations=2, seed=seed,
        )  # fmt: skip

    assert run(3) == run(3)
    assert run(3)[0] == tuple(sorted(run(3)[0]))
    assert run(3)[1] >= 15


def test_evolve_ends_in_a_tiny_space():
    assert evolve(sum, [2, 2], population=50, generations=3) == ((1, 1), 2)


def test_errors_say_what_was_passed():
    scores = torch.rand(4, 3)
    with pytest.raises(InputError, match="got 4"):
        top_k(scores, 4)
    with pytest.raises(InputError, match="got 0"):
        top_p(scores, 0)
    with pytest.raises(InputError, match="softmax"):
        top_p(-scores, 0.5)
    with pytest.raises(InputError, match="3 experts, got 2"):
        expert_choice(scores, [1, 1])
    with pytest.raises(InputError, match=r"4 items, got \[1, 1, 5\]"):
        expert_preferred(scores, [1, 1, 5])
    with pytest.raises(BudgetError, match="6 of 4"):
        expert_preferred(scores, [1, 3, 3])
    with pytest.raises(InputError, match="NaN"):
        threshold_for(torch.tensor([math.nan]), 0.5)
    with pytest.raises(InputError, match=r"0\.\.1, got 2"):
        threshold_for(scores, 2)
    with pytest.raises(InputError, match="lo < hi"):
        calibrate(lambda t: t, 1, 1, 0)
    with pytest.raises(InputError, match="whole costs"):
        knapsack([[1]], [[0.5]], 3)
    with pytest.raises(InputError, match="as many costs"):
        knapsack([[1, 2]], [[1]], 3)
    with pytest.raises(InputError, match="finite values"):
        knapsack([[math.nan]], [[1]], 3)
    with pytest.raises(BudgetError, match="allow 0 to 4"):
        proportional_shares([1, 1], 5, ceilings=2)
    with pytest.raises(InputError, match="not negative"):
        proportional_shares([1, -1], 5)
    with pytest.raises(InputError, match="floors <= ceilings"):
        proportional_shares([1, 1], 5, floors=3, ceilings=2)
    with pytest.raises(BudgetError, match="no setting"):
        evolve(sum, [2], feasible=lambda g: False, population=2)
    with pytest.raises(InputError, match="at least one gene"):
        evolve(sum, [])
    with pytest.raises(InputError, match="mutation"):
        evolve(sum, [2], mutation=2)
