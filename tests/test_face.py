"""The face: light to import, lazy, and clear when a call does not fit the system."""

import subprocess
import sys

import pytest

import foveate
from foveate.catalog import Card


def _python(code: str) -> str:
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip()


@pytest.mark.parametrize("module", ["foveate", "foveate.cli", "foveate.proofs.report"])
def test_importing_loads_neither_torch_nor_numpy(module: str) -> None:
    code = f"import {module}, sys; print(sorted({{'torch', 'numpy', 'PIL', 'rich'}} & set(sys.modules)))"
    assert _python(code) == "[]"


def test_the_names_of_the_face_are_there_and_listed() -> None:
    assert set(foveate.__all__) <= set(dir(foveate))
    assert foveate.Budget.__module__ == "foveate.engine.budget"
    assert foveate.errors.InputError("x").args == ("x",)
    with pytest.raises(AttributeError, match="no attribute 'upscalee'"):
        _ = foveate.upscalee  # type: ignore[attr-defined]


def test_list_systems_filters() -> None:
    everything = foveate.list_systems()
    assert len(everything) == 119
    working, waiting = foveate.list_systems(works=True), foveate.list_systems(works=False)
    assert sorted(working + waiting) == sorted(everything)
    assert set(foveate.list_systems(kind="plugin", wing="language")) < set(everything)


def _only_card(monkeypatch: pytest.MonkeyPatch, target: object, kind: str) -> None:
    made = Card("thing", "T", "arXiv:0000.00000", 2024, "encode", kind, "a", "c", "somewhere.things:Thing")  # type: ignore[arg-type]
    monkeypatch.setattr(Card, "target", lambda self: target)
    monkeypatch.setattr(Card, "builder", lambda self: target)
    monkeypatch.setattr("foveate.catalog.card", lambda name: made)


class _Network:
    def __init__(self, scale: int = 2) -> None:
        self.scale = scale


@pytest.mark.parametrize("kind", ["model", "job"])
def test_create_builds_with_the_settings(monkeypatch: pytest.MonkeyPatch, kind: str) -> None:
    _only_card(monkeypatch, _Network, kind)
    assert foveate.create("thing", scale=3).scale == 3
    with pytest.raises(foveate.errors.InputError, match=r"scales=3.*settings are: scale: int = 2"):
        foveate.create("thing", scales=3)


@pytest.mark.parametrize(
    ("kind", "target", "advice"),
    [
        ("plugin", _Network, r'foveate\.apply\(model, "thing"'),
        ("tool", _Network, "from somewhere.things import Thing"),
        ("job", len, "from somewhere.things import Thing"),
    ],
)
def test_create_says_what_to_call_instead(
    monkeypatch: pytest.MonkeyPatch, kind: str, target: object, advice: str
) -> None:
    _only_card(monkeypatch, target, kind)
    with pytest.raises(foveate.errors.InputError, match=advice):
        foveate.create("thing")


def test_apply_parses_the_budget_and_passes_the_rest_on(monkeypatch: pytest.MonkeyPatch) -> None:
    def plugin(model: str, budget: foveate.Budget, layer: int = 0) -> tuple[str, float, int]:
        return model, budget.amount, layer

    _only_card(monkeypatch, plugin, "plugin")
    assert foveate.apply("host", "thing", budget="50%", layer=3) == ("host", 0.5, 3)
    with pytest.raises(foveate.errors.BudgetError):
        foveate.apply("host", "thing", budget=-1)
    with pytest.raises(foveate.errors.InputError, match=r"settings are: budget.*layer"):
        foveate.apply("host", "thing", layers=3)


@pytest.mark.parametrize(
    ("kind", "advice"), [("model", "foveate.create"), ("job", "foveate show thing"), ("tool", "import Thing")]
)
def test_apply_says_what_to_call_instead(monkeypatch: pytest.MonkeyPatch, kind: str, advice: str) -> None:
    _only_card(monkeypatch, _Network, kind)
    with pytest.raises(foveate.errors.InputError, match=advice):
        foveate.apply(object(), "thing")


def test_unknown_names_suggest_the_nearest() -> None:
    for call in (foveate.create, foveate.prove, lambda name: foveate.apply(object(), name)):
        with pytest.raises(foveate.errors.UnknownSystemError, match="pcsr"):
            call("pcsrr")


def test_create_takes_a_published_size():
    model = foveate.create("lsnet_t", num_classes=7)
    assert sum(p.numel() for p in model.parameters()) < 12e6
    assert type(foveate.create("dcnv4_t", num_classes=2)).__name__ == "FlashInternImage"
