"""The recipe of budgets: every row is trained for its share of the time, and measured at what it spent."""

import argparse
import importlib.util
from pathlib import Path

import pytest
import torch

from foveate.data.labelled import Labelled

_spec = importlib.util.spec_from_file_location("budgets_recipe", Path(__file__).parents[2] / "recipes" / "budgets.py")
assert _spec is not None
assert _spec.loader is not None
recipe = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(recipe)


def halves(count: int) -> Labelled:
    """Noise that is brighter above (class 0) or below (class 1)."""
    pictures = torch.randint(0, 100, (count, 32, 32, 3), generator=torch.Generator().manual_seed(count))
    labels = torch.arange(count) % 2
    pictures[labels == 0, :16] += 120
    pictures[labels == 1, 16:] += 120
    return Labelled(pictures.byte(), labels, ("above", "below"))


@pytest.fixture(autouse=True)
def small(monkeypatch):
    values = {
        "SIZE": {"img_size": 32, "embed_dim": 48, "depth": 1, "num_heads": 2},
        "PATCH": 8,
        "FINE": 4,
        "GATE": 2,
    } | {"COUNTED": 2}
    for name, value in values.items():
        monkeypatch.setattr(recipe, name, value)


@pytest.fixture
def args(tmp_path):
    return argparse.Namespace(minutes=0.0, tested=16, steps=3, batch=8, lr=1e-2, seed=0, work=tmp_path)


def test_modules_are_taught_tuned_and_measured_at_budgets_and_resume(args, capsys):
    torch.manual_seed(0)
    rows = recipe.modules(recipe.Trainer(halves(32), args), halves(16), "cpu", (1.0, 0.6))
    assert [(r["network"], r["budget"]) for r in rows] == [
        ("dense", 1.0),
        ("by gates", 1.0),
        ("by gates", 0.6),
        ("at random", 0.6),
    ]
    assert all(r["spent"] <= r["budget"] + 0.1 for r in rows)
    assert rows[3]["spent"] == pytest.approx(0.6, abs=0.03)
    said = capsys.readouterr().out
    assert all(f"{name} {{" in said for name in ("first", "dense", "distil", "gates", "by gates 0.6", "at random 0.6"))
    torch.manual_seed(0)
    again = recipe.modules(recipe.Trainer(halves(32), args), halves(16), "cpu", (1.0, 0.6))
    assert again[0] == rows[0]
    assert "loss" not in capsys.readouterr().out  # nothing was left to train


def test_one_training_of_nested_experts_serves_all_budgets(args, capsys):
    rows = recipe.experts(recipe.Trainer(halves(32), args), halves(16), "cpu", (1.0, 0.6))
    assert [(r["network"], r["budget"]) for r in rows[1:]] == [
        (name, budget) for name in ("routed", "router left out in use", "at random") for budget in (1.0, 0.6)
    ]
    assert all(r["spent"] == pytest.approx(r["budget"], abs=0.05) for r in rows)
    assert rows[1]["accuracy"] == rows[3]["accuracy"]  # at full width nothing is chosen
    said = capsys.readouterr().out
    assert all(f"nested {name} {{" in said for name in ("routed", "at random"))
    assert "nested router" not in said


def test_fewer_tokens_are_learned_or_drawn(args):
    rows = recipe.tokens(recipe.Trainer(halves(32), args), halves(16), "cpu", (1.0, 0.8))
    assert [(r["network"], r["budget"]) for r in rows] == [("dense", 1.0), ("learned", 0.8), ("at random", 0.8)]


def test_tapes_are_as_long_as_the_budget_pays_for(args):
    rows = recipe.tapes(recipe.Trainer(halves(32), args), halves(16), "cpu", (2.0, 1.0))
    assert [(r["network"], r["budget"]) for r in rows[1:]] == [
        (name, budget) for name in ("by query", "at random") for budget in (2.0, 1.0)
    ]
    for row in rows[1:]:
        assert row["spent"] <= row["budget"] + 1e-3
        assert row["tape"] <= row["most"]
    assert rows[1]["most"] > rows[2]["most"] > 0
    text = recipe.table("adatape", rows, args)
    assert text.count("\n| ") == len(rows) + 2
    assert "| by query | 1.0 |" in text


def test_minutes_become_steps_and_stay_when_it_resumes(args, monkeypatch):
    args.minutes, args.steps = 0.1, 0
    monkeypatch.setattr(recipe, "seconds_per_step", lambda phase: 2.0)
    trainer, asked = recipe.Trainer(halves(32), args), []

    def make(subject):
        return lambda steps, checkpoint, **options: asked.append(steps) or checkpoint.touch()

    trainer.run("it", make, None)
    monkeypatch.setattr(recipe, "seconds_per_step", lambda phase: 1.0)
    trainer.run("it", make, None)
    trainer.run("other", make, None, 0.5)
    assert asked == [3, 3, 3]


def test_steps_are_timed():
    class Clock:
        now = 0.0

    def phase(steps, **options):
        Clock.now += steps * 0.25

    recipe_time = type(
        "T", (), {"process_time": staticmethod(lambda: Clock.now), "perf_counter": staticmethod(lambda: Clock.now)}
    )
    before, recipe.time = recipe.time, recipe_time
    try:
        assert recipe.seconds_per_step(phase) == pytest.approx(0.25)
    finally:
        recipe.time = before
