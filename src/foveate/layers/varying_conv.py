"""TVConv: where every picture has the same layout, every place has its own kernel.

Chen, He, Zhuo, Ma, Ha, Chan 2022, "TVConv: Efficient Translation Variant Convolution for Layout-aware Visual
Processing", arXiv:2203.10489.

In aligned faces, forms or the view of a fixed camera the place already tells what is there. A depth-wise convolution
spends one kernel on all places; TVConv has one for each, the same for all pictures,

    y[c, p] = sum_t W[c, t, p] x[c, p * stride + t],

at the same multiply-accumulates. W would be learned badly as it stands, so a small network makes it from a few learned
affinity maps A, which begin as ones:

    W = Conv3x3(F(... F(A))),    F = ReLU(LayerNorm_{C,h,w}(Conv3x3(.)))            A [1, 4, h, w] -> W [1, C * 9, h, w]

W depends on no picture. `folded()` makes it once and keeps only it, so that inference costs what a depth-wise
convolution costs, plus reading h * w times its weights. A layer is for one size of map, and refuses others.
`replace_depthwise` puts such layers in the place of a network's depth-wise convolutions.
"""

from typing import Any, TypeGuard

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from foveate.engine.surgery import Handle, find, replace
from foveate.errors import InputError
from foveate.ops.gathered import gathered


class TVConv(nn.Module):
    """A depth-wise convolution with a kernel for every place.

    Args:
        channels: C, of input and output.
        size: (h, w) of the output map, for which the kernels are made.
        kernel_size: side of the kernels, odd.
        stride: 1 keeps the size, 2 halves it (rounded up).
        maps: affinity maps.
        hidden, layers: width of the network that makes the kernels, and how many F it has after the first.
        bias: make a bias for every place as well, by a network of its own.

    Shape: [B, C, H, W] -> [B, C, h, w], h = ceil(H / stride).
    Raises: InputError for an even kernel, or a map of another size.
    """

    def __init__(
        self,
        channels: int,
        size: tuple[int, int],
        kernel_size: int = 3,
        stride: int = 1,
        maps: int = 4,
        hidden: int = 16,
        layers: int = 1,
        bias: bool = False,
    ) -> None:
        super().__init__()
        if kernel_size % 2 == 0:
            raise InputError(f"a kernel has a centre, so kernel_size must be odd, got {kernel_size}.")
        self.channels, self.size, self.kernel_size, self.stride = channels, tuple(size), kernel_size, stride
        self.maps = nn.Parameter(torch.ones(1, maps, *size))
        self.generator = _generator(maps, hidden, layers, channels * kernel_size**2, size)
        self.shift = _generator(maps, hidden, layers, channels, size) if bias else None

    def weight(self) -> Tensor:
        """W. Shape: -> [1, C, kernel_size ** 2, h, w]."""
        return self.generator(self.maps).unflatten(1, (self.channels, -1))

    def forward(self, x: Tensor) -> Tensor:
        bias = None if self.shift is None else self.shift(self.maps)
        return _varying(x, self.weight(), bias, self.kernel_size, self.stride)

    def folded(self) -> "FrozenTVConv":
        """The same with its kernels made, for inference; the network that makes them is left behind."""
        with torch.no_grad():
            bias = None if self.shift is None else self.shift(self.maps)
            return FrozenTVConv(self.weight(), bias, self.kernel_size, self.stride)


class FrozenTVConv(nn.Module):
    """A TVConv whose kernels are fixed.

    Args:
        weight: W [1, C, T, h, w].
        bias: [1, C, h, w], [1, C, 1, 1] or None.
        kernel_size, stride: as in `TVConv`.

    Shape: [B, C, H, W] -> [B, C, h, w].
    Raises: InputError for a map of another size.
    """

    weight: Tensor
    bias: Tensor | None

    def __init__(self, weight: Tensor, bias: Tensor | None, kernel_size: int, stride: int) -> None:
        super().__init__()
        self.kernel_size, self.stride = kernel_size, stride
        self.register_buffer("weight", weight.detach().contiguous())
        self.register_buffer("bias", None if bias is None else bias.detach())

    def forward(self, x: Tensor) -> Tensor:
        return _varying(x, self.weight, self.bias, self.kernel_size, self.stride)

    def resized(self, size: tuple[int, int]) -> "FrozenTVConv":
        """Kernels for maps of another size, interpolated bilinearly: a guess that no training has seen."""
        weight = F.interpolate(self.weight.flatten(1, 2), size, mode="bilinear").unflatten(1, self.weight.shape[1:3])
        bias = self.bias
        if bias is not None and bias.shape[2:] != (1, 1):
            bias = F.interpolate(bias, size, mode="bilinear")
        return FrozenTVConv(weight, bias, self.kernel_size, self.stride)


class TVConvNorm(nn.Sequential):
    """A TVConv, `c`, and a batch norm, `bn`."""

    c: TVConv
    bn: nn.BatchNorm2d

    def __init__(self, channels: int, size: tuple[int, int], **settings: Any) -> None:
        super().__init__()
        self.c = TVConv(channels, size, **settings)
        self.bn = nn.BatchNorm2d(channels)

    def folded(self) -> FrozenTVConv:
        """The two as one convolution with fixed kernels and a bias."""
        frozen, norm = self.c.folded(), self.bn
        if norm.training or norm.running_mean is None or norm.running_var is None:
            raise InputError("fold a batch norm with statistics, after .eval().")
        scale = (norm.weight * torch.rsqrt(norm.running_var + norm.eps)).detach()[:, None, None]
        shift = norm.bias.detach()[:, None, None] - norm.running_mean[:, None, None] * scale
        bias = shift[None] if frozen.bias is None else frozen.bias * scale + shift
        return FrozenTVConv(frozen.weight * scale[:, None], bias, self.c.kernel_size, self.c.stride)


def replace_depthwise(model: nn.Module, example: Tensor, **settings: Any) -> Handle:
    """Put fresh TVConvs in the place of a network's depth-wise convolutions.

    Args:
        model: changed in place. Replaced are square, odd, bias-free kernels that keep their channels and whose padding
            keeps the size.
        example: an input, run once to learn the sizes of the maps.
        settings: of every `TVConv`: maps, hidden, layers.

    Returns: the handle that undoes it. `foveate.layers.fold.fuse(model)` makes the kernels when training is done.
    Raises: InputError when there is nothing to replace.
    """
    found = {name: module for name, module in find(model, nn.Conv2d).items() if _depthwise(module)}
    if not found:
        raise InputError(f"{type(model).__name__} has no depth-wise convolution that a TVConv can stand for.")
    sizes: dict[nn.Module, tuple[int, int]] = {}
    hooks = [
        module.register_forward_hook(lambda m, _, y: sizes.__setitem__(m, (y.shape[2], y.shape[3])))
        for module in found.values()
    ]
    training = {module: module.training for module in model.modules()}
    try:
        with torch.no_grad():
            model.eval()(example)
    finally:
        for hook in hooks:
            hook.remove()
        for module, mode in training.items():
            module.training = mode
    new: dict[str, nn.Module] = {}
    for name, module in found.items():
        if module in sizes:
            conv = TVConv(module.in_channels, sizes[module], module.kernel_size[0], module.stride[0], **settings)
            new[name] = conv.to(module.weight)
    return replace(model, new)


def _varying(x: Tensor, weight: Tensor, bias: Tensor | None, kernel_size: int, stride: int) -> Tensor:
    size = tuple(-(-n // stride) for n in x.shape[2:])
    if size != weight.shape[3:] or x.shape[1] != weight.shape[1]:
        wanted = f"[B, {weight.shape[1]}, H, W] with {weight.shape[3]} x {weight.shape[4]} places at stride {stride}"
        raise InputError(f"this TVConv has kernels for maps {wanted}, got {tuple(x.shape)}; see FrozenTVConv.resized.")
    y = gathered(x, weight, kernel_size=kernel_size, stride=stride)
    return y if bias is None else y + bias


def _generator(maps: int, hidden: int, layers: int, outputs: int, size: tuple[int, int]) -> nn.Sequential:
    steps: list[nn.Module] = [
        nn.Sequential(
            nn.Conv2d(hidden if i else maps, hidden, 3, padding=1, bias=False),
            nn.LayerNorm([hidden, *size]),
            nn.ReLU(),
        )
        for i in range(1 + layers)
    ]
    return nn.Sequential(*steps, nn.Conv2d(hidden, outputs, 3, padding=1, bias=False))


def _depthwise(module: nn.Module) -> TypeGuard[nn.Conv2d]:
    if not isinstance(module, nn.Conv2d) or not module.in_channels == module.out_channels == module.groups > 1:
        return False
    side, other = module.kernel_size
    return (
        side == other
        and side % 2 == 1
        and module.padding == (side // 2, side // 2)
        and module.stride[0] == module.stride[1]
        and module.dilation == (1, 1)
        and module.bias is None
        and module.padding_mode == "zeros"
    )
