"""What a proof is given and what it returns.

A proof runs a system and its baseline in the same process on the same pictures and says whether the system's headline
claim holds at our scale. It takes a `ProofContext` (where to run, how long, on what) and returns `Evidence`: rows of
figures, the claimed and the measured ratio, and the verdict. A failed claim is a result like any other.
"""

import random
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from math import isfinite
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from foveate.errors import InputError

if TYPE_CHECKING:
    from PIL import Image
    from rich.table import Table
    from torch import Generator, Tensor

T = TypeVar("T")


@dataclass(frozen=True)
class ProofContext:
    """Where, how long and on what a proof runs. Making one seeds all random numbers.

    Args:
        device: torch device, e.g. "cpu", "cuda", "cuda:1".
        seed: of Python's, NumPy's and torch's random numbers.
        full: the longer experiment (up to 5 minutes) instead of the quick one (up to 60 s on two cores).
        data: folder with the picture sets of the literature, one folder per set (set5/, kodak12/ ...), or None.
        out: folder for files that the proof wants to leave behind, or None.
        progress: show progress bars when the error stream is a terminal.

    Raises: InputError for a device this machine lacks, or a data folder that is not there.
    """

    device: str = "cpu"
    seed: int = 0
    full: bool = False
    data: Path | None = None
    out: Path | None = None
    progress: bool = True

    def __post_init__(self) -> None:
        _check_device(self.device)
        for name in ("data", "out"):
            value = getattr(self, name)
            object.__setattr__(self, name, None if value is None else Path(value))
        if self.data is not None and not self.data.is_dir():
            raise InputError(f"--data {self.data} is not a folder. Give the one that holds set5/, kodak12/ and so on.")
        self.seed_everything()

    @property
    def quick(self) -> bool:
        """Whether to run the short experiment."""
        return not self.full

    @property
    def mode(self) -> str:
        """ "quick" or "full"."""
        return "full" if self.full else "quick"

    def seed_everything(self) -> None:
        """Set the seeds of Python, NumPy and torch."""
        import numpy as np
        import torch

        random.seed(self.seed)
        np.random.seed(self.seed % 2**32)  # noqa: NPY002  (other people's code draws from the global generator)
        torch.manual_seed(self.seed)

    def generator(self) -> "Generator":
        """A fresh torch.Generator on the device, seeded with `seed`."""
        import torch

        return torch.Generator(device=self.device).manual_seed(self.seed)

    def photographs(self) -> "list[tuple[str, Tensor]]":
        """Photographs that every machine has. Shape: [3, H, W] in 0..1 each, on the device."""
        from foveate.data import pictures

        return [(name, picture.to(self.device)) for name, picture in pictures.samples().items()]

    def folder(self, name: str) -> Path | None:
        """The folder `data/name`, or None when it is not at hand and the proof has to make do without."""
        if self.data is None or not (self.data / name).is_dir():
            return None
        return self.data / name

    def require(self, name: str) -> Path:
        """The folder `data/name`. Raises: InputError that says how to give it."""
        found = self.folder(name)
        if found is not None:
            return found
        if self.data is None:
            raise InputError(f"This proof needs the pictures {name}/. Pass --data DIR, a folder in which {name}/ lies.")
        there = ", ".join(f"{p.name}/" for p in sorted(self.data.iterdir()) if p.is_dir()) or "no folder"
        raise InputError(f"This proof needs {name}/ in --data {self.data}, where lies: {there}. Put {name}/ there.")

    def track(self, iterable: Iterable[T], text: str) -> Iterator[T]:
        """Pass items on while a progress bar shows how far they are."""
        from rich.console import Console
        from rich.progress import track

        console = Console(stderr=True)
        hidden = not (self.progress and console.is_terminal)
        yield from track(iterable, text, console=console, transient=True, disable=hidden)


@dataclass(frozen=True, init=False)
class Row:
    """One line of figures: a baseline or a system, and what was measured on it.

    >>> Row("bicubic", psnr=28.42, gflops=0)
    Row(name='bicubic', metrics={'psnr': 28.42, 'gflops': 0.0})
    """

    name: str
    metrics: dict[str, float] = field(hash=False)

    def __init__(self, name: str, /, **metrics: float) -> None:
        object.__setattr__(self, "name", name)
        try:
            figures = {key: float(value) for key, value in metrics.items()}
        except (TypeError, ValueError) as error:
            raise InputError(f"Row {name!r} takes numbers only, got {metrics}: {error}.") from error
        object.__setattr__(self, "metrics", figures)


@dataclass(frozen=True)
class Evidence:
    """What a proof found.

    Args:
        system: slug of the system.
        claim: the headline claim in a sentence.
        rows: baselines and system, measured in the same run; at least two.
        claimed: what the paper says, in a few words ("57% of the FLOPs at -0.02 dB").
        measured: what we found, in the same words.
        holds: whether the claim holds at our scale.
        notes: what a reader has to know to judge the figures (scale, substitutions).
        figure: a picture that says more, or None (see `foveate.proofs.report.figure_to_picture`).
        claimed_ratio, measured_ratio: the two as numbers, where a number says it.
        seconds, mode, environment: filled in by `foveate.proofs.run`.
    """

    system: str
    claim: str
    rows: tuple[Row, ...]
    claimed: str
    measured: str
    holds: bool
    notes: tuple[str, ...] = ()
    figure: "Image.Image | None" = field(default=None, repr=False, compare=False)
    claimed_ratio: float | None = None
    measured_ratio: float | None = None
    seconds: float = 0.0
    mode: str = ""
    environment: Mapping[str, str | int] = field(default_factory=dict)

    def __post_init__(self) -> None:
        object.__setattr__(self, "rows", tuple(self.rows))
        notes = (self.notes,) if isinstance(self.notes, str) else tuple(self.notes)
        object.__setattr__(self, "notes", notes)
        object.__setattr__(self, "holds", bool(self.holds))
        if len(self.rows) < 2:
            raise InputError(
                f"Evidence for {self.system} has {len(self.rows)} row(s). Give at least two: the baseline and the "
                "system, measured in the same run."
            )

    @property
    def columns(self) -> list[str]:
        """Names of all metrics, in the order in which rows bring them up."""
        return list(dict.fromkeys(key for row in self.rows for key in row.metrics))

    def table(self) -> "Table":
        """The rows as a rich table."""
        from rich.box import SIMPLE_HEAD
        from rich.table import Table

        table = Table(box=SIMPLE_HEAD, pad_edge=False)
        table.add_column("")
        for column in self.columns:
            table.add_column(_heading(column), justify="right")
        for row in self.rows:
            table.add_row(row.name, *(_figure(row.metrics.get(column)) for column in self.columns))
        return table

    @property
    def verdict(self) -> str:
        """Claimed, measured and whether it holds, in a line."""
        word = "holds" if self.holds else "does not hold"
        spent = f"{self.mode or 'quick'}, {self.seconds:.0f} s"
        return f"claimed {self.claimed}; measured {self.measured}: {word} ({spent})"

    def markdown(self) -> str:
        """The evidence as a section of Markdown."""
        head = ["", *(_heading(column) for column in self.columns)]
        lines = [markdown_row(head), markdown_row(["---", *("---:" for _ in self.columns)])]
        lines += [markdown_row([r.name, *(_figure(r.metrics.get(c)) for c in self.columns)]) for r in self.rows]
        where = ", ".join(f"{key} {value}" for key, value in self.environment.items())
        title = f"### {self.system} ({self.mode or 'quick'})"
        parts = [title, f"{_sentence(self.claim)}.", "\n".join(lines), f"{_sentence(self.verdict)}."]
        parts += ["\n".join(f"- {note}" for note in self.notes)] if self.notes else []
        return "\n\n".join([*parts, f"Measured on: {where}." if where else ""]).rstrip() + "\n"

    def to_dict(self) -> dict[str, Any]:
        """The evidence as JSON-safe values; the figure stays out, and inf and nan become texts."""
        return {
            "system": self.system,
            "claim": self.claim,
            "rows": [{"name": r.name, "metrics": {k: _safe(v) for k, v in r.metrics.items()}} for r in self.rows],
            "claimed": self.claimed,
            "measured": self.measured,
            "holds": self.holds,
            "notes": list(self.notes),
            "claimed_ratio": _safe(self.claimed_ratio),
            "measured_ratio": _safe(self.measured_ratio),
            "seconds": round(self.seconds, 2),
            "mode": self.mode,
            "environment": dict(self.environment),
        }

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "Evidence":
        """Read back what `to_dict` gave."""
        known = {key: values[key] for key in cls.__dataclass_fields__ if key in values and key != "figure"}
        known["rows"] = tuple(Row(row["name"], **row["metrics"]) for row in values["rows"])
        for key in ("claimed_ratio", "measured_ratio"):
            known[key] = None if known.get(key) is None else float(known[key])
        return cls(**known)


def _check_device(device: str) -> None:
    import torch

    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise InputError(f"device {device!r} cannot be used on this machine ({reason}) Use --device cpu.") from error


def _safe(value: float | None) -> float | str | None:
    if value is None:
        return None
    return float(value) if isfinite(value) else str(float(value))


def _figure(value: float | None) -> str:
    """Four significant digits, without an exponent where a reader would stumble over it."""
    if value is None:
        return ""
    if value == 0 or not isfinite(value):
        return f"{value:g}"
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"


def _heading(name: str) -> str:
    return name.replace("_", " ")


def markdown_row(cells: Iterable[str]) -> str:
    """A line of a Markdown table."""
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"


def _sentence(text: str) -> str:
    return text[:1].upper() + text[1:]
