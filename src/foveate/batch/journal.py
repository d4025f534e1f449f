"""What a batch has done so far, in a SQLite file that survives a kill at any moment.

One row per result: which source it came from (path, size, time of change, digest of the settings), its state (pending,
done, failed), and the message or report. A result counts as done only if its row says so for the very same source and
settings, and the file is there: a result is renamed into place before its row is written, so a kill between the two
only means that one file is made again. The journal is locked while open: one run per folder.
"""

import hashlib
import json
import sqlite3
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from foveate.errors import FoveateError, InputError

NAME = ".foveate-journal.sqlite"
_TABLE = """CREATE TABLE IF NOT EXISTS results (
    target TEXT PRIMARY KEY, source TEXT, size INTEGER, mtime_ns INTEGER, settings TEXT,
    state TEXT CHECK (state IN ('pending', 'done', 'failed')), message TEXT, report TEXT)"""


@dataclass(frozen=True)
class Entry:
    """One row: a target, its state, the reason when it failed, the worker's report when it is done."""

    target: str
    state: str
    message: str | None = None
    report: dict[str, Any] | None = None


def settings_digest(settings: Mapping[str, Any]) -> str:
    """Return a digest of the settings, the same for any order of keys.

    >>> settings_digest({"scale": 4, "budget": 0.5}) == settings_digest({"budget": 0.5, "scale": 4})
    True
    """
    text = json.dumps(dict(settings), sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()


class Journal:
    """The journal of an output folder; close it, or use it as a context manager.

    Args:
        folder: the output folder; the file `.foveate-journal.sqlite` in it is made when there is none.
        settings: what the results depend on besides their source; another value makes every file pending again.
    Raises: InputError when another run has this folder, FoveateError when the file cannot be used as a journal.
    """

    def __init__(self, folder: str | Path, settings: Mapping[str, Any]) -> None:
        self._folder = Path(folder)
        self._settings = settings_digest(settings)
        path = self._folder / NAME
        self._db = sqlite3.connect(path, isolation_level=None, timeout=0.5)
        try:
            self._db.execute("PRAGMA locking_mode = EXCLUSIVE")  # before the log is touched, so that none is shared
            self._db.execute("PRAGMA journal_mode = WAL")
            self._db.execute("PRAGMA synchronous = NORMAL")
            self._db.execute(_TABLE)
            self._db.execute("BEGIN IMMEDIATE")  # takes the lock now rather than at the first result
            self._db.execute("COMMIT")
        except sqlite3.OperationalError as error:
            self._db.close()
            if "locked" in str(error):
                advice = "wait for it, or choose another output folder"
                raise InputError(f"Another run is writing to {str(self._folder)!r}; {advice}.") from error
            raise FoveateError(f"Cannot write {str(path)!r}: {error}.") from error
        except sqlite3.DatabaseError as error:
            self._db.close()
            raise FoveateError(f"{str(path)!r} is no journal ({error}); remove it to start afresh.") from error

    def is_done(self, source: Path, target: Path) -> bool:
        """Whether the target is there and was made from the source as it is now, with these settings."""
        query = "SELECT source, size, mtime_ns, settings FROM results WHERE target = ? AND state = 'done'"
        row = self._db.execute(query, (str(target),)).fetchone()
        return row is not None and row == self._stamp(source) and (self._folder / target).is_file()

    def plan(self, pairs: list[tuple[Path, Path]]) -> None:
        """Enter (source, target) pairs as pending."""
        rows = [(str(target), *self._stamp(source)) for source, target in pairs]
        self._db.execute("BEGIN")
        self._db.executemany("REPLACE INTO results VALUES (?, ?, ?, ?, ?, 'pending', NULL, NULL)", rows)
        self._db.execute("COMMIT")

    def done(self, target: Path, report: Mapping[str, Any]) -> None:
        """Mark a target as done, with its report."""
        self._mark(target, "done", None, json.dumps(dict(report), default=str))

    def failed(self, target: Path, message: str) -> None:
        """Mark a target as failed, with the reason."""
        self._mark(target, "failed", message, None)

    def entries(self) -> list[Entry]:
        """Return every row, by target."""
        rows = self._db.execute("SELECT target, state, message, report FROM results ORDER BY target")
        return [Entry(target, state, message, json.loads(report) if report else None)
                for target, state, message, report in rows]  # fmt: skip

    def close(self) -> None:
        """Close the file and let other runs have it."""
        self._db.close()

    def __enter__(self) -> "Journal":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _mark(self, target: Path, state: str, message: str | None, report: str | None) -> None:
        query = "UPDATE results SET state = ?, message = ?, report = ? WHERE target = ?"
        self._db.execute(query, (state, message, report, str(target)))

    def _stamp(self, source: Path) -> tuple[str, int, int, str]:
        try:
            status = source.stat()
            size, mtime = status.st_size, status.st_mtime_ns
        except OSError:
            size, mtime = -1, -1  # a source that cannot be seen gets its own error when it is opened
        return str(source.absolute()), size, mtime, self._settings
