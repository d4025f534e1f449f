# mypy: allow-untyped-defs
"""Rotary positions: each program turns some tokens of one head."""

import triton
import triton.language as tl

from foveate.ops.tile import vocabulary as tiles


@triton.jit
def rotate(x, cosine, sine, out, N, HALF, sign, TN: tl.constexpr, TH: tl.constexpr):
    head = tl.program_id(1).to(tl.int64)
    tokens, pairs = tl.program_id(0) * TN + tl.arange(0, TN), tl.arange(0, TH)
    x += head * N * 2 * HALF
    out += head * N * 2 * HALF
    first = tiles.load(x, tokens, pairs, 2 * HALF, 1, N, HALF).to(tl.float32)
    second = tiles.load(x + HALF, tokens, pairs, 2 * HALF, 1, N, HALF).to(tl.float32)
    cos = tiles.load(cosine, tokens, pairs, HALF, 1, N, HALF).to(tl.float32)
    sin = tiles.load(sine, tokens, pairs, HALF, 1, N, HALF).to(tl.float32) * sign
    tiles.store(out, first * cos - second * sin, tokens, pairs, 2 * HALF, 1, N, HALF)
    tiles.store(out + HALF, second * cos + first * sin, tokens, pairs, 2 * HALF, 1, N, HALF)
