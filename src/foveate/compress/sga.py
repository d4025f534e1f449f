"""Stochastic Gumbel annealing: choose for every latent whether to round it up or down, by gradient descent.

Yang, Bamler, Mandt 2020, Improving Inference for Neural Image Compression, arXiv:2006.04240, section 3.2.

A value v lies between floor(v) and ceil(v). Rounding it is drawn from a Gumbel-softmax of temperature t over the two,

    logits  (-atanh(v - floor(v)) / t,  -atanh(ceil(v) - v) / t)       value  =  sum of weight * candidate

so that a loss of the drawn values has a gradient for v. As t falls, the draws become plain rounding: what was optimised
is what will be coded. Temperatures and learning rate follow the paper's 3000 steps, by the share of the steps done.
"""

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

Rounding = Callable[[Tensor], Tensor]

_STEPS, _RATE = 3000, 5e-3
_EDGE = 1 - 1e-5


def gumbel_round(v: Tensor, temperature: float, generator: torch.Generator | None = None) -> Tensor:
    """Round at random, values within floor(v) and ceil(v); whole numbers stay as they are.

    Args:
        temperature: above 0; near it, this is round(v).
    """
    low = v.detach().floor()
    share = v - low
    room = v.detach().ceil() - low
    noise = torch.rand(v.shape, generator=generator, device=v.device, dtype=v.dtype).clamp(1e-6, 1 - 1e-6).logit()
    below, above = (-x.clamp(0, _EDGE).atanh() / temperature for x in (share, room - share))
    return low + room * ((above - below + noise) / temperature).sigmoid()


def temperature(share: float) -> float:
    """0.5 at first, falling exponentially after a fifteenth of the steps. Args: share of the steps done, 0 to 1."""
    return min(0.5, max(1e-8, 0.5 * math.exp(-5e-4 * (_STEPS * share - 200))))


def anneal(
    loss: Callable[[Rounding], Tensor],
    variables: Sequence[Tensor],
    share: Callable[[int], float],
    *,
    rate: float = _RATE,
    seed: int = 0,
) -> None:
    """Minimise a loss over latents in steps of their quantiser; they are changed in place.

    Args:
        loss: given how to round, the value to minimise.
        variables: the latents.
        share: number of the step -> share of the work done; at 1 or more, it ends.
        rate: learning rate of Adam, a tenth of it in the last tenth.
        seed: of the draws.
    """
    generator = torch.Generator(variables[0].device).manual_seed(seed)
    for v in variables:
        v.requires_grad_()
    adam = torch.optim.Adam(variables, rate)
    step = 0
    while (done := share(step)) < 1:
        for group in adam.param_groups:
            group["lr"] = rate * (0.1 if done > 0.9 else 1)
        heat = temperature(done)
        value = loss(lambda v, heat=heat: gumbel_round(v, heat, generator))  # type: ignore[misc]
        grads = torch.autograd.grad(value, variables)
        for v, grad in zip(variables, grads, strict=True):
            v.grad = grad
        adam.step()
        step += 1
    for v in variables:
        v.requires_grad_(False)
