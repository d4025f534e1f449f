"""Proof of shallow decoders: a fifth of a mean-scale hyperprior's decoding FLOPs at competitive rate and distortion.

FLOPs are counted by running both decoders, hyper-synthesis included, at the published widths and at those of the
weights that come with foveate.

Rate and distortion: three networks with the same analysis and hyperprior, and the deep, the two-layer and the JPEG-like
synthesis, each from random weights, are trained by the same steps on the same crops from the left halves of
photographs. On the right halves each has a cost L = bits per pixel + lambda * squared error: as the analysis proposes
the latents, and, for the shallow ones, after stochastic Gumbel annealing. Training is short, which favours what is
quick to learn: the paper's networks see 1.8 million steps, and there the deep one is ahead without annealing.

The full proof also codes the pictures of kodak12 with the shipped weights, beside JPEG and WebP at equal bytes.
"""

import io
from collections.abc import Callable
from statistics import mean

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn

from foveate.compress.hyperprior import OCTAVE, MeanScaleHyperprior, hyper_synthesis
from foveate.compress.sga import Rounding, anneal
from foveate.compress.shallow_ntc import ShallowNTC, machine
from foveate.compress.transform_coder import TransformCoder, Trial
from foveate.compress.transforms import FACTOR, Analysis, Deep, JpegLike, Stage, TwoLayer
from foveate.compress.verbs import measured
from foveate.engine.budget import Budget
from foveate.meter import compare, count_flops
from foveate.proofs.compress._gaussians import crop, kodak
from foveate.proofs.evidence import Evidence, ProofContext, Row

LATENTS, PRICE, SCALE = 64, 0.01, 5.0
STAGES = (Stage(32, 8, 4, 1, 0), Stage(48, 4, 2, 1, 0), Stage(64, 4, 2, 1, 0))
NAMES = ("astronaut", "coffee", "chelsea", "rocket", "motorcycle")
STEPS, BATCH, SIDE = {"quick": 180, "full": 1000}, 8, 64
TEST, ANNEALING = 128, {"quick": 60, "full": 200}
RATES = (0.6, 0.75, 0.9)
FEWER, WORSE, IMPROVED = 5.0, 1.2, 0.9


def prove(context: ProofContext) -> Evidence:
    """Count, train, anneal, and code."""
    rows, ratios = [], {}
    for label, decoders in (("published widths", published()), ("shipped weights", shipped_widths())):
        spent = {name: flops_per_pixel(*parts) for name, parts in decoders.items()}
        rows += [Row(f"{name} decoder, {label}", flops_per_pixel=value) for name, value in spent.items()]
        ratios[label] = spent["deep"] / spent["two-layer"]
    deep, shallow = (pixels_of(shipped_widths()[name][1]) for name in ("deep", "two-layer"))
    clock = compare(deep, shallow, pairs=3)

    train, test = halves(context)
    costs = {}
    for name, make in SYNTHESES.items():
        coder = trained(make(), train, context)
        costs[name] = [cost(coder, x, 0, context.seed) for x in test]
        if name != "deep":
            costs[f"{name}, annealed"] = [cost(coder, x, ANNEALING[context.mode], context.seed) for x in test]
    rows += [Row(f"{name}, trained here", cost=mean(values)) for name, values in costs.items()]
    against = mean(costs["two-layer, annealed"]) / mean(costs["deep"])
    pairs = [
        (before, after)
        for name in ("two-layer", "JPEG-like")
        for before, after in zip(costs[name], costs[f"{name}, annealed"], strict=True)
    ]
    improved = mean(float(after < before) for before, after in pairs)
    gained = 1 - mean(after / before for before, after in pairs)
    files = kodak(context) if context.full else []
    rows += [row for rate in RATES for row in coded(files, rate, context)] if files else []
    ratio = ratios["published widths"]
    return Evidence(
        system="shallow-ntc",
        claim="5.3x fewer decoding FLOPs than the mean-scale hyperprior at competitive rate and distortion",
        rows=tuple(rows),
        claimed="5.3x fewer FLOPs",
        measured=f"{ratio:.1f}x fewer FLOPs at the published widths, {ratios['shipped weights']:.1f}x with the shipped "
        f"hyperprior, synthesis {clock.speedup:.1f}x faster; annealed L {against:.2f} times the deep decoder's, "
        f"annealing takes {gained:.1%} off L and helps {improved:.0%} of pictures",
        holds=verdict(min(ratios.values()), against, improved),
        notes=(
            f"Holds when FLOPs are at least {FEWER:g}x fewer, L = bits + lambda error of the annealed two-layer coder "
            f"is at most {WORSE:g} times the deep one's after equal steps, and annealing lowers L on more than "
            f"{IMPROVED:.0%} of pictures.",
            f"Trained here: {STEPS[context.mode]} steps of {BATCH} crops {SIDE}x{SIDE}, {LATENTS} latents, a deep "
            f"decoder of {LATENTS} channels; tested on {len(test)} crops {TEST}x{TEST}.",
            *(
                ["kodak12: plain rounding, whole files; JPEG is 4:2:0 and optimised; all in the same bytes."]
                if files
                else []
            ),
        ),
        claimed_ratio=5.3,
        measured_ratio=ratio,
    )


def verdict(fewer: float, against: float, improved: float) -> bool:
    """Whether the claim holds.

    Args:
        fewer: FLOPs of the deep decoder by those of the two-layer one.
        against: L of the annealed two-layer coder by that of the deep one.
        improved: share of pictures whose L annealing lowers.
    """
    return fewer >= FEWER and against <= WORSE and improved > IMPROVED


Decoder = tuple[nn.Module, nn.Module, int, int]
"""Hyper-synthesis, synthesis, and the numbers of side latents and latents that they take."""


def published() -> dict[str, Decoder]:
    """The decoders of the paper."""
    prior = hyper_synthesis(320, (320, 320, 480), (5, 5, 3))
    syntheses = {"deep": Deep(320, 192), "two-layer": TwoLayer(320), "JPEG-like": JpegLike(320)}
    return {name: (prior, synthesis, 320, 320) for name, synthesis in syntheses.items()}


def shipped_widths() -> dict[str, Decoder]:
    """The shipped decoders, and a deep one behind the same hyperprior."""
    coder, agreed = machine(0).coder, machine(0).agreed
    side, latents = agreed.side_steps.shape[1], agreed.steps.shape[1]
    syntheses = {"deep": Deep(latents, 192), "two-layer": coder.synthesis, "JPEG-like": machine(1).synthesis}
    return {name: (coder.prior.up, synthesis, side, latents) for name, synthesis in syntheses.items()}


def flops_per_pixel(prior: nn.Module, synthesis: nn.Module, side: int, latents: int) -> float:
    """FLOPs of hyper-synthesis and synthesis for a pixel, counted on 128x128."""
    with torch.no_grad():
        spent = count_flops(prior, torch.zeros(1, side, 2, 2)) + count_flops(synthesis, torch.zeros(1, latents, 8, 8))
    return spent / 128**2


def pixels_of(synthesis: nn.Module) -> Callable[[], Tensor]:
    """A call that synthesises 256x384 pixels."""
    latents = next(synthesis.parameters()).shape[0]
    y = torch.randn(1, latents, 16, 24, generator=torch.Generator().manual_seed(0))

    def run() -> Tensor:
        with torch.no_grad():
            return synthesis(y)

    return run


SYNTHESES = {
    "deep": lambda: Deep(LATENTS, LATENTS),
    "two-layer": lambda: TwoLayer(LATENTS),
    "JPEG-like": lambda: JpegLike(LATENTS),
}


def halves(context: ProofContext) -> tuple[list[Tensor], list[Tensor]]:
    """Left halves of photographs to learn from, and crops of the right ones. Shape: [3, H, W], [1, 3, TEST, TEST]."""
    photographs = dict(context.photographs())
    pairs = [photographs[name].chunk(2, 2) for name in NAMES]
    return [left for left, _ in pairs], [crop(right, TEST)[None] for _, right in pairs]


def trained(synthesis: nn.Module, pictures: list[Tensor], context: ProofContext) -> TransformCoder:
    """A coder after all steps; analysis, hyperprior and crops are the same whatever the synthesis."""
    torch.manual_seed(context.seed)
    analysis, prior = Analysis(STAGES, LATENTS), MeanScaleHyperprior(LATENTS, (16, 24, 32), rates=1)
    patches = torch.cat([F.unfold(x[None], FACTOR, stride=8)[0].T for x in pictures]) - 0.5
    vectors = torch.linalg.eigh(patches.T @ patches)[1].flip(1)[:, :LATENTS]
    with torch.no_grad():
        assert analysis.linear is not None
        analysis.linear.weight.copy_(SCALE * vectors.T.reshape(-1, 3, FACTOR, FACTOR))
    coder = TransformCoder(analysis, synthesis, prior).to(context.device).train()
    adam, random = torch.optim.Adam(coder.parameters(), 1e-3), context.generator()
    zero = torch.zeros(BATCH, device=context.device)
    steps = STEPS[context.mode]
    for step in context.track(range(steps), "training"):
        adam.param_groups[0]["lr"] = 1e-3 if step < 0.8 * steps else 1e-4
        decoded, bits = coder(x := crops(pictures, random), zero)
        loss = (bits.bits + bits.side_bits).mean() / SIDE**2 + PRICE * 255**2 * F.mse_loss(decoded, x)
        adam.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(coder.parameters(), 1.0)
        adam.step()
    return coder.eval().requires_grad_(False)


def crops(pictures: list[Tensor], random: torch.Generator) -> Tensor:
    """Random crops. Shape: [BATCH, 3, SIDE, SIDE]."""
    found = []
    for which in torch.randint(len(pictures), (BATCH,), generator=random, device=random.device).tolist():
        y, x = (
            int(torch.randint(n - SIDE + 1, (), generator=random, device=random.device))
            for n in pictures[which].shape[1:]
        )
        found.append(pictures[which][:, y : y + SIDE, x : x + SIDE])
    return torch.stack(found)


def cost(coder: TransformCoder, x: Tensor, steps: int, seed: int) -> float:
    """L of a picture whose latents are annealed for some steps and then rounded."""
    a, b = coder.prior.at(torch.zeros(1, device=x.device))
    step, side_step = torch.exp2(-a), torch.exp2(-b)
    trial = Trial(coder.prior, coder.synthesis, x, step, side_step, OCTAVE * a)
    y = coder.analysis(x - 0.5)
    z = coder.prior.down(y) / side_step
    y = y / step

    def loss(rounding: Rounding) -> Tensor:
        bits, error = trial(rounding, y, z)
        return bits / x[0, 0].numel() + PRICE * error

    if steps:
        anneal(loss, (y, z), lambda step: step / steps, seed=seed)
    with torch.no_grad():
        return float(loss(torch.round))


def coded(files: list[tuple[str, Tensor]], rate: float, context: ProofContext) -> list[Row]:
    """Mean PSNR of pictures by the shipped codec without annealing, and by JPEG and WebP in as many bytes."""
    codec, found = ShallowNTC(steps=0), []
    for _, picture in context.track(files, f"{rate:g} bpp"):
        container = codec.encode(picture[None], budget=Budget(rate * picture[0].numel() / 8, "bytes"))
        size = len(container.to_bytes())
        ours = measured(codec.decode(container), picture[None], 8)
        found.append((8 * size / picture[0].numel(), ours, *(rival(picture, size, kind) for kind in RIVALS)))
    bpp, ours, *theirs = (mean(values) for values in zip(*found, strict=True))
    rows = [Row(f"kodak12, shallow-ntc, {rate:g} bpp", bpp=bpp, psnr_db=ours)]
    return rows + [Row(f"kodak12, {k}, {rate:g} bpp", bpp=bpp, psnr_db=v) for k, v in zip(RIVALS, theirs, strict=True)]


RIVALS = {"JPEG": {"optimize": True, "subsampling": "4:2:0"}, "WebP": {"method": 4}}


def rival(picture: Tensor, size: int, kind: str) -> float:
    """PSNR in dB of Pillow's codec in `size` bytes, on the line between the two qualities around it."""
    image = Image.fromarray((picture * 255).round().byte().permute(1, 2, 0).numpy())

    def at(quality: int) -> tuple[int, float]:
        stream = io.BytesIO()
        image.save(stream, kind, quality=quality, **RIVALS[kind])  # type: ignore[arg-type]
        decoded = torch.from_numpy(np.array(Image.open(stream).convert("RGB"))).permute(2, 0, 1)
        return stream.tell(), measured(decoded[None] / 255, picture[None], 8)

    low, high = 0, 100
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if at(middle)[0] <= size else (low, middle)
    (below, worse), (above, better) = at(low), at(high)
    return float(np.interp(size, [below, above], [worse, better]))
