import json
import statistics

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from foveate.errors import InputError
from foveate.meter import Comparison, compare, comparison

SECONDS = st.lists(st.tuples(*[st.floats(1e-4, 10)] * 2), min_size=1, max_size=9)


@settings(deadline=None, max_examples=40)
@given(SECONDS, st.floats(1, 1e12), st.floats(1, 1e12))
def test_figures_follow_from_the_pairs(pairs, a, b):
    outcome = Comparison(("a", "b"), tuple(zip(*pairs, strict=True)), (a, b), (8, 2))
    assert outcome.speedup == statistics.median([x / y for x, y in pairs])
    assert outcome.flop_reduction == a / b
    assert outcome.efficiency * outcome.flop_reduction == pytest.approx(outcome.speedup)
    assert outcome.memory_ratio == 4
    low, high = outcome.speedup_range
    assert low <= outcome.speedup * (1 + 1e-12)
    assert outcome.speedup <= high * (1 + 1e-12)


def test_drift_common_to_both_leaves_the_speedup_alone():
    drift = (1.0, 1.5, 4.0, 2.0)
    outcome = Comparison(("a", "b"), (tuple(3 * d for d in drift), drift), None, (None, None))
    assert outcome.speedup == 3
    assert outcome.speedup_range == (3, 3)


def test_the_two_run_in_turn_and_alternate_who_goes_first(monkeypatch):
    clock = {"a": 0.6, "b": 0.2}
    order: list[str] = []
    steps: list[tuple[int, int]] = []
    monkeypatch.setattr(comparison, "peak_memory", lambda fn: 100 if fn() == "a" else 50)
    monkeypatch.setattr(comparison, "time_call", lambda fn: clock[fn()])

    def run(name: str) -> str:
        order.append(name)
        torch.ones(2, 4 if name == "a" else 2) @ torch.ones(4 if name == "a" else 2, 3)
        return name

    outcome = compare(lambda: run("a"), lambda: run("b"), pairs=3, warmup=2, progress=lambda *s: steps.append(s))
    assert "".join(order) == "ab" + "abab" + "ab" + "abbaab"
    assert steps == [(1, 3), (2, 3), (3, 3)]
    assert outcome.seconds == ((0.6,) * 3, (0.2,) * 3)
    assert outcome.flops == (48, 24)
    assert outcome.peak_bytes == (100, 50)
    assert outcome.efficiency == pytest.approx(3 / 2)


def test_flops_can_be_given_or_left_out():
    calls: list[int] = []
    given_flops = compare(lambda: calls.append(1), lambda: None, pairs=1, warmup=0, flops=(6, 2))
    assert given_flops.flop_reduction == 3
    assert len(calls) == 2  # memory and the clock, nothing counted
    without = compare(list, list, pairs=1, flops=False)
    assert without.flops is without.flop_reduction is without.efficiency is None


def test_ratios_without_a_denominator_are_unknown():
    outcome = Comparison(("a", "b"), ((1.0,), (1.0,)), (5.0, 0.0), (5, 0))
    assert outcome.flop_reduction is outcome.efficiency is outcome.memory_ratio is None
    assert json.loads(json.dumps(outcome.to_dict()))["efficiency"] is None


def test_the_table_and_the_dictionary_say_the_same():
    outcome = Comparison(("dense", "half"), ((0.3, 0.2), (0.1, 0.1)), (3e9, 1.5e9), (3_000_000, 1_000))
    found = outcome.to_dict()
    assert found["seconds"] == [0.25, 0.1]
    assert found["pairs"] == 2
    assert (found["speedup"], found["efficiency"]) == (pytest.approx(2.5), pytest.approx(1.25))
    time, flops, memory, efficiency = outcome.table().splitlines()[1:]
    assert time.split()[1:] == ["250", "ms", "100", "ms", "2.50x", "(2.25", "to", "2.75)"]
    assert flops.split()[1:] == ["3.00", "G", "1.50", "G", "2.00x"]
    assert memory.split()[2:] == ["3.00", "MB", "1.00", "kB", "3000.00x"]
    assert efficiency.split() == ["efficiency", "1.25"]


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: compare(list, 7), "got 7"),
        (lambda: compare(list, list, pairs=0), "0 runs"),
        (lambda: compare(list, list, flops=(1, -1)), "-1"),
    ],
)
def test_errors_quote_what_was_passed(call, words):
    with pytest.raises(InputError, match=words):
        call()
