"""`foveate measure` on a network whose cost is known."""

import json
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from typer.testing import CliRunner, Result

from foveate import catalog
from foveate.cli import app
from foveate.cli.measure import parse_size, photograph
from foveate.data import pictures
from foveate.errors import BudgetError, FoveateError, InputError


class Repeating(nn.Module):
    """A matrix product, repeated ten times at share 1 and share * 10 times below."""

    floor = 0.2

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.eye(3))

    def full_flops(self, height: int, width: int) -> float:
        return 10 * 2 * 9.0 * height * width

    def upscale(self, x: Tensor, share: float = 1.0) -> Tensor:
        if share < self.floor:
            raise BudgetError("too little")
        y = x.flatten(2)[0]
        for _ in range(round(10 * share)):
            y = self.weight @ y
        return y


@pytest.fixture(autouse=True)
def known_network(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(catalog.Card, "target", lambda card: Repeating)
    monkeypatch.setattr("foveate.weights.load", lambda slug, scale: Repeating())


def measure(*words: str) -> Result:
    return CliRunner().invoke(app, ["measure", "pcsr", "--pairs", "1", "--size", "40x20", *words])


@pytest.mark.parametrize(
    ("budget", "share"), [(None, 0.5), ("50%", 0.5), ("0.3", 0.3), ("28.8 kFLOPs", 0.2), ("1", 1.0), ("9 s", 1.0)]
)
def test_flops_fall_as_the_budget_says(budget: str | None, share: float) -> None:
    result = measure("--json", *([] if budget is None else ["--budget", budget]))
    assert result.exit_code == 0, result.exception
    found: dict[str, Any] = json.loads(result.stdout)
    assert found["share"] == pytest.approx(share)
    assert found["parameters"] == 9
    assert found["flops"][0] == 10 * 2 * 9 * 40 * 20
    assert found["flop_reduction"] == pytest.approx(1 / share)


def test_the_table_names_both_budgets() -> None:
    text = measure().stdout
    assert "pcsr x2 on 40x20, 9 parameters" in text
    assert "budget 1 " in text
    assert "budget 0.5" in text
    assert "144 k" in text


@pytest.mark.parametrize("words", [("--budget", "0.1"), ("--budget", "lots"), ("--size", "0"), ("--pairs", "0")])
def test_bad_calls_are_errors(words: tuple[str, ...]) -> None:
    assert isinstance(measure(*words).exception, FoveateError)


def test_a_system_that_upscales_nothing_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(catalog.Card, "target", lambda card: dict)
    assert "pcsr does not" in str(measure().exception)


@pytest.mark.parametrize("size", ["256x", "x3", "1x2x3", "-4", "0x9", "a", ""])
def test_sizes_are_one_or_two_numbers(size: str) -> None:
    assert parse_size("256") == (256, 256)
    assert parse_size("640X480") == (640, 480)
    with pytest.raises(InputError, match="is not a size"):
        parse_size(size)


def test_photographs_of_any_size_begin_alike() -> None:
    small, large = photograph(5, 7), photograph(700, 1100)
    assert small.shape == (1, 3, 5, 7)
    assert large.shape == (1, 3, 700, 1100)
    assert torch.equal(large[..., :5, :7], small)
    height = next(iter(pictures.samples().values())).shape[1]
    assert torch.equal(large[..., height, :], large[..., height - 1, :])
