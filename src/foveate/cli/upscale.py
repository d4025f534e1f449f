"""foveate upscale: one picture or a folder of them, enlarged under a budget."""

import json
import sys
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import typer

from foveate.cli.console import note, on_terminal
from foveate.errors import InputError


def upscale(
    paths: Annotated[
        list[Path],
        typer.Argument(metavar="INPUT... OUTPUT", help="Pictures or folders, and last where the result goes."),
    ],
    scale: Annotated[float, typer.Option("--scale", "-s", help="Enlargement: 2, 3 or 4.")] = 4,
    budget: Annotated[
        str, typer.Option("--budget", "-b", help="What to spend: a share (0.5, 50%), or '20 GFLOPs', '300 ms'.")
    ] = "1",
    method: Annotated[
        str, typer.Option("--method", "-m", help="pcsr, adaptive-patch-exiting, scnet or espcn.")
    ] = "pcsr",
    map: Annotated[
        Path | None, typer.Option("--map", help="Write a picture of where the compute went (a folder for a batch).")
    ] = None,
    report: Annotated[
        Path | None, typer.Option("--report", help="Write FLOPs, time, memory, decisions as JSON.")
    ] = None,
    format: Annotated[
        str, typer.Option("--format", help="Files of a batch: png, tiff, jpg, webp, avif, or same.")
    ] = "png",
    jobs: Annotated[int, typer.Option("--jobs", "-j", help="Processes of a batch.")] = 1,
    resume: Annotated[bool, typer.Option("--resume/--again", help="Skip files done before, or make all again.")] = True,
    engine: Annotated[str, typer.Option("--engine", help="What runs a batch: process.")] = "process",
    tile: Annotated[
        int | None, typer.Option("--tile", help="Window side in pixels; smaller needs less memory.")
    ] = None,
    device: Annotated[str, typer.Option("--device", help="cpu, cuda, ...")] = "cpu",
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="No progress, no summary.")] = False,
) -> None:
    """Enlarge photographs, spending compute where they need it.

    One file in and a file name out writes that file; several files or a folder write into a folder, with a journal:
    run the same line again after an interruption and it goes on where it stopped.

    \b
    Examples:
      foveate upscale photo.jpg large.png --scale 4 --budget 0.5
      foveate upscale photo.jpg large.png --budget 0.5 --map where.png --report cost.json
      foveate upscale holiday/ enlarged/ --scale 2 --jobs 2
    """
    if len(paths) < 2:
        raise InputError(
            f"upscale needs an input and an output, got only {str(paths[0])!r}; add where the result goes."
        )
    *sources, out = paths
    if report is not None:
        _check_report(report, [*sources, out])
    settings = {"scale": scale, "method": method, "budget": budget, "tile": tile, "device": device}
    if len(sources) == 1 and not sources[0].is_dir() and not (out.is_dir() or out.suffix == ""):
        _one(sources[0], out, map, report, quiet, settings)
    else:
        _many(sources, out, map, report, format, jobs, resume, engine, quiet, settings)


def _one(source: Path, out: Path, map: Path | None, report: Path | None, quiet: bool, settings: dict[str, Any]) -> None:
    from rich.console import Console
    from rich.progress import Progress

    from foveate.restore.upscale import upscale as run

    with Progress(console=Console(file=sys.stderr), transient=True, disable=quiet or not sys.stderr.isatty()) as bar:
        line = bar.add_task(source.name, total=None)
        result = run(
            source, out, map=map or False, progress=lambda y, all: bar.update(line, completed=y, total=all), **settings
        )
    if report:
        _write_json(report, result.report.to_dict())
    if not quiet:
        note(f"{out}: {result.report}")


def _many(
    sources: list[Path],
    out: Path,
    map: Path | None,
    report: Path | None,
    format: str,
    jobs: int,
    resume: bool,
    engine: str,
    quiet: bool,
    settings: dict[str, Any],
) -> None:
    from foveate.batch.journal import Journal
    from foveate.batch.run import run, targets
    from foveate.data.pictures import WRITABLE, list_pictures
    from foveate.engine.budget import Budget
    from foveate.restore.upscale import network, upscale_file, whole_scale

    if out.exists() and not out.is_dir():
        raise InputError(f"several pictures go into a folder, but {str(out)!r} is a file; name a folder.")
    suffix = None if format == "same" else f".{format.lower().lstrip('.')}"
    if suffix is not None and suffix not in WRITABLE:
        raise InputError(f"cannot write format {format!r}; use one of {', '.join(s[1:] for s in WRITABLE)}, or same.")
    # What is wrong for all of them is said once, before the first.
    budget = Budget.parse(settings["budget"])
    model = network(settings["method"], whole_scale(settings["scale"]), settings["device"])
    if budget.unit == "share":
        model.check_share(budget.amount)
    if settings["tile"] is not None and settings["tile"] < 1:
        raise InputError(f"a tile has at least one pixel, got {settings['tile']}; leave it out for the default.")
    items = targets(list_pictures(sources, skip=out), suffix)
    if not items:
        raise InputError(f"no pictures in {', '.join(sorted({str(s) for s in sources}))}.")
    if map is not None:
        _check_maps(map, out, items)
    worker = partial(upscale_file, maps=(out, map) if map else None, **settings)
    kept = settings | {"format": format, "map": str(map)}
    summary = run(items, worker, out, jobs, kept, progress=not quiet and on_terminal(), resume=resume, engine=engine)
    for failure in summary.failed:
        note(f"foveate: {failure.source}: {failure.message}")
    if report:
        with Journal(out, kept) as journal:
            _write_json(report, [_entry(e) for e in journal.entries()])
    if not quiet:
        done = f"{summary.done} done, {summary.skipped} skipped as done before, {len(summary.failed)} failed"
        note(f"{out}: {done}, {summary.seconds:.1f} s")
    if summary.interrupted:
        raise typer.Exit(130)
    if summary.failed:
        raise typer.Exit(2)


def _check_report(report: Path, taken: list[Path]) -> None:
    if not report.resolve().parent.is_dir() or report.is_dir():
        raise InputError(f"the report {str(report)!r} needs a folder that is there; make it, or choose another place.")
    if report.resolve() in {path.resolve() for path in taken}:
        raise InputError(f"the report would overwrite {str(report)!r}; give it another name.")


def _check_maps(maps: Path, out: Path, items: list[tuple[Path, Path]]) -> None:
    sources = {source.resolve() for source, _ in items}
    if maps.resolve() == out.resolve() or any((maps / t).with_suffix(".png").resolve() in sources for _, t in items):
        raise InputError(f"maps in {str(maps)!r} would overwrite pictures; give them a folder of their own.")


def _entry(entry: Any) -> dict[str, Any]:
    return {"target": str(entry.target), "state": entry.state, "message": entry.message, "report": entry.report}


def _write_json(path: Path, value: Any) -> None:
    try:
        path.write_text(json.dumps(value, indent=2) + "\n")
    except OSError as error:
        raise InputError(f"cannot write the report {str(path)!r} ({error.strerror}); choose another place.") from error
