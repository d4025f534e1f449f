"""Pictures in and out: the one door that jobs use.

`load` opens a path, Pillow image, array or tensor as a `Picture`, whose `window` gives float tensors. `writer` takes
the strips of a result from top to bottom, into a file or the kind that came in:

>>> import numpy as np
>>> picture = load(np.zeros((4, 6, 3), np.uint8))
>>> with writer(None, picture, 4, 6) as out:
...     for y in (0, 2):
...         out.rows(y, *picture.window(y, y + 2, 0, 6))
...     result = out.close()
>>> result.shape, result.dtype
((4, 6, 3), dtype('uint8'))
"""

from pathlib import Path
from typing import Any

from torch import Tensor

from foveate.data.files import READABLE, WRITABLE, list_pictures
from foveate.data.loading import Picture, Source, load
from foveate.data.samples import samples
from foveate.data.writing import Writer, writer
from foveate.errors import InputError

__all__ = [
    "READABLE", "WRITABLE", "Picture", "Source", "Writer", "list_pictures", "load", "read_folder", "samples", "save",
    "writer",
]  # fmt: skip

_STRIP = 256


def read_folder(folder: Path, limit: int | None = None) -> list[Tensor]:
    """Read the colours of the pictures of a folder, in the order of their names.

    Args:
        limit: pictures at most.

    Shape: [1, 3, H, W] in 0..1 each.
    Raises: InputError when there are none.
    """
    found = [load(path) for path, _ in list_pictures(folder)][:limit]
    if not found:
        raise InputError(f"{folder} holds no pictures.")
    return [picture.rgb().contiguous() for picture in found]


def save(target: str | Path, source: Source | Picture) -> Path:
    """Write a picture of any kind to a file whose extension names the format.

    Raises: PictureError when the source cannot be read or the target cannot hold it.
    """
    picture: Any = source if isinstance(source, Picture) else load(source)
    with writer(target, picture, picture.height, picture.width) as out:
        for y in range(0, picture.height, _STRIP):
            out.rows(y, *picture.window(y, min(y + _STRIP, picture.height), 0, picture.width))
        path: Path = out.close()
    return path
