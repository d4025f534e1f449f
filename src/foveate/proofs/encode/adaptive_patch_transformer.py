"""Proof of APT: fewer tokens where a picture is plain, as much faster as FLOPs are fewer, and no accuracy lost.

Tokens: photographs at 384 x 384 with the published thresholds. Time: a vision transformer with random weights, which do
for time, on photographs, with the published threshold and at half the FLOPs per picture, in turn with itself unchanged.

Accuracy: digits of random size, slant and brightness, drawn somewhere on a plain ground of 32 x 32 pixels. A small
transformer with patches of 4 learns to read them; copies of it then get about half the tokens and a short fine-tuning,
by entropy, or by joining as many squares at random, or with patches of 8 everywhere (a quarter of the tokens). One
more is fine-tuned for as long as it is.
"""

from collections.abc import Callable
from copy import deepcopy
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from foveate.encode.adaptive_patch_transformer import AdaptivePatchTransformer
from foveate.engine.fit import fit
from foveate.hosts.picture import HALF, Pixels
from foveate.layers.transformer import VisionTransformer
from foveate.meter import Comparison, compare
from foveate.proofs.encode._tasks import draw_glyphs
from foveate.proofs.evidence import Evidence, ProofContext, Row

SIDE = 384
SIZES = {"quick": (384, 4, 6), "full": (768, 12, 12)}
"""Width, depth and heads of the transformer that is timed: a third of ViT-S, and ViT-B; patches of 16."""

HALVED, PAIRS = 4, {"quick": 2, "full": 3}
"""Photographs at half the FLOPs (all of them are timed with the published threshold), and pairs of runs."""

PUBLISHED, FINER = (5.5,), (6.0, 4.0)
"""Thresholds in bits: the paper's for 32 pixels, and the authors' example for 32 and 64."""

CLAIMED = 1.4
LEAST_SPEEDUP, LEAST_EFFICIENCY = 1.3, 0.9
PLAIN, BUSY = ("moon", 0.45), ("gravel", 0.98)
"""A photograph whose share of tokens must be at most this, and one whose must be at least this."""

CANVAS, PATCH, CLASSES = 32, 4, 10
LEARN, TUNE, SEEDS = {"quick": 180, "full": 400}, {"quick": 150, "full": 150}, {"quick": 1, "full": 3}
BATCH, TESTED, LR = 32, 500, 3e-3
LOST = 0.03
"""How much less accurate than the dense network the adaptive one may be."""


def prove(context: ProofContext) -> Evidence:
    """Count tokens, race, and teach."""
    pixels = Pixels(*HALF, (SIDE, SIDE), 16)
    photographs = {
        name: pixels.normalise(F.interpolate(p[None], (SIDE, SIDE), mode="bilinear", antialias=True))
        for name, p in context.photographs()
    }
    host = transformer(context)
    shares = token_shares(host, photographs, PUBLISHED)
    finer = token_shares(host, photographs, FINER)
    x = torch.cat(list(photographs.values()))
    published = race(context, host, x, thresholds=PUBLISHED)
    half = race(context, host, x[:HALVED], budget=0.5)
    learned = accuracies(context)
    many, few = f"{len(x)} photographs", f"{HALVED} photographs"
    rows = [_row(f"host, {many}", published, 0), _row(f"APT, threshold {PUBLISHED[0]}, {many}", published, 1)]
    rows += [_row(f"host, {few}", half, 0), _row(f"APT, half the FLOPs, {few}", half, 1)]
    rows += [Row(f"digits, {name}", accuracy=a, tokens_of_64=n) for name, (a, n) in learned.items()]
    rows += [Row(name, token_share=shares[name], finer_token_share=finer[name]) for name in shares]
    efficiency = half.efficiency or 0.0
    right = {name: accuracy for name, (accuracy, _) in learned.items()}
    return Evidence(
        system="adaptive-patch-transformer",
        claim="higher throughput at the same accuracy, by large patches where a picture is plain",
        rows=tuple(rows),
        claimed="1.4x the throughput (ViT-L) at the same accuracy",
        measured=f"{published.speedup:.2f}x, {half.speedup:.2f}x at half the FLOPs (efficiency {efficiency:.2f}); "
        f"digits {right['by entropy']:.1%} right after {right['dense']:.1%}, {right['at random']:.1%} at random",
        holds=verdict(published.speedup, efficiency, shares, right),
        notes=(
            f"Holds when the published threshold of {PUBLISHED[0]} bits makes all {len(x)} photographs together at "
            f"least {LEAST_SPEEDUP} times as fast, half the FLOPs have an efficiency of at least {LEAST_EFFICIENCY}, "
            f"{PLAIN[0]} keeps at most {PLAIN[1]:.0%} of its tokens and {BUSY[0]} at least {BUSY[1]:.0%}, and digits "
            f"are read at most {LOST:.0%} worse than by the dense network, and better than with squares joined at "
            "random or large patches everywhere.",
            "The paper measures ViT-L and ViT-H on ImageNet; here time is of random weights and accuracy of a small "
            "network. Digits are drawn with 50% of the tokens on average.",
            f"Mean share of tokens on {len(shares)} photographs: {_mean(shares):.2f} with {PUBLISHED}, "
            f"{_mean(finer):.2f} with {FINER}.",
        ),
        claimed_ratio=CLAIMED,
        measured_ratio=published.speedup,
    )


def verdict(speedup: float, efficiency: float, shares: dict[str, float], right: dict[str, float]) -> bool:
    """Whether the claim holds.

    Args:
        speedup: with the published threshold.
        efficiency: at half the FLOPs.
        shares: of tokens, by photograph.
        right: accuracy "dense", "by entropy", "at random" and "patches of 8".
    """
    fast = speedup >= LEAST_SPEEDUP and efficiency >= LEAST_EFFICIENCY
    sensible = shares[PLAIN[0]] <= PLAIN[1] and shares[BUSY[0]] >= BUSY[1]
    kept = right["by entropy"] >= right["dense"] - LOST
    return fast and sensible and kept and right["by entropy"] > max(right["at random"], right["patches of 8"])


def transformer(context: ProofContext) -> nn.Module:
    """What is timed."""
    width, depth, heads = SIZES[context.mode]
    torch.manual_seed(context.seed)
    made = VisionTransformer(SIDE, embed_dim=width, depth=depth, num_heads=heads, num_classes=0)
    return made.to(context.device).eval()


def token_shares(host: nn.Module, photographs: dict[str, Tensor], thresholds: tuple[float, ...]) -> dict[str, float]:
    """Share of tokens that thresholds leave, by photograph."""
    with AdaptivePatchTransformer(host, thresholds=thresholds) as handle:
        looks = {name: handle.look(x) for name, x in photographs.items()}
    return {name: look.tokens[0] / look.full for name, look in looks.items()}


def race(context: ProofContext, host: nn.Module, x: Tensor, **settings: Any) -> Comparison:
    """The host alone and with the plug-in, in turn."""

    def run() -> None:
        with torch.inference_mode():
            host(x)

    with AdaptivePatchTransformer(host, **settings) as handle:

        def alone() -> None:
            with handle.paused():
                run()

        return compare(alone, run, PAIRS[context.mode])


# ----------------------------------------------------------------------------------------------------------- digits


def accuracies(context: ProofContext) -> dict[str, tuple[float, float]]:
    """Accuracy and mean tokens of the networks after fine-tuning, means over seeds."""
    found = [_accuracies(context, context.seed + i) for i in range(SEEDS[context.mode])]
    return {name: (_mean({i: f[name][0] for i, f in enumerate(found)}), found[0][name][1]) for name in found[0]}


def _accuracies(context: ProofContext, seed: int) -> dict[str, tuple[float, float]]:
    torch.manual_seed(seed)
    dice, glyphs = torch.Generator().manual_seed(seed), draw_glyphs()
    draws = partial(digits, glyphs, dice)
    dense = VisionTransformer(CANVAS, PATCH, 64, 4, 4, num_classes=CLASSES, global_pool="avg").to(context.device)
    teach(dense, draws, LEARN[context.mode])
    test, sample = digits(glyphs, torch.Generator().manual_seed(seed + 1000), TESTED), draws(256)[0]
    total = (CANVAS // PATCH) ** 2
    results = {}
    ways: dict[str, dict[str, Any]] = {
        "dense": {"thresholds": ()},
        "by entropy": {"budget": f"{total // 2} tokens", "pictures": sample},
        "at random": {"budget": f"{total // 2} tokens", "scales": 3},
        "patches of 8": {"thresholds": (float("inf"),)},
    }
    for name, settings in ways.items():
        network = deepcopy(dense)
        with AdaptivePatchTransformer(network, **settings) as handle:
            if name == "at random":
                handle.chooser.measure = lambda grey, size, _: torch.rand(
                    len(grey), grey.shape[2] // size, grey.shape[3] // size, generator=dice
                )
            teach(network, draws, TUNE[context.mode])
            tokens = handle.look(test[0]).tokens
            results[name] = (accuracy(network, test), sum(tokens) / len(tokens))
    return results


def teach(network: nn.Module, draws: Callable[[int], tuple[Tensor, Tensor]], steps: int) -> None:
    """Train to name digits."""

    def loss(_: int) -> Tensor:
        x, label = draws(BATCH)
        return F.cross_entropy(network(x), label)

    network.train()
    fit(network, loss, steps, lr=LR, every=steps, average=0.98, log=lambda line: None)
    network.eval()


def accuracy(network: nn.Module, test: tuple[Tensor, Tensor]) -> float:
    """Share of digits named right."""
    with torch.inference_mode():
        named = torch.cat([network(x).argmax(1) for x in test[0].split(250)])
    return float((named == test[1]).float().mean())


def digits(glyphs: Tensor, dice: torch.Generator, batch: int) -> tuple[Tensor, Tensor]:
    """Draw digits at whole patches from the corner of a plain ground. Shape: -> normalised [B, 3, 32, 32], [B]."""
    label = torch.randint(CLASSES, (batch,), generator=dice)
    ink = glyphs[label, torch.randint(glyphs.shape[1], (batch,), generator=dice)]
    corner = torch.randint((CANVAS - 20) // PATCH + 1, (2, batch, 1, 1), generator=dice) * PATCH
    place = torch.arange(20)
    canvas = torch.zeros(batch, CANVAS, CANVAS)
    canvas[torch.arange(batch)[:, None, None], corner[0] + place[:, None], corner[1] + place] = ink
    contrast = 0.4 + 0.4 * torch.rand(batch, 1, 1, generator=dice)
    shown = 0.2 + canvas * contrast + 0.01 * torch.rand(canvas.shape, generator=dice)
    return (shown[:, None].expand(-1, 3, -1, -1) - 0.5) / 0.5, label


def _mean(values: dict[Any, float]) -> float:
    return sum(values.values()) / len(values)


def _row(name: str, clock: Comparison, side: int) -> Row:
    assert clock.flops is not None
    ms = 1e3 * sorted(clock.seconds[side])[len(clock.seconds[side]) // 2]
    figures = {"gflops": clock.flops[side] / 1e9, "ms": ms, "speedup": clock.speedup if side else 1.0}
    return Row(name, **figures, efficiency=(clock.efficiency or 0.0) if side else 1.0)
