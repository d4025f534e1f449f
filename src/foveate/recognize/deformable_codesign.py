"""Deformable convolution with as much freedom as the hardware can pay for.

Huang, Wang, Gao, Cai, Dong, Wu, Keutzer, Wawrzynek 2020, "Algorithm-hardware Co-design for Deformable Convolution",
arXiv:2002.08357.

A deformable 3x3 convolution samples nine places around each pixel p that a small convolution predicts,

    y(p) = sum_t W_t x(p + t + o_t(p)),   t in {-1, 0, 1}^2,

bilinear between pixels, zero outside. Small hardware has no cache to serve such reads, so freedom is taken away in
steps, the rungs of a ladder:

    rung      predicted         offsets                         what it buys
    fixed     nothing           0                               a convolution
    free      18 numbers        o_t                             any place
    bound     18 numbers        clamp(o_t, -N, N)               2N + 3 rows in a line buffer; every pixel read once
    square    1 number s        t clamp(s, 0, N)                a dilation 1 + s per pixel: three rows read in parallel

and `rounded` makes offsets whole: no bilinear arithmetic, one pixel per sample. The depth-wise form puts a 1x1
convolution before a kernel per channel, all of which share the offsets. The predictor begins at zero, so that training
begins with a plain convolution; s < 0 gives no gradient, so a dilation can leave 1 upwards only.

CoDeNet's code writes the square as t (s - 1) with s in [-N + 1, N]: its s is ours plus one.

What each rung costs is in `foveate.recognize.deformable_cost`; its quantised form is `foveate.layers.quantise`.
"""

import re
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from typing import Any, Self

import torch
import torch.nn.functional as F
from huggingface_hub import PyTorchModelHubMixin
from torch import Tensor, nn

from foveate.errors import InputError, WeightsError
from foveate.layers.fold import fold_conv_bn, fuse
from foveate.ops.gathered import gathered, kernel_taps, round_offset, square_offset

RUNGS = ("fixed", "free", "bound", "square")
"""From a plain convolution over any offsets to ever more regular ones."""

TAPS = kernel_taps(3)


class DeformConv(nn.Conv2d):
    """A 3x3 convolution of stride 1 whose taps move.

    Args:
        inputs, outputs: channels.
        rung: how freely, one of `RUNGS`.
        bound: N of the rungs "bound" and "square", in pixels.
        rounded: whole offsets; gradients pass as if they were not rounded. Can be switched on after training.
        depthwise: a kernel per channel, for as many outputs as inputs.

    Shape: [B, inputs, H, W] -> [B, outputs, H, W].
    Raises: InputError for an unknown rung, a negative bound, or a depth-wise form that changes the channels.
    """

    def __init__(
        self,
        inputs: int,
        outputs: int,
        rung: str = "square",
        bound: int = 8,
        rounded: bool = False,
        depthwise: bool = False,
    ) -> None:
        if rung not in RUNGS:
            raise InputError(f"unknown rung {rung!r}; use one of {', '.join(map(repr, RUNGS))}.")
        if bound < 0 or bound != int(bound):
            raise InputError(f"bound is a whole number of pixels from 0, got {bound}.")
        if depthwise and inputs != outputs:
            raise InputError(f"a depth-wise kernel keeps its channels, got {inputs} and {outputs}; see DeformStage.")
        super().__init__(inputs, outputs, 3, padding=1, groups=inputs if depthwise else 1, bias=False)
        self.rung, self.bound, self.rounded = rung, bound, rounded
        nn.init.normal_(self.weight, std=outputs**-0.5 / 3)
        if rung != "fixed":
            kernel = 1 if depthwise or rung == "free" else 3
            self.conv_offset = nn.Conv2d(inputs, 1 if rung == "square" else 18, kernel, padding=kernel // 2)
            for parameter in self.conv_offset.parameters():
                nn.init.zeros_(parameter)

    def offset(self, x: Tensor) -> Tensor:
        """How far each tap moves, (x, y) in pixels. Shape: [B, inputs, H, W] -> [B, 1, 9, 2, H, W]."""
        predicted = self.conv_offset(x)
        if self.rung == "square":
            spread = predicted.clamp(0, self.bound)
            return square_offset(round_offset(spread) if self.rounded else spread, 3)
        offset = predicted.unflatten(1, (1, 9, 2)).flip(3)  # (dy, dx) of each tap is predicted
        if self.rung == "bound":
            offset = offset.clamp(-self.bound, self.bound)
        return round_offset(offset) if self.rounded else offset

    def forward(self, x: Tensor) -> Tensor:
        if self.rung == "fixed":
            return super().forward(x)
        offset, weight = self.offset(x), self.weight
        if self.groups > 1:
            y = gathered(x, weight.view(1, len(weight), 9, 1, 1), offset, kernel_size=3)
        else:
            one, y = weight.new_ones(1, 1, 1, 1, 1), x.new_zeros(())
            for t, tap in enumerate(TAPS):
                samples = gathered(x, one, offset[:, :, t : t + 1], taps=[tap])
                y = y + F.conv2d(samples, weight.flatten(2)[:, :, t, None, None])
        return y if self.bias is None else y + self.bias[:, None, None]

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, rung={self.rung}, bound={self.bound}, rounded={self.rounded}"


class DeformStage(nn.Sequential):
    """A deformable convolution, batch norm, ReLU, and each pixel repeated along both sides.

    Args:
        inputs, outputs: channels.
        depthwise: a 1x1 convolution from inputs to outputs before a depth-wise kernel.
        rung, bound, rounded: see `DeformConv`.
        scale: how often pixels are repeated.

    Shape: [B, inputs, H, W] -> [B, outputs, scale H, scale W].
    """

    conv: DeformConv
    bn: nn.BatchNorm2d

    def __init__(
        self,
        inputs: int,
        outputs: int,
        depthwise: bool = True,
        rung: str = "square",
        bound: int = 8,
        rounded: bool = False,
        scale: int = 2,
    ) -> None:
        super().__init__()
        if depthwise:
            self.point_wise = nn.Conv2d(inputs, outputs, 1, bias=False)
        self.conv = DeformConv(outputs if depthwise else inputs, outputs, rung, bound, rounded, depthwise)
        self.bn = nn.BatchNorm2d(outputs)
        self.relu = nn.ReLU()
        self.up = nn.Upsample(scale_factor=scale, mode="nearest")

    def folded(self) -> nn.Sequential:
        """The same without the batch norm."""
        conv = fold_conv_bn(self.conv, self.bn)
        return nn.Sequential(
            OrderedDict({n: conv if n == "conv" else m for n, m in self.named_children() if n != "bn"})
        )


class DeformableDecoder(nn.Module, PyTorchModelHubMixin):
    """From the last map of a backbone to one 8 times its size, as detectors by their centres need it.

    Args:
        inputs: channels of the backbone's map.
        widths: outputs of each stage; every stage doubles the size.
        rung, bound, rounded, depthwise: see `DeformStage`.

    Shape: [B, inputs, H, W] -> [B, widths[-1], s H, s W], s = 2^len(widths).
    Raises: InputError for settings that do not fit, or an input of another shape.
    """

    def __init__(
        self,
        inputs: int = 1024,
        widths: Sequence[int] = (512, 256, 128),
        rung: str = "square",
        bound: int = 8,
        rounded: bool = False,
        depthwise: bool = True,
    ) -> None:
        super().__init__()
        self.inputs = inputs
        before = (inputs, *widths)
        self.stages = nn.Sequential(
            *(DeformStage(a, b, depthwise, rung, bound, rounded) for a, b in zip(before, widths, strict=False))
        )

    def forward(self, x: Tensor) -> Tensor:
        if x.dim() != 4 or x.shape[1] != self.inputs or not x.numel():
            raise InputError(f"expected features [B, {self.inputs}, H, W] with something in it, got {tuple(x.shape)}.")
        if not x.is_floating_point():
            raise InputError(f"expected float features, got {x.dtype}; convert with .float().")
        return self.stages(x)

    def round_offsets(self, rounded: bool = True) -> Self:
        """Make all offsets whole, or not; returns the decoder."""
        for module in self.modules():
            if isinstance(module, DeformConv):
                module.rounded = rounded
        return self

    def fuse(self) -> Self:
        """Fold batch norms for inference, in place; returns the decoder in eval mode."""
        return fuse(self)

    @classmethod
    def load_official(cls, state: Mapping[str, Any], bound: int = 8) -> Self:
        """Build the decoder that an official checkpoint (DequanWang/CoDeNet, detectron2) was trained with.

        Args:
            state: keys `decoder.{0,4,8}.conv_offset.*`, `.weight`, `.point_wise.weight` and batch norms at
                `decoder.{1,5,9}.*`, anywhere in the names of a whole detector; or a checkpoint that holds them under
                "model".
            bound: N, which no shape tells. Nor does any tell "free" from "bound" in the full form with a 1x1
                predictor, which is taken as "free".

        Raises: WeightsError when keys are missing or unknown.
        """
        state, mapped = state.get("model", state), {}
        for key, value in state.items():
            found = re.search(r"(?:^|\.)decoder\.(\d+)\.(.+)$", key)
            if found and found[2] != "offset_template":
                stage, part = divmod(int(found[1]), 4)
                inner = "bn." if part == 1 else "" if found[2].startswith("point_wise") else "conv."
                mapped[f"stages.{stage}.{inner}{found[2]}"] = value
        try:
            decoder = cls(**_settings(mapped), bound=bound)
            decoder.load_state_dict({key: torch.as_tensor(value) for key, value in mapped.items()})
        except (ValueError, KeyError, RuntimeError) as error:
            raise WeightsError(
                f"no checkpoint of a deformable decoder (keys begin with {sorted(state)[:3]}): {error}"
            ) from error
        return decoder.eval()


def conformance_example(larger: bool = False) -> tuple[DeformableDecoder, tuple[Tensor]]:
    """A small decoder whose predictors have learned something, and features of an odd size."""
    decoder = DeformableDecoder(12, (8, 6), bound=3)
    for module in decoder.modules():
        if isinstance(module, DeformConv):  # at zero, nothing behind the predictor would learn or be tested
            weight, bias = module.conv_offset.parameters()
            nn.init.normal_(weight, std=0.3)
            nn.init.constant_(bias, 1.0)
    side = 9 if larger else 5
    return decoder, (torch.rand(2, 12, side, side + 2),)


def _settings(mapped: Mapping[str, Tensor]) -> dict[str, Any]:
    """What the shapes of a state dict under our names tell."""
    depthwise = "stages.0.point_wise.weight" in mapped
    count = len({key.split(".")[1] for key in mapped})
    widths = [len(mapped[f"stages.{i}.bn.bias"]) for i in range(count)]
    predictor = mapped.get("stages.0.conv.conv_offset.weight")
    if predictor is None:
        rung = "fixed"
    elif len(predictor) == 1:
        rung = "square"
    else:
        rung = "bound" if predictor.shape[2] == 3 else "free"
    first = mapped["stages.0.point_wise.weight" if depthwise else "stages.0.conv.weight"]
    return {"inputs": first.shape[1], "widths": widths, "rung": rung, "depthwise": depthwise}
