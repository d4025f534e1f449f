# mypy: allow-untyped-defs
"""Attention by blocks of queries and keys, forward and backward; scores and their sums in base 2.

Every tensor is [heads, tokens, channels], contiguous. `scale` holds log2(e); `count` [heads] says how many keys count.
"""

import triton
import triton.language as tl

from foveate.ops.tile import vocabulary as tiles


@triton.jit
def masked(scores, queries, keys, count, CAUSAL: tl.constexpr):
    scores = tiles.right_fill(scores, keys, count, float("-inf"))
    if CAUSAL:
        scores = tiles.tril(scores, queries, keys, float("-inf"))
    return scores


@triton.jit
def forward(
    q, k, v, count, out, lse, N, M, scale, C, D, CAUSAL: tl.constexpr, ELEMENT: tl.constexpr, PRECISION: tl.constexpr,
    TN: tl.constexpr, TM: tl.constexpr, TC: tl.constexpr, TD: tl.constexpr,
):  # fmt: skip
    head = tl.program_id(1).to(tl.int64)
    first = tl.program_id(0) * TN
    queries, channels, values = first + tl.arange(0, TN), tl.arange(0, TC), tl.arange(0, TD)
    keys_there = tl.load(count + head)
    query = tiles.load(q + head * N * C, queries, channels, C, 1, N, C).to(ELEMENT)
    top = tl.full((TN,), float("-inf"), tl.float32)
    total = tl.zeros((TN,), tl.float32)
    acc = tl.zeros((TN, TD), tl.float32)
    stop = tl.minimum(keys_there, first + TN) if CAUSAL else keys_there
    for start in range(0, stop, TM):
        keys = start + tl.arange(0, TM)
        key = tiles.load(k + head * M * C, keys, channels, C, 1, M, C).to(ELEMENT)
        value = tiles.load(v + head * M * D, keys, values, D, 1, M, D).to(ELEMENT)
        scores = tiles.mma_ABt(tl.zeros((TN, TM), tl.float32), query, key, PRECISION) * scale
        scores = masked(scores, queries, keys, keys_there, CAUSAL)
        higher = tl.maximum(top, tiles.row_max(scores))
        base = tl.where(higher == float("-inf"), 0.0, higher)  # -inf minus -inf is no number
        p = tl.exp2(tiles.sub_col(scores, base))
        shrink = tl.exp2(top - base)
        total = total * shrink + tiles.row_sum(p)
        acc = tiles.mma_AB(tiles.mul_col(acc, shrink), p.to(ELEMENT), value, PRECISION)
        top = higher
    seen = total > 0  # a row without keys is zero
    acc = tiles.div_col(acc, tl.where(seen, total, 1.0))
    tiles.store(out + head * N * D, acc, queries, values, D, 1, N, D)
    tiles.store_vector(lse + head * N, tl.where(seen, top + tl.log2(tl.where(seen, total, 1.0)), 0.0), queries, 1, N)


@triton.jit
def backward_queries(
    q, k, v, count, dout, lse, delta, dq, N, M, scale, natural, C, D,
    CAUSAL: tl.constexpr, ELEMENT: tl.constexpr, PRECISION: tl.constexpr,
    TN: tl.constexpr, TM: tl.constexpr, TC: tl.constexpr, TD: tl.constexpr,
):  # fmt: skip
    head = tl.program_id(1).to(tl.int64)
    first = tl.program_id(0) * TN
    queries, channels, values = first + tl.arange(0, TN), tl.arange(0, TC), tl.arange(0, TD)
    keys_there = tl.load(count + head)
    query = tiles.load(q + head * N * C, queries, channels, C, 1, N, C).to(ELEMENT)
    grad = tiles.load(dout + head * N * D, queries, values, D, 1, N, D).to(ELEMENT)
    row_lse = tiles.load_vector(lse + head * N, queries, 1, N)
    row_delta = tiles.load_vector(delta + head * N, queries, 1, N)
    acc = tl.zeros((TN, TC), tl.float32)
    stop = tl.minimum(keys_there, first + TN) if CAUSAL else keys_there
    for start in range(0, stop, TM):
        keys = start + tl.arange(0, TM)
        key = tiles.load(k + head * M * C, keys, channels, C, 1, M, C).to(ELEMENT)
        value = tiles.load(v + head * M * D, keys, values, D, 1, M, D).to(ELEMENT)
        scores = tiles.mma_ABt(tl.zeros((TN, TM), tl.float32), query, key, PRECISION) * scale
        p = tl.exp2(tiles.sub_col(masked(scores, queries, keys, keys_there, CAUSAL), row_lse))
        dp = tiles.mma_ABt(tl.zeros((TN, TM), tl.float32), grad, value, PRECISION)
        ds = p * tiles.sub_col(dp, row_delta)
        acc = tiles.mma_AB(acc, ds.to(ELEMENT), key, PRECISION)
    tiles.store(dq + head * N * C, acc * natural, queries, channels, C, 1, N, C)


@triton.jit
def backward_keys(
    q, k, v, count, dout, lse, delta, dk, dv, N, M, scale, natural, C, D,
    CAUSAL: tl.constexpr, ELEMENT: tl.constexpr, PRECISION: tl.constexpr,
    TN: tl.constexpr, TM: tl.constexpr, TC: tl.constexpr, TD: tl.constexpr,
):  # fmt: skip
    head = tl.program_id(1).to(tl.int64)
    first = tl.program_id(0) * TM
    keys, channels, values = first + tl.arange(0, TM), tl.arange(0, TC), tl.arange(0, TD)
    keys_there = tl.load(count + head)
    key = tiles.load(k + head * M * C, keys, channels, C, 1, M, C).to(ELEMENT)
    value = tiles.load(v + head * M * D, keys, values, D, 1, M, D).to(ELEMENT)
    key_acc = tl.zeros((TM, TC), tl.float32)
    value_acc = tl.zeros((TM, TD), tl.float32)
    begin = first // TN * TN if CAUSAL else 0
    for start in range(begin, N, TN):
        queries = start + tl.arange(0, TN)
        query = tiles.load(q + head * N * C, queries, channels, C, 1, N, C).to(ELEMENT)
        grad = tiles.load(dout + head * N * D, queries, values, D, 1, N, D).to(ELEMENT)
        row_lse = tiles.load_vector(lse + head * N, queries, 1, N)
        row_delta = tiles.load_vector(delta + head * N, queries, 1, N)
        scores = tiles.mma_ABt(tl.zeros((TN, TM), tl.float32), query, key, PRECISION) * scale
        p = tl.exp2(tiles.sub_col(masked(scores, queries, keys, keys_there, CAUSAL), row_lse))
        value_acc = tiles.mma_AtB(value_acc, p.to(ELEMENT), grad, PRECISION)
        dp = tiles.mma_ABt(tl.zeros((TN, TM), tl.float32), grad, value, PRECISION)
        ds = p * tiles.sub_col(dp, row_delta)
        key_acc = tiles.mma_AtB(key_acc, ds.to(ELEMENT), query, PRECISION)
    tiles.store(dk + head * M * C, key_acc * natural, keys, channels, C, 1, M, C)
    tiles.store(dv + head * M * D, value_acc, keys, values, D, 1, M, D)
