"""What the proofs of super-resolution share: pictures held out from training, random crops, training, scoring.

A pair is a photograph and its antialiased bicubic reduction, rounded to 8 bits. Figures are PSNR on the luminance of
pictures rounded to 8 bits, a border of `scale` pixels left out, averaged over pictures. Networks that are trained in a
proof see photographs of scikit-image only, never those they are measured on.
"""

import time
from collections.abc import Callable, Generator, Iterable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, cast

import torch
from torch import Tensor, nn

from foveate.data import pictures
from foveate.data.degrade import downscale, mod_crop
from foveate.engine.fit import fit
from foveate.errors import InputError
from foveate.layers.upscaler import Upscaler
from foveate.meter import Comparison, compare, psnr, psnr_y
from foveate.ops.color import rgb_to_y
from foveate.proofs.evidence import ProofContext
from foveate.proofs.report import figure_to_picture

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from PIL import Image

HELD_OUT = ("coffee", "chelsea", "camera", "hubble")
"""Photographs of scikit-image that no proof trains on."""

NATURAL = ("astronaut", "coffee", "chelsea", "motorcycle", "rocket")
"""Colour photographs that the shipped weights were not trained on."""

Draw = Callable[[int, int], tuple[Tensor, Tensor]]
"""draw(batch, side) -> crops (low [batch, C, side, side], high [batch, C, s*side, s*side])."""


@dataclass(frozen=True)
class Pair:
    """A photograph and what is given to the networks: low [1, C, h, w], high [1, C, s*h, s*w]."""

    name: str
    low: Tensor
    high: Tensor

    @property
    def luminance(self) -> "Pair":
        """The same with one channel, Y."""
        return replace(self, low=rgb_to_y(self.low), high=rgb_to_y(self.high))


def pair(name: str, picture: Tensor, scale: int) -> Pair:
    """Reduce a photograph [3, H, W], cut to a multiple of the scale."""
    return Pair(name, downscale(picture[None], scale, rounded=True), mod_crop(picture[None], scale))


def training_pairs(context: ProofContext, scale: int) -> list[Pair]:
    """The photographs of scikit-image that are not held out."""
    return [pair(name, picture, scale) for name, picture in context.photographs() if name not in HELD_OUT]


def measured_pairs(context: ProofContext, scale: int, names: tuple[str, ...] = HELD_OUT) -> tuple[list[Pair], str]:
    """Pictures to measure on, and a sentence that names them.

    Full proofs take Set5 and kodak12 where the context has them, all others the photographs of scikit-image by name.
    """
    folders = [folder for name in ("set5", "kodak12") if context.full and (folder := context.folder(name))]
    if folders:
        found = [_read(file, scale, context) for folder in folders for file, _ in pictures.list_pictures(folder)]
        return found, f"Measured on {' and '.join(f.name for f in folders)} ({len(found)} pictures)."
    photographs = dict(context.photographs())
    found = [pair(name, photographs[name], scale) for name in names]
    return found, f"Measured on photographs of scikit-image: {', '.join(p.name for p in found)}."


def _read(file: Path, scale: int, context: ProofContext) -> Pair:
    return pair(file.stem, pictures.load(file).rgb()[0].to(context.device), scale)


def crops(pairs: list[Pair], seed: int) -> Draw:
    """Random aligned crops with flips and transposition, every picture by its area.

    Raises: InputError, when a crop is drawn, if a picture is smaller than that.
    """
    dice = torch.Generator().manual_seed(seed)
    areas = torch.tensor([float(p.low[0, 0].numel()) for p in pairs])
    scale = pairs[0].high.shape[-1] // pairs[0].low.shape[-1]

    def draw(batch: int, side: int) -> tuple[Tensor, Tensor]:
        smallest = min(min(p.low.shape[-2:]) for p in pairs)
        if smallest < side:
            raise InputError(f"crops of {side} pixels do not fit in a picture of {smallest}; draw smaller ones.")
        lows, highs = [], []
        for i in torch.multinomial(areas, batch, replacement=True, generator=dice).tolist():
            low, high = pairs[i].low[0], pairs[i].high[0]
            y, x = (int(torch.randint(n - side + 1, (), generator=dice)) for n in low.shape[-2:])
            low = low[:, y : y + side, x : x + side]
            high = high[:, scale * y : scale * (y + side), scale * x : scale * (x + side)]
            turn = int(torch.randint(8, (), generator=dice))
            for bit, change in enumerate((_flip_rows, _flip_columns, _transpose)):
                if turn >> bit & 1:
                    low, high = change(low), change(high)
            lows.append(low)
            highs.append(high)
        return torch.stack(lows), torch.stack(highs)

    return draw


def _flip_rows(x: Tensor) -> Tensor:
    return x.flip(-2)


def _flip_columns(x: Tensor) -> Tensor:
    return x.flip(-1)


def _transpose(x: Tensor) -> Tensor:
    return x.transpose(-1, -2)


def train(
    context: ProofContext,
    model: nn.Module,
    loss: Callable[[], Tensor],
    steps: int,
    text: str,
    lr: float = 1e-3,
    parameters: Iterable[nn.Parameter] | None = None,
    clip: float = 1.0,
) -> float:
    """Train with a progress bar; the model is left in evaluation mode with averaged weights.

    Args:
        loss: called once per step; draws its own crops.
        lr, parameters, clip: as in `foveate.engine.fit.fit`.

    Returns: seconds spent.
    """
    bar = cast("Generator[int]", context.track(range(steps), text))
    start = time.perf_counter()

    def step(_: int) -> Tensor:
        next(bar)
        return loss()

    model.to(context.device, memory_format=torch.channels_last)  # type: ignore[call-overload]
    fit(model.train(), step, steps, lr=lr, parameters=parameters, clip=clip, log=lambda _: None)
    bar.close()
    model.eval()
    return time.perf_counter() - start


def mean_psnr(enlarge: Callable[[Tensor], Tensor], pairs: Iterable[Pair]) -> float:
    """PSNR of the luminance in dB, the mean over pictures.

    Args:
        enlarge: low [1, C, h, w] -> [1, C, s*h, s*w], C = 3 for RGB or 1 for luminance.
    """
    with torch.inference_mode():
        values = [quality(enlarge(p.low), p) for p in pairs]
    return sum(values) / len(values)


def quality(image: Tensor, truth: Pair) -> float:
    """PSNR of the luminance of one picture in dB."""
    border = truth.high.shape[-1] // truth.low.shape[-1]
    if image.shape[1] == 3:
        return float(psnr_y(image, truth.high, border, round_to_8bit=True))
    levels = ((image.clamp(0, 1) * 255).round() / 255, (truth.high * 255).round() / 255)
    return float(psnr(*levels, border=border))


def race(model: Upscaler, pairs: list[Pair], budget: float, runs: int) -> Comparison:
    """Time a budget against budget 1 on the largest picture, both through the same call."""
    run = partial(model.upscale, max(pairs, key=lambda p: p.low.numel()).low)
    return compare(partial(run, 1.0), partial(run, budget), runs, names=("budget 1", f"budget {budget:.2g}"))


def on_the_clock(clock: Comparison) -> str:
    """The outcome of `race` as a sentence."""
    return (
        f"On the clock, {clock.names[1]} is {clock.speedup:.2f} times as fast as budget 1 on the largest picture; "
        f"FLOPs fall {clock.flop_reduction:.2f} times: efficiency {clock.efficiency:.2f}."
    )


def curve_and_map(plot: "Callable[[Axes], None]", model: Upscaler, pair: Pair, budget: float) -> "Image.Image | None":
    """A figure of three panels: what `plot` draws (PSNR against cost), a result, and where its compute went.

    None where matplotlib is missing.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError:
        return None
    rendered = model.upscale(pair.low, budget)
    figure = Figure((12, 3.8), layout="constrained")
    curve, picture, effort = figure.subplots(1, 3, width_ratios=(1.3, 1, 1))
    plot(curve)
    curve.set_ylabel("PSNR-Y in dB")
    curve.legend(frameon=False)
    curve.grid(alpha=0.3)
    picture.imshow(rendered.image[0].clamp(0, 1).permute(1, 2, 0).cpu().numpy())
    picture.set_title(f"{pair.name}, x{model.scale}, budget {budget:.2g}", fontsize=10)
    shown = effort.imshow(rendered.effort[0, 0].cpu().numpy(), cmap="magma", vmin=0, vmax=1)
    effort.set_title("share of the full network", fontsize=10)
    figure.colorbar(shown, ax=effort, shrink=0.7)
    for axes in (picture, effort):
        axes.set_axis_off()
    return figure_to_picture(figure)
