"""RepLKNet: a few depth-wise convolutions as large as 31 x 31 see far, where a stack of small ones hardly does.

Ding, Zhang, Zhou, Han, Ding, Sun 2022, "Scaling Up Your Kernels to 31x31: Revisiting Large Kernel Design in CNNs",
arXiv:2203.06717.

What a stack of small kernels is really moved by grows with the square root of its depth; one large kernel sees all of
its window at once. With N for BatchNorm, DW for a depth-wise convolution and PW for a 1 x 1 one, a stage repeats

    RepLK     x <- x + N(PW( relu( N(DW_KxK(z)) + N(DW_sxs(z)) ) )),   z = relu(N(PW(N(x))))   C -> r C -> C
    ConvFFN   x <- x + N(PW( gelu( N(PW(N(x))) ) ))                                            C -> 4 C -> C

A large kernel alone is hard to train, so a small one learns beside it. After training all of it folds: norms go into
the convolutions beside them, and the small kernel into the centre of the large one,

    w = g w / sqrt(v + eps),   b = beta - g m / sqrt(v + eps),      W = W_large + pad(W_small),   B = B_large + B_small.

The large kernels are a sixth of the multiplications; what they take on the clock is up to how they are computed, see
`foveate.ops.large_depthwise`.
"""

import re
from collections.abc import Mapping, Sequence
from typing import Any, Self

import torch
from torch import Tensor, nn

from foveate.errors import InputError, WeightsError
from foveate.layers.classifier import ImageClassifier
from foveate.layers.fold import ConvNorm, fold_bn_before, fuse, merge_convs
from foveate.layers.residual import Residual
from foveate.ops.large_depthwise import large_depthwise

_BASE: dict[str, Any] = {"depths": (2, 2, 18, 2), "kernels": (31, 29, 27, 13), "small": 5, "ratio": 1.0}

SIZES: dict[str, dict[str, Any]] = {
    "31b": _BASE | {"widths": (128, 256, 512, 1024)},
    "31l": _BASE | {"widths": (192, 384, 768, 1536)},
    "xl": _BASE | {"widths": (256, 512, 1024, 2048), "kernels": (27, 27, 27, 13), "small": 0, "ratio": 1.5},
}
"""Published sizes: 83.5% on ImageNet at 224 px, and, pre-trained on more, 86.6% at 384 px and 87.8% at 320 px. The last
was trained on pictures of mean 0.5 and deviation 0.5."""

_OFFICIAL_NAMES = {
    r"^module\.": "",
    r"\.prelkb_bn\.|\.preffn_bn\.": ".m.0.",
    r"\.pw1\.": ".m.1.",
    r"\.large_kernel\.lkb_origin\.": ".m.3.large.",
    r"\.large_kernel\.small_conv\.": ".m.3.small.",
    r"\.large_kernel\.lkb_reparam\.": ".m.3.",
    r"\.conv\.": ".c.",
}
"""The official names as ours, but for the numbers that activations shift: see `_renamed`."""


class LargeDepthwise(nn.Conv2d):
    """A depth-wise convolution of stride 1 that keeps the size, by the fastest way there is for its kernel.

    Shape: [B, dim, H, W] -> the same.
    Raises: InputError for an even kernel.
    """

    def __init__(self, dim: int, kernel: int, bias: bool = False) -> None:
        if kernel < 1 or kernel % 2 == 0:
            raise InputError(f"a kernel needs a centre, so its side must be odd; got {kernel}.")
        super().__init__(dim, dim, kernel, padding=kernel // 2, groups=dim, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        return large_depthwise(x, self.weight, self.bias)


class RepLargeKernel(nn.Module):
    """A large and a small depth-wise kernel on the same input, each with its norm, to be merged after training.

    Args:
        dim: C.
        kernel, small: sides K and s, odd; s = 0 leaves the small one out.

    Shape: [B, C, H, W] -> the same.
    Raises: InputError for even kernels, or a small one that is the larger.
    """

    def __init__(self, dim: int, kernel: int, small: int = 5) -> None:
        super().__init__()
        if small > kernel:
            raise InputError(f"the small kernel must fit into the large one; got {small} and {kernel}.")
        self.large = ConvNorm(dim, dim, kernel, groups=dim)
        self.large.c = LargeDepthwise(dim, kernel)
        if small and small % 2 == 0:
            raise InputError(f"only an odd kernel has the centre of an odd one; got a small kernel of {small}.")
        self.small = ConvNorm(dim, dim, small, groups=dim) if small else None

    def forward(self, x: Tensor) -> Tensor:
        y = self.large(x)
        return y if self.small is None else y + self.small(x)

    def folded(self) -> nn.Conv2d:
        """Both as one convolution. Raises: InputError in training."""
        branches = (self.large, self.small)
        return merge_convs([branch.folded() for branch in branches if branch is not None])


class PreNorm(nn.Sequential):
    """A batch norm, a 1 x 1 convolution with its own, and more; the first norm folds into the convolution, too."""

    def folded(self) -> nn.Sequential:
        """The same without norms."""
        norm, first, *rest = self
        return nn.Sequential(fold_bn_before(norm, fuse(first)), *map(fuse, rest))  # type: ignore[arg-type]


def replk(dim: int, kernel: int, small: int, ratio: float) -> PreNorm:
    """The first branch above, without its residual."""
    inner = int(dim * ratio)
    look = RepLargeKernel(inner, kernel, small)
    return PreNorm(nn.BatchNorm2d(dim), ConvNorm(dim, inner), nn.ReLU(), look, nn.ReLU(), ConvNorm(inner, dim))


def conv_ffn(dim: int, ratio: int = 4) -> PreNorm:
    """The second."""
    return PreNorm(nn.BatchNorm2d(dim), ConvNorm(dim, ratio * dim), nn.GELU(), ConvNorm(ratio * dim, dim))


class RepLKNet(ImageClassifier):
    """Classify pictures, or give maps at four scales.

    Args:
        size: "31b", "31l" or "xl", which `widths`, `depths` (pairs of blocks), `kernels`, `small` (0: no small kernel)
            and `ratio` (r) override.
        num_classes, in_chans: see `ImageClassifier`.
        drop_path: share of residual branches left out in training, rising linearly to this. The authors take 0.5 for
            "31b" on ImageNet; on little data less.

    Shape: [B, in_chans, H, W] -> [B, num_classes], for any H and W; features at 1/32 of the size.
    Raises: InputError for settings or pictures that do not fit.

    >>> net = RepLKNet(widths=(8, 8), depths=(1, 1), kernels=(13, 7), num_classes=10).eval()
    >>> net(torch.zeros(1, 3, 32, 32)).shape, net.forward_features(torch.zeros(1, 3, 32, 32)).shape
    (torch.Size([1, 10]), torch.Size([1, 8, 4, 4]))
    """

    def __init__(
        self,
        size: str = "31b",
        num_classes: int = 1000,
        in_chans: int = 3,
        widths: Sequence[int] | None = None,
        depths: Sequence[int] | None = None,
        kernels: Sequence[int] | None = None,
        small: int | None = None,
        ratio: float | None = None,
        drop_path: float = 0.0,
    ) -> None:
        if size not in SIZES:
            raise InputError(f"unknown size {size!r}; use one of {', '.join(map(repr, SIZES))}, or give the widths.")
        given = {"widths": widths, "depths": depths, "kernels": kernels, "small": small, "ratio": ratio}
        own = SIZES[size] | {name: value for name, value in given.items() if value is not None}
        dims, layers, sides = own["widths"], own["depths"], own["kernels"]
        if not len(dims) == len(layers) == len(sides) or min([*dims, *layers], default=0) < 1:
            raise InputError(
                f"widths, depths and kernels must be positive, and as many; got {dims}, {layers}, {sides}."
            )
        super().__init__(dims[-1], in_chans)
        first = dims[0]
        self.stem = nn.Sequential(
            ConvNorm(in_chans, first, 3, 2),
            nn.ReLU(),
            ConvNorm(first, first, 3, groups=first),
            nn.ReLU(),
            ConvNorm(first, first),
            nn.ReLU(),
            ConvNorm(first, first, 3, 2, groups=first),
            nn.ReLU(),
        )
        pairs = sum(layers)
        rates = (drop_path * i / max(1, pairs - 1) for i in range(pairs))
        self.stages, self.transitions = nn.ModuleList(), nn.ModuleList()
        for i, (dim, depth, side) in enumerate(zip(dims, layers, sides, strict=True)):
            if i:
                shrink = ConvNorm(dim, dim, 3, 2, groups=dim)
                self.transitions.append(nn.Sequential(ConvNorm(dims[i - 1], dim), nn.ReLU(), shrink, nn.ReLU()))
            blocks = []
            for _ in range(depth):
                rate = next(rates)
                blocks += [Residual(replk(dim, side, own["small"], own["ratio"]), rate), Residual(conv_ffn(dim), rate)]
            self.stages.append(nn.Sequential(*blocks))
        self.norm = nn.BatchNorm2d(dims[-1])
        self.reset_classifier(num_classes)

    def forward_intermediates(self, x: Tensor) -> list[Tensor]:
        """The map of every stage, for dense tasks. Shape: [B, C_i, H / 2^(i + 2), W / 2^(i + 2)] of stage i."""
        self.check(x)
        x, maps = self.stem(x), []
        for i, stage in enumerate(self.stages):
            x = stage(self.transitions[i - 1](x) if i else x)
            maps.append(x)
        return maps

    def forward_features(self, x: Tensor) -> Tensor:
        """The last map, after its norm."""
        return self.norm(self.forward_intermediates(x)[-1])

    def fuse(self) -> Self:
        """Merge kernels and fold batch norms for inference, in place; returns the network in eval mode."""
        return fuse(self)

    @classmethod
    def load_official(cls, state: Mapping[str, Any]) -> Self:
        """Build the network of an official checkpoint (DingXiaoH/RepLKNet-pytorch), merged or not.

        Args:
            state: the checkpoint, or what it has under "model" or "state_dict".

        Raises: WeightsError when keys are missing or unknown.
        """
        given = state.get("model", state.get("state_dict", state))
        try:
            mapped = {_renamed(key): value for key, value in given.items()}
            network = cls(**_settings(mapped)).eval()
            if "stages.0.0.m.3.weight" in mapped:
                for module in network.modules():
                    if isinstance(module, PreNorm) and isinstance(module[3], RepLargeKernel):
                        module[3] = module[3].folded()
            network.load_state_dict(mapped)
        except (LookupError, RuntimeError, ValueError) as error:
            raise WeightsError(f"no checkpoint of RepLKNet (keys begin with {sorted(given)[:3]}): {error}.") from error
        return network

    @classmethod
    def conformance_example(cls, larger: bool = False) -> tuple["RepLKNet", tuple[Tensor]]:
        """A small network with a kernel larger than its map, and noise of an odd size."""
        net = cls(num_classes=5, widths=(8, 16), depths=(1, 1), kernels=(13, 15))
        return net, (torch.rand(3, 3, *((61, 50) if larger else (45, 38))),)


def _renamed(key: str) -> str:
    for old, new in _OFFICIAL_NAMES.items():
        key = re.sub(old, new, key)
    # Official blocks keep activations apart; ours stand in the sequence, and shift the number of what follows.
    key = re.sub(r"^(stem|transitions\.\d+)\.(\d+)\.", lambda m: f"{m[1]}.{2 * int(m[2])}.", key)
    block = re.match(r"^stages\.(\d+)\.blocks\.(\d+)\.", key)
    if block:
        place = 3 if int(block[2]) % 2 else 5
        key = f"stages.{block[1]}.{block[2]}." + key[block.end() :].replace("pw2.", f"m.{place}.", 1)
    return key


def _settings(mapped: Mapping[str, Tensor]) -> dict[str, Any]:
    """What the shapes of a state dict under our names tell."""
    stages = sorted({int(key.split(".")[1]) for key in mapped if key.startswith("stages.")})
    firsts = [f"stages.{i}.0.m" for i in stages]
    widths = [len(mapped[f"{first}.0.weight"]) for first in firsts]
    kernels = [mapped.get(f"{first}.3.large.c.weight", mapped.get(f"{first}.3.weight")) for first in firsts]
    small, head = mapped.get(f"{firsts[0]}.3.small.c.weight"), mapped.get("head.bias")
    return {
        "num_classes": 0 if head is None else len(head),
        "in_chans": mapped["stem.0.c.weight"].shape[1],
        "widths": widths,
        "depths": [len({k.split(".")[2] for k in mapped if k.startswith(f"stages.{i}.")}) // 2 for i in stages],
        "kernels": [0 if kernel is None else kernel.shape[2] for kernel in kernels],
        "small": 0 if small is None else small.shape[2],
        "ratio": mapped[f"{firsts[0]}.1.c.weight"].shape[0] / widths[0],
    }
