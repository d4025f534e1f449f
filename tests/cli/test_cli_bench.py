"""`foveate bench ops` on an operator that costs nothing, `foveate bench codecs` on those that cost little."""

import json
from pathlib import Path

import pytest
import torch
from PIL import Image
from typer.testing import CliRunner, Result

from foveate.bench import ops
from foveate.bench.case import Case, Operator
from foveate.cli import app
from foveate.errors import InputError


def bench(*words: str) -> Result:
    return CliRunner().invoke(app, ["bench", "ops", "--device", "cpu", *words])


@pytest.fixture(autouse=True)
def operators(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def build(dice: torch.Generator, n: int) -> Case:
        return Case(f"{n} numbers", (torch.randn(n, generator=dice),), torch.exp)

    found = [Operator(name, build, "numbers", (2, 4, 8), ("forward",)) for name in ("exponential", "other")]
    monkeypatch.setattr(ops, "OPERATORS", {operator.name: operator for operator in found})
    monkeypatch.setattr("foveate.bench.case.PAIRS", (1, 1))
    monkeypatch.chdir(tmp_path)


def test_all_operators_are_written_to_the_results() -> None:
    result = bench()
    assert result.exit_code == 0, result.exception
    assert "written to docs/results/ops.md" in result.stderr
    assert "exponential (cpu): Time, forward, n numbers: fast n^" in result.stderr
    assert "## other (cpu)" in Path("docs/results/ops.md").read_text()
    lines = [line.split("\t") for line in result.stdout.splitlines()]
    assert [line[0] for line in lines] == ["exponential"] * 3 + ["other"] * 3
    assert [line[2] for line in lines[:3]] == ["2 numbers", "4 numbers", "8 numbers"]


def test_one_operator_or_a_quick_run_writes_where_it_is_told_only() -> None:
    for words in (("--op", "other"), ("--quick",)):
        assert bench(*words).exit_code == 0
    assert list(Path().iterdir()) == []
    result = bench("--op", "other", "--quick", "--out", "here", "--json")
    assert [(e["op"], e["n"]) for e in json.loads(result.stdout)] == [("other", 2), ("other", 4)]
    assert {e["op"] for e in json.loads(Path("here/ops.json").read_text())} == {"other"}


def test_an_unknown_operator_is_refused_with_those_there_are() -> None:
    result = bench("--op", "exponentail")
    assert isinstance(result.exception, InputError)
    assert "No operator is called 'exponentail'. There are exponential, other." in str(result.exception)


def test_codecs_beside_ours_can_be_asked_for() -> None:
    Path("set").mkdir()
    Image.effect_noise((180, 176), 20).convert("RGB").save("set/noise.png")
    words = ["codecs", "--data", "set", "--method", "JPEG", "--method", "PNG"]
    result = CliRunner().invoke(app, ["bench", *words])
    assert result.exit_code == 0, result.exception
    found = [(e["method"], e["setting"], e["count"]) for e in json.loads(Path("docs/results/codecs.json").read_text())]
    assert found == [*(("JPEG", f"quality {q}", 1) for q in (10, 25, 50, 75, 90)), ("PNG", "lossless", 1)]


def test_the_group_has_room_for_others() -> None:
    assert "ops" in CliRunner().invoke(app, ["bench", "--help"]).stdout
