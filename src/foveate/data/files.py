"""Picture files: which there are, and how one is replaced without ever being seen half-written.

A result is first written under a hidden temporary name in the target's own folder, flushed to the disk, and then
renamed over the target in one step. Whoever looks sees the old file or the new one; a killed process leaves a
temporary behind that `remove_partials` finds by its name.
"""

import contextlib
import errno
import os
import re
import secrets
from collections.abc import Iterable
from pathlib import Path
from typing import BinaryIO

from foveate.errors import PictureError

READABLE = (".png", ".jpg", ".jpeg", ".webp", ".tif", ".tiff", ".avif", ".bmp", ".gif", ".jp2", ".ppm", ".pgm", ".pnm",
            ".qoi", ".tga")  # fmt: skip
WRITABLE = (".png", ".jpg", ".jpeg", ".webp", ".tif", ".tiff", ".avif")
_PARTIAL = ".foveate-{}.part"


def list_pictures(paths: str | Path | Iterable[str | Path], skip: str | Path | None = None) -> list[tuple[Path, Path]]:
    """List the pictures that paths name, folders recursively, in natural order.

    A path that is no folder is listed as it is, whatever its extension and even if missing, so that it gets its own
    error when it is opened. Hidden files and folders are left out.

    Args:
        paths: one path or several, files or folders.
        skip: a folder to leave out, such as an output folder inside an input folder.
    Returns: pairs (file, its path relative to the folder that was named; its bare name when named itself).
    """
    named = [Path(p) for p in ([paths] if isinstance(paths, str | Path) else paths)]
    hole = Path(skip).resolve() if skip is not None else None
    found: list[tuple[Path, Path]] = []
    for path in named:
        if not path.is_dir():
            found.append((path, Path(path.name)))
            continue
        inside = []
        for file in path.rglob("*"):
            relative = file.relative_to(path)
            hidden = any(part.startswith(".") for part in relative.parts)
            if hidden or file.suffix.lower() not in READABLE or not file.is_file():
                continue
            if hole is None or not file.resolve().is_relative_to(hole):
                inside.append((file, relative))
        found += sorted(inside, key=lambda pair: natural_key(pair[1].as_posix()))
    return found


def natural_key(text: str) -> list[tuple[int, int | str]]:
    """Key under which names sort as people count.

    >>> sorted(["img10.png", "img9.png", "IMG1.png"], key=natural_key)
    ['IMG1.png', 'img9.png', 'img10.png']
    """
    pieces = re.findall(r"[0-9]+|[^0-9]+", text.lower())
    return [(0, int(piece)) if piece[0] in "0123456789" else (1, piece) for piece in pieces]


def check_target(target: str | Path, source: Path | None = None) -> Path:
    """Return the target as a path once a picture can be put there.

    Args:
        target: the file to be written; its extension chooses the format.
        source: the file that is being read, which must not be the target.
    Raises: PictureError for an unknown extension, a folder, a missing folder, or the source itself.
    """
    target = Path(target)
    if target.is_dir():
        raise PictureError(f"Cannot write {str(target)!r}: it is a folder; name a file in it, such as out.png.")
    if target.suffix.lower() not in WRITABLE:
        raise PictureError(f"Cannot write {str(target)!r}: the extension must be one of {', '.join(WRITABLE)}.")
    if not target.parent.is_dir():
        raise PictureError(f"Cannot write {str(target)!r}: there is no folder {str(target.parent)!r}; make it first.")
    if source is not None and target.exists() and source.exists() and target.samefile(source):
        raise PictureError(f"Cannot write {str(target)!r}: it is the picture being read; choose another name.")
    return target


class Partial:
    """A file under a temporary name that becomes the target when it is complete.

    Args:
        target: the path that `commit` replaces.
    Raises: PictureError when the folder does not let a file be made.
    """

    def __init__(self, target: Path) -> None:
        self.target = target
        self.path = target.parent / _PARTIAL.format(secrets.token_hex(6))
        try:
            self.file: BinaryIO = open(self.path, "x+b")  # noqa: SIM115 - closed by commit or discard
        except OSError as error:
            raise write_error(target, error) from error

    def commit(self) -> None:
        """Flush to the disk and rename to the target; on failure nothing is left.

        Raises: PictureError when the disk is full or the target may not be replaced.
        """
        try:
            self.file.flush()
            os.fsync(self.file.fileno())
            self.file.close()
            os.replace(self.path, self.target)
        except OSError as error:
            self.discard()
            raise write_error(self.target, error) from error

    def discard(self) -> None:
        """Remove the temporary file; harmless when there is none any more."""
        with contextlib.suppress(OSError):  # closing flushes, which fails again on a full disk
            self.file.close()
        self.path.unlink(missing_ok=True)


def remove_partials(folder: str | Path) -> int:
    """Remove the temporaries that killed runs left in a folder and below; return how many there were."""
    stale = list(Path(folder).rglob(_PARTIAL.format("*")))
    for path in stale:
        path.unlink(missing_ok=True)
    return len(stale)


def write_error(target: Path, error: OSError) -> PictureError:
    """Put a failed write in the user's words."""
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return PictureError(f"Cannot write {str(target)!r}: the disk is full; free some space and run again.")
    if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
        return PictureError(f"Cannot write {str(target)!r}: no permission in {str(target.parent)!r}; write elsewhere.")
    return PictureError(f"Cannot write {str(target)!r}: {error.strerror or error}.")
