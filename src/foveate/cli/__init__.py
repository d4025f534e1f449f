"""The command line: `foveate <verb>`.

One file per group of verbs; a verb imports what is heavy when it runs, so that `foveate --help` does not load torch.
Results go to the output stream (`--json` for machines), everything else to the error stream. Exit codes: 0 done,
1 a claim does not hold, 2 bad input, 130 interrupted (typer sees to that one).
"""

import sys
from typing import Annotated

import typer

from foveate import __version__
from foveate.cli.catalogue import list_, show
from foveate.cli.demo import demo
from foveate.cli.measure import measure
from foveate.cli.prove import prove
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
    """


app.command()(upscale)
app.command("list")(list_)
app.command()(show)
app.command()(prove)
app.command()(measure)
app.command()(demo)


def main() -> None:
    """Run the command line; an error that foveate raises on purpose is one line and exit code 2."""
    try:
        app()
    except FoveateError as error:
        typer.echo(f"foveate: {error}", err=True)
        sys.exit(2)
