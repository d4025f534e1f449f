import pytest
import torch
from torch import nn

from foveate.encode.tvconv import SIZES, STAGES, TVNet, conformance_example
from foveate.errors import InputError, WeightsError
from foveate.layers.varying_conv import FrozenTVConv
from foveate.meter import count_flops, count_parameters


def small(**settings):
    """A network whose batch norms have seen something, in eval mode."""
    torch.manual_seed(0)
    model = TVNet(**{"width": 0.1, "img_size": 32, "embedding": 16, "hidden": 4, "layers": 1} | settings)
    with torch.no_grad():
        for _ in range(3):
            model.train()(torch.rand(4, 3, 32, 32))
    return model.eval()


def test_with_depthwise_convolutions_it_is_mobilenetv2():
    with torch.device("meta"):
        model = TVNet(width=1.0, depthwise=True)
    assert count_parameters(model.stem) + count_parameters(model.blocks) == 1_811_712  # published: 3,504,872 with head
    assert count_parameters(model.tail) == 320 * 512 + 2 * 512


@pytest.mark.parametrize("size", ["x0.1", "x0.5"])
def test_inference_multiplies_as_often_as_with_depthwise_convolutions(size):
    settings = {**SIZES[size], "img_size": 16, "hidden": 4, "layers": 0}
    models = [TVNet(**settings, depthwise=depthwise).eval().fuse() for depthwise in (False, True)]
    ours, theirs = (count_flops(model, torch.zeros(1, 3, 16, 16)) for model in models)
    assert ours == theirs
    kernels = [m.weight.numel() for m in models[0].modules() if isinstance(m, FrozenTVConv)]
    assert len(kernels) == 17


def test_folding_changes_nothing():
    model, x = small(num_classes=5), torch.rand(2, 3, 32, 32)
    with torch.no_grad():
        expected = model(x)
        torch.testing.assert_close(model.fuse()(x), expected, atol=1e-4, rtol=1e-4)
    assert not any(isinstance(m, nn.LayerNorm | nn.BatchNorm2d) for m in model.blocks.modules())


def test_it_embeds_and_with_classes_compares():
    model, x = small(), torch.rand(3, 3, 32, 32)
    with torch.no_grad():
        embedding = model(x)
        assert embedding.shape == (3, 16)
        model.reset_classifier(7)
        logits = model(x)
        assert logits.shape == (3, 7)
        assert logits.abs().max() <= 32
        cosines = nn.functional.cosine_similarity(embedding[:, None], model.head.weight[None], dim=-1)
        torch.testing.assert_close(logits, 32 * cosines, atol=1e-4, rtol=1e-4)
        assert torch.equal(model.forward_head(model.forward_features(x), pre_logits=True), embedding)


def test_the_loss_asks_for_a_margin():
    model, logits, labels = small(), torch.tensor([[32.0, 0.0], [0.0, 20.0]]), torch.tensor([0, 1])
    expected = nn.functional.cross_entropy(torch.tensor([[32 * 0.65, 0.0], [0.0, 20 - 32 * 0.35]]), labels)
    torch.testing.assert_close(model.margin_loss(logits, labels), expected)
    assert model.margin_loss(logits, labels, margin=0.0) < expected


def test_gradients_reach_every_parameter():
    torch.manual_seed(0)
    model, (x,) = conformance_example()
    y = model.train()(x)
    (y * torch.rand_like(y)).sum().backward()
    assert [name for name, p in model.named_parameters() if p.grad is None or not p.grad.any()] == []


# ---------------------------------------------------------------------- official checkpoints


def official(depthwise=False, bias=False, dropout=False, side=32, hidden=4, layers=1, embedding=16):
    """A state dict of the official names and shapes for width 0.1, written down from their code (not from ours)."""
    torch.manual_seed(1)
    state = {}

    def norm(name, c):
        for part in ("weight", "bias", "running_mean", "running_var"):
            state[f"{name}.{part}"] = torch.rand(c)
        state[f"{name}.num_batches_tracked"] = torch.tensor(1)

    def conv(name, *shape):
        state[f"{name}.weight"] = torch.rand(shape)

    def generator(name, outputs, size):
        for i in range(1 + layers):
            conv(f"{name}.{i}.0", hidden, hidden if i else 4, 3, 3)
            state[f"{name}.{i}.1.weight"] = torch.rand(hidden, *size)
            state[f"{name}.{i}.1.bias"] = torch.rand(hidden, *size)
        conv(f"{name}.{1 + layers}", outputs, hidden, 3, 3)

    conv("features.0.0", 8, 3, 3, 3)
    norm("features.0.1", 8)
    widths, index, inputs, size = [8, 8, 8, 8, 16, 16, 32], 1, 8, side
    for (expansion, _, blocks, stride), outputs in zip(STAGES, widths, strict=True):
        for i in range(blocks):
            size = -(-size // (stride if i == 0 else 1))
            at, middle, child = f"features.{index}.conv", inputs * expansion, 0
            if expansion != 1:
                conv(f"{at}.0.0", middle, inputs, 1, 1)
                norm(f"{at}.0.1", middle)
                child = 1
            if depthwise:
                conv(f"{at}.{child}.0", middle, 1, 3, 3)
            else:
                for name in ("TVConv_k", "TVConv_k_square", "stride", "channels", "h", "w"):
                    state[f"{at}.{child}.0.{name}"] = torch.tensor(3)
                state[f"{at}.{child}.0.posi_map"] = torch.rand(1, 4, size, size)
                generator(f"{at}.{child}.0.weight_layers", 9 * middle, (size, size))
                if bias:
                    generator(f"{at}.{child}.0.bias_layers", middle, (size, size))
            norm(f"{at}.{child}.1", middle)
            conv(f"{at}.{child + 1}", outputs, middle, 1, 1)
            norm(f"{at}.{child + 2}", outputs)
            inputs, index = outputs, index + 1
    conv(f"features.{index}.0", 512, inputs, 1, 1)
    norm(f"features.{index}.1", 512)
    norm("output_layer.layer1.0" if dropout else "output_layer.layer1", 512)
    state["output_layer.layer2.0.weight"], state["output_layer.layer2.0.bias"] = torch.rand(16, 512), torch.rand(16)
    norm("output_layer.layer2.1", embedding)
    return state


@pytest.mark.parametrize("settings", [{}, {"bias": True, "dropout": True}, {"depthwise": True}])
def test_an_official_checkpoint_is_read(settings):
    state = official(**settings)
    model = TVNet.load_official({"state_dict": {f"model.{k}": v for k, v in state.items()} | {"head.kernel": 0}})
    assert torch.equal(model.blocks[0].project.c.weight, state["features.1.conv.1.weight"])
    assert torch.equal(model.blocks[16].expand.bn.bias, state["features.17.conv.0.1.bias"])
    assert torch.equal(model.blocks[3].mix.bn.running_mean, state["features.4.conv.1.1.running_mean"])
    assert torch.equal(model.embed.weight, state["output_layer.layer2.0.weight"])
    if not settings.get("depthwise"):
        assert torch.equal(model.blocks[0].mix.c.maps, state["features.1.conv.0.0.posi_map"])
        last = "features.3.conv.1.0.weight_layers.2.weight"
        assert torch.equal(model.blocks[2].mix.c.generator[2].weight, state[last])
    side = 96 if settings.get("depthwise") else 32  # of which a depth-wise network says nothing
    with torch.no_grad():
        assert model(torch.rand(2, 3, side, side)).shape == (2, 16)


@pytest.mark.parametrize("damage", ["a key less", "a key more", "something else"])
def test_another_checkpoint_is_refused(damage):
    state = official()
    if damage == "a key less":
        del state["features.2.conv.3.bias"]
    elif damage == "a key more":
        state["features.2.extra"] = torch.zeros(1)
    else:
        state = {"conv1.weight": torch.zeros(1)}
    with pytest.raises(WeightsError, match="no checkpoint of a TVNet"):
        TVNet.load_official(state)


def test_pictures_of_another_size_are_refused():
    with pytest.raises(InputError, match="pictures of 32 x 32, got 40 x 32; resize"):
        small()(torch.rand(1, 3, 40, 32))
