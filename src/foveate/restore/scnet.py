"""SCNet: super-resolution by 1x1 convolutions, with a free shift in place of 3x3 kernels.

Wu, Jiang, Bai, Liu, Meng 2023, "Fully 1x1 Convolutional Network for Lightweight Image Super-Resolution",
arXiv:2307.16140.

A 3x3 convolution mixes channels and gathers neighbours. Here 1x1 convolutions mix channels, and one eighth of the
channels moves one pixel in each of eight directions, so that the next 1x1 convolution sees eight neighbours:

    SC-ResBlock(x) = x + r * W2(ReLU(Shift8(W1 x))),      W1, W2 in R^(C x C),

2*C*C multiply-accumulates per pixel, a ninth of the 3x3 block's. The picture is enlarged by a shift-MLP unit per
factor of two (or three), and the result is added to the bilinearly enlarged input.
"""

from collections.abc import Mapping

import torch.nn.functional as F
from torch import Tensor, nn

from foveate.errors import InputError, WeightsError
from foveate.layers.residual import add_, relu_
from foveate.layers.shift import SpatialShift
from foveate.layers.upscaler import Upscaler, enlarge


class SCResBlock(nn.Module):
    """x + res_scale * conv1x1(ReLU(Shift8(conv1x1(x)))). Shape: [B, C, H, W] -> the same; C divisible by 8."""

    def __init__(self, channels: int, res_scale: float = 1.0) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels, channels, 1)
        self.conv2 = nn.Conv2d(channels, channels, 1)
        self.shift, self.res_scale = SpatialShift(), res_scale

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv2(relu_(self.shift(self.conv1(x))))
        return add_(y if self.res_scale == 1 else y * self.res_scale, x)


class UpShift(nn.Module):
    """Enlarge features by a factor: 1x1 convolutions around a shift.

    Args:
        channels: C.
        scale: factor r.
        kind: "mlp" interpolates first and works at the enlarged size; "ps" works at the small size and shuffles
            (better in the paper's ablation, and cheaper).
    """

    def __init__(self, channels: int, scale: int, kind: str) -> None:
        super().__init__()
        middle = [nn.Conv2d(channels, channels, 1), nn.LeakyReLU(0.02), SpatialShift()]
        self.up_layer = (
            nn.Sequential(
                nn.Upsample(scale_factor=scale, mode="bilinear", align_corners=False),
                *middle,
                nn.Conv2d(channels, channels, 1),
            )
            if kind == "mlp"
            else nn.Sequential(*middle, nn.Conv2d(channels, channels * scale**2, 1), nn.PixelShuffle(scale))
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.up_layer(x)


class SCNet(Upscaler):
    """The network: SRResNet's outline with shifts. State-dict keys are the official ones.

    Args:
        scale: 2, 3, 4 or 8.
        channels: C, divisible by 8; 64 in SCNet-T.
        blocks: number of SC-ResBlocks; 16 in SCNet-T.
        upsampling: "mlp" (the published default) or "ps".
        shift: False leaves the shift out (the paper's ablation: a per-pixel map that cannot learn to enlarge).

    Shape: [B, 3, h, w] in 0..1 -> [B, 3, s*h, s*w].
    Raises: InputError for other scales, channels or kinds.
    """

    slug = "scnet"
    cheaper = "espcn"

    def __init__(
        self, scale: int = 4, channels: int = 64, blocks: int = 16, upsampling: str = "mlp", shift: bool = True
    ) -> None:
        super().__init__()
        steps = {2: [2], 3: [3], 4: [2, 2], 8: [2, 2, 2]}.get(scale)
        if steps is None:
            raise InputError(f"SCNet enlarges by 2, 3, 4 or 8, got {scale!r}.")
        if channels % 8:
            raise InputError(f"SCNet shifts channels in 8 groups: channels must be divisible by 8, got {channels}.")
        if upsampling not in ("mlp", "ps"):
            raise InputError(f"unknown upsampling {upsampling!r}; use 'mlp' or 'ps'.")
        self.scale, self.halo = scale, blocks + 5
        self.conv_first = nn.Conv2d(3, channels, 1)
        self.body = nn.Sequential(*(SCResBlock(channels) for _ in range(blocks)))
        self.steps = [f"upconv{i + 1}" for i in range(len(steps))]
        for name, step in zip(self.steps, steps, strict=True):
            self.add_module(name, UpShift(channels, step, upsampling))
        self.conv_hr = nn.Conv2d(channels, channels, 1)
        self.conv_last = nn.Conv2d(channels, 3, 1)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight)
                module.weight.data *= 0.1  # part of the method: without it training stays below bicubic for long
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
        if not shift:
            for parent in list(self.modules()):
                for name, child in list(parent.named_children()):
                    if isinstance(child, SpatialShift):
                        setattr(parent, name, nn.Identity())

    def forward(self, x: Tensor) -> Tensor:
        f = self.body(F.leaky_relu(self.conv_first(x), 0.1))
        for name in self.steps:
            f = F.leaky_relu(self.get_submodule(name)(f), 0.1)
        return self.conv_last(F.leaky_relu(self.conv_hr(f), 0.1)) + enlarge(x, self.scale)

    @classmethod
    def load_official(cls, state: Mapping[str, Tensor], scale: int = 4) -> "SCNet":
        """Build the network of an official checkpoint (Aitical/SCNet), a state dict or one wrapped in {"params": ...}.

        Raises: WeightsError when the keys do not fit.
        """
        state = state.get("params", state)  # type: ignore[assignment]
        if "conv_first.weight" not in state:
            raise WeightsError(f"no SCNet: the keys begin with {sorted(state)[:3]}; expected conv_first.weight.")
        numbers = [int(key.split(".")[1]) for key in state if key.startswith("body.")]
        if not numbers:
            raise WeightsError("no SCNet: the state dict has no blocks; expected keys body.0.conv1.weight and so on.")
        blocks = 1 + max(numbers)
        upsampling = "ps" if "upconv1.up_layer.0.weight" in state else "mlp"
        model = cls(scale, state["conv_first.weight"].shape[0], blocks, upsampling)
        try:
            model.load_state_dict(state)
        except RuntimeError as error:
            raise WeightsError(f"the checkpoint does not fit SCNet x{scale}: {error}") from error
        return model.eval()
