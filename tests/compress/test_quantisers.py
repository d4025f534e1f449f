import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from foveate.compress.quantisers import Affine, ResidualVQ, round_through
from foveate.errors import InputError


def generator():
    return torch.Generator().manual_seed(0)


def test_rounding_passes_gradients():
    x = torch.tensor([0.2, 1.7], requires_grad=True)
    round_through(x).sum().backward()
    assert round_through(x).tolist() == [0, 2]
    assert x.grad.tolist() == [1, 1]


@given(st.integers(1, 40), st.integers(1, 4), st.integers(1, 8), st.integers(0, 99))
@settings(deadline=None, max_examples=30)
def test_affine_stays_within_half_a_step_and_its_range(count, columns, bits, seed):
    x = torch.randn(count, columns, generator=torch.Generator().manual_seed(seed))
    quantiser = Affine.of(x, bits)
    codes = quantiser.codes(x)
    assert codes.min() >= 0
    assert codes.max() < 2**bits
    assert ((quantiser.values(codes) - x).abs() <= quantiser.step / 2 + 1e-5).all()
    torch.testing.assert_close(quantiser(x), quantiser.values(codes), atol=1e-5, rtol=1e-5)
    wild = quantiser.codes(torch.tensor([[-1e9] * columns, [1e9] * columns]))
    assert wild.tolist() == [[0] * columns, [2**bits - 1] * columns]


def test_affine_gradients_reach_values_inside_and_the_ends_reach_the_range():
    x = torch.tensor([[-5.0], [0.3], [9.0]], requires_grad=True)
    quantiser = Affine(torch.tensor([1.0], requires_grad=True), torch.tensor([0.0], requires_grad=True), 2)
    quantiser(x).sum().backward()
    assert x.grad.flatten().tolist() == [0, 1, 0]
    assert quantiser.offset.grad.item() == 2  # the two clipped values move with the range, the other one does not
    assert quantiser.step.grad.item() == pytest.approx(3 - 0.3)


def test_affine_may_leave_outliers_outside():
    x = torch.cat([torch.linspace(0, 1, 100), torch.tensor([1e6])])[:, None]
    assert Affine.of(x, 4, outside=0.02).step.item() < 0.1
    with pytest.raises(InputError, match="17"):
        Affine.of(x, 17)
    with pytest.raises(InputError, match=r"\(3,\)"):
        Affine.of(torch.zeros(3), 2)


def test_each_stage_halves_what_is_left_and_gradients_pass():
    x = torch.randn(500, 3, generator=generator()).requires_grad_()
    left = []
    for stages in (1, 2, 3):
        vq = ResidualVQ.of(x, stages, 8, generator())
        codes = vq.codes(x)
        assert codes.shape == (500, stages)
        torch.testing.assert_close(vq(x), vq.values(codes))
        left.append((vq.values(codes) - x).square().mean().item())
    assert left[0] > 1.8 * left[1] > 1.8**2 * left[2]
    (grad,) = torch.autograd.grad(vq(x).sum(), x)
    assert torch.equal(grad, torch.ones_like(x))


def test_words_have_gradients_of_what_they_stand_for():
    vq = ResidualVQ(torch.tensor([[[0.0], [10.0]]], requires_grad=True))
    values = torch.tensor([[1.0], [3.0], [10.0]])
    (grad,) = torch.autograd.grad(vq(values).sum(), vq.words)
    assert grad.flatten().tolist() == [2, 1]
