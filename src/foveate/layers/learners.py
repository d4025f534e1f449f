"""Learners: a layer as a sum of small MLPs in order, of which each token runs the first k.

Wojcik et al. 2023, arXiv:2312.10193. With L learners of b hidden units each, on a token z of D channels,

    s_n(z) = act(z W1_n^T + b1_n) W2_n               W1_n [b, D], W2_n [b, O], no bias after it
    h(z, k) = s_1(z) + ... + s_k(z)                  h(z, 0) = 0, allowed only under a residual connection

and a gate, a small MLP D -> 16 -> 16 -> choices, scores every k that is allowed. Where each token has its k, tokens are
sorted by it, most first; learner n then runs on the first rows only, those with k >= n, as one dense product. With a
one-hot nu over choices and m_n = sum_{k >= n} nu_k the same is

    h = sum_n m_n s_n(z)

which runs everything and lets gradients through to nu: the form for training, and the reference for the other.
"""

from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from foveate.engine.route import Route
from foveate.errors import InputError


class Router(Protocol):
    """Say how many learners each token runs: integers [B, N], a one-hot [B, N, choices], or None for all."""

    def __call__(self, layer: "Learners", x: Tensor) -> Tensor | None: ...


class Learners(nn.Module):
    """L small MLPs whose outputs add up.

    Args:
        inputs, outputs: D and O.
        hidden: b, hidden units of each learner.
        learners: L.
        least: learners that every token runs, 0 or 1.
        linear: leave out the GELU.
        gate: hidden units of the gate; its last layer starts at zero, so that no k is preferred.

    Attributes:
        router: asked at every call; None runs all learners.

    Shape: [..., N, D] -> [..., N, O].
    Raises: InputError for numbers that make no layer.
    """

    def __init__(
        self, inputs: int, outputs: int, hidden: int, learners: int = 4, least: int = 0, linear: bool = False,
        gate: int = 16,
    ) -> None:  # fmt: skip
        super().__init__()
        if min(inputs, outputs, hidden, learners, gate) < 1 or least not in (0, 1):
            raise InputError(
                "learners need at least one of everything and least = 0 or 1, got "
                f"{learners} learners of {hidden} hidden units, least={least}, gate={gate}."
            )
        self.learners, self.least, self.linear = learners, least, linear
        self.w1 = nn.Parameter(torch.empty(learners, hidden, inputs))
        self.b1 = nn.Parameter(torch.zeros(learners, hidden))
        self.w2 = nn.Parameter(torch.empty(learners, hidden, outputs))
        nn.init.trunc_normal_(self.w1, std=0.02)
        nn.init.trunc_normal_(self.w2, std=0.02)
        last = nn.Linear(gate, learners + 1 - least)
        nn.init.zeros_(last.weight)
        nn.init.zeros_(last.bias)
        # The published code has no activation in the gate, which makes it one linear layer.
        self.gate = nn.Sequential(nn.Linear(inputs, gate), nn.GELU(), nn.Linear(gate, gate), nn.GELU(), last)
        self.router: Router | None = None

    @property
    def cost(self) -> int:
        """FLOPs of one learner on one token."""
        return 2 * (self.w1[0].numel() + self.w2[0].numel())

    @property
    def gate_cost(self) -> int:
        """FLOPs of the gate on one token."""
        return 2 * sum(p.numel() for p in self.gate.parameters() if p.dim() > 1)

    def forward(self, x: Tensor) -> Tensor:
        chosen = None if self.router is None else self.router(self, x)
        if chosen is None:
            return self._hidden(x).flatten(-2) @ self.w2.flatten(0, 1)
        return self.weighted(x, chosen) if chosen.is_floating_point() else self.gathered(x, chosen)

    def sums(self, x: Tensor) -> Tensor:
        """h(x, k) for k = 1 ... L, in float32 at least. Shape: [..., D] -> [L, ..., O]."""
        each = torch.einsum("...lb,lbo->l...o", self._hidden(x), self.w2)
        return each.to(torch.promote_types(each.dtype, torch.float32)).cumsum(0)

    def weighted(self, x: Tensor, nu: Tensor) -> Tensor:
        """Run everything and keep what nu chose. Shape: x [..., D], nu [..., choices] -> [..., O]."""
        m = nu.float().flip(-1).cumsum(-1).flip(-1)[..., -self.learners :]
        return (self._hidden(x) * m[..., None].to(x.dtype)).flatten(-2) @ self.w2.flatten(0, 1)

    def gathered(self, x: Tensor, k: Tensor) -> Tensor:
        """Run the first k learners on each token, and nothing else. Shape: x [..., D], k integers [...] -> [..., O]."""
        tokens = x.flatten(0, -2)
        # What every token runs needs no order, so only the others are sorted and gathered.
        out = self._first(tokens) if self.least else tokens.new_zeros(len(tokens), self.w2.shape[2])
        route = Route.of(self.learners - k.flatten(), self.learners + 1)
        reach = [sum(route.counts[: self.learners - n]) for n in range(self.least, self.learners)]
        order = route.order[: reach[0]] if reach else route.order[:0]
        rows, more = tokens.index_select(0, order), out.index_select(0, order)
        in_place = not (torch.is_grad_enabled() or torch.is_autocast_enabled(x.device.type))
        for n, m in enumerate(reach, self.least):
            if m == 0:
                break
            hidden = torch.addmm(self.b1[n], rows[:m], self.w1[n].mT)
            hidden = hidden if self.linear else F.gelu(hidden)
            if in_place:
                torch.addmm(more[:m], hidden, self.w2[n], out=more[:m])
            else:
                more = torch.cat([torch.addmm(more[:m], hidden, self.w2[n]), more[m:]])
        return out.index_copy_(0, order, more).unflatten(0, x.shape[:-1])

    def _first(self, x: Tensor) -> Tensor:
        hidden = F.linear(x, self.w1[0], self.b1[0])
        return (hidden if self.linear else F.gelu(hidden)) @ self.w2[0]

    def _hidden(self, x: Tensor) -> Tensor:
        """Shape: [..., D] -> [..., L, b]."""
        hidden = F.linear(x, self.w1.flatten(0, 1), self.b1.flatten()).unflatten(-1, (self.learners, -1))
        return hidden if self.linear else F.gelu(hidden)


def gains(scores: Tensor) -> Tensor:
    """What each further learner adds to a token's score, never more than the one before it.

    These are the slopes of the smallest concave function above the scores: the first learners whose gain exceeds a
    price t are just as many as maximise score(k) - t k.

    Shape: [..., choices] -> [..., choices - 1], falling.

    >>> gains(torch.tensor([0.0, 1.0, 5.0, 6.0]))
    tensor([2.5000, 2.5000, 1.0000])
    """
    choices = scores.shape[-1]
    if choices == 1:
        return scores[..., :0]
    each = scores.movedim(-1, 0)
    place = torch.arange(choices, dtype=scores.dtype, device=scores.device).view(-1, *[1] * (scores.dim() - 1))
    slope = torch.stack([(each - each[a]) / (place - a) for a in range(choices - 1)])  # [from, to, ...]
    return torch.stack([slope[:i, i:].amax(1).amin(0) for i in range(1, choices)], -1)
