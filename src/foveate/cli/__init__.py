"""The command line: `foveate <verb>`.

One file per group of verbs; a verb imports what is heavy when it runs, so that `foveate --help` does not load torch.
Results go to the output stream (`--json` for machines), everything else to the error stream. Exit codes: 0 done,
1 a claim does not hold, 2 bad input, 130 interrupted (typer sees to that one).
"""

import sys
import warnings
from typing import Annotated

import typer

from foveate import __version__
from foveate.cli.bench import bench
from foveate.cli.catalogue import list_, show
from foveate.cli.compress import compress, decompress, inspect
from foveate.cli.demo import demo
from foveate.cli.downscale import downscale, rescale_cycle
from foveate.cli.measure import measure
from foveate.cli.prove import prove
from foveate.cli.stylize import stylize
from foveate.cli.tokens import tokens
from foveate.cli.upscale import upscale
from foveate.errors import FoveateError

app = typer.Typer(
    name="foveate",
    no_args_is_help=True,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"foveate {__version__}")
        raise typer.Exit()


@app.callback()
def _face(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version and leave.")
    ] = False,
) -> None:
    """Spend pixels, tokens, layers, bits and parameters where an image needs them.

    \b
    Examples:
      foveate list --works
      foveate upscale photo.jpg large.png --scale 4 --budget 0.5
      foveate compress photo.png photo.fov --budget "0.5 bpp"
    """


app.command()(upscale)
app.command()(downscale)
app.command("rescale-cycle")(rescale_cycle)
app.command()(compress)
app.command()(decompress)
app.command()(inspect)
app.command("list")(list_)
app.command()(show)
app.command()(prove)
app.command()(measure)
app.command()(tokens)
app.add_typer(bench, name="bench")
app.command()(demo)
app.command()(stylize)


def main() -> None:
    """Run the command line; an error in what was asked is one line and exit code 2, a warning is one line too."""
    warnings.showwarning = lambda message, *_, **__: typer.echo(f"foveate: {message}", err=True)
    try:
        sys.exit(app(standalone_mode=False))
    except FoveateError as error:
        typer.echo(f"foveate: {error}", err=True)
        sys.exit(2)
    except (KeyboardInterrupt, typer.Abort):
        sys.exit(130)
    except Exception as error:
        # typer brings its own copy of click, or uses the one installed; their usage errors have no common base.
        message = getattr(error, "format_message", None)
        if message is None:
            raise
        text = message() if type(error).__name__ == "NoArgsIsHelpError" else f"foveate: {message()}"
        typer.echo(text, err=True)
        sys.exit(2)
