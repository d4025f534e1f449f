"""Proof of TCSR: kernels made from content see far without the parameters of far-seeing kernels.

What the paper claims, SwinIR-light's PSNR with 0.81 times its parameters, takes days of training on data that no
machine here has. Shown instead: the parameters at the published sizes, the law they follow from, what the parts are
worth in a short training, and what attending to content does that no fixed kernel can.

    a  TCSR                     b  its attention replaced by fixed depth-wise k x k kernels between the same layers
    c  TCSR without the shift   d  neither attention nor shift: 1x1 layers between the outer 3x3 convolutions

are trained alike for x2. Then a and b learn to remove noise from random textures that repeat 5 pixels to the right,
below, or along either diagonal: where the same thing is seen again, a kernel can only know from content.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from foveate.engine.surgery import find, replace
from foveate.layers.shift import SpatialShift
from foveate.layers.upscaler import enlarge
from foveate.meter import compare, count_parameters, psnr
from foveate.meter.cost import peak_memory
from foveate.ops.neighbourhood_attention import neighbourhood_attention, neighbourhood_reference
from foveate.proofs.evidence import Evidence, ProofContext, Row
from foveate.proofs.restore._shared import Draw, crops, mean_psnr, measured_pairs, train, training_pairs
from foveate.restore.tcsr import SIZES, TCSR, NeighbourhoodAttention

SCALE = 2
CONFIG: dict[str, Any] = {"channels": 24, "blocks": 4, "kernel_size": 7, "heads": 4, "base": True}
TEXTURED: dict[str, Any] = {"channels": 16, "blocks": 2, "kernel_size": 11, "heads": 2}
"""Of the denoisers; a neighbourhood of 11 just holds what lies 5 pixels away."""

BATCH, SIDE = 4, 24
STEPS = {"quick": (120, 100), "full": (1200, 600)}
"""Of enlarging, and of removing noise."""

LR = 2e-3
PERIOD, NOISE = 5, 0.2
SWINIR_LIGHT = 844e3
"""Parameters that the paper's comparison gives for SwinIR-light; nothing of it is run here."""

MARGINS = {"quick": (0.0, 0.1), "full": (0.05, 0.3)}
"""dB that the shift must be worth, and that 1x1 layers alone must be behind all others."""

BESIDE_FIXED, BY_CONTENT = -0.05, 0.3
"""dB that attention must have over fixed kernels: enlarging photographs, and removing noise from textures."""


class FixedKernels(nn.Module):
    """Attention's linear layers with a depth-wise convolution between, or nothing. Shape: [B, H, W, C] -> the same."""

    def __init__(self, attention: NeighbourhoodAttention, depthwise: bool) -> None:
        super().__init__()
        dim, side = attention.proj.in_features, attention.kernel_size
        self.value, self.proj = nn.Linear(dim, dim), nn.Linear(dim, dim)
        self.mix = nn.Conv2d(dim, dim, side, padding=side // 2, groups=dim) if depthwise else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        return self.proj(self.mix(self.value(x).permute(0, 3, 1, 2)).permute(0, 2, 3, 1))


def prove(context: ProofContext) -> Evidence:
    """Count, train a to d on the same crops and a, b on the same textures, and time the compiled attention."""
    steps, denoising = STEPS[context.mode]
    names = ("1x1 only", "depth-wise kernels", "no shift", "TCSR")
    kinds: tuple[dict[str, Any], ...] = (
        {"attention": "none", "shift": False},
        {"attention": "depthwise"},
        {"shift": False},
        {},
    )
    networks = {name: variant(SCALE, CONFIG, **kind) for name, kind in zip(names, kinds, strict=True)}
    data = training_pairs(context, SCALE)
    for name, network in networks.items():
        train(context, network, _enlarging(network, crops(data, context.seed)), steps, f"training {name}", lr=LR)
    tests, where = measured_pairs(context, SCALE)
    scores = {name: mean_psnr(network, tests) for name, network in networks.items()}

    clean = textures(32, 32, torch.Generator().manual_seed(context.seed + 1)).to(context.device)
    noisy = clean + NOISE * torch.randn(clean.shape, generator=torch.Generator().manual_seed(2)).to(context.device)
    found = {}
    for name, kind in (("depth-wise kernels", "depthwise"), ("TCSR", "attention")):
        denoiser = variant(1, TEXTURED, attention=kind)
        train(context, denoiser, _denoising(context, denoiser), denoising, f"textures, {name}", lr=LR)
        with torch.inference_mode():
            found[name] = float(psnr(denoiser(noisy), clean).mean())

    rows = [Row("bilinear", psnr_y_db=mean_psnr(lambda low: enlarge(low, SCALE), tests))]
    for name, network in networks.items():
        textured = {"textures_db": found[name]} if name in found else {}
        macs = network.full_flops(1, 1) / 2
        parameters = count_parameters(network, trainable=True)
        rows.append(Row(name, psnr_y_db=scores[name], parameters=parameters, macs_per_input_pixel=macs, **textured))
    counts = {f"TCSR-{size}": count_parameters(TCSR(4, **settings)) for size, settings in SIZES.items()}
    rows += [Row(f"{name} x4, published size", parameters=count) for name, count in counts.items()]
    rows.append(Row("SwinIR-light x4, as published", parameters=SWINIR_LIGHT))
    fewer = law()
    share = counts["TCSR-B"] / SWINIR_LIGHT
    content = found["TCSR"] - found["depth-wise kernels"]
    return Evidence(
        system="tcsr",
        claim="SwinIR-light's PSNR at x4 with 0.81 times its parameters",
        rows=tuple(rows),
        claimed="0.81x the parameters of SwinIR-light",
        measured=f"{share:.2f}x its parameters, {content:+.2f} dB over fixed kernels where content tells where to look",
        holds=verdict(context.mode, scores, content, fewer, share),
        notes=(
            where,
            "PSNR at the published sizes is not measured here: that takes training no machine here can do.",
            f"At 64 channels and k = 13 a layer of neighbourhood attention has 1/{fewer:.1f} of the parameters of a "
            "13 x 13 convolution.",
            f"Holds when TCSR is within {-BESIDE_FIXED} dB of fixed depth-wise kernels or better on photographs, and "
            f"{BY_CONTENT} dB better on textures; the shift is worth {MARGINS[context.mode][0]} dB, and 1x1 layers "
            f"alone are {MARGINS[context.mode][1]} dB behind all others, after {steps} steps (0.05 and 0.3 in the full "
            f"proof); the layer has 1/36 of the parameters, and TCSR-B at most {0.81 * 1.012:.2f} of SwinIR-light's.",
            raced(context),
        ),
        claimed_ratio=0.81,
        measured_ratio=share,
    )


def verdict(mode: str, scores: dict[str, float], content: float, fewer: float, share: float) -> bool:
    """Whether the claims hold.

    Args:
        scores: dB on photographs by network.
        content: dB of attention over fixed kernels on textures.
        fewer: parameters of a convolution over those of attention.
        share: of SwinIR-light's parameters.
    """
    by_shift, behind = MARGINS[mode]
    whole, plain = scores["TCSR"], scores["1x1 only"]
    others = [score for name, score in scores.items() if name != "1x1 only"]
    return (
        whole >= scores["depth-wise kernels"] + BESIDE_FIXED
        and whole >= scores["no shift"] + by_shift
        and min(others) >= plain + behind
        and content >= BY_CONTENT
        and fewer >= 36
        and share <= 0.81 * 1.012
    )


def variant(scale: int, config: dict[str, Any], attention: str = "attention", shift: bool = True) -> TCSR:
    """TCSR, or one with fixed kernels ("depthwise") or none ("none") in place of attention, or without the shift."""
    model = TCSR(scale, **config)
    if attention != "attention":
        layers = find(model, NeighbourhoodAttention)
        replace(model, {name: FixedKernels(m, attention == "depthwise") for name, m in layers.items()})  # type: ignore[arg-type]
    if not shift:
        replace(model, {name: nn.Identity() for name in find(model, SpatialShift)})
    return model


def law(channels: int = 64, side: int = 13, heads: int = 4) -> float:
    """Parameters of a full convolution over those of neighbourhood attention."""
    convolution = nn.Conv2d(channels, channels, side)
    return count_parameters(convolution) / count_parameters(NeighbourhoodAttention(channels, side, heads))


def textures(batch: int, side: int, dice: torch.Generator) -> Tensor:
    """Random colours that repeat PERIOD pixels right, below, or along a diagonal. Shape: [batch, 3, side, side]."""
    steps = ((0, PERIOD), (PERIOD, 0), (PERIOD, PERIOD), (PERIOD, -PERIOD))
    pictures = torch.rand(batch, 3, side, side, generator=dice)
    for picture, choice in zip(pictures, torch.randint(4, (batch,), generator=dice).tolist(), strict=True):
        down, across = steps[choice]
        for start in range(0, side, PERIOD):  # a band at a time, of what lies one step before
            if down:
                band = picture[:, max(start - down, 0) : start]
                rows = picture[:, start : start + PERIOD]
                if start:
                    rows.copy_(band.roll(across, 2)[:, : rows.shape[1]])
            elif start:
                columns = picture[:, :, start : start + PERIOD]
                columns.copy_(picture[:, :, start - PERIOD : start][..., : columns.shape[2]].clone())
    return pictures


def raced(context: ProofContext) -> str:
    """A sentence on compiled neighbourhood attention against its gathering reference, at 96 x 96 x 64, k = 9."""
    side, heads, kernel = 96, 4, 9
    dice = context.generator()
    q, k, v = (torch.randn(1, 64, side, side, generator=dice, device=context.device) for _ in range(3))

    def gathered() -> Tensor:
        a, b, c = (x.unflatten(1, (heads, -1)) for x in (q / 4, k, v))
        return neighbourhood_reference(a, b, c, None, kernel)

    fast = partial(neighbourhood_attention, q, k, v, kernel, heads)
    with torch.inference_mode():
        clock = compare(gathered, fast, 2 if context.quick else 5)
        memory = [peak_memory(call) for call in (gathered, fast)]
    sizes = " ".join("?" if m is None else f"{m / 2**20:.0f}" for m in memory)
    return (
        f"The compiled attention is {clock.speedup:.0f} times as fast as gathering neighbours at {side} x {side} x 64, "
        f"k = {kernel}, on {torch.get_num_threads()} threads; peak memory in MiB, gathered and compiled: {sizes}."
    )


def _enlarging(network: nn.Module, draw: Draw) -> Callable[[], Tensor]:
    def loss() -> Tensor:
        low, high = draw(BATCH, SIDE)
        return (network(low) - high).abs().mean()

    return loss


def _denoising(context: ProofContext, network: nn.Module) -> Callable[[], Tensor]:
    dice = torch.Generator().manual_seed(context.seed)

    def loss() -> Tensor:
        clean = textures(2 * BATCH, SIDE, dice)
        noisy = clean + NOISE * torch.randn(clean.shape, generator=dice)
        return (network(noisy.to(context.device)) - clean.to(context.device)).square().mean()

    return loss
