# mypy: allow-untyped-defs
"""out = act(a b + bias) by programs that each take every P-th output tile, in super-M order."""

import triton
import triton.language as tl

from foveate.ops.tile import vocabulary as tiles


@triton.jit
def activate(tile, ACTIVATION: tl.constexpr):
    if ACTIVATION == "relu":
        tile = tl.maximum(tile, 0.0)
    if ACTIVATION == "silu":
        tile = tile / (1.0 + tl.exp(-tile))
    if ACTIVATION == "gelu":
        tile = 0.5 * tile * (1.0 + tl.erf(tile * 0.7071067811865476))
    return tile


@triton.jit
def gemm(
    a, b, bias, pre, out, M, N, K, a_row, a_col, b_row, b_col, group,
    ACTIVATION: tl.constexpr, BIAS: tl.constexpr, KEEP: tl.constexpr, ELEMENT: tl.constexpr, PRECISION: tl.constexpr,
    TM: tl.constexpr, TN: tl.constexpr, TK: tl.constexpr,
):  # fmt: skip
    height, width = tl.cdiv(M, TM), tl.cdiv(N, TN)
    for task in range(tl.program_id(0), height * width, tl.num_programs(0)):
        i, j = tiles.super_m(task, height, width, group)
        rows = i.to(tl.int64) * TM + tl.arange(0, TM)
        cols = j.to(tl.int64) * TN + tl.arange(0, TN)
        acc = tl.zeros((TM, TN), tl.float32)
        for start in range(0, K, TK):
            inner = start + tl.arange(0, TK)
            left = tiles.load(a, rows, inner, a_row, a_col, M, K).to(ELEMENT)
            right = tiles.load(b, inner, cols, b_row, b_col, K, N).to(ELEMENT)
            acc = tiles.mma_AB(acc, left, right, PRECISION)
        if BIAS:
            acc = tiles.add_row(acc, tiles.load_vector(bias, cols, 1, N))
        if KEEP:
            tiles.store(pre, acc, rows, cols, N, 1, M, N)
        tiles.store(out, activate(acc, ACTIVATION), rows, cols, N, 1, M, N)
