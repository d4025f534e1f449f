"""Photographs that every machine has: those inside scikit-image, decoded when first asked for."""

from collections.abc import Iterator, Mapping
from functools import cache
from importlib.resources import files
from pathlib import Path

from torch import Tensor

from foveate.data.loading import load

# Only files that scikit-image installs; its other pictures are downloaded on first use.
_FILES = {
    "astronaut": "astronaut.png",
    "brick": "brick.png",
    "camera": "camera.png",
    "chelsea": "chelsea.png",
    "coffee": "coffee.png",
    "coins": "coins.png",
    "grass": "grass.png",
    "gravel": "gravel.png",
    "hubble": "hubble_deep_field.jpg",
    "moon": "moon.png",
    "motorcycle": "motorcycle_left.png",
    "page": "page.png",
    "rocket": "rocket.jpg",
}


class _Samples(Mapping[str, Tensor]):
    def __getitem__(self, name: str) -> Tensor:
        return _sample(_FILES[name]).clone()

    def __iter__(self) -> Iterator[str]:
        return iter(_FILES)

    def __len__(self) -> int:
        return len(_FILES)


def samples() -> Mapping[str, Tensor]:
    """Return the sample photographs by name, float [3, H, W] in 0..1; grey ones have three equal channels.

    >>> samples()["astronaut"].shape
    torch.Size([3, 512, 512])
    """
    return _Samples()


@cache
def _sample(file: str) -> Tensor:
    picture = load(Path(str(files("skimage") / "data" / file)))
    color, _ = picture.window(0, picture.height, 0, picture.width)
    return color[0].expand(3, -1, -1).contiguous()
