"""What the proofs of rescaling share: crops of photographs, scales drawn at random, round trips measured.

A round trip shrinks a photograph, rounds the small picture to 8 bits and enlarges it to its size. PSNR is that of all
three channels of 8-bit pictures. Trained networks see photographs of scikit-image that they are not measured on.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from foveate.data.pictures import list_pictures, load
from foveate.layers.resample import Size, resize, wholes
from foveate.layers.rescaler import Filter, Rescaler, quantise
from foveate.meter import psnr
from foveate.proofs.evidence import ProofContext
from foveate.proofs.restore._shared import HELD_OUT, Draw, Pair, crops

Turn = Callable[[Tensor, Size], Tensor]
"""Pictures to another size."""

SIDE = 200
"""Of the middle of a photograph that is measured."""


def training_crops(context: ProofContext) -> Draw:
    """Random crops of the photographs that are not measured; both of a pair are the same."""
    photographs = [p[None] for name, p in context.photographs() if name not in HELD_OUT]
    return crops([Pair("", p, p) for p in photographs], context.seed)


def measured_pictures(context: ProofContext) -> tuple[list[Tensor], str]:
    """Pictures to measure on, and a sentence that names them: kodak12 in full proofs that have it."""
    folder = context.folder("kodak12") if context.full else None
    if folder is None:
        names = HELD_OUT[:2]
        found, where = [dict(context.photographs())[name] for name in names], f"{' and '.join(names)} of scikit-image"
    else:
        files = [load(file) for file, _ in list_pictures(folder)]
        found = [f.window(0, f.height, 0, f.width)[0][0].to(context.device) for f in files]
        where = f"{len(found)} pictures of kodak12"
    return [_middle(p)[None] for p in found], f"Measured on the middle {SIDE} x {SIDE} pixels of {where}."


def _middle(picture: Tensor) -> Tensor:
    top, left = ((n - SIDE) // 2 for n in picture.shape[1:])
    return picture[:, top : top + SIDE, left : left + SIDE]


def small(size: Sequence[int], down: float, across: float | None = None) -> Size:
    """(rows, columns) of a picture shrunk by some scales.

    >>> small((200, 200), 2.5), small((200, 200), 1.5, 3)
    ((80, 80), (133, 67))
    """
    return max(1, round(size[0] / down)), max(1, round(size[1] / (across or down)))


def scales(seed: int, low: float, high: float) -> Callable[[], float]:
    """Scales drawn evenly between two."""
    dice = torch.Generator().manual_seed(seed)
    return lambda: low + (high - low) * float(torch.rand((), generator=dice))


def bicubic(x: Tensor, size: Size) -> Tensor:
    """The antialiased bicubic filter."""
    return resize(x, wholes((x.shape[2], x.shape[3]), size))


def round_trip(reduce: Turn, enlarge: Turn, pictures: list[Tensor], down: float, across: float | None = None) -> float:
    """Mean PSNR of pictures that were shrunk and enlarged, in dB."""
    values = []
    with torch.inference_mode():
        for x in pictures:
            size = small(x.shape[2:], down, across)
            back = quantise(enlarge(quantise(reduce(x, size)), (x.shape[2], x.shape[3])))
            values.append(float(psnr(back, x)))
    return sum(values) / len(values)


def likeness(reduce: Turn, pictures: list[Tensor], down: float) -> float:
    """Mean PSNR of small pictures against bicubic ones, in dB."""
    with torch.inference_mode():
        sizes = [small(x.shape[2:], down) for x in pictures]
        values = [
            float(psnr(quantise(reduce(x, s)), quantise(bicubic(x, s)))) for x, s in zip(pictures, sizes, strict=True)
        ]
    return sum(values) / len(values)


def repeated(model: Rescaler, pictures: list[Tensor], down: float, times: int) -> list[float]:
    """Mean PSNR against the original after 1, 2, ... round trips of the same picture."""
    totals = [0.0] * times
    with torch.inference_mode():
        for x in pictures:
            now, size = x, small(x.shape[2:], down)
            for i in range(times):
                now = quantise(model.enlarge(quantise(model.reduce(now, size)), (x.shape[2], x.shape[3])))
                totals[i] += float(psnr(now, x)) / len(pictures)
    return totals


BICUBIC = Filter("bicubic")
"""The cycle that everything has to beat."""
