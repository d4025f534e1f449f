import pytest
import torch
import torch.nn.functional as F

from foveate.layers.encoders import ENCODERS, CARNEncoder, FSRCNNEncoder, ResidualEncoder

SMALL = {
    "residual": lambda: ResidualEncoder(8, 2),
    "fsrcnn": lambda: FSRCNNEncoder(8, 4, 3),
    "carn": lambda: CARNEncoder(8, 4),
}


def encoder(name):
    torch.manual_seed(0)
    return SMALL[name]().double().eval()


@pytest.mark.parametrize("name", SMALL)
def test_every_encoder_is_known_by_name(name):
    assert type(SMALL[name]()) is ENCODERS[name]
    assert set(ENCODERS) == set(SMALL)


@pytest.mark.parametrize("name", SMALL)
@pytest.mark.parametrize("size", [(1, 1), (5, 9)])
def test_each_pixel_gets_one_feature_vector(name, size):
    net = encoder(name)
    assert net(torch.rand(2, 3, *size, dtype=torch.float64)).shape == (2, net.channels, *size)


@pytest.mark.parametrize("name", SMALL)
def test_the_halo_is_exactly_what_a_feature_sees(name):
    net = encoder(name)
    for p in net.parameters():
        p.data.abs_()  # then no ReLU stops the gradient
    side = 2 * net.halo + 5
    x = torch.ones(1, 3, side, side, dtype=torch.float64, requires_grad=True)
    middle = side // 2
    net(x)[..., middle, middle].abs().sum().backward()
    seen = x.grad.abs().sum((0, 1)) > 0
    rows, columns = seen.any(1).nonzero()[:, 0] - middle, seen.any(0).nonzero()[:, 0] - middle
    assert rows.tolist() == columns.tolist() == list(range(-net.halo, net.halo + 1))


@pytest.mark.parametrize("name", SMALL)
def test_a_window_with_its_halo_gives_the_features_of_the_whole(name):
    net = encoder(name)
    h = net.halo
    x = torch.rand(1, 3, 2 * h + 4, 2 * h + 6, dtype=torch.float64)
    with torch.no_grad():
        whole, window = net(x), net(x[..., 1 : 2 * h + 3, 2 : 2 * h + 5])
    torch.testing.assert_close(window[..., h : h + 2, h : h + 3], whole[..., h + 1 : h + 3, h + 2 : h + 5])


@pytest.mark.parametrize("name", SMALL)
def test_the_fast_path_without_gradients_gives_the_same_and_keeps_the_input(name):
    net = encoder(name)
    x = torch.rand(1, 3, 7, 8, dtype=torch.float64)
    before, expected = x.clone(), net(x).detach()
    with torch.no_grad():
        torch.testing.assert_close(net(x), expected)
    assert torch.equal(x, before)


@pytest.mark.parametrize("name", SMALL)
def test_gradients_reach_every_parameter(name):
    net = encoder(name).train()
    net(torch.rand(2, 3, 8, 8, dtype=torch.float64)).square().sum().backward()
    assert [n for n, p in net.named_parameters() if p.grad is None or not p.grad.any()] == []


def test_carn_takes_the_mean_of_its_training_pictures_off():
    net = encoder("carn")
    mean = torch.tensor([0.4488, 0.4371, 0.4040], dtype=torch.float64).view(1, 3, 1, 1)
    plain = CARNEncoder(8, 4, mean=(0.0, 0.0, 0.0)).double().eval()
    plain.load_state_dict(net.state_dict())
    x = torch.rand(1, 3, 6, 6, dtype=torch.float64)
    torch.testing.assert_close(net(x), plain(x - mean))


def test_carn_runs_one_residual_unit_three_times_and_fuses_all_that_came_before():
    block, x = encoder("carn").b1, torch.rand(1, 8, 5, 5, dtype=torch.float64)

    def fuse(layer, *parts):
        norm = layer[1]
        y = F.conv2d(torch.cat(parts, 1), layer[0].weight)
        return F.batch_norm(y, norm.running_mean, norm.running_var, norm.weight, norm.bias).relu()

    first = block.b1(x)
    second = block.b1(one := fuse(block.c1, x, first))
    third = block.b1(two := fuse(block.c2, x, first, second))
    assert one.shape == two.shape == x.shape
    torch.testing.assert_close(block(x), fuse(block.c3, x, first, second, third))
