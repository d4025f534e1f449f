"""Proof of FIT: attention that grows as L^(4/3), and still joins any two places of a picture.

Cost. Sequences of 256 to 16,384 tokens in t = `groups_for(L)` groups, 8 latents each, "(1)2(1)0", against four
transformer layers of equal width on all tokens with PyTorch's fused attention. Products of attention are counted from
the formula, time is of a forward and a backward pass, memory is what is kept for the backward pass.

Join. Two of five textures lie in two of the four parts of a picture; the label is the sum of their numbers modulo five.
Whoever sees the parts one by one and adds up what he saw cannot know it: a network of the same layers whose parts never
meet is the baseline, trained on the same pictures for as many steps.
"""

from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from foveate.encode.fit_interleaved import FIT, Interleaved, attention_products, groups_for
from foveate.layers.transformer import Block
from foveate.learn.fit import fit
from foveate.meter import Comparison, compare, slope, stored_bytes
from foveate.proofs.evidence import Evidence, ProofContext, Row

LENGTHS = {"quick": (256, 1024, 4096), "full": (256, 1024, 4096, 16384)}
WIDTH, HEADS, LATENTS, LAYERS, DEPTH = 64, 4, 8, "(1)2(1)0", 4
PAIRS = {256: 7, 1024: 5, 4096: 3, 16384: 2}
SLOPE, SPEEDUP, MEMORY = 1.45, 2.0, 0.6
"""The steepest growth of products of attention; at 4,096 tokens the least speed-up and the most memory."""

SIDE, PATCH, TEXTURES, BATCH = 32, 4, 5, 64
STEPS = {"quick": 500, "full": 1500}
LEAD = 0.3


class Grouped(nn.Module):
    """FIT's blocks on a sequence. Shape: [B, L, C] -> [B, L, C]."""

    def __init__(self, length: int) -> None:
        super().__init__()
        self.groups = groups_for(length)
        self.latents = nn.Parameter(0.02 * torch.randn(1, self.groups, LATENTS, WIDTH))
        self.body = Interleaved((WIDTH, WIDTH), (HEADS, HEADS), LAYERS)

    def forward(self, x: Tensor) -> Tensor:
        short = -x.shape[1] % self.groups
        groups = F.pad(x, (0, 0, 0, short)).unflatten(1, (self.groups, -1))
        y, _ = self.body(groups, self.latents.expand(len(x), -1, -1, -1))
        return y.flatten(1, 2)[:, : x.shape[1]]


class Apart(nn.Module):
    """The same layers on every part by itself; a vector of each part, added up. Shape: [B, 3, H, W] -> [B, classes]."""

    def __init__(self) -> None:
        super().__init__()
        self.part = network(groups=1, img_size=SIDE // 2, num_classes=0)
        self.head = nn.Linear(self.part.num_features, TEXTURES)

    def forward(self, x: Tensor) -> Tensor:
        half = SIDE // 2
        parts = x.unflatten(3, (2, half)).unflatten(2, (2, half)).permute(0, 2, 4, 1, 3, 5).flatten(0, 2)
        return self.head(self.part(parts).unflatten(0, (-1, 4)).sum(1))


def network(**settings: int) -> FIT:
    """The small classifier of the second experiment."""
    own = {"num_classes": TEXTURES, "img_size": SIDE, "patch_size": PATCH, "groups": 4, "latents": 4} | settings
    return FIT(**own, dims=(48, 64), heads=(3, 4), layers="(1)1(1)2")  # type: ignore[arg-type]


def prove(context: ProofContext) -> Evidence:
    """Fit slopes of cost; teach both networks to add."""
    rows, products, races = [], {}, {}
    lengths = LENGTHS[context.mode]
    for length in context.track(lengths, "timing"):
        groups = groups_for(length)
        products[length] = (
            DEPTH * length**2,
            attention_products(-(-length // groups) * groups, groups, LATENTS, LAYERS),
        )
        races[length], kept = race(context, length)
        for i, name in enumerate(("plain layers", f"FIT, {groups} groups")):
            rows.append(
                Row(
                    f"{name}, {length} tokens",
                    million_products=products[length][i] / 1e6,
                    ms=1e3 * min(races[length].seconds[i]),
                    kept_mb=kept[i] / 1e6,
                )
            )
        memory = kept[1] / kept[0]
        if length == 4096:
            at_4096 = memory
    growth = [slope({n: p[i] for n, p in products.items()}) for i in (0, 1)]
    clock = [slope({n: min(r.seconds[i]) for n, r in races.items()}) for i in (0, 1)]
    for i, name in enumerate(("plain layers", "FIT")):
        rows.append(Row(name, slope_of_products=growth[i], slope_of_time=clock[i]))
    joined, apart = (teach(context, model) for model in (partial(network), Apart))
    rows += [Row("parts apart", accuracy=apart), Row("FIT", accuracy=joined)]
    faster = races[4096].speedup
    return Evidence(
        system="fit-interleaved",
        claim="attention cost grows as L^(4/3) instead of L^2, and any two places still meet in one block",
        rows=tuple(rows),
        claimed="exponent 4/3 instead of 2",
        measured=(
            f"exponent {growth[1]:.2f} instead of {growth[0]:.2f}; at 4,096 tokens {faster:.1f}x as fast on "
            f"{at_4096:.2f}x the memory; {joined:.0%} right where parts apart have {apart:.0%}"
        ),
        holds=verdict(growth[1], faster, at_4096, joined - apart),
        notes=(
            f"Holds when products of attention grow by at most L^{SLOPE}, a training step at 4,096 tokens is at least "
            f"{SPEEDUP} times as fast on at most {MEMORY} of the memory, and the labels of two parts are learned at "
            f"least {LEAD:.0%} better than by parts apart.",
            "The plain layers use PyTorch's fused attention, which keeps no matrix of products: the paper's larger "
            "savings of memory are over attention that does. FIT pays two linear layers a token and block for reading "
            f"and writing. Time grows as L^{clock[1]:.2f} against L^{clock[0]:.2f}, linear layers included.",
            "160,000 tokens in 16 GB are not tried.",
        ),
        claimed_ratio=2 / (4 / 3),
        measured_ratio=growth[0] / growth[1],
    )


def verdict(growth: float, faster: float, memory: float, lead: float) -> bool:
    """Whether the claim holds.

    Args:
        growth: exponent of FIT's products of attention.
        faster, memory: of a training step at 4,096 tokens, over and of the plain layers'.
        lead: accuracy over that of parts apart.
    """
    return growth <= SLOPE and faster >= SPEEDUP and memory <= MEMORY and lead >= LEAD


def race(context: ProofContext, length: int) -> tuple[Comparison, tuple[int, int]]:
    """Training steps of both in turn, and the bytes that each keeps."""
    torch.manual_seed(context.seed)
    plain = nn.Sequential(*(Block(WIDTH, HEADS) for _ in range(DEPTH))).to(context.device)
    models: list[nn.Module] = [plain, Grouped(length).to(context.device)]
    x = torch.randn(1, length, WIDTH, generator=context.generator(), device=context.device)

    def step(model: nn.Module) -> None:
        model.zero_grad(set_to_none=True)
        model(x).square().mean().backward()

    first, second = (partial(step, model) for model in models)
    kept = (stored_bytes(models[0], x), stored_bytes(models[1], x))
    return compare(first, second, PAIRS[length], flops=False), kept


def draw(batch: int, dice: torch.Generator) -> tuple[Tensor, Tensor]:
    """Pictures of two textures in two parts, and the sum of their numbers. Shape: [B, 3, 32, 32], [B]."""
    half, device = SIDE // 2, dice.device
    y, x = torch.meshgrid(*(torch.arange(8, device=device, dtype=torch.float32),) * 2, indexing="ij")
    waves = [torch.sin(2.4 * x), torch.sin(2.4 * y), torch.sin(1.7 * (x + y)), torch.sin(1.7 * (x - y))]
    textures = torch.stack([*waves, torch.sin(2.4 * x) * torch.sin(2.4 * y)])
    chosen = torch.randint(TEXTURES, (batch, 2), generator=dice, device=device)
    pictures = 0.1 * torch.randn(batch, 3, SIDE, SIDE, generator=dice, device=device)
    order = torch.rand(batch, 4, generator=dice, device=device).argsort(1)[:, :2]
    shift = torch.randint(half - 8 + 1, (batch, 2, 2), generator=dice, device=device)
    rows, columns = shift[..., 0] + half * (order // 2), shift[..., 1] + half * (order % 2)
    inside = torch.arange(8, device=device)
    for k in (0, 1):
        where = (rows[:, k, None] + inside)[:, :, None] * SIDE + (columns[:, k, None] + inside)[:, None]
        values = textures[chosen[:, k]].flatten(1)[:, None].expand(-1, 3, -1)
        pictures.flatten(2).scatter_add_(2, where.flatten(1)[:, None].expand(-1, 3, -1), values)
    return pictures, chosen.sum(1) % TEXTURES


def teach(context: ProofContext, build: "type[nn.Module] | partial[FIT]") -> float:
    """Train a network to add; its accuracy on pictures it has not seen."""
    torch.manual_seed(context.seed)
    model, dice = build().to(context.device), context.generator()

    def loss(_: int) -> Tensor:
        pictures, label = draw(BATCH, dice)
        return F.cross_entropy(model(pictures), label)

    fit(model, loss, STEPS[context.mode], lr=2e-3, average=0.99, log=lambda line: None)
    pictures, label = draw(1000, context.generator().manual_seed(context.seed + 1))
    with torch.inference_mode():
        return float((model.eval()(pictures).argmax(1) == label).float().mean())
