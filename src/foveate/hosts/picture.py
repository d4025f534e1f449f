"""From a picture of any kind to the normalised pixels that a host takes, and back."""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from foveate.data.pictures import Source, load
from foveate.errors import InputError


@dataclass(frozen=True)
class Pixels:
    """How a host wants its pictures: (picture in 0..1 - mean) / std, three channels.

    Args:
        mean, std: per channel, in 0..1.
        size: (rows, columns) that the host was made for.
        multiple: sides of other sizes are rounded to multiples of this.
    """

    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    size: tuple[int, int]
    multiple: int

    def normalise(self, picture: Tensor) -> Tensor:
        """Shape: [B, 3, H, W] in 0..1 -> the same, normalised."""
        return (picture - _channels(self.mean, picture)) / _channels(self.std, picture)

    def restore(self, pixels: Tensor) -> Tensor:
        """Undo `normalise`. Shape: [B, 3, H, W] -> the same, in 0..1, float32 at least."""
        wide = pixels.to(torch.promote_types(pixels.dtype, torch.float32))
        return wide * _channels(self.std, wide) + _channels(self.mean, wide)

    def prepare(self, source: Source, side: int | None = None) -> Tensor:
        """Open a picture and make it as large as the host takes it.

        Args:
            source: a path, Pillow image, array or tensor; see `foveate.data.pictures.load`.
            side: the longer side in pixels, the shape kept as nearly as `multiple` allows; by default the picture is
                shrunk and cut around its middle to the size that the host was made for.

        Shape: -> [1, 3, H, W], normalised.
        """
        picture = load(source)
        image = picture.rgb()
        h, w = image.shape[2:]
        if side is not None:
            if side < self.multiple:
                raise InputError(f"a side of {side} pixels is less than one patch of {self.multiple}; ask for more.")
            height, width = (max(1, round(s * side / max(h, w) / self.multiple)) * self.multiple for s in (h, w))
            return self.normalise(_resized(image, height, width))
        height, width = self.size
        scale = max(height / h, width / w)
        image = _resized(image, max(height, round(h * scale)), max(width, round(w * scale)))
        top, left = (image.shape[2] - height) // 2, (image.shape[3] - width) // 2
        return self.normalise(image[:, :, top : top + height, left : left + width])


IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
HALF = ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5))
OPENAI = ((0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711))


def _channels(values: tuple[float, ...], like: Tensor) -> Tensor:
    return like.new_tensor(values)[:, None, None]


def _resized(image: Tensor, height: int, width: int) -> Tensor:
    return F.interpolate(image, (height, width), mode="bicubic", antialias=True).clamp(0, 1)
