"""From a picture and a budget to quantised Gaussians: what the codecs of Gaussians have in common.

The fit gets two thirds of the steps, or of the seconds. Then quantisers are made for what it found, and in the rest of
the steps what is drawn is quantised while gradients pass straight through. Where bytes are limited, the faintest
Gaussians are dropped before these steps until what is left fits, so that the others can make up for them; what the
steps add to the size is settled by dropping a few more at the end.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol, Self, TypeVar

import numpy as np
import numpy.typing as npt
from torch import Tensor

from foveate.compress.codec import Progress
from foveate.compress.gaussian_fit import UNIFORM, Fit, Splats, pace, run
from foveate.engine.budget import Budget

TUNED = 0.35
"""Share of the steps, or seconds, under quantisation."""


class Coded(Protocol):
    """Gaussians as a file holds them."""

    def __len__(self) -> int: ...
    def select(self, index: npt.NDArray[np.intp]) -> Self:
        """Those of an index."""

    def splats(self, height: int, width: int) -> Splats:
        """What is drawn."""


C_co = TypeVar("C_co", bound=Coded, covariant=True)
C = TypeVar("C", bound=Coded)


class Quantiser(Protocol[C_co]):
    """What makes them; see `Fit.step` for the two that every step calls."""

    def __call__(self, splats: Splats) -> Splats: ...
    def pull(self, splats: Splats) -> Splats | None: ...
    def settle(self, fit: Fit, final: bool) -> C_co:
        """Codes of the Gaussians, and in the end whatever makes the best of them."""


@dataclass(frozen=True)
class Plan:
    """What a budget allows.

    Attributes:
        count: Gaussians.
        room: bytes for all sections, or None.
        seconds: of fitting, or None.
    """

    count: int
    room: float | None
    seconds: float | None


def plan(budget: Budget | None, pixels: int, header: int, affordable: Callable[[float], float]) -> Plan:
    """Read a budget; one Gaussian for 50 pixels without one.

    Args:
        header: bytes of the file that are not Gaussians.
        affordable: bytes -> how many Gaussians go in, or a few more.
    """
    unit = None if budget is None else budget.unit
    count, room = pixels / 50, None
    if budget is not None and unit == "bytes":
        room = budget.amount - header
        count = affordable(max(room, 0))
    elif budget is not None and unit == "gaussians":
        count = budget.amount
    seconds = budget.amount / 1000 if budget is not None and unit == "ms" else None
    return Plan(min(max(int(count), 1), pixels), room, seconds)


def fit_coded(
    fit: Fit,
    aim: Plan,
    steps: int,
    first: float,
    quantiser: Callable[[Fit], Quantiser[C]],
    size: Callable[[C], int],
    uniform: float = UNIFORM,
    progress: Progress | None = None,
) -> C:
    """Fit Gaussians and quantise them.

    Args:
        steps: in all, unless the aim has seconds.
        first, uniform: see `foveate.compress.gaussian_fit.run`.
        quantiser: made for the Gaussians of a fit.
        size: bytes of what it gives.
        progress: see `foveate.compress.codec.Progress`.
    """
    parts = (None, None) if aim.seconds is None else ((1 - TUNED) * aim.seconds, 0.9 * TUNED * aim.seconds)
    free = pace(max(1, round((1 - TUNED) * steps)), parts[0])
    stopped = run(fit, aim.count, free, first, uniform, _part(progress, 0, 1 - TUNED))
    through = quantiser(fit)
    if aim.room is not None:
        taken = size(through.settle(fit, False))
        if taken > aim.room:
            fit.keep(strongest(fit.splats, fit, int(0.99 * len(fit.splats.centres) * aim.room / taken)))
    report = _part(progress, 1 - TUNED, 1)
    for share in pace(max(1, round(TUNED * steps)), parts[1]) if not stopped else ():
        reached = fit.step(0.5 * (1 - share) + 0.05, through, through.pull)
        if report is not None and report(share, reached):
            break
    coded = through.settle(fit, True)
    while aim.room is not None and len(coded) > 1 and size(coded) > aim.room:
        left = min(len(coded) - 1, int(len(coded) * aim.room / size(coded)))
        coded = coded.select(strongest(coded.splats(fit.grid.height, fit.grid.width), fit, left).numpy())
    return coded


def strongest(splats: Splats, fit: Fit, count: int) -> Tensor:
    """Index of those whose loss would hurt most, in their order: the largest, times |c|^2 where colours add up."""
    weight = fit.form.size(splats.shapes)[0][:, 0].square()
    if fit.mode != "topk":
        weight = weight * splats.colours.square().sum(1)
    return weight.topk(min(max(count, 1), len(weight))).indices.sort().values


def _part(progress: Progress | None, start: float, stop: float) -> Callable[[float, float], bool] | None:
    """Progress over a part of the whole."""
    if progress is None:
        return None
    return lambda share, dB: bool(progress(start + share * (stop - start), dB))
