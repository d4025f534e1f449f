import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from foveate.engine.packed import Packed
from foveate.errors import InputError


@settings(deadline=None, max_examples=40)
@given(st.integers(1, 5), st.integers(1, 9), st.integers(0, 1000))
def test_selected_tokens_come_back_to_their_places(batch, tokens, seed):
    dice = torch.Generator().manual_seed(seed)
    x, keep = torch.rand(batch, tokens, 3, generator=dice), torch.rand(batch, tokens, generator=dice) < 0.6
    packed = Packed.select(x, keep)
    assert packed.lengths == tuple(keep.sum(1).tolist())
    assert torch.equal(packed.scattered(keep, -1.0), torch.where(keep[..., None], x, -1.0))
    assert all(torch.equal(part, row[mark]) for part, row, mark in zip(packed.unbind(), x, keep, strict=True))
    assert torch.equal(packed.item, keep.nonzero()[:, 0])


def test_padding_fills_behind_short_sequences():
    packed = Packed.of([torch.ones(2, 1), torch.ones(0, 1), torch.ones(3, 1)])
    assert packed.offsets == (0, 2, 2, 5)
    assert packed.mask.tolist() == [[True, True, False], [False] * 3, [True] * 3]
    assert packed.padded(7.0)[..., 0].tolist() == [[1, 1, 7], [7, 7, 7], [1, 1, 1]]


def test_a_layout_is_kept_for_other_values():
    packed = Packed.of([torch.zeros(2, 3), torch.zeros(1, 3)])
    assert packed.replaced(torch.ones(3, 8)).lengths == (2, 1)


def test_gradients_reach_selected_tokens_only():
    x = torch.rand(1, 3, 2, requires_grad=True)
    keep = torch.tensor([[True, False, True]])
    Packed.select(x, keep).padded().sum().backward()
    assert x.grad is not None
    assert x.grad[0, :, 0].tolist() == [1, 0, 1]


@pytest.mark.parametrize("lengths", [(1, 1), (4, -1), (3, 1)])
def test_lengths_that_do_not_add_up_are_refused(lengths):
    with pytest.raises(InputError, match="add up" if sum(lengths) != 3 else "Lengths"):
        Packed(torch.zeros(3, 2), lengths)


def test_marks_of_another_shape_are_refused():
    with pytest.raises(InputError, match="marks"):
        Packed.select(torch.zeros(2, 3, 4), torch.ones(2, 4, dtype=torch.bool))
    with pytest.raises(InputError, match="marks"):
        Packed.select(torch.zeros(2, 3, 4), torch.ones(2, 3))
