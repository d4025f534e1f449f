"""The verbs `compress` and `decompress`: any picture to a file of ours and back, under a budget or to a quality.

What every codec would otherwise do again is done here: opening pictures, grey for codecs that want colour, alpha for
codecs that want none, budgets in bytes whatever they were said in, the search for a quality, sizes and windows.
"""

import os
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from foveate.compress import alpha as planes_of_alpha
from foveate.compress.codec import Codec, Progress, Size, Window, resolve, resolve_for
from foveate.compress.container import MAX_BYTES, Container
from foveate.compress.search import smallest
from foveate.data import pictures
from foveate.data.files import Partial, write_error
from foveate.data.loading import Picture
from foveate.engine.budget import Budget
from foveate.errors import BitstreamError, BudgetError, InputError
from foveate.meter.quality import psnr

DEFAULT = "predictive-sparse-decomposition"
LIMIT = 2**28
"""Pixels that `decompress` renders at most, unless told otherwise."""

KINDS = ("pil", "array", "tensor")
_STRIP = 256
_RATES = ("bpp", "share", "bytes")


def compress(
    image: pictures.Source,
    *,
    method: str = DEFAULT,
    budget: Budget | float | str | None = None,
    quality: float | None = None,
    progress: Progress | None = None,
    **settings: Any,
) -> bytes:
    """Compress a picture.

    Args:
        image: a path, Pillow image, NumPy array or tensor; grey or colour, with or without alpha, 8 or 16 bit.
        method: a codec, as `foveate list --wing compress --works` shows them.
        budget: "0.5 bpp", "20 kB", a share of the raw size (0.05, "5%"), and for methods that know them
            "2000 gaussians" or "30 s" of encoding; the method's own default when None.
        quality: PSNR in dB to be reached with as few bytes as possible, instead of a budget.
        progress: called with (share done, PSNR so far or None); when it returns True, encoding stops and the best
            state so far is kept.
        settings: the codec's own.

    Returns: the bytes of a file (docs/container.md).
    Raises: PictureError for a picture that cannot be read; BudgetError for a budget or quality that cannot be met;
        UnknownSystemError, NotBuiltError, InputError for a method or settings that do not exist.
    """
    codec, asked = check(method, budget, quality, **settings)
    picture = pictures.load(image)
    color, alpha = picture.window(0, picture.height, 0, picture.width)
    beside: dict[str, bytes] = {}
    if alpha is not None and color.shape[1] + 1 in codec.planes:
        color = torch.cat([color, alpha], 1)
    elif alpha is not None:
        beside[planes_of_alpha.SECTION] = planes_of_alpha.pack(alpha, picture.bits)
    coded = color if color.shape[1] in codec.planes else color.expand(-1, 3, -1, -1)
    extra = _overhead(picture, beside)
    if quality is not None and codec.units:
        container = _to_quality(codec, coded, picture, quality, extra, progress)
    else:
        spend = None if asked is None else _for_codec(asked, picture, extra)
        container = codec.encode(coded, bits=picture.bits, budget=spend, progress=progress)
    whole = replace(
        container, channels=picture.pixels.shape[2], bits=picture.bits, sections={**beside, **container.sections}
    )
    data = whole.to_bytes()
    limit = _bytes_of(asked, picture)
    if limit is not None and len(data) > limit:
        raise BudgetError(
            f"{codec.slug} needs at least {len(data)} bytes here, the budget {asked} is {limit:.0f} bytes."
        )
    return data


def decompress(
    data: bytes | str | Path,
    out: str | Path | None = None,
    *,
    size: Size | None = None,
    window: Window | None = None,
    kind: str = "pil",
    prefix: bool = False,
    limit: int = LIMIT,
) -> Any:
    """Decompress a picture.

    Args:
        data: the bytes of a file, or its path.
        out: picture file to write; its extension names the format.
        size: (width, height) to render at, for methods that can; the picture's own when None.
        window: (x, y, width, height) of the rendered picture; all of it when None.
        kind: "pil", "array" ([H, W] or [H, W, C]) or "tensor" ([C, H, W] in 0..1).
        prefix: accept a file cut off, where the method decodes a coarser picture from its beginning.
        limit: pixels rendered at most.

    Returns: the picture, or the path written.
    Raises: BitstreamError, before anything is decoded, for a file that is truncated, damaged or foreign; InputError for
        a size or window that does not fit; PictureError when the result cannot be written.
    """
    if kind not in KINDS:
        raise InputError(f"kind={kind!r} is not known; use one of {', '.join(map(repr, KINDS))}.")
    container = Container.read(_bytes(data), allow_prefix=prefix)
    codec = resolve_for(container)
    full, part = _frame(container, codec, size, window)
    if part[2] * part[3] > limit:
        raise InputError(f"{part[2]}x{part[3]} pixels are above the limit of {limit}; decode a window of them.")
    with pictures.writer(out, _like(container, kind, out is None), part[3], part[2]) as target:
        for y, planes in _strips(container, codec, full, part, stream=out is not None):
            target.rows(y, planes)
        return target.close()


def check(
    method: str = DEFAULT, budget: Budget | float | str | None = None, quality: float | None = None, **settings: Any
) -> tuple[Codec, Budget | None]:
    """Say what is wrong with what was asked before any picture is opened; else give the codec and the budget."""
    if budget is not None and quality is not None:
        raise InputError(f"Give a budget or a quality, not both (budget={budget!r}, quality={quality!r}).")
    if quality is not None and not 0 < quality < 200:
        raise InputError(f"A quality is a PSNR in dB such as 32, got {quality!r}.")
    codec, asked = resolve(method, **settings), None if budget is None else Budget.parse(budget)
    if asked is not None and ("bytes" if asked.unit in _RATES else asked.unit) not in codec.units:
        examples = {"bytes": "'0.5 bpp' or '20 kB'", "gaussians": "'2000 gaussians'", "ms": "'30 s'"}
        can = " or ".join(examples[known] for known in codec.units)
        advice = f"give {can}" if can else "it is lossless: leave the budget out"
        raise BudgetError(f"{codec.slug} takes no budget such as {asked}; {advice}.")
    return codec, asked


def read_file(path: str | Path) -> bytes:
    """The bytes of a file. Raises: BitstreamError when it cannot be read, or is longer than any file of ours."""
    try:
        if os.path.getsize(path) > MAX_BYTES:
            raise BitstreamError(f"{str(path)!r} is longer than {MAX_BYTES} bytes: not a foveate file.")
        return Path(path).read_bytes()
    except OSError as error:
        raise BitstreamError(f"Cannot open {str(path)!r}: {error.strerror}.") from error


def write_file(target: str | Path, data: bytes, source: Path | None = None) -> Path:
    """Write a compressed file in one step: under its name it is there whole, or not at all.

    Raises: InputError when the name does not end in .fov, or is the source's; PictureError when it cannot be written.
    """
    path = Path(target)
    if path.suffix.lower() != ".fov":
        raise InputError(f"Cannot write {str(path)!r}: a compressed file ends in .fov; name it {path.stem}.fov.")
    if source is not None and path.exists() and path.samefile(source):
        raise InputError(f"Cannot write {str(path)!r}: it is the picture being read; choose another name.")
    part = Partial(path)
    try:
        part.file.write(data)
        part.commit()
    except OSError as error:
        part.discard()
        raise write_error(path, error) from error
    return path


def _bytes(data: bytes | str | Path) -> bytes:
    if isinstance(data, bytes | bytearray | memoryview):
        return bytes(data)
    if not isinstance(data, str | os.PathLike):
        raise InputError(f"decompress takes bytes or a path, got {type(data).__name__}.")
    return read_file(data)


def _overhead(picture: Picture, beside: dict[str, bytes]) -> int:
    """Bytes that the sections beside the codec's add to a file."""
    empty = Container("x", picture.width, picture.height, 3, {})
    return len(replace(empty, sections=beside).to_bytes()) - len(empty.to_bytes())


def _bytes_of(budget: Budget | None, picture: Picture) -> float | None:
    """A budget of rate in bytes; None for other budgets."""
    pixels = picture.height * picture.width
    if budget is None or budget.unit not in _RATES:
        return None
    raw = {"bpp": pixels / 8, "share": pixels * picture.pixels.shape[2] * picture.bits / 8, "bytes": 1.0}
    return budget.amount * raw[budget.unit]


def _for_codec(budget: Budget, picture: Picture, extra: int) -> Budget:
    """The budget in a unit that codecs know, less what is not the codec's."""
    size = _bytes_of(budget, picture)
    if size is None:
        return budget
    if size <= extra:
        raise BudgetError(f"The budget {budget} is {size:.0f} bytes, alpha alone needs {extra}; give more.")
    return Budget(size - extra, "bytes")


def _to_quality(
    codec: Codec, image: Tensor, picture: Picture, quality: float, extra: int, progress: Progress | None
) -> Container:
    direct = getattr(codec, "encode_to", None)
    if direct is not None:
        container: Container = direct(image, quality, bits=picture.bits, progress=progress)
        return container
    unit = codec.units[0]
    most = {"bytes": image.numel() * picture.bits / 8 + 1024, "gaussians": image[0, 0].numel(), "ms": 600e3}[unit]
    least = {"bytes": 64.0, "gaussians": 4.0, "ms": 100.0}[unit]

    def attempt(amount: float, report: Progress | None) -> tuple[Container, float]:
        container = codec.encode(image, bits=picture.bits, budget=Budget(amount, unit), progress=report)
        return container, measured(codec.decode(container), image, picture.bits)

    return smallest(attempt, quality, least, max(most, least), progress, codec.slug)


def measured(decoded: Tensor, image: Tensor, bits: int) -> float:
    """PSNR in dB of a decoded picture once its samples are whole, as a file holds them."""
    peak = 2 ** min(bits, 16) - 1
    return float(psnr((decoded.clamp(0, 1) * peak).round() / peak, image))


def _frame(container: Container, codec: Codec, size: Size | None, window: Window | None) -> tuple[Size, Window]:
    own = (container.width, container.height)
    full = own if size is None else _whole("size", size, 2)
    if min(full) < 1:
        raise InputError(f"size={size!r} is no (width, height) of 1 or more.")
    if full != own and not codec.any_size:
        raise InputError(f"{codec.slug} decodes at the picture's own {own[0]}x{own[1]} only, got size={size!r}.")
    x, y, w, h = (0, 0, *full) if window is None else _whole("window", window, 4)
    if min(x, y) < 0 or min(w, h) < 1 or x + w > full[0] or y + h > full[1]:
        raise InputError(f"window={window!r} is no (x, y, width, height) inside {full[0]}x{full[1]} pixels.")
    return (full[0], full[1]), (x, y, w, h)


def _whole(name: str, values: Any, count: int) -> tuple[int, ...]:
    try:
        numbers = tuple(int(value) for value in values)
    except (TypeError, ValueError) as error:
        raise InputError(f"{name}={values!r} is not {count} whole numbers.") from error
    if len(numbers) != count or any(float(v) != n for v, n in zip(values, numbers, strict=True)):
        raise InputError(f"{name}={values!r} is not {count} whole numbers.")
    return numbers


def _strips(container: Container, codec: Codec, full: Size, part: Window, stream: bool) -> Iterator[tuple[int, Tensor]]:
    """Rows of the result from the top, in float: strip by strip where that costs nothing, else all at once."""
    x, y, w, h = part
    grey, has_alpha = container.channels < 3, container.channels in (2, 4)
    color = 1 if grey else 3
    together = has_alpha and color + 1 in codec.planes
    coded = color + 1 if together else color if color in codec.planes else 3
    inner = replace(container, channels=coded)
    size = None if full == (container.width, container.height) else full
    alpha = planes_of_alpha.unpack(container) if has_alpha and not together else None
    if alpha is not None and size is not None:
        alpha = F.interpolate(alpha, full[::-1], mode="bicubic", antialias=True).clamp(0, 1)
    step = _STRIP if stream and codec.random_access else h
    for top in range(0, h, step):
        rows = min(step, h - top)
        wanted = (x, y + top, w, rows)
        if codec.random_access and wanted != (0, 0, *full):
            planes = codec.decode(inner, size, wanted)
        else:
            planes = codec.decode(inner, size, None)[..., y + top : y + top + rows, x : x + w]
        if grey and coded == 3:
            planes = planes.mean(1, keepdim=True)
        if alpha is not None:
            planes = torch.cat([planes, alpha[..., y + top : y + top + rows, x : x + w]], 1)
        yield top, planes


def _like(container: Container, kind: str, in_memory: bool) -> Picture:
    """A picture of one pixel that says what kind the result is to be; Pillow has no colour in float."""
    dtype = {8: np.uint8, 16: np.uint16, 32: np.uint8 if kind == "pil" and in_memory else np.float32}[container.bits]
    pixels = np.zeros((1, 1, container.channels), dtype)
    if kind == "array":
        return pictures.load(pixels[..., 0] if container.channels == 1 else pixels)
    if kind == "tensor":
        return pictures.load(torch.zeros(container.channels, 1, 1))
    return Picture(pixels, "path", lambda array: Image.fromarray(array[..., 0] if array.shape[2] == 1 else array))
