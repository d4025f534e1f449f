"""What benchmarks found, as Markdown, JSON and a figure.

`ops.json` is a list of entries, as `foveate.bench.case.measured` yields them. Running an operator again replaces its
entries on that device and leaves the others alone; `ops.md` and `ops.png` are made from the entries.
"""

import json
from collections.abc import Iterable
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Any

from foveate.bench.frontier import replace_text
from foveate.errors import InputError
from foveate.meter import slope
from foveate.proofs.evidence import markdown_row
from foveate.proofs.report import figure_to_picture

if TYPE_CHECKING:
    from PIL import Image

    from foveate.bench.case import Entry

HEADINGS = ("input", "pass", "against", "ms of it", "ms, fast", "speed-up", "MB of it", "MB, fast", "memory", "apart")


def write_report(entries: "Iterable[Entry]", folder: str | Path) -> Path:
    """Write entries into a results folder, keeping those of other operators and devices.

    Returns: the path of ops.md.
    Raises: InputError when ops.json is there but cannot be read, or the folder cannot be written to.
    """
    folder, new = Path(folder), list(entries)
    replaced = {(entry["op"], entry["device"]) for entry in new}
    try:
        folder.mkdir(parents=True, exist_ok=True)
        kept = [e for e in read_report(folder / "ops.json") if (e["op"], e["device"]) not in replaced]
        found = sorted(kept + new, key=lambda e: (e["device"], e["op"]))  # stable: the order of a run is kept
        picture = figure(found)
        if picture is not None:
            picture.save(folder / "ops.png")
        replace_text(folder / "ops.json", json.dumps(found, indent=1, ensure_ascii=False) + "\n")
        replace_text(folder / "ops.md", page(found) + ("\n![Time against size](ops.png)\n" if picture else ""))
    except OSError as error:
        raise InputError(f"--out {folder} cannot be written: {error.strerror}. Give another folder.") from error
    return folder / "ops.md"


def read_report(path: Path) -> "list[Entry]":
    """Read an ops.json; an absent file is an empty list. Raises: InputError when it is damaged."""
    try:
        entries = json.loads(path.read_text(encoding="utf-8")) if path.exists() else []
        page(entries)
    except (ValueError, KeyError, TypeError) as error:
        raise InputError(f"{path} is not a list of benchmarks ({error}). Delete it and run them again.") from error
    return list(entries)


def page(entries: "Iterable[Entry]") -> str:
    """The report in Markdown: a table per operator and device, with how its times grow."""
    groups: dict[tuple[str, str], list[Entry]] = {}
    places: dict[str, None] = {}
    for entry in entries:
        groups.setdefault((entry["op"], entry["device"]), []).append(entry)
        places[", ".join(f"{key} {value}" for key, value in entry["environment"].items())] = None
    parts = [
        "# Operators",
        "Written by `foveate bench ops`. Every operator's fast path against its plain PyTorch reference and against "
        "other ways to the same values, run in turn. A speed-up is the median of pairwise ratios, with quartiles; "
        "memory is what a call needs at its peak; `backward` is a forward and a backward pass; `apart` is the largest "
        "difference of values or gradients over the largest value, empty where the other way computes something else.",
    ]
    for (name, device), found in groups.items():
        lines = [markdown_row(HEADINGS), markdown_row(["---", "---", "---", *["---:"] * 7])]
        lines += [markdown_row(cells(entry)) for entry in found]
        parts += [f"## {name} ({device})", "\n".join(lines), *(f"{line}." for line in growth(found))]
    parts += [f"Measured on: {place}." for place in places]
    return "\n\n".join(parts) + "\n"


def cells(entry: "Entry") -> list[str]:
    """An entry as the cells of a table."""
    theirs, ours = (f"{1e3 * seconds:.3g}" for seconds in entry["seconds"])
    low, high = entry["speedup_range"]
    memory = ["" if size is None else f"{size / 1e6:.3g}" for size in entry["peak_bytes"]]
    ratio = "" if entry["memory_ratio"] is None else f"{entry['memory_ratio']:.2f}x"
    speed = f"{entry['speedup']:.2f}x ({low:.2f} to {high:.2f})"
    apart = "" if entry["apart"] is None else f"{entry['apart']:.1g}"
    return [entry["size"], entry["pass"], entry["against"], theirs, ours, speed, *memory, ratio, apart]


def growth(entries: "Iterable[Entry]") -> list[str]:
    """How times grow with n, a line per pass, from the slopes of log time over log n; none below three sizes."""
    lines = []
    for (direction, unit), times in curves(entries).items():
        slopes = [f"{name} n^{slope(points):.2f}" for name, points in times.items() if len(points) > 2]
        if slopes:
            lines.append(f"Time, {direction}, n {unit}: {', '.join(slopes)}")
    return lines


def curves(entries: "Iterable[Entry]") -> dict[tuple[str, str], dict[str, dict[int, float]]]:
    """Seconds by (pass, unit), way and n; the fast path, timed against every other, gets the median of its times."""
    ours: dict[tuple[str, str], dict[int, list[float]]] = {}
    found: dict[tuple[str, str], dict[str, dict[int, float]]] = {}
    for entry in entries:
        key, (theirs, own) = (entry["pass"], entry["unit"]), entry["seconds"]
        found.setdefault(key, {"fast": {}}).setdefault(entry["against"], {})[entry["n"]] = theirs
        ours.setdefault(key, {}).setdefault(entry["n"], []).append(own)
        found[key]["fast"][entry["n"]] = median(ours[key][entry["n"]])
    return found


def figure(entries: "Iterable[Entry]") -> "Image.Image | None":
    """Milliseconds against n, a panel per operator, pass and device; None where matplotlib is missing."""
    groups: dict[str, list[Entry]] = {}
    for entry in entries:
        groups.setdefault(f"{entry['op']}, {entry['pass']} ({entry['device']})", []).append(entry)
    try:
        from matplotlib.figure import Figure
    except ImportError:
        return None
    columns = 4
    rows = -(-len(groups) // columns)
    drawn: Any = Figure((4.2 * columns, 3.2 * max(rows, 1)), layout="constrained")
    panels = drawn.subplots(max(rows, 1), columns, squeeze=False).flatten()
    for panel in panels[len(groups) :]:
        panel.set_axis_off()
    for panel, (title, found) in zip(panels, groups.items(), strict=False):
        ((_, unit), times), *_ = curves(found).items()
        for name, points in times.items():
            values = [1e3 * points[n] for n in sorted(points)]
            panel.loglog(sorted(points), values, "o-", linewidth=2.5 if name == "fast" else 1, label=name)
        panel.set_title(title, fontsize=10)
        panel.set_xlabel(unit)
        panel.set_ylabel("ms")
        panel.grid(alpha=0.3, which="both")
        panel.legend(frameon=False, fontsize=8)
    return figure_to_picture(drawn, dpi=80)
