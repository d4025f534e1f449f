"""The recipe of the encode wing: it trains, resumes, and tells equal budgets apart."""

import argparse
import importlib.util
import json
from pathlib import Path

import pytest
import torch

from foveate.data.labelled import Labelled
from foveate.errors import InputError
from foveate.meter import count_parameters

_spec = importlib.util.spec_from_file_location("encode_recipe", Path(__file__).parents[2] / "recipes" / "encode.py")
assert _spec is not None
assert _spec.loader is not None
recipe = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(recipe)


def halves(count: int, seed: int) -> Labelled:
    """Noise that is brighter above (class 0) or below (class 1)."""
    dice = torch.Generator().manual_seed(seed)
    pictures = torch.randint(0, 100, (count, 32, 32, 3), generator=dice)
    labels = torch.arange(count) % 2
    pictures[labels == 0, :16] += 120
    pictures[labels == 1, 16:] += 120
    return Labelled(pictures.byte(), labels, ("above", "below"))


@pytest.fixture
def args(tmp_path: Path) -> argparse.Namespace:
    given = {"minutes": 0.0, "steps": 12, "batch": 16, "device": "cpu", "seed": 0, "looks": 2, "work": tmp_path}
    return argparse.Namespace(**given)


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    tiny = recipe.Network("foveate.layers.resnet:ResNet", {"widths": (8,), "depths": (1,), "stride": 4}, lr=1e-2)
    monkeypatch.setitem(recipe.NETWORKS, "resnet", tiny)
    monkeypatch.setattr(recipe, "seconds_per_step", lambda *_: 0.5)


def test_it_learns_and_a_second_run_goes_on_where_the_first_ended(args, capsys):
    row = recipe.train("resnet", "halves", halves(64, 0), halves(40, 1), args)
    assert row["accuracy"] > 90
    assert (row["steps"], row["minutes"], row["budget"]) == (12, 0.1, "12 steps, 1 CPU thread(s), batches of 16")
    assert "accuracy" in capsys.readouterr().out
    again = recipe.train("resnet", "halves", halves(64, 0), halves(40, 1), args)
    assert again == row
    assert "loss" not in capsys.readouterr().out  # nothing was left to train
    args.seed = 1
    recipe.train("resnet", "halves", halves(64, 0), halves(40, 1), args)
    assert "loss" in capsys.readouterr().out  # another training does not take over the checkpoint


def test_norms_are_gathered_for_the_averaged_weights_even_when_nothing_was_left_to_train(args, monkeypatch):
    learned, tested = halves(64, 0), halves(40, 1)
    network = recipe.NETWORKS["resnet"].build(2)
    recipe.Training(network, learned, args).gather_norms()
    norm = network.stem[0].bn
    draw = learned.draws(args.seed, recipe.SHIFT)
    seen = torch.cat([draw(args.batch)[0] for _ in range(recipe.NORMING)])
    with torch.no_grad():
        torch.testing.assert_close(norm.running_mean, network.stem[0].c(seen).mean((0, 2, 3)), atol=1e-4, rtol=1e-3)
    assert not network.training
    recipe.train("resnet", "halves", learned, tested, args)
    gathered = []
    monkeypatch.setattr(recipe.Training, "gather_norms", lambda self: gathered.append(self) or self.network.eval())
    recipe.train("resnet", "halves", learned, tested, args)
    assert len(gathered) == 1


def test_minutes_become_steps(args):
    args.minutes, args.steps = 0.1, 0
    row = recipe.train("resnet", "halves", halves(64, 0), halves(40, 1), args)
    assert (row["steps"], row["minutes"]) == (12, 0.1)
    assert row["budget"].startswith("0.1 minutes")


@pytest.mark.parametrize("name", [name for name, network in recipe.NETWORKS.items() if network.there])
def test_every_network_fits_the_pictures_and_is_as_large_as_the_others(name, monkeypatch):
    monkeypatch.undo()
    network = recipe.NETWORKS[name].build(10).eval()
    assert 0.2e6 < count_parameters(network) < 0.5e6
    with torch.no_grad():
        assert network(torch.zeros(2, 3, 32, 32)).shape == (2, 10)


def test_a_table_per_budget_of_the_newest_rows(tmp_path):
    def row(network, accuracy, budget="1 minutes", steps=1000):
        base = {"data": "CIFAR-10", "budget": budget, "parameters": 300_000, "MFLOPs": 24.6, "minutes": 1.0}
        return json.dumps(base | {"network": network, "steps": steps, "accuracy": accuracy})

    file = tmp_path / "rows.jsonl"
    file.write_text("\n".join([row("resnet", 60.0), row("levit", 50.5), row("levit", 65.5), row("resnet", 70, "2 m")]))
    text = recipe.table(file)
    assert text.index("## CIFAR-10: 1 minutes") < text.index("| levit | 300,000 | 24.6 | 1,000 | 1.0 | 65.5 |")
    assert (
        text.index("65.5")
        < text.index("| resnet | 300,000 | 24.6 | 1,000 | 1.0 | 60.0 |")
        < text.index("## CIFAR-10: 2 m")
    )
    assert "50.5" not in text


def test_a_folder_without_pictures_is_refused(tmp_path):
    with pytest.raises(InputError, match="holds neither cifar10_train_jpeg"):
        recipe.read(tmp_path)
