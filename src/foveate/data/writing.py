"""Results written from top to bottom, to a file or into the kind of picture that came in.

Rows arrive as float tensors and are clipped and rounded to what the target holds. PNG and TIFF go to the disk as they
come; JPEG, WebP and AVIF wait in memory because their encoders want the whole picture. A file appears under its name
only when it is complete (`files.Partial`).
"""

import warnings
from pathlib import Path
from types import TracebackType
from typing import Any, Protocol, Self

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image, features
from torch import Tensor

from foveate.data.files import Partial, check_target, write_error
from foveate.data.loading import Picture
from foveate.data.png_stream import MAX_SIDE, PngStream
from foveate.errors import FoveateError, PictureError

_LIMITS = {".jpg": 65535, ".jpeg": 65535, ".webp": 16383, ".avif": 65535}
_SAVE: dict[str, dict[str, Any]] = {
    "JPEG": {"quality": 95, "subsampling": 0},
    "WEBP": {"quality": 95, "exact": True},
    "AVIF": {"quality": 90, "subsampling": "4:4:4"},
}
_FORMATS = {".jpg": "JPEG", ".jpeg": "JPEG", ".webp": "WEBP", ".avif": "AVIF"}

Pixels = npt.NDArray[Any]


class Sink(Protocol):
    """Where rows of pixels go."""

    def put(self, y: int, pixels: Pixels) -> None:
        """Take rows [h, W, n] that start at row y."""

    def finish(self) -> Any:
        """Complete the picture and return it, or its path."""

    def discard(self) -> None:
        """Leave nothing behind."""


class Writer:
    """Take the rows of a result in order; as a context manager, abort on an error or when not closed.

    Args:
        sink: where the pixels go.
        shape: H, W, n of the result.
        dtype: uint8, uint16 or float32.
        name: the target, for messages.
    """

    def __init__(self, sink: Sink, shape: tuple[int, int, int], dtype: npt.DTypeLike, name: str) -> None:
        self._sink, self._shape, self._dtype, self._name = sink, shape, np.dtype(dtype), name
        self._next = 0
        self._open = True

    def rows(self, y: int, color: Tensor, alpha: Tensor | None = None) -> None:
        """Write rows, starting at row y, which must be the next one.

        Shape: color [1, C, h, W], alpha [1, 1, h, W] when the picture has alpha.
        Raises: PictureError when rows do not fit, hold NaN, or cannot be stored; the target is then gone.
        """
        try:
            planes = color if alpha is None else torch.cat([color, alpha.to(color)], dim=1)
            self._check(y, planes)
            self._sink.put(y, self._quantized(planes))
        except OSError as error:
            self.abort()
            raise write_error(Path(self._name), error) from error
        except BaseException:
            self.abort()
            raise
        self._next += planes.shape[2]

    def close(self) -> Any:
        """Complete the result and return it: its path for a file, else the kind of picture that came in.

        Raises: PictureError when rows are missing or the file cannot be completed; nothing is left of it then.
        """
        if self._next != self._shape[0] or not self._open:
            self.abort()
            raise PictureError(f"{self._name}: {self._next} of {self._shape[0]} rows were written; write all of them.")
        try:
            result = self._sink.finish()
        except FoveateError:
            self.abort()
            raise
        except (OSError, ValueError) as error:
            self.abort()
            cause = error if isinstance(error, OSError) else OSError(str(error))
            raise write_error(Path(self._name), cause) from error
        except BaseException:
            self.abort()
            raise
        self._open = False
        return result

    def abort(self) -> None:
        """Give up: remove what was written so far. Harmless after `close`."""
        if self._open:
            self._open = False
            self._sink.discard()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.abort()

    def _check(self, y: int, planes: Tensor) -> None:
        height, width, n = self._shape
        if not self._open:
            raise PictureError(f"{self._name}: the writer is closed; start a new one.")
        if planes.dim() != 4 or planes.shape[:2] != (1, n) or planes.shape[3] != width:
            got = tuple(planes.shape)
            raise PictureError(f"{self._name}: rows must be [1, {n}, h, {width}] with alpha last, got {got}.")
        if y != self._next or y + planes.shape[2] > height:
            raise PictureError(
                f"{self._name}: got rows {y}:{y + planes.shape[2]}, expected {self._next} next, {height} in all."
            )
        if not torch.isfinite(planes.sum(dtype=torch.float32)):  # one pass, no mask as large as the strip
            raise PictureError(f"{self._name}: rows {y}:{y + planes.shape[2]} hold NaN or infinite values.")

    def _quantized(self, planes: Tensor) -> Pixels:
        values = planes.detach().to("cpu", torch.float32).clamp(0, 1)[0].permute(1, 2, 0)
        if self._dtype.kind == "u":
            values = (values * np.iinfo(self._dtype).max).round()
        return values.contiguous().numpy().astype(self._dtype, copy=False)


def writer(target: str | Path | None, like: Picture, height: int, width: int) -> Writer:
    """Start writing a result.

    Args:
        target: a file whose extension names the format (PNG, TIFF, JPEG, WebP, AVIF), or None for the kind that `like`
            is (a Pillow image when it is a file).
        like: the picture whose channels, bits, ICC profile and EXIF block the result takes over.
        height, width: size of the result in pixels.
    Raises: PictureError when the target cannot be written, or its format cannot hold such a picture.
    """
    shape = (height, width, like.pixels.shape[2])
    if min(height, width) < 1:
        raise PictureError(f"A result of {width}x{height} pixels cannot be written; both sides must be 1 or more.")
    if target is None:
        if like.kind == "path" and like.bits > 8 and shape[2] > 1:
            raise PictureError("No Pillow image holds 16-bit colour; name a target file, such as out.png.")
        return Writer(_Memory(like, shape), shape, like.pixels.dtype, "The result")
    path = check_target(target, like.path)
    suffix = path.suffix.lower()
    if suffix == ".png":
        dtype = np.dtype(np.uint8 if like.bits == 8 else np.uint16)
        _check_sides(path, height, width, MAX_SIDE)
        return Writer(_Png(path, like, shape, dtype), shape, dtype, str(path))
    if suffix in (".tif", ".tiff"):
        return Writer(_Tiff(path, like, shape), shape, like.pixels.dtype, str(path))
    _check_sides(path, height, width, _LIMITS[suffix])
    if _FORMATS[suffix] == "JPEG" and like.alpha:
        raise PictureError(f"Cannot write {str(path)!r}: JPEG holds no transparency; write a .png or .webp instead.")
    if _FORMATS[suffix] == "AVIF" and not features.check("avif"):
        raise PictureError(f"Cannot write {str(path)!r}: this Pillow was built without AVIF; write a .png or .webp.")
    if like.bits > 8:
        warnings.warn(f"{path.name}: {_FORMATS[suffix]} keeps 8 bits per sample; .png keeps 16.", stacklevel=2)
    return Writer(_Whole(path, like, shape), shape, np.uint8, str(path))


def _check_sides(path: Path, height: int, width: int, limit: int) -> None:
    if max(height, width) > limit:
        size = f"{width}x{height} pixels"
        raise PictureError(f"Cannot write {str(path)!r}: {size}, but {path.suffix} ends at {limit}; write a .png.")


def _buffer(shape: tuple[int, int, int], dtype: npt.DTypeLike, planar: bool = False) -> Pixels:
    height, width, n = shape
    try:
        return np.empty((n, height, width), dtype).transpose(1, 2, 0) if planar else np.empty(shape, dtype)
    except (MemoryError, ValueError) as error:
        size = f"{width}x{height} pixels"
        raise PictureError(f"Not enough memory for a result of {size}; write a .png or .tif, row by row.") from error


class _Memory:
    def __init__(self, like: Picture, shape: tuple[int, int, int]) -> None:
        self._back = like.back
        self._pixels = _buffer(shape, like.pixels.dtype, planar=like.kind == "tensor")

    def put(self, y: int, pixels: Pixels) -> None:
        self._pixels[y : y + len(pixels)] = pixels

    def finish(self) -> Any:
        return self._back(self._pixels)

    def discard(self) -> None:
        del self._pixels


class _Png:
    def __init__(self, path: Path, like: Picture, shape: tuple[int, int, int], dtype: np.dtype[Any]) -> None:
        self._part = Partial(path)
        self._png = PngStream(self._part.file, *shape, bits=8 * dtype.itemsize, icc=like.icc, exif=like.exif)

    def put(self, y: int, pixels: Pixels) -> None:
        self._png.rows(pixels)

    def finish(self) -> Path:
        self._png.close()
        self._part.commit()
        return self._part.target

    def discard(self) -> None:
        self._part.discard()


class _Tiff:
    def __init__(self, path: Path, like: Picture, shape: tuple[int, int, int]) -> None:
        import tifffile

        self._part = Partial(path)
        try:
            with tifffile.TiffWriter(self._part.file, bigtiff=_bytes(shape, like) > 2**32 - 2**20) as tif:
                # Without data tifffile only lays out the file and says where the rows belong.
                place = tif.write(
                    shape=shape if shape[2] > 1 else shape[:2],
                    dtype=like.pixels.dtype,
                    photometric="rgb" if like.channels == 3 else "minisblack",
                    planarconfig="contig" if shape[2] > 1 else None,
                    extrasamples=["unassalpha"] if like.alpha else None,
                    iccprofile=like.icc,
                    metadata=None,
                    software=False,
                    returnoffset=True,
                )
            if place is None:
                raise PictureError(f"Cannot write {str(path)!r}: tifffile laid out no contiguous rows; write a .png.")
            self._part.file.seek(place[0])
        except OSError as error:
            self._part.discard()
            raise write_error(path, error) from error
        except BaseException:
            self._part.discard()
            raise

    def put(self, y: int, pixels: Pixels) -> None:
        self._part.file.write(np.ascontiguousarray(pixels).data)

    def finish(self) -> Path:
        self._part.commit()
        return self._part.target

    def discard(self) -> None:
        self._part.discard()


def _bytes(shape: tuple[int, int, int], like: Picture) -> int:
    return int(np.prod(shape, dtype=np.int64)) * like.pixels.dtype.itemsize


class _Whole:
    def __init__(self, path: Path, like: Picture, shape: tuple[int, int, int]) -> None:
        self._icc, self._exif = like.icc, like.exif
        self._pixels = _buffer(shape, np.uint8)
        self._part = Partial(path)

    def put(self, y: int, pixels: Pixels) -> None:
        self._pixels[y : y + len(pixels)] = pixels

    def finish(self) -> Path:
        form = _FORMATS[self._part.target.suffix.lower()]
        extras = {key: value for key, value in (("icc_profile", self._icc), ("exif", self._exif)) if value}
        image = Image.fromarray(self._pixels[..., 0] if self._pixels.shape[2] == 1 else self._pixels)
        if image.mode == "LA" or (image.mode == "L" and form != "JPEG"):
            image = image.convert("RGBA" if image.mode == "LA" else "RGB")
            extras.pop("icc_profile", None)  # a profile for grey says nothing about RGB
        image.save(self._part.file, format=form, **_SAVE[form], **extras)
        self._part.commit()
        return self._part.target

    def discard(self) -> None:
        self._part.discard()
