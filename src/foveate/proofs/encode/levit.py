"""Proof of LeViT: more pictures per second than networks of its accuracy, on one CPU thread.

Networks of equal published ImageNet accuracy, with random weights, run in turn on one thread of the CPU: LeViT-192
(80.0) against EfficientNet-B2 at 260 x 260 (80.1), which has only a third more multiply-accumulates, and LeViT-256
(81.6) against a ViT of the shape of DeiT-S (81.2 with distillation). Both baselines are those of transformers. LeViT is
folded, as it is meant to be used; unfolded it is a row of its own, as nobody folds the baselines.

What the pyramid saves is counted: LeViT-256 against as many of its blocks at a constant 14 x 14, as wide as its number
of parameters allows.
"""

from collections.abc import Callable
from copy import deepcopy
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from foveate.encode.levit import LeViT
from foveate.meter import Comparison, compare, count_flops, count_parameters
from foveate.proofs.encode._shared import network_row, one_thread
from foveate.proofs.evidence import Evidence, ProofContext, Row

BATCH = {"quick": 2, "full": 16}
PAIRS = {"quick": 5, "full": 7}
SIDE, SIDE_B2 = 224, 260
EFFICIENTNET_B2: dict[str, Any] = {
    "image_size": SIDE_B2,
    "width_coefficient": 1.1,
    "depth_coefficient": 1.2,
    "hidden_dim": 1408,
    "num_labels": 1000,
}
DEIT_SMALL: dict[str, Any] = {
    "hidden_size": 384,
    "num_hidden_layers": 12,
    "num_attention_heads": 6,
    "intermediate_size": 1536,
    "num_labels": 1000,
}
CLAIMED = 4.9
LEAST, LEAST_VIT, LEAST_MACS = CLAIMED / 2, 2.0, 2.0
TOLERANCE = 1e-4

Contender = tuple[nn.Module, Tensor]
"""A network and its pictures."""


def prove(context: ProofContext) -> Evidence:
    """Race folded networks against unfolded ones and against others of their accuracy; count what shrinking saves."""
    with one_thread():
        plain, folded, large = networks(context)
        folding = race(context, plain, folded)
        difference = apart(plain, folded)
        rows = [
            network_row("LeViT-192, unfolded", *plain, folding, 0),
            network_row("LeViT-192", *folded, folding, 1),
        ]
        speedups, note = against_others(context, folded, large, rows)
    pyramid, flat = LeViT("256"), flat_levit()
    macs = [count_flops(network.eval(), torch.zeros(1, 3, SIDE, SIDE)) / 2e9 for network in (flat, pyramid)]
    for name, network, gmacs in zip(("LeViT-256's blocks, flat", "LeViT-256"), (flat, pyramid), macs, strict=True):
        rows.append(Row(name, parameters=count_parameters(network), gmacs=gmacs))
    measured = f"{speedups[0]:.2f}x, and {speedups[1]:.2f}x a ViT of DeiT-S's shape" if speedups else "not measured"
    return Evidence(
        system="levit",
        claim="4.9 times the throughput of EfficientNet-B2 on one CPU thread, at its ImageNet accuracy",
        rows=tuple(rows),
        claimed="4.9x EfficientNet-B2 (65 against 13 images/s), and 3.1x DeiT-S",
        measured=f"{measured}; folding alone {folding.speedup:.2f}x",
        holds=verdict(speedups, difference, macs[0] / macs[1]),
        notes=(
            f"Holds when LeViT-192 has at least {LEAST} times the throughput of EfficientNet-B2 (half of what the "
            f"paper reports, as it depends on processor and libraries), LeViT-256 at least {LEAST_VIT} times that of "
            f"the ViT, folding changes no class score by {TOLERANCE} or more, and the pyramid needs at most 1 / "
            f"{LEAST_MACS} of the multiply-accumulates of flat blocks of as many parameters.",
            f"Folding changed class scores by at most {difference:.1e}; flat blocks need {macs[0] / macs[1]:.2f} times "
            "the multiply-accumulates.",
            note,
            "Accuracies are the published ones; networks have random weights here.",
        ),
        claimed_ratio=CLAIMED if speedups else None,
        measured_ratio=speedups[0] if speedups else None,
    )


def verdict(speedups: tuple[float, float] | None, difference: float, macs: float) -> bool:
    """Whether the claim holds.

    Args:
        speedups: over EfficientNet-B2 and over the ViT; None where transformers is not installed.
        difference: largest change of a class score by folding.
        macs: multiply-accumulates of the flat network over those of the pyramid.
    """
    fast = speedups is None or (speedups[0] >= LEAST and speedups[1] >= LEAST_VIT)
    return fast and difference < TOLERANCE and macs >= LEAST_MACS


def networks(context: ProofContext) -> tuple[Contender, Contender, Contender]:
    """LeViT-192 as it is trained and folded, and LeViT-256 folded, each with pictures."""
    x = torch.rand(BATCH[context.mode], 3, SIDE, SIDE, generator=context.generator(), device=context.device)
    plain, large = (seasoned(LeViT(size).to(context.device), context) for size in ("192", "256"))
    return (plain, x), (deepcopy(plain).fuse(), x), (large.fuse(), x)


def seasoned(network: LeViT, context: ProofContext) -> LeViT:
    """Make batch norms what they may be after training, so that folding them wrongly would show; in eval mode."""
    dice = context.generator()
    for module in network.modules():
        if isinstance(module, nn.BatchNorm1d | nn.BatchNorm2d):
            for tensor in (module.weight.data, module.bias.data, module.running_mean, module.running_var):
                assert tensor is not None
                tensor.copy_(torch.rand(tensor.shape, generator=dice, device=tensor.device) + 0.5)
            module.bias.data.sub_(1)
    return network.eval()


def race(context: ProofContext, baseline: Contender, method: Contender) -> Comparison:
    """Time both in turn."""

    def run(network: nn.Module, x: Tensor) -> None:
        with torch.inference_mode():
            network(x)

    return compare(partial(run, *baseline), partial(run, *method), PAIRS[context.mode], flops=False)


def apart(first: Contender, second: Contender) -> float:
    """The largest difference of class scores."""
    with torch.inference_mode():
        return float((first[0](first[1]) - second[0](second[1])).abs().max())


def against_others(
    context: ProofContext, levit_192: Contender, levit_256: Contender, rows: list[Row]
) -> tuple[tuple[float, float] | None, str]:
    """Speed-ups over EfficientNet-B2 and a ViT, and a note; rows are added."""
    try:
        from transformers import (
            EfficientNetConfig,
            EfficientNetForImageClassification,
            ViTConfig,
            ViTForImageClassification,
        )
    except ImportError:
        return None, "Without transformers (foveate[hosts]) there is no baseline to race against."
    shape = (BATCH[context.mode], 3, SIDE_B2, SIDE_B2)
    wide = torch.rand(shape, generator=context.generator(), device=context.device)
    makers: dict[str, tuple[Callable[[], nn.Module], Tensor, Contender]] = {
        "EfficientNet-B2, 260 px": (
            lambda: EfficientNetForImageClassification(EfficientNetConfig(**EFFICIENTNET_B2)),
            wide,
            levit_192,
        ),
        "ViT of DeiT-S's shape": (
            lambda: ViTForImageClassification(ViTConfig(**DEIT_SMALL)),
            levit_256[1],
            levit_256,
        ),
    }
    speedups = []
    for name, (make, x, ours) in makers.items():
        other = make().to(context.device).eval()
        clock = race(context, (other, x), ours)
        rows.append(network_row(name, other, x, clock, 0))
        rows.append(network_row(f"LeViT-{'256' if ours is levit_256 else '192'} beside it", *ours, clock, 1))
        speedups.append(clock.speedup)
    return (speedups[0], speedups[1]), (
        f"Images/s are of batches of {BATCH[context.mode]} on one thread of {context.device}; a network that was in "
        "two races has two rows."
    )


def flat_levit() -> LeViT:
    """LeViT-256's 12 blocks at 14 x 14 and of one width, the largest with no more parameters."""
    limit, width = count_parameters(LeViT("256")), 256
    with torch.device("meta"):
        while count_parameters(_flat(width + 8)) <= limit:
            width += 8
    return _flat(width)


def _flat(width: int) -> LeViT:
    return LeViT(embed_dims=(width,), key_dim=32, num_heads=(width // 64,), depths=(12,))
