"""Proof of BAIRNet: shrinking and enlarging learned together lose less than enlarging learned alone.

On the same crops, for as many steps, on scales 1.3 to 3 together:

    bicubic    shrink and enlarge by the bicubic filter
    one-way    bicubic reduction, BAIRNet's upscaler trained to undo it
    BAIRNet    both networks trained together

Then the same picture goes round five times, rounded to 8 bits at every step. The full proof sends it also through a
pair that was trained without the loss that keeps small pictures close to bicubic ones.
"""

from collections.abc import Callable
from math import inf

import torch
from torch import Tensor, nn

from foveate.layers.rescaler import quantise
from foveate.meter import count_parameters
from foveate.proofs.evidence import Evidence, ProofContext, Row
from foveate.proofs.restore._rescaling import (
    BICUBIC,
    Turn,
    bicubic,
    likeness,
    measured_pictures,
    repeated,
    round_trip,
    scales,
    small,
    training_crops,
)
from foveate.proofs.restore._shared import train
from foveate.restore.bidirectional_rescaling import BAIRNet

CONFIG = {"channels": 16, "blocks": 4, "every": 0}
BATCH, SIDE = 4, 48
STEPS = {"quick": 250, "full": 600}
FIDELITY = 4.0
"""Weight of the squared difference between small pictures and bicubic ones."""

SCALES = (1.5, 2.0, 2.5)
LEFT = {"quick": 0.95, "full": 0.85}
"""Share of the one-way pair's squared error that may be left at 1.5."""
GAIN = {"quick": 0.0, "full": 0.2}
"""dB over the one-way pair asked for at 2."""
LIKENESS, DROP, ROUNDS = 33.0, 1.5, 5
"""dB between small pictures and bicubic ones asked for at 2; dB that may be lost from the first to the fifth round."""


def prove(context: ProofContext) -> Evidence:
    """Train a pair together and an upscaler alone, and send photographs there and back."""
    mode = context.mode
    alone, pair = BAIRNet(**CONFIG), BAIRNet(**CONFIG)
    train(context, alone.up, _loss(context, alone, 0.0, together=False), STEPS[mode], "training one-way")
    train(context, pair, _loss(context, pair, FIDELITY), STEPS[mode], "training BAIRNet")
    pictures, where = measured_pictures(context)
    rounds = repeated(pair, pictures, 2.0, ROUNDS)
    rows = [
        _row("bicubic", BICUBIC.reduce, BICUBIC.enlarge, pictures, 0),
        _row("one-way", bicubic, alone.enlarge, pictures, count_parameters(alone.up)),
        _row("BAIRNet", pair.reduce, pair.enlarge, pictures, count_parameters(pair), rounds[-1]),
    ]
    loose = inf
    if context.full:
        free = BAIRNet(**CONFIG)
        train(context, free, _loss(context, free, 0.0), STEPS[mode], "training without fidelity")
        others = repeated(free, pictures, 2.0, ROUNDS)
        loose = others[0] - others[-1]
        parameters = count_parameters(free)
        rows.append(_row("BAIRNet, no fidelity", free.reduce, free.enlarge, pictures, parameters, others[-1]))
    one_way, own = rows[1].metrics, rows[2].metrics
    gains = [own[_key(s)] - one_way[_key(s)] for s in SCALES]
    left, drop = 10 ** (-gains[0] / 10), rounds[0] - rounds[-1]
    return Evidence(
        system="bidirectional-rescaling",
        claim="shrinking and enlarging learned together beat the best one-way arbitrary-scale upscaler by several dB",
        rows=tuple(rows),
        claimed="several dB",
        measured=(
            f"{left:.2f} of the one-way pair's squared error at 1.5 ({gains[0]:+.2f} dB), {gains[1]:+.2f} dB at 2, "
            f"{gains[2]:+.2f} dB at 2.5; {drop:.2f} dB lost from round 1 to {ROUNDS}"
        ),
        holds=verdict(left, gains[1], own["likeness_db"], drop, loose, LEFT[mode], GAIN[mode]),
        notes=(
            where,
            f"Networks of this size after {STEPS[mode]} steps cannot show several dB. The claim holds here when at "
            f"most {LEFT[mode]} of the squared error is left at 1.5, at least {GAIN[mode]} dB are gained at 2, small "
            f"pictures are within {LIKENESS:g} dB of bicubic ones (at 2), five rounds lose at most {DROP} dB over one"
            + (", and less than without the fidelity loss." if context.full else "."),
            f"PSNR by round at 2: {', '.join(f'{v:.2f}' for v in rounds)} dB.",
        ),
        measured_ratio=1 / left,
    )


def verdict(left: float, gain: float, like: float, drop: float, loose: float, most: float, least: float) -> bool:
    """Whether the claim holds.

    Args:
        left, most: share of the one-way pair's squared error at 1.5, and how much of it may be left.
        gain, least: dB over it at 2, and how many there have to be.
        like: dB of small pictures against bicubic ones.
        drop, loose: dB lost over the rounds, and by a pair without fidelity loss.
    """
    return left <= most and gain >= least and like >= LIKENESS and drop <= DROP and drop <= loose


def _key(scale: float) -> str:
    return f"psnr_{scale:g}".replace(".", "_")


def _row(
    name: str, reduce: Turn, enlarge: Turn, pictures: list[Tensor], parameters: int, last: float | None = None
) -> Row:
    trips = {_key(s): round_trip(reduce, enlarge, pictures, s) for s in SCALES}
    unequal = round_trip(reduce, enlarge, pictures, 1.5, 3.0)
    more = {} if last is None else {"likeness_db": likeness(reduce, pictures, 2.0), f"round_{ROUNDS}_at_2": last}
    return Row(name, **trips, psnr_1_5_by_3=unequal, **more, parameters=parameters)


def _loss(context: ProofContext, network: BAIRNet, fidelity: float, together: bool = True) -> Callable[[], Tensor]:
    draw, scale = training_crops(context), scales(context.seed, 1.3, 3.0)

    def loss() -> Tensor:
        x = draw(BATCH, SIDE)[1].contiguous(memory_format=torch.channels_last)
        size = small(x.shape[2:], scale())
        if together:
            return network.loss(x, size, fidelity, idempotence=0)
        return nn.functional.l1_loss(network.enlarge(quantise(bicubic(x, size)), (x.shape[2], x.shape[3])), x)

    return loss
