"""Random pairs of low- and high-resolution crops for training super-resolution networks."""

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from foveate.errors import InputError

SUFFIXES = {".png", ".jpg", ".jpeg", ".webp", ".tif", ".tiff", ".bmp"}


class Crops:
    """Pictures in memory, and random aligned crops of them with their bicubically reduced twins.

    Args:
        folders: folders of photographs.
        scale: s; the low-resolution twin is made by antialiased bicubic reduction of the whole picture, 8-bit rounded.
        sizes: each picture is also used at these relative sizes, which gives sharper targets than full-size JPEG.
        seed: of the random crops.
        track: wraps the list of files while they are read (a progress bar).

    Raises: InputError when a folder holds no picture.
    """

    def __init__(
        self,
        folders: list[Path],
        scale: int,
        sizes: tuple[float, ...] = (1.0, 0.6),
        seed: int = 0,
        track: Callable[[list[Path]], Iterator[Path] | list[Path]] = lambda files: files,
    ) -> None:
        files = [f for d in folders for f in sorted(Path(d).iterdir()) if f.suffix.lower() in SUFFIXES]
        if not files:
            raise InputError(f"no pictures in {', '.join(map(str, folders))}; give folders of photographs.")
        self.scale, self.random = scale, np.random.default_rng(seed)
        with ThreadPoolExecutor(2) as pool:
            read = pool.map(lambda f: _pairs(f, scale, sizes), list(track(files)))
            self.pairs = [pair for pairs in read for pair in pairs]
        if not self.pairs:
            raise InputError(f"all {len(files)} pictures are below {48 * scale} pixels a side; give larger ones.")
        areas = np.array([low.shape[0] * low.shape[1] for low, _ in self.pairs], dtype=float)
        self.weights = areas / areas.sum()

    def __call__(self, batch: int, side: int) -> tuple[Tensor, Tensor]:
        """Draw crops with random flips and transposition.

        Returns: (low [batch, 3, side, side], high [batch, 3, s*side, s*side]), float in 0..1.
        Raises: InputError for a side that some picture does not have.
        """
        s = self.scale
        shortest = min(min(low.shape[:2]) for low, _ in self.pairs)
        if side > shortest:
            raise InputError(
                f"crops of {side} pixels do not fit a picture that is {shortest} pixels wide or high at 1/{s} of its "
                f"size; use crops of at most {shortest}, or larger pictures."
            )
        low = np.empty((batch, side, side, 3), np.uint8)
        high = np.empty((batch, side * s, side * s, 3), np.uint8)
        for i, k in enumerate(self.random.choice(len(self.pairs), batch, p=self.weights)):
            small, large = self.pairs[k]
            y, x = (
                self.random.integers(0, small.shape[0] - side + 1),
                self.random.integers(0, small.shape[1] - side + 1),
            )
            a, b = small[y : y + side, x : x + side], large[y * s : (y + side) * s, x * s : (x + side) * s]
            flip = self.random.integers(0, 8)
            if flip & 1:
                a, b = a[::-1], b[::-1]
            if flip & 2:
                a, b = a[:, ::-1], b[:, ::-1]
            if flip & 4:
                a, b = a.transpose(1, 0, 2), b.transpose(1, 0, 2)
            low[i], high[i] = a, b
        return _tensor(low), _tensor(high)


def _pairs(file: Path, scale: int, sizes: tuple[float, ...]) -> list[tuple[np.ndarray, np.ndarray]]:
    with Image.open(file) as opened:
        picture = opened.convert("RGB")
    pairs = []
    for size in sizes:
        w, h = round(picture.width * size), round(picture.height * size)
        w, h = w - w % scale, h - h % scale
        if min(w, h) < 48 * scale:
            continue
        large = picture.crop((0, 0, w, h)) if size == 1 else picture.resize((w, h), Image.Resampling.LANCZOS)
        small = large.resize((w // scale, h // scale), Image.Resampling.BICUBIC)
        pairs.append((np.asarray(small), np.asarray(large)))
    return pairs


def _tensor(pixels: np.ndarray) -> Tensor:
    return torch.from_numpy(pixels).permute(0, 3, 1, 2).float().div_(255)
