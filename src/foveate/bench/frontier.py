"""Quality against what it costs: entries of several methods as JSON, a table in Markdown and a figure.

An entry is one method at one setting on one set of pictures: a dict with "method", "setting", "pictures" (the name of
the set) and the numbers of the columns. `<name>.json` holds all of them; running a method again replaces its entries on
those pictures and leaves the others alone. `<name>.md` and `<name>.png` are made from it.
"""

import json
import os
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from foveate.errors import InputError
from foveate.proofs.evidence import markdown_row
from foveate.proofs.report import figure_to_picture

if TYPE_CHECKING:
    from PIL import Image

Entry = dict[str, Any]


@dataclass(frozen=True)
class Panel:
    """A part of the figure: every method a line through its entries.

    Args:
        x, y: keys of columns.
        log: whether x is drawn on a logarithmic axis.
    """

    x: str
    y: str
    log: bool = False


@dataclass(frozen=True)
class Report:
    """What is written about entries.

    Args:
        name: of the files.
        title, text: head of the page.
        columns: key of a number -> heading and format, such as {"bpp": ("bits per pixel", ".3f")}.
        panels: of the figure, one row for each set of pictures.
    """

    name: str
    title: str
    text: str
    columns: Mapping[str, tuple[str, str]]
    panels: tuple[Panel, ...]

    @property
    def headings(self) -> tuple[str, ...]:
        """Of the table."""
        return ("method", "setting", *(heading for heading, _ in self.columns.values()))

    def cells(self, entry: Entry) -> list[str]:
        """An entry as a row of the table; empty where it has no such number."""
        numbers = ((entry.get(key), form) for key, (_, form) in self.columns.items())
        return [entry["method"], entry["setting"], *("" if v is None else f"{v:{form}}" for v, form in numbers)]

    def page(self, entries: Iterable[Entry]) -> str:
        """The page in Markdown, a table for each set of pictures."""
        parts = [f"# {self.title}", self.text]
        for pictures, found in _by(entries, "pictures").items():
            rows = [self.headings, ["---", "---", *["---:"] * len(self.columns)], *map(self.cells, found)]
            parts += [f"## {pictures}", "\n".join(map(markdown_row, rows))]
        places = dict.fromkeys(_place(entry["environment"]) for entry in entries if "environment" in entry)
        return "\n\n".join([*parts, *(f"Measured on: {place}." for place in places)]) + "\n"

    def read(self, folder: Path) -> list[Entry]:
        """Entries written before. Raises: InputError when the file is damaged."""
        path = folder / f"{self.name}.json"
        try:
            entries = list(json.loads(path.read_text(encoding="utf-8"))) if path.exists() else []
            self.page(entries)
        except (ValueError, KeyError, TypeError) as error:
            raise InputError(f"{path} is not a list of benchmarks ({error}). Delete it and run them again.") from error
        return entries

    def write(self, entries: Iterable[Entry], folder: str | Path) -> Path:
        """Write entries beside those of other methods and pictures.

        Returns: the path of the page.
        Raises: InputError when what is there cannot be read, or the folder cannot be written to.
        """
        folder, new = Path(folder), list(entries)
        replaced = {(entry["method"], entry["pictures"]) for entry in new}
        try:
            folder.mkdir(parents=True, exist_ok=True)
            kept = [e for e in self.read(folder) if (e["method"], e["pictures"]) not in replaced]
            found = sorted(kept + new, key=lambda e: (e["pictures"], e["method"]))  # stable: settings stay in order
            picture = self.figure(found)
            if picture is not None:
                picture.save(folder / f"{self.name}.png")
            shown = f"\n![{self.title}]({self.name}.png)\n" if picture else ""
            replace_text(folder / f"{self.name}.json", json.dumps(found, indent=1, ensure_ascii=False) + "\n")
            replace_text(folder / f"{self.name}.md", self.page(found) + shown)
        except OSError as error:
            raise InputError(f"{folder} cannot be written: {error.strerror}. Give another folder.") from error
        return folder / f"{self.name}.md"

    def figure(self, entries: Iterable[Entry]) -> "Image.Image | None":
        """Panels side by side, sets of pictures below each other; None where matplotlib is missing."""
        try:
            from matplotlib.figure import Figure
            from matplotlib.ticker import LogLocator, NullFormatter, StrMethodFormatter
        except ImportError:
            return None
        entries = list(entries)
        sets, looks = _by(entries, "pictures"), dict[str, dict[str, str]]()
        visible = {e["method"] for e in entries for p in self.panels if None not in (e[p.x], e[p.y])}
        for number, method in enumerate(sorted(visible)):
            looks[method] = {"color": f"C{number % 10}", "linestyle": ("-", "--", ":")[number // 10 % 3]}
        drawn: Any = Figure((6.4 * len(self.panels), 4.8 * max(len(sets), 1)), layout="constrained")
        grid = drawn.subplots(max(len(sets), 1), len(self.panels), squeeze=False)
        for row, (pictures, found) in zip(grid, sets.items(), strict=False):
            for place, panel in zip(row, self.panels, strict=True):
                for method, own in _by(found, "method").items():
                    points = sorted((e[panel.x], e[panel.y]) for e in own if None not in (e[panel.x], e[panel.y]))
                    if points:
                        place.plot(*zip(*points, strict=True), marker="o", markersize=4, label=method, **looks[method])
                place.set_title(pictures, fontsize=10)
                place.set_xlabel(self.columns[panel.x][0])
                place.set_ylabel(self.columns[panel.y][0])
                if panel.log:
                    place.set_xscale("log")
                    few = place.get_xlim()[1] > 1000 * place.get_xlim()[0]
                    place.xaxis.set_major_locator(LogLocator(subs=(1,) if few else (1, 2, 5)))
                    place.xaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
                    place.xaxis.set_minor_formatter(NullFormatter())
                place.grid(alpha=0.3, which="both")
            shown = {name: line for place in row for line, name in zip(*place.get_legend_handles_labels(), strict=True)}
            place.legend(shown.values(), shown, frameon=False, fontsize=8, loc="center left", bbox_to_anchor=(1, 0.5))
        return figure_to_picture(drawn, dpi=90)


def averaged(figures: Iterable[Mapping[str, float | None]], over: Callable[[list[float]], float]) -> dict[str, Any]:
    """Numbers of several pictures as one, key by key; None where one of them has none."""
    rows = list(figures)
    columns = {key: [row[key] for row in rows] for key in rows[0]}
    return {
        key: None if any(v is None for v in values) else over([v for v in values if v is not None])
        for key, values in columns.items()
    }


def _by(entries: Iterable[Entry], key: str) -> dict[str, list[Entry]]:
    groups: dict[str, list[Entry]] = {}
    for entry in entries:
        groups.setdefault(entry[key], []).append(entry)
    return groups


def _place(environment: Mapping[str, Any]) -> str:
    return ", ".join(f"{key} {value}" for key, value in environment.items())


def replace_text(path: Path, text: str) -> None:
    """Write beside the target and rename, so that a killed run leaves the earlier file whole."""
    partial = path.with_name(path.name + ".partial")
    partial.write_text(text, encoding="utf-8")
    os.replace(partial, path)
