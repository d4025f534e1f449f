import pytest
import torch
import torch.nn.functional as F

from foveate.errors import InputError
from foveate.layers.transformer import Attention, Block, VisionTransformer
from foveate.meter import count_flops

SMALL = {"img_size": 32, "patch_size": 8, "embed_dim": 24, "depth": 2, "num_heads": 3, "num_classes": 5}


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


def test_attention_is_softmax_of_scaled_scores():
    layer, x = Attention(8, 2), torch.rand(2, 5, 8)
    q, k, v = layer.qkv(x).view(2, 5, 3, 2, 4).permute(2, 0, 3, 1, 4)
    y = (q @ k.mT / 2).softmax(-1) @ v
    torch.testing.assert_close(layer(x), layer.proj(y.transpose(1, 2).reshape(2, 5, 8)))


def test_masked_tokens_change_nothing():
    block, x = Block(8, 2), torch.rand(2, 5, 8)
    mask = torch.tensor([[True] * 3 + [False] * 2, [True] * 5])
    torch.testing.assert_close(block(x, mask)[0, :3], block(x[:1, :3])[0])
    torch.testing.assert_close(block(x, mask)[1], block(x)[1])


@pytest.mark.parametrize("pool", ["token", "avg"])
def test_shapes_at_other_sizes(pool):
    model = VisionTransformer(**SMALL, global_pool=pool).eval()
    assert model(torch.rand(2, 3, 32, 32)).shape == (2, 5)
    assert model.forward_features(torch.rand(1, 3, 40, 24)).shape == (1, 15 + (pool == "token"), 24)


def test_tokens_are_projected_patches_with_positions():
    model, x = VisionTransformer(**SMALL), torch.rand(1, 3, 32, 32)
    tokens = model._pos_embed(model.patch_embed(x))
    patch = F.linear(
        x[0, :, 8:16, 16:24].flatten(), model.patch_embed.proj.weight.flatten(1), model.patch_embed.proj.bias
    )
    torch.testing.assert_close(tokens[0, 1 + 4 + 2], patch + model.pos_embed[0, 1 + 4 + 2])
    torch.testing.assert_close(tokens[0, 0], model.cls_token[0, 0] + model.pos_embed[0, 0])


def test_flops_are_those_of_its_products():
    n, c = 17, 24
    blocks = 2 * 2 * (12 * n * c * c + 2 * n * n * c)
    assert count_flops(VisionTransformer(**SMALL).eval(), torch.rand(1, 3, 32, 32)) == blocks + 2 * (
        16 * 192 * c + c * 5
    )


def test_gradients_reach_every_parameter():
    model = VisionTransformer(**SMALL)
    model(torch.rand(2, 3, 32, 32)).square().sum().backward()
    assert all(p.grad is not None and bool(p.grad.any()) for p in model.parameters())


def test_saved_and_loaded_it_is_the_same(tmp_path):
    model, x = VisionTransformer(**SMALL).eval(), torch.rand(1, 3, 32, 32)
    model.save_pretrained(tmp_path)
    assert torch.equal(VisionTransformer.from_pretrained(tmp_path).eval()(x), model(x))


def test_sizes_that_do_not_divide_are_refused():
    with pytest.raises(InputError, match="do not divide pictures of 30"):
        VisionTransformer(30, 8)
    with pytest.raises(InputError, match="5 heads"):
        VisionTransformer(32, 8, embed_dim=24, num_heads=5)
