"""`foveate prove`: re-run headline claims, baseline and system side by side."""

import traceback
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from foveate.cli.console import note, on_terminal, print_json

if TYPE_CHECKING:
    from foveate.proofs import Evidence, ProofContext


def prove(
    systems: Annotated[list[str] | None, typer.Argument(help="Names, as `foveate list --works` prints them.")] = None,
    every: Annotated[bool, typer.Option("--all", help="Prove every system that works.")] = False,
    full: Annotated[bool, typer.Option("--full", help="The longer experiments: minutes instead of seconds.")] = False,
    data: Annotated[Path | None, typer.Option(help="Folder with set5/, kodak12/ and other picture sets.")] = None,
    json: Annotated[Path | None, typer.Option(help="Write the evidence as JSON; - for the output stream.")] = None,
    device: Annotated[str, typer.Option(help="Where to run, e.g. cpu or cuda.")] = "cpu",
    seed: Annotated[int, typer.Option(help="Seed of all random numbers.")] = 0,
    out: Annotated[
        Path | None, typer.Option(help="Folder of the results page.  [default: docs/results with --all]")
    ] = None,
) -> None:
    """Re-run a system's claim against its baseline.

    Exit code 0 when all claims hold, 1 when one does not, 2 when a proof could not be run.

    \b
    Examples:
      foveate prove pcsr
      foveate prove --all --full --data pictures --out docs/results
    """
    from foveate import catalog
    from foveate.errors import InputError
    from foveate.proofs import ProofContext
    from foveate.proofs.report import RESULTS, write_results

    if every == bool(systems):
        raise InputError("Name the systems to prove, or pass --all. `foveate list --works` shows what can be proved.")
    cards = [card for card in catalog.search(works=True) if card.proof] if every else map(catalog.card, systems or ())
    slugs = list(dict.fromkeys(card.slug for card in cards))
    folder = RESULTS if every and out is None else out
    context = ProofContext(device=device, seed=seed, full=full, data=data, out=folder)
    found: list[Evidence] = []
    for slug in slugs:
        evidence = _attempt(slug, context)
        if evidence is None:
            continue
        found.append(evidence)
        if json != Path("-"):
            _print(evidence)
        if folder is not None:
            page = write_results([evidence], folder)
            note(f"{slug}: written to {page}")
    if json is not None:
        _write_json(found, json)
    if len(found) < len(slugs):
        raise typer.Exit(2)
    if not all(evidence.holds for evidence in found):
        raise typer.Exit(1)


def _attempt(slug: str, context: "ProofContext") -> "Evidence | None":
    """Run one proof; what goes wrong is said in a line, so that the proofs after it still run."""
    from foveate.errors import FoveateError
    from foveate.proofs import run

    try:
        return run(slug, context)
    except FoveateError as error:
        note(f"foveate: {slug}: {error}")
    except Exception as error:  # a fault of ours: whoever mends it needs the place
        note(traceback.format_exc())
        note(f"foveate: the proof of {slug} broke: {type(error).__name__}: {error}")
    return None


def _print(evidence: "Evidence") -> None:
    if not on_terminal():
        typer.echo(evidence.markdown())
        return
    from rich.console import Console

    console = Console()
    lines = [f"{evidence.system}: {evidence.claim}", evidence.table(), evidence.verdict]
    for line in [*lines, *(f"- {remark}" for remark in evidence.notes)]:
        console.print(line, markup=False, highlight=False)


def _write_json(found: "list[Evidence]", target: Path) -> None:
    values = [evidence.to_dict() for evidence in found]
    if target == Path("-"):
        print_json(values)
        return
    from json import dumps

    from foveate.errors import InputError

    try:
        target.write_text(dumps(values, indent=2, ensure_ascii=False, allow_nan=False) + "\n", encoding="utf-8")
    except OSError as error:
        raise InputError(f"--json {target} cannot be written: {error.strerror}. Give another file.") from error
