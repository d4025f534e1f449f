"""Proof of SCNet: a free shift makes 1x1 convolutions see their neighbours, at a ninth of the 3x3 convolution's work.

Five networks of one outline (entry, blocks, pixel-shuffle unit, two closing convolutions, added to the bilinearly
enlarged picture), x2, trained on the same crops for the same steps:

    a  1x1 convolutions, no shift        a map from pixel to pixel, which cannot learn to sharpen
    b  1x1 convolutions and Shift8       the system
    c  3x3 convolutions, b's width       nine times the work
    d  3x3 convolutions, b's parameters  a third of the width
    e  b with the shifts written out as depth-wise 3x3 convolutions of one-hot kernels: the same function

Per block and pixel b costs 2*C*C multiply-accumulates, c costs 9 times that.
"""

from collections.abc import Callable, Sequence
from copy import deepcopy
from functools import partial

import torch
from torch import Tensor, nn

from foveate.engine.surgery import find, replace
from foveate.layers.residual import ResidualBlock
from foveate.layers.shift import SpatialShift
from foveate.layers.upscaler import enlarge
from foveate.meter import Comparison, compare, count_flops, count_parameters
from foveate.proofs.evidence import Evidence, ProofContext, Row
from foveate.proofs.restore._shared import Draw, Pair, crops, mean_psnr, measured_pairs, pair, train, training_pairs
from foveate.restore.scnet import SCNet, SCResBlock

SCALE = 2
CHANNELS, BLOCKS = 32, 8
BATCH, SIDE = 4, 32
"""Crops per step and their side in low-resolution pixels."""

STEPS = {"quick": 600, "full": 1500}
LR = 2e-3
MARGIN = {"quick": 0.2, "full": 0.5}
"""dB by which the shift must help."""

TIMED = "chelsea"


class Spatial(nn.Module):
    """SCNet's outline with 3x3 convolutions. Shape: [B, 3, h, w] -> [B, 3, s*h, s*w]."""

    def __init__(self, channels: int, blocks: int = BLOCKS) -> None:
        super().__init__()
        conv = partial(nn.Conv2d, kernel_size=3, padding=1)
        self.layers = nn.Sequential(
            conv(3, channels),
            nn.LeakyReLU(0.1),
            *(ResidualBlock(channels) for _ in range(blocks)),
            conv(channels, channels),
            nn.LeakyReLU(0.02),
            conv(channels, channels * SCALE**2),
            nn.PixelShuffle(SCALE),
            nn.LeakyReLU(0.1),
            conv(channels, channels),
            nn.LeakyReLU(0.1),
            conv(channels, 3),
        )
        for module in self.modules():
            if isinstance(module, nn.Conv2d):  # SCNet's own start
                nn.init.kaiming_normal_(module.weight)
                module.weight.data *= 0.1
                nn.init.constant_(module.bias, 0)  # type: ignore[arg-type]

    def forward(self, x: Tensor) -> Tensor:
        return self.layers(x) + enlarge(x, SCALE)


def prove(context: ProofContext) -> Evidence:
    """Train a, b, c and d on the same crops, write b's shifts out as e; compare PSNR, work and time."""
    steps, margin = STEPS[context.mode], MARGIN[context.mode]
    shifted = partial(SCNet, SCALE, CHANNELS, BLOCKS, "ps")
    a, b, c = shifted(shift=False), shifted(), Spatial(CHANNELS)
    d = Spatial(matched_width(count_parameters(b)))
    names = ("1x1, no shift", "1x1 and Shift8", "3x3, same width", "3x3, same parameters")
    networks: dict[str, nn.Module] = dict(zip(names, (a, b, c, d), strict=True))
    data = training_pairs(context, SCALE)
    for name, network in networks.items():
        if network is c and context.quick:  # takes as long as the others together; here it only lends its speed
            c.to(context.device, memory_format=torch.channels_last).eval()  # type: ignore[call-overload]
            continue
        train(context, network, _loss(network, crops(data, context.seed)), steps, f"training {name}", lr=LR)
    written = written_out(b)
    networks["1x1 and one-hot 3x3"] = written

    tests, where = measured_pairs(context, SCALE)
    timed = pair(TIMED, dict(context.photographs())[TIMED], SCALE)
    clocks = {name: race(c, network, timed.low) for name, network in networks.items() if network is not c}
    rows = [Row("bilinear", psnr_y_db=mean_psnr(lambda low: enlarge(low, SCALE), tests))]
    for name, network in networks.items():
        trained = network is not c or context.full
        rows.append(_row(name, network, tests if trained else [], timed.low, clocks.get(name)))
    psnr = {row.name: row.metrics["psnr_y_db"] for row in rows if "psnr_y_db" in row.metrics}
    gain = psnr[names[1]] - psnr[names[0]]
    ratio = block_macs(ResidualBlock(CHANNELS)) / block_macs(SCResBlock(CHANNELS))
    fewer = count_parameters(ResidualBlock(CHANNELS)) / count_parameters(SCResBlock(CHANNELS))
    versus = [
        f"{psnr[names[1]] - psnr[name]:+.2f} dB against {name} ({size} channels, as many steps)."
        for name, size in ((names[3], matched_width(count_parameters(b))), (names[2], CHANNELS))
        if name in psnr
    ]
    with torch.inference_mode():
        apart = float((written(timed.low) - b(timed.low)).abs().max())
    return Evidence(
        system="scnet",
        claim="a ninth of a 3x3 block's multiply-accumulates, and spatial shifts give back what 1x1 kernels lack",
        rows=tuple(rows),
        claimed="9x fewer multiply-accumulates per block",
        measured=f"{ratio:.2f}x fewer per block, {gain:+.2f} dB by the shift, {clocks[names[1]].speedup:.1f}x faster",
        holds=verdict(gain, margin, ratio, apart),
        notes=(
            where,
            f"Holds when the shift is worth at least {margin} dB over 1x1 convolutions alone after {steps} steps (0.5 "
            "in the full proof, 0.2 in the quick one), a block has a ninth of the multiply-accumulates, and shifts "
            "equal one-hot convolutions.",
            *versus,
            f"Shifts and one-hot convolutions differ by at most {apart:.1g} on {TIMED}.",
            f"A block has {fewer:.1f}x fewer parameters. Speed-ups are over 3x3 convolutions of the same width on "
            f"{TIMED}; a shift costs no FLOPs but a pass over memory.",
        ),
        claimed_ratio=9.0,
        measured_ratio=ratio,
    )


def verdict(gain: float, margin: float, ratio: float, apart: float) -> bool:
    """Whether the claim holds.

    Args:
        gain, margin: dB that the shift is worth, and has to be worth.
        ratio: multiply-accumulates of a 3x3 block over those of a shifting one.
        apart: largest difference between shifts and one-hot convolutions.
    """
    return gain >= margin and abs(ratio - 9) < 1e-6 and apart <= 1e-6


def matched_width(parameters: int) -> int:
    """The largest width at which `Spatial` has no more parameters than given."""
    width = 1
    while count_parameters(Spatial(width + 1)) <= parameters:
        width += 1
    return width


def written_out(model: nn.Module) -> nn.Module:
    """A copy with every shift written out as a depth-wise convolution."""
    copy = deepcopy(model)
    channels = next(m.in_channels for m in find(copy, SCResBlock)["body.0"].modules() if isinstance(m, nn.Conv2d))
    device = next(copy.parameters()).device
    shifts = find(copy, SpatialShift)
    replace(copy, {name: one_hot(s.directions, channels).to(device) for name, s in shifts.items()})  # type: ignore[arg-type]
    return copy


def one_hot(directions: Sequence[tuple[int, int]], channels: int) -> nn.Conv2d:
    """The depth-wise 3x3 convolution that moves groups of channels one pixel: out[y, x] = in[y + dy, x + dx].

    >>> one_hot(((0, 1),), 1).weight[0, 0].tolist()
    [[0.0, 0.0, 0.0], [0.0, 0.0, 1.0], [0.0, 0.0, 0.0]]
    """
    conv = nn.Conv2d(channels, channels, 3, padding=1, groups=channels, bias=False)
    with torch.no_grad():
        conv.weight.zero_()
        for group, (dy, dx) in zip(conv.weight.chunk(len(directions)), directions, strict=True):
            group[:, 0, 1 + dy, 1 + dx] = 1
    return conv


def block_macs(block: nn.Module) -> float:
    """Multiply-accumulates of a block per pixel."""
    with torch.no_grad():
        return count_flops(block, torch.zeros(1, CHANNELS, 8, 8)) / 2 / 64


def race(baseline: nn.Module, network: nn.Module, low: Tensor, pairs: int = 5) -> Comparison:
    """Time two networks on one picture."""
    low = low.contiguous(memory_format=torch.channels_last)

    def run(model: nn.Module) -> None:
        with torch.inference_mode():
            model(low)

    return compare(partial(run, baseline), partial(run, network), pairs)


def _row(name: str, network: nn.Module, tests: list[Pair], low: Tensor, clock: Comparison | None) -> Row:
    with torch.no_grad():
        macs = count_flops(network, low) / 2 / low[0, 0].numel()
    return Row(
        name,
        **({"psnr_y_db": mean_psnr(network, tests)} if tests else {}),
        parameters=count_parameters(network, trainable=True),
        macs_per_input_pixel=macs,
        speedup=clock.speedup if clock else 1.0,
    )


def _loss(network: nn.Module, draw: Draw) -> Callable[[], Tensor]:
    def loss() -> Tensor:
        low, high = draw(BATCH, SIDE)
        return (network(low) - high).abs().mean()

    return loss
