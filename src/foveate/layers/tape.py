"""Adaptive tape reading: a query reads from a bank, token after token, until it has read enough.

Xue, Likhosherstov, Arnab, Houlsby, Dehghani, You 2023, arXiv:2301.13195; defaults as in google-research/scenic,
projects/adatape. One norm for query and bank, q = LN(query), V = LN(bank); keys are the first d = C / split channels
of V, and so is what is compared of q. With T tokens at most and a threshold tau, each of up to T steps

    s = q K^T                                   the k = floor(T / tau) best items that nobody has read
    w = softmax(s / sqrt(d))                    over these k
    tape_t = sum_i w_i V_i                      one token; all k are then read
    h <- min(h + max w, tau)                    stop after the step in which h reaches tau
    ponder <- ponder + 1 - sum_i w_i^2          small where the reader is sure, which ends it soon
    q <- (q + first d channels of tape_t) / 2

Since 1 / k <= max w <= 1, a picture takes from ceil(tau) to min(T, ceil(k tau)) tokens.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from foveate.errors import InputError


@dataclass(frozen=True, eq=False)
class Tape:
    """What was read.

    Attributes:
        tokens: [B, t, C]; t is the most that a picture took.
        steps: how many of them are a picture's own, [B]; the others mean nothing.
        ponder: [B], to be made small in training.
        read: items of the bank that each token merges, [B, t, k].
    """

    tokens: Tensor
    steps: Tensor
    ponder: Tensor
    read: Tensor

    @property
    def mask(self) -> Tensor:
        """Which tokens are a picture's own, bool [B, t]."""
        return torch.arange(self.tokens.shape[1], device=self.steps.device) < self.steps[:, None]


class TapeReader(nn.Module):
    """Read tape tokens from a bank.

    Args:
        dim: C.
        tokens: T, at most so many for each picture; 0 reads nothing.
        threshold: tau, above 0 and at most T.
        split: of C channels, C / split are keys; published as the number of heads.
        hidden: share of the bank that is hidden in training.
        noise: standard deviation of noise on the query in training.

    Attributes:
        prefer: from scores [B, items] to those by which items are chosen.

    Raises: InputError for settings that fit no reading.
    """

    def __init__(
        self, dim: int, tokens: int = 10, threshold: float = 2.0, split: int = 6, hidden: float = 0.0,
        noise: float = 0.0,
    ) -> None:  # fmt: skip
        super().__init__()
        if tokens < 0 or (tokens and not 0 < threshold <= tokens):
            raise InputError(f"a threshold is above 0 and at most the {tokens} tokens of a tape, got {threshold:g}.")
        if split < 1 or dim % split:
            raise InputError(f"split must divide the {dim} channels, got {split}.")
        self.tokens, self.threshold, self.hidden, self.noise = tokens, threshold, hidden, noise
        self.merged = int(tokens // threshold) if tokens else 0
        self.keys = dim // split
        self.norm = nn.LayerNorm(dim, eps=1e-6)
        self.prefer: Callable[[Tensor], Tensor] = _as_they_are

    def forward(self, query: Tensor, bank: Tensor, most: int | None = None) -> Tape:
        """Read.

        Args:
            most: tokens at most, where fewer than T.

        Shape: query [B, C], bank [B, items, C].
        Raises: InputError for a bank that may run out.
        """
        b, items, _ = bank.shape
        most = self.tokens if most is None else min(most, self.tokens)
        if most * self.merged > items:
            raise InputError(
                f"{most} tape tokens of {self.merged} items each need a bank of {most * self.merged}, got {items}; "
                "ask for fewer tape tokens, a higher threshold, or smaller patches in the bank."
            )
        if self.training and self.noise:
            query = query + self.noise * torch.randn_like(query)
        values = self.norm(bank)
        keys, q = values[..., : self.keys], self.norm(query)[:, : self.keys]
        used = torch.zeros(b, items, dtype=torch.bool, device=bank.device)
        if self.training and self.hidden:
            used = torch.rand(b, items, device=bank.device) < self.hidden
        # In float32 at least, for so are sums of what is small.
        halting = torch.zeros(b, device=bank.device, dtype=torch.promote_types(bank.dtype, torch.float32))
        ponder, steps = torch.zeros_like(halting), torch.zeros_like(halting, dtype=torch.long)
        tape: list[Tensor] = []
        read: list[Tensor] = []
        for _ in range(most):
            active = halting < self.threshold
            if not bool(active.any()):
                break
            scores = (keys @ q[:, :, None])[..., 0]
            chosen = self.prefer(scores).masked_fill(used, torch.finfo(scores.dtype).min).topk(self.merged).indices
            weights = (scores.gather(1, chosen).to(halting.dtype) / self.keys**0.5).softmax(-1)
            ponder = ponder + active * (1 - weights.square().sum(-1))
            sure = (halting + weights.detach().amax(-1)).clamp(max=self.threshold)
            halting = torch.where(active, sure, halting)
            steps = steps + active
            items_read = values.gather(1, chosen[..., None].expand(-1, -1, values.shape[2]))
            tape.append((weights[..., None].to(values.dtype) * items_read).sum(1))
            read.append(chosen)
            used = used.scatter(1, chosen, True)
            q = (q + tape[-1][:, : self.keys]) / 2
        if not tape:
            return Tape(
                bank[:, :0], steps, ponder, torch.empty(b, 0, self.merged, dtype=torch.long, device=bank.device)
            )
        return Tape(torch.stack(tape, 1), steps, ponder, torch.stack(read, 1))


def _as_they_are(scores: Tensor) -> Tensor:
    return scores
