"""foveate downscale, foveate rescale-cycle: pictures made smaller, and what is left of them when they are enlarged."""

from functools import partial
from math import isfinite
from pathlib import Path
from typing import Annotated, Any

import typer

from foveate.cli.batch import bar, check_folder, is_batch, items_of, leave, numbers, run_batch, split, suffix_of
from foveate.cli.console import note, print_json, print_table
from foveate.cli.upscale import check_report, entries, write_json
from foveate.errors import InputError

_Scale = Annotated[float | None, typer.Option("--scale", "-s", help="How many times shorter the sides.  [default: 4]")]
_Size = Annotated[str | None, typer.Option("--size", help="WxH of the small picture instead.")]
_Tile = Annotated[int | None, typer.Option("--tile", help="Window side in pixels; smaller needs less memory.")]
_Device = Annotated[str, typer.Option("--device", help="cpu, cuda, ...")]


def downscale(
    paths: Annotated[
        list[Path],
        typer.Argument(metavar="INPUT... OUTPUT", help="Pictures or folders, and last where the result goes."),
    ],
    scale: _Scale = None,
    size: _Size = None,
    method: Annotated[
        str,
        typer.Option("--method", "-m", help="lanczos, area, bicubic, adk-net, bidirectional-rescaling or iarn."),
    ] = "lanczos",
    report: Annotated[Path | None, typer.Option("--report", help="Write FLOPs, time and memory as JSON.")] = None,
    format: Annotated[
        str, typer.Option("--format", help="Files of a batch: png, tiff, jpg, webp, avif, or same.")
    ] = "png",
    jobs: Annotated[int, typer.Option("--jobs", "-j", help="Processes of a batch.")] = 1,
    resume: Annotated[bool, typer.Option("--resume/--again", help="Skip files done before, or make all again.")] = True,
    tile: _Tile = None,
    device: _Device = "cpu",
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="No progress, no summary.")] = False,
) -> None:
    """Shrink pictures, by a filter or by a network that keeps what enlarging needs.

    \b
    Examples:
      foveate downscale photo.png small.png --scale 4
      foveate downscale photo.png small.png --size 640x480 --method area
      foveate downscale holiday/ small/ --scale 2.5 --jobs 2
    """
    from foveate.data.pictures import list_pictures
    from foveate.restore.downscale import check, downscale_file
    from foveate.restore.downscale import downscale as run

    sources, out = split("downscale", paths)
    if report is not None:
        check_report(report, [*sources, out])
    sides = numbers("--size", size, "x", 2)
    settings: dict[str, Any] = {"scale": scale, "size": sides, "method": method, "tile": tile, "device": device}
    if not is_batch(sources, out):
        with bar(quiet) as shown:
            line = shown.add_task(sources[0].name, total=None)

            def progress(y: int, all: int) -> None:
                shown.update(line, completed=y, total=all)

            done = run(sources[0], out, progress=progress, **settings).report
        if report:
            write_json(report, done.to_dict())
        if not quiet:
            note(f"{out}: {done}")
        return
    check_folder(out)
    suffix = suffix_of(format, same=True)
    check(**settings)
    items = items_of(list_pictures(sources, skip=out), sources, suffix)
    kept = {key: value for key, value in settings.items() if value is not None} | {"format": format}
    summary = run_batch(items, partial(downscale_file, **settings), out, kept, jobs, resume, quiet)
    if report:
        write_json(report, entries(out, kept))
    leave(summary)


def rescale_cycle(
    picture: Annotated[Path, typer.Argument(metavar="PICTURE", help="A picture.")],
    scale: _Scale = None,
    size: _Size = None,
    methods: Annotated[
        str,
        typer.Option(
            "--methods", "-m", help="Methods between commas; a+b shrinks by a and enlarges by b, iarn does both."
        ),
    ] = "lanczos+bicubic,area+bicubic,bicubic+bicubic",
    times: Annotated[int, typer.Option("--times", "-n", help="Rounds.")] = 1,
    out: Annotated[
        Path | None, typer.Option("--out", help="Folder for the pictures of all rounds and their differences.")
    ] = None,
    json: Annotated[bool, typer.Option("--json", help="As JSON.")] = False,
    tile: _Tile = None,
    device: _Device = "cpu",
) -> None:
    """Shrink a picture and enlarge it again, some times over: what survives?

    PSNR (dB) and SSIM are against the original; `change` is the PSNR (dB) against the round before, which rises when a
    method leaves its own results as they are.

    \b
    Examples:
      foveate rescale-cycle photo.png --scale 4
      foveate rescale-cycle photo.png --scale 2.5 --methods lanczos+bicubic,lanczos+lanczos --times 5 --out rounds/
    """
    from dataclasses import asdict

    from foveate.restore.downscale import pair_of
    from foveate.restore.downscale import rescale_cycle as run

    sides: Any = numbers("--size", size, "x", 2)
    names = [name.strip() for name in methods.split(",") if name.strip()]
    if not names:
        raise InputError(f"--methods names no method, got {methods!r}; write for example lanczos+bicubic,iarn.")
    for name in names:
        pair_of(name, scale, sides, device)
    if out is not None:
        check_folder(out)
        out.mkdir(parents=True, exist_ok=True)
    cycles = [
        cycle
        for name in names
        for cycle in run(picture, scale=scale, size=sides, method=name, times=times, out=out, tile=tile, device=device)
    ]
    if json:
        print_json([{k: _finite(v) for k, v in asdict(cycle).items()} for cycle in cycles])
        return
    figures = [[c.method, f"{c.number}", f"{c.psnr:.2f}", f"{c.ssim:.4f}", f"{c.change:.2f}"] for c in cycles]
    columns = ["method", "round", "PSNR", "SSIM", "change"]
    print_table(columns, figures, columns[1:])
    if out is not None:
        note(f"pictures in {out}")


def _finite(value: Any) -> Any:
    """A value as JSON can hold it: None for an infinite PSNR."""
    return None if isinstance(value, float) and not isfinite(value) else value
