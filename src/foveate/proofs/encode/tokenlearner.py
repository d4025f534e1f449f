"""Proof of TokenLearner: a few learned tokens do for a whole network at half of its work, and chosen ones do not.

Accuracy: small vision transformers learn to read drawn digits, each for as many steps: dense, and with S = 4 tokens in
the place of all 36 patches from block 0 or block 1 of 4 on, where the tokens are learned, means over a fixed 2 x 2
grid, or patches drawn at random. Before block 0 no attention has spread what a patch shows, so there the ways differ
most; from block 1 on is the claim about cost. With CIFAR-10 at hand, the full proof does the same at three budgets.

Time: a transformer with random weights on photographs at 512 x 512, N = 1024 patches, with 8 tokens learned at half of
its depth, in turn with itself unchanged.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from foveate.encode.tokenlearner import TokenLearner, TokenLearnerViT, plugin
from foveate.hosts import vit
from foveate.layers.transformer import VisionTransformer
from foveate.meter import Comparison, count_flops
from foveate.proofs.encode._shared import one_thread
from foveate.proofs.encode._tasks import Task, accuracy, cifar, drawn_digits, race, teach
from foveate.proofs.evidence import Evidence, ProofContext, Row

WIDTH, DEPTH, HEADS, PATCH, TOKENS = 64, 4, 4, 4, 4
STEPS, SEEDS = {"quick": 250, "full": 500}, {"quick": 1, "full": 3}
CIFAR_STEPS, BUDGETS, CIFAR_TOKENS = 500, (0.75, 0.5, 0.25), 8

SIDE = 512
TIMED = {"quick": (384, 4, 6), "full": (768, 4, 12)}
"""Width, depth and heads of the transformer that is timed; patches of 16."""

PAIRS = {"quick": 3, "full": 7}
CLAIMED = 2.0
LEAST_SPEEDUP, LEAST_EFFICIENCY = 1.6, 0.9
LOST, AHEAD, SHARE = 0.02, 0.1, 0.4
"""Accuracy lost against dense and gained over random patches before block 0, and FLOPs from block 1 on, at most."""


def prove(context: ProofContext) -> Evidence:
    """Teach three ways to have four tokens, and time one of them."""
    with one_thread():
        shares, right = mean_accuracies(context)
        clock = timed(context)
        pictures = cifar(context)
        coarse = {} if pictures is None else at_budgets(context, pictures)
    rows = [Row(f"digits, {name}", accuracy=right[name], flop_share=shares[name]) for name in right]
    rows += [Row(f"CIFAR-10, {name}", accuracy=a, flop_share=share) for name, (a, share) in coarse.items()]
    assert clock.flops is not None
    for i, name in enumerate(("ViT", "ViT with TokenLearner")):
        ms = 1e3 * sorted(clock.seconds[i])[len(clock.seconds[i]) // 2]
        rows.append(Row(f"{name}, {SIDE} px", gflops=clock.flops[i] / 1e9, ms=ms))
    efficiency = clock.efficiency or 0.0
    return Evidence(
        system="tokenlearner",
        claim="about half the FLOPs of the whole network at equal or better accuracy, with 8 to 16 learned tokens",
        rows=tuple(rows),
        claimed="2x fewer FLOPs at equal accuracy",
        measured=f"{clock.flop_reduction:.2f}x fewer FLOPs, {clock.speedup:.2f}x as fast; digits "
        f"{right['learned from block 1']:.1%} right at {shares['learned from block 1']:.2f} of the FLOPs after "
        f"{right['dense']:.1%} dense",
        holds=verdict(right, shares["learned from block 1"], clock.speedup, efficiency),
        notes=(
            f"Holds when tokens learned from block 1 on read digits at most {LOST:.0%} worse than the dense network at "
            f"no more than {SHARE} of its FLOPs and no worse than random patches, those learned from block 0 on at "
            f"least {AHEAD:.0%} better than random patches and better than means over a grid, and 8 tokens at half of "
            f"the depth make {SIDE} x {SIDE} pictures at least {LEAST_SPEEDUP} times as fast with an efficiency of at "
            f"least {LEAST_EFFICIENCY}.",
            f"Efficiency {efficiency:.2f}. Digits are means over {SEEDS[context.mode]} seed(s) of "
            f"{STEPS[context.mode]} steps each; all train for as many, which takes the dense network longest.",
            "The paper measures ViT-B to ViT-L on ImageNet and JFT; here networks are small and what is timed has "
            "random weights.",
        ),
        claimed_ratio=CLAIMED,
        measured_ratio=clock.flop_reduction,
    )


def verdict(right: dict[str, float], share: float, speedup: float, efficiency: float) -> bool:
    """Whether the claim holds.

    Args:
        right: accuracy by the names of `accuracies`.
        share: of FLOPs, of tokens learned from block 1 on.
    """
    late, early = ({way: right[f"{way} from block {n}"] for way in WAYS} for n in (1, 0))
    kept = late["learned"] >= right["dense"] - LOST and share <= SHARE
    ahead = late["learned"] >= late["random"] and early["learned"] >= early["random"] + AHEAD
    ahead = ahead and early["learned"] > early["pooled"]
    return kept and ahead and speedup >= LEAST_SPEEDUP and efficiency >= LEAST_EFFICIENCY


class Pooled(TokenLearner):
    """Means over a fixed grid of cells."""

    def forward(self, x: Tensor, grid: tuple[int, int] | None = None) -> Tensor:
        assert grid is not None
        side = int(self.tokens**0.5)
        return F.adaptive_avg_pool2d(x.mT.unflatten(2, grid), (side, self.tokens // side)).flatten(2).mT


class Drawn(TokenLearner):
    """Patches at random."""

    def forward(self, x: Tensor, grid: tuple[int, int] | None = None) -> Tensor:
        picked = torch.rand(x.shape[:2], device=x.device).argsort(1)[:, : self.tokens]
        return x.gather(1, picked[..., None].expand(-1, -1, x.shape[2]))


WAYS: dict[str, Callable[..., TokenLearner]] = {"learned": TokenLearner, "pooled": Pooled, "random": Drawn}


def network(side: int, way: str, tokens: int, layer: int | None = None, budget: float = 0.5) -> TokenLearnerViT:
    """A small transformer that gets its tokens in one of the ways."""
    made = TokenLearnerViT(side, PATCH, WIDTH, DEPTH, HEADS, num_classes=10, tokens=tokens, layer=layer, budget=budget)
    for one in made.token_learning:
        assert isinstance(one, nn.Module)
        one.learner = WAYS[way](WIDTH, tokens)
        if way != "learned":
            one.learner.requires_grad_(False)
    return made


def mean_accuracies(context: ProofContext) -> tuple[dict[str, float], dict[str, float]]:
    """Shares of FLOPs, and accuracies as means over seeds, by name."""
    task, seeds = drawn_digits(context), SEEDS[context.mode]
    found = [accuracies(context, task, context.seed + i) for i in range(seeds)]
    return found[0][0], {name: sum(right[name] for _, right in found) / seeds for name in found[0][1]}


def accuracies(context: ProofContext, task: Task, seed: int) -> tuple[dict[str, float], dict[str, float]]:
    """Shares of FLOPs and accuracies of the dense network and of every way from blocks 1 and 0 on."""
    cases = {"dense": ("learned", DEPTH)}
    cases |= {f"{way} from block {layer}": (way, layer) for layer in (1, 0) for way in WAYS}
    shares, right = {}, {}
    for name, (way, layer) in cases.items():
        torch.manual_seed(seed)
        made = network(task.side, way, TOKENS, layer).to(context.device)
        teach(made, task.stream(seed), STEPS[context.mode])
        right[name], shares[name] = accuracy(made, task.test), float(count_flops(made, task.test[0][:1]))
    return {name: flops / shares["dense"] for name, flops in shares.items()}, right


def at_budgets(context: ProofContext, task: Task) -> dict[str, tuple[float, float]]:
    """Accuracy and share of FLOPs of the dense network, and of learned and random tokens at budgets."""
    found: dict[str, tuple[float, float]] = {}
    cases = [("dense", "learned", 1.0)]
    cases += [(f"{way} at {b:g}", way, b) for b in BUDGETS for way in ("learned", "random")]
    for name, way, budget in cases:
        torch.manual_seed(context.seed)
        made = network(task.side, way, CIFAR_TOKENS, budget=budget).to(context.device)
        teach(made, task.stream(context.seed), CIFAR_STEPS)
        host = vit(made)
        full = host.flops(host.native_grid[0] * host.native_grid[1], host.native_grid)
        found[name] = accuracy(made, task.test), count_flops(made.forward_features, task.test[0][:1]) / full
    return found


def timed(context: ProofContext) -> Comparison:
    """A transformer alone and with 8 tokens from half of its depth on, on two photographs."""
    width, depth, heads = TIMED[context.mode]
    torch.manual_seed(context.seed)
    host = VisionTransformer(SIDE, 16, width, depth, heads, num_classes=0).to(context.device).eval()
    photographs = [p[None] for _, p in context.photographs()[:2]]
    x = torch.cat([F.interpolate(p, (SIDE, SIDE), mode="bilinear", antialias=True) for p in photographs]) * 2 - 1
    with plugin(host, tokens=8, layer=depth // 2) as handle:
        return race(host, handle, x, PAIRS[context.mode])
