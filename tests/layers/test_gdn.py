"""Divisive normalisation: identities, known values, gradients."""

import torch

from foveate.layers.gdn import GDN1


def test_without_neighbours_it_is_the_identity() -> None:
    x = torch.randn(2, 5, 3, 4)
    for inverse in (False, True):
        layer = GDN1(5, inverse)
        torch.nn.init.zeros_(layer.gamma)  # beta begins at 1
        assert torch.equal(layer(x), x)


def test_known_values_with_parameters_of_any_sign() -> None:
    layer = GDN1(2)
    with torch.no_grad():
        layer.beta.copy_(torch.tensor([1.0, -2.0]))
        layer.gamma.copy_(torch.tensor([[0.5, -1.0], [0.0, 3.0]]))
    x = torch.tensor([2.0, -4.0])[None, :, None, None]
    norm = torch.tensor([1 + 0.5 * 2 + 4, 2 + 3 * 4.0])[None, :, None, None]
    assert torch.allclose(layer(x), x / norm)
    layer.inverse = True
    assert torch.allclose(layer(x), x * norm)


def test_gradients_reach_both_parameters() -> None:
    layer = GDN1(3, inverse=True)
    layer(torch.randn(1, 3, 4, 4)).square().sum().backward()
    for parameter in layer.parameters():
        assert parameter.grad is not None
        assert parameter.grad.abs().min() > 0
