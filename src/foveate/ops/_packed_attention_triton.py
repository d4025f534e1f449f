# mypy: allow-untyped-defs
"""Attention within packed sequences as a Triton kernel, forward only.

A program holds one block of queries of one sequence and one head and lets the keys of that sequence pass by, keeping
the largest score, the sum and the output so far (as `foveate.ops.tile.attention` does). Blocks are listed on the host,
[P, 3]: first query, first key, end of the sequence; so a short sequence costs what it has and nothing is padded.
"""

from collections.abc import Sequence
from itertools import accumulate, pairwise

import torch
import triton
import triton.language as tl
from torch import Tensor

from foveate.ops.tile import launch, power_of_two, vocabulary
from foveate.ops.tile import vocabulary as tiles
from foveate.ops.tile.attention import LOG2_E

BLOCK = {2: 64, 4: 32}
"""Queries and keys of a block, by bytes of a number."""


def attend(q: Tensor, k: Tensor, v: Tensor, lengths: Sequence[int], scale: float) -> Tensor:
    """`foveate.ops.packed_attention` for tensors of one type. Shape: q, k [H, T, C], v [H, T, D] -> [H, T, D]."""
    out = torch.empty_like(v, memory_format=torch.contiguous_format)
    side = BLOCK[q.element_size()]
    borders = pairwise(accumulate(lengths, initial=0))
    blocks = [(first, start, stop) for start, stop in borders for first in range(start, stop, side)]
    if not blocks:
        return out
    launch(
        _forward, (len(blocks), len(q)),
        q, k, v, out, torch.tensor(blocks, dtype=torch.int64).to(q.device), scale * LOG2_E, q.shape[2], v.shape[2],
        *q.stride(), *k.stride(), *v.stride(), *out.stride(),
        ELEMENT=vocabulary.element(q), PRECISION=vocabulary.precision(), SIDE=side,
        TC=power_of_two(q.shape[2]), TD=power_of_two(v.shape[2]), num_warps=4,
    )  # fmt: skip
    return out


@triton.jit
def _forward(
    q, k, v, out, blocks, scale, C, D,
    q_head, q_row, q_col, k_head, k_row, k_col, v_head, v_row, v_col, out_head, out_row, out_col,
    ELEMENT: tl.constexpr, PRECISION: tl.constexpr, SIDE: tl.constexpr, TC: tl.constexpr, TD: tl.constexpr,
):  # fmt: skip
    head = tl.program_id(1).to(tl.int64)
    block = blocks + 3 * tl.program_id(0)
    first, begin, end = tl.load(block), tl.load(block + 1), tl.load(block + 2)
    queries, channels, values = first + tl.arange(0, SIDE), tl.arange(0, TC), tl.arange(0, TD)
    query = tiles.load(q + head * q_head, queries, channels, q_row, q_col, end, C).to(ELEMENT)
    top = tl.full((SIDE,), float("-inf"), tl.float32)
    total = tl.zeros((SIDE,), tl.float32)
    acc = tl.zeros((SIDE, TD), tl.float32)
    for start in range(begin, end, SIDE):
        keys = start + tl.arange(0, SIDE)
        key = tiles.load(k + head * k_head, keys, channels, k_row, k_col, end, C).to(ELEMENT)
        value = tiles.load(v + head * v_head, keys, values, v_row, v_col, end, D).to(ELEMENT)
        scores = tiles.mma_ABt(tl.zeros((SIDE, SIDE), tl.float32), query, key, PRECISION) * scale
        scores = tiles.right_fill(scores, keys, end, float("-inf"))
        higher = tl.maximum(top, tiles.row_max(scores))
        p = tl.exp2(tiles.sub_col(scores, higher))
        shrink = tl.exp2(top - higher)
        total = total * shrink + tiles.row_sum(p)
        acc = tiles.mma_AB(tiles.mul_col(acc, shrink), p.to(ELEMENT), value, PRECISION)
        top = higher
    tiles.store(out + head * out_head, tiles.div_col(acc, total), queries, values, out_row, out_col, end, D)
