"""Proof of PCSR: choosing the head pixel by pixel keeps the dense network's PSNR at about half its FLOPs.

On pictures that the network was not trained on, three ways to spend the same number of heavy pixels:

    pixels    the highest scores d_q of the classifier (the system)
    patches   the 32x32 output patches of the highest mean p_1 (what ClassSR and its kin decide by)
    random    anywhere

and what each recovers of the way from all light to all heavy, R = (PSNR - PSNR_light) / (PSNR_heavy - PSNR_light), at
30 % heavy pixels. A random choice recovers a little more than 30 %. The weights are those that come with foveate, or,
where there are none, those of a small network trained here.
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor

from foveate import weights
from foveate.engine.allocate import top_k
from foveate.engine.importance import pool_patches
from foveate.layers.upscaler import enlarge
from foveate.proofs.evidence import Evidence, ProofContext, Row
from foveate.proofs.restore._shared import (
    HELD_OUT,
    NATURAL,
    Pair,
    crops,
    curve_and_map,
    measured_pairs,
    on_the_clock,
    quality,
    race,
    train,
    training_pairs,
)
from foveate.restore.pcsr import PCSR

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from PIL import Image

SCALE = 4
SHARE = 0.3
"""Heavy share at which the three ways are compared."""

BUDGETS = (1.0, 0.75, 0.5)
CURVE = (0.0, 0.1, 0.2, 0.3, 0.45, 0.6, 0.8, 1.0)
"""Heavy shares of the figure."""

PATCH = 32
LOSS_ALLOWED = 0.1
"""dB that budget 0.5 may cost."""

STEPS = {"quick": (600, 300), "full": (3000, 1000)}
"""Steps of the two phases, where a network has to be trained here."""

WAYS = {"pixels": "PCSR", "patches": "patch-level flags", "random": "random flags"}


@dataclass(frozen=True)
class Both:
    """A picture by both heads: light, heavy [1, 3, H, W], and the score d of every output pixel [1, 1, H, W]."""

    pair: Pair
    light: Tensor
    heavy: Tensor
    score: Tensor

    def ranking(self, way: str, dice: torch.Generator) -> Tensor:
        """By what pixels are chosen. Shape: [1, 1, H, W], the highest first."""
        if way == "pixels":
            return self.score
        if way == "random":
            return torch.rand(self.score.shape, generator=dice).to(self.score)
        height, width = self.score.shape[2:]
        means = pool_patches(self.score.sigmoid(), PATCH)[:, None]
        return F.interpolate(means, scale_factor=PATCH, mode="nearest")[..., :height, :width]

    def mixed(self, heavy: Tensor) -> Tensor:
        """Heavy colours where flagged, light ones elsewhere."""
        return torch.where(heavy, self.heavy, self.light)

    def flagged(self, ranking: Tensor, share: float) -> Tensor:
        """Exactly this share of pixels, the first of a ranking; within equal ones from the top left."""
        return top_k(ranking.flatten(), int(share * ranking.numel())).view_as(ranking)


def prove(context: ProofContext) -> Evidence:
    """Spend the same heavy pixels by score, by patch and at random; then run the budgets and the clock."""
    model, origin, names = _network(context)
    pairs, where = measured_pairs(context, model.scale, names)
    dice = torch.Generator().manual_seed(context.seed)
    with torch.inference_mode():
        pictures = [both_heads(model, p) for p in context.track(pairs, "running both heads")]
        curves = {
            way: [_mean(_spent(p, p.ranking(way, dice), share) for p in pictures) for share in CURVE]
            for way in context.track(WAYS, "spending heavy pixels")
        }
        adm = [two_means(p.score) for p in pictures]
        adm_psnr = _mean(quality(p.mixed(flags), p.pair) for p, flags in zip(pictures, adm, strict=True))
        adm_share = _mean(float(flags.float().mean()) for flags in adm)
    light, heavy = curves["pixels"][0], curves["pixels"][-1]
    at = CURVE.index(SHARE)
    recovered = {way: recovery(curve[at], light, heavy) for way, curve in curves.items()}

    budgets = sorted({b for b in BUDGETS if b >= model.floor} | {model.floor}, reverse=True)
    rendered = {b: [model.upscale(p.low, b) for p in pairs] for b in context.track(budgets, "running budgets")}
    psnr = {b: _mean(quality(r.image, p) for r, p in zip(rendered[b], pairs, strict=True)) for b in budgets}
    flops = {b: _mean(r.flops for r in rendered[b]) for b in budgets}
    half = min(b for b in budgets if b >= 0.5)
    cost = psnr[1.0] - psnr[half]
    clock = race(model, pairs, half, 5 if context.quick else 9)

    pixels = _mean(p.low[0, 0].numel() for p in pairs)
    rows = [_budget_row(b, psnr[b], flops[b], flops[1.0]) for b in budgets]
    rows += [
        Row(
            f"{name}, {SHARE:.0%} heavy",
            psnr_y_db=curves[way][at],
            gap_recovered=recovered[way],
            gflops=model.cost(SHARE) * pixels / 1e9,
            flop_share=model.cost(SHARE) / model.cost(1.0),
        )
        for way, name in reversed(WAYS.items())
    ]
    rows.append(
        Row(
            f"PCSR by 2-means, {adm_share:.0%} heavy",
            psnr_y_db=adm_psnr,
            gap_recovered=recovery(adm_psnr, light, heavy),
            gflops=model.cost(adm_share) * pixels / 1e9,
            flop_share=model.cost(adm_share) / model.cost(1.0),
        )
    )
    ratio = flops[half] / flops[1.0]
    return Evidence(
        system="pcsr",
        claim="the dense upsampler's PSNR at about half its FLOPs, by choosing its head pixel by pixel",
        rows=tuple(rows),
        claimed="0.57x the FLOPs at -0.02 dB",
        measured=(
            f"{ratio:.2f}x the FLOPs at {-cost:+.2f} dB; {SHARE:.0%} heavy pixels recover {recovered['pixels']:.0%} of "
            f"the gap (patches {recovered['patches']:.0%}, random {recovered['random']:.0%})"
        ),
        holds=half < 0.6 and verdict(recovered, cost, heavy - light),
        notes=(
            f"x{model.scale}, {origin}. {where}",
            f"Holds when all light loses more than {LOSS_ALLOWED} dB (here {heavy - light:.2f}), PCSR recovers more of "
            f"that than random and patch-level flags at {SHARE:.0%} heavy pixels, and budget 0.5 costs less than "
            f"{LOSS_ALLOWED} dB.",
            on_the_clock(clock),
            "Every picture meets the budget by itself. FLOPs are per picture, classifier included.",
        ),
        figure=_figure(model, pairs[0], curves, pixels, half),
        claimed_ratio=0.57,
        measured_ratio=ratio,
    )


def verdict(recovered: dict[str, float], cost: float, gap: float) -> bool:
    """Whether the claim holds.

    Args:
        recovered: share of the gap that each way recovers.
        cost: dB that budget 0.5 costs.
        gap: dB between all light and all heavy; where light heads do as well, there is nothing to choose.
    """
    best_rival = max(recovered["random"], recovered["patches"])
    return gap > LOSS_ALLOWED and recovered["pixels"] > best_rival and cost < LOSS_ALLOWED


def recovery(psnr: float, light: float, heavy: float) -> float:
    """The share of the way from all light to all heavy; nan where there is no gap to recover.

    >>> recovery(31.5, light=30.0, heavy=32.0)
    0.75
    """
    return (psnr - light) / (heavy - light) if heavy > light else float("nan")


def both_heads(model: PCSR, pair: Pair) -> Both:
    """Run light head, heavy head and classifier on every output pixel."""
    s, (h, w) = model.scale, pair.low.shape[2:]
    rows = model.encoder(pair.low.contiguous(memory_format=torch.channels_last))[0].permute(1, 2, 0).flatten(0, 1)

    def picture(values: Tensor) -> Tensor:  # [h*w, s*s, C] -> [1, C, H, W]
        return F.pixel_shuffle(values.view(1, h, w, -1, values.shape[-1]).permute(0, 4, 3, 1, 2).flatten(1, 2), s)

    base = enlarge(pair.low, s)
    light, _ = model.colours(rows, float("inf"))
    heavy, _ = model.colours(rows, None, 1.0)
    return Both(pair, picture(light) + base, picture(heavy) + base, picture(model.scores(rows)[..., None]))


def two_means(score: Tensor, rounds: int = 50) -> Tensor:
    """The paper's adaptive decision: 2-means on min-max-normalised p_1, from {0, 1}; the upper cluster is heavy.

    A constant p_1 has no two clusters; its pixels go by argmax.
    """
    p = score.sigmoid()
    spread = p.max() - p.min()
    if not spread > 0:
        return score > 0
    p = (p - p.min()) / spread
    low, high = 0.0, 1.0
    for _ in range(rounds):
        upper = p > (low + high) / 2
        means = float(p[~upper].mean()), float(p[upper].mean())
        if means == (low, high):
            break
        low, high = means
    return p > (low + high) / 2


def _network(context: ProofContext) -> tuple[PCSR, str, tuple[str, ...]]:
    """A network, where it comes from, and the photographs of scikit-image that it has not seen."""
    scales = weights.available().get("pcsr", [])
    if scales:
        model: Any = weights.load("pcsr", SCALE if SCALE in scales else scales[-1])
        return model.to(context.device), "weights that come with foveate", NATURAL
    model = PCSR(SCALE, "fsrcnn", {"channels": 24}, heavy=[32] * 4, light=[8] * 2, classifier=[]).to(context.device)
    draw = crops(training_pairs(context, SCALE), context.seed)
    first, second = STEPS[context.mode]
    dense = [*model.encoder.parameters(), *model.heavy.parameters()]
    train(context, model, lambda: model.dense_loss(*draw(8, 32), 4), first, "training the heavy head", 2e-3, dense)
    rest = [*model.light.parameters(), *model.classifier.parameters()]
    train(
        context, model, lambda: model.routed_loss(*draw(8, 32), 4), second, "training light head", 2e-3, rest, clip=1e6
    )
    return model, f"a small FSRCNN-PCSR trained here for {first} + {second} steps", HELD_OUT


def _spent(picture: Both, ranking: Tensor, share: float) -> float:
    return quality(picture.mixed(picture.flagged(ranking, share)), picture.pair)


def _mean(values: Any) -> float:
    values = list(values)
    return sum(values) / len(values)


def _budget_row(budget: float, psnr: float, flops: float, full: float) -> Row:
    return Row(f"PCSR, budget {budget:.2g}", psnr_y_db=psnr, gflops=flops / 1e9, flop_share=flops / full)


def _figure(
    model: PCSR, pair: Pair, curves: dict[str, list[float]], pixels: float, budget: float
) -> "Image.Image | None":
    gflops = [model.cost(share) * pixels / 1e9 for share in CURVE]

    def plot(axes: "Axes") -> None:
        for way, mark in zip(WAYS, ("o-", "s--", "^:"), strict=True):
            axes.plot(gflops, curves[way], mark, label=WAYS[way], markersize=4)
        axes.set_xlabel("GFLOPs per picture")

    return curve_and_map(plot, model, pair, budget)
