"""What verbs that turn files into files share: where results go, one progress bar, and folders with a journal."""

import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from foveate.cli.console import note, on_terminal
from foveate.errors import InputError

if TYPE_CHECKING:
    from rich.progress import Progress

    from foveate.batch.run import Summary

Items = list[tuple[Path, Path]]
"""Pairs of a source and its result's path within the output folder."""


def split(verb: str, paths: list[Path]) -> tuple[list[Path], Path]:
    """Inputs, and the output that comes last. Raises: InputError when there is only one."""
    if len(paths) < 2:
        raise InputError(f"{verb} needs an input and an output, got only {str(paths[0])!r}; add where the result goes.")
    return paths[:-1], paths[-1]


def is_batch(sources: list[Path], out: Path) -> bool:
    """Whether results go into a folder."""
    return len(sources) > 1 or sources[0].is_dir() or out.is_dir() or out.suffix == ""


def bar(quiet: bool) -> "Progress":
    """A progress bar on the error stream, where that is a terminal."""
    from rich.console import Console
    from rich.progress import Progress

    return Progress(console=Console(file=sys.stderr), transient=True, disable=quiet or not sys.stderr.isatty())


def suffix_of(format: str, same: bool = False) -> str | None:
    """The extension that --format names; None for "same". Raises: InputError for what cannot be written."""
    from foveate.data.pictures import WRITABLE

    if same and format == "same":
        return None
    suffix = f".{format.lower().lstrip('.')}"
    if suffix not in WRITABLE:
        names = ", ".join(s[1:] for s in WRITABLE) + (", or same" if same else "")
        raise InputError(f"cannot write format {format!r}; use one of {names}.")
    return suffix


def check_folder(out: Path) -> None:
    """Refuse an output that is a file. Raises: InputError."""
    if out.exists() and not out.is_dir():
        raise InputError(f"several files go into a folder, but {str(out)!r} is a file; name a folder.")


def items_of(found: Items, sources: list[Path], suffix: str | None, what: str = "pictures") -> Items:
    """Name the results of the files found. Raises: InputError when there are none."""
    from foveate.batch.run import targets

    if not found:
        raise InputError(f"no {what} in {', '.join(sorted({str(s) for s in sources}))}.")
    return targets(found, suffix)


def run_batch(
    items: Items,
    worker: Callable[..., dict[str, Any]],
    out: Path,
    settings: dict[str, Any],
    jobs: int,
    resume: bool,
    quiet: bool,
    engine: str = "process",
) -> "Summary":
    """Make every item that the journal does not show as done, and say what failed and how it went.

    Args:
        settings: what results depend on; results of other settings are made again.
    """
    from foveate.batch.run import run

    shown = not quiet and on_terminal()
    summary = run(items, worker, out, jobs, settings, progress=shown, resume=resume, engine=engine)
    for failure in summary.failed:
        note(f"foveate: {failure.source}: {failure.message}")
    if not quiet:
        done = f"{summary.done} done, {summary.skipped} skipped as done before, {len(summary.failed)} failed"
        note(f"{out}: {done}, {summary.seconds:.1f} s")
    return summary


def leave(summary: "Summary") -> None:
    """Leave with exit code 130 after an interruption, 2 after a failure."""
    if summary.interrupted:
        raise typer.Exit(130)
    if summary.failed:
        raise typer.Exit(2)


def numbers(option: str, text: str | None, between: str, count: int) -> tuple[int, ...] | None:
    """Whole numbers of an option, such as 640x480. Raises: InputError for anything else."""
    if text is None:
        return None
    parts = text.lower().split(between)
    if len(parts) != count or not all(part.strip().isdecimal() for part in parts):
        form = "WxH, such as 640x480" if count == 2 else "x,y,width,height, such as 0,0,256,256"
        raise InputError(f"{option} takes {form}, got {text!r}.")
    return tuple(int(part) for part in parts)
