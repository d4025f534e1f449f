import pytest
import torch

from foveate.encode.flash_intern_image import SIZES, FlashInternImage
from foveate.errors import InputError, WeightsError
from foveate.meter import count_parameters

SMALL = {"num_classes": 5, "channels": 32, "depths": (1, 2), "drop_path": 0.0}
POST = {"post_norm": True, "layer_scale": 1e-5, "dw_kernel_size": 3}


def small(**settings):
    """A network whose branches do something and whose norm has seen something, in eval mode."""
    torch.manual_seed(0)
    model = FlashInternImage(**SMALL, **settings)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if name.endswith(("offset_mask.weight", "offset_mask.bias", "gamma1", "gamma2")):
                p.normal_(std=0.3)
        for _ in range(3):
            model.train()(torch.rand(3, 3, 32, 40))
    return model.eval()


@pytest.mark.parametrize(("size", "millions"), [("t", 29.8), ("s", 50.1), ("b", 97.4), ("l", 223.3)])
def test_published_sizes_have_the_published_parameters(size, millions):
    with torch.device("meta"):
        model = FlashInternImage(**SIZES[size])
    assert count_parameters(model) / 1e6 == pytest.approx(millions, abs=0.06)


@pytest.mark.parametrize("settings", [{}, POST])
def test_a_classifier_in_timms_words(settings):
    model, x = small(**settings), torch.rand(2, 3, 37, 50)
    with torch.no_grad():
        features = model.forward_features(x)
        assert features.shape == (2, 96, 5, 7)
        assert [m.shape[1:] for m in model.forward_levels(x)] == [(32, 10, 13), (64, 5, 7)]
        assert torch.equal(model.forward_head(features), model(x))
        model.reset_classifier(0)
        torch.testing.assert_close(model(x), features.mean((2, 3)))


@pytest.mark.parametrize("settings", [{}, POST])
def test_folding_changes_nothing(settings):
    model, x = small(**settings), torch.rand(1, 3, 32, 32)
    with torch.no_grad():
        expected = model(x)
        torch.testing.assert_close(model.fuse()(x), expected, atol=1e-5, rtol=1e-5)
    assert not any(isinstance(m, torch.nn.BatchNorm2d) for m in model.modules())


@pytest.mark.parametrize("settings", [{}, POST])
def test_gradients_reach_every_parameter(settings):
    model = small(**settings).train()
    (model(torch.rand(2, 3, 32, 32)) * torch.rand(2, 5)).sum().backward()
    assert [name for name, p in model.named_parameters() if p.grad is None or not p.grad.any()] == []


def test_branches_are_left_out_in_training_only():
    torch.manual_seed(0)
    model = FlashInternImage(**SMALL | {"drop_path": 0.9})
    for block in (b for level in model.levels for b in level.blocks):
        torch.nn.init.normal_(block.dcn.offset_mask.bias)
    x = torch.rand(4, 3, 32, 32)
    assert not torch.equal(model.forward_levels(x)[-1], model.forward_levels(x)[-1])
    model.eval()
    assert torch.equal(model.forward_levels(x)[-1], model.forward_levels(x)[-1])


# ---------------------------------------------------------------------- official checkpoints


def official(settings):
    """A state dict of the official names and shapes, written down from their code (not from ours)."""
    torch.manual_seed(1)
    post, biases = settings.get("post_norm", False), settings.get("biases", False)
    shapes = {}

    def layer(name, *shape, bias=True):
        shapes[f"{name}.weight"] = shape
        if bias:
            shapes[f"{name}.bias"] = shape[:1]

    layer("patch_embed.conv1", 16, 3, 3, 3)
    layer("patch_embed.norm1.1", 16)
    layer("patch_embed.conv2", 32, 16, 3, 3)
    layer("patch_embed.norm2.1", 32)
    for level, (c, depth, packed) in enumerate(((32, 1, 56), (64, 2, 112))):
        for i in range(depth):
            at = f"levels.{level}.blocks.{i}"
            layer(f"{at}.norm1.0", c)
            if "dw_kernel_size" in settings:
                layer(f"{at}.dcn.offset_mask_dw", c, 1, 3, 3)
            layer(f"{at}.dcn.offset_mask", packed, c)
            layer(f"{at}.dcn.value_proj", c, c)
            layer(f"{at}.dcn.output_proj", c, c, bias=biases)
            layer(f"{at}.norm2.0", c)
            layer(f"{at}.mlp.fc1", 4 * c, c)
            layer(f"{at}.mlp.fc2", c, 4 * c, bias=biases)
            if "layer_scale" in settings:
                shapes[f"{at}.gamma1"] = shapes[f"{at}.gamma2"] = (c,)
        if not post:
            layer(f"levels.{level}.norm.0", c)
    layer("levels.0.downsample.conv", 64, 32, 3, 3, bias=False)
    layer("levels.0.downsample.norm.1", 64)
    layer("conv_head.0", 96, 64, 1, 1, bias=False)
    layer("conv_head.1.0", 96)
    shapes |= {"conv_head.1.0.running_mean": (96,), "conv_head.1.0.running_var": (96,)}
    layer("head", 5, 96)
    state = {name: 0.1 * torch.rand(shape) for name, shape in shapes.items()}
    return state | {"conv_head.1.0.num_batches_tracked": torch.tensor(3)}


@pytest.mark.parametrize("settings", [{}, POST, POST | {"biases": True}])
def test_an_official_checkpoint_is_read(settings):
    state = official(settings)
    model = FlashInternImage.load_official({"model": state})
    assert torch.equal(model.stem[3].weight, state["patch_embed.conv2.weight"])
    assert torch.equal(model.levels[1].blocks[1].mlp[2].weight, state["levels.1.blocks.1.mlp.fc2.weight"])
    assert torch.equal(model.levels[0].shrink[1].bias, state["levels.0.downsample.norm.1.bias"])
    assert torch.equal(model.tail[0].bn.running_var, state["conv_head.1.0.running_var"])
    assert len(model.state_dict()) == len(state)
    assert torch.isfinite(model(torch.rand(1, 3, 33, 40))).all()


def test_the_published_widths_bring_their_offset_scale():
    assert FlashInternImage.load_official(official({})).levels[0].blocks[0].dcn.offset_scale == 1.0
    assert FlashInternImage.load_official(official({}), offset_scale=0.5).levels[0].blocks[0].dcn.offset_scale == 0.5


@pytest.mark.parametrize("damage", ["a key less", "a key more", "something else"])
def test_another_checkpoint_is_refused(damage):
    state = official({})
    if damage == "a key less":
        del state["levels.1.blocks.0.norm1.0.bias"]
    elif damage == "a key more":
        state["levels.0.blocks.0.extra"] = torch.zeros(1)
    else:
        state = {"conv1.weight": torch.zeros(1)}
    with pytest.raises(WeightsError, match="no checkpoint of a FlashInternImage"):
        FlashInternImage.load_official(state)


def test_what_does_not_fit_is_refused():
    with pytest.raises(InputError, match="groups for each of 4 levels"):
        FlashInternImage(groups=(4, 8))
    with pytest.raises(InputError, match=r"\[B, 3, H, W\]"):
        small()(torch.rand(1, 1, 32, 32))
