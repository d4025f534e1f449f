"""`foveate list`, `foveate show`, the help texts and the exit codes."""

import json
import re
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

from foveate import __version__, catalog
from foveate.cli import app, main
from foveate.proofs import Evidence, Row
from foveate.proofs.report import write_results

VERBS = [command.name or command.callback.__name__ for command in app.registered_commands]


def run(*words: str) -> str:
    """The output stream of a command that succeeds."""
    result = CliRunner().invoke(app, list(words))
    assert result.exit_code == 0, (result.output, result.exception)
    return result.stdout


def run_main(monkeypatch: pytest.MonkeyPatch, *words: str) -> int:
    """The exit code of the whole programme."""
    monkeypatch.setattr(sys, "argv", ["foveate", *words])
    with pytest.raises(SystemExit) as leaving:
        main()
    return int(leaving.value.code or 0)


@pytest.mark.parametrize("verb", VERBS)
def test_every_help_text_has_two_examples(verb: str) -> None:
    text = run(verb, "--help")
    assert len(re.findall(rf"^    foveate {verb} \S", text, re.MULTILINE)) >= 2


def test_help_and_version(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    assert run_main(monkeypatch, "--version") == 0
    assert capsys.readouterr().out == f"foveate {__version__}\n"
    assert run_main(monkeypatch, "--help") == 0
    assert {"list", "show", "prove", "measure"} <= set(capsys.readouterr().out.split())


def test_a_known_error_is_one_line_and_code_2(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run_main(monkeypatch, "show", "pcsrr") == 2
    streams = capsys.readouterr()
    assert streams.out == ""
    assert re.fullmatch(r"foveate: .*'pcsrr'.*pcsr.*\n", streams.err)
    assert run_main(monkeypatch, "shwo", "pcsr") == 2


def test_an_interrupt_leaves_with_130(monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(catalog, "search", interrupt)
    assert run_main(monkeypatch, "list") == 130


def test_list_in_a_pipe_is_a_line_per_system() -> None:
    lines = [line.split("\t") for line in run("list").splitlines()]
    assert [line[0] for line in lines] == list(catalog.load())
    assert {len(line) for line in lines} == {5}
    assert {line[0] for line in lines if line[3] == "yes"} == {c.slug for c in catalog.search(works=True)}


def test_list_filters() -> None:
    working = [line.split("\t")[0] for line in run("list", "--works", "--wing", "restore").splitlines()]
    assert working == [card.slug for card in catalog.search(wing="restore", works=True)]
    cards = json.loads(run("list", "pixel-level", "--kind", "job", "--json"))
    assert [card["slug"] for card in cards] == ["pcsr"]
    assert cards[0]["works"] is True
    assert json.loads(run("list", "no such words", "--json")) == []
    assert run("list", "no such words") == ""


@pytest.mark.parametrize("slug", [card.slug for card in catalog.search(works=True)])
def test_show_tells_how_to_use_a_working_system(slug: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    card = catalog.card(slug)
    monkeypatch.chdir(tmp_path)
    text = run("show", slug)
    assert all(part in text for part in (card.title, card.paper, card.claim, card.adapts, f"foveate prove {slug}"))
    rows = [Row("dense", x=1), Row(slug, x=2)]
    write_results([Evidence(slug, "c", rows, "2x", "1.9x", True, mode="full")], "docs/results")  # type: ignore[arg-type]
    assert "claimed 2x; measured 1.9x: holds (full" in run("show", slug)
    assert json.loads(run("show", slug, "--json"))["results"][0]["measured"] == "1.9x"


def test_show_says_what_works_beside_a_system_that_does_not() -> None:
    waiting = next(card for card in catalog.search(wing="restore") if not card.works)
    text = run("show", waiting.slug)
    assert "Not built yet" in text
    assert all(card.slug in text for card in catalog.search(wing="restore", works=True))
    assert json.loads(run("show", waiting.slug, "--json"))["use"] == []
