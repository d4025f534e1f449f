"""Triton's kernels against the references, forward and backward, through its interpreter (or on a GPU)."""

from functools import partial

import pytest
import torch

from foveate.errors import InputError
from foveate.ops import tile
from foveate.ops.tile import selective_scan as scan_module
from foveate.ops.tile.attention import attention, attention_reference
from foveate.ops.tile.gemm import gemm, gemm_reference
from foveate.ops.tile.layer_norm import add_dropout_norm, add_dropout_norm_reference
from foveate.ops.tile.linear_attention import linear_attention, linear_attention_reference
from foveate.ops.tile.rotary import angles, rotary, rotary_reference
from foveate.ops.tile.selective_scan import selective_scan, selective_scan_reference

# The reference runs in float32 on the same numbers; both are compared relative to the largest entry.
TOLERANCE = {torch.float32: 3e-6, torch.float16: 2e-3, torch.bfloat16: 2e-2}
TYPES = pytest.mark.parametrize("dtype", TOLERANCE, ids=str)


def agree(kernel, reference, shapes, dtype, device, backward=True, scale=1.0):
    """Values and gradients of both for random inputs, or inputs made by callables."""
    generator = torch.Generator().manual_seed(0)
    made = [s(generator) if callable(s) else torch.randn(*s, generator=generator) * scale for s in shapes]
    inputs = [t.to(device, dtype).requires_grad_(backward) for t in made]
    wide = [t.detach().float().requires_grad_(backward) for t in inputs]
    assert tile.on_triton(*inputs)
    results = []
    for fn, given in ((kernel, inputs), (reference, wide)):
        y = fn(*given)
        y = y if isinstance(y, tuple) else (y,)
        upstream = [torch.randn(t.shape, generator=torch.Generator().manual_seed(1)).to(t) for t in y]
        results.append([*y, *(torch.autograd.grad(y, given, upstream) if backward else ())])
    for ours, theirs in zip(*results, strict=True):
        assert ours.dtype == dtype
        assert ours.shape == theirs.shape
        worst = float((ours.float() - theirs).detach().abs().max() / theirs.detach().abs().max().clamp(min=1))
        assert worst <= TOLERANCE[dtype], worst


@TYPES
def test_gemm(interpreted, dtype):
    agree(gemm, gemm_reference, [(2, 18, 40), (40, 33)], dtype, interpreted)


@pytest.mark.parametrize("activation", ["relu", "silu", "gelu"])
def test_gemm_with_bias_and_activation(interpreted, activation):
    both = (partial(f, activation=activation) for f in (gemm, gemm_reference))
    agree(*both, [(20, 17), (17, 37), (37,)], torch.float32, interpreted)


def test_programs_of_gemm_take_several_tiles_in_groups(interpreted):
    agree(gemm, gemm_reference, [(130, 8), (8, 70)], torch.float32, interpreted, backward=False)


@TYPES
@pytest.mark.parametrize("causal", [False, True])
def test_attention(interpreted, dtype, causal):
    both = (partial(f, causal=causal) for f in (attention, attention_reference))
    agree(*both, [(1, 1, 40, 12), (1, 1, 45, 12), (1, 1, 45, 20)], dtype, interpreted)


def test_attention_of_rows_without_keys_is_zero(interpreted):
    lengths = torch.tensor([0, 3], device=interpreted)
    both = (partial(f, lengths=lengths) for f in (attention, attention_reference))
    agree(*both, [(2, 1, 5, 8), (2, 1, 35, 8), (2, 1, 35, 8)], torch.float32, interpreted)
    empty = attention(*(torch.rand(2, 1, 5, 8, device=interpreted) for _ in range(3)), lengths=lengths)
    assert (empty[0] == 0).all()


@TYPES
def test_linear_attention(interpreted, dtype):
    agree(linear_attention, linear_attention_reference, [(1, 1, 40, 12)] * 2 + [(1, 1, 40, 20)], dtype, interpreted)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_linear_attention_with_decay(interpreted, dtype):
    def decay(generator):
        return -torch.rand(1, 1, 40, generator=generator)

    shapes = [(1, 1, 40, 12), (1, 1, 40, 12), (1, 1, 40, 8), decay]
    agree(linear_attention, linear_attention_reference, shapes, dtype, interpreted, scale=0.5)


def test_linear_attention_of_keys_wider_than_a_tile(interpreted):
    shapes = [(1, 1, 20, 70)] * 2 + [(1, 1, 20, 8)]
    agree(linear_attention, linear_attention_reference, shapes, torch.float32, interpreted, backward=False)


@TYPES
def test_selective_scan_over_several_chunks(interpreted, dtype, monkeypatch):
    monkeypatch.setattr(scan_module, "CHUNK", {"cpu": 2, "cuda": 2})
    shapes = [
        (1, 3, 18),
        lambda g: torch.rand(1, 3, 18, generator=g),
        lambda g: -torch.rand(18, 3, generator=g),
        (1, 3, 3),
        (1, 3, 3),
        (18,),
    ]
    agree(selective_scan, selective_scan_reference, shapes, dtype, interpreted)


@TYPES
@pytest.mark.parametrize("dropout", [0.0, 0.4])
def test_residual_dropout_and_norm(interpreted, dtype, dropout):
    seed = torch.tensor([2**31 - 9], device=interpreted)
    kernel = partial(add_dropout_norm, dropout=dropout, seed=seed)
    reference = partial(add_dropout_norm_reference, dropout=dropout, seed=seed)
    agree(kernel, reference, [(5, 21), (5, 21), (21,), (21,)], dtype, interpreted)


@TYPES
def test_rotary(interpreted, dtype):
    cosine, sine = angles(35, 12, device=interpreted)
    both = (partial(f, cosine=cosine, sine=sine) for f in (rotary, rotary_reference))
    agree(*both, [(1, 2, 35, 12)], dtype, interpreted)


def test_the_interpreter_is_used_only_when_asked():
    assert not tile.on_triton(torch.ones(1))
    assert not tile.on_triton(torch.ones(1, dtype=torch.float64))


def test_a_compiling_triton_cannot_interpret(monkeypatch):
    monkeypatch.setattr(tile, "_interpreter_there", lambda: False)
    with pytest.raises(InputError, match="TRITON_INTERPRET=1"), tile.interpreting():
        pass
