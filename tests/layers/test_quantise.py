import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn.utils import parametrize

from foveate.errors import InputError
from foveate.layers.quantise import ActivationQuantiser, WeightQuantiser, quantise, weight_bytes


@given(st.integers(2, 8), st.sampled_from([(3, 5), (4, 2, 3, 3)]), st.floats(1e-3, 1e3))
@settings(deadline=None, max_examples=25)
def test_weights_take_few_levels_and_stay(bits, shape, scale):
    w = scale * torch.randn(shape)
    q = WeightQuantiser(bits)(w)
    top = 2 ** (bits - 1) - 1
    step = w.flatten(1).abs().amax(1) / top
    assert all(len(channel.unique()) <= 2 * top + 1 for channel in q.flatten(1))
    assert ((q - w).flatten(1).abs() <= step[:, None] / 2 * 1.001).all()
    torch.testing.assert_close(WeightQuantiser(bits)(q), q, rtol=1e-6, atol=0)


def test_a_step_per_channel_errs_less_than_one_for_all():
    w = torch.randn(16, 9) * torch.logspace(-2, 1, 16)[:, None]
    apart, together = WeightQuantiser(4)(w), WeightQuantiser(4)(w.flatten()[None]).view_as(w)
    assert (apart - w).square().mean(1).sum() < 0.5 * (together - w).square().mean(1).sum()


def test_channels_of_zeros_stay_zero():
    assert torch.equal(WeightQuantiser(4)(torch.zeros(2, 3)), torch.zeros(2, 3))


def test_gradients_pass_through_rounding():
    w = torch.randn(3, 4, requires_grad=True)
    WeightQuantiser(4)(w).sum().backward()
    assert torch.equal(w.grad, torch.ones(3, 4))


def test_activations_are_rounded_between_what_was_seen():
    quantiser = ActivationQuantiser(8)
    x = torch.rand(2, 3, 5, 5) * 4 - 1
    assert torch.equal(quantiser.eval()(x), x)
    quantiser.train()(torch.tensor([-1.0, 3.0]))
    q = quantiser.eval()(torch.cat((x.flatten(), torch.tensor([-9.0, 9.0, 0.0]))))
    step = 4 / 255
    assert ((q[:-3] - x.flatten()).abs() <= step * 0.51).all()
    assert q[-1] == 0
    torch.testing.assert_close(q[-3:-1], torch.tensor([-1.0, 3.0]), atol=step, rtol=0)


def test_ranges_move_in_training_only():
    quantiser = ActivationQuantiser(8, momentum=0.75)
    quantiser(torch.tensor([0.5, 2.0]))
    assert (quantiser.low.item(), quantiser.high.item()) == (0.0, 2.0)  # zero is always among them
    quantiser(torch.tensor([-4.0, 4.0]))
    assert (quantiser.low.item(), quantiser.high.item()) == (-1.0, 2.5)
    quantiser.eval()(torch.tensor([-100.0, 100.0]))
    assert quantiser.high.item() == 2.5


def small():
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten(), nn.Linear(8 * 16, 5))


@pytest.mark.parametrize(("bits", "error"), [((8, 8), 0.02), ((4, 8), 0.2)])
def test_a_quantised_network_is_close_and_learns(bits, error):
    network, x = small(), torch.randn(16, 3, 6, 6)
    expected = network(x)
    assert quantise(network, *bits) is network
    found = network(x)
    assert 1e-4 < (found - expected).norm() / expected.norm() < error
    found.square().sum().backward()
    weights = [p for name, p in network.named_parameters() if "original" in name]
    assert len(weights) == 2
    assert all(p.grad.any() for p in weights)
    parametrize.remove_parametrizations(network[0], "weight")
    assert all(len(channel.unique()) <= 2 ** bits[0] - 1 for channel in network[0].weight.flatten(1))


def test_weight_bytes_count_bits():
    network = small()
    others = 4 * (8 + 8 + 8 + 5)  # biases and the batch norm
    assert weight_bytes(network) == 4 * (8 * 27 + 5 * 128) + others
    assert weight_bytes(quantise(network, 4)) == (8 * 27 + 5 * 128) // 2 + others
    assert weight_bytes(quantise(nn.Linear(3, 3, bias=False), 3)) == 4  # 27 bits


@pytest.mark.parametrize(
    ("call", "says"),
    [
        (lambda: WeightQuantiser(1), "got 1"),
        (lambda: ActivationQuantiser(9), "got 9"),
        (lambda: quantise(quantise(small())), "already"),
    ],
)
def test_what_does_not_fit_is_refused(call, says):
    with pytest.raises(InputError, match=says):
        call()
