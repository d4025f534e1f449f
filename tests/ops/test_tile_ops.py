"""The operators of `foveate.ops.tile` on the CPU: laws, gradients, and the compiled loops against the references."""

import runpy
import sys
from functools import partial
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from foveate.errors import InputError
from foveate.ops import tile, use
from foveate.ops.thunderkittens import conformance_example
from foveate.ops.tile.attention import attention, attention_reference
from foveate.ops.tile.gemm import gemm
from foveate.ops.tile.layer_norm import add_dropout_norm, kept
from foveate.ops.tile.linear_attention import (
    linear_attention,
    linear_attention_recurrent,
    linear_attention_reference,
    taylor_features,
)
from foveate.ops.tile.rotary import angles, rotary
from foveate.ops.tile.selective_scan import selective_scan, selective_scan_reference


def random(*shapes, seed=0, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(*shape, generator=generator, dtype=dtype).requires_grad_() for shape in shapes]


def gradients(fn, inputs):
    y = fn(*inputs)
    y = torch.cat([t.flatten() for t in y]) if isinstance(y, tuple) else y
    return [y, *torch.autograd.grad(y.sin().sum(), inputs)]


@settings(deadline=None, max_examples=30)
@given(n=st.integers(1, 20), chunk=st.integers(1, 25), decays=st.booleans(), seed=st.integers(0, 99))
def test_chunks_of_any_size_give_the_matrix_of_all_weights_and_the_recurrence(n, chunk, decays, seed):
    q, k, v, g = random((2, 1, n, 3), (2, 1, n, 3), (2, 1, n, 4), (2, 1, n), seed=seed)
    inputs = [q, k, v, (-g.detach().abs()).requires_grad_()] if decays else [q, k, v]
    ours = gradients(lambda *a: linear_attention(*a, chunk=chunk), inputs)
    torch.testing.assert_close(ours, gradients(linear_attention_reference, inputs))
    torch.testing.assert_close(ours, gradients(linear_attention_recurrent, inputs))


def test_long_decays_do_not_overflow():
    q, k, v = random((1, 1, 300, 2), (1, 1, 300, 2), (1, 1, 300, 2), dtype=torch.float32)
    decay = torch.full((1, 1, 300), -20.0)
    torch.testing.assert_close(linear_attention(q, k, v, decay), (q * k).sum(-1, keepdim=True) * v)


def test_normalised_taylor_features_are_near_softmax_where_scores_are_small():
    q, k, v = (t.detach() for t in random((1, 2, 9, 4), (1, 2, 9, 4), (1, 2, 9, 3)))
    q, k = 0.3 * q, 0.3 * k
    features = taylor_features(q), taylor_features(k)
    s = (q @ k.mT) / 2
    torch.testing.assert_close(features[0] @ features[1].mT, 1 + s + s**2 / 2)
    near = linear_attention(*features, v, normalize=True)
    torch.testing.assert_close(near, attention_reference(q, k, v, causal=True), atol=2e-3, rtol=0)


@settings(deadline=None, max_examples=25)
@given(
    b=st.integers(1, 2), length=st.integers(1, 70), d=st.integers(1, 35), n=st.integers(1, 9), seed=st.integers(0, 99)
)
def test_the_compiled_scan_equals_the_reference(b, length, d, n, seed):
    shapes = ((b, length, d), (b, length, d), (d, n), (b, length, n), (b, length, n), (d,))
    u, delta, a, into, out_of, skip = (t.detach() for t in random(*shapes, seed=seed, dtype=torch.float32))
    inputs = [t.requires_grad_() for t in (u, delta.abs(), -a.exp(), into, out_of, skip)]
    ours, theirs = (gradients(f, inputs) for f in (selective_scan, selective_scan_reference))
    torch.testing.assert_close(ours, theirs, atol=2e-4, rtol=1e-4)


def test_one_rate_per_head_is_linear_attention_with_decay():
    x, into, out_of = (t.detach() for t in random((1, 12, 5), (1, 12, 3), (1, 12, 3)))
    delta = torch.rand(1, 12, 1, dtype=torch.float64)
    y = selective_scan(x, delta.expand_as(x), torch.full((5, 3), -0.7, dtype=torch.float64), into, out_of)
    mixed = linear_attention(out_of[:, None], into[:, None], (delta * x)[:, None], -0.7 * delta[:, None, :, 0])
    torch.testing.assert_close(mixed[:, 0], y)


def test_scanning_with_steps_of_zero_keeps_the_state():
    ones = torch.ones(1, 4, 1)
    delta = torch.tensor([2.0, 0.0, 0.0, 1.0]).view(1, 4, 1)
    y = selective_scan(ones, delta, torch.tensor([[-1e4]]), ones, ones)
    assert y.flatten().tolist() == pytest.approx([2, 2, 2, 1])


@settings(deadline=None, max_examples=25)
@given(n=st.integers(1, 9), m=st.integers(1, 9), causal=st.booleans(), seed=st.integers(0, 99))
def test_attention_is_softmax_of_scores(n, m, causal, seed):
    q, k, v = random((2, 1, n, 4), (2, 1, m, 4), (2, 1, m, 3), seed=seed)
    both = (partial(f, causal=causal) for f in (attention, attention_reference))
    torch.testing.assert_close(*(gradients(f, (q, k, v)) for f in both))


def test_keys_beyond_the_lengths_do_not_count_and_no_key_gives_zero():
    q, k, v = random((2, 1, 3, 4), (2, 1, 5, 4), (2, 1, 5, 4))
    y, dq, _, dv = gradients(lambda *a: attention(*a, lengths=torch.tensor([2, 0])), (q, k, v))
    torch.testing.assert_close(y[:1], attention_reference(q[:1], k[:1, :, :2], v[:1, :, :2]))
    assert (y[1] == 0).all()
    assert torch.isfinite(dq).all()
    assert (dv[1] == 0).all()
    assert (dv[0, 0, 2:] == 0).all()


def test_rotary_products_depend_on_the_distance_alone():
    x = torch.randn(6, dtype=torch.float64)
    cosine, sine = angles(8, 6, base=100.0)
    turned = rotary(x.expand(1, 1, 8, 6), cosine, sine)[0, 0]
    products = turned @ turned.T
    for distance in range(8):
        line = products.diagonal(distance)
        torch.testing.assert_close(line, line[:1].expand_as(line), atol=1e-5, rtol=0)
    torch.testing.assert_close(turned[0], x)


@settings(deadline=None, max_examples=25)
@given(rows=st.integers(1, 30), width=st.integers(2, 40), share=st.floats(0.05, 0.95), seed=st.integers(0, 2**31 - 1))
def test_the_compiled_norm_drops_and_normalises_as_the_reference(rows, width, share, seed):
    inputs = random((rows, width), (rows, width), (width,), (width,), dtype=torch.float32)
    results = []
    for path in ("fast", "reference"):
        with use(path):
            results.append(gradients(lambda *a: add_dropout_norm(*a, dropout=share, seed=seed, eps=0.1), inputs))
    torch.testing.assert_close(*results, atol=2e-4, rtol=2e-4)


def test_dropout_keeps_its_share_without_pattern():
    mask = kept(1000, 500, 0.3, torch.tensor([4])).double()
    assert float(mask.mean()) == pytest.approx(0.7, abs=0.003)
    centred = mask - 0.7
    for near in (centred[1:] * centred[:-1], centred[:, 1:] * centred[:, :-1]):
        assert abs(float(near.mean()) / 0.21) < 0.01
    assert not torch.equal(mask, kept(1000, 500, 0.3, torch.tensor([5])).double())


def test_without_dropout_it_is_layer_norm_of_the_sum_and_with_all_dropped_of_the_residual():
    x, residual, weight, bias = random((4, 6), (4, 6), (6,), (6,), dtype=torch.float32)
    y, total = add_dropout_norm(x, residual, weight, bias)
    torch.testing.assert_close(y, F.layer_norm(x + residual, (6,), weight, bias))
    torch.testing.assert_close(total, x + residual)
    torch.testing.assert_close(add_dropout_norm(x, residual, weight, bias, dropout=1.0)[1], residual)


def test_a_seed_not_given_is_drawn_from_pytorch():
    x, residual = torch.ones(4, 50), torch.zeros(4, 50)
    draws = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        draws.append(add_dropout_norm(x, residual, torch.ones(50), torch.zeros(50), dropout=0.5)[1])
    assert torch.equal(draws[0], draws[1])
    assert not torch.equal(draws[0], draws[2])


def test_gradients_of_the_references_are_those_of_finite_differences():
    check = torch.autograd.gradcheck
    q, k, v, g = random((1, 1, 5, 2), (1, 1, 5, 2), (1, 1, 5, 3), (1, 1, 5))
    assert check(lambda *a: linear_attention(*a, chunk=2), (q, k, v, (-g.detach().abs()).requires_grad_()))
    assert torch.autograd.gradgradcheck(lambda *a: linear_attention(*a, chunk=2), (q, k, v))
    assert check(lambda *a: attention_reference(*a, causal=True, lengths=torch.tensor([3])), (q, k, v))
    a, b, bias = random((3, 2), (2, 4), (4,))
    assert check(lambda *t: gemm(*t, activation="gelu"), (a, b, bias))
    u, into, out_of, rates = random((1, 4, 2), (1, 4, 3), (1, 4, 3), (2, 3))
    assert check(selective_scan_reference, (u, u.detach().abs().requires_grad_(), rates, into, out_of))
    x, residual, weight, shift = random((3, 4), (3, 4), (4,), (4,))
    assert check(lambda *t: add_dropout_norm(*t, dropout=0.3, seed=3), (x, residual, weight, shift))
    assert check(lambda t: rotary(t, *angles(5, 2)), (q,))
    call, inputs = conformance_example()
    assert check(call, inputs)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda t: gemm(t(2, 3), t(4, 5)), r"\(2, 3\) and \(4, 5\)"),
        (lambda t: gemm(t(2, 3), t(3, 5), t(4)), r"bias \[5\].*\(4,\)"),
        (lambda t: gemm(t(2, 3), t(3, 5).double()), "float32 and torch.float64"),
        (lambda t: gemm(t(2, 3), t(3, 5), activation="tanh"), "unknown activation 'tanh'.*'relu'"),
        (lambda t: attention(t(1, 1, 2, 3), t(1, 1, 2, 4), t(1, 1, 2, 3)), r"\(1, 1, 2, 4\)"),
        (lambda t: attention(*[t(1, 1, 2, 3)] * 3, lengths=torch.tensor([3])), r"0 to 2 keys, got \[3\]"),
        (lambda t: linear_attention(t(2, 3), t(2, 3), t(2, 3)), r"got \(2, 3\)"),
        (lambda t: linear_attention(*[t(1, 1, 2, 3)] * 3, decay=t(1, 2)), r"\(1, 1, 2\), got \(1, 2\)"),
        (lambda t: linear_attention(*[t(1, 1, 2, 3)] * 3, chunk=0), "got 0"),
        (lambda t: selective_scan(t(1, 2, 3), t(1, 2, 3), t(4, 5), t(1, 2, 5), t(1, 2, 5)), r"\(4, 5\)"),
        (lambda t: selective_scan(*[t(1, 2, 1)] * 2, t(1, 1), *[t(1, 2, 1)] * 2, t(2)), r"skip is \[1\].*\(2,\)"),
        (lambda t: add_dropout_norm(t(2, 3), t(2, 4), t(3), t(3)), r"\(2, 4\)"),
        (lambda t: add_dropout_norm(t(2, 3), t(2, 3), t(3), t(3), dropout=1.5), "got 1.5"),
        (lambda t: rotary(t(1, 1, 2, 3), t(2, 1), t(2, 1)), r"C even.*\(1, 1, 2, 3\)"),
        (lambda t: angles(4, 3), "got 3"),
    ],
)
def test_what_does_not_fit_is_refused(call, message):
    with pytest.raises(InputError, match=message):
        call(torch.ones)


def test_the_operators_are_there_without_triton(monkeypatch):
    monkeypatch.setitem(sys.modules, "triton", None)
    files = [f for f in Path(tile.__file__).parent.glob("*.py") if f.stem != "vocabulary"]
    assert {"gemm", "attention", "selective_scan"} < {f.stem for f in files}
    for file in files:
        runpy.run_path(str(file))
