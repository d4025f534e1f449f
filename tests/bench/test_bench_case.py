"""Benchmarks compare what is equal, in every direction that has a meaning, and say where it is not."""

import pytest
import torch

from foveate import ops
from foveate.bench.case import BACKWARD, FORWARD, Case, Operator, Way, apart, measured, plain
from foveate.bench.ops import OPERATORS
from foveate.proofs import ProofContext


def squares(dice, n):
    x = torch.randn(n, generator=dice)
    ways = {
        "times": Way(lambda x: x * x),
        "list": Way(lambda x: [v * v for v in x.tolist()], torch.tensor, backward=False),
        "cube": Way(lambda x: x**3, values=None),
        "wrong": Way(lambda x: 2 * x * x),
    }
    return Case(f"{n} numbers", (x,), lambda x: x.square(), ways)


@pytest.fixture
def context():
    return ProofContext(progress=False)


def test_every_other_way_of_every_pass_gets_an_entry(context, monkeypatch):
    monkeypatch.setattr("foveate.bench.case.PAIRS", (1, 1))
    entries = list(measured([Operator("squares", squares, "numbers", (4, 8, 16))], context))
    assert [(e["n"], e["pass"], e["against"]) for e in entries] == [
        (n, direction, way)
        for n in (4, 8)
        for direction, ways in (
            (FORWARD, ("reference", "times", "list", "cube", "wrong")),
            (BACKWARD, ("reference", "times", "cube", "wrong")),
        )
        for way in ways
    ]
    found = {e["against"]: e for e in entries if e["n"] == 4 and e["pass"] == FORWARD}
    assert found["times"]["apart"] < 1e-6
    assert found["list"]["apart"] < 1e-6
    assert found["cube"]["apart"] is None
    assert found["wrong"]["apart"] == pytest.approx(0.5)
    assert found["times"]["size"] == "4 numbers"
    assert found["times"]["names"] == ["times", "fast"]
    assert found["times"]["speedup"] == pytest.approx(found["times"]["seconds"][0] / found["times"]["seconds"][1])
    assert entries[0]["environment"]["torch"] == torch.__version__
    assert next(e for e in entries if e["pass"] == BACKWARD and e["against"] == "wrong")["apart"] == pytest.approx(0.5)


def test_operators_of_another_device_are_passed_over_and_the_long_run_takes_all_sizes(monkeypatch):
    monkeypatch.setattr("foveate.bench.case.PAIRS", (1, 1))
    full = ProofContext(full=True, progress=False)
    assert list(measured([Operator("squares", squares, "numbers", (4,), devices=("cuda",))], full)) == []
    entries = measured([Operator("squares", squares, "numbers", (4, 8, 16), (FORWARD,))], full)
    assert [e["n"] for e in entries if e["against"] == "reference"] == [4, 8, 16]


def test_the_reference_is_the_call_without_fast_paths():
    assert ops.fast_allowed()
    assert plain(lambda: ops.fast_allowed())() is False
    assert ops.fast_allowed()


def test_apart_is_relative_to_the_largest_value_of_each_part():
    one, two = torch.tensor([1.0, -2.0]), torch.tensor([[100.0]])
    assert apart((one, [two]), [one, two]) == 0
    assert apart((one + 0.5, two), (one, two)) == pytest.approx(0.25)
    assert apart((one, two + 1), (one, two)) == pytest.approx(0.01)
    assert apart((one, two), (one,)) == float("inf")
    assert apart(one, one[:1]) == float("inf")
    assert apart(torch.zeros(2), torch.zeros(2)) == 0


@pytest.mark.parametrize("name", [name for name, operator in OPERATORS.items() if "cpu" in operator.devices])
def test_ways_of_the_list_agree(name):
    operator = OPERATORS[name]
    case = operator.build(torch.Generator().manual_seed(0), operator.sizes[0])
    with torch.no_grad():
        values = case.call(*case.inputs)
        for way in case.ways(FORWARD).values():
            found = way.call(*case.inputs)
            assert way.values is None or apart(values, way.values(found)) < 1e-5
    assert list(operator.sizes) == sorted(operator.sizes)
