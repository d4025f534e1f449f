# mypy: allow-untyped-defs
"""The words that tile kernels are written in (ThunderKittens' names, on Triton).

A tile [R, C] is a block of numbers that one program holds; a column vector [R] has one number per row of it, a row
vector [C] one per column. A place in memory is a pointer with the distances between rows and between columns, and
`rows`, `cols` say which of them a tile is about; whatever lies outside height x width reads as zero and is not written.

    ThunderKittens                      here
    load, store (with bounds)           load, store, load_vector, store_vector
    mma_AB, mma_ABt, mma_AtB            the same, accumulator first, sums in float32
    {add,sub,mul,div}_row(t, v)         the same: v [C] with every row
    {add,sub,mul,div}_col(t, v)         the same: v [R] with every column
    row_max, row_sum, col_sum           the same: along a row -> [R], along a column -> [C]
    tril, right_fill                    the same, by positions, so that tiles off the diagonal need no other kernel
    persistent grid, super-M order      tasks of a program by `for t in range(pid, T, programs)`, place by `super_m`
    stages, warps, swizzled layouts     left to the compiler (num_stages, num_warps)

Tiles in half precision stay so on a GPU, where its matrix units take them; `element` names the type to convert to after
loading. The interpreter cannot compute in bfloat16, so there it is float32.
"""

import torch
import triton
import triton.language as tl

LOG2_E = 1.4426950408889634
"""exp(x) = exp2(x * LOG2_E); hardware has exp2."""


def element(tensor: torch.Tensor) -> tl.dtype:
    """The type that tiles of this tensor are multiplied in."""
    on_gpu = {torch.float16: tl.float16, torch.bfloat16: tl.bfloat16}
    return on_gpu.get(tensor.dtype, tl.float32) if tensor.is_cuda else tl.float32


def precision() -> str:
    """How products of float32 tiles are formed: as PyTorch's own matrix products are."""
    return "tf32" if torch.backends.cuda.matmul.allow_tf32 else "ieee"


# ------------------------------------------------------------------ memory


@triton.jit
def load(place, rows, cols, row_stride, col_stride, height, width):
    inside = (rows < height)[:, None] & (cols < width)[None, :]
    return tl.load(place + rows[:, None] * row_stride + cols[None, :] * col_stride, mask=inside, other=0.0)


@triton.jit
def store(place, tile, rows, cols, row_stride, col_stride, height, width):
    inside = (rows < height)[:, None] & (cols < width)[None, :]
    at = place + rows[:, None] * row_stride + cols[None, :] * col_stride
    tl.store(at, tile.to(place.dtype.element_ty), mask=inside)


@triton.jit
def load_vector(place, items, stride, length):
    return tl.load(place + items * stride, mask=items < length, other=0.0).to(tl.float32)


@triton.jit
def store_vector(place, vector, items, stride, length):
    tl.store(place + items * stride, vector.to(place.dtype.element_ty), mask=items < length)


# ------------------------------------------------------------------ products


@triton.jit
def mma_AB(acc, a, b, PRECISION: tl.constexpr):
    return tl.dot(a, b, acc, input_precision=PRECISION)


@triton.jit
def mma_ABt(acc, a, b, PRECISION: tl.constexpr):
    return tl.dot(a, tl.trans(b), acc, input_precision=PRECISION)


@triton.jit
def mma_AtB(acc, a, b, PRECISION: tl.constexpr):
    return tl.dot(tl.trans(a), b, acc, input_precision=PRECISION)


# ------------------------------------------------------------------ a vector with every row, or with every column


@triton.jit
def add_row(tile, vector):
    return tile + vector[None, :]


@triton.jit
def sub_row(tile, vector):
    return tile - vector[None, :]


@triton.jit
def mul_row(tile, vector):
    return tile * vector[None, :]


@triton.jit
def div_row(tile, vector):
    return tile / vector[None, :]


@triton.jit
def add_col(tile, vector):
    return tile + vector[:, None]


@triton.jit
def sub_col(tile, vector):
    return tile - vector[:, None]


@triton.jit
def mul_col(tile, vector):
    return tile * vector[:, None]


@triton.jit
def div_col(tile, vector):
    return tile / vector[:, None]


# ------------------------------------------------------------------ reductions and masks


@triton.jit
def row_max(tile):
    return tl.max(tile, 1)


@triton.jit
def row_sum(tile):
    return tl.sum(tile, 1)


@triton.jit
def col_sum(tile):
    return tl.sum(tile, 0)


@triton.jit
def tril(tile, rows, cols, fill):
    return tl.where(rows[:, None] >= cols[None, :], tile, fill)


@triton.jit
def right_fill(tile, cols, first, fill):
    return tl.where(cols[None, :] < first, tile, fill)


# ------------------------------------------------------------------ which tile is whose


@triton.jit
def super_m(task, height, width, group):
    """Row and column of a task, as `foveate.ops.thunderkittens.super_m` has them."""
    block = task // (group * width)
    rows = tl.minimum(group, height - block * group)
    within = task - block * group * width
    return block * group + within % rows, within // rows
