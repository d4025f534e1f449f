"""Rate and distortion of every codec: what `foveate bench codecs` measures.

A rate is the size of the file, header included, over the pixels of the picture. PSNR and MS-SSIM are of the decoded
picture, 8 bits a sample, over all channels; times are of one encoding and one decoding, files and pictures in memory.
JPEG and WebP, as Pillow writes them, run beside our methods; PNG and lossless WebP beside the lossless ones.
"""

import io
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from statistics import mean
from typing import Any

import numpy as np
import torch
from PIL import Image

from foveate.bench.frontier import Entry, Panel, Report, averaged
from foveate.compress import codec
from foveate.compress.verbs import compress, decompress
from foveate.data import pictures as files
from foveate.errors import BudgetError, InputError
from foveate.meter.quality import ms_ssim, psnr
from foveate.proofs import ProofContext, environment

RATES = ("0.15 bpp", "0.3 bpp", "0.6 bpp", "1.2 bpp")
"""Budgets of methods that know bytes."""

LOSSLESS = "lossless"

REPORT = Report(
    name="codecs",
    title="Codecs",
    text=(
        "Written by `foveate bench codecs`. Means over pictures; a rate is the whole file, header included. PSNR and "
        "MS-SSIM are of 8-bit RGB, empty where nothing is lost; times are of one process on this machine."
    ),
    columns={
        "bpp": ("bits per pixel", ".3f"),
        "psnr": ("PSNR (dB)", ".2f"),
        "ms_ssim": ("MS-SSIM", ".4f"),
        "encode": ("encode (s)", ".3g"),
        "decode": ("decode (s)", ".3g"),
        "count": ("pictures", "d"),
    },
    panels=(Panel("bpp", "psnr", log=True), Panel("bpp", "ms_ssim", log=True)),
)


@dataclass(frozen=True)
class Way:
    """A codec at one setting.

    Args:
        method, setting: names.
        encode: picture -> bytes.
        decode: bytes -> picture.
    """

    method: str
    setting: str
    encode: Callable[[Image.Image], bytes]
    decode: Callable[[bytes], Image.Image]


def baselines() -> list[Way]:
    """JPEG (4:2:0, optimised) and WebP at several qualities, PNG and WebP without loss."""
    lossy = [
        *(pillow("JPEG", f"quality {q}", quality=q, optimize=True, subsampling="4:2:0") for q in (10, 25, 50, 75, 90)),
        *(pillow("WebP", f"quality {q}", quality=q, method=6) for q in (5, 25, 50, 75, 90)),
    ]
    png = pillow("PNG", LOSSLESS, optimize=True)
    return [*lossy, png, pillow("WebP", LOSSLESS, name="WebP lossless", lossless=True, quality=100, method=6)]


def pillow(kind: str, setting: str, name: str | None = None, **options: Any) -> Way:
    """A codec of Pillow's."""

    def encode(picture: Image.Image) -> bytes:
        stream = io.BytesIO()
        picture.save(stream, kind, **options)
        return stream.getvalue()

    def decode(data: bytes) -> Image.Image:
        with Image.open(io.BytesIO(data)) as opened:
            return opened.convert("RGB")

    return Way(name or kind, setting, encode, decode)


def ours(method: str, rates: Iterable[str] = RATES) -> list[Way]:
    """A codec of ours at every rate, or as it is where it loses nothing or knows no rates."""
    if "bytes" not in codec.resolve(method).units:
        return [Way(method, LOSSLESS, partial(compress, method=method), decompress)]
    return [Way(method, rate, partial(compress, method=method, budget=rate), decompress) for rate in rates]


def measured(
    ways: Iterable[Way], folder: Path, context: ProofContext, limit: int | None = None, skipped: list[str] | None = None
) -> Iterator[Entry]:
    """Measure ways on the pictures of a folder, one entry each.

    Args:
        folder: of pictures.
        limit: pictures at most.
        skipped: gets a line for each way that has no such rate.

    Raises: InputError when there are no pictures.
    """
    found = [path for path, _ in files.list_pictures(folder)][:limit]
    if not found:
        raise InputError(f"{folder} holds no pictures.")
    originals = [Image.open(path).convert("RGB") for path in found]
    where = environment(context.device)
    for way in context.track(list(ways), "codecs"):
        with suppress(BudgetError):  # a rate that a picture meets may be too low for a part of it
            way.decode(way.encode(originals[0].crop((0, 0, 64, 64))))  # what is compiled is compiled now
        try:
            figures = averaged([once(way, original) for original in originals], mean)
        except BudgetError as error:
            if skipped is not None:
                skipped.append(f"{way.method} at {way.setting}: {error}")
            continue
        head = {"method": way.method, "setting": way.setting, "pictures": folder.name}
        yield {**head, **figures, "count": len(originals), "environment": where}


def once(way: Way, original: Image.Image) -> dict[str, float | None]:
    """Figures of one picture."""
    begun = time.perf_counter()
    data = way.encode(original)
    encoded = time.perf_counter()
    decoded = way.decode(data)
    done = time.perf_counter()
    x, y = (torch.from_numpy(np.array(p)).permute(2, 0, 1)[None].double() / 255 for p in (decoded, original))
    exact = torch.equal(x, y)
    return {
        "bpp": 8 * len(data) / (original.width * original.height),
        "psnr": None if exact else float(psnr(x, y)),
        "ms_ssim": None if exact else float(ms_ssim(x, y)),
        "encode": encoded - begun,
        "decode": done - encoded,
    }
