"""Quantised layers: weights and activations on few levels while training and measuring go on in floating point.

A tensor rounded to k bits is Q(x) = D round(clamp(x, low, high) / D) with a step D; gradients pass through the rounding
as if it were not there, and stop where the clamp acts.

    weights      one step per output channel, D = max|w| / (2^(k-1) - 1), symmetric: 2^k - 1 levels, Q(Q(w)) = Q(w)
    activations  one step per layer, D = (high - low) / (2^k - 1) and an integer zero point, from running averages of
                 the smallest and the largest value, which training moves and evaluation leaves as they are

Batch norms are folded into their layers first (`foveate.layers.fold`), as the hardware will.
"""

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from foveate.errors import InputError


class WeightQuantiser(nn.Module):
    """Round a weight to k bits, symmetric, with a step per output channel.

    Args:
        bits: k, from 2 to 8.

    Shape: [outputs, ...] -> the same.
    Raises: InputError for another number of bits.
    """

    def __init__(self, bits: int = 4) -> None:
        super().__init__()
        self.bits = _check(bits)

    def forward(self, weight: Tensor) -> Tensor:
        top = 2 ** (self.bits - 1) - 1
        step = (weight.detach().float().flatten(1).abs().amax(1) / top).clamp(min=torch.finfo(torch.float32).tiny)
        zero = torch.zeros_like(step, dtype=torch.int32)
        return torch.fake_quantize_per_channel_affine(weight.float(), step, zero, 0, -top, top).to(weight.dtype)


class ActivationQuantiser(nn.Module):
    """Round a layer's input to k bits between running averages of its smallest and largest value, zero among them.

    Until it has seen something in training, it changes nothing.

    Args:
        bits: k, from 2 to 8.
        momentum: share of the old average that a batch leaves.

    Raises: InputError for another number of bits.
    """

    low: Tensor
    high: Tensor

    def __init__(self, bits: int = 8, momentum: float = 0.99) -> None:
        super().__init__()
        self.bits, self.momentum = _check(bits), momentum
        self.register_buffer("low", torch.zeros(()))
        self.register_buffer("high", torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        if self.training:
            self._observe(x.detach())
        levels = 2**self.bits - 1
        step = (self.high - self.low).float() / levels
        if not step > 0:
            return x
        zero = (-self.low / step).round().int().clamp(0, levels)
        return torch.fake_quantize_per_tensor_affine(x.float(), step, zero, 0, levels).to(x.dtype)

    def _observe(self, x: Tensor) -> None:
        fresh = not bool(self.high > self.low)
        for seen, value in ((self.low, x.min().clamp(max=0)), (self.high, x.max().clamp(min=0))):
            seen.lerp_(value.to(seen.dtype), 1.0 if fresh else 1 - self.momentum)


def quantise(network: nn.Module, weight_bits: int = 4, activation_bits: int = 8) -> nn.Module:
    """Quantise every convolution and linear layer of a network in place, for fine-tuning and measuring.

    `torch.nn.utils.parametrize` holds the weights; `remove_parametrizations` leaves the rounded ones behind.

    Returns: the same network.
    Raises: InputError for a network that is quantised already.
    """
    layers = [m for m in network.modules() if isinstance(m, nn.Conv2d | nn.Linear)]
    if any(parametrize.is_parametrized(layer, "weight") for layer in layers):
        raise InputError("this network has parametrised weights already; quantise it once, before anything else.")
    for layer in layers:
        layer.input_quantiser = ActivationQuantiser(activation_bits).to(layer.weight.device)
        layer.input_quantiser.train(layer.training)
        layer.register_forward_pre_hook(_round_input)
        parametrize.register_parametrization(layer, "weight", WeightQuantiser(weight_bits))
    return network


def weight_bytes(network: nn.Module) -> int:
    """Bytes that the parameters need: quantised ones at their bits, rounded up per tensor, others as they are."""
    total = 0
    for module in network.modules():
        for name, parameter in module.named_parameters(recurse=False):
            bits = 8 * parameter.element_size()
            if isinstance(module, parametrize.ParametrizationList) and isinstance(module[0], WeightQuantiser):
                bits = module[0].bits if name == "original" else bits
            total += -(-bits * parameter.numel() // 8)
    return total


def _round_input(layer: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    quantiser = layer.input_quantiser
    assert isinstance(quantiser, ActivationQuantiser)
    return (quantiser(args[0]), *args[1:])


def _check(bits: int) -> int:
    if not 2 <= bits <= 8:
        raise InputError(f"quantisers take 2 to 8 bits, got {bits}.")
    return bits
