"""The recipe of SeiT: a store from a folder of pictures, and a classifier from the store or the pictures."""

import importlib.util
import json
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

_SPEC = importlib.util.spec_from_file_location("seit_recipe", Path(__file__).parents[2] / "recipes" / "seit.py")
assert _SPEC is not None
assert _SPEC.loader is not None
recipe = importlib.util.module_from_spec(_SPEC)
_SPEC.loader.exec_module(recipe)


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """Two classes, bright and dark noise, eight pictures each to learn from and two to test."""
    random = np.random.default_rng(0)
    for part, count in (("train", 8), ("test", 2)):
        for name, base in (("dark", 0), ("bright", 155)):
            home = tmp_path / "set" / part / name
            home.mkdir(parents=True)
            for i in range(count):
                Image.fromarray((base + random.integers(0, 100, (32, 32, 3))).astype(np.uint8)).save(home / f"{i}.png")
    return tmp_path / "set"


def _run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], *arguments: object) -> dict:
    monkeypatch.setattr(sys, "argv", ["seit.py", *map(str, arguments)])
    recipe.main()
    return json.loads(capsys.readouterr().out.strip().splitlines()[-1])


def test_store_and_train(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    made = _run(
        monkeypatch, capsys, "store", "--data", data, "--out", tmp_path / "x", "--words", 9, "--dim", 4, "--kind", "npz"
    )
    assert made["pictures"] == 16
    assert 0 < made["bits per token"] < 3.2
    size = ("--width", 32, "--depth", 1, "--batch", 8)
    for store in ((), ("--store", tmp_path / "x", "--changes", "none")):
        row = _run(monkeypatch, capsys, "train", "--data", data, *store, "--steps", 12, *size)
        assert row["source"].startswith("tokens" if store else "pixels")
        assert row["accuracy"] == 100
