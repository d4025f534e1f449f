# mypy: allow-untyped-defs
"""The selective scan of some channels of a sequence by one program, its states [channels, N] in registers.

Forward keeps the state before every T-th token in `starts`. Backward walks over the chunks from the last to the first:
it runs a chunk forward again from there, leaves its states in `scratch`, and then goes back through them.
"""

import triton
import triton.language as tl

from foveate.ops.tile import vocabulary as tiles

LOG2_E = tl.constexpr(1.4426950408889634)


@triton.jit
def decays(delta, a):
    return tl.exp2(tiles.mul_col(a, delta) * LOG2_E)


@triton.jit
def forward(
    u, delta, a, b, c, y, starts, L, D, N, chunks, T: tl.constexpr, TD: tl.constexpr, TN: tl.constexpr,
):  # fmt: skip
    picture = tl.program_id(0).to(tl.int64)
    channels, states = tl.program_id(1) * TD + tl.arange(0, TD), tl.arange(0, TN)
    rates = tiles.load(a, channels, states, N, 1, D, N).to(tl.float32)
    h = tl.zeros((TD, TN), tl.float32)
    for chunk in range(chunks):
        tiles.store(starts + (picture * chunks + chunk) * D * N, h, channels, states, N, 1, D, N)
        for t in range(chunk * T, tl.minimum(L, chunk * T + T)):
            at = picture * L + t
            step = tiles.load_vector(delta + at * D, channels, 1, D)
            x = tiles.load_vector(u + at * D, channels, 1, D) * step
            into = tiles.load_vector(b + at * N, states, 1, N)
            out_of = tiles.load_vector(c + at * N, states, 1, N)
            h = decays(step, rates) * h + x[:, None] * into[None, :]
            tiles.store_vector(y + at * D, tiles.row_sum(tiles.mul_row(h, out_of)), channels, 1, D)


@triton.jit
def backward(
    u, delta, a, b, c, dy, starts, scratch, du, ddelta, da, db, dc, L, D, N, chunks,
    T: tl.constexpr, TD: tl.constexpr, TN: tl.constexpr,
):  # fmt: skip
    picture = tl.program_id(0).to(tl.int64)
    block = tl.program_id(1)
    channels, states = block * TD + tl.arange(0, TD), tl.arange(0, TN)
    rates = tiles.load(a, channels, states, N, 1, D, N).to(tl.float32)
    mine = scratch + picture * T * D * N
    rate_acc = tl.zeros((TD, TN), tl.float32)
    g = tl.zeros((TD, TN), tl.float32)
    for back in range(chunks):
        chunk = chunks - 1 - back
        first = chunk * T
        h = tiles.load(starts + (picture * chunks + chunk) * D * N, channels, states, N, 1, D, N)
        last = tl.minimum(L, first + T)
        for t in range(first, last):
            at = picture * L + t
            tiles.store(mine + (t - first) * D * N, h, channels, states, N, 1, D, N)
            step = tiles.load_vector(delta + at * D, channels, 1, D)
            x = tiles.load_vector(u + at * D, channels, 1, D) * step
            into = tiles.load_vector(b + at * N, states, 1, N)
            h = decays(step, rates) * h + x[:, None] * into[None, :]
        tl.debug_barrier()  # what one thread wrote, another may read
        for i in range(last - first):
            t = last - 1 - i
            at = picture * L + t
            step = tiles.load_vector(delta + at * D, channels, 1, D)
            content = tiles.load_vector(u + at * D, channels, 1, D)
            into = tiles.load_vector(b + at * N, states, 1, N)
            out_of = tiles.load_vector(c + at * N, states, 1, N)
            upstream = tiles.load_vector(dy + at * D, channels, 1, D)
            before = tiles.load(mine + (t - first) * D * N, channels, states, N, 1, D, N)
            kept = decays(step, rates)
            h = kept * before + (content * step)[:, None] * into[None, :]
            g += upstream[:, None] * out_of[None, :]
            part = (tl.program_id(0) * tl.num_programs(1) + block).to(tl.int64) * L + t
            tiles.store_vector(dc + part * N, tiles.col_sum(tiles.mul_col(h, upstream)), states, 1, N)
            tiles.store_vector(db + part * N, tiles.col_sum(tiles.mul_col(g, content * step)), states, 1, N)
            dx = tiles.row_sum(tiles.mul_row(g, into))
            dlog = g * kept * before
            rate_acc += tiles.mul_col(dlog, step)
            tiles.store_vector(du + at * D, dx * step, channels, 1, D)
            tiles.store_vector(ddelta + at * D, dx * content + tiles.row_sum(dlog * rates), channels, 1, D)
            g = g * kept
        tl.debug_barrier()
    tiles.store(da + picture * D * N, rate_acc, channels, states, N, 1, D, N)
