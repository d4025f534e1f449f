"""Nested layers: slices of one matrix, equal to the whole one with what a token has not set to zero."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from foveate.layers.nested import Nesting
from foveate.meter import count_flops

WIDTHS = (2, 4, 8)


def nested(seed, pictures, counts):
    """Random widths, of which each picture has as many as said, and the mask of what tokens have."""
    dice = torch.Generator().manual_seed(seed)
    given = torch.repeat_interleave(torch.arange(len(WIDTHS)), torch.tensor(counts))
    width = torch.stack([given[torch.randperm(len(given), generator=dice)] for _ in range(pictures)])
    mask = torch.arange(WIDTHS[-1]) < torch.tensor(WIDTHS)[width][..., None]
    return Nesting.of(width, WIDTHS), mask


@given(st.integers(0, 99), st.integers(1, 3), st.tuples(*[st.integers(0, 4)] * 3).filter(any))
@settings(deadline=None, max_examples=30)
def test_order_is_by_width_and_then_token_by_token_of_all_pictures(seed, pictures, counts):
    nesting, mask = nested(seed, pictures, counts)
    x = torch.arange(mask[..., 0].numel(), dtype=torch.float32).view(*mask.shape[:2], 1)
    rows = nesting.sort(x)
    assert torch.equal(nesting.restore(rows), x)
    have = nesting.sort(mask.sum(-1, keepdim=True)).flatten()
    assert have.tolist() == sorted(have.tolist())
    picture = (rows.flatten() // mask.shape[1]).view(-1, pictures)
    assert torch.equal(picture, torch.arange(float(pictures)).expand_as(picture))


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("gradients", [True, False])
@given(st.integers(0, 99), st.integers(1, 3), st.tuples(*[st.integers(0, 4)] * 3).filter(any))
@settings(deadline=None, max_examples=20)
def test_layers_equal_masked_whole_ones(bias, gradients, seed, pictures, counts):
    nesting, mask = nested(seed, pictures, counts)
    torch.manual_seed(seed)
    inner, outer = nn.Linear(8, 5, bias=bias).double(), nn.Linear(5, 8, bias=bias).double()
    x = torch.randn(*mask.shape, dtype=torch.float64)
    with torch.set_grad_enabled(gradients):
        read = nesting.restore(nesting.read(nesting.sort(x), inner))
        written = nesting.restore(nesting.write(nesting.sort(read), outer))
    torch.testing.assert_close(read, inner(x * mask))
    torch.testing.assert_close(written, outer(read) * mask)
    assert not written[~mask].any()
    assert written.requires_grad == gradients


def test_gradients_are_those_of_masked_whole_ones():
    nesting, mask = nested(1, 2, (2, 1, 2))
    torch.manual_seed(0)
    layer, x = nn.Linear(8, 8).double(), torch.randn(*mask.shape, dtype=torch.float64, requires_grad=True)
    loss = torch.randn(*mask.shape, dtype=torch.float64)
    found = []
    for y in (
        nesting.restore(nesting.write(nesting.read(nesting.sort(x), layer), layer)),
        layer(layer(x * mask)) * mask,
    ):
        found.append(torch.autograd.grad((y * loss).sum(), [x, layer.weight, layer.bias]))
    for ours, whole in zip(*found, strict=True):
        torch.testing.assert_close(ours, whole)


@pytest.mark.parametrize("gradients", [True, False])
def test_a_layer_costs_what_its_rows_are_wide(gradients):
    nesting, mask = nested(0, 2, (3, 2, 1))
    layer, rows = nn.Linear(8, 8), nesting.sort(torch.randn(*mask.shape))
    with torch.set_grad_enabled(gradients):
        for run in (nesting.read, nesting.write):
            assert count_flops(run, rows, layer) == 2 * 8 * int(mask.sum())


def test_attention_stays_within_each_picture():
    nesting, mask = nested(3, 3, (2, 2, 1))
    torch.manual_seed(0)
    parts = torch.randn(3, *mask.shape)
    q, k, v = (nesting.sort(t).unflatten(1, (2, 4)).transpose(0, 1)[None] for t in parts)
    found = nesting.restore(nesting.attend(q, k, v)[0].transpose(0, 1).flatten(1))
    whole = F.scaled_dot_product_attention(*(t.unflatten(2, (2, 4)).transpose(1, 2) for t in parts))
    torch.testing.assert_close(found, whole.transpose(1, 2).flatten(2))
