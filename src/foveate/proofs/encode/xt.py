"""Proof of xT: regions that know of each other, at the memory of one region.

Context: canvases of 64 x 64 with three squares in three of four quadrants: a coloured one, a coloured one in a frame,
and a white one with a frame or without. Asked is the colour (of five) of the square that is framed as the white one
is, which no single quadrant tells. A small convolutional network for 32 x 32 pixels, wrapped by xT, against the same
network on the canvas shrunk to 32 x 32, and on the quadrants with the mean of their classes; all are trained for as
many steps. (An MLP on the mean of the quadrants' features, which sees all of them too, is a row of the full proof.)

Cost: a vision transformer for 224 x 224 pixels on whole larger pictures and through xT: peak memory and time per
region; and what training keeps for the backward pass, of the convolutional network.
"""

from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from foveate.encode.xt import XT, nest
from foveate.engine.fit import fit
from foveate.layers.transformer import VisionTransformer
from foveate.meter import Comparison, compare, peak_memory, stored_bytes
from foveate.proofs.evidence import Evidence, ProofContext, Row

REGION, CANVAS, SQUARE, CHANNELS, DIM = 32, 64, 24, 32, 64
PALETTE = ((1.0, 0.0, 0.0), (0.0, 1.0, 0.0), (0.0, 0.0, 1.0), (1.0, 1.0, 0.0), (1.0, 0.0, 1.0))
CLASSES = len(PALETTE)
STEPS, BATCH, LR, TESTED = {"quick": 200, "full": 1300}, 32, 1.5e-3, 1000
TILE, LARGE, PAIRS = 224, {"quick": (448, 672), "full": (448, 896)}, {"quick": 3, "full": 7}
"""Sides of regions and pictures that cost is measured with."""

CLAIMED = 61.97 / 53.76
AHEAD, LESS_KEPT, SLOWER = 0.2, 0.5, 1.25
"""How much more often xT must be right than quadrants by themselves; the share of what training keeps that a quarter of
the gradients, and checkpoints, may keep; how much more time a region may take than in the network alone."""


SHRUNK, ALONE, MEAN = "canvas made small", "quadrants, classes averaged", "quadrants, MLP on their mean"


class Encoder(nn.Module):
    """Maps of a small convolutional network, [B, 3, H, W] -> [B, 32, H / 8, W / 8]. No statistics across regions."""

    def __init__(self) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        for inputs, outputs in ((3, 8), (8, 16), (16, CHANNELS)):
            layers += [nn.Conv2d(inputs, outputs, 3, 2, 1), nn.GroupNorm(4, outputs), nn.ReLU()]
        self.layers = nn.Sequential(*layers)

    def forward(self, x: Tensor) -> Tensor:
        return self.layers(x)


class Pooled(nn.Module):
    """The network with a head on its mean: on the canvas made small, or on quadrants whose classes or features are
    averaged."""

    def __init__(self, way: str) -> None:
        super().__init__()
        self.way, self.encoder, self.head = way, Encoder(), nn.Linear(CHANNELS, CLASSES)
        self.hidden = nn.Sequential(nn.Linear(CHANNELS, 256), nn.GELU(), nn.Linear(256, CHANNELS))

    def forward(self, x: Tensor) -> Tensor:
        if self.way == SHRUNK:
            return self.head(self.encoder(F.interpolate(x, (REGION, REGION), mode="area")).mean((2, 3)))
        features = self.encoder(nest(x, (2, 2))).mean((2, 3)).unflatten(0, (len(x), 4))
        return self.head(features).mean(1) if self.way == ALONE else self.head(self.hidden(features.mean(1)))


def prove(context: ProofContext) -> Evidence:
    """Teach, then measure what it costs."""
    right = accuracies(context)
    memory, clock = costs(context)
    kept = keeps(context)
    small, large = LARGE[context.mode]
    each = 1 / clock.speedup
    rows = [Row(name, accuracy=accuracy) for name, accuracy in right.items()]
    rows += [Row(f"peak, {name}", peak_mb=b / 1e6) for name, b in memory.items() if b is not None]
    rows += [Row(f"kept for backward, {name}", kept_mb=b / 1e6) for name, b in kept.items()]
    share = {name: b / kept["all regions at once"] for name, b in kept.items()}
    grown = [memory[f"{name}, {large} pixels"] or 0 for name in ("whole", "xT")]
    return Evidence(
        system="xt",
        claim="regions that share context beat regions by themselves, in less memory than the whole picture takes",
        rows=tuple(rows),
        claimed="Swin-T 53.8 -> 62.0 (1.15x) on iNat Reptilia for 4x the pixels, near-constant memory per region",
        measured=f"{right['xT']:.1%} right, quadrants by themselves {right[ALONE]:.1%}, shrunk "
        f"{right[SHRUNK]:.1%}; training keeps {share['a quarter carries gradients']:.2f} with a quarter of "
        f"the gradients, {share['checkpoints']:.2f} with checkpoints; {each:.2f} of the time per region",
        holds=verdict(right, share, each, (grown[0], grown[1])),
        notes=(
            f"Holds when xT is right {AHEAD:.0%} more often than quadrants by themselves and more often than on the "
            f"canvas made small, a quarter of the gradients and checkpoints each keep at most {LESS_KEPT} of what all "
            f"regions at once keep, a region takes at most {SLOWER}x its time in the network alone, and the peak at "
            f"{large} pixels is below that of the whole picture.",
            f"Costs are of regions of {TILE} x {TILE} pixels, 4 at a time, in pictures of {small} and {large} pixels, "
            "through a transformer 192 wide and 12 blocks deep. Peak memory is the growth of the process.",
        ),
        claimed_ratio=CLAIMED,
        measured_ratio=right["xT"] / right[ALONE],
    )


def verdict(right: dict[str, float], kept: dict[str, float], each: float, peaks: tuple[int, int]) -> bool:
    """Whether the claim holds.

    Args:
        right: accuracies.
        kept: shares of what all regions at once keep.
        each: time per region over that of the network alone.
        peaks: bytes for the large picture, whole and by xT; 0 where the system does not tell.
    """
    context = right["xT"] >= right[ALONE] + AHEAD and right["xT"] > right[SHRUNK]
    small = max(kept["a quarter carries gradients"], kept["checkpoints"]) <= LESS_KEPT
    return context and small and each <= SLOWER and (peaks[1] < peaks[0] or not all(peaks))


def accuracies(context: ProofContext) -> dict[str, float]:
    """Share of canvases named right by each network."""
    found = {}
    for name in (SHRUNK, ALONE, *([MEAN] if context.full else []), "xT"):
        torch.manual_seed(context.seed)
        draws = partial(puzzles, context.generator())
        net: nn.Module = Encoder() if name == "xT" else Pooled(name)
        net.to(context.device)
        if name == "xT":
            XT(net, region=REGION, channels=CHANNELS, num_classes=CLASSES, dim=DIM, at_once=4 * BATCH)
        found[name] = teach(net, draws, STEPS[context.mode])
    return found


def teach(net: nn.Module, draws: Callable[[int], tuple[Tensor, Tensor]], steps: int) -> float:
    """Train to name the colour asked for; returns the accuracy on other canvases."""

    def loss(_: int) -> Tensor:
        x, label = draws(BATCH)
        return F.cross_entropy(net(x), label)

    net.train()
    fit(net, loss, steps, lr=LR, every=steps, average=0.98, log=lambda line: None)
    x, label = draws(TESTED)
    with torch.inference_mode():
        named = torch.cat([net.eval()(part).argmax(1) for part in x.split(BATCH)])
    return float((named == label).float().mean())


def puzzles(dice: torch.Generator, batch: int) -> tuple[Tensor, Tensor]:
    """Draw squares. Shape: -> canvases [B, 3, 64, 64], the colour asked for [B]."""
    device = dice.device
    colour = torch.randint(CLASSES, (batch, 2), generator=dice, device=device)
    asked = torch.randint(2, (batch,), generator=dice, device=device)
    quadrant = torch.rand(batch, 4, generator=dice, device=device).argsort(1)[:, :3]
    corner = torch.randint(REGION - SQUARE + 1, (2, batch, 3), generator=dice, device=device)
    corner = corner + torch.stack([quadrant // 2, quadrant % 2]) * REGION
    place, rows = torch.arange(SQUARE, device=device), torch.arange(batch, device=device)[:, None, None]
    inside = F.pad(torch.ones(SQUARE - 8, SQUARE - 8, device=device), (4,) * 4)[..., None]
    frame = 1 - F.pad(torch.ones(SQUARE - 4, SQUARE - 4, device=device), (2,) * 4)[..., None]
    palette, white = torch.tensor(PALETTE, device=device), torch.ones(batch, 3, device=device)
    canvas = torch.zeros(batch, CANVAS, CANVAS, 3, device=device)
    framed = (torch.zeros_like(asked), torch.ones_like(asked), asked)
    for i, ink in enumerate((palette[colour[:, 0]], palette[colour[:, 1]], white)):
        y, x = corner[0, :, i, None, None] + place[:, None], corner[1, :, i, None, None] + place
        canvas[rows, y, x] = inside * ink[:, None, None] + frame * framed[i][:, None, None, None]
    return canvas.permute(0, 3, 1, 2).contiguous(), colour.gather(1, asked[:, None])[:, 0]


# ------------------------------------------------------------------------------------------------------------- cost


def costs(context: ProofContext) -> tuple[dict[str, int | None], Comparison]:
    """Peak memory by way and side, and the time of regions in the network alone against xT."""
    torch.manual_seed(context.seed)
    net = VisionTransformer(TILE, embed_dim=192, num_heads=3, num_classes=0).to(context.device).eval()
    pictures = [torch.rand(1, 3, side, side, device=context.device) for side in LARGE[context.mode]]
    regions = nest(pictures[0], (pictures[0].shape[2] // TILE,) * 2).split(4)

    def run(x: Tensor) -> None:
        with torch.inference_mode():
            net(x)

    def alone() -> None:
        with handle.paused():
            for part in regions:
                run(part)

    memory = {}
    with XT(net) as handle:
        for x in pictures:
            run(x[:, :, :TILE, :TILE])
            memory[f"xT, {x.shape[2]} pixels"] = peak_memory(partial(run, x))
            with handle.paused():
                memory[f"whole, {x.shape[2]} pixels"] = peak_memory(partial(run, x))
        clock = compare(alone, partial(run, pictures[0]), PAIRS[context.mode], flops=False)
    return memory, clock


def keeps(context: ProofContext) -> dict[str, int]:
    """Bytes that training keeps for the backward pass on a picture of 4 x 4 regions."""
    ways = {
        "all regions at once": {"at_once": 16},
        "a quarter carries gradients": {"at_once": 16, "gradients": 0.25},
        "checkpoints": {"at_once": 1},
    }
    x, found = torch.rand(1, 3, 512, 512, device=context.device), {}
    for name, settings in ways.items():
        net = Encoder().to(context.device)
        with XT(net, region=128, channels=CHANNELS, **settings):  # type: ignore[arg-type]
            found[name] = stored_bytes(net, x)
    return found
