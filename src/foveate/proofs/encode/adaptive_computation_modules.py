"""Proof of ACM: tokens run as many learners as they need and the budget allows, and learners left out are time saved.

Accuracy: a small vision transformer learns to read drawn digits. Its MLPs become learners, which it teaches; gates are
placed; and copies are fine-tuned, each for as many steps: to three budgets by the gates, to the least one with tokens
that run learners at random, and the dense network as it is. Gates on their own (price 0) show whether the load
followed the budget, and whether patches with ink run more learners than empty ones; for accuracy all keep exactly to
their budgets. With CIFAR-10 at hand, the full proof does the same there.

Time: one module of ViT-B's width with 1, 2 and 3 of 4 learners on average, in turn with all of them; and a transformer
of that width with random weights on photographs at half the FLOPs, all layers replaced, in turn with itself unchanged.
"""

from collections.abc import Callable
from copy import deepcopy
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from foveate.encode.adaptive_computation_modules import AdaptiveComputationModules, spent_per_token
from foveate.encode.adaptive_computation_training import distil, fine_tune, place_gates
from foveate.layers.learners import Learners
from foveate.layers.transformer import VisionTransformer
from foveate.meter import Comparison, compare
from foveate.proofs.encode._shared import one_thread
from foveate.proofs.encode._tasks import BATCH, Task, accuracy, cifar, drawn_digits, race, teach
from foveate.proofs.evidence import Evidence, ProofContext, Row

WIDTH, DEPTH, HEADS, PATCH, GATE = 64, 4, 4, 4, 8
BUDGETS = (0.8, 0.65, 0.5)
"""Shares of all FLOPs; attention, which stays as it is, takes 0.4 of them."""

LEAST = BUDGETS[-1]
WEIGHTS = (1.0, 0.05, 0.05)
"""Of phase 3; the paper, which trains 100 times longer, keeps to the budget with a weight of 0.1."""

LEARN, DISTIL, PLACE, TUNE = ({"quick": q, "full": f} for q, f in ((250, 600), (100, 300), (40, 60), (120, 250)))
INK = 0.3
"""A patch shows ink when its mean is so much above the darkest, of a range of 2."""

SIDE, TIMED, PAIRS = 384, {"quick": 2, "full": 4}, {"quick": 3, "full": 7}
TOKENS, CHANNELS, LEARNERS = 577, 768, 4
LOST, OFF, INKED, BENT, LEAST_EFFICIENCY = 0.02, 0.2, 1.3, 0.12, 0.8
"""At most: accuracy lost, load beside its target, a module's time beside the line; at least: ink over no ink."""


def prove(context: ProofContext) -> Evidence:
    """Teach, convert, tune, look at the loads, and race."""
    with one_thread():
        task, pictures = drawn_digits(context), cifar(context)
        found, loads, ink = tuned(context, task)
        coarse = {} if pictures is None else tuned(context, pictures)[0]
        line = module_line(context)
        clock = timed(context)
    rows = [Row(f"digits, {name}", accuracy=value) for name, value in found.items()]
    rows += [Row(f"load of the gates at {b:g}", target=want, share=got) for b, (want, got) in loads.items()]
    rows.append(Row(f"learners on ink over those on none, at {LEAST:g}", ratio=ink))
    rows += [Row(f"CIFAR-10, {name}", accuracy=value) for name, value in coarse.items()]
    rows += [Row(f"module, {load:.2f} of the learners", share=load, time_share=t) for load, t in line.items()]
    efficiency, reduction = clock.efficiency or 0.0, clock.flop_reduction or 0.0
    rows.append(Row(f"{SIDE} px, half the FLOPs", flop_reduction=reduction, speedup=clock.speedup))
    bent = max(abs(t - load) for load, t in line.items())
    return Evidence(
        system="adaptive-computation-modules",
        claim="module time falls linearly with the learners run, at near the dense network's accuracy",
        rows=tuple(rows),
        claimed="time linear in the learners run, loads that follow budgets, accuracy near the teacher's",
        measured=f"module time within {bent:.2f} of the line; {reduction:.2f}x fewer FLOPs, {clock.speedup:.2f}x as "
        f"fast; digits {found[f'gates at {LEAST:g}']:.1%} right at {LEAST:g} of the FLOPs after "
        f"{found['dense']:.1%} dense, {found[f'at random at {LEAST:g}']:.1%} at random",
        holds=verdict(found, loads, ink, bent, efficiency),
        notes=(
            f"Holds when at {LEAST:g} of all FLOPs digits are read at most {LOST:.0%} worse than by the dense network "
            "tuned for as long, and better than with learners at random; when the gates' own loads fall with the "
            f"budget and stay within {OFF} of their targets; when patches with ink run at least {INKED} times the "
            f"learners of the others at the least budget; when a module's time, as a share of all learners', is within "
            f"{BENT} of the share of learners; and when half of a network's FLOPs has an efficiency of at least "
            f"{LEAST_EFFICIENCY} (here {efficiency:.2f}).",
            "The paper measures ViT-B on ImageNet and XLS-R on speech, and a module on an A100; here networks are "
            "small and what is timed has random weights. Only MLPs are replaced where digits are read.",
        ),
        claimed_ratio=1.0,
        measured_ratio=efficiency,
    )


def verdict(
    found: dict[str, float], loads: dict[float, tuple[float, float]], ink: float, bent: float, efficiency: float
) -> bool:
    """Whether the claim holds.

    Args:
        found: accuracy "dense", and by gates and "at random" at budgets.
        loads: of each budget, the share of learners it pays for and the share that gates ran.
        ink: learners on patches with ink over those on others.
        bent: of module times, the furthest from the line.
        efficiency: at half the FLOPs.
    """
    gated, drawn = found[f"gates at {LEAST:g}"], found[f"at random at {LEAST:g}"]
    ran = [loads[b][1] for b in sorted(loads)]
    followed = ran == sorted(ran) and all(abs(got - want) <= OFF for want, got in loads.values())
    kept = gated >= found["dense"] - LOST and gated > drawn
    return kept and followed and ink >= INKED and bent <= BENT and efficiency >= LEAST_EFFICIENCY


def at_random(scores: Tensor) -> Tensor:
    """Scores that know nothing."""
    return torch.rand_like(scores)


def tuned(context: ProofContext, task: Task) -> tuple[dict[str, float], dict[float, tuple[float, float]], float]:
    """Train all of it: accuracies by name, target and the gates' own load by budget, ink's learners over others'."""
    mode, seed = context.mode, context.seed
    torch.manual_seed(seed)
    host = VisionTransformer(task.side, PATCH, WIDTH, DEPTH, HEADS, num_classes=10, global_pool="avg")
    host.to(context.device)
    teach(host, task.stream(seed), LEARN[mode])
    handle = AdaptiveComputationModules(host, LEAST, projections=False, gate=GATE)
    draw = task.stream(seed + 1)
    quiet: dict[str, Any] = {"average": 0.98, "log": lambda line: None}
    distil(handle, lambda _: draw(BATCH)[0], DISTIL[mode], **quiet)
    place_gates(handle, lambda _: draw(BATCH)[0], PLACE[mode], **quiet)
    found, loads, ink, few = {}, {}, 0.0, task.stream(seed + 3)(BATCH * 4)[0]
    for budget, prefer in [*((b, None) for b in BUDGETS), (LEAST, at_random)]:
        own = deepcopy(handle)
        own.budget = budget
        if prefer is None:
            own.settle(few)
        else:
            own.router.prefer, own.router.learning = prefer, False
        fine_tune(own, task_loss(own.host.model, task, seed + 2), TUNE[mode], lr=1e-3, weights=WEIGHTS, **quiet)
        name = f"{'gates' if prefer is None else 'at random'} at {budget:g}"
        if prefer is None:
            own.router.price = 0.0
            loads[budget] = own.share, look(own, task.test[0])[0]
            own.calibrate(few)
            ink = look(own, task.test[0])[1]
        found[name] = accuracy(own.host.model, task.test)
    handle.remove()
    teach(host, task.stream(seed + 2), TUNE[mode], lr=1e-3)
    return {"dense": accuracy(host, task.test)} | found, loads, ink


def task_loss(network: nn.Module, task: Task, seed: int) -> Callable[[int], Tensor]:
    """Cross-entropy on the task's training pictures."""
    draw = task.stream(seed)

    def loss(_: int) -> Tensor:
        x, label = draw(BATCH)
        return F.cross_entropy(network(x), label)

    return loss


def look(handle: AdaptiveComputationModules, pictures: Tensor) -> tuple[float, float]:
    """Share of learners that run, and how many of them patches with ink run over how many the others do."""
    inked = F.avg_pool2d(pictures[:, :1], PATCH).flatten(1) > INK - 1
    with torch.inference_mode(), handle.router.recording() as record:
        handle.host.tokens(pictures)
    spent = spent_per_token(record)
    return float(spent.mean()), float(spent[inked].mean() / spent[~inked].mean().clamp(min=1e-6))


def module_line(context: ProofContext) -> dict[float, float]:
    """Time of a module of ViT-B's width over that with all learners, by the share of learners run."""
    torch.manual_seed(context.seed)
    module = Learners(CHANNELS, CHANNELS, CHANNELS, LEARNERS).to(context.device).eval()
    x = torch.randn(1, TOKENS, CHANNELS, device=context.device)
    line = {}
    for mean in (1, 2, 3):
        k = torch.binomial(torch.full((1, TOKENS), float(LEARNERS)), torch.tensor(mean / LEARNERS)).long().to(x.device)
        with torch.inference_mode():
            clock = compare(lambda: module(x), lambda k=k: module.gathered(x, k), pairs=7)  # type: ignore[misc]
        line[float(k.float().mean()) / LEARNERS] = 1 / clock.speedup
    return line


def timed(context: ProofContext) -> Comparison:
    """A transformer of ViT-B's width alone and at half the FLOPs; gates are random, so that tokens differ."""
    torch.manual_seed(context.seed)
    host = VisionTransformer(SIDE, 16, 768, TIMED[context.mode], 12, num_classes=0).to(context.device).eval()
    photographs = [p[None] for _, p in context.photographs()[:2]]
    x = torch.cat([F.interpolate(p, (SIDE, SIDE), mode="bilinear", antialias=True) for p in photographs]) * 2 - 1
    with AdaptiveComputationModules(host, 0.5) as handle:
        for layer in handle.layers:
            last = layer.gate[-1]
            assert isinstance(last, nn.Linear)
            nn.init.normal_(last.weight)
        return race(host, handle, x, PAIRS[context.mode])
