"""One view of every kind of picture: a file, a Pillow image, a NumPy array, a tensor.

A `Picture` keeps its pixels [H, W, n] as they came (uint8, uint16 or float32) and turns only the asked-for window into
a float tensor, so a large picture never lies in memory at four bytes per sample.
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image
from torch import Tensor

from foveate.data.decode import check_size, decode_file, decode_image
from foveate.errors import PictureError

Source = str | Path | Image.Image | npt.NDArray[Any] | Tensor
_TOLERANCE = 1e-3


@dataclass(frozen=True, eq=False)
class Picture:
    """A picture of any kind, seen as pixels.

    Attributes:
        pixels: [H, W, n] uint8, uint16 or float32; n = 1 grey, 2 grey and alpha, 3 colour, 4 colour and alpha.
        kind: "path", "pil", "array" or "tensor".
        back: makes pixels [H', W', n] of the same type into the kind that came in.
        path: the file, when there is one.
        icc, exif: ICC profile and EXIF block (orientation already applied and removed).
    """

    pixels: npt.NDArray[Any]
    kind: str
    back: Callable[[npt.NDArray[Any]], Any]
    path: Path | None = None
    icc: bytes | None = None
    exif: bytes | None = None

    @property
    def height(self) -> int:
        """Rows."""
        return int(self.pixels.shape[0])

    @property
    def width(self) -> int:
        """Columns."""
        return int(self.pixels.shape[1])

    @property
    def channels(self) -> int:
        """Colour channels without alpha: 1 or 3."""
        return 1 if self.pixels.shape[2] < 3 else 3

    @property
    def alpha(self) -> bool:
        """Whether there is an alpha channel."""
        return self.pixels.shape[2] in (2, 4)

    @property
    def bits(self) -> int:
        """Bits per sample: 8 or 16, or 32 for float."""
        return 8 * int(self.pixels.dtype.itemsize)

    def window(self, y0: int, y1: int, x0: int, x1: int) -> tuple[Tensor, Tensor | None]:
        """Return rows y0 to y1 and columns x0 to x1 (ends excluded) as float32 in 0..1.

        Shape: colour [1, channels, y1 - y0, x1 - x0], alpha [1, 1, y1 - y0, x1 - x0] or None.
        Raises: PictureError when the window is empty or leaves the picture.

        >>> color, alpha = load(np.full((4, 6, 3), 255, np.uint8)).window(0, 2, 0, 6)
        >>> color.shape, color.max().item(), alpha
        (torch.Size([1, 3, 2, 6]), 1.0, None)
        """
        if not (0 <= y0 < y1 <= self.height and 0 <= x0 < x1 <= self.width):
            size = f"{self.width}x{self.height}"
            raise PictureError(f"Window rows {y0}:{y1}, columns {x0}:{x1} does not fit in a picture of {size} pixels.")
        part = self.pixels[y0:y1, x0:x1].transpose(2, 0, 1)
        peak = np.iinfo(part.dtype).max if part.dtype.kind == "u" else 1
        planes = torch.from_numpy(np.divide(part, peak, dtype=np.float32, order="C")).clamp_(0, 1)[None]
        return planes[:, : self.channels], planes[:, self.channels :] if self.alpha else None

    def rgb(self) -> Tensor:
        """All of the colours, three equal channels where it is grey. Shape: [1, 3, H, W] in 0..1, not contiguous then.

        >>> load(np.zeros((4, 6), np.uint8)).rgb().shape
        torch.Size([1, 3, 4, 6])
        """
        return self.window(0, self.height, 0, self.width)[0].expand(-1, 3, -1, -1)


def load(source: Source) -> Picture:
    """Open a picture of any kind.

    Args:
        source: a path (str or Path); a Pillow image of any mode; an array [H, W] or [H, W, 1..4] of uint8, uint16 or
            float in 0..1; or a tensor [C, H, W] or [1, C, H, W] of uint8, uint16 or float in 0..1.
    Raises: PictureError for anything that cannot be used as it is.
    """
    if isinstance(source, str | Path):
        path = Path(source)
        decoded = decode_file(path)
        pixels = _checked(decoded.pixels, repr(str(path)))
        return Picture(pixels, "path", _pil_back(decoded.icc, decoded.exif), path, decoded.icc, decoded.exif)
    if isinstance(source, Image.Image):
        return _from_pil(source)
    if isinstance(source, np.ndarray):
        return _from_array(source)
    if isinstance(source, Tensor):
        return _from_tensor(source)
    raise PictureError(
        f"A {type(source).__name__} is no picture; pass a path, a Pillow image, a NumPy array or a tensor."
    )


def _from_pil(image: Image.Image) -> Picture:
    check_size(image.height, image.width, "The Pillow image")
    try:
        decoded = decode_image(image)
    except PictureError:
        raise
    except Exception as error:  # a lazily opened file is decoded only now, with whatever error its damage causes
        raise PictureError(f"The Pillow image cannot be decoded ({error}); get a fresh copy.") from error
    pixels = _checked(decoded.pixels, "The Pillow image")
    wide = image.mode == "I"
    return Picture(pixels, "pil", _pil_back(decoded.icc, decoded.exif, wide), icc=decoded.icc, exif=decoded.exif)


def _from_array(source: npt.NDArray[Any]) -> Picture:
    name = f"The array of shape {source.shape}"
    if source.ndim not in (2, 3) or (source.ndim == 3 and not 1 <= source.shape[2] <= 4):
        turn = "; use .transpose(1, 2, 0)" if source.ndim == 3 and 1 <= source.shape[0] <= 4 else ""
        raise PictureError(f"{name} is no picture; expected [H, W] or [H, W, 1..4]{turn}.")
    flat, dtype = source.ndim == 2, source.dtype

    def back(pixels: npt.NDArray[Any]) -> npt.NDArray[Any]:
        return (pixels[..., 0] if flat else pixels).astype(dtype, copy=False)

    return Picture(_checked(source[..., None] if flat else source, name), "array", back)


def _from_tensor(source: Tensor) -> Picture:
    name = f"The tensor of shape {tuple(source.shape)}"
    if source.dim() == 4 and source.shape[0] != 1:
        raise PictureError(f"{name} holds {source.shape[0]} pictures; pass one at a time, [C, H, W] or [1, C, H, W].")
    if source.dim() not in (3, 4) or not 1 <= source.shape[-3] <= 4:
        turn = "; use .permute(2, 0, 1)" if source.dim() == 3 and 1 <= source.shape[-1] <= 4 else ""
        raise PictureError(f"{name} is no picture; expected [C, H, W] or [1, C, H, W] with C = 1..4{turn}.")
    dtype, device, batched = source.dtype, source.device, source.dim() == 4
    planes = source.detach()[0] if batched else source.detach()
    planes = planes.to("cpu", torch.float32) if dtype.is_floating_point else planes.cpu()

    def back(pixels: npt.NDArray[Any]) -> Tensor:
        result = torch.from_numpy(pixels.transpose(2, 0, 1)).to(device, dtype).contiguous()
        return result[None] if batched else result

    return Picture(_checked(planes.numpy().transpose(1, 2, 0), name), "tensor", back)


def _checked(pixels: npt.NDArray[Any], name: str) -> npt.NDArray[Any]:
    check_size(pixels.shape[0], pixels.shape[1], name)
    if pixels.dtype in (np.uint8, np.uint16):
        return pixels
    if pixels.dtype.kind != "f":
        raise PictureError(f"{name} holds {pixels.dtype}; expected uint8, uint16 or float in 0..1.")
    low, high = float(pixels.min()), float(pixels.max())
    if not np.isfinite([low, high]).all():
        raise PictureError(f"{name} holds NaN or infinite values; replace them first, with numpy.nan_to_num say.")
    if low < -_TOLERANCE or high > 1 + _TOLERANCE:
        advice = "divide by 255?" if high > 2 and high <= 255 and low >= 0 else "scale or clip them first."
        raise PictureError(f"{name} holds floats from {low:.4g} to {high:.4g}; expected 0..1: {advice}")
    return pixels.astype(np.float32, copy=False)


def _pil_back(icc: bytes | None, exif: bytes | None, wide: bool = False) -> Callable[[npt.NDArray[Any]], Image.Image]:
    def back(pixels: npt.NDArray[Any]) -> Image.Image:
        flat = pixels[..., 0] if pixels.shape[2] == 1 else pixels
        image = Image.fromarray(np.ascontiguousarray(flat.astype(np.int32) if wide else flat))
        image.info |= {key: value for key, value in (("icc_profile", icc), ("exif", exif)) if value}
        return image

    return back
