"""foveate stylize: one picture or a folder of them, painted in a style."""

from functools import partial
from pathlib import Path
from typing import Annotated, Any

import typer

from foveate.cli.batch import bar, check_folder, is_batch, items_of, leave, run_batch, split, suffix_of
from foveate.cli.console import note


def stylize(
    paths: Annotated[
        list[Path],
        typer.Argument(metavar="INPUT... OUTPUT", help="Pictures or folders, and last where the result goes."),
    ],
    style: Annotated[
        str, typer.Option("--style", "-s", help="Name of a style (--list shows them), or a file of weights.")
    ] = "strokes",
    strength: Annotated[float, typer.Option("--strength", help="1 for the style alone, 0 for the picture.")] = 1.0,
    format: Annotated[str, typer.Option("--format", help="Files of a batch: png, tiff, jpg, webp or avif.")] = "png",
    jobs: Annotated[int, typer.Option("--jobs", "-j", help="Processes of a batch.")] = 1,
    resume: Annotated[bool, typer.Option("--resume/--again", help="Skip files done before, or make all again.")] = True,
    tile: Annotated[
        int | None, typer.Option("--tile", help="Window side in pixels; smaller needs less memory.")
    ] = None,
    device: Annotated[str, typer.Option("--device", help="cpu, cuda, ...")] = "cpu",
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="No progress, no summary.")] = False,
    list_: Annotated[
        bool, typer.Option("--list", callback=lambda wanted: _show(wanted), is_eager=True, help="Print the styles.")
    ] = False,
) -> None:
    """Paint photographs in a style.

    \b
    Examples:
      foveate stylize photo.jpg out.png
      foveate stylize photo.jpg out.png --style mosaic --strength 0.7
      foveate stylize holiday/ painted/ --style strokes --jobs 2
    """
    from foveate.data.pictures import list_pictures
    from foveate.learn.stylize import check, style_network, stylize_file

    sources, out = split("stylize", paths)
    settings: dict[str, Any] = {"style": style, "strength": strength, "tile": tile, "device": device}
    if not is_batch(sources, out):
        _one(sources[0], out, quiet, settings)
        return
    suffix = suffix_of(format)
    check(strength, tile)
    style_network(style, device)
    check_folder(out)
    items = items_of(list_pictures(sources, skip=out), sources, suffix)
    kept = {name: str(value) for name, value in settings.items()} | {"suffix": suffix}
    leave(run_batch(items, partial(stylize_file, **settings), out, kept, jobs, resume, quiet))


def _one(source: Path, out: Path, quiet: bool, settings: dict[str, Any]) -> None:
    from foveate.learn.stylize import stylize as run

    with bar(quiet) as shown:
        line = shown.add_task(source.name, total=None)
        report = run(source, out, progress=lambda y, all: shown.update(line, completed=y, total=all), **settings).report
    if not quiet:
        note(f"{out}: {report}")


def _show(wanted: bool) -> None:
    if wanted:
        from foveate.learn.stylize import styles

        typer.echo("\n".join(styles()))
        raise typer.Exit()
