import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from foveate.errors import InputError
from foveate.layers.hyper_attention import attend, cells, hyper_attention, merge


def draw(*shape, seed=0, dtype=torch.float32):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def exact(q, k, v):
    return F.scaled_dot_product_attention(q, k, v, is_causal=True)


@given(st.integers(1, 90), st.integers(1, 90), st.integers(0, 2**32 - 1))
@settings(deadline=None, max_examples=30)
def test_halving_is_exact_while_squares_are(n, exact_up_to, seed):
    q, k, v = draw(3, 1, 2, n, 4, seed=seed).unbind()
    # A block that holds all keys leaves nothing to be sampled.
    y = hyper_attention(q, k, v, exact=exact_up_to, block=n, sample=3)
    torch.testing.assert_close(y, exact(q, k, v), atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize(("n", "exact_up_to"), [(64, 16), (61, 20), (130, 32)])
def test_no_position_sees_a_later_one(n, exact_up_to):
    q, k, v = draw(3, 1, 2, n, 4).unbind()
    settings_ = {"exact": exact_up_to, "block": 8, "sample": 8}
    y = hyper_attention(q, k, v, **settings_)
    half = n // 2
    k[:, :, half:], v[:, :, half:] = 9, -9
    changed = hyper_attention(q, k, v, **settings_)
    assert torch.equal(y[:, :, :half], changed[:, :, :half])
    assert not torch.equal(y[:, :, half:], changed[:, :, half:])


def test_equal_values_stay_what_they_are_and_more_samples_come_nearer():
    q, k, v = draw(3, 1, 2, 256, 8).unbind()
    same = hyper_attention(q, k, torch.ones_like(v), exact=32, block=16, sample=16)
    torch.testing.assert_close(same, torch.ones_like(v))
    errors = [(hyper_attention(q, k, v, 32, 16, m) - exact(q, k, v)).square().mean().sqrt() for m in (4, 32, 256)]
    assert errors[0] > errors[1] > errors[2]
    assert errors[2] < 0.5 * exact(q, k, v).square().mean().sqrt()


def test_keys_alike_share_a_cell_so_their_attention_is_found():
    # Eight far apart directions, each query looks at the keys of its own: all weight lies within cells.
    kinds = torch.arange(512) % 8
    directions = F.normalize(draw(8, 16, seed=3), dim=1)
    q = k = (12 * directions[kinds])[None, None]
    v = draw(1, 1, 512, 16)
    y = hyper_attention(q, k, v, exact=64, block=64, sample=32)
    assert (y - exact(q, k, v))[:, :, 128:].square().mean() < 0.05 * v.square().mean()


def test_the_same_call_gives_the_same_result_with_gradients():
    q, k, v = draw(3, 2, 2, 100, 4).unbind()
    q.requires_grad_()
    settings_ = {"exact": 30, "block": 16, "sample": 16}
    first, second = hyper_attention(q, k, v, **settings_), hyper_attention(q, k, v, **settings_)
    assert torch.equal(first, second)
    with torch.no_grad():
        torch.testing.assert_close(hyper_attention(q, k, v, **settings_), first)
    first.sum().backward()
    assert q.grad.isfinite().all()
    assert q.grad.any()


def test_attention_to_two_sets_of_keys_merges_into_attention_to_both():
    q, k, v = draw(3, 1, 1, 20, 4).unbind()
    parts = [attend(q, k[:, :, rows], v[:, :, rows]) for rows in (slice(0, 7), slice(7, 20))]
    torch.testing.assert_close(merge(*parts)[0], F.scaled_dot_product_attention(q, k, v))


def test_cells_are_counted_in_gray_order():
    planes = torch.eye(3)
    corners = torch.tensor([[(i >> b & 1) * 2.0 - 1 for b in range(3)] for i in range(8)])
    order = cells(corners, planes).argsort()
    assert cells(corners, planes).sort().values.tolist() == list(range(8))
    steps = (corners[order[1:]] - corners[order[:-1]]).abs().sum(1) / 2
    assert steps.tolist() == [1.0] * 7


def test_shapes_that_differ_are_refused():
    with pytest.raises(InputError, match="one shape"):
        hyper_attention(torch.zeros(1, 1, 3, 2), torch.zeros(1, 1, 4, 2), torch.zeros(1, 1, 4, 2))
