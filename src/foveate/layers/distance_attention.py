"""Attention with a bias for every distance, on a map of tokens, that may shrink the map; its norms fold away.

With linear layers each followed by a batch norm (LN below), keys of width D, values of r D, and a table b of biases by
head and by distance, which alone says where a token is (Graham et al. 2021, arXiv:2104.01136),

    [q, k, v] = LN(x) per head                             q, k [N, D]   v [N, r D]
    a(p, p') = softmax_p'( q(p) k(p') / sqrt(D) + b[|y - y'|, |x - x'|] )
    y = LN(hardswish(concat_heads(a v)))

With stride s only every s-th row and column asks, and distances are |s y - y'|, |s x - x'|.
"""

from collections.abc import Sequence
from copy import deepcopy
from typing import Any, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from foveate.layers import fold
from foveate.layers.fold import fold_linear_bn
from foveate.layers.residual import add_


class LinearNorm(nn.Sequential):
    """A linear layer without bias, `c`, and a batch norm over all tokens, `bn`. Shape: [..., inputs] -> [..., outputs].

    Args:
        gamma: what the norm's weight begins with; 0 makes a residual block begin as the identity.
    """

    c: nn.Linear
    bn: nn.BatchNorm1d

    def __init__(self, inputs: int, outputs: int, gamma: float = 1.0) -> None:
        super().__init__()
        self.c = nn.Linear(inputs, outputs, bias=False)
        self.bn = nn.BatchNorm1d(outputs)
        nn.init.constant_(self.bn.weight, gamma)

    def forward(self, x: Tensor) -> Tensor:
        y = self.c(x)
        return self.bn(y.flatten(0, -2)).view_as(y)

    def folded(self) -> nn.Linear:
        """The two as one linear layer."""
        return fold_linear_bn(self.c, self.bn)


class Subsample(nn.Module):
    """Every second row and column. Shape: [B, H, W, C] -> [B, ceil(H / 2), ceil(W / 2), C]."""

    def forward(self, x: Tensor) -> Tensor:
        return x[:, ::2, ::2]


class Attention(nn.Module):
    """Attention with a bias per head and distance, among all tokens of a map.

    Args:
        dim: C.
        key_dim: D.
        heads: h.
        grid: (rows, columns) that the table of biases is made for; for other maps it is resampled.
        ratio: r.
        outputs: channels of the result, default C.
        gamma: see `LinearNorm`, of the last layer.

    Shape: [B, H, W, C] -> the same.
    """

    stride = 1
    index: Tensor
    cached: Tensor | None

    def __init__(
        self,
        dim: int,
        key_dim: int,
        heads: int,
        grid: tuple[int, int],
        ratio: int = 2,
        outputs: int | None = None,
        gamma: float = 0.0,
    ) -> None:
        super().__init__()
        self.key_dim, self.heads, self.grid, self.scale = key_dim, heads, grid, key_dim**-0.5
        self.values = ratio * key_dim
        self.attention_biases = nn.Parameter(torch.zeros(heads, grid[0] * grid[1]))
        self.register_buffer("index", distances(*grid, self.stride), persistent=False)
        self.register_buffer("cached", None, persistent=False)
        self.make_inputs(dim)
        activation = nn.Hardswish()
        self.proj = nn.Sequential(activation, LinearNorm(heads * self.values, outputs or dim, gamma))

    def make_inputs(self, dim: int) -> None:
        """Add the layers that `inputs` uses."""
        self.qkv: nn.Module = LinearNorm(dim, self.heads * (2 * self.key_dim + self.values))

    def inputs(self, x: Tensor) -> Sequence[Tensor]:
        """Queries, keys and values. Shape: [B, H, W, C] -> [B, H', W', h, D], [B, H, W, h, D], [B, H, W, h, r D]."""
        return self.qkv(x).unflatten(3, (self.heads, -1)).split([self.key_dim, self.key_dim, self.values], 4)

    def biases(self, rows: int, columns: int) -> Tensor:
        """b for all pairs of tokens on a map. Shape: [h, queries, rows * columns]."""
        if self.cached is not None and (rows, columns) == self.grid:
            return self.cached
        if (rows, columns) == self.grid:
            return self.attention_biases[:, self.index]
        table = self.attention_biases.unflatten(1, self.grid)
        table = F.interpolate(table[None].float(), (rows, columns), mode="bilinear", align_corners=True)[0].to(table)
        return table.flatten(1)[:, distances(rows, columns, self.stride).to(table.device)]

    def forward(self, x: Tensor) -> Tensor:
        parts = self.inputs(x)
        q, k, v = (t.flatten(1, 2).transpose(1, 2) for t in parts)
        scores = q @ k.mT if self.scale == 1 else (q @ k.mT) * self.scale
        scores = add_(scores, self.biases(x.shape[1], x.shape[2]))
        y = (scores.softmax(-1) @ v).transpose(1, 2).flatten(2)
        return self.proj(y.unflatten(1, parts[0].shape[1:3]))

    def folded(self) -> Self:
        """The same with norms and 1 / sqrt(D) in the linear maps, and the biases of all pairs of tokens at hand."""
        if self.cached is not None:
            return self
        out = deepcopy(self)
        for name, child in list(out._modules.items()):
            if child is not None:
                out._modules[name] = fold.fuse(child)
        with torch.no_grad():
            for asking in out.queries():
                asking *= out.scale
            out.cached = out.biases(*out.grid).contiguous()
        out.scale = 1.0
        out.attention_biases.requires_grad_(False)  # a later change of it would not be seen
        return out

    def queries(self) -> list[Tensor]:
        """Weight and bias of the folded layer, as far as they make queries."""
        layer: Any = self.qkv
        return [t.unflatten(0, (self.heads, -1))[:, : self.key_dim] for t in (layer.weight, layer.bias)]


class ShrinkingAttention(Attention):
    """Attention of every second row and column to all tokens; see `Attention`.

    Shape: [B, H, W, C] -> [B, ceil(H / 2), ceil(W / 2), outputs].
    """

    stride = 2

    def __init__(self, dim: int, key_dim: int, heads: int, grid: tuple[int, int], outputs: int, ratio: int = 4) -> None:
        super().__init__(dim, key_dim, heads, grid, ratio, outputs, gamma=1.0)

    def make_inputs(self, dim: int) -> None:
        self.kv: nn.Module = LinearNorm(dim, self.heads * (self.key_dim + self.values))
        self.q = nn.Sequential(Subsample(), LinearNorm(dim, self.heads * self.key_dim))

    def inputs(self, x: Tensor) -> Sequence[Tensor]:
        k, v = self.kv(x).unflatten(3, (self.heads, -1)).split([self.key_dim, self.values], 4)
        return self.q(x).unflatten(3, (self.heads, -1)), k, v

    def queries(self) -> list[Tensor]:
        layer: Any = self.q[1]
        return [layer.weight, layer.bias]


def distances(rows: int, columns: int, stride: int = 1) -> Tensor:
    """|y - y'| * columns + |x - x'| for every stride-th row and column against all tokens.

    Shape: [ceil(rows / stride) * ceil(columns / stride), rows * columns].

    >>> distances(2, 2)
    tensor([[0, 1, 2, 3],
            [1, 0, 3, 2],
            [2, 3, 0, 1],
            [3, 2, 1, 0]])
    """
    down, across = (torch.arange(n) for n in (rows, columns))
    y, x = ((t[::stride, None] - t).abs() for t in (down, across))
    return (y[:, None, :, None] * columns + x[None, :, None, :]).flatten(2).flatten(0, 1)
