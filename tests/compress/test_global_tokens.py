"""The network of global tokens: space and channels change places and back, and a token reaches everywhere."""

import pytest
import torch
from torch import nn

from foveate.compress.global_tokens import GlobalAutoencoder, UNet, _cosines, first
from foveate.errors import InputError
from foveate.meter import count_parameters


@pytest.fixture
def small() -> GlobalAutoencoder:
    torch.manual_seed(0)
    return GlobalAutoencoder(16, 8, 12, 6, heads=4, halvings=1, widths=(4, 6)).eval()


def test_with_identity_projections_the_decoder_gets_the_encoders_maps(small: GlobalAutoencoder) -> None:
    network = GlobalAutoencoder(16, 8, 12, 64, heads=2, halvings=1, widths=(4, 6))
    with torch.no_grad():
        network.down.copy_(torch.eye(64).expand(2, -1, -1))
        network.up.copy_(torch.eye(64).expand(2, -1, -1))
        network.offset.zero_()
    received = []
    network.decoder.register_forward_pre_hook(lambda _, inputs: received.append(inputs[0]))
    x = torch.rand(2, 3, 16, 16)
    network(x, quantised=False)
    pooled = nn.functional.avg_pool2d(network.beside_encoder(x), 2)
    assert torch.allclose(received[0], network.encoder(x) + pooled, atol=1e-6)


def test_one_token_changes_the_whole_picture(small: GlobalAutoencoder) -> None:
    codes = small.encode(torch.rand(1, 3, 16, 16))
    z = small.quantiser.words(codes) + small.offset
    for token in range(8):
        other = z.clone()
        other[:, token] = 0
        moved = (small.render(z) - small.render(other)).abs().amax(1)
        assert (moved > 1e-7).float().mean() > 0.95


def test_an_untrained_network_is_a_low_pass() -> None:
    torch.manual_seed(0)
    basis = _cosines(8)
    assert torch.allclose(basis.T @ basis, torch.eye(64), atol=1e-5)
    assert torch.allclose(basis[:, 0], torch.full((64,), 1 / 8))
    network = GlobalAutoencoder(16, 8, 12, 6, heads=2, halvings=1, widths=(4, 6))
    y, x = torch.meshgrid(torch.linspace(0, 1, 16), torch.linspace(0, 1, 16), indexing="ij")
    smooth = torch.stack([x, y, 0.5 + 0 * x])[None]
    lost = (network(smooth, quantised=False)[0] - smooth).square().mean()
    assert lost < 0.3 * (smooth - smooth.mean((2, 3), keepdim=True)).square().mean()


def test_prefixes(small: GlobalAutoencoder) -> None:
    x = torch.rand(3, 3, 16, 16)
    codes = small.encode(x)
    assert codes.shape == (3, 8)
    assert torch.equal(small.decode(codes, 8), small.decode(codes))
    assert torch.allclose(small.decode(codes), small(x)[0], atol=1e-5)
    mixed = small.decode(codes, torch.tensor([1, 8, 3]))
    assert torch.allclose(mixed[2:], small.decode(codes[2:], 3), atol=1e-6)
    changed = codes.clone()
    changed[:, 3:] = (changed[:, 3:] + 1) % 12
    assert torch.equal(small.decode(changed, 3), small.decode(codes, 3))
    assert first(torch.ones(2, 3, 1), torch.tensor([0, 2])).sum((1, 2)).tolist() == [0, 2]


def test_gradients_reach_every_parameter(small: GlobalAutoencoder) -> None:
    x = torch.rand(2, 3, 16, 16)
    y, found = small.train()(x)
    assert found is not None
    ((y - x).square().mean() + found.loss).backward()
    assert [n for n, p in small.named_parameters() if p.grad is None or not p.grad.any()] == []


@pytest.mark.parametrize(("down", "up", "side"), [(0, 0, 16), (0, 1, 8), (0, 2, 4), (1, 0, 32), (2, 0, 64)])
def test_levels_that_stand_still(down: int, up: int, side: int) -> None:
    network = UNet(3, 5, (4, 6, 8), still_down=down, still_up=up)
    assert network(torch.rand(1, 3, 16, 16)).shape == (1, 5, side, side)


def test_what_does_not_fit_is_refused(small: GlobalAutoencoder) -> None:
    for wrong in (torch.rand(1, 3, 16, 15), torch.rand(0, 3, 16, 16), torch.rand(1, 1, 16, 16)):
        with pytest.raises(InputError, match=r"\[B, 3, 16, 16\]"):
            small.encode(wrong)
    with pytest.raises(InputError, match="heads must divide"):
        GlobalAutoencoder(16, 8, heads=3)
    assert count_parameters(small) < 20_000
