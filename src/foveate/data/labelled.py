"""Small pictures with classes, all in memory as bytes, and batches of them that are drawn in one gather.

A set comes from an archive of JPEG streams (`read_archive`, for CIFAR-10) or from a folder with one folder per class
(`read_folder`). It stays uint8, [N, side, side, 3]. A batch picks pictures, shifts each by up to `shift` pixels (the
pixels beyond its edge are its mirror image), mirrors half of them, and is made float: with the index of a row
r = reflect(y + dy) and of a column c = reflect(+-x + dx) all of it is  x = pictures[i, r, c],  one gather per batch.
"""

import io
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from foveate.data.files import READABLE, natural_key
from foveate.data.loading import load
from foveate.errors import InputError

Track = Callable[[Sequence[Any]], Iterable[Any]]
"""Passes items on, such as a progress bar."""


@dataclass(frozen=True, eq=False)
class Labelled:
    """Pictures with classes.

    Attributes:
        pictures: uint8 [N, H, W, 3].
        labels: int64 [N].
        classes: their names.
    """

    pictures: Tensor
    labels: Tensor
    classes: tuple[str, ...]

    def __len__(self) -> int:
        return len(self.labels)

    def to(self, device: str) -> "Labelled":
        """The same on a device."""
        return Labelled(self.pictures.to(device), self.labels.to(device), self.classes)

    def spread(self, count: int) -> "Labelled":
        """As many pictures as asked for, evenly over the set; all of them when it has no more."""
        index = torch.linspace(0, len(self) - 1, min(count, len(self)), dtype=torch.float64).long()
        return Labelled(self.pictures[index], self.labels[index], self.classes)

    def draws(self, seed: int, shift: int = 0) -> Callable[[int], tuple[Tensor, Tensor]]:
        """A stream of random batches, half of the pictures mirrored and each shifted by up to `shift` pixels.

        Returns: draw(batch) -> pictures as `standardised` gives them [batch, 3, H, W], classes [batch].
        """
        dice = torch.Generator().manual_seed(seed)
        height, width = self.pictures.shape[1:3]
        device = self.labels.device
        if not 0 <= shift < min(height, width):
            raise InputError(f"shift must be from 0 to below the side of a picture, {(height, width)}; got {shift}.")

        def draw(batch: int) -> tuple[Tensor, Tensor]:
            index = torch.randint(len(self), (batch,), generator=dice)
            mirrored = torch.rand(batch, generator=dice) < 0.5
            down, across = torch.randint(-shift, shift + 1, (2, batch, 1), generator=dice)
            rows = _reflected(torch.arange(height) + down, height)
            columns = _reflected(torch.arange(width) + across, width)
            columns = torch.where(mirrored[:, None], width - 1 - columns, columns)
            index, rows, columns = (t.to(device, non_blocking=True) for t in (index, rows, columns))
            pictures = self.pictures[index[:, None, None], rows[:, :, None], columns[:, None]]
            return standardised(pictures), self.labels[index]

        return draw

    def batches(self, size: int) -> Iterable[tuple[Tensor, Tensor]]:
        """All pictures once and in order, as `draws` gives them but unchanged."""
        for pictures, labels in zip(self.pictures.split(size), self.labels.split(size), strict=True):
            yield standardised(pictures), labels


def standardised(pictures: Tensor) -> Tensor:
    """Bytes as numbers of about -2..2, in channels-last memory. Shape: [B, H, W, 3] -> [B, 3, H, W]."""
    return pictures.permute(0, 3, 1, 2).float().mul_(1 / 63.75).sub_(2)


def read_archive(file: Path, count: int | None = None, track: Track = lambda items: items) -> Labelled:
    """Read a set kept as JPEG streams.

    Args:
        file: .npz of `bytes` (uint8), `offsets` (N + 1: picture i is bytes[offsets[i] : offsets[i + 1]]), `labels`,
            and perhaps `classes`.
        count: pictures to read, evenly spread over the set; default all.
        track: wraps the list of what is read.

    Raises: InputError for another kind of file.
    """
    try:
        with np.load(file) as archive:
            content, offsets, labels = archive["bytes"], archive["offsets"], archive["labels"].astype(np.int64)
            names = archive["classes"].tolist() if "classes" in archive else range(int(labels.max()) + 1)
    except (OSError, KeyError, ValueError) as error:
        raise InputError(
            f"{str(file)!r} is no archive of pictures ({error}); give one as read_archive says."
        ) from error
    index = np.linspace(0, len(labels) - 1, count or len(labels)).astype(int)
    streams = (io.BytesIO(content[offsets[i] : offsets[i + 1]].tobytes()) for i in track(index.tolist()))
    pictures = np.stack([np.asarray(Image.open(stream).convert("RGB")) for stream in streams])
    return Labelled(torch.from_numpy(pictures), torch.from_numpy(labels[index]), tuple(map(str, names)))


def read_folder(folder: Path, side: int, track: Track = lambda items: items) -> Labelled:
    """Read a folder with one folder of pictures per class; each picture's middle square is resized to side x side.

    Raises: InputError when there are fewer than two classes or a class has no picture.
    """
    homes = sorted((d for d in folder.glob("[!.]*") if d.is_dir()), key=lambda d: natural_key(d.name))
    files = [(f, i) for i, home in enumerate(homes) for f in sorted(home.iterdir()) if f.suffix.lower() in READABLE]
    if len(homes) < 2 or len({i for _, i in files}) < len(homes):
        raise InputError(
            f"{str(folder)!r} must hold two or more folders of pictures, one per class; found {len(homes)} folders."
        )
    pictures = torch.stack([_square(file, side) for file, _ in track(files)])
    return Labelled(pictures, torch.tensor([i for _, i in files]), tuple(home.name for home in homes))


def _square(file: Path, side: int) -> Tensor:
    picture = load(file)
    size = min(picture.height, picture.width)
    top, left = (picture.height - size) // 2, (picture.width - size) // 2
    colour, _ = picture.window(top, top + size, left, left + size)
    small = F.interpolate(colour, (side, side), mode="bilinear", antialias=True)[0].expand(3, -1, -1)
    return (255 * small).round().byte().permute(1, 2, 0).contiguous()


def _reflected(index: Tensor, size: int) -> Tensor:
    """Indices beyond 0..size - 1 mirrored at the pixels on the edge."""
    return (size - 1) - ((size - 1) - index.abs()).abs()
