"""Folding: what a trained network does in several linear steps, done in one, with equal outputs.

In evaluation a batch norm is y = s x + t with s = gamma / sqrt(var + eps) and t = beta - s mean, fixed per channel. It
goes into the layer beside it:

    after a convolution or linear layer     W' = s W (per output),   b' = s b + t
    before an unpadded one                  W' = W s (per input),    b' = b + W t

and convolutions that run side by side on one input are a single one, whose kernel is their sum, each padded with zeros
to the size of the largest; an identity branch is a kernel with a one in its centre.

A module that can be replaced by its folded form says so by a method `folded()`, which returns that form and leaves the
module as it is. `fuse(network)` walks a network and puts every folded form in place.
"""

from collections.abc import Sequence
from copy import deepcopy
from typing import Any, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from foveate.errors import InputError

Layer = TypeVar("Layer", nn.Linear, nn.Conv2d)


def fuse(module: nn.Module) -> Any:
    """Put the folded form of every part of a network in its place, for inference.

    Parts are changed where they stand; the outermost module that offers `folded()` decides for what it holds.

    Returns: the same module in eval mode, or its folded form where it offers one itself.
    """
    module.eval()
    folded = getattr(module, "folded", None)
    if callable(folded):
        return folded()
    for name, child in list(module._modules.items()):
        if child is not None:
            module._modules[name] = fuse(child)
    return module


def fold_conv_bn(conv: nn.Conv2d, norm: _BatchNorm) -> nn.Conv2d:
    """One convolution for a convolution and the batch norm after it.

    Raises: InputError for a batch norm in training, or one without running statistics.
    """
    return _fold_after(conv, norm)


def fold_linear_bn(linear: nn.Linear, norm: _BatchNorm) -> nn.Linear:
    """One linear layer for a linear layer and the batch norm after it; see `fold_conv_bn`."""
    return _fold_after(linear, norm)


def fold_bn_before(norm: _BatchNorm, layer: Layer) -> Layer:
    """One layer for a batch norm and the linear layer or convolution after it.

    Raises: InputError as `fold_conv_bn`, and for a convolution with padding (whose zeros the norm would not shift) or
        groups.
    """
    scale, shift = _affine(norm)
    if isinstance(layer, nn.Conv2d) and (layer.groups != 1 or _padding(layer) != (0, 0)):
        raise InputError(f"a batch norm folds into an unpadded convolution without groups after it, got {layer}.")
    weight = layer.weight.detach()
    bias = (weight.flatten(2).sum(2) if weight.dim() > 2 else weight) @ shift
    return _with(layer, weight * _along(scale, weight, 1), bias if layer.bias is None else bias + layer.bias)


def merge_convs(convs: Sequence[nn.Conv2d], identity: bool = False) -> nn.Conv2d:
    """One convolution for the sum of several on the same input, and of the input itself with `identity`.

    Args:
        convs: of odd kernels, each padded to keep its input's size at stride 1; strides and groups are all the same.
        identity: add the input; needs stride 1, and as many outputs as inputs.

    Raises: InputError for convolutions that do not fit together.
    """
    first = max(convs, key=lambda conv: conv.kernel_size[0] * conv.kernel_size[1])
    for conv in convs:
        same = (conv.in_channels, conv.out_channels, conv.stride, conv.groups) == (
            first.in_channels, first.out_channels, first.stride, first.groups,
        )  # fmt: skip
        centred = all(k % 2 and 2 * p == k - 1 for k, p in zip(conv.kernel_size, _padding(conv), strict=True))
        fits = all(a <= b for a, b in zip(conv.kernel_size, first.kernel_size, strict=True))
        if not (same and centred and fits and conv.dilation == (1, 1) and conv.padding_mode == "zeros"):
            raise InputError(f"{conv} cannot be merged into {first}; give branches with centred kernels, alike else.")
    weight, bias = torch.zeros_like(first.weight), first.weight.new_zeros(first.out_channels)
    for conv in convs:
        down, across = ((a - b) // 2 for a, b in zip(first.kernel_size, conv.kernel_size, strict=True))
        weight = weight + F.pad(conv.weight.detach(), (across, across, down, down))
        bias = bias if conv.bias is None else bias + conv.bias
    if identity:
        if first.in_channels != first.out_channels or first.stride != (1, 1):
            raise InputError(f"an identity branch needs stride 1 and equal channels, got {first}.")
        channels = torch.arange(first.out_channels, device=weight.device)
        weight[channels, channels % weight.shape[1], first.kernel_size[0] // 2, first.kernel_size[1] // 2] += 1
    return _with(first, weight, bias)


class ConvNorm(nn.Sequential):
    """A convolution without bias, `c`, and a batch norm, `bn`.

    Args:
        inputs, outputs, kernel, stride, groups: of the convolution.
        padding: default keeps the size at stride 1.
        gamma: what the batch norm's weight begins with; 0 on the last layer of a residual branch makes a block begin
            as the identity.

    Shape: [B, inputs, H, W] -> [B, outputs, H', W'].
    """

    c: nn.Conv2d
    bn: nn.BatchNorm2d

    def __init__(
        self,
        inputs: int,
        outputs: int,
        kernel: int = 1,
        stride: int = 1,
        groups: int = 1,
        padding: int | None = None,
        gamma: float = 1.0,
    ) -> None:
        super().__init__()
        padding = kernel // 2 if padding is None else padding
        self.c = nn.Conv2d(inputs, outputs, kernel, stride, padding, groups=groups, bias=False)
        self.bn = nn.BatchNorm2d(outputs)
        nn.init.constant_(self.bn.weight, gamma)

    def folded(self) -> nn.Conv2d:
        """The two as one convolution."""
        return fold_conv_bn(self.c, self.bn)


class NormLinear(nn.Sequential):
    """A batch norm, `bn`, and a linear layer, `l`, the head of LeViT and its kin.

    Shape: [B, inputs] -> [B, outputs].
    """

    bn: nn.BatchNorm1d
    l: nn.Linear

    def __init__(self, inputs: int, outputs: int, std: float = 0.02) -> None:
        super().__init__()
        self.bn = nn.BatchNorm1d(inputs)
        self.l = nn.Linear(inputs, outputs)
        nn.init.trunc_normal_(self.l.weight, std=std)
        nn.init.zeros_(self.l.bias)

    def folded(self) -> nn.Linear:
        """The two as one linear layer."""
        return fold_bn_before(self.bn, self.l)


class DistilledHead(nn.Module):
    """Two heads, one that learned the labels (`labels`) and one that learned a teacher's answers (`teacher`).

    Shape: [B, inputs] -> both answers [B, outputs] in training, their mean in evaluation.
    """

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.labels, self.teacher = NormLinear(inputs, outputs), NormLinear(inputs, outputs)

    def forward(self, x: Tensor) -> Tensor | tuple[Tensor, Tensor]:
        labels, teacher = self.labels(x), self.teacher(x)
        return (labels, teacher) if self.training else (labels + teacher) / 2

    def folded(self) -> nn.Linear:
        """The mean of both as one linear layer."""
        mean, other = self.labels.folded(), self.teacher.folded()
        with torch.no_grad():
            mean.weight.add_(other.weight).div_(2)
            mean.bias.add_(other.bias).div_(2)
        return mean


def _affine(norm: nn.Module) -> tuple[Tensor, Tensor]:
    """s and t of the equations above."""
    if not isinstance(norm, _BatchNorm) or norm.training or norm.running_mean is None or norm.running_var is None:
        raise InputError(f"got {norm} in training={norm.training}; fold batch norms with statistics, after .eval().")
    scale = torch.rsqrt(norm.running_var + norm.eps)
    scale = scale if norm.weight is None else norm.weight.detach() * scale
    shift = -norm.running_mean * scale
    return scale, shift if norm.bias is None else norm.bias.detach() + shift


def _fold_after(layer: Layer, norm: _BatchNorm) -> Layer:
    scale, shift = _affine(norm)
    bias = shift if layer.bias is None else shift + layer.bias * scale
    return _with(layer, layer.weight * _along(scale, layer.weight, 0), bias)


def _along(values: Tensor, weight: Tensor, dim: int) -> Tensor:
    """Values [n] in the shape that broadcasts along a dimension of a weight."""
    return values.view([-1 if d == dim else 1 for d in range(weight.dim())])


def _with(layer: Layer, weight: Tensor, bias: Tensor) -> Layer:
    """A copy of a layer, in eval mode, with another weight and bias."""
    copy, old = deepcopy(layer).eval(), layer.weight
    copy.weight = nn.Parameter(weight.detach().to(old.dtype), old.requires_grad)
    copy.bias = nn.Parameter(bias.detach().to(old.dtype), old.requires_grad)
    return copy


def _padding(conv: nn.Conv2d) -> tuple[int, ...]:
    if conv.padding == "valid":
        return (0, 0)
    if isinstance(conv.padding, str):  # "same"
        return tuple((k - 1) // 2 for k in conv.kernel_size)
    return tuple(conv.padding)
