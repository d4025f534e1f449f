"""Let a vision transformer run on tokens of its pictures packed end to end, as many for each picture as it needs.

The host's own code does the rest: its blocks see one sequence [1, T, C] of all pictures' tokens, in which only
attention has to know where a picture ends; and what its head sees is made by `Plan.restore`. Three places change: the
embedding, the middle of every attention, and the end of the last block.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from foveate.engine.packed import Packed
from foveate.engine.surgery import Handle, join, patch_forward
from foveate.hosts.vit import ViT
from foveate.ops.packed_attention import packed_attention


@dataclass(frozen=True, eq=False)
class Plan:
    """What goes through the blocks, and what comes out for the head.

    Args:
        tokens: as they enter the blocks, positions and prefix included.
        restore: from tokens after the last block, [T, C], to what the host's norm and head shall see, [B, N', C].
    """

    tokens: Packed
    restore: Callable[[Tensor], Tensor]


def run_packed(host: ViT, plan: Callable[[Tensor], Plan]) -> Handle:
    """Change a host so that its blocks run on packed tokens.

    Hidden states of inner layers, where asked for, are packed ones, [1, T, C].

    Args:
        plan: chooses and embeds the tokens of pixels [B, 3, H, W].

    Returns: the handle that undoes it.
    """
    run = _Run(plan)
    handles = [host.patch_embedding(run.embed), *(block.attention.patch(run.attend) for block in host.blocks)]
    handles += [patch_forward(module, partial(_drop_pictures, run)) for module in host.drop_paths()]
    return join([*handles, host.blocks[-1].patch(run.finish)])


class _Run:
    """What the changed places tell each other during one call."""

    def __init__(self, plan: Callable[[Tensor], Plan]) -> None:
        self.plan = plan
        self.lengths: tuple[int, ...] = ()
        self.restore: Callable[[Tensor], Tensor] | None = None

    def embed(self, pixels: Tensor) -> Tensor:
        plan = self.plan(pixels)
        self.lengths, self.restore = plan.tokens.lengths, plan.restore
        return plan.tokens.values[None]

    def attend(self, q: Tensor, k: Tensor, v: Tensor, dropout: float) -> Tensor:
        return packed_attention(q[0], k[0], v[0], self.lengths, dropout=dropout)[None]

    def finish(self, block: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
        y, restore = block(x)[0], self.restore
        assert restore is not None
        self.restore = None  # it holds tensors of this call
        return restore(y)


def _drop_pictures(run: _Run, forward: Callable[[Tensor], Tensor], x: Tensor, *_: Any) -> Tensor:
    """Stochastic depth drops pictures, and here all pictures are one sequence: let it choose on one number each."""
    kept = forward(x.new_ones(len(run.lengths), 1, 1))
    return x * kept[:, 0].repeat_interleave(torch.tensor(run.lengths, device=x.device), 0)
