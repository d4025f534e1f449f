"""Train adaptive computation modules: taught by the layers they replace, gated by measured errors, tuned to a budget.

Wojcik et al. 2023, arXiv:2312.10193; `foveate.encode.adaptive_computation_modules` says what is trained.

1. `distil`. A forward pass of the host as it was gives input z and output o of each replaced layer; all layers learn at
   once and apart from each other, with all sums of learners aiming at the whole output:

       mean_k ||h(z, k) - o||^2                                       k = 1 ... L

2. `place_gates`. With d(n) = ||h(z, n) - o||, a token's label is the first n whose learner brings less than a factor:
   d(n - 1) / d(n) < 1.2; L when every one brings more. A token on which already the first brings less gets the least
   number allowed (published code gives it L, by an accident). Gates learn labels by cross-entropy.
3. `fine_tune`. With b_i the share of learners that picture i runs, weighed by cost, and a_n the share of its tokens
   that run n of them in a layer, the task's loss and

       0.1 |mean_i b_i - beta| + 0.05 mean sum_n a_n log a_n / log(L + 1) - 0.05 mean_ij |b_i - b_j|

   which keeps to the budget, has tokens of one picture differ, and pictures too. (Printed without the last minus; the
   published code has it.)
"""

import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from foveate.encode.adaptive_computation_modules import AdaptiveComputationModules, Choice, learner_share
from foveate.engine.fit import fit
from foveate.engine.surgery import join, patch_forward
from foveate.layers.learners import Learners

Lesson = tuple[Learners, Tensor, Tensor]
"""A new layer, tokens that the old one was given, and what it made of them."""

FACTOR = 1.2
"""By which a learner has to reduce the error."""

WEIGHTS = (0.1, 0.05, 0.05)
"""Of the terms of phase 3: budget, differing tokens, differing pictures."""


@torch.no_grad()
def lessons(handle: AdaptiveComputationModules, pixels: Tensor) -> list[Lesson]:
    """Run the host as it was before on pictures [B, 3, H, W], and take down what each replaced layer did."""
    seen: dict[int, tuple[Tensor, Tensor]] = {}

    def watch(i: int, forward: Callable[..., Tensor], x: Tensor, *more: Any) -> Tensor:
        y = forward(x, *more)
        seen[i] = x, y
        return y

    with handle.paused():
        training = handle.host.model.training
        handle.host.model.eval()
        with join([patch_forward(old, partial(watch, i)) for i, (old, _) in enumerate(handle.pairs)]):
            handle.host.tokens(pixels)
        handle.host.model.train(training)
    found: list[Lesson] = []
    for i, (_, made) in enumerate(handle.pairs):
        x, y = seen[i]
        found += zip(made, [x] * len(made), y.chunk(len(made), -1), strict=True)
    return found


def distillation_loss(taught: Sequence[Lesson]) -> Tensor:
    """Mean over layers, numbers of learners, tokens and channels of the squared error."""
    return torch.stack([(layer.sums(x) - y).square().mean() for layer, x, y in taught]).mean()


def distil(
    handle: AdaptiveComputationModules, pictures: Callable[[int], Tensor], steps: int, lr: float = 1e-3, **options: Any
) -> dict[str, float]:
    """Phase 1: teach the new layers by those they replace.

    Args:
        pictures: step -> pictures as the host takes them, [B, 3, H, W]; no classes are needed.
        steps: of Adam.
        lr: peak learning rate.
        options: of `foveate.engine.fit.fit`, which also says what is returned.
    """
    taught = [p for layer in handle.layers for p in (layer.w1, layer.b1, layer.w2)]
    loss = lambda step: distillation_loss(lessons(handle, pictures(step)))  # noqa: E731
    return fit(handle.host.model, loss, steps, lr=lr, parameters=taught, **options)


def labels(errors: Tensor, least: int, factor: float = FACTOR) -> Tensor:
    """How many learners tokens should run, as the index of a choice.

    Args:
        errors: d(0) ... d(L).
        least: what choice 0 runs.

    Shape: errors [L + 1, ...] -> integers [...].

    >>> labels(torch.tensor([[8.0], [4.0], [2.0], [1.9], [1.0]]), least=0)
    tensor([3])
    """
    fails = errors[:-1] < factor * errors[1:]
    first = 1 + fails.to(torch.uint8).argmax(0)
    number = torch.where(fails.any(0), first, len(errors) - 1)
    return torch.where(number == 1, 0, number - least)


def gate_loss(taught: Sequence[Lesson], factor: float = FACTOR) -> Tensor:
    """Cross-entropy of gates and labels, mean over layers."""
    losses = []
    for layer, x, y in taught:
        with torch.no_grad():
            errors = torch.stack([y.float().norm(dim=-1), *(layer.sums(x) - y).norm(dim=-1)])
            target = labels(errors, layer.least, factor)
        losses.append(F.cross_entropy(layer.gate(x).flatten(0, -2), target.flatten()))
    return torch.stack(losses).mean()


def place_gates(
    handle: AdaptiveComputationModules, pictures: Callable[[int], Tensor], steps: int, lr: float = 1e-2, **options: Any
) -> dict[str, float]:
    """Phase 2: teach gates what the errors of the learners say, which stay as they are. Arguments as `distil`."""
    gates = [p for layer in handle.layers for p in layer.gate.parameters()]
    loss = lambda step: gate_loss(lessons(handle, pictures(step)))  # noqa: E731
    return fit(handle.host.model, loss, steps, lr=lr, parameters=gates, **options)


def penalties(record: Sequence[Choice], share: float, weights: tuple[float, float, float] = WEIGHTS) -> Tensor:
    """The terms of phase 3 beside the task's loss.

    Args:
        record: what `Router.recording` collected in a forward pass in training.
        share: beta.
        weights: of the three terms.
    """
    spent = learner_share(record)
    budget = (spent.mean() - share).abs()
    spread = (spent[:, None] - spent).abs().mean()
    alike = [_negative_entropy(choice.nu) for choice in record if choice.nu is not None]
    within = torch.stack(alike).mean() if alike else torch.zeros_like(budget)
    return weights[0] * budget + weights[1] * within - weights[2] * spread


def fine_tune(
    handle: AdaptiveComputationModules,
    loss: Callable[[int], Tensor],
    steps: int,
    lr: float = 1e-4,
    weights: tuple[float, float, float] = WEIGHTS,
    **options: Any,
) -> dict[str, float]:
    """Phase 3: train everything for a task, at the handle's budget.

    Args:
        loss: step -> the task's loss, for which it calls the host.
        weights: of the budget, of differing tokens and of differing pictures.
        options: of `foveate.engine.fit.fit`.
    """
    router, model = handle.router, handle.host.model

    def total(step: int) -> Tensor:
        with router.recording() as record:
            value = loss(step)
        return value + penalties(record, router.work.share(router.budget, record[0].runs.shape[-1]), weights)

    found = fit(model.train(), total, steps, lr=lr, **options)
    model.eval()
    return found


def _negative_entropy(nu: Tensor) -> Tensor:
    """Of how many learners the tokens of a picture run, mean over pictures. Shape: [B, N, choices] -> []."""
    share = nu.mean(1)
    return (share * (share + 1e-6).log()).sum(-1).mean() / math.log(nu.shape[-1])
