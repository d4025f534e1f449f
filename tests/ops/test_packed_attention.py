import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from foveate.errors import InputError
from foveate.meter import count_flops
from foveate.ops.packed_attention import packed_attention, packed_attention_reference

lengths = st.lists(st.integers(0, 9), min_size=1, max_size=6).filter(sum)


def operands(lengths, seed, channels=5, values=3, dtype=torch.float64):
    dice = torch.Generator().manual_seed(seed)
    widths = (channels, channels, values)
    return [torch.randn(2, sum(lengths), c, generator=dice, dtype=dtype) for c in widths]


@settings(deadline=None, max_examples=40)
@given(lengths, st.integers(0, 1000), st.sampled_from([None, 0.3]))
def test_equals_a_padded_batch_with_the_padding_masked(lengths, seed, scale):
    q, k, v = operands(lengths, seed)
    y = packed_attention(q, k, v, lengths, scale)
    torch.testing.assert_close(y, packed_attention_reference(q, k, v, [n for n in lengths if n], scale))


@settings(deadline=None, max_examples=25)
@given(lengths, st.integers(0, 1000))
def test_gradients_equal_those_of_the_reference(lengths, seed):
    found = []
    for attend in (packed_attention, packed_attention_reference):
        leaves = [t.requires_grad_() for t in operands(lengths, seed)]
        y = attend(*leaves, [n for n in lengths if n])
        found.append(torch.autograd.grad(y.sin().sum(), leaves))
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b)


def test_a_sequence_does_not_see_another():
    q, k, v = operands((3, 4), 0)
    other = k.clone()
    other[:, 3:] += 1
    assert torch.equal(packed_attention(q, k, v, (3, 4))[:, :3], packed_attention(q, other, v, (3, 4))[:, :3])


def test_neighbours_of_one_length_cost_the_sum_of_their_squares():
    q, k, v = operands((3, 3, 5, 3), 0)
    assert count_flops(packed_attention, q, k, v, (3, 3, 5, 3)) == 2 * 2 * (3 * 9 + 25) * (5 + 3)


def test_dropping_all_weights_gives_zeros():
    q, k, v = operands((3, 4), 0)
    assert not packed_attention(q, k, v, (3, 4), dropout=1.0).any()


def test_shapes_that_do_not_fit_are_refused():
    q, k, v = operands((3, 4), 0)
    with pytest.raises(InputError, match=r"lengths that sum to T, got .* \[3, 3\]"):
        packed_attention(q, k, v, (3, 3))
    with pytest.raises(InputError, match="packed_attention takes"):
        packed_attention(q[:1], k, v, (3, 4))


@settings(deadline=None, max_examples=4, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    lengths=st.lists(st.integers(0, 34), min_size=2, max_size=3).filter(lambda n: sum(n) and len(set(n)) > 1),
    seed=st.integers(0, 100),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
)
def test_the_kernel_equals_the_reference(interpreted, lengths, seed, dtype):
    from foveate.ops import _packed_attention_triton as module

    q, k, v = (t.to(interpreted) for t in operands(lengths, seed, 20, 12, dtype))
    # As the heads of a layer come: not contiguous.
    q, k, v = (t.transpose(0, 1).contiguous().transpose(0, 1) for t in (q, k, v))
    y = module.attend(q, k, v, lengths, 0.2)
    wide = packed_attention_reference(q.double(), k.double(), v.double(), [n for n in lengths if n], 0.2)
    tolerance = 2e-2 if dtype == torch.bfloat16 else 1e-5
    torch.testing.assert_close(y.double(), wide, atol=tolerance, rtol=tolerance)


def test_the_kernel_is_taken_where_lengths_differ_and_nobody_learns(interpreted, monkeypatch):
    from foveate.ops import _packed_attention_triton as module

    ran = []
    monkeypatch.setattr(module, "attend", lambda q, k, v, *_: ran.append(1) or v)
    q, k, v = (t.to(interpreted) for t in operands((2, 3), 0, dtype=torch.float32))
    packed_attention(q, k, v, (2, 3))
    assert ran == [1]
    packed_attention(q.requires_grad_(), k, v, (2, 3))
    packed_attention(q.detach(), k, v, (5,))
    assert ran == [1]
