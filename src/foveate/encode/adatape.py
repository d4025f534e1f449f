"""AdaTape: a vision transformer that takes in more tokens where a picture is hard, read from a finer view of it.

Xue, Likhosherstov, Arnab, Houlsby, Dehghani, You 2023, "Adaptive Computation with Elastic Input Sequence",
arXiv:2301.13195; defaults as in google-research/scenic, projects/adatape (S/16).

    x = E(patches of 16) + positions                                  [B, N, C], no class token
    bank = M (E'(patches of 8) + positions')                          [B, 4 N, C]; or a table that is learned
    x = block_1(x)
    tape_1 ... tape_n = read(mean(x), bank)                           n <= T = 10; see `foveate.layers.tape`
    x = [x, W2 glu(W1 tape)]                                          [N + n, C]
    x = block_2 ... block_L(x),   y = head(mean(norm(x)))

n differs from picture to picture. Sequences lie end to end, so no picture pays for another's tape, and none sees it. In
blocks after it, tape tokens may have an FFN of their own; published for the bank that is learned.

Not as published: softmax weights belong to their own picture (there all take those of the first), and the mean is over
tokens that are read (there over all T).
"""

import math
from bisect import bisect_right
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from foveate.engine.budget import Budget
from foveate.engine.packed import Packed
from foveate.engine.surgery import find
from foveate.errors import BudgetError, InputError
from foveate.hosts import vit
from foveate.layers.patch import PatchEmbed, resample_positions
from foveate.layers.tape import Tape, TapeReader
from foveate.layers.transformer import MLP, VisionTransformer
from foveate.ops.packed_attention import packed_attention

PONDER = 0.01
"""Weight of the reader's ponder loss."""


@dataclass(frozen=True, eq=False)
class Run:
    """What came of pictures: features of each, end to end, and the tape that was read for them."""

    features: Packed
    tape: Tape


class GatedMLP(nn.Module):
    """Two linear layers and a gated linear unit between. Shape: [..., C] -> [..., C]."""

    def __init__(self, dim: int, hidden: int) -> None:
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(dim, 2 * hidden), nn.Linear(hidden, dim)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(F.glu(self.fc1(x), -1))


class AdaTape(VisionTransformer):
    """A vision transformer with an elastic input sequence.

    Train it with `loss`, or with the mean of `run(x).tape.ponder` times 0.01 added to your own.

    Args:
        img_size, patch_size, embed_dim, depth, num_heads, mlp_ratio, num_classes, in_chans: see `VisionTransformer`.
        tape_tokens: T, tape tokens of a picture at most; 0 makes a plain transformer.
        threshold: tau; each tape token merges floor(T / tau) items of the bank.
        layer: blocks before the tape is read.
        bank: "input", finer patches of the picture, or "learned".
        bank_patch: side of a patch in the bank; default half of patch_size.
        bank_size: items of a bank that is learned.
        own_ffn: whether tape tokens have an FFN of their own in the blocks; default as published.
        hidden, noise: see `TapeReader`.

    Shape: [B, in_chans, H, W] -> [B, num_classes]; features are `Packed`, for each picture [N + n, C].
    Raises: InputError for settings that do not fit, or pictures whose bank may run out.

    >>> net = AdaTape(img_size=32, patch_size=8, embed_dim=48, depth=2, num_heads=3, tape_tokens=6).eval()
    >>> run = net.run(torch.zeros(2, 3, 32, 32))
    >>> [length - 16 for length in run.features.lengths] == run.tape.steps.tolist()
    True
    """

    def __init__(
        self,
        img_size: int = 224,
        patch_size: int = 16,
        embed_dim: int = 384,
        depth: int = 12,
        num_heads: int = 6,
        mlp_ratio: float = 4.0,
        num_classes: int = 1000,
        in_chans: int = 3,
        tape_tokens: int = 10,
        threshold: float = 2.0,
        layer: int = 1,
        bank: Literal["input", "learned"] = "input",
        bank_patch: int | None = None,
        bank_size: int = 10_000,
        own_ffn: bool | None = None,
        hidden: float = 0.0,
        noise: float = 0.0,
    ) -> None:
        super().__init__(img_size, patch_size, embed_dim, depth, num_heads, mlp_ratio, num_classes, "avg", in_chans)
        if bank not in ("input", "learned"):
            raise InputError(f"a bank is 'input' or 'learned', not {bank!r}.")
        if not 0 <= layer <= depth:
            raise InputError(f"layer is from 0 to the {depth} blocks of this model, got {layer}.")
        for block in find(self.blocks, MLP).values():
            block.act = nn.GELU("tanh")  # Flax's default
        if isinstance(self.head, nn.Linear):
            nn.init.zeros_(self.head.weight)
            nn.init.constant_(self.head.bias, -math.log(num_classes))
        self.layer, self.host = layer, vit(self)
        self.reader = TapeReader(embed_dim, tape_tokens, threshold, num_heads, hidden, noise)
        self.bank: nn.Module | None = None
        self.tape_mlp: nn.Module | None = None
        self.tape_ffns = nn.ModuleList()
        if not tape_tokens:
            return
        width = int(embed_dim * mlp_ratio)
        if bank == "input":
            self.bank = InputBank(img_size, bank_patch or max(1, patch_size // 2), embed_dim, in_chans)
        else:
            self.bank = LearnedBank(bank_size, embed_dim)
        self.tape_mlp = GatedMLP(embed_dim, width)
        if bank == "learned" if own_ffn is None else own_ffn:
            self.tape_ffns.extend(GatedMLP(embed_dim, width) for _ in range(depth - layer))

    def run(self, x: Tensor, budget: Budget | float | str | None = None) -> Run:
        """Features and tape of pictures. Shape: [B, in_chans, H, W].

        Args:
            budget: how much tape there may be at most: a share of the FLOPs with all T tokens for every picture,
                GFLOPs for a picture, or "4 tokens". Default T tokens.

        Raises: BudgetError for less than no tape at all costs.
        """
        self.check(x)
        patches = self.patch_embed(x)
        tokens, grid = self._pos_embed(patches), (patches.shape[2], patches.shape[3])
        most = self.affordable(budget, grid, (x.shape[2], x.shape[3]))
        for block in list(self.blocks)[: self.layer]:
            tokens = block(tokens)
        n, tape = tokens.shape[1], self._read(tokens, x, most)
        taped = tokens.new_zeros(tape.tokens.shape)
        if self.tape_mlp is not None and tape.tokens.shape[1]:
            taped[tape.mask] = self.tape_mlp(tape.tokens[tape.mask]).to(taped.dtype)
        keep = torch.cat([tape.mask.new_ones(len(x), n), tape.mask], 1)
        packed = Packed.select(torch.cat([tokens, taped], 1), keep)
        on_tape = (torch.arange(keep.shape[1], device=x.device) >= n).expand_as(keep)[keep]
        for i in range(self.layer, len(self.blocks)):
            packed = packed.replaced(self._block(i, packed, on_tape))
        return Run(packed.replaced(self.norm(packed.values)), tape)

    def forward_features(self, x: Tensor, budget: Budget | float | str | None = None) -> Packed:  # type: ignore[override]
        """Tokens after the last norm, as many as each picture has."""
        return self.run(x, budget).features

    def pool(self, features: Packed) -> Tensor:  # type: ignore[override]
        """The mean over the tokens of each picture. Shape: [B, C]."""
        values, lengths = features.values, features.lengths
        if len(set(lengths)) == 1:
            return values.unflatten(0, (len(lengths), -1)).mean(1)
        sums = values.new_zeros(len(lengths), values.shape[1]).index_add(0, features.item, values)
        return sums / torch.tensor(lengths, device=values.device)[:, None]

    def forward_head(self, x: Packed, pre_logits: bool = False) -> Tensor:  # type: ignore[override]
        pooled = self.pool(x)
        return pooled if pre_logits else self.head(pooled)

    def forward(self, x: Tensor, budget: Budget | float | str | None = None) -> Tensor:
        return self.forward_head(self.forward_features(x, budget))

    def loss(self, x: Tensor, labels: Tensor, weight: float = PONDER) -> Tensor:
        """The published loss: sigmoid cross-entropy, summed over classes, and the reader's ponder loss."""
        run = self.run(x)
        y = self.forward_head(run.features)
        target = F.one_hot(labels, y.shape[1]).to(y)
        task = F.binary_cross_entropy_with_logits(y, target, reduction="none").sum(1).mean()
        return task + weight * run.tape.ponder.mean()

    def flops(self, tape: int, grid: tuple[int, int], size: tuple[int, int]) -> int:
        """FLOPs of one picture with so many tape tokens.

        Args:
            grid: rows and columns of its patches.
            size: its height and width.
        """
        n = grid[0] * grid[1]
        total = 2 * n * self.patch_embed.proj.weight.numel()
        total += sum(block.flops(n + tape * (i >= self.layer)) for i, block in enumerate(self.host.blocks))
        if not tape or self.bank is None or self.tape_mlp is None:
            return total
        items: Any = self.bank
        total += items.flops(size) + 2 * tape * items.count(size) * self.reader.keys
        own, shared = _weights(self.tape_mlp), _weights(self.host.blocks[0].mlp)
        return total + 2 * tape * (own + len(self.tape_ffns) * (own - shared))

    def affordable(self, budget: Budget | float | str | None, grid: tuple[int, int], size: tuple[int, int]) -> int:
        """Tape tokens that a budget pays for on every picture; see `run`."""
        most = self.reader.tokens
        if budget is None:
            return most
        budget, full = Budget.parse(budget), self.flops(most, grid, size)
        if budget.unit == "tokens":
            return min(most, int(budget.amount))
        share = budget.share_of(gflops=full / 1e9, tokens=max(most, 1))
        if share == 1:
            return most
        found = bisect_right(range(most + 1), share * full, key=lambda t: self.flops(t, grid, size)) - 1
        if found < 0:
            least = self.flops(0, grid, size) / full
            raise BudgetError(
                f"A budget of {budget} does not pay for a picture without any tape, which takes a share of "
                f"{least + 0.005:.2f}; ask for that much, or for larger patches."
            )
        return found

    def _read(self, tokens: Tensor, x: Tensor, most: int) -> Tape:
        bank = tokens[:, :0] if self.bank is None or most == 0 else self.bank(x)
        return self.reader(tokens.mean(1), bank, most)

    def _block(self, i: int, packed: Packed, on_tape: Tensor) -> Tensor:
        """One block on sequences end to end. Shape: [T, C]."""
        block, x = self.host.blocks[i], packed.values
        attend = partial(_attend, packed.lengths)
        x = x + block.attention.run(block.norm1(x)[None], attend)[0]
        z = block.norm2(x)
        if not self.tape_ffns:
            return x + block.mlp(z)
        y = torch.empty_like(z)
        y[~on_tape] = block.mlp(z[~on_tape]).to(y.dtype)
        y[on_tape] = self.tape_ffns[i - self.layer](z[on_tape]).to(y.dtype)
        return x + y

    @classmethod
    def conformance_example(cls, larger: bool = False) -> tuple["AdaTape", tuple[Tensor]]:
        """A small network that has left its beginning, where the head lets no gradient through."""
        net = cls(32, 16, 24, 2, 3, 2.0, num_classes=5, tape_tokens=16, threshold=4.0, bank_patch=4, own_ffn=True)
        assert isinstance(net.head, nn.Linear)
        nn.init.normal_(net.head.weight)
        return net, (torch.rand(3, 3, *((45, 37) if larger else (32, 32))),)


class InputBank(nn.Module):
    """The picture in finer patches. Shape: [B, channels, H, W] -> [B, items, C]."""

    def __init__(self, img_size: int, patch: int, dim: int, channels: int) -> None:
        super().__init__()
        self.side = -(-img_size // patch)
        self.patch_embed = PatchEmbed(channels, dim, patch)
        self.pos_embed = nn.Parameter(torch.empty(1, self.side**2, dim))
        self.proj = nn.Linear(dim, dim)
        nn.init.trunc_normal_(self.pos_embed, std=0.02)

    def forward(self, x: Tensor) -> Tensor:
        patches = self.patch_embed(x)
        positions = resample_positions(self.pos_embed, (self.side, self.side), (patches.shape[2], patches.shape[3]))
        return self.proj(patches.flatten(2).mT + positions)

    def count(self, size: tuple[int, int]) -> int:
        """Items of a picture of this height and width."""
        patch = self.patch_embed.proj.stride[0]
        return math.prod(-(-side // patch) for side in size)

    def flops(self, size: tuple[int, int]) -> int:
        """FLOPs of making them."""
        return 2 * self.count(size) * (self.patch_embed.proj.weight.numel() + self.proj.weight.numel())


class LearnedBank(nn.Module):
    """A table, the same for every picture. Shape: [B, ...] -> [B, items, C]."""

    def __init__(self, items: int, dim: int) -> None:
        super().__init__()
        self.items = nn.Parameter(torch.empty(items, dim))
        nn.init.trunc_normal_(self.items, std=0.02)

    def forward(self, x: Tensor) -> Tensor:
        return self.items.expand(len(x), -1, -1)

    def count(self, _: tuple[int, int]) -> int:
        return len(self.items)

    def flops(self, _: tuple[int, int]) -> int:
        return 0


def _attend(lengths: tuple[int, ...], q: Tensor, k: Tensor, v: Tensor, dropout: float) -> Tensor:
    return packed_attention(q[0], k[0], v[0], lengths, dropout=dropout)[None]


def _weights(module: nn.Module) -> int:
    return sum(p.numel() for p in module.parameters() if p.dim() > 1)
