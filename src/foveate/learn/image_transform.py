"""The transformation network of Johnson, Alahi, Fei-Fei 2016 (arXiv:1603.08155): a picture in, a picture out, one pass.

    9x9 convolution, then 3x3 ones of stride 2 (each halves the map), residual blocks, 3x3 convolutions that each double
    it, 9x9 convolution to RGB.  After every convolution but the last: a norm and, but at a block's end, a ReLU.

Two geometries. The paper's (`valid`) mirrors 8 n pixels around the picture, which its n blocks then shave off, and
doubles by transposed convolutions. The other one, of PyTorch's example, mirrors what each convolution needs and doubles
by repeating pixels first, which leaves no checkerboard; its parameter names are used, so its files load as they are.
With `scale`, nothing is halved and log2(scale) doublings follow: the paper's super-resolution network.

An instance norm looks at the whole picture, so tiles would each be normed differently. `normed_as` measures means and
variances once, on windows of the picture in full resolution, and keeps them: the network is then a plain
convolutional one that reaches `halo` pixels, and tiles fit together without a seam.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from math import log2
from typing import Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from foveate.errors import InputError, WeightsError

LEAST = 5
"""Shortest side that a network can mirror."""


class InstanceNorm(nn.InstanceNorm2d):
    """Norm each channel of each picture by its own statistics, or all by those that were kept.

    Shape: [B, C, H, W] -> the same.
    """

    def __init__(self, channels: int) -> None:
        super().__init__(channels, affine=True)
        self.measuring = False
        self.kept: tuple[Tensor, Tensor] | None = None

    def forward(self, x: Tensor) -> Tensor:
        if self.measuring:
            variance, mean = torch.var_mean(x.float(), (0, 2, 3), correction=0)
            self.kept = mean.to(x.dtype), variance.to(x.dtype)
        if self.kept is None:
            return super().forward(x)
        return F.batch_norm(x, *self.kept, self.weight, self.bias, eps=self.eps)


class Conv(nn.Module):
    """A convolution, `conv2d`, that changes the size of the map by its stride alone.

    Args:
        inputs, outputs, kernel: of the convolution.
        stride: 2 halves the map, 1/2 doubles it.
        valid: the paper's geometry: zeros around the map, transposed convolution to double.

    Shape: [B, inputs, H, W] -> [B, outputs, ceil(H / stride), ceil(W / stride)].
    """

    def __init__(self, inputs: int, outputs: int, kernel: int, stride: float = 1, valid: bool = False) -> None:
        super().__init__()
        self.up, self.margin = stride < 1 and not valid, 0 if valid else kernel // 2
        if stride < 1 and valid:
            self.conv2d: nn.Module = nn.ConvTranspose2d(inputs, outputs, kernel, 2, kernel // 2, output_padding=1)
        else:
            self.conv2d = nn.Conv2d(inputs, outputs, kernel, max(1, int(stride)), kernel // 2 - self.margin)

    def forward(self, x: Tensor) -> Tensor:
        if self.up:
            x = F.interpolate(x, scale_factor=2.0, mode="nearest")
        return self.conv2d(F.pad(x, (self.margin,) * 4, mode="reflect") if self.margin else x)


class Block(nn.Module):
    """x + norm(conv(ReLU(norm(conv(x))))); in the paper's geometry the convolutions shave x by 2 pixels per side.

    Shape: [B, C, H, W] -> the same, or [B, C, H - 4, W - 4].
    """

    def __init__(self, channels: int, norm: type[nn.Module], valid: bool = False) -> None:
        super().__init__()
        self.conv1, self.conv2 = (Conv(channels, channels, 3, valid=valid) for _ in range(2))
        self.in1, self.in2 = norm(channels), norm(channels)
        self.shaved = 2 if valid else 0
        if valid:
            for conv in (self.conv1, self.conv2):
                conv.conv2d = nn.Conv2d(channels, channels, 3)

    def forward(self, x: Tensor) -> Tensor:
        y = self.in2(self.conv2(F.relu(self.in1(self.conv1(x)))))
        s = self.shaved
        return y + (x[..., s:-s, s:-s] if s else x)


class TransformNet(nn.Module):
    """Turn a picture into another one of the same size, or `scale` times as large.

    Args:
        widths: channels of the first convolution and of those that halve the map; (32, 64, 128) in the paper.
        blocks: residual blocks; 5 in the paper, 4 for super-resolution, whose widths are (64,).
        scale: enlargement, a power of two; above 1 only one width is given.
        norm: "instance", or "batch" as in the paper.
        valid: the paper's geometry.
        bound: what the last convolution gives: "tanh" bounds it to 1/2 +- 150/255, as the paper's scaled tanh does;
            "bytes" means values in 0..255, in and out, as PyTorch's example does; "none" means values in 0..1.
        residual: add the picture, and begin near it; the paper trains for longer instead. For "none" only.

    Shape: [B, 3, H, W] in 0..1 -> [B, 3, scale H, scale W], not clipped.
    Raises: InputError for settings that do not fit, or pictures below 5 pixels a side.
    """

    def __init__(
        self,
        widths: Sequence[int] = (32, 64, 128),
        blocks: int = 5,
        scale: int = 1,
        norm: str = "instance",
        valid: bool = False,
        bound: str = "tanh",
        residual: bool = False,
    ) -> None:
        super().__init__()
        doublings = int(log2(scale)) if scale >= 1 else -1
        if not widths or 2**doublings != scale or (scale > 1 and len(widths) > 1):
            raise InputError(f"widths={widths} and scale={scale}: give widths, or one width and a scale of 2, 4 or 8.")
        if norm not in ("instance", "batch") or bound not in ("tanh", "bytes", "none"):
            raise InputError(f"{norm=}, {bound=}: a norm is 'instance' or 'batch', a bound 'tanh', 'bytes' or 'none'.")
        if residual and (bound != "none" or scale > 1):
            raise InputError(f"{residual=} with {bound=} and {scale=}; a picture is added with 'none' and scale 1.")
        self.residual = residual
        make = InstanceNorm if norm == "instance" else nn.BatchNorm2d
        self.scale, self.valid, self.bound, self.halvings, self.blocks = scale, valid, bound, len(widths) - 1, blocks
        ups = [*widths[-2::-1], *[widths[0]] * doublings]
        self.downs, self.ups = len(widths), len(ups)
        before = 3
        for i, width in enumerate(widths, 1):
            self.add_module(f"conv{i}", Conv(before, width, 3 if i > 1 else 9, 2 if i > 1 else 1, valid))
            self.add_module(f"in{i}", make(width))
            before = width
        for i in range(1, blocks + 1):
            self.add_module(f"res{i}", Block(before, make, valid))
        for i, width in enumerate(ups, 1):
            self.add_module(f"deconv{i}", Conv(before, width, 3, 1 / 2, valid))
            self.add_module(f"in{self.downs + i}", make(width))
            before = width
        last = Conv(before, 3, 9, valid=valid)
        self.add_module(f"deconv{self.ups + 1}", last)
        if residual:
            with torch.no_grad():
                for parameter in last.parameters():
                    parameter.mul_(0.1)

    @property
    def multiple(self) -> int:
        """What the corners of tiles are multiples of, so that strided convolutions meet the same pixels."""
        return 2**self.halvings

    @property
    def halo(self) -> int:
        """How far an output pixel sees, in input pixels, rounded up to what tiles need."""
        d = self.halvings
        reach = 8 + 2 * (2**d - 1) + 2 * self.blocks * 2**d + 2**d
        return -(-reach // self.multiple) * self.multiple

    def forward(self, x: Tensor) -> Tensor:
        if x.dim() != 4 or x.shape[1] != 3 or min(x.shape[2:]) < LEAST:
            raise InputError(f"expected pictures [B, 3, H, W] of at least {LEAST} x {LEAST}, got {tuple(x.shape)}.")
        height, width = (self.scale * n for n in x.shape[2:])
        y = 255 * x if self.bound == "bytes" else x
        if self.valid:
            margin = 2 * self.blocks * self.multiple
            if margin >= min(x.shape[2:]):
                raise InputError(f"pictures of {tuple(x.shape[2:])} cannot be mirrored by {margin}; give larger ones.")
            y = F.pad(y, (margin,) * 4, mode="reflect")
        for i in range(1, self.downs + 1):
            y = self._step(f"conv{i}", i, y)
        for i in range(1, self.blocks + 1):
            y = self.get_submodule(f"res{i}")(y)
        for i in range(1, self.ups + 1):
            y = self._step(f"deconv{i}", self.downs + i, y)
        y = self.get_submodule(f"deconv{self.ups + 1}")(y)[..., :height, :width]
        if self.bound == "tanh":
            return 0.5 + 150 / 255 * torch.tanh(y)
        return y / 255 if self.bound == "bytes" else x + y if self.residual else y

    def _step(self, name: str, norm: int, x: Tensor) -> Tensor:
        return F.relu(self.get_submodule(f"in{norm}")(self.get_submodule(name)(x)))

    @contextmanager
    def normed_as(self, windows: Tensor) -> Iterator[Self]:
        """Norm everything that follows by the statistics of these windows together.

        Shape: windows [B, 3, h, w], all of one picture.
        """
        norms = [module for module in self.modules() if isinstance(module, InstanceNorm)]
        try:
            for one in norms:
                one.measuring = True
            self(windows)
            for one in norms:
                one.measuring = False
            yield self
        finally:
            for one in norms:
                one.measuring, one.kept = False, None

    @classmethod
    def load_official(cls, state: Mapping[str, Tensor]) -> Self:
        """Build the network of a checkpoint of PyTorch's `fast_neural_style` example.

        Raises: WeightsError for other weights.
        """
        kept = {
            k: v for k, v in state.items() if not k.endswith(("running_mean", "running_var", "num_batches_tracked"))
        }
        try:
            count = 1 + max(int(k[4:].split(".")[0]) for k in kept if k.startswith("conv"))
            widths = [kept[f"conv{i}.conv2d.weight"].shape[0] for i in range(1, count)]
            blocks = len({k.split(".")[0] for k in kept if k.startswith("res")})
            network = cls(widths, blocks, bound="bytes")
            network.load_state_dict(kept)
        except (LookupError, RuntimeError, ValueError) as error:
            raise WeightsError(f"no style network (keys begin with {sorted(state)[:3]}): {error}.") from error
        return network.eval()
