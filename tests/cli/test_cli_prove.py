"""`foveate prove`: verdicts, files and exit codes, on proofs that cost nothing."""

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

from foveate import catalog
from foveate.cli import app
from foveate.errors import FoveateError, InputError
from foveate.proofs import Evidence, ProofContext, Row


def prove(*words: object) -> Result:
    return CliRunner().invoke(app, ["prove", *map(str, words)])


@pytest.fixture(autouse=True)
def proofs(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Give every system a proof of its own: scnet's fails, espcn's breaks, the others hold."""

    def proof(card: catalog.Card, context: ProofContext) -> Evidence:
        if card.slug == "espcn":
            raise ZeroDivisionError("nothing to divide by")
        if card.slug == "adaptive-patch-exiting" and context.data is None:
            context.require("set5")
        rows = (Row("dense", psnr=30.0), Row(card.slug, psnr=29.5, seed=context.seed))
        holds = card.slug != "scnet"
        return Evidence(card.slug, "the claim", rows, "0 dB", "-0.5 dB", holds, notes=(f"{context.mode} run",))

    monkeypatch.setattr(catalog.Card, "proof_function", lambda card: lambda context: proof(card, context))
    monkeypatch.chdir(tmp_path)


def test_a_claim_that_holds() -> None:
    result = prove("pcsr", "--full", "--seed", 5)
    assert result.exit_code == 0
    assert "| pcsr | 29.5 | 5 |" in result.stdout
    assert "- full run" in result.stdout
    assert list(Path().iterdir()) == []


def test_a_claim_that_does_not_hold_is_code_1() -> None:
    result = prove("pcsr", "scnet")
    assert result.exit_code == 1
    assert "does not hold" in result.stdout


def test_a_broken_proof_is_code_2_and_the_others_still_run() -> None:
    result = prove("espcn", "pcsr", "adaptive-patch-exiting", "scnet")
    assert result.exit_code == 2
    assert "the proof of espcn broke: ZeroDivisionError: nothing to divide by" in result.stderr
    assert "foveate: adaptive-patch-exiting: This proof needs the pictures set5/. Pass --data" in result.stderr
    assert "### pcsr" in result.stdout
    assert "### scnet" in result.stdout


def test_all_writes_the_results_page(tmp_path: Path) -> None:
    result = prove("--all", "--data", tmp_path)
    assert result.exit_code == 2
    entries = json.loads(Path("docs/results/results.json").read_text())
    working = {card.slug for card in catalog.search(works=True) if card.proof}
    assert {entry["system"] for entry in entries} == working - {"espcn"}
    assert "| [scnet](#scnet-quick) |" in Path("docs/results/index.md").read_text()


def test_out_and_json_for_one_system() -> None:
    assert prove("pcsr", "PCSR", "--out", "here", "--json", "found.json").exit_code == 0
    assert [entry["system"] for entry in json.loads(Path("found.json").read_text())] == ["pcsr"]
    assert Path("here/index.md").exists()
    result = prove("pcsr", "--json", "-")
    assert json.loads(result.stdout)[0]["measured"] == "-0.5 dB"
    assert isinstance(prove("pcsr", "--json", "absent/found.json").exception, InputError)


@pytest.mark.parametrize("words", [(), ("pcsr", "--all"), ("pcsrr",), ("pcsr", "--data", "absent")])
def test_bad_calls_are_errors(words: tuple[str, ...]) -> None:
    assert isinstance(prove(*words).exception, FoveateError)
