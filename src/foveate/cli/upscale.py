"""foveate upscale: one picture or a folder of them, enlarged under a budget."""

import json
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import typer

from foveate.cli.batch import bar, check_folder, is_batch, items_of, leave, numbers, run_batch, split, suffix_of
from foveate.cli.console import note
from foveate.errors import InputError


def upscale(
    paths: Annotated[
        list[Path],
        typer.Argument(metavar="INPUT... OUTPUT", help="Pictures or folders, and last where the result goes."),
    ],
    scale: Annotated[
        float | None,
        typer.Option("--scale", "-s", help="Enlargement: 2, 3 or 4, or any such as 2.7 by some methods.  [default: 4]"),
    ] = None,
    size: Annotated[str | None, typer.Option("--size", help="WxH of the result instead, by some methods.")] = None,
    budget: Annotated[
        str, typer.Option("--budget", "-b", help="What to spend: a share (0.5, 50%), or '20 GFLOPs', '300 ms'.")
    ] = "1",
    method: Annotated[
        str,
        typer.Option(
            "--method", "-m", help="pcsr, scnet, espcn ... (`foveate list --wing restore`), or bicubic, lanczos, area."
        ),
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
      foveate upscale photo.jpg large.png --method bicubic --size 1920x1080
      foveate upscale holiday/ enlarged/ --scale 2 --jobs 2
    """
    sources, out = split("upscale", paths)
    if report is not None:
        check_report(report, [*sources, out])
    settings = {
        "scale": scale,
        "size": numbers("--size", size, "x", 2),
        "method": method,
        "budget": budget,
        "tile": tile,
        "device": device,
    }
    if not is_batch(sources, out):
        _one(sources[0], out, map, report, quiet, settings)
    else:
        _many(sources, out, map, report, format, jobs, resume, engine, quiet, settings)


def _one(source: Path, out: Path, map: Path | None, report: Path | None, quiet: bool, settings: dict[str, Any]) -> None:
    from foveate.restore.upscale import upscale as run

    with bar(quiet) as shown:
        line = shown.add_task(source.name, total=None)

        def progress(y: int, all: int) -> None:
            shown.update(line, completed=y, total=all)

        result = run(source, out, map=map or False, progress=progress, **settings)
    if report:
        write_json(report, result.report.to_dict())
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
    from foveate.data.pictures import list_pictures
    from foveate.restore.upscale import check, upscale_file

    check_folder(out)
    suffix = suffix_of(format, same=True)
    check(**settings)  # what is wrong for all of them is said once, before the first
    items = items_of(list_pictures(sources, skip=out), sources, suffix)
    if map is not None:
        _check_maps(map, out, items)
    worker = partial(upscale_file, maps=(out, map) if map else None, **settings)
    kept = {key: value for key, value in settings.items() if value is not None} | {"format": format, "map": str(map)}
    summary = run_batch(items, worker, out, kept, jobs, resume, quiet, engine)
    if report:
        write_json(report, entries(out, kept))
    leave(summary)


def check_report(report: Path, taken: list[Path]) -> None:
    """Refuse a report that cannot be written, or would overwrite a picture. Raises: InputError."""
    if not report.resolve().parent.is_dir() or report.is_dir():
        raise InputError(f"the report {str(report)!r} needs a folder that is there; make it, or choose another place.")
    if report.resolve() in {path.resolve() for path in taken}:
        raise InputError(f"the report would overwrite {str(report)!r}; give it another name.")


def _check_maps(maps: Path, out: Path, items: list[tuple[Path, Path]]) -> None:
    sources = {source.resolve() for source, _ in items}
    if maps.resolve() == out.resolve() or any((maps / t).with_suffix(".png").resolve() in sources for _, t in items):
        raise InputError(f"maps in {str(maps)!r} would overwrite pictures; give them a folder of their own.")


def entries(out: Path, settings: dict[str, Any]) -> list[dict[str, Any]]:
    """What the journal of a folder holds."""
    from foveate.batch.journal import Journal

    with Journal(out, settings) as journal:
        return [
            {"target": str(e.target), "state": e.state, "message": e.message, "report": e.report}
            for e in journal.entries()
        ]


def write_json(path: Path, value: Any) -> None:
    """Write a report. Raises: InputError when that cannot be done."""
    try:
        path.write_text(json.dumps(value, indent=2) + "\n")
    except OSError as error:
        raise InputError(f"cannot write the report {str(path)!r} ({error.strerror}); choose another place.") from error
