"""How verbs print: rich tables on a terminal, tab-separated lines in a pipe, JSON when asked.

rich is imported when a table is printed, not before: it would double the time of `foveate --help`.
"""

import json
import sys
from collections.abc import Sequence
from typing import Any

import typer


def on_terminal() -> bool:
    """Whether the output stream is a terminal, and so a person reads it."""
    return sys.stdout.isatty()


def print_table(columns: Sequence[str], rows: Sequence[Sequence[str]], right: Sequence[str] = ()) -> None:
    """Print rows under headings; in a pipe without headings, one tab between cells.

    Args:
        columns: headings.
        rows: cells, one per column.
        right: headings of the columns of numbers.
    """
    if not on_terminal():
        for row in rows:
            typer.echo("\t".join(row))
        return
    from rich.box import SIMPLE_HEAD
    from rich.console import Console
    from rich.table import Table

    table = Table(box=SIMPLE_HEAD, pad_edge=False)
    for column in columns:
        table.add_column(column, justify="right" if column in right else "left", overflow="fold")
    for row in rows:
        table.add_row(*row)
    Console().print(table)


def print_json(value: Any) -> None:
    """Print JSON-safe values, readable by machines and people."""
    typer.echo(json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False))


def note(text: str) -> None:
    """Say something beside the result, on the error stream."""
    typer.echo(text, err=True)
