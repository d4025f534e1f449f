"""Autoencoders of small pictures: shapes, gradients, and what they refuse."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from foveate.errors import InputError
from foveate.learn.autoencoder import ConvAutoencoder, conv_decoder, conv_encoder
from foveate.learn.ms_ssim_learning import ExpectedLossVAE


@settings(deadline=None, max_examples=15)
@given(st.integers(1, 4), st.sampled_from([(4,), (4, 6), (4, 6, 8)]), st.integers(1, 3), st.integers(1, 9))
def test_what_goes_in_comes_out_through_the_code(cells, widths, channels, code):
    side = cells * 2 ** len(widths)
    x = torch.rand(2, channels, side, side)
    with torch.no_grad():
        numbers = conv_encoder(code, side, channels, widths)(x)
        assert numbers.shape == (2, code)
        y = conv_decoder(code, side, channels, widths)(numbers)
    assert y.shape == x.shape
    assert 0 <= float(y.min()) <= float(y.max()) <= 1


def test_gradients_reach_every_parameter_and_the_halves_make_a_variational_one():
    torch.manual_seed(0)
    x = torch.rand(4, 1, 16, 16)
    model = ConvAutoencoder(8, 16, widths=(4, 6))
    (model(x) - x).square().mean().backward()
    assert all(bool(p.grad.abs().sum() > 0) for p in model.parameters())
    variational = ExpectedLossVAE(conv_encoder(16, 16), conv_decoder(8, 16))
    variational.loss(x).backward()
    assert all(bool(p.grad.abs().sum() > 0) for p in variational.parameters())


@pytest.mark.parametrize(("side", "widths"), [(20, (4, 4, 4)), (4, (4, 4, 4)), (16, ())])
def test_sides_that_cannot_be_halved(side, widths):
    with pytest.raises(InputError, match=f"side={side}"):
        ConvAutoencoder(8, side, widths=widths)
