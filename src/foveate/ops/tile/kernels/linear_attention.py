# mypy: allow-untyped-defs
"""Causal linear attention by chunks: one program carries the state of a head for some channels of keys and of values.

Tensors are [heads, tokens, channels], contiguous; out [blocks of key channels, heads, tokens, value channels] holds
what each block of key channels adds. REVERSE walks from the last token to the first.
"""

import triton
import triton.language as tl

from foveate.ops.tile import vocabulary as tiles


@triton.jit
def mix(
    q, k, v, decay, out, N, C, D, REVERSE: tl.constexpr, DECAY: tl.constexpr, ELEMENT: tl.constexpr,
    PRECISION: tl.constexpr, T: tl.constexpr, TC: tl.constexpr, TD: tl.constexpr,
):  # fmt: skip
    head = tl.program_id(0).to(tl.int64)
    channels = tl.program_id(1) * TC + tl.arange(0, TC)
    values = tl.program_id(2) * TD + tl.arange(0, TD)
    q += head * N * C
    k += head * N * C
    v += head * N * D
    decay += head * N
    out += (tl.program_id(1) * tl.num_programs(0) + head) * N * D
    line = tl.arange(0, T)
    state = tl.zeros((TC, TD), tl.float32)
    for start in range(0, N, T):
        steps = start + line
        if REVERSE:
            first, sign = (N - 1).to(tl.int64), -1
        else:
            first, sign = (N * 0).to(tl.int64), 1
        query = tiles.load(q + first * C, steps, channels, sign * C, 1, N, C).to(ELEMENT)
        key = tiles.load(k + first * C, steps, channels, sign * C, 1, N, C).to(ELEMENT)
        value = tiles.load(v + first * D, steps, values, sign * D, 1, N, D).to(ELEMENT)
        scores = tiles.mma_ABt(tl.zeros((T, T), tl.float32), query, key, PRECISION)
        carried = state
        entering = query
        leaving = value
        if DECAY:
            # Reversed, a step's decay is that of the token after it, and the first step has nothing before it.
            at = N - steps if REVERSE else steps
            here = tl.load(decay + at, mask=(steps < N) & (at < N), other=0.0).to(tl.float32)
            since = tl.cumsum(here, 0)
            whole = tl.sum(here, 0)
            apart = tiles.tril(since[:, None] - since[None, :], line, line, float("-inf"))
            scores = scores * tl.exp(apart)
            entering = tiles.mul_col(query.to(tl.float32), tl.exp(since)).to(ELEMENT)
            leaving = tiles.mul_col(value.to(tl.float32), tl.exp(whole - since)).to(ELEMENT)
            carried = state * tl.exp(whole)
        else:
            scores = tiles.tril(scores, line, line, 0.0)
        acc = tiles.mma_AB(tl.zeros((T, TD), tl.float32), scores.to(ELEMENT), value, PRECISION)
        acc = tiles.mma_AB(acc, entering, state.to(ELEMENT), PRECISION)
        tiles.store(out + first * D, acc, steps, values, sign * D, 1, N, D)
        state = tiles.mma_AtB(carried, key, leaving, PRECISION)
