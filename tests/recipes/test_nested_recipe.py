"""The recipe of nested fine-tuning: it trains, converts, measures at budgets, and resumes."""

import argparse
import importlib.util
import json
from pathlib import Path

import torch

from foveate.data.labelled import Labelled
from foveate.layers.transformer import VisionTransformer

_spec = importlib.util.spec_from_file_location("nested_recipe", Path(__file__).parents[2] / "recipes" / "nested.py")
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


def network() -> VisionTransformer:
    torch.manual_seed(0)
    return VisionTransformer(32, 8, 32, 1, 2, num_classes=2, global_pool="avg")


def test_it_trains_three_copies_measures_them_at_budgets_and_resumes(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(recipe, "BUDGETS", (1.0, 0.75, 0.5))
    args = argparse.Namespace(dense=12, steps=4, batch=16, lr=1e-2, seed=0, work=tmp_path)
    first = network()
    rows = recipe.run(first, halves(32), halves(16), args)
    assert [(r["network"], r["budget"]) for r in rows] == [
        ("dense", 1.0),
        *(("routed", b) for b in recipe.BUDGETS),
        *(("at random", b) for b in recipe.BUDGETS),
    ]
    losses = [
        json.loads(line.partition(" ")[2])["loss"] for line in capsys.readouterr().out.splitlines() if "loss" in line
    ]
    assert len(losses) == 4
    assert all(loss < losses[0] for loss in losses[1:])  # copies go on from where the first came to
    second = network()
    again = recipe.run(second, halves(32), halves(16), args)
    assert again[:4] == rows[:4]
    assert "loss" not in capsys.readouterr().out  # nothing was left to train
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), second.parameters(), strict=True))
    assert not any(
        torch.equal(a, b) for a, b in zip(first.blocks.parameters(), network().blocks.parameters(), strict=True)
    )
