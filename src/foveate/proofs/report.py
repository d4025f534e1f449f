"""The results page: what all proofs found, as Markdown, JSON and figures.

`results.json` is a list of entries, one per system and mode; an entry is `Evidence.to_dict()` and the name of its
figure. Running one proof again replaces its entry and leaves the others alone; `index.md` is written from the entries.
"""

import importlib.resources
import json
import os
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from foveate.errors import InputError, MissingExtraError
from foveate.proofs.evidence import Evidence, markdown_row

if TYPE_CHECKING:
    from PIL import Image

RESULTS = Path("docs/results")
Entry = dict[str, Any]


def write_results(evidences: Iterable[Evidence], folder: str | Path = RESULTS) -> Path:
    """Write evidence into a results folder, keeping what other proofs left there.

    Args:
        evidences: what proofs found.
        folder: made when absent; gets index.md, results.json and one PNG per figure.

    Returns: the path of index.md.
    Raises: InputError when results.json is there but cannot be read.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    entries = {_key(entry): entry for entry in read_results(folder / "results.json")}
    for evidence in evidences:
        entry = {**evidence.to_dict(), "figure": None}
        if evidence.figure is not None:
            entry["figure"] = f"{evidence.system}-{evidence.mode or 'quick'}.png"
            evidence.figure.save(folder / entry["figure"])
        entries[_key(entry)] = entry
    ordered = [entries[key] for key in sorted(entries)]
    _write(folder / "results.json", json.dumps(ordered, indent=2, ensure_ascii=False, allow_nan=False) + "\n")
    _write(folder / "index.md", page(ordered))
    return folder / "index.md"


def read_results(path: str | Path) -> list[Entry]:
    """Read a results.json; an absent file is an empty list. Raises: InputError when it is damaged."""
    path = Path(path)
    try:
        entries = json.loads(path.read_text(encoding="utf-8")) if path.exists() else []
        for entry in entries:
            Evidence.from_dict(entry)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise InputError(f"{path} is not a list of results ({error}). Delete it and run the proofs again.") from error
    return list(entries)


def last_results(slug: str) -> list[Entry]:
    """The last figures of a system: from docs/results under the current folder, else the copy inside foveate."""
    packaged = importlib.resources.files("foveate.catalog") / "results.json"
    with importlib.resources.as_file(packaged) as inside:
        for path in (RESULTS / "results.json", inside):
            found = [entry for entry in read_results(path) if entry["system"] == slug]
            if found:
                return found
    return []


def page(entries: Iterable[Entry]) -> str:
    """The results page in Markdown: a table of all verdicts, then a section per entry."""
    entries = list(entries)
    held = sum(bool(entry["holds"]) for entry in entries)
    lines = [
        "# Results",
        "",
        "Each line is a published claim, run again by `foveate prove <system>`: baseline and system in the same run. "
        f"{held} of {len(entries)} hold at the scale tried here.",
        "",
        "| system | claim | claimed | measured | holds | seconds | mode |",
        "| --- | --- | --- | --- | --- | ---: | --- |",
    ]
    for e in entries:
        verdict = "yes" if e["holds"] else "**no**"
        link = f"[{e['system']}](#{e['system']}-{e['mode'] or 'quick'})"
        cells = [link, e["claim"], e["claimed"], e["measured"], verdict, f"{e['seconds']:.0f}", e["mode"]]
        lines.append(markdown_row(cells))
    sections = []
    for entry in entries:
        section = Evidence.from_dict(entry).markdown()
        if entry.get("figure"):
            section += f"\n![{entry['system']}: {entry['measured']}]({entry['figure']})\n"
        sections.append(section)
    return "\n".join(lines) + "\n\n" + "\n".join(sections)


def figure_to_picture(figure: Any, dpi: int = 120) -> "Image.Image":
    """Turn a matplotlib figure into a PIL picture, without a window system.

    Raises: MissingExtraError when matplotlib is not installed.
    """
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
    except ImportError as error:
        raise MissingExtraError("Figures need matplotlib. Install it: pip install 'foveate[plot]'") from error
    from PIL import Image

    figure.set_dpi(dpi)
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    return Image.frombytes("RGBA", canvas.get_width_height(), bytes(canvas.buffer_rgba())).convert("RGB")


def _key(entry: Entry) -> tuple[str, str]:
    return entry["system"], entry["mode"]


def _write(path: Path, text: str) -> None:
    """Write beside the target and rename, so that a killed run leaves the earlier file whole."""
    partial = path.with_name(path.name + ".partial")
    partial.write_text(text, encoding="utf-8")
    os.replace(partial, path)
