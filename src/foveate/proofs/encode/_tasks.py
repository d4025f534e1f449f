"""Small tasks that proofs of encoders learn: drawn digits, and CIFAR-10 where it is at hand."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw
from torch import Tensor, nn

from foveate.data.labelled import read_archive, standardised
from foveate.engine.fit import fit
from foveate.hosts.plugin import TokenHandle
from foveate.meter import Comparison, compare
from foveate.proofs.evidence import ProofContext

Draw = Callable[[int], tuple[Tensor, Tensor]]
"""So many pictures [B, 3, H, W] and their classes [B]."""

CANVAS, GLYPH, STEP = 24, 16, 4
"""Sides of the canvas and of a digit on it, and what its place is a multiple of, in pixels."""

BATCH, LR = 32, 2e-3


@dataclass(frozen=True, eq=False)
class Task:
    """Ten classes.

    Args:
        name: what it is, for readers.
        side: of a picture, in pixels.
        stream: from a seed to training pictures.
        test: others, and their classes.
    """

    name: str
    side: int
    stream: Callable[[int], Draw]
    test: tuple[Tensor, Tensor]


def draw_glyphs() -> Tensor:
    """Digits as ink in 0..1, of three sizes and three slants each. Shape: [10, 9, 20, 20]."""
    found = []
    for digit in range(10):
        for size in (14, 17, 20):
            for angle in (-15, 0, 15):
                image = Image.new("L", (20, 20))
                ImageDraw.Draw(image).text((10, 10), str(digit), fill=255, anchor="mm", font_size=size)
                turned = image.rotate(angle, Image.Resampling.BILINEAR)
                found.append(torch.tensor(list(turned.tobytes()), dtype=torch.float32).view(20, 20) / 255)
    return torch.stack(found).view(10, -1, 20, 20)


def drawn_digits(context: ProofContext, tested: int = 1000) -> Task:
    """Digits of several sizes and slants somewhere on a noisy canvas, most of whose 36 patches of 4 are empty."""
    glyphs = F.interpolate(draw_glyphs(), (GLYPH, GLYPH), mode="bilinear", antialias=True)

    def stream(seed: int) -> Draw:
        dice = torch.Generator().manual_seed(seed)

        def draw(batch: int) -> tuple[Tensor, Tensor]:
            label = torch.randint(10, (batch,), generator=dice)
            which = torch.randint(glyphs.shape[1], (batch,), generator=dice)
            corner = STEP * torch.randint((CANVAS - GLYPH) // STEP + 1, (2, batch, 1, 1), generator=dice)
            place = torch.arange(GLYPH)
            canvas = 0.05 * torch.rand(batch, CANVAS, CANVAS, generator=dice)
            canvas[torch.arange(batch)[:, None, None], corner[0] + place[:, None], corner[1] + place] += glyphs[
                label, which
            ]
            x = canvas[:, None].expand(-1, 3, -1, -1) * 2 - 1
            return x.to(context.device), label.to(context.device)

        return draw

    return Task("drawn digits", CANVAS, stream, stream(context.seed + 1000)(tested))


def cifar(context: ProofContext, learned: int = 20_000, tested: int = 2000) -> Task | None:
    """CIFAR-10, in the full proof and where the data folder holds it."""
    names = ("cifar10_train_jpeg.npz", "cifar10_test_jpeg.npz")
    if context.quick or context.data is None or not all((context.data / name).is_file() for name in names):
        return None
    train, held = (
        read_archive(context.data / n, c).to(context.device) for n, c in zip(names, (learned, tested), strict=True)
    )
    return Task("CIFAR-10", 32, lambda seed: train.draws(seed, shift=4), (standardised(held.pictures), held.labels))


def teach(network: nn.Module, draw: Draw, steps: int, lr: float = LR) -> None:
    """Train, and leave the network in evaluation mode."""

    def loss(_: int) -> Tensor:
        x, label = draw(BATCH)
        return F.cross_entropy(network(x), label)

    fit(network.train(), loss, steps, lr=lr, every=steps, average=0.98, log=lambda line: None)
    network.eval()


def accuracy(network: Callable[[Tensor], Tensor], test: tuple[Tensor, Tensor]) -> float:
    """Share of pictures whose class is found."""
    with torch.inference_mode():
        found = torch.cat([network(x).argmax(1) for x in test[0].split(250)])
    return float((found == test[1]).float().mean())


def race(host: nn.Module, handle: TokenHandle, x: Tensor, pairs: int) -> Comparison:
    """A host alone and with its plug-in, in turn."""

    def run() -> None:
        with torch.inference_mode():
            host(x)

    def alone() -> None:
        with handle.paused():
            run()

    return compare(alone, run, pairs)
