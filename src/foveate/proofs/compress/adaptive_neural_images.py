"""Proof of adaptive neural images: 4-bit weights against 16-bit ones, one file against networks of their own.

On crops of pictures, with the same number of steps for everyone:

* networks of a quarter, a half, three quarters and all of the width, each fitted alone and stored at 16 bits. Bits
  against PSNR of these four is the curve that the claim compares with;
* the same networks at 4 bits, rounded after the fit, and fitted on with rounded weights;
* one file that holds all four widths, cut off behind each, and what becomes of the widest network fitted alone when it
  is cut down to the other widths;
* the widest network with sines in sines (SIREN) in place of multiplicative filters.

Networks fitted alone get the filters that they have in the common file, which is better for narrow ones than filters
spread over all frequencies. PSNR is of pictures rounded to 8 bits.
"""

import copy
import math
from itertools import pairwise
from statistics import mean

import torch
from PIL import Image
from torch import Tensor

from foveate.compress import neural_codes
from foveate.compress.adaptive_neural_images import AdaptiveNeuralImages
from foveate.compress.container import Container
from foveate.compress.gaussian_fit import pace, psnr
from foveate.compress.neural_codes import Codes
from foveate.compress.neural_decode import render
from foveate.compress.neural_fit import fit, quantise
from foveate.layers.implicit import NeuralImage
from foveate.meter import count_parameters
from foveate.proofs.compress._gaussians import crop, kodak
from foveate.proofs.evidence import Evidence, ProofContext, Row

SIDE = {"quick": 64, "full": 128}
WIDTH = {"quick": 40, "full": 48}
STEPS = {"quick": 800, "full": 1200}
"""Of the free part and of the part under quantisation, each."""

PICTURES = {"quick": 1, "full": 3}
BITS = 4
SHARES = (0.25, 0.5, 0.75, 1.0)
Figures = dict[str, tuple[float, float]]
"""Name of a row -> (PSNR in dB, bits per pixel)."""


def prove(context: ProofContext) -> Evidence:
    """Fit all networks to all pictures."""
    mode = context.mode
    sources = kodak(context) or [(name, picture.cpu()) for name, picture in context.photographs()]
    chosen = [(name, crop(picture, SIDE[mode])) for name, picture in sources[: PICTURES[mode]]]
    trials = []
    for _, picture in context.track(chosen, "fitting"):
        figures, decoded = trial(picture, WIDTH[mode], STEPS[mode], context.seed)
        trials.append(figures)
    means = {name: (mean(t[name][0] for t in trials), mean(t[name][1] for t in trials)) for name in trials[0]}
    saved = mean(saving(t) for t in trials)
    *narrow, widest = widths(mode)
    wide = f"alone, width {widest}"
    gain = means[f"{wide}, 4 bits, fitted"][0] - means[f"{wide}, 4 bits, rounded"][0]
    loss = means[f"{wide}, 16 bits"][0] - means[f"{wide}, 4 bits, fitted"][0]
    away = {n: means[f"alone, width {n}, 4 bits, fitted"][0] - means[f"one file, width {n}"][0] for n in widths(mode)}
    sliced = {n: means[f"alone, width {n}, 16 bits"][0] - means[f"cut down to width {n}, 16 bits"][0] for n in narrow}
    siren = means["SIREN, 16 bits"][0] - means["SIREN, 4 bits, fitted"][0]
    return Evidence(
        system="adaptive-neural-images",
        claim="4x fewer bits per pixel than the same neural image at 16 bits, at nearly the same PSNR",
        rows=tuple(Row(name, psnr_db=quality, bpp=rate) for name, (quality, rate) in means.items()),
        claimed="4x fewer bits at nearly the same PSNR; one file serves several rates",
        measured=(
            f"{saved:.1f}x fewer bits at equal PSNR; {loss:.1f} dB below the same network at 16 bits; {gain:+.1f} dB "
            f"by fitting under quantisation; one file within {max(away.values()):.1f} dB of networks of their own"
        ),
        holds=verdict(saved, gain, max(away.values())),
        notes=(
            "Holds when 16-bit networks need at least 3 times the bits for the PSNR of the 4-bit one, fitting under "
            "quantisation gains at least 2 dB over rounding, and every level of the common file is within 2 dB of "
            "a network fitted for it alone.",
            "Levels of the common file against networks of their own at 4 bits: "
            + ", ".join(f"width {n} {-dB:+.1f} dB" for n, dB in away.items())
            + ". A 16-bit network cut down without having been fitted for it loses "
            + ", ".join(f"{dB:.1f} dB at width {n}" for n, dB in sliced.items())
            + ".",
            f"4 bits cost multiplicative filters {loss:.1f} dB and SIREN {siren:.1f} dB.",
            f"{len(chosen)} crops of {SIDE[mode]}x{SIDE[mode]} pixels ({', '.join(name for name, _ in chosen)}); "
            f"{STEPS[mode]} steps free and {STEPS[mode]} more, free for 16 bits and rounded for 4. Rates at 4 bits are "
            "those of files, header and all; at 16 bits weights alone are counted. Filters cost neither any bits.",
        ),
        figure=strip(picture, decoded),
        claimed_ratio=4.0,
        measured_ratio=saved,
    )


def verdict(saved: float, gain: float, away: float) -> bool:
    """Whether the claim holds.

    Args:
        saved: bits of 16-bit networks over those of the 4-bit one, at equal PSNR.
        gain: dB of fitting under quantisation over rounding.
        away: dB by which the worst level of the common file is below a network of its own.
    """
    return saved >= 3 and gain >= 2 and away <= 2


def widths(mode: str) -> list[int]:
    """Widths of the levels."""
    return [math.ceil(share * WIDTH[mode]) for share in SHARES]


def trial(target: Tensor, width: int, steps: int, seed: int) -> tuple[Figures, list[Tensor]]:
    """Fit all networks to a picture [3, H, W]. Returns their figures, and what the levels of the file decode to."""
    codec = AdaptiveNeuralImages(bits=BITS, shares=SHARES, width=width, steps=2 * steps, seed=seed)
    container = codec.encode(target[None])
    common, _ = codec.unpack(container)
    found: Figures = {}
    for n, depth in common.levels:
        alone = NeuralImage([(n, depth)], 3, "fourier", common.top, torch.Generator().manual_seed(seed))
        alone.frequencies, alone.phases = common.frequencies[:, :n].clone(), common.phases[:, :n].clone()
        found |= fitted(alone, target, codec, steps, f"alone, width {n}")
    for n, _ in common.levels[:-1]:
        narrow = cut(alone, n)
        found[f"cut down to width {n}, 16 bits"] = (quality(narrow, target), sixteen(narrow, target))
    files = [codec.narrowed(container, level) for level in range(len(common.levels))]
    decoded = [codec.decode(file)[0] for file in files]
    for (n, _), file, picture in zip(common.levels, files, decoded, strict=True):
        found[f"one file, width {n}"] = (whole(picture, target), 8 * len(file.to_bytes()) / target[0].numel())
    siren = NeuralImage([common.levels[-1]], 3, "siren", generator=torch.Generator().manual_seed(seed))
    return found | fitted(siren, target, codec, steps, "SIREN"), decoded


def fitted(net: NeuralImage, target: Tensor, codec: AdaptiveNeuralImages, steps: int, name: str) -> Figures:
    """Fit a network of one level. Returns figures at 16 bits, and at few bits in both ways; leaves it at 16 bits."""
    generator = torch.Generator().manual_seed(codec.seed)
    fit(net, target, pace(steps), generator)
    during = copy.deepcopy(net)
    fit(during, target, pace(steps), generator, BITS)
    rate = file_rate(during, quantise(during, target, BITS), codec, target)
    fit(net, target, pace(steps), generator)
    with torch.no_grad():
        for weight in net.parameters():
            weight.copy_(weight.half())
    after = copy.deepcopy(net)
    codes = {n: neural_codes.encode(w, neural_codes.bits_of(n, BITS)) for n, w in net.named_parameters()}
    neural_codes.put(after, codes)
    return {
        f"{name}, 16 bits": (quality(net, target), sixteen(net, target)),
        f"{name}, {BITS} bits, rounded": (quality(after, target), file_rate(after, codes, codec, target)),
        f"{name}, {BITS} bits, fitted": (quality(during, target), rate),
    }


def cut(net: NeuralImage, width: int) -> NeuralImage:
    """The first rows and columns of a network of one level."""
    narrow = NeuralImage([(width, net.levels[0][1])], 3, net.kind)
    with torch.no_grad():
        for mine, given in zip(
            [*narrow.parameters(), *narrow.buffers()], [*net.parameters(), *net.buffers()], strict=True
        ):
            mine.copy_(given[tuple(map(slice, mine.shape))])
    return narrow


def saving(figures: Figures) -> float:
    """Bits of 16-bit networks over those of the widest at few bits, at its PSNR: on straight lines through log bits."""
    curve = sorted(figures[name] for name in figures if name.startswith("alone") and name.endswith("16 bits"))
    reached, rate = [figures[name] for name in figures if name.startswith("alone") and name.endswith("fitted")][-1]
    (low, first), (high, second) = next(
        (pair for pair in pairwise(curve) if reached <= pair[1][0]), (curve[-2], curve[-1])
    )
    share = (reached - low) / max(high - low, 1e-9)
    return first * (second / first) ** share / rate


def quality(net: NeuralImage, target: Tensor) -> float:
    """PSNR in dB of what a network draws."""
    return whole(render(net, *target.shape[1:]), target)


def whole(picture: Tensor, target: Tensor) -> float:
    """PSNR in dB of a picture rounded to 8 bits."""
    return psnr((picture * 255).round() / 255, target)


def sixteen(net: NeuralImage, target: Tensor) -> float:
    """Bits per pixel of the weights alone, at 16 bits."""
    return 16 * count_parameters(net) / target[0].numel()


def file_rate(net: NeuralImage, codes: dict[str, Codes], codec: AdaptiveNeuralImages, target: Tensor) -> float:
    """Bits per pixel of a file that holds a network."""
    container = Container(codec.slug, target.shape[2], target.shape[1], 3, codec.pack(net, codes))
    return 8 * len(container.to_bytes()) / target[0].numel()


def strip(target: Tensor, decoded: list[Tensor]) -> Image.Image:
    """Levels of a file from narrow to wide, then the picture, side by side and at least 192 pixels high."""
    row = torch.cat([*decoded, target], 2).clamp(0, 1)
    enlarged = row.repeat_interleave(factor := max(1, 192 // row.shape[1]), 1).repeat_interleave(factor, 2)
    return Image.fromarray((enlarged * 255).round().byte().permute(1, 2, 0).numpy())
