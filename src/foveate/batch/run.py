"""A batch: many files in, a folder out, nothing done twice, nothing lost when it is killed.

Every result is written under a temporary name and renamed when complete, then entered in the journal. A run first
clears the temporaries that a killed run left, then does what the journal does not show as done. A file that fails is
noted with its reason and the rest goes on.
"""

import sys
import time
from collections import Counter
from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, ProgressColumn, Task, TextColumn, TimeRemainingColumn
from rich.text import Text

from foveate.batch import pool
from foveate.batch.journal import Journal
from foveate.batch.pool import Outcome, Worker
from foveate.data.files import remove_partials
from foveate.errors import InputError, NotBuiltError

Engine = Callable[[Sequence[pool.Task], Worker, int], Generator[tuple[int, Outcome], None, None]]
ENGINES: dict[str, Engine | None] = {"process": pool.in_processes, "ray": None}


@dataclass(frozen=True)
class Failure:
    """A source that gave no result, and why."""

    source: Path
    message: str


@dataclass(frozen=True)
class Summary:
    """What a run did: files done, files skipped as done before, failures, whether it was interrupted, seconds."""

    done: int
    skipped: int
    failed: tuple[Failure, ...]
    interrupted: bool
    seconds: float


def targets(found: Sequence[tuple[Path, Path]], suffix: str | None = None) -> list[tuple[Path, Path]]:
    """Name the results of `list_pictures` within an output folder.

    Args:
        found: pairs of file and relative path.
        suffix: the results' extension, such as ".png"; None keeps each file's own. Files that would get the same name
            (a.jpg and a.tif) keep their own extension in it.

    >>> [str(t) for _, t in targets([(Path("a.jpg"), Path("a.jpg")), (Path("b.tif"), Path("b.tif"))], ".png")]
    ['a.png', 'b.png']
    >>> [str(t) for _, t in targets([(Path("a.jpg"), Path("a.jpg")), (Path("a.tif"), Path("a.tif"))], ".png")]
    ['a_jpg.png', 'a_tif.png']
    """
    if suffix is None:
        return list(found)
    names = [relative.with_suffix(suffix) for _, relative in found]
    often = Counter(names)
    return [
        (file, name if often[name] == 1 else relative.with_name(f"{relative.stem}_{relative.suffix[1:]}{suffix}"))
        for (file, relative), name in zip(found, names, strict=True)
    ]


def run(
    items: Sequence[tuple[Path, Path]],
    worker: Worker,
    out: str | Path,
    jobs: int = 1,
    settings: Mapping[str, Any] | None = None,
    progress: bool = True,
    resume: bool = True,
    engine: str = "process",
) -> Summary:
    """Make a result for every item.

    Args:
        items: pairs of a source and its result's path relative to `out`.
        worker: called with (source, target), both paths; writes the target atomically and returns a report that JSON
            can hold. With several jobs it must be importable (a function at the top of a module, or a partial of one).
        out: the output folder; it is made when missing.
        jobs: processes.
        settings: what results depend on besides their source; when they change, results are made again.
        progress: show a progress bar on the terminal's error stream.
        resume: skip what the journal shows as done; False makes everything again.
        engine: "process"; "ray" is kept for a cluster.
    Raises: InputError for a bad argument, two items with the same result, or a folder in use by another run;
        NotBuiltError for engine "ray".
    """
    start, out = _engine(engine, jobs), Path(out)
    _check_targets(items)
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"Cannot make the output folder {str(out)!r} ({error.strerror}); choose another.") from error
    began, done, interrupted = time.monotonic(), 0, False
    failed: list[Failure] = []
    with Journal(out, settings or {}) as journal:
        remove_partials(out)
        pending = [item for item in items if not (resume and journal.is_done(*item))]
        journal.plan(pending)
        for folder in {(out / target).parent for _, target in pending}:
            folder.mkdir(parents=True, exist_ok=True)
        tasks = [(source, out / target) for source, target in pending]
        with _bar(progress) as bar, closing(start(tasks, worker, jobs)) as outcomes:
            line = bar.add_task("", total=len(items), completed=len(items) - len(pending))
            try:
                for index, outcome in outcomes:
                    source, target = pending[index]
                    if outcome.message is None:
                        journal.done(target, outcome.report or {})
                        done += 1
                    else:
                        journal.failed(target, outcome.message)
                        failed.append(Failure(source, outcome.message))
                    bar.advance(line)
            except KeyboardInterrupt:
                interrupted = True
        remove_partials(out)
    return Summary(done, len(items) - len(pending), tuple(failed), interrupted, time.monotonic() - began)


def _engine(name: str, jobs: int) -> Engine:
    if not isinstance(jobs, int) or jobs < 1:
        raise InputError(f"jobs={jobs!r} cannot be used; pass a whole number of processes, 1 or more.")
    if name not in ENGINES:
        raise InputError(f"engine={name!r} is not known; use one of {', '.join(map(repr, ENGINES))}.")
    engine = ENGINES[name]
    if engine is None:
        raise NotBuiltError(f"engine={name!r} comes in a later version of foveate; use engine='process'.")
    return engine


def _check_targets(items: Sequence[tuple[Path, Path]]) -> None:
    seen: dict[Path, Path] = {}
    for source, target in items:
        if target.is_absolute() or ".." in target.parts:
            raise InputError(f"The result {str(target)!r} lies outside the output folder; name it relative to that.")
        if target in seen:
            pair = f"{str(seen[target])!r} and {str(source)!r}"
            raise InputError(f"{pair} would both become {str(target)!r}; run them into different folders.")
        seen[target] = source


class _Speed(ProgressColumn):
    def render(self, task: Task) -> Text:
        return Text(f"{task.speed:.2f} files/s" if task.speed else "", style="progress.data.speed")


def _bar(shown: bool) -> Progress:
    columns = (BarColumn(), MofNCompleteColumn(), TextColumn("files"), _Speed(), TimeRemainingColumn())
    return Progress(*columns, console=Console(file=sys.stderr), disable=not shown)
