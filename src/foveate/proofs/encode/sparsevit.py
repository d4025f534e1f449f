"""Proof of SparseViT: time falls as windows are left out, active windows are the right ones, and a search finds ratios.

Time: the first stage of Swin-T (96 channels, windows of 7 x 7 on a 56 x 56 map), on photographs, with ratios up to 0.8;
and at half its FLOPs. Weights are random, which do for time.

Choice: a scrap of one of eight photographs, 12 x 12 pixels, lies somewhere on an empty canvas of 32 x 32;
of which one is to be said. A small Swin (32 and 64 channels, windows of 2 x 2 patches of 4) learns it, then goes
through sparsity-aware adaptation. With 60% of the windows left out, the most active ones are kept, or random ones, or
the least active.

Search: a few generations over three ratios on one set of canvases; what it finds is compared on another with the best
uniform ratio within the same FLOPs.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from foveate.encode.sparsevit import SparseViT, activity
from foveate.encode.sparsevit_ratios import LEVELS
from foveate.engine.fit import fit
from foveate.errors import MissingExtraError
from foveate.meter import Comparison, compare
from foveate.proofs.evidence import Evidence, ProofContext, Row

SIDE, TIMED, PAIRS = 224, {"quick": 2, "full": 4}, {"quick": 3, "full": 7}
LEFT_OUT = (0.2, 0.4, 0.6, 0.8)
CANVAS, SCRAP, BATCH, LR = 32, 12, 64, 3e-3
SHOWN = ("brick", "grass", "gravel", "astronaut", "coffee", "hubble", "page", "chelsea")
LEARN, ADAPT = {"quick": 250, "full": 1000}, {"quick": 150, "full": 500}
TESTED, JUDGED = {"quick": 600, "full": 2000}, {"quick": 200, "full": 1000}
SPARSE, AFFORDED = 0.6, 0.6
POPULATION, GENERATIONS = {"quick": 10, "full": 25}, {"quick": 1, "full": 6}

CLAIMED = 2.0
SLOWEST, STRAIGHT, EFFICIENT = 0.6, 0.95, 0.9
"""Share of the dense time at 60% left out, R^2 of time over windows, and efficiency at half the FLOPs."""

LOST, AHEAD, BEHIND = 0.05, 0.05, 0.02
"""Accuracy that active windows may lose against all; by how much they must beat random ones; how much worse than the
best uniform ratio a searched one may be, on canvases it was not searched on."""


def prove(context: ProofContext) -> Evidence:
    """Race, teach, choose, search."""
    clocks = races(context)
    half = clocks.pop("half")
    right, share = accuracies(context)
    ratios = {left: 1 / clock.speedup for left, clock in clocks.items()}
    fit_of_line = straightness(ratios)
    rows = [_row("Swin-T's first stage", half, 0), _row("SparseViT, half the FLOPs", half, 1)]
    rows += [_row(f"SparseViT, {left:.0%} of windows left out", clock, 1) for left, clock in clocks.items()]
    rows += [Row(f"scraps, {name}", accuracy=accuracy) for name, accuracy in right.items()]
    efficiency, latency = half.efficiency or 0.0, ratios[SPARSE]
    return Evidence(
        system="sparsevit",
        claim="about half the latency at 60% window sparsity, and no accuracy lost by leaving out quiet windows",
        rows=tuple(rows),
        claimed="about 0.5 of the time at 60% sparsity; 1.3 to 1.5x whole networks at equal accuracy",
        measured=f"{latency:.2f} of the time at 60% sparsity, {half.speedup:.2f}x at half the FLOPs (efficiency "
        f"{efficiency:.2f}); scraps {right['active windows']:.1%} right after {right['all windows']:.1%}, "
        f"{right['random windows']:.1%} at random",
        holds=verdict(latency, fit_of_line, efficiency, right),
        notes=(
            f"Holds when {SPARSE:.0%} of the windows left out leave at most {SLOWEST:.0%} of the time, time over "
            f"windows is a line (R^2 at least {STRAIGHT}, here {fit_of_line:.3f}), half the FLOPs have an efficiency "
            f"of at least {EFFICIENT}; scraps are recognised from the most active windows at most {LOST:.0%} worse "
            f"than from all, {AHEAD:.0%} better than from random ones, and from those no worse than from the least "
            f"active; and ratios that were searched are at most {BEHIND:.0%} worse than the best uniform ones of their "
            "FLOPs, on other canvases.",
            "The paper measures detection and segmentation at 672 x 672 on a GPU; here time is of random weights and "
            "accuracy of a small network.",
            f"Searched and uniform ratios are within {AFFORDED:.0%} of the FLOPs; those found spend {share:.0%}.",
        ),
        claimed_ratio=CLAIMED,
        measured_ratio=1 / latency,
    )


def verdict(latency: float, straight: float, efficiency: float, right: dict[str, float]) -> bool:
    """Whether the claim holds."""
    fast = latency <= SLOWEST and straight >= STRAIGHT and efficiency >= EFFICIENT
    kept = right["active windows"] >= right["all windows"] - LOST
    apart = right["active windows"] >= right["random windows"] + AHEAD
    ordered = right["random windows"] >= right["least active windows"]
    return fast and kept and apart and ordered and right["searched ratios"] >= right["best uniform ratio"] - BEHIND


def straightness(times: dict[float, float]) -> float:
    """R^2 of a line through times, share of the dense one, by the share of windows left out (1 at none)."""
    x = torch.tensor([0.0, *times], dtype=torch.float64)
    y = torch.tensor([1.0, *times.values()], dtype=torch.float64)
    return float(torch.corrcoef(torch.stack([x, y]))[0, 1] ** 2)


def swin(side: int, width: int, depths: tuple[int, ...], window: int, classes: int, **more: Any) -> nn.Module:
    """A Swin of transformers."""
    try:
        from transformers import SwinConfig, SwinForImageClassification
    except ImportError as error:
        raise MissingExtraError("Swin needs transformers. Install it: pip install 'foveate[hosts]'") from error
    heads = [width * 2**i // 32 for i in range(len(depths))]
    config: Any = SwinConfig(
        image_size=side, embed_dim=width, depths=list(depths), num_heads=heads, window_size=window, **more
    )
    config.num_labels = classes
    return SwinForImageClassification(config)


# ------------------------------------------------------------------------------------------------------------- time


def races(context: ProofContext) -> dict[Any, Comparison]:
    """The stage alone against the stage with windows left out, by ratio, and at "half" its FLOPs."""
    torch.manual_seed(context.seed)
    host = swin(SIDE, 96, (2,), 7, 10).to(context.device).eval()
    photographs = [p for _, p in context.photographs()][: TIMED[context.mode]]
    x = torch.cat([F.interpolate(p[None], (SIDE, SIDE), mode="bilinear", antialias=True) for p in photographs])
    return {
        **{left: race(context, host, x, ratios=((left, left),)) for left in LEFT_OUT},
        "half": race(context, host, x, budget=0.5),
    }


def race(context: ProofContext, host: nn.Module, x: Tensor, **settings: Any) -> Comparison:
    """The host alone and with the plug-in, in turn."""

    def run() -> None:
        with torch.inference_mode():
            host(x)

    with SparseViT(host, **settings) as handle:

        def alone() -> None:
            with handle.paused():
                run()

        return compare(alone, run, PAIRS[context.mode])


# ----------------------------------------------------------------------------------------------------------- scraps


def accuracies(context: ProofContext) -> tuple[dict[str, float], float]:
    """Accuracy of each way to choose, and the share of FLOPs of the ratios found."""
    dice, photographs = context.generator(), dict(context.photographs())
    small = [F.interpolate(photographs[name][None], (192, 192), mode="bilinear", antialias=True)[0] for name in SHOWN]
    draws = partial(canvases, torch.stack(small), dice)
    torch.manual_seed(context.seed)
    # With the usual deviation of weights, 0.02, so narrow a network learns nothing for hundreds of steps.
    settings = {"initializer_range": 0.1, "hidden_dropout_prob": 0.0, "drop_path_rate": 0.0}
    net = swin(CANVAS, 32, (2, 4), 2, len(SHOWN), **settings).to(context.device)
    teach(net, draws, LEARN[context.mode])
    test, judged = draws(TESTED[context.mode]), draws(JUDGED[context.mode])
    found = {}
    with SparseViT(net, 1.0) as handle:
        chooser = handle.chooser
        sparse = tuple((SPARSE,) * len(stage) for stage in chooser.dense)
        found["all windows, before adaptation"] = accuracy(net, test)
        handle.ratios = sparse
        found["active windows, before adaptation"] = accuracy(net, test)
        handle.ratios = chooser.dense
        with handle.adaptation(context.seed):
            teach(net, draws, ADAPT[context.mode])
        found["all windows"] = accuracy(net, test)
        handle.ratios = sparse
        for name, measure in measures(dice).items():
            chooser.measure = measure
            found[name] = accuracy(net, test)
        chooser.measure = activity
        full, affordable = chooser.flops(chooser.dense), {}
        for level in range(LEVELS):
            handle.ratios = tuple((level / 10,) * len(stage) for stage in chooser.dense)
            if chooser.flops(handle.ratios) <= AFFORDED * full:
                affordable[accuracy(net, judged)] = handle.ratios
        handle.ratios = affordable[max(affordable)]
        found["best uniform ratio"] = accuracy(net, test)
        best = handle.search(
            lambda: accuracy(net, judged),
            AFFORDED,
            population=POPULATION[context.mode],
            parents=5,
            generations=GENERATIONS[context.mode],
            seed=context.seed,
        )
        found["searched ratios"] = accuracy(net, test)
    return found, best.share


def measures(dice: torch.Generator) -> dict[str, Callable[[Tensor], Tensor]]:
    """Ways to rank windows."""
    return {
        "active windows": activity,
        "random windows": lambda x: torch.rand(*x.shape[:3], 1, generator=dice, device=dice.device),
        "least active windows": lambda x: 1 / (activity(x) + 1e-6),
    }


def teach(net: nn.Module, draws: Callable[[int], tuple[Tensor, Tensor]], steps: int) -> None:
    """Train to name photographs."""

    def loss(_: int) -> Tensor:
        x, label = draws(BATCH)
        return F.cross_entropy(net(x).logits, label)

    net.train()
    fit(net, loss, steps, lr=LR, every=steps, average=0.98, log=lambda line: None)
    net.eval()


def accuracy(net: nn.Module, test: tuple[Tensor, Tensor]) -> float:
    """Share of scraps named right."""
    with torch.inference_mode():
        named = torch.cat([net(x).logits.argmax(1) for x in test[0].split(300)])
    return float((named == test[1]).float().mean())


def canvases(photographs: Tensor, dice: torch.Generator, batch: int) -> tuple[Tensor, Tensor]:
    """Lay scraps on empty canvases. Shape: photographs [n, 3, H, W] -> [B, 3, 32, 32], number of the photograph [B]."""
    device, side = dice.device, photographs.shape[2]
    label = torch.randint(len(photographs), (batch, 1, 1), generator=dice, device=device)
    place, rows = torch.arange(SCRAP, device=device), torch.arange(batch, device=device)[:, None, None]
    source, target = (
        torch.randint(size - SCRAP + 1, (2, batch, 1, 1), generator=dice, device=device) for size in (side, CANVAS)
    )
    canvas = torch.zeros(batch, CANVAS, CANVAS, 3, device=device)
    scraps = photographs.permute(0, 2, 3, 1)[label, source[0] + place[:, None], source[1] + place]
    canvas[rows, target[0] + place[:, None], target[1] + place] = 2 * scraps
    return canvas.permute(0, 3, 1, 2).contiguous(), label[:, 0, 0]


def _row(name: str, clock: Comparison, side: int) -> Row:
    assert clock.flops is not None
    ms = 1e3 * sorted(clock.seconds[side])[len(clock.seconds[side]) // 2]
    figures = {"gflops": clock.flops[side] / 1e9, "ms": ms, "speedup": clock.speedup if side else 1.0}
    return Row(name, **figures, efficiency=(clock.efficiency or 0.0) if side else 1.0)
