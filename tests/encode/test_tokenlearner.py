"""TokenLearner: weighted sums of all tokens, identity before training, and cost as counted."""

import copy
import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from foveate import hosts
from foveate.encode.tokenlearner import TokenFuser, TokenLearner, TokenLearnerViT, bottlenecks, plugin
from foveate.engine.surgery import patch_forward
from foveate.errors import BudgetError, InputError
from foveate.layers.transformer import VisionTransformer
from foveate.meter import count_flops
from small_hosts import output, vits

SIDE, PATCH, WIDTH, DEPTH, HEADS = 32, 4, 24, 4, 3
N = (SIDE // PATCH) ** 2
VITS = vits(SIDE, PATCH, WIDTH, DEPTH, HEADS)


@pytest.fixture(
    params=["ours", "ours, averaged", "ViTForImageClassification", "Dinov2WithRegistersModel", "CLIPVisionModel"]
)
def host(request):
    torch.manual_seed(0)
    return VITS[request.param]().eval()


@pytest.fixture
def x():
    return torch.rand(2, 3, SIDE, SIDE, generator=torch.Generator().manual_seed(1))


def far_from_start(module):
    torch.manual_seed(0)
    with torch.no_grad():
        for p in module.parameters():
            p.normal_(0, 0.3)
    return module


@given(st.integers(0, 50), st.integers(1, 30), st.integers(1, 12))
@settings(deadline=None, max_examples=30)
def test_maps_of_version_1_1_are_means_whatever_the_order(seed, n, tokens):
    learner = far_from_start(TokenLearner(6, tokens).double())
    x = torch.randn(2, n, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    maps, y = learner.maps(x), learner(x)
    assert maps.shape == (2, tokens, n)
    assert (maps >= 0).all()
    torch.testing.assert_close(maps.sum(-1), torch.ones(2, tokens, dtype=torch.float64))
    assert (y <= x.amax(1, keepdim=True) + 1e-9).all()
    assert (y >= x.amin(1, keepdim=True) - 1e-9).all()
    torch.testing.assert_close(learner(x[:, torch.randperm(n)]), y)
    torch.testing.assert_close(learner(torch.ones(1, n, 6).double() * 3), torch.full((1, tokens, 6), 3.0).double())


def test_version_1_1_is_the_published_formula():
    learner, x = far_from_start(TokenLearner(6, 3, hidden=5)), torch.randn(2, 7, 6)
    (w1, b1), (w2, b2) = ((layer.weight, layer.bias) for layer in (learner.gate[0], learner.gate[2]))
    centred = x - x.mean(-1, keepdim=True)
    s = centred / (centred.square().mean(-1, keepdim=True) + 1e-6).sqrt() * learner.norm.weight + learner.norm.bias
    s = s @ w1.T + b1
    s = 0.5 * s * (1 + torch.tanh(math.sqrt(2 / math.pi) * (s + 0.044715 * s**3)))
    maps = (s @ w2.T + b2).exp()
    maps = maps / maps.sum(1, keepdim=True)
    torch.testing.assert_close(learner(x), torch.einsum("bns,bnc->bsc", maps, x))


def test_version_1_0_sums_what_convolutions_select():
    learner = far_from_start(TokenLearner(6, 3, "1.0").double())
    x = torch.randn(2, 16, 6, dtype=torch.float64)
    maps = learner.maps(x)
    assert ((maps > 0) & (maps < 1)).all()
    torch.testing.assert_close(learner(x), torch.einsum("bsn,bnc->bsc", maps, x))
    assert len([m for m in learner.gate if isinstance(m, torch.nn.Conv2d)]) == 4
    assert all(m.bias is None for m in learner.gate if isinstance(m, torch.nn.Conv2d))
    assert not torch.allclose(learner(x[:, torch.randperm(16)]), learner(x))
    mean = TokenLearner(6, 3, "1.0", mean=True).double()
    mean.load_state_dict(learner.state_dict())
    torch.testing.assert_close(mean(x), learner(x) / 16)
    shifted = x.unflatten(1, (4, 4)).transpose(1, 2).flatten(1, 2)
    assert not torch.allclose(learner.maps(shifted).unflatten(2, (4, 4)).mT.flatten(2), maps)


def test_any_grid_and_any_number_of_tokens():
    wide = TokenLearner(6, 111)(torch.randn(1, 50, 6))
    assert wide.shape == (1, 111, 6)
    learner = TokenLearner(6, 3, "1.0")
    assert learner(torch.randn(2, 5, 15, 6), (3, 5)).shape == (2, 5, 3, 6)  # five frames
    frames = torch.randn(2, 5, 16, 6)
    torch.testing.assert_close(learner(frames)[1, 2], learner(frames[1:2, 2])[0])
    with pytest.raises(InputError, match="no square"):
        learner(torch.randn(1, 15, 6))
    with pytest.raises(InputError, match=r"'1\.1' and '1\.0'"):
        TokenLearner(6, 3, "2.0")
    with pytest.raises(InputError, match="tokens=0"):
        TokenLearner(6, 0)


def test_an_untrained_fuser_gives_exactly_zero_and_a_trained_one_its_formula():
    fuser, tokens, x = TokenFuser(6, 3), torch.randn(2, 3, 6), torch.randn(2, 10, 6)
    assert not fuser(tokens, x).any()
    fuser = far_from_start(fuser)
    mixed = fuser.norm2(torch.einsum("st,btc->bsc", fuser.mix.weight, fuser.norm1(tokens)) + fuser.mix.bias[:, None])
    maps = fuser.gate(fuser.norm(x)).sigmoid()
    torch.testing.assert_close(fuser(tokens, x), torch.einsum("bns,bsc->bnc", maps, mixed))


@pytest.mark.parametrize("version", ["1.1", "1.0"])
@pytest.mark.parametrize("fuse", [False, True])
@pytest.mark.parametrize("layer", [0, 2, 4])
def test_cost_is_the_formula(version, fuse, layer, x):
    s = 5
    net = TokenLearnerViT(
        SIDE, PATCH, WIDTH, DEPTH, HEADS, num_classes=0, tokens=s, layer=layer, version=version, fuse=fuse
    )
    net.eval()

    def block(n):
        return 24 * n * WIDTH**2 + 4 * n * n * WIDTH

    gate = N * WIDTH * 64 + N * 64 * s if version == "1.1" else N * 9 * (WIDTH * s + 3 * s * s)
    learner = 2 * (gate + s * N * WIDTH)
    fuser = 2 * (WIDTH * s * s + N * WIDTH * 64 + N * 64 * s + s * N * WIDTH)
    times = DEPTH - layer if fuse else min(1, DEPTH - layer)
    expected = 2 * N * 3 * PATCH**2 * WIDTH + layer * block(N) + (DEPTH - layer) * block(s)
    expected += times * (learner + (fuser if fuse else 0))
    assert count_flops(net, x[:1]) == expected


PLAIN = VisionTransformer(SIDE, PATCH, 64, 3, 4, num_classes=0, global_pool="avg")
EMPTY = torch.zeros(1, 3, SIDE, SIDE)


@pytest.fixture(scope="module")
def costs():
    """Shares of the host by (fuse, tokens) and layer."""
    full, found = count_flops(PLAIN, EMPTY), {}
    for case in itertools.product((False, True), (2, 16)):
        made = [
            TokenLearnerViT(SIDE, PATCH, 64, 3, 4, num_classes=0, layer=layer, fuse=case[0], tokens=case[1])
            for layer in range(4)
        ]
        found[case] = [count_flops(net, EMPTY) / full for net in made]
    return found


@given(st.floats(0.1, 1), st.booleans(), st.sampled_from([2, 16]))
@settings(deadline=None, max_examples=25)
def test_the_layer_is_the_latest_that_the_budget_pays_for(costs, budget, fuse, tokens):
    shares = costs[fuse, tokens]
    fitting = [layer for layer, share in enumerate(shares) if share <= budget]
    if fitting:
        assert bottlenecks(hosts.vit(PLAIN), budget, tokens, fuse=fuse)[0] == max(fitting)
    else:
        with pytest.raises(BudgetError, match=f"{shares[0] + 0.005:.2f}"):
            bottlenecks(hosts.vit(PLAIN), budget, tokens, fuse=fuse)


def test_given_a_layer_as_many_tokens_as_the_budget_pays_for(x):
    plain = VisionTransformer(SIDE, PATCH, 64, DEPTH, 4, num_classes=0)
    _, made = bottlenecks(hosts.vit(plain), 0.6, layer=2)
    tokens, full = made[0].learner.tokens, count_flops(plain, x[:1])
    for count, fits in ((tokens, True), (tokens + 1, False)):
        with plugin(plain, tokens=count, layer=2):
            assert (count_flops(plain, x[:1]) <= 0.6 * full) == fits
    layer, made = bottlenecks(hosts.vit(plain), "7 tokens")
    assert (layer, made[0].learner.tokens) == (2, 7)


def test_never_reached_it_is_the_plain_transformer_bit_for_bit(x):
    net = TokenLearnerViT(SIDE, PATCH, WIDTH, DEPTH, HEADS, num_classes=4, layer=DEPTH).eval()
    plain = VisionTransformer(SIDE, PATCH, WIDTH, DEPTH, HEADS, num_classes=4, global_pool="avg").eval()
    plain.load_state_dict(net.state_dict())
    for block in plain.blocks:
        block.mlp.act = torch.nn.GELU("tanh")
    assert torch.equal(output(net, x), output(plain, x))


@pytest.mark.parametrize("fuse", [False, True])
def test_model_and_plugin_are_the_same(x, fuse):
    settings = {"tokens": 8, "layer": 1, "fuse": fuse}
    net = far_from_start(TokenLearnerViT(SIDE, PATCH, WIDTH, DEPTH, HEADS, num_classes=4, **settings)).eval()
    plain = VisionTransformer(SIDE, PATCH, WIDTH, DEPTH, HEADS, num_classes=4, global_pool="avg").eval()
    for block in plain.blocks:
        block.mlp.act = torch.nn.GELU("tanh")
    with plugin(plain, **settings):
        plain.load_state_dict(net.state_dict())
        assert torch.equal(output(plain, x), output(net, x))


def test_removal_gives_the_host_back(host, x):
    before, state, modules = output(host, x), dict(host.state_dict()), list(host.modules())
    handle = plugin(host)
    assert not torch.equal(output(host, x), before)
    assert all(key in state or "token_learning." in key for key in host.state_dict())
    handle.remove()
    assert torch.equal(output(host, x), before)
    assert list(host.modules()) == modules
    assert list(host.state_dict()) == list(state)


def test_a_host_spends_what_it_is_told(host, x):
    full, spent = count_flops(lambda: output(host, x)), []
    for budget in (0.45, 0.75, 1.0):
        with plugin(host, budget=budget):
            spent.append(count_flops(lambda: output(host, x)) / full)
    assert spent[0] < spent[1] < spent[2] == 1
    assert spent[0] <= 0.46
    assert spent[1] <= 0.76


def test_a_host_with_untrained_fusers_skips_its_last_blocks(x):
    host = VITS["ours, averaged"]().eval()
    short = copy.deepcopy(host)
    short.blocks = short.blocks[:1]
    with plugin(host, layer=1, tokens=4, fuse=True):
        assert torch.equal(output(host, x), output(short, x))


def test_prefix_tokens_go_beside_the_learned_ones(x):
    host, seen = far_from_start(VITS["ours"]()).eval(), []
    start = host._pos_embed(host.patch_embed(x))
    with plugin(host, layer=0, tokens=4), patch_forward(host.blocks[1], lambda run, y: seen.append(y) or run(y)):
        output(host, x)
        learned = torch.cat([start[:, :1], host.token_learning[0].learner(start[:, 1:])], 1)
    with torch.no_grad():
        torch.testing.assert_close(seen[0], host.blocks[0](learned))


@pytest.mark.parametrize("version", ["1.1", "1.0"])
def test_the_map_shows_where_tokens_look(version):
    host = VITS["ours"]().eval()
    x = torch.rand(2, 3, 24, 40)
    with plugin(host, layer=1, tokens=3, version=version) as handle:
        look = handle.look(x)
        assert look.effort.shape == (2, 6, 10)
        assert (look.tokens, look.full, look.unit) == ((3, 3), 60, "tokens from block 1 on")
        assert torch.equal(look.effort.flatten(1).amax(1), torch.ones(2))
        start = host.blocks[0](host._pos_embed(host.patch_embed(x)))[:, 1:]
        seen = host.token_learning[0].learner.maps(start, (6, 10)).sum(1)
        torch.testing.assert_close(look.effort.flatten(1), seen / seen.amax(1, keepdim=True))
        assert handle.report(x).flop_reduction > 1.5
    with plugin(host, budget=1.0) as handle:
        assert handle.look(x).tokens == (60, 60)


def test_learning_reaches_all_that_is_learned(x):
    host = VITS["ours, averaged"]()
    with plugin(host, layer=1, tokens=3, fuse=True):
        far_from_start(host.token_learning)
        host(x).square().sum().backward()
        assert all(p.grad is not None and p.grad.any() for p in host.token_learning.parameters())


def test_a_copy_learns_by_itself(x):
    host = VITS["ours"]().eval()
    with plugin(host, layer=1, tokens=3):
        twin = copy.deepcopy(host)
        far_from_start(twin.token_learning)
        assert not torch.equal(output(twin, x), output(host, x))


def test_unusable_settings(x):
    host = VITS["ours"]().eval()
    for budget in (0.01, "3 bpp"):
        with pytest.raises(BudgetError):
            plugin(host, budget=budget)
    with pytest.raises(InputError, match="0 to the 4 blocks"):
        plugin(host, layer=5)
    with pytest.raises(InputError, match="vision transformer"):
        plugin(torch.nn.Linear(2, 2))
    assert not hasattr(host, "token_learning")
