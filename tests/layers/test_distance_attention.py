import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from foveate.layers.distance_attention import Attention, ShrinkingAttention, distances


def seasoned(module, seed=0):
    """The module with norms and tables that have seen something, in eval mode."""
    dice = torch.Generator().manual_seed(seed)
    for part in module.modules():
        if isinstance(part, nn.BatchNorm1d | nn.BatchNorm2d):
            for tensor in (part.weight.data, part.bias.data, part.running_mean, part.running_var):
                tensor.copy_(torch.rand(tensor.shape, generator=dice) + 0.5)
        if isinstance(part, Attention):
            part.attention_biases.data.normal_(generator=dice)
    return module.eval()


@pytest.mark.parametrize(("kind", "stride", "ratio"), [(Attention, 1, 2), (ShrinkingAttention, 2, 4)])
@pytest.mark.parametrize("grid", [(4, 4), (3, 5), (1, 2)])
def test_attention_is_what_the_equations_say(kind, stride, ratio, grid):
    torch.manual_seed(0)
    d, heads, dim, outputs = 4, 3, 6, 6 if kind is Attention else 10
    extra = {} if kind is Attention else {"outputs": outputs}
    layer = seasoned(kind(dim, d, heads, grid, **extra)).double()
    x = torch.randn(2, *grid, dim, dtype=torch.float64)
    asking = x[:, ::stride, ::stride]
    if kind is Attention:
        q, k, v = layer.qkv(x).unflatten(3, (heads, 4 * d)).split([d, d, ratio * d], 4)
    else:
        q = layer.q[1](asking).unflatten(3, (heads, d))
        k, v = layer.kv(x).unflatten(3, (heads, 5 * d)).split([d, ratio * d], 4)
    table = layer.attention_biases.reshape(heads, *grid)
    mixed = torch.zeros(*asking.shape[:3], heads, ratio * d, dtype=torch.float64)
    for head in range(heads):
        for y0 in range(asking.shape[1]):
            for x0 in range(asking.shape[2]):
                logits = torch.stack(
                    [
                        (q[:, y0, x0, head] * k[:, y1, x1, head]).sum(-1) / math.sqrt(d)
                        + table[head, abs(stride * y0 - y1), abs(stride * x0 - x1)]
                        for y1 in range(grid[0])
                        for x1 in range(grid[1])
                    ],
                    1,
                )
                mixed[:, y0, x0, head] = (logits.softmax(1)[..., None] * v[..., head, :].flatten(1, 2)).sum(1)
    expected = layer.proj[1](nn.functional.hardswish(mixed.flatten(3)))
    assert expected.shape == (2, *asking.shape[1:3], outputs)
    torch.testing.assert_close(layer(x), expected)


@given(st.integers(1, 7), st.integers(1, 7), st.integers(1, 2))
@settings(deadline=None, max_examples=30)
def test_distances_are_numbered_in_order_of_first_appearance(rows, columns, stride):
    """As the authors number them: offsets are counted up as they are met, query by query."""
    found, index = {}, []
    for y0 in range(0, rows, stride):
        for x0 in range(0, columns, stride):
            for y1 in range(rows):
                for x1 in range(columns):
                    index.append(found.setdefault((abs(y0 - y1), abs(x0 - x1)), len(found)))
    assert len(found) == rows * columns
    assert distances(rows, columns, stride).flatten().tolist() == index


def test_biases_alone_say_where_a_token_is():
    torch.manual_seed(0)
    layer, x = seasoned(Attention(8, 4, 2, (3, 4))), torch.randn(1, 3, 4, 8)
    order = torch.randperm(12)

    def shuffled(t):
        return t.flatten(1, 2)[:, order].view_as(t)

    with torch.no_grad():
        assert not torch.allclose(layer(shuffled(x)), shuffled(layer(x)), atol=1e-3)
        mirrored = layer(x.flip(1, 2)).flip(1, 2)
        torch.testing.assert_close(mirrored, layer(x))  # distances have no sign
        layer.attention_biases.zero_()
        torch.testing.assert_close(layer(shuffled(x)), shuffled(layer(x)))


def test_a_map_of_another_size_stretches_the_table():
    layer = Attention(8, 4, 1, (3, 3))
    with torch.no_grad():
        layer.attention_biases.copy_(torch.arange(9.0)[None])
        grown = layer.biases(5, 5)[0]
    assert torch.equal(grown[0].view(5, 5)[::2, ::2], torch.arange(9.0).view(3, 3))
    assert grown[0, 1] == 0.5
    assert torch.equal(layer.biases(3, 3)[0, 0], torch.arange(9.0))


def test_gradients_are_those_of_the_equations():
    torch.manual_seed(0)
    layer = seasoned(Attention(4, 2, 2, (2, 2))).double()
    x = torch.randn(1, 2, 2, 4, dtype=torch.float64, requires_grad=True)
    table = layer.attention_biases.detach().clone().requires_grad_()
    call = lambda x, table: torch.func.functional_call(layer, {"attention_biases": table}, (x,))  # noqa: E731
    assert torch.autograd.gradcheck(call, (x, table))


@pytest.mark.parametrize(("kind", "extra"), [(Attention, {}), (ShrinkingAttention, {"outputs": 5})])
def test_folding_changes_nothing_and_leaves_the_layer_as_it_is(kind, extra):
    torch.manual_seed(0)
    layer = seasoned(kind(6, 4, 2, (3, 4), **extra))
    for size in ((3, 4), (5, 2)):
        x = torch.randn(2, *size, 6)
        with torch.no_grad():
            expected = layer(x)
            torch.testing.assert_close(layer.folded()(x), expected, atol=1e-5, rtol=1e-4)
            assert torch.equal(layer(x), expected)
    folded = layer.folded()
    assert folded.folded() is folded
    assert not [part for part in folded.modules() if isinstance(part, nn.BatchNorm1d)]
