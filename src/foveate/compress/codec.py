"""What a codec is: a class that turns a picture into a `Container` and back.

A codec is found by its card, in the wing `compress`: the card's entry is a class with the attributes and methods of
`Codec`, or, where the entry is something else (an estimator, a network), a function `codec(**settings)` lies beside it
in its module. The face (`foveate.compress`) does what all have in common: opening pictures, alpha, budgets, the search
for a quality, checks of sizes and windows.
"""

import sys
from collections.abc import Callable
from typing import ClassVar, Protocol, runtime_checkable

from torch import Tensor

from foveate import catalog
from foveate.compress.container import Container
from foveate.engine.budget import Budget
from foveate.errors import FoveateError, InputError, UnknownSystemError

Progress = Callable[[float, float | None], bool | None]
"""progress(share done in 0..1, PSNR in dB or None) -> True to stop now and keep the best state so far."""

Size = tuple[int, int]
"""(width, height) in pixels."""

Window = tuple[int, int, int, int]
"""(x, y, width, height) in pixels of the decoded size."""


@runtime_checkable
class Codec(Protocol):
    """A way to turn a picture into bytes and back.

    Attributes:
        slug: of its card; the `method` of its containers.
        planes: numbers of image planes it takes, of (1, 2, 3, 4). Where it does not take alpha, the face codes alpha
            beside it; where it takes 3 only, the face passes grey as three equal planes.
        units: the budget units it understands, of "bytes", "gaussians", "ms" (seconds of encoding), the one that steers
            quality first. "0.5 bpp" and a share of the raw size reach it as "bytes", the size of the whole file
            but for alpha. Empty for a lossless codec.
        any_size: whether `decode` renders at sizes other than the picture's.
        random_access: whether `decode` of a window costs only what the window needs.

    A codec with a shorter way to a wished PSNR than a search over budgets also has

        encode_to(image, quality, *, bits=8, progress=None) -> Container
    """

    slug: ClassVar[str]
    planes: ClassVar[tuple[int, ...]]
    units: ClassVar[tuple[str, ...]]
    any_size: ClassVar[bool]
    random_access: ClassVar[bool]

    def encode(
        self, image: Tensor, *, bits: int = 8, budget: Budget | None = None, progress: Progress | None = None
    ) -> Container:
        """Compress a picture.

        Args:
            image: float32 in 0..1; 8- and 16-bit samples are k / 255 and k / 65535, so that none of them is lost.
            bits: per sample of the picture it came from: 8, 16, or 32 for float.
            budget: what may be spent, in one of `units`; the codec's own default when None.
            progress: called often (each step, or twice a second); when it returns True, stop and return what the best
                state so far gives.

        Shape: image [1, n, H, W], n of `planes`.
        """

    def decode(self, container: Container, size: Size | None = None, window: Window | None = None) -> Tensor:
        """Decompress a picture, or a window of it; the same values on any number of threads.

        Args:
            container: may have `missing` sections, where the codec is progressive; else `container.section` refuses.
            size: rendered size; the picture's own when None. Only when `any_size`.
            window: part to decode, inside the rendered size; all of it when None.

        Shape: [1, n, h, w], float32 in 0..1.
        Raises: BitstreamError when a section makes no sense.
        """


def methods() -> list[str]:
    """Slugs of the codecs that work."""
    return [card.slug for card in catalog.search(wing="compress", works=True) if _maker(card)]


def resolve(method: str, **settings: object) -> Codec:
    """Build the codec of a method.

    Args:
        method: slug of a card, e.g. "gaussian-image".
        settings: the codec's own settings.

    Raises: UnknownSystemError for a name without a card; NotBuiltError for a card without code; InputError for a
        system that is no codec, or settings that it does not have.
    """
    card = catalog.card(method)
    card.target()  # says so when there is no code yet
    make = _maker(card)
    if make is None:
        raise InputError(f"{card.slug!r} does not compress pictures; use one of {', '.join(methods())}.")
    try:
        return make(**settings)
    except TypeError as error:
        raise InputError(f"{card.slug} cannot be set up with {settings}: {error}.") from error


def resolve_for(container: Container) -> Codec:
    """Build the codec that decodes a container.

    Raises: InputError when this foveate has no such method.
    """
    try:
        card = catalog.card(container.method)
        if card.slug != container.method:
            raise UnknownSystemError(f"No system is called {container.method!r}.")
        return resolve(card.slug)
    except FoveateError as error:
        raise InputError(f"This foveate cannot decode {container.method!r} files ({error})") from error


def _maker(card: catalog.Card) -> Callable[..., Codec] | None:
    target = card.target()
    if all(hasattr(target, name) for name in ("encode", "decode", "planes", "units")):
        return target
    return getattr(sys.modules[target.__module__], "codec", None) if card.wing == "compress" else None
