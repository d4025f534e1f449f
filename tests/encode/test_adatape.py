"""AdaTape: more tokens for those who need them, and a plain transformer without."""

import copy

import pytest
import torch
from torch import nn

import foveate
from foveate.encode.adatape import AdaTape
from foveate.engine.packed import Packed
from foveate.errors import BudgetError, InputError
from foveate.layers.transformer import VisionTransformer
from foveate.meter import count_flops

SIDE, PATCH, WIDTH, DEPTH, HEADS = 32, 8, 24, 3, 3
N = (SIDE // PATCH) ** 2
SHAPE = {"img_size": SIDE, "patch_size": PATCH, "embed_dim": WIDTH, "depth": DEPTH, "num_heads": HEADS}


def made(**settings):
    net = AdaTape(**SHAPE, num_classes=4, **{"tape_tokens": 6, "threshold": 2.0, **settings}).eval()
    torch.manual_seed(0)
    with torch.no_grad():
        for p in net.parameters():
            p.normal_(0, 0.3)
        net.reader.norm.weight.fill_(3.0)
    return net


@pytest.fixture
def x():
    return torch.randn(4, 3, SIDE, SIDE, generator=torch.Generator().manual_seed(1))


def test_without_a_tape_it_is_the_plain_transformer_bit_for_bit(x):
    net = made(tape_tokens=0)
    plain = VisionTransformer(**SHAPE, num_classes=4, global_pool="avg").eval()
    for block in plain.blocks:
        block.mlp.act = nn.GELU("tanh")
    plain.load_state_dict({k: v for k, v in net.state_dict().items() if not k.startswith("reader.")})
    with torch.no_grad():
        assert torch.equal(net(x), plain(x))
        taped = made()
        plain.load_state_dict({k: v for k, v in taped.state_dict().items() if k in plain.state_dict()})
        assert torch.equal(taped(x, budget="0.5 tokens"), plain(x))
        assert not torch.allclose(taped(x), plain(x))


def reference(net, x):
    """Classes by padding and a key mask, as published."""
    tokens = net._pos_embed(net.patch_embed(x))
    for block in net.blocks[: net.layer]:
        tokens = block(tokens)
    tape = net.reader(tokens.mean(1), net.bank(x))
    tokens = torch.cat([tokens, net.tape_mlp(tape.tokens)], 1)
    mask = torch.cat([torch.ones(len(x), N, dtype=torch.bool), tape.mask], 1)
    for i, block in enumerate(net.blocks[net.layer :]):
        tokens = tokens + block.attn(block.norm1(tokens), mask)
        z = block.norm2(tokens)
        own = block.mlp(z[:, N:]) if not net.tape_ffns else net.tape_ffns[i](z[:, N:])
        tokens = tokens + torch.cat([block.mlp(z[:, :N]), own], 1)
    tokens = net.norm(tokens) * mask[..., None]
    return net.head(tokens.sum(1) / mask.sum(1, keepdim=True))


@pytest.mark.parametrize("own", [False, True])
@pytest.mark.parametrize("layer", [0, 1, 3])
def test_packed_tokens_equal_padding_and_masks(x, own, layer):
    net = made(own_ffn=own, layer=layer)
    with torch.no_grad():
        assert len(set(net.run(x).tape.steps.tolist())) > 1  # else nothing would be masked
        torch.testing.assert_close(net(x), reference(net, x), atol=2e-4, rtol=1e-4)


def test_features_are_as_long_as_the_tape_and_batch_mates_do_not_matter(x):
    net = made()
    with torch.no_grad():
        run, alone = net.run(x), torch.cat([net(one) for one in x.split(1)])
        assert isinstance(run.features, Packed)
        assert list(run.features.lengths) == (N + run.tape.steps).tolist()
        torch.testing.assert_close(net(x), alone, atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(net.forward_head(run.features), net(x))


def test_shorter_tapes_cost_less_and_cost_is_as_counted(x):
    net = made()
    spent = {}
    with torch.no_grad():
        for one in x.split(1):
            steps = int(net.run(one).tape.steps)
            spent[steps] = count_flops(net.forward_features, one)
            assert spent[steps] == net.flops(steps, (4, 4), (SIDE, SIDE))
    assert len(spent) > 1
    assert [spent[s] for s in sorted(spent)] == sorted(spent.values())
    own = made(own_ffn=True)
    steps = int(own.run(x[:1]).tape.steps)
    assert count_flops(own.forward_features, x[:1]) == own.flops(steps, (4, 4), (SIDE, SIDE))


def test_a_budget_caps_the_tape(x):
    net = made()
    net.reader.norm.weight.data.fill_(0.01)  # unsure: as long as it may
    full = net.flops(6, (4, 4), (SIDE, SIDE))
    with torch.no_grad():
        for budget in (1.0, 0.9, 0.7, "3 tokens", f"{0.8 * full / 1e9} GFLOPs"):
            steps = net.run(x, budget).tape.steps
            share = {"3 tokens": net.flops(3, (4, 4), (SIDE, SIDE)) / full}.get(budget, budget)
            share = 0.8 if isinstance(share, str) else share
            assert net.flops(int(steps[0]), (4, 4), (SIDE, SIDE)) <= share * full
            if steps[0] < 6:
                assert net.flops(int(steps[0]) + 1, (4, 4), (SIDE, SIDE)) > share * full
        for budget in (0.1, "3 bpp"):
            with pytest.raises(BudgetError):
                net(x, budget=budget)


def test_a_learned_bank_has_own_ffns_and_every_parameter_learns(x):
    net = made(bank="learned", bank_size=40)
    assert len(net.tape_ffns) == DEPTH - 1
    assert not made().tape_ffns
    assert net.bank.items.shape == (40, WIDTH)
    net.train().loss(x, torch.arange(4)).backward()
    assert all(p.grad is not None and p.grad.any() for p in net.parameters())
    assert not torch.equal(net.run(x).tape.read[0], net.run(x).tape.read[1])  # by the picture's query


def test_the_loss_is_sigmoid_cross_entropy_and_a_little_pondering(x):
    net, labels = made(), torch.tensor([0, 3, 1, 1])
    y, run = net(x), net.run(x)
    target = nn.functional.one_hot(labels, 4).float()
    p = y.double().sigmoid()
    task = -(target * p.log() + (1 - target) * (1 - p).log()).sum(1).mean()
    assert float(net.loss(x, labels).detach()) == pytest.approx(
        float((task + 0.01 * run.tape.ponder.mean()).detach()), rel=1e-4
    )
    assert float(net.loss(x, labels, weight=0).detach()) == pytest.approx(float(task.detach()), rel=1e-4)


def test_it_starts_with_an_empty_head_and_the_published_sizes():
    net = foveate.create("adatape") if _card_works() else AdaTape()
    assert not net.head.weight.any()
    assert net.head.bias[0].item() == pytest.approx(-6.9078, abs=1e-3)
    assert (net.reader.tokens, net.reader.merged, net.reader.keys) == (10, 5, 64)
    assert net.bank.pos_embed.shape == (1, 784, 384)


def _card_works():
    from foveate import catalog

    return catalog.card("adatape").works


def test_a_copy_reads_by_itself_and_other_sizes_run(x):
    net = made()
    twin = copy.deepcopy(net)
    nn.init.normal_(twin.host.blocks[1].norm1.weight)
    assert twin.host.model is twin
    with torch.no_grad():
        assert not torch.equal(twin(x), net(x))
        assert net(torch.rand(2, 3, 45, 37)).shape == (2, 4)


def test_unusable_settings(x):
    for settings, words in (({"bank": "disk"}, "disk"), ({"layer": 4}, "3 blocks"), ({"threshold": 7.0}, "threshold")):
        with pytest.raises(InputError, match=words):
            AdaTape(**SHAPE, **{"tape_tokens": 6, **settings})
    with pytest.raises(InputError, match="need a bank of 66, got 64"):
        made(tape_tokens=33, threshold=16.0)(x)
