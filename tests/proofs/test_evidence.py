"""Proofs: the context, the evidence, running by card, and the results page."""

import json
import random
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from foveate import catalog, proofs
from foveate.errors import InputError, NotBuiltError
from foveate.proofs import Evidence, ProofContext, Row
from foveate.proofs.report import figure_to_picture, last_results, read_results, write_results


def _evidence(system: str = "pcsr", **changes: object) -> Evidence:
    values: dict[str, object] = {
        "system": system,
        "claim": "half the FLOPs | same PSNR",
        "rows": [
            Row("dense", psnr_db=30.5, gflops=12345.6),
            Row(system, psnr_db=float("inf"), gflops=6000.0, share=0.5),
        ],
        "claimed": "0.57x",
        "measured": "0.49x",
        "holds": True,
        "notes": ("three pictures",),
        "measured_ratio": 0.49,
    }
    return Evidence(**{**values, **changes})  # type: ignore[arg-type]


def test_a_context_seeds_everything() -> None:
    draws = []
    for _ in range(2):
        context = ProofContext(seed=7)
        numpys = np.random.rand()  # noqa: NPY002
        draws.append((random.random(), numpys, torch.rand(()), torch.rand((), generator=context.generator())))
    assert draws[0] == draws[1]
    assert draws[0][3] != torch.rand((), generator=ProofContext(seed=8).generator())


def test_folder_and_require(tmp_path: Path) -> None:
    (tmp_path / "set5").mkdir()
    context = ProofContext(data=tmp_path)
    assert context.folder("set5") == context.require("set5") == tmp_path / "set5"
    assert context.folder("kodak12") is None
    with pytest.raises(InputError, match=r"kodak12/ in --data .* lies: set5/"):
        context.require("kodak12")
    assert ProofContext().folder("set5") is None
    with pytest.raises(InputError, match=r"--data DIR, a folder in which set5/ lies"):
        ProofContext().require("set5")
    with pytest.raises(InputError, match="is not a folder"):
        ProofContext(data=tmp_path / "absent")


def test_mode_progress_and_device() -> None:
    assert (ProofContext().mode, ProofContext(full=True).mode) == ("quick", "full")
    assert ProofContext().quick
    assert list(ProofContext(progress=False).track(range(3), "counting")) == [0, 1, 2]
    with pytest.raises(InputError, match="'nonsense' cannot be used"):
        ProofContext(device="nonsense")


def test_rows_take_numbers_only() -> None:
    assert Row("a", x=torch.tensor(2.0), n=np.int64(3)).metrics == {"x": 2.0, "n": 3.0}  # type: ignore[arg-type]
    with pytest.raises(InputError, match="'a' takes numbers only"):
        Row("a", x="fast")  # type: ignore[arg-type]


def test_evidence_needs_a_baseline() -> None:
    with pytest.raises(InputError, match="at least two"):
        _evidence(rows=[Row("pcsr", psnr=1.0)])


def test_evidence_survives_json() -> None:
    evidence = _evidence(mode="quick", seconds=1.25, environment={"cores": 2}, holds=np.bool_(False))
    text = json.dumps(evidence.to_dict(), allow_nan=False)
    assert Evidence.from_dict(json.loads(text)) == evidence
    assert json.loads(text)["holds"] is False


def test_markdown_and_table_show_every_figure() -> None:
    evidence = _evidence()
    text = evidence.markdown()
    assert "|  | psnr db | gflops | share |" in text
    assert "| dense | 30.5 | 12,346 |  |" in text
    assert "| pcsr | inf | 6,000 | 0.5 |" in text
    assert "- three pictures" in text
    assert "measured 0.49x: holds" in text
    table = evidence.table()
    assert [column.header for column in table.columns] == ["", "psnr db", "gflops", "share"]
    assert table.row_count == 2


def _with_proof(monkeypatch: pytest.MonkeyPatch, prove: object) -> None:
    monkeypatch.setattr(catalog.Card, "proof_function", lambda self: prove)


def test_run_fills_in_time_mode_and_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    _with_proof(monkeypatch, lambda context: _evidence(measured_ratio=torch.rand(()).item()))
    first, second = (proofs.run("PCSR", ProofContext(full=True)) for _ in range(2))
    assert first.mode == "full"
    assert 0 < first.seconds < 1
    assert first.environment["torch"] == torch.__version__
    assert first.measured_ratio == second.measured_ratio


def test_a_proof_does_not_depend_on_the_proofs_before_it(monkeypatch: pytest.MonkeyPatch) -> None:
    _with_proof(monkeypatch, lambda context: _evidence(measured_ratio=torch.rand(()).item()))
    context = ProofContext(seed=3)
    assert proofs.run("pcsr", context).measured_ratio == proofs.run("pcsr", context).measured_ratio


def test_run_refuses_what_is_not_the_evidence_of_the_system(monkeypatch: pytest.MonkeyPatch) -> None:
    _with_proof(monkeypatch, lambda context: 0.5)
    with pytest.raises(InputError, match="returned float"):
        proofs.run("pcsr")
    _with_proof(monkeypatch, lambda context: _evidence("espcn"))
    with pytest.raises(InputError, match="evidence of 'espcn', expected that of 'pcsr'"):
        proofs.run("pcsr")


def test_run_without_a_proof() -> None:
    waiting = next(card for card in catalog.load().values() if card.proof is None)
    with pytest.raises(NotBuiltError):
        proofs.run(waiting.slug)


def test_results_are_merged_by_system_and_mode(tmp_path: Path) -> None:
    picture = Image.new("RGB", (4, 3), "red")
    write_results([_evidence(mode="quick"), _evidence("espcn", mode="quick", figure=picture)], tmp_path)
    write_results([_evidence(mode="full", holds=False), _evidence(mode="quick", measured="0.51x")], tmp_path)
    entries = read_results(tmp_path / "results.json")
    assert [(e["system"], e["mode"], e["measured"]) for e in entries] == [
        ("espcn", "quick", "0.49x"),
        ("pcsr", "full", "0.49x"),
        ("pcsr", "quick", "0.51x"),
    ]
    assert Image.open(tmp_path / "espcn-quick.png").size == (4, 3)
    page = (tmp_path / "index.md").read_text()
    assert "2 of 3 hold" in page
    assert "| [pcsr](#pcsr-full) | half the FLOPs \\| same PSNR | 0.57x | 0.49x | **no** | 0 | full |" in page
    assert "![espcn: 0.49x](espcn-quick.png)" in page
    assert sorted(p.name for p in tmp_path.iterdir()) == ["espcn-quick.png", "index.md", "results.json"]


@pytest.mark.parametrize("damage", ["{", '[{"system": "pcsr"}]', '["text"]', "3"])
def test_damaged_results_are_named(tmp_path: Path, damage: str) -> None:
    (tmp_path / "results.json").write_text(damage)
    with pytest.raises(InputError, match=r"results.json is not a list of results .* Delete it"):
        write_results([_evidence()], tmp_path)
    assert (tmp_path / "results.json").read_text() == damage


def test_last_results_come_from_the_folder_at_hand(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_results([_evidence(mode="quick", measured="7x")], tmp_path / "docs" / "results")
    monkeypatch.chdir(tmp_path)
    assert [entry["measured"] for entry in last_results("pcsr")] == ["7x"]


def test_figure_to_picture_has_the_colour_and_size_of_the_figure() -> None:
    figure = pytest.importorskip("matplotlib.figure").Figure(figsize=(2, 1), facecolor=(1, 0, 0))
    picture = figure_to_picture(figure, dpi=50)
    assert (picture.size, picture.mode, picture.getpixel((50, 25))) == ((100, 50), "RGB", (255, 0, 0))
