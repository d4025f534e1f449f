"""From a picture file or a Pillow image to plain pixels, losing nothing on the way.

Pixels come out as one array [H, W, n], n = 1 grey, 2 grey and alpha, 3 colour, 4 colour and alpha, in uint8, uint16 or
float32, upright (EXIF orientation applied). Pillow decodes 16-bit colour but keeps only one byte of each sample. As
its unpackers for big- and little-endian samples differ in exactly which byte that is, decoding twice yields both
halves. TIFF layouts beyond Pillow are read by tifffile, which scikit-image brings along.
"""

import math
import threading
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import ExifTags, Image, ImageCms, ImageFile, ImageOps, UnidentifiedImageError

from foveate.errors import PictureError

MAX_PIXELS = 2**30
# Formats that decode pixels and do nothing else: EPS and WMF, for one, would start other programs.
_FORMATS = ("PNG", "JPEG", "WEBP", "TIFF", "AVIF", "BMP", "DIB", "GIF", "JPEG2000", "PPM", "QOI", "TGA")
_MODES = {"1": "L", "P": "RGB", "PA": "RGBA", "La": "LA", "RGBa": "RGBA"}
_PLAIN = ("L", "LA", "RGB", "RGBA", "I;16", "I;16B", "I;16L", "F")
_DEFLATE = 1040  # no deflate stream expands more than 1032 times; the rest is for headers
_limit = threading.Lock()


@dataclass(frozen=True)
class Decoded:
    """What a file or Pillow image holds: pixels [H, W, n], and the ICC profile and EXIF block that go with them."""

    pixels: npt.NDArray[Any]
    icc: bytes | None = None
    exif: bytes | None = None


def decode_file(path: Path) -> Decoded:
    """Read a picture file in full.

    Raises: PictureError when it is missing, a folder, not a picture, damaged, or larger than `MAX_PIXELS`.
    """
    if path.is_dir():
        raise PictureError(f"Cannot open {str(path)!r}: it is a folder; name a picture file in it.")
    try:
        size = path.stat().st_size
        if size == 0:
            raise PictureError(f"Cannot open {str(path)!r}: the file is empty.")
        with _opened(path) as image:
            check_size(image.height, image.width, repr(str(path)))
            _check_promise(image, size, path)
            if getattr(image, "is_animated", False) and image.format != "MPO":
                count = getattr(image, "n_frames", 2)
                warnings.warn(f"{path.name} holds {count} pictures; only the first is used.", stacklevel=3)
            high = _rawmode(image)
            if high is None and image.format == "TIFF" and image.mode != "I;16" and _bits(image) > 8:
                return _decode_tiff(path)
            decoded = decode_image(image)
            transparent = image.info.get("transparency")
        if high is not None:
            return _replace(decoded, _sixteen_bits(path, high, decoded.pixels))
        if decoded.pixels.dtype == np.uint16 and transparent is not None:
            alpha = np.where(decoded.pixels == transparent, 0, 65535).astype(np.uint16)
            return _replace(decoded, np.concatenate([decoded.pixels, alpha], axis=2))
        return decoded
    except PictureError:
        raise
    except FileNotFoundError as error:
        raise PictureError(f"Cannot open {str(path)!r}: there is no such file.") from error
    except PermissionError as error:
        raise PictureError(f"Cannot open {str(path)!r}: no permission to read it.") from error
    except UnidentifiedImageError as error:
        if _is_tiff(path):
            return _decode_tiff(path)
        raise PictureError(
            f"Cannot open {str(path)!r}: not a picture foveate reads (PNG, JPEG, WebP, TIFF, AVIF, BMP, GIF, "
            "JPEG 2000, PPM, QOI, TGA); convert it first."
        ) from error
    except MemoryError as error:
        raise PictureError(f"Cannot open {str(path)!r}: not enough memory to decode it.") from error
    except Exception as error:  # decoders meet damaged data with whatever error comes first
        raise PictureError(f"Cannot open {str(path)!r}: damaged or incomplete ({error}); get a fresh copy.") from error


def decode_image(image: Image.Image) -> Decoded:
    """Read a Pillow image of any mode.

    Raises: PictureError when values of mode "I" exceed 16 bits; whatever Pillow raises when the data are damaged.
    """
    with _without_bomb_check():  # TIFF asks again when it loads
        image.load()
    icc = image.info.get("icc_profile")
    image, exif = _upright(image)
    if image.mode == "CMYK":
        image, icc = _from_cmyk(image, icc), None
    elif image.mode == "I":
        low, high = image.getextrema()
        if float(low) < 0 or float(high) > 65535:  # type: ignore[arg-type]
            raise PictureError(f'A Pillow image of mode "I" holds {low}..{high}; foveate takes 0..65535.')
        return Decoded(np.asarray(image).astype(np.uint16)[..., None], icc, exif)
    elif image.mode not in _PLAIN or "transparency" in image.info:
        mode = image.mode if image.mode in _PLAIN else _MODES.get(image.mode, "RGB")
        if "transparency" in image.info and mode in ("L", "RGB"):
            mode += "A"
        image = image.convert(mode)
    pixels = _native(np.asarray(image))
    return Decoded(pixels if pixels.ndim == 3 else pixels[..., None], icc, exif)


def check_size(height: int, width: int, name: str) -> None:
    """Refuse a picture without pixels or with more than `MAX_PIXELS`.

    Raises: PictureError.
    """
    if height < 1 or width < 1:
        raise PictureError(f"{name} is {width}x{height} pixels: there is nothing in it.")
    if height * width > MAX_PIXELS:
        raise PictureError(f"{name} is {width}x{height} pixels, above the limit of {MAX_PIXELS}; cut it into parts.")


@contextmanager
def _opened(path: Path) -> Iterator[ImageFile.ImageFile]:
    Image.init()
    # A file rather than a name, which Pillow would map into memory: it maps turned TIFFs at the wrong size.
    with path.open("rb") as file:
        with _without_bomb_check():
            image = Image.open(file, formats=[name for name in _FORMATS if name in Image.OPEN])
        with image:
            yield image


@contextmanager
def _without_bomb_check() -> Iterator[None]:
    # Pillow's check refuses honest large pictures; check_size and _check_promise take its place.
    with _limit:
        before, Image.MAX_IMAGE_PIXELS = Image.MAX_IMAGE_PIXELS, None
        try:
            yield
        finally:
            Image.MAX_IMAGE_PIXELS = before


def _check_promise(image: Image.Image, size: int, path: Path) -> None:
    if image.format != "PNG":
        return
    bits = {"1": 1, "P": 1, "L": 1, "I;16": 16}.get(image.mode, 8 * len(image.getbands()))
    if math.ceil(image.width * bits / 8) * image.height > _DEFLATE * size:
        promise = f"its header promises {image.width}x{image.height} pixels but it holds only {size} bytes"
        raise PictureError(f"Cannot open {str(path)!r}: {promise}; get a fresh copy.")


def _upright(image: Image.Image) -> tuple[Image.Image, bytes | None]:
    try:
        exif = image.getexif()
        turned = ImageOps.exif_transpose(image) if exif.get(ExifTags.Base.Orientation, 1) != 1 else image
        if image.format == "TIFF" or not exif:
            return turned, None  # TIFF keeps its own layout in these tags: of no use in another file
        kept = turned.getexif()
        kept.pop(ExifTags.Base.Orientation, None)
        details = kept.get_ifd(ExifTags.IFD.Exif)
        details.pop(ExifTags.Base.ExifImageWidth, None)
        details.pop(ExifTags.Base.ExifImageHeight, None)
        return turned, kept.tobytes() if len(kept) else None
    except Exception as error:  # EXIF comes from many hands; a broken block is no reason to refuse the picture
        warnings.warn(f"The EXIF block cannot be read and is left out ({error}).", stacklevel=4)
        return image, None


def _from_cmyk(image: Image.Image, icc: bytes | None) -> Image.Image:
    if icc:
        try:
            profile = ImageCms.ImageCmsProfile(BytesIO(icc))
            turned = ImageCms.profileToProfile(image, profile, ImageCms.createProfile("sRGB"), outputMode="RGB")
            if turned is not None:
                return turned
        except (ImageCms.PyCMSError, OSError):
            warnings.warn("The CMYK profile cannot be used; colours are approximate.", stacklevel=4)
    return image.convert("RGB")


def _rawmode(image: ImageFile.ImageFile) -> str | None:
    """Name the unpacker of a 16-bit colour file of which Pillow would drop every second byte."""
    modes = {_args(tile)[0] for tile in image.tile}
    mode = modes.pop() if len(modes) == 1 else None
    return mode if mode in _OTHER_HALF else None


def _args(tile: Any) -> tuple[Any, ...]:
    return (tile.args,) if isinstance(tile.args, str) else tile.args or (None,)


_OTHER_HALF = {f"{mode};16{order}": f"{mode};16{'L' if order == 'B' else 'B'}"
               for mode in ("RGB", "RGBA") for order in "BLN"} | {"LA;16B": "RGBA"}  # fmt: skip


def _sixteen_bits(path: Path, rawmode: str, high: npt.NDArray[Any]) -> npt.NDArray[Any]:
    with warnings.catch_warnings(), _opened(path) as image:
        warnings.simplefilter("ignore")  # said once already, at the first decoding
        image.tile = [tile._replace(args=(_OTHER_HALF[rawmode], *_args(tile)[1:])) for tile in image.tile]
        low = decode_image(image).pixels
    if rawmode == "LA;16B":  # the four bytes of a grey-alpha pixel, unpacked as if they were R, G, B, A
        return low[..., 0::2].astype(np.uint16) << 8 | low[..., 1::2]
    return high.astype(np.uint16) << 8 | low


def _bits(image: Image.Image) -> int:
    return int(max(getattr(image, "tag_v2", {}).get(258, (8,))))


def _is_tiff(path: Path) -> bool:
    with path.open("rb") as file:
        return file.read(4) in (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")


def _decode_tiff(path: Path) -> Decoded:
    import tifffile

    try:
        with tifffile.TiffFile(path) as tif:
            page = tif.pages.first
            if not set(page.axes) <= set("YXS"):
                raise ValueError(f"axes {page.axes}")
            check_size(page.imagelength, page.imagewidth, repr(str(path)))
            pixels = _native(page.asarray())
            pixels = np.moveaxis(pixels, page.axes.index("S"), -1) if "S" in page.axes else pixels[..., None]
            icc = page.tags.valueof(34675)
            orientation = int(page.tags.valueof(274, 1))
    except PictureError:
        raise
    except Exception as error:  # as above
        raise PictureError(f"Cannot open {str(path)!r}: a TIFF of a kind foveate does not read ({error}).") from error
    if pixels.dtype not in (np.uint8, np.uint16, np.float32) or pixels.shape[2] > 4:
        found = f"{pixels.shape[2]} channels of {pixels.dtype}"
        raise PictureError(f"Cannot open {str(path)!r}: {found}; use 1 to 4 of 8, 16 or float 32 bits.")
    return Decoded(_turned(pixels, orientation), bytes(icc) if icc else None)


def _turned(pixels: npt.NDArray[Any], orientation: int) -> npt.NDArray[Any]:
    pixels = pixels.swapaxes(0, 1) if orientation >= 5 else pixels
    down, left = orientation in (3, 4, 7, 8), orientation in (2, 3, 6, 7)
    return pixels[:: -1 if down else 1, :: -1 if left else 1]


def _native(pixels: npt.NDArray[Any]) -> npt.NDArray[Any]:
    return pixels.astype(pixels.dtype.newbyteorder("="), copy=False)


def _replace(decoded: Decoded, pixels: npt.NDArray[Any]) -> Decoded:
    return Decoded(pixels, decoded.icc, decoded.exif)
