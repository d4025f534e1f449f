"""Decoders in whole numbers: the same pixels on every machine, with any number of threads and any library.

Sums of floats depend on their order, and the order on the machine. Whole numbers below 2^53 add exactly in float64, in
any order, so a network whose weights and activations are whole decodes to the bit everywhere:

    activations  multiples of 2^-12, at most 2^12 in magnitude      x_int = 2^12 x
    weights      multiples of 2^-14                                 w_int = round(2^14 w)
    a layer      x' = floor((w_int * x_int + b_int + 2^13) / 2^14), clamped

Only sums of products, floors and powers of two are used; `WholeUp` makes sure that no sum can leave 2^53.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from foveate.compress.transforms import JpegLike, TwoLayer, Up
from foveate.errors import WeightsError
from foveate.layers.gdn import GDN1

UNIT = 2**12
MOST = 2**24
"""Largest activation, in units."""

_WEIGHT = 2**14
Layer = Callable[[Tensor], Tensor]


def settle(fine: Tensor) -> Tensor:
    """Units of 2^-26 back to units of 2^-12, rounded and clamped."""
    return ((fine + _WEIGHT // 2) / _WEIGHT).floor().clamp(-MOST, MOST)


class WholeUp:
    """An `Up` on whole numbers.

    Shape: as the layer's; units of 2^-12 in, of 2^-26 out.
    Raises: WeightsError when its weights are too large to be exact.
    """

    def __init__(self, layer: Up) -> None:
        self._layer = layer
        self._weight = _whole(layer.weight, _WEIGHT)
        bias = torch.zeros(layer.out_channels) if layer.bias is None else layer.bias
        self._bias = _whole(bias, _WEIGHT * UNIT)
        _check(self._weight.abs().sum((0, 2, 3)), self._bias)

    def __call__(self, x: Tensor) -> Tensor:
        return self._layer.cut(F.conv_transpose2d(x, self._weight, self._bias, self._layer.stride))


class WholeIGDN1:
    """An inverse `GDN1` on whole numbers. Shape: as the layer's; units of 2^-12 in and out."""

    def __init__(self, layer: GDN1) -> None:
        self._gamma = _whole(layer.gamma.abs(), _WEIGHT)[:, :, None, None]
        self._beta = _whole(layer.beta.abs(), _WEIGHT * UNIT)
        _check(self._gamma.sum((1, 2, 3)), self._beta)

    def __call__(self, x: Tensor) -> Tensor:
        norm = settle(F.conv2d(x.abs(), self._gamma, self._beta))
        return ((x * norm + UNIT // 2) / UNIT).floor().clamp(-MOST, MOST)


def whole_sequence(layers: nn.Sequential) -> Layer:
    """Transposed convolutions and ReLU on whole numbers. Units of 2^-12 in and out."""
    parts = [WholeUp(m) if isinstance(m, Up) else None for m in layers]

    def run(x: Tensor) -> Tensor:
        for part in parts:
            x = x.clamp(min=0) if part is None else settle(part(x))
        return x

    return run


def whole_synthesis(network: TwoLayer | JpegLike) -> Layer:
    """A shallow synthesis on whole numbers. Units of 2^-12 in, plain values in float64 out, exact as well."""
    if isinstance(network, JpegLike):
        up = WholeUp(network.up)
        return lambda y: up(y) / (_WEIGHT * UNIT)
    base, skip, out, gdn = (*map(WholeUp, (network.base, network.skip, network.out)), WholeIGDN1(network.gdn))
    return lambda y: out((gdn(settle(base(y))) + settle(skip(y))).clamp(-MOST, MOST)) / (_WEIGHT * UNIT)


def _whole(values: Tensor, unit: int) -> Tensor:
    return (values.detach().double() * unit).round()


def _check(sums: Tensor, bias: Tensor) -> None:
    if not float((sums * MOST + bias.abs()).max()) < 2**52:
        raise WeightsError("a decoder's weights are too large for exact arithmetic; train it anew with smaller ones.")
