# mypy: allow-untyped-defs
"""Residual, dropout and LayerNorm of whole rows; programs take every P-th row, and add up what weights get."""

import triton
import triton.language as tl

from foveate.ops.tile import vocabulary as tiles


@triton.jit
def scramble(x):
    x = (x ^ (x >> 16)) * 0x7FEB352D
    x = (x ^ (x >> 15)) * 0x846CA68B
    return x ^ (x >> 16)


@triton.jit
def kept(row, cols, seed, threshold):
    """Whether dropout keeps an element, as `foveate.ops.tile.layer_norm.kept` says it."""
    line = scramble((row + cols * 0).to(tl.uint32) ^ scramble(seed.to(tl.uint32)))
    return (scramble(cols.to(tl.uint32) ^ line) >> 8).to(tl.int32) >= threshold


@triton.jit
def forward(
    x, residual, weight, bias, seed, y, total, mean, rstd, ROWS, C, eps, threshold, gain,
    DROP: tl.constexpr, TC: tl.constexpr,
):  # fmt: skip
    cols = tl.arange(0, TC)
    scale, shift = tiles.load_vector(weight, cols, 1, C), tiles.load_vector(bias, cols, 1, C)
    for row in range(tl.program_id(0).to(tl.int64), ROWS, tl.num_programs(0)):
        at = row * C
        line = tiles.load_vector(x + at, cols, 1, C)
        if DROP:
            line = tl.where(kept(row, cols, tl.load(seed), threshold), line * gain, 0.0)
        line += tiles.load_vector(residual + at, cols, 1, C)
        middle = tl.sum(line, 0) / C
        off = tl.where(cols < C, line - middle, 0.0)
        inverse = 1.0 / tl.sqrt(tl.sum(off * off, 0) / C + eps)
        tiles.store_vector(total + at, line, cols, 1, C)
        tiles.store_vector(y + at, off * inverse * scale + shift, cols, 1, C)
        tl.store(mean + row, middle)
        tl.store(rstd + row, inverse)


@triton.jit
def backward(
    total, weight, mean, rstd, seed, dy, dtotal, dx, dresidual, dweight, dbias, ROWS, C, threshold, gain,
    DROP: tl.constexpr, TC: tl.constexpr,
):  # fmt: skip
    cols = tl.arange(0, TC)
    scale = tiles.load_vector(weight, cols, 1, C)
    scale_acc, shift_acc = tl.zeros((TC,), tl.float32), tl.zeros((TC,), tl.float32)
    for row in range(tl.program_id(0).to(tl.int64), ROWS, tl.num_programs(0)):
        at = row * C
        inverse = tl.load(rstd + row)
        normal = tiles.load_vector(total + at, cols, 1, C) - tl.load(mean + row)
        normal = tl.where(cols < C, normal, 0.0) * inverse
        upstream = tiles.load_vector(dy + at, cols, 1, C)
        scale_acc += upstream * normal
        shift_acc += upstream
        inner = upstream * scale
        line = (inner - tl.sum(inner, 0) / C - normal * (tl.sum(inner * normal, 0) / C)) * inverse
        line += tiles.load_vector(dtotal + at, cols, 1, C)
        tiles.store_vector(dresidual + at, line, cols, 1, C)
        if DROP:
            line = tl.where(kept(row, cols, tl.load(seed), threshold), line * gain, 0.0)
        tiles.store_vector(dx + at, line, cols, 1, C)
    mine = tl.program_id(0) * C
    tiles.store_vector(dweight + mine, scale_acc, cols, 1, C)
    tiles.store_vector(dbias + mine, shift_acc, cols, 1, C)
