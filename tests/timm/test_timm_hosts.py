"""timm's own classes as hosts."""

import pytest
import torch

from foveate import hosts
from foveate.encode.adaptive_patch_transformer import AdaptivePatchTransformer
from foveate.engine.packed import Packed
from foveate.hosts.packing import Plan, run_packed
from foveate.layers.transformer import VisionTransformer
from foveate.meter import count_flops
from small_hosts import filled

SIZES = {"img_size": 32, "patch_size": 8, "embed_dim": 24, "depth": 2, "num_heads": 3, "num_classes": 4}
KINDS = {
    "plain": {},
    "registers, gate, norms of queries": {"reg_tokens": 3, "no_embed_class": True, "qk_norm": True, "init_values": 0.1},
    "averaged, no class token": {"class_token": False, "global_pool": "avg"},
    "norm before the blocks, any size": {"pre_norm": True, "dynamic_img_size": True, "scale_attn_norm": True},
    "attention pooling": {"global_pool": "map"},
}
PICTURES = torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))


@pytest.fixture(params=KINDS.values(), ids=KINDS)
def model(request, timm):
    return filled(timm.models.vision_transformer.VisionTransformer(**SIZES, **request.param))


def test_packed_all_tokens_give_the_output_bit_for_bit(model):
    host = hosts.vit(model)

    def plan(x):
        tokens = host.embed(x)
        lengths = (tokens.shape[1],) * len(x)
        return Plan(Packed(tokens.flatten(0, 1), lengths), lambda y: y.unflatten(0, (len(x), -1)))

    with torch.no_grad():
        before, keys = model(PICTURES), list(model.state_dict())
        with run_packed(host, plan):
            during = model(PICTURES)
        if host.prefixes:
            assert torch.equal(during, before)
        else:  # without them timm's tokens lie transposed in memory, and products of such sum in another order
            torch.testing.assert_close(during, before, atol=1e-5, rtol=1e-5)
        assert torch.equal(model(PICTURES), before)
        assert host.features(PICTURES).shape == (2, 24, 4, 4)
    assert list(model.state_dict()) == keys


def test_adaptive_patches_come_and_go(model):
    dense = count_flops(model, PICTURES)
    with AdaptivePatchTransformer(model, 0.5):
        # The correction, which nobody has trained, runs for the sake of its gradient.
        assert count_flops(model, PICTURES) < 0.7 * dense
    with torch.no_grad():
        before = model(PICTURES)
        with AdaptivePatchTransformer(model, 0.5) as handle:
            assert model(PICTURES).shape == (2, 4)
            assert handle.look(PICTURES).full == 16
        assert torch.equal(model(PICTURES), before)


def test_other_sizes_where_the_model_takes_them(timm):
    model = filled(timm.models.vision_transformer.VisionTransformer(**SIZES, dynamic_img_size=True))
    host, x = hosts.vit(model), torch.rand(1, 3, 24, 48)
    with torch.no_grad():
        expected = model(x)
        with host.patch_embedding(host.embed):
            torch.testing.assert_close(model(x), expected)


def test_normalisation_is_that_of_the_pretrained_configuration(timm):
    model = timm.create_model("vit_base_patch16_clip_224", img_size=32, depth=1)
    assert hosts.vit(model).pixels.mean == pytest.approx((0.481, 0.458, 0.408), abs=1e-3)


def test_blocks_put_together_otherwise_are_not_taken_for_plain_ones(timm):
    block = timm.models.vision_transformer.ResPostBlock
    model = timm.models.vision_transformer.VisionTransformer(**SIZES, block_fn=block)
    with pytest.raises(ValueError, match="neither is nor holds"):
        hosts.vit(model)


def test_weights_fit_our_own_transformer(timm):
    theirs = filled(timm.models.vision_transformer.VisionTransformer(**SIZES))
    ours = VisionTransformer(**SIZES).eval()
    ours.load_state_dict(theirs.state_dict())
    with torch.no_grad():
        torch.testing.assert_close(ours(PICTURES), theirs(PICTURES))


@pytest.mark.parametrize("size", [(32, 32), (40, 56)])
def test_all_windows_together_are_the_block(timm, size):
    model = timm.models.swin_transformer.SwinTransformer(
        img_size=size, patch_size=4, embed_dim=8, depths=(2, 2), num_heads=(1, 2), window_size=4, num_classes=3
    )
    host, x = hosts.swin(filled(model)), torch.rand(2, 3, *size)

    def by_windows(block):
        def fn(run, x):
            grid = (x.shape[1], x.shape[2])
            parts = [None if p is None else p.repeat(2, 1, 1) for p in (block.mask(grid, x), block.inside(grid, x))]
            windows = block.cut(x)
            return block.paste(block.run(windows.flatten(0, 1), *parts).unflatten(0, windows.shape[:2]), grid)

        return fn

    with torch.no_grad():
        before = model(x)
        handles = [block.patch(by_windows(block)) for block in host.blocks]
        torch.testing.assert_close(model(x), before, atol=1e-5, rtol=1e-5)
        for handle in reversed(handles):
            handle.remove()
        assert torch.equal(model(x), before)
        assert host.features(x).shape[:2] == (2, 16)
