"""Proof of APE: patches that leave where they stop improving give more PSNR per FLOP than one exit for all.

On patches of pictures that the network was not trained on:

    a  static    every patch leaves at the same exit; between two exits, a mixture of both (linear in FLOPs)
    b  APE       by the paper's rule, one threshold on the regressor's scores for all patches, set to meet a budget
    c  oracle    by the same rule on the true t_e, at b's cost
    d  random    b's exits dealt out to other patches
    e  budget    every picture has the budget to itself, as `foveate upscale` shares it out

PSNR-Y is taken over the patches of a picture, a border of `scale` pixels shaved off each, and averaged over pictures.
The weights are those that come with foveate, or those of a small network trained here.
"""

from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from foveate import weights
from foveate.engine.allocate import calibrate
from foveate.ops.color import rgb_to_y
from foveate.proofs.evidence import Evidence, ProofContext, Row
from foveate.proofs.restore._shared import (
    HELD_OUT,
    NATURAL,
    Pair,
    crops,
    curve_and_map,
    measured_pairs,
    on_the_clock,
    race,
    train,
    training_pairs,
)
from foveate.restore.adaptive_patch_exiting import APE, Stay

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from PIL import Image

SCALE = 2
MIDDLE = (0.2, 0.4, 0.6, 0.8)
"""Budgets tried, as parts of the way from the first exit's cost to the full one."""

LOSS_ALLOWED, LOSS_SHARE = 0.05, 0.6
"""dB that may be lost at this share of the full FLOPs."""

STEPS = {"quick": 500, "full": 3000}
"""Training steps, where a network has to be trained here."""


@dataclass(frozen=True)
class Patches:
    """Patches of all pictures: low [P, 3, p, p], high [P, 3, s*p, s*p], and the picture each comes from [P]."""

    low: Tensor
    high: Tensor
    picture: Tensor

    def psnr_y(self, images: Tensor) -> float:
        """PSNR-Y of enlarged patches, pooled per picture, the mean over pictures."""
        s = self.high.shape[-1] // self.low.shape[-1]
        a, b = (rgb_to_y((x.clamp(0, 1) * 255).round() / 255)[..., s:-s, s:-s] for x in (images, self.high))
        errors = (a - b).square().mean((1, 2, 3)).clamp_min(1e-10)
        pictures = [errors[self.picture == i].mean() for i in self.picture.unique()]
        return float(torch.stack([-10 * torch.log10(e) for e in pictures]).mean())


@dataclass(frozen=True)
class Outcome:
    """PSNR-Y of a rule, its share of the full FLOPs, and the exit of each patch, counted from 1."""

    psnr: float
    share: float
    exits: Tensor = field(repr=False)


def prove(context: ProofContext) -> Evidence:
    """Send the same patches through the same network under four rules; compare PSNR at equal FLOPs."""
    model, origin, names = _network(context)
    pairs, where = measured_pairs(context, model.scale, names)
    patches = cut(pairs, model.patch, model.step)
    with torch.inference_mode():
        scores, gains = dense_scores(model, patches)
        run = partial(outcome, model, patches)
        count = len(patches.low)
        static = [run(by_exits(torch.full((count,), e))) for e in context.track(range(1, model.exits + 1), "static")]
        budgets = sorted({LOSS_SHARE, *(model.floor + part * (1 - model.floor) for part in MIDDLE)})
        tau = {b: threshold(model, scores, b) for b in budgets}
        ape = {b: run(model.by_threshold(tau[b])) for b in context.track(budgets, "APE by threshold")}
        alone = {b: per_picture(model, patches, b) for b in context.track(budgets, "APE by budget")}
        oracle = {
            b: run(by_exits(exits_at(gains, threshold(model, gains, found.share))))
            for b, found in context.track(ape.items(), "oracle")
        }
        shuffled = {
            b: run(by_exits(dealt(found.exits, context.seed)))
            for b, found in context.track(ape.items(), "random exits")
        }
    full = static[-1].psnr
    rivals = {b: between(static, found.share) for b, found in ape.items()}
    loss = min((full - o.psnr for o in ape.values() if o.share < LOSS_SHARE + 1e-3), default=float("inf"))
    cheapest = min((o.share for o in ape.values() if full - o.psnr < LOSS_ALLOWED), default=1.0)
    half = max(0.5, model.floor)
    clock = race(model, pairs, half, 5 if context.quick else 9)
    rules = {"oracle": [*oracle.values()], "APE, one threshold": [*ape.values()]}
    rules |= {"APE, budget per picture": [*alone.values()], "random exits": [*shuffled.values()]}

    rows = [Row(f"exit {e} for all", psnr_y_db=o.psnr, flop_share=o.share) for e, o in enumerate(static, 1)]
    for b, found in ape.items():
        rows.append(
            Row(
                f"APE, threshold {tau[b]:.2f}",
                psnr_y_db=found.psnr,
                flop_share=found.share,
                over_static_db=found.psnr - rivals[b],
                over_random_db=found.psnr - shuffled[b].psnr,
                over_oracle_db=found.psnr - oracle[b].psnr,
            )
        )
    rows += [
        Row(
            f"APE, budget {b:.2f} per picture",
            psnr_y_db=o.psnr,
            flop_share=o.share,
            over_static_db=o.psnr - between(static, o.share),
        )
        for b, o in alone.items()
    ]
    over_static = min(found.psnr - rivals[b] for b, found in ape.items())
    over_random = min(found.psnr - shuffled[b].psnr for b, found in ape.items())
    time_share = 1 / clock.speedup
    return Evidence(
        system="adaptive-patch-exiting",
        claim="the full network's PSNR at about 0.6x its multiply-accumulates, by letting smooth patches leave early",
        rows=tuple(rows),
        claimed=f"no loss at about {LOSS_SHARE}x the FLOPs",
        measured=(
            f"{-loss:+.2f} dB at {LOSS_SHARE}x the FLOPs or less, {over_static:+.2f} dB or more over static exits and "
            f"{over_random:+.2f} dB or more over random ones at equal FLOPs"
        ),
        holds=verdict(over_static, over_random, loss, full - static[0].psnr, time_share),
        notes=(
            f"x{model.scale}, {origin}. {where}",
            f"{count} patches of side {patches.low.shape[-1]}. A threshold is set to meet a budget on all of them.",
            "Holds when with every threshold APE is not below static exits and above random ones, a budget of at most "
            f"{LOSS_SHARE} loses less than {LOSS_ALLOWED} dB while the first exit for all loses more "
            f"({full - static[0].psnr:.2f} dB), and half of the FLOPs take less than 0.75 of the time.",
            f"Less than {LOSS_ALLOWED} dB is lost from {cheapest:.2f} of the FLOPs on.",
            on_the_clock(clock),
        ),
        figure=_figure(model, pairs[0], static, rules, half),
        claimed_ratio=LOSS_SHARE,
        measured_ratio=cheapest,
    )


def verdict(over_static: float, over_random: float, loss: float, depth: float, time_share: float) -> bool:
    """Whether the claim holds.

    Args:
        over_static, over_random: smallest lead in dB at equal FLOPs.
        loss: dB lost at LOSS_SHARE of the FLOPs or less.
        depth: dB between the first exit and the last; where the first does as well, there is nothing to decide.
        time_share: time at half of the FLOPs over time at all of them.
    """
    leads = over_static >= 0 and over_random > 0
    return leads and loss < LOSS_ALLOWED < depth and time_share < 0.75


def cut(pairs: list[Pair], side: int, step: int) -> Patches:
    """Cut pictures into patches, the last of a row or column moved to the border; smaller pictures are left out."""
    lows, highs, numbers = [], [], []
    for i, p in enumerate(pairs):
        h, w = p.low.shape[2:]
        if min(h, w) < side:
            continue
        s = p.high.shape[-1] // w
        for y in [*range(0, h - side, step), h - side]:
            for x in [*range(0, w - side, step), w - side]:
                lows.append(p.low[..., y : y + side, x : x + side])
                highs.append(p.high[..., s * y : s * (y + side), s * x : s * (x + side)])
                numbers.append(i)
    return Patches(torch.cat(lows), torch.cat(highs), torch.tensor(numbers, device=lows[0].device))


def outcome(model: APE, patches: Patches, rule: Stay) -> Outcome:
    """Run the patches under a rule."""
    images, exits = model.run(patches.low, rule)
    return Outcome(patches.psnr_y(images), cost_share(model, exits), exits)


def cost_share(model: APE, exits: Tensor) -> float:
    """Mean FLOPs of leaving at these exits over those of the last exit."""
    costs = torch.tensor(model.exit_costs(), dtype=torch.float64)
    return float(costs[exits.cpu() - 1].mean() / costs[-1])


def by_exits(exits: Tensor) -> Stay:
    """A rule, good for one run, by which each patch leaves at an exit given beforehand."""
    active = exits

    def stay(e: int, scores: Tensor) -> Tensor:
        nonlocal active
        go_on = active > e
        active = active[go_on]
        return go_on

    return stay


def per_picture(model: APE, patches: Patches, budget: float) -> Outcome:
    """Run the patches of each picture under a budget of its own."""
    exits = torch.zeros_like(patches.picture)
    images = torch.empty_like(patches.high)
    for i in patches.picture.unique():
        own = (patches.picture == i).nonzero()[:, 0]
        images[own], exits[own] = model.run(patches.low[own], model.by_budget(budget, len(own)))
    return Outcome(patches.psnr_y(images), cost_share(model, exits), exits)


def dense_scores(model: APE, patches: Patches) -> tuple[Tensor, Tensor]:
    """Scores s_e and what they should be, t_e, of every patch at every exit. Shapes: [P, E]."""
    found, wanted = [], []
    for low, high in zip(patches.low.split(8), patches.high.split(8), strict=True):
        pictures, scores = model.all_exits(low)
        found.append(scores)
        wanted.append(model.targets(low, high, pictures))
    return torch.cat(found), torch.cat(wanted)


def exits_at(scores: Tensor, tau: float) -> Tensor:
    """The first exit of each patch with a score of tau or more, counted from 1. Shape: [P, E] -> [P]."""
    return 1 + (scores[:, :-1] < tau).long().cumprod(1).sum(1)


def threshold(model: APE, scores: Tensor, share: float) -> float:
    """The threshold on scores at which the mean cost is at most `share` of the full one."""
    return calibrate(lambda tau: cost_share(model, exits_at(scores, tau)), share, -1.01, 2.01)


def between(static: list[Outcome], share: float) -> float:
    """PSNR of static exits at a share of the FLOPs, linear between neighbouring exits."""
    return float(np.interp(share, [o.share for o in static], [o.psnr for o in static]))


def dealt(exits: Tensor, seed: int) -> Tensor:
    """The same exits in another order."""
    return exits[torch.randperm(len(exits), generator=torch.Generator().manual_seed(seed)).to(exits.device)]


def _network(context: ProofContext) -> tuple[APE, str, tuple[str, ...]]:
    """A network, where it comes from, and the photographs of scikit-image that it has not seen."""
    scales = weights.available().get(APE.slug, [])
    if scales:
        model: Any = weights.load(APE.slug, 4 if 4 in scales else scales[-1])
        return model.to(context.device), "weights that come with foveate", NATURAL
    model = APE(SCALE, channels=16, blocks=6, interval=2, gain="error", patch=32, step=30).to(context.device)
    draw, steps = crops(training_pairs(context, SCALE), context.seed), STEPS[context.mode]
    train(context, model, lambda: model.loss(*draw(8, model.patch)), steps, "training all exits", 2e-3, clip=1e6)
    low, high = draw(256, model.patch)
    model.fit_regressor(low, high)
    model.calibrate(low)
    return model, f"a small network trained here for {steps} steps", HELD_OUT


def _figure(
    model: APE, pair: Pair, static: list[Outcome], rules: dict[str, list[Outcome]], budget: float
) -> "Image.Image | None":
    marks = {"oracle": "D:", "APE, one threshold": "o-", "APE, budget per picture": "x", "random exits": "^:"}

    def plot(axes: "Axes") -> None:
        for name, outcomes in rules.items():
            ends = [] if name == "APE, budget per picture" else [static[0], static[-1]]
            points = sorted([*outcomes, *ends], key=lambda o: o.share)
            axes.plot([o.share for o in points], [o.psnr for o in points], marks[name], label=name, markersize=4)
        axes.plot([o.share for o in static], [o.psnr for o in static], "s--", label="static exits", markersize=4)
        axes.set_xlabel("share of the full network's FLOPs")

    return curve_and_map(plot, model, pair, budget)
