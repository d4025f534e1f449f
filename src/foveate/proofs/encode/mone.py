"""Proof of MoNE: which tokens get the width is worth learning, and width saved is time saved.

Accuracy: small vision transformers learn to read drawn digits, each for as many steps: dense; nested experts that do
0.3 of the linear work by the learned router; the same with experts that take tokens at random; and every token at a
quarter of the width, which costs nearly as much. Most patches show no ink, so a router that has learned gives the
widest expert more of those that do than its quota. With CIFAR-10 at hand, the full proof trains one network for all
budgets, by the router and at random, and asks for four.

Time: a transformer with random weights of ViT-B's width on photographs, at half the FLOPs and at 1 / 2.3 of them, in
turn with itself unchanged.
"""

from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from foveate.encode.mone import MoNE, capacities, plugin
from foveate.layers.transformer import VisionTransformer
from foveate.meter import Comparison
from foveate.proofs.encode._shared import one_thread
from foveate.proofs.encode._tasks import Task, accuracy, cifar, drawn_digits, race, teach
from foveate.proofs.evidence import Evidence, ProofContext, Row

WIDTH, DEPTH, HEADS, PATCH = 64, 4, 4, 4
WORK = 0.3
"""Share of linear work, as in the paper's headline."""

NARROW = (0.0, 1.0, 0.0, 0.0)
"""Every token at a quarter of the width."""

STEPS, SEEDS = {"quick": 300, "full": 600}, {"quick": 1, "full": 3}
CIFAR_STEPS, BUDGETS = 600, (1.0, 0.75, 0.5, 0.3)
INK = 0.3
"""A patch shows ink when its mean is so much above the darkest, of a range of 2."""

TIMED = {"quick": (384, 2, 2), "full": (384, 4, 4)}
"""Side in pixels, depth of a transformer 768 wide, and photographs at once."""

PAIRS = {"quick": 3, "full": 7}
CLAIMED, CLAIMED_SPEEDUP = 2.3, 1.94
LEAST_EFFICIENCY, LEAST_SPEEDUP = 0.8, 1.7
LOST, AHEAD = 0.03, 0.02
"""Accuracy lost against dense at most, and gained over random routing at least."""


def prove(context: ProofContext) -> Evidence:
    """Teach, look where the widest expert went, and race."""
    with one_thread():
        right, ink = mean_accuracies(context)
        half, claimed = (timed(context, budget) for budget in (0.5, 1 / CLAIMED))
        pictures = cifar(context)
        coarse = {} if pictures is None else at_budgets(context, pictures)
    quota = capacities(WORK)[-1]
    rows = [Row(f"digits, {name}", accuracy=value) for name, value in right.items()]
    rows.append(Row("ink in the widest expert", share=ink, quota=quota))
    rows += [Row(f"CIFAR-10, {name}", accuracy=value) for name, value in coarse.items()]
    for name, clock in (("half the FLOPs", half), (f"1 / {CLAIMED} of the FLOPs", claimed)):
        figures = {"flop_reduction": clock.flop_reduction or 0.0, "speedup": clock.speedup}
        rows.append(Row(f"{TIMED[context.mode][0]} px, {name}", **figures, efficiency=clock.efficiency or 0.0))
    return Evidence(
        system="mone",
        claim="the dense transformer's accuracy with 2.3 times fewer FLOPs and 1.94 times the throughput",
        rows=tuple(rows),
        claimed="2.3x fewer FLOPs, 1.94x the throughput, equal accuracy",
        measured=f"{claimed.flop_reduction:.2f}x fewer FLOPs, {claimed.speedup:.2f}x the throughput; digits "
        f"{right['routed']:.1%} right after {right['dense']:.1%} dense, {right['at random']:.1%} at random",
        holds=verdict(right, ink, claimed.speedup, half.efficiency or 0.0),
        notes=(
            f"Holds when {WORK} of the linear work reads digits at most {LOST:.0%} worse than the dense network, at "
            f"least {AHEAD:.0%} better than with random routing and better than with every token at a quarter of the "
            f"width; when the widest expert takes more of the patches with ink than its quota; and when 1 / {CLAIMED} "
            f"of the FLOPs is at least {LEAST_SPEEDUP} times as fast and half of them have an efficiency of at least "
            f"{LEAST_EFFICIENCY}.",
            f"Digits are means over {SEEDS[context.mode]} seed(s) of {STEPS[context.mode]} steps each, with widths 8 "
            "to 64; the paper's widths are 96 to 768 and more, on videos and ImageNet-21k.",
            "What is timed has random weights. Attention's two products are not made cheaper, so efficiency counts "
            "against all FLOPs.",
        ),
        claimed_ratio=CLAIMED_SPEEDUP,
        measured_ratio=claimed.speedup,
    )


def verdict(right: dict[str, float], ink: float, speedup: float, efficiency: float) -> bool:
    """Whether the claim holds.

    Args:
        right: accuracy "dense", "routed", "at random" and "all narrow".
        ink: share of the patches with ink that the widest expert takes.
        speedup: at the claimed FLOPs.
        efficiency: at half the FLOPs.
    """
    kept = right["routed"] >= right["dense"] - LOST
    ahead = right["routed"] >= right["at random"] + AHEAD and right["routed"] > right["all narrow"]
    fast = speedup >= LEAST_SPEEDUP and efficiency >= LEAST_EFFICIENCY
    return kept and ahead and fast and ink > capacities(WORK)[-1]


def network(side: int) -> MoNE:
    """A small transformer of nested experts."""
    return MoNE(side, PATCH, WIDTH, DEPTH, HEADS, num_classes=10)


def at_random(r: Tensor) -> Tensor:
    """Scores that know nothing."""
    return torch.rand_like(r)


def mean_accuracies(context: ProofContext) -> tuple[dict[str, float], float]:
    """Accuracies and the share of ink at the widest expert, as means over seeds."""
    task, seeds = drawn_digits(context), SEEDS[context.mode]
    found = [accuracies(context, task, context.seed + i) for i in range(seeds)]
    right = {name: sum(one[name] for one, _ in found) / seeds for name in found[0][0]}
    return right, sum(ink for _, ink in found) / seeds


def accuracies(context: ProofContext, task: Task, seed: int) -> tuple[dict[str, float], float]:
    """Train the four networks."""
    right, ink = {}, 0.0
    shares = {"dense": capacities(1.0), "routed": capacities(WORK), "at random": capacities(WORK), "all narrow": NARROW}
    for name, given in shares.items():
        torch.manual_seed(seed)
        made = network(task.side).to(context.device)
        made.mixture.shares = given
        if name == "at random":
            made.mixture.prefer = at_random
        teach(made, task.stream(seed), STEPS[context.mode])
        right[name] = accuracy(made, task.test)
        if name == "routed":
            ink = ink_share(made, task.test[0])
    return right, ink


def ink_share(made: MoNE, pictures: Tensor) -> float:
    """Of the patches with ink, those that the widest expert takes."""
    inked = F.avg_pool2d(pictures[:, :1], PATCH).flatten(1) > INK - 1
    with torch.inference_mode():
        effort = made.mixture.look(pictures).effort.flatten(1)
    return float((effort == 1)[inked].float().mean())


def at_budgets(context: ProofContext, task: Task) -> dict[str, float]:
    """Accuracy of the dense network, and of one for all budgets by the router and one at random."""
    found = {}
    for name in ("dense", "routed", "at random"):
        torch.manual_seed(context.seed)
        made = network(task.side).to(context.device)
        if name == "dense":
            made.mixture.drawn = ()
        if name == "at random":
            made.mixture.prefer = at_random
        teach(made, task.stream(context.seed), CIFAR_STEPS)
        for budget in BUDGETS[:1] if name == "dense" else BUDGETS:
            label = name if name == "dense" else f"{name} at {budget:g}"
            found[label] = accuracy(partial(made, budget=budget), task.test)
    return found


def timed(context: ProofContext, budget: float) -> Comparison:
    """A transformer of ViT-B's width alone and at a budget."""
    side, depth, count = TIMED[context.mode]
    torch.manual_seed(context.seed)
    host = VisionTransformer(side, 16, 768, depth, 12, num_classes=0).to(context.device).eval()
    photographs = [p[None] for _, p in context.photographs()[:count]]
    x = torch.cat([F.interpolate(p, (side, side), mode="bilinear", antialias=True) for p in photographs]) * 2 - 1
    with plugin(host, budget=budget) as handle:
        return race(host, handle, x, PAIRS[context.mode])
