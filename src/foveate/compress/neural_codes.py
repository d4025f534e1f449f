"""Weights of a neural image as whole numbers.

Every row w of a weight (its last dimension) has a step s, and w is stored as round(w / s). Matrices between layers have
b bits, 4 by default; all else, first and last layers above all, has 8:

    top = 2^(b-1) - 1        s = max |w| / top, made larger to the next (8 + m) 2^e, m in 0..7        codes -top .. top

so that a step is a number of one byte, and code times step is exact in any floating point. In training, what is
computed with is s round(w / s) and gradients pass straight through.
"""

import math
from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from foveate.errors import InputError
from foveate.layers.implicit import NeuralImage

_BIAS = 19
_LEAST = 2.0 ** (-1 - _BIAS)
STEPS = 256
"""Steps that are possible: 2^-20 to 3840, eight to an octave."""


class Codes(NamedTuple):
    """A weight as whole numbers: codes [..., n] and the numbers of their steps [...], both int64."""

    values: Tensor
    steps: Tensor

    def weights(self) -> Tensor:
        """What the codes stand for."""
        return self.values * step(self.steps)[..., None]


def step(numbers: Tensor) -> Tensor:
    """Steps by their numbers 0..255.

    >>> step(torch.tensor([0, 1, 160])).tolist()
    [9.5367431640625e-07, 1.0728836059570312e-06, 1.0]
    """
    return torch.ldexp((8 + numbers % 8).float(), numbers // 8 - _BIAS - 4)


def step_number(values: Tensor) -> Tensor:
    """Numbers of the smallest steps that are not below values."""
    mantissa, exponent = torch.frexp(values.clamp_min(_LEAST))
    return (8 * (exponent.long() + _BIAS) + (16 * mantissa).ceil().long() - 8).clamp(0, STEPS - 1)


def encode(weight: Tensor, bits: int) -> Codes:
    """Round to the nearest codes.

    Raises: InputError unless there are 2 to 8 bits.
    """
    if not 2 <= bits <= 8:
        raise InputError(f"weights are stored in 2 to 8 bits, got {bits}.")
    top = 2 ** (bits - 1) - 1
    numbers = step_number(weight.detach().abs().amax(-1) / top)
    return Codes((weight.detach() / step(numbers)[..., None]).round().clamp(-top, top).long(), numbers)


def through(weight: Tensor, bits: int) -> Tensor:
    """The rounded weight, as `encode` rounds it; gradients pass as if it were not."""
    top = 2 ** (bits - 1) - 1
    with torch.no_grad():
        mantissa, exponent = torch.frexp((weight.abs().amax(-1, keepdim=True) / top).clamp_min(_LEAST))
        size = torch.ldexp((16 * mantissa).ceil_(), exponent - 4)
        away = (weight / size).round_().clamp_(-top, top).mul_(size).sub_(weight)
    return weight + away


def stored(net: NeuralImage) -> dict[str, Tensor]:
    """The weights that a file holds, by name."""
    return dict(net.named_parameters())


def bits_of(name: str, bits: int) -> int:
    """Bits of the codes of a weight, where matrices between layers have `bits`."""
    return bits if name == "hidden" else 8


def owners(net: NeuralImage) -> dict[str, Tensor]:
    """For every number that a file holds, the first level that uses it. Shape: as the weights, int64."""
    levels, (width, depth) = net.levels, net.levels[-1]
    channel = torch.arange(width)
    of_channel = torch.stack([torch.full_like(channel, len(levels))] * (depth + 1))
    for level in reversed(range(len(levels))):
        n, d = levels[level]
        of_channel[: d + 1, :n] = level
    of_row = of_channel[1:]
    found: dict[str, Tensor] = {
        "frequencies": of_channel[:1, :, None].expand(-1, -1, 2),
        "phases": of_channel[:1],
        "hidden": torch.maximum(of_row[:, :, None], of_row[:, None]),
        "biases": of_row,
    }
    for level in range(len(levels)):
        found[f"heads.{level}"] = torch.full(net.heads[level].shape, level)
        found[f"offsets.{level}"] = torch.full(net.offsets[level].shape, level)
    return {name: found[name] for name in stored(net)}


def put(net: NeuralImage, codes: Mapping[str, Codes]) -> None:
    """Give a network the weights of codes."""
    with torch.no_grad():
        for name, weight in stored(net).items():
            weight.copy_(codes[name].weights())


def rate(net: NeuralImage, bits: int, entropy: bool = False) -> float:
    """Bits of all levels without entropy coding: codes in their bits, steps in 8; or about so many with it."""
    total = _LEARNED if entropy else 0.0
    for name, weight in stored(net).items():
        spared = _SPARED if entropy and name == "hidden" else 0.0
        total += (bits_of(name, bits) - spared) * weight.numel() + 8 * weight[..., 0].numel()
    return total


_SPARED, _LEARNED = 0.6, 600.0
"""Bits that entropy coding saves of a weight between layers, and that learning the tables costs."""


@torch.no_grad()
def thin(net: NeuralImage, bits: int, share: float = 0.02) -> bool:
    """Set the least of the weights between layers to 0, to make them cheaper. Returns whether any was left."""
    codes = encode(net.hidden, bits)
    size = torch.where(codes.values == 0, torch.inf, codes.weights().abs()).flatten()
    least = size.topk(math.ceil(share * size.numel()), largest=False)
    left = least.values.isfinite()
    net.hidden.view(-1)[least.indices[left]] = 0
    return bool(left.any())
