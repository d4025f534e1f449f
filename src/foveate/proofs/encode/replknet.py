"""Proof of RepLKNet: one 31 x 31 kernel sees further than fifteen 3 x 3 ones, for 18% more work and in less time.

Reach. One 31 x 31 depth-wise layer and fifteen of 3 x 3 have the same theoretical field, 31 pixels; two and thirty have
61. With random weights of unit gain, on white noise of 95 x 95, compared are the squares around the centre that hold
half of what moves it (see `foveate.meter.receptive_field`).

Time. RepLKNet-31B with random weights at 224 x 224: against Swin-B of transformers, its equal in published ImageNet
accuracy (83.5% both), against its own unfolded form, and against itself on PyTorch's convolution, with channels last
(which that is about ten times as fast with). The depth-wise layers of its stages also alone.
"""

from copy import deepcopy
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from foveate.encode.replknet import LargeDepthwise, RepLKNet
from foveate.meter import Comparison, compare, count_flops, count_parameters
from foveate.meter.receptive_field import effective_receptive_field, side_of
from foveate.ops import use
from foveate.ops.large_depthwise import large_depthwise, path_for
from foveate.proofs.evidence import Evidence, ProofContext, Row

NOISE, CHANNELS = 95, 8
REACH = (1.4, 1.7)
"""Times as far that one and two large layers have to see."""

SPEEDUP, MACS = 1.17, 1.2
"""Over Swin-B (nine tenths of the paper's 1.3), and at most, over the same network with 3 x 3 kernels."""

PAIRS = {"quick": 5, "full": 15}
PICTURES = {"quick": 1, "full": 4}
SIDE = 224

STAGES = ((128, 56, 31), (256, 28, 29), (512, 14, 27), (1024, 7, 13))
"""Channels, side of the map and of the kernel of 31B at 224 x 224."""

SWIN_B: dict[str, Any] = {
    "embed_dim": 128, "depths": [2, 2, 18, 2], "num_heads": [4, 8, 16, 32], "num_labels": 1000,
}  # fmt: skip


def prove(context: ProofContext) -> Evidence:
    """Measure reach, kernels and networks."""
    rows, reach = [], []
    for layers in (1, 2):
        large = field(context, 31, layers)
        small = field(context, 3, 15 * layers)
        reach.append(large / small)
        rows.append(Row(f"{15 * layers} layers of 3x3", field_px=small, theoretical_px=30 * layers + 1))
        rows.append(Row(f"{layers} of 31x31", field_px=large, theoretical_px=30 * layers + 1))
    for stage in STAGES:
        rows += kernel_rows(context, *stage)
    network = RepLKNet().to(context.device).eval()
    cost, small_cost = gmacs(), gmacs(kernels=(3, 3, 3, 3), small=0)
    macs = cost / small_cost
    x = torch.rand(PICTURES[context.mode], 3, SIDE, SIDE, generator=context.generator(), device=context.device)
    folded = deepcopy(network).fuse()
    rows.append(Row("RepLKNet-31B with 3x3 kernels, folded", gmacs=small_cost))
    rows.append(Row("RepLKNet-31B, folded", parameters=count_parameters(folded), gmacs=cost))
    merging = race(context, network, folded, x)
    rows.append(network_row("folded, against its trained form", merging))
    plain = race(context, ChannelsLast(folded), folded, x)
    rows.append(network_row("folded, against PyTorch's convolution, channels last", plain))
    against, note = swin(context, folded, x)
    if against is not None:
        rows.append(network_row("folded, against Swin-B", against))
    faster = None if against is None else against.speedup
    told = "no Swin-B here" if faster is None else f"{faster:.2f}x Swin-B's throughput"
    return Evidence(
        system="replknet",
        claim="31x31 kernels see further than stacks of 3x3 for 18% more work, at 1.3x Swin-B's throughput",
        rows=tuple(rows),
        claimed="1.3x Swin-B's throughput (83.5% both on ImageNet), +18% multiply-accumulates over 3x3",
        measured=f"{told}, {macs - 1:+.0%} multiply-accumulates, {reach[0]:.2f}x and {reach[1]:.2f}x the reach",
        holds=verdict(reach, macs, faster),
        notes=(
            f"Holds when one and two large layers see at least {REACH[0]} and {REACH[1]} times as far as the stacks, "
            f"31B has at most {MACS} times the multiply-accumulates of the same network with 3x3, and it is at least "
            f"{SPEEDUP} times as fast as Swin-B.",
            f"{note} The paper's 1.3x is of a GPU with a kernel of its own. Accuracies are the paper's and not tried.",
            f"Speed-ups of kernels are over PyTorch's convolution, channels last (`conv_ms`); on ordinary tensors that "
            f"is about ten times slower still. Networks take {PICTURES[context.mode]} picture(s) of {SIDE} x {SIDE}.",
        ),
        claimed_ratio=1.3,
        measured_ratio=faster,
    )


def verdict(reach: list[float], macs: float, faster: float | None) -> bool:
    """Whether the claim holds.

    Args:
        reach: of one and two large layers over their stacks.
        macs: of 31B over the same with 3 x 3.
        faster: speed-up over Swin-B; None where transformers is not installed.
    """
    sees = all(found >= asked for found, asked in zip(reach, REACH, strict=True))
    return sees and macs <= MACS and faster is not None and faster >= SPEEDUP


def field(context: ProofContext, kernel: int, layers: int) -> int:
    """Side of the effective field of a stack of random depth-wise layers."""
    dice = context.generator()
    stack = nn.Sequential(*(LargeDepthwise(CHANNELS, kernel) for _ in range(layers))).to(context.device)
    for parameter in stack.parameters():
        nn.init.normal_(parameter, std=1 / kernel, generator=dice)
    noise = torch.randn(4, CHANNELS, NOISE, NOISE, generator=dice, device=context.device)
    return side_of(effective_receptive_field(stack, noise))


def gmacs(**settings: object) -> float:
    """Billions of multiply-accumulates of the folded network, counted without values."""
    with torch.device("meta"), torch.no_grad():
        network: nn.Module = RepLKNet(**settings).fuse()  # type: ignore[arg-type]
        return count_flops(network, torch.zeros(1, 3, SIDE, SIDE)) / 2e9


def kernel_rows(context: ProofContext, channels: int, side: int, kernel: int) -> list[Row]:
    """One depth-wise layer, forward, against PyTorch's on channels-last tensors."""
    dice = context.generator()
    x = torch.randn(1, channels, side, side, generator=dice, device=context.device)
    weight = torch.randn(channels, 1, kernel, kernel, generator=dice, device=context.device) / kernel
    last = x.contiguous(memory_format=torch.channels_last)

    def run(fast: bool, x: Tensor) -> None:
        with use("fast" if fast else "reference"), torch.inference_mode():
            large_depthwise(x, weight)

    clock = compare(partial(run, False, last), partial(run, True, x), PAIRS[context.mode], flops=False)
    ours, theirs = (1e3 * min(seconds) for seconds in reversed(clock.seconds))
    name = f"{kernel}x{kernel} on {channels} x {side} x {side}, {path_for(x, weight)}"
    return [Row(name, ms=ours, conv_ms=theirs, speedup=clock.speedup)]


class ChannelsLast(nn.Module):
    """A network on PyTorch's convolutions and channels-last tensors. Shape: as the network's."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = deepcopy(network).to(memory_format=torch.channels_last)  # type: ignore[call-overload]

    def forward(self, x: Tensor) -> Tensor:
        with use("reference"):
            return self.network(x.contiguous(memory_format=torch.channels_last))


def race(context: ProofContext, baseline: nn.Module, network: nn.Module, x: Tensor) -> Comparison:
    """The network against a baseline on the same pictures."""

    def run(model: nn.Module) -> None:
        with torch.inference_mode():
            model(x)

    return compare(partial(run, baseline), partial(run, network), PAIRS[context.mode], flops=False)


def network_row(name: str, clock: Comparison) -> Row:
    """Milliseconds of both, and the speed-up."""
    ms, before = (1e3 * min(seconds) for seconds in reversed(clock.seconds))
    return Row(name, ms=ms, baseline_ms=before, speedup=clock.speedup)


def swin(context: ProofContext, network: nn.Module, x: Tensor) -> tuple[Comparison | None, str]:
    """The network against Swin-B with random weights, and what to say of it."""
    try:
        from transformers import SwinConfig, SwinForImageClassification
    except ImportError:
        return None, "Without transformers (foveate[hosts]) there is no Swin-B to race against."
    baseline: Any = SwinForImageClassification(SwinConfig(**SWIN_B)).eval()
    baseline.to(context.device)
    size = count_parameters(baseline) / 1e6
    return race(context, baseline, network, x), f"Swin-B is that of transformers, {size:.1f} M parameters."
