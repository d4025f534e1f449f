import pytest
import torch
from torch import nn

from foveate.encode.levit import SIZES, LeViT, choose_size
from foveate.errors import BudgetError, InputError
from foveate.layers.distance_attention import Attention, LinearNorm, ShrinkingAttention
from foveate.layers.residual import Residual
from foveate.meter import count_flops, count_parameters

TINY = {
    "num_classes": 5,
    "img_size": 32,
    "patch_size": 4,
    "embed_dims": (16, 24, 32),
    "key_dim": 8,
    "num_heads": (2, 3, 4),
    "depths": (1, 1, 1),
}


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


# ---------------------------------------------------------------------- published figures


@pytest.mark.parametrize(
    ("size", "parameters", "mmacs"),
    [
        ("128s", 7_777_058, 305),
        ("128", 9_213_936, 406),
        ("192", 10_947_069, 658),
        ("256", 18_893_876, 1120),
        ("384", 39_128_836, 2353),
    ],
)
def test_published_sizes(size, parameters, mmacs):
    with torch.device("meta"):
        net = LeViT(size).eval()
        spent = count_flops(net, torch.zeros(1, 3, 224, 224))
    assert count_parameters(net) == parameters
    assert spent / 2e6 == pytest.approx(mmacs, rel=0.01)
    assert [m.grid for m in net.modules() if isinstance(m, ShrinkingAttention)] == [(14, 14), (7, 7)]


def test_the_largest_drops_branches_and_no_other_does():
    with torch.device("meta"):
        drops = {size: {m.drop for m in LeViT(size).modules() if isinstance(m, Residual)} for size in SIZES}
    assert drops == {"128s": {0.0}, "128": {0.0}, "192": {0.0}, "256": {0.0}, "384": {0.1}}


# ---------------------------------------------------------------------- the network


def test_a_fresh_stage_is_the_identity():
    net = LeViT(**(TINY | {"embed_dims": (16,), "num_heads": (2,), "depths": (3,)})).eval()
    x = torch.rand(2, 3, 32, 32)
    with torch.no_grad():
        torch.testing.assert_close(net.forward_features(x), net.patch_embed(x).flatten(2).mT, atol=0, rtol=0)


@pytest.mark.parametrize("distillation", [True, False])
@pytest.mark.parametrize("side", [32, 45])
def test_folding_changes_nothing(distillation, side):
    torch.manual_seed(0)
    net = seasoned(LeViT(**TINY, distillation=distillation))
    x = torch.rand(2, 3, side, 32)
    with torch.no_grad():
        expected = net(x)
        fused = net.train().fuse()
        assert not fused.training
        torch.testing.assert_close(fused(x), expected, atol=1e-4, rtol=1e-4)
        torch.testing.assert_close(fused.fuse()(x), expected, atol=1e-4, rtol=1e-4)
    kinds = {type(m) for m in fused.modules()}
    assert not kinds & {LinearNorm, nn.BatchNorm1d, nn.BatchNorm2d}
    assert isinstance(fused.head, nn.Linear)
    assert fused.head_dist is None


def test_folding_reads_tables_once():
    net = seasoned(LeViT(**TINY)).fuse()
    x = torch.rand(1, 3, 32, 32)
    with torch.no_grad():
        before = net(x)
        for part in net.modules():
            if isinstance(part, Attention):
                assert not part.attention_biases.requires_grad
                part.attention_biases.add_(torch.randn_like(part.attention_biases))
        assert torch.equal(net(x), before)


def test_two_heads_while_training_and_their_mean_after():
    torch.manual_seed(0)
    net, x = LeViT(**TINY), torch.rand(4, 3, 32, 32)
    own, teachers = net(x)
    assert own.shape == teachers.shape == (4, 5)
    seasoned(net)
    with torch.no_grad():
        mean = net.pool(net.forward_features(x))
        torch.testing.assert_close(net(x), (net.head(mean) + net.head_dist(mean)) / 2)
        assert torch.equal(net.forward_head(net.forward_features(x), pre_logits=True), mean)
        net.reset_classifier(0)
        assert net.head_dist is None
        assert torch.equal(net(x), mean)
    net.reset_classifier(7)
    assert net.eval()(x).shape == (4, 7)
    assert LeViT(**TINY, distillation=False).train()(x).shape == (4, 5)


def test_dropped_branches_keep_the_mean():
    torch.manual_seed(0)
    layer, x = Residual(nn.Identity(), 0.25), torch.ones(4000, 1, 1, 1)
    y = layer(x)
    assert sorted(y.unique().tolist()) == pytest.approx([1, 1 + 1 / 0.75])
    assert y.mean().item() == pytest.approx(2, abs=0.05)
    assert torch.equal(layer.eval()(x), 2 * x)


@pytest.mark.parametrize("size", [(1, 1), (30, 33), (64, 20)])
def test_other_sizes_are_taken(size):
    with torch.no_grad():
        assert LeViT(**TINY).eval()(torch.rand(1, 3, *size)).shape == (1, 5)


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"size": "512"}, "unknown size '512'; use one of '128s'"),
        ({"depths": (1, 1)}, "equally long"),
        ({"patch_size": 6}, "power of two.*got 6"),
        ({"patch_size": 64}, "divides the first width; got 64 and 16"),
        ({"img_size": 0}, "at least 1, got 0"),
        ({"key_dim": 0}, "at least 1"),
        ({"key_dim": 20}, "at most the narrowest width"),
    ],
)
def test_settings_that_do_not_fit(settings, says):
    with pytest.raises(InputError, match=says):
        LeViT(**(TINY | settings))


# ---------------------------------------------------------------------- a size for a budget


@pytest.mark.parametrize(
    ("budget", "size"),
    [("0.7 GFLOPs", "128s"), ("2.3 GFLOPs", "256"), ("50 GFLOPs", "384"), (1.0, "384"), (0.3, "192")],
)
def test_a_size_for_a_budget(budget, size):
    assert choose_size(budget) == size


def test_a_budget_that_no_size_meets():
    with pytest.raises(BudgetError, match=r"128s costs, 0\.609 GFLOPs"):
        choose_size("0.5 GFLOPs")


def test_a_size_for_a_latency(monkeypatch):
    from foveate import meter
    from foveate.meter import Measurement

    times, net = iter([0.01, 0.02, 0.03]), LeViT(**TINY)
    monkeypatch.setattr("foveate.encode.levit.SIZES", dict.fromkeys(("a", "b", "c")))
    monkeypatch.setattr("foveate.encode.levit.LeViT", lambda size: net)
    monkeypatch.setattr(meter, "measure", lambda *_: Measurement(next(times), 0, None, None), raising=False)
    assert choose_size("25 ms", img_size=32) == "b"
