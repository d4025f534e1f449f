"""Plug-ins on timm's own classes: less is spent, and everything comes back."""

from functools import partial

import pytest
import torch

from foveate.encode.adaptive_computation_modules import AdaptiveComputationModules
from foveate.encode.mone import plugin as mone
from foveate.encode.sparsevit import SparseViT
from foveate.encode.tokenlearner import plugin as tokenlearner
from foveate.encode.xt import XT
from foveate.meter import count_flops
from small_hosts import filled, output

VIT = {"img_size": 32, "patch_size": 4, "embed_dim": 48, "depth": 3, "num_heads": 3, "num_classes": 4}
KINDS = {
    "plain": {},
    "registers": {"reg_tokens": 3, "no_embed_class": True, "init_values": 0.1},
    "averaged, no class token": {"class_token": False, "global_pool": "avg"},
}
CHEAPER = {
    "mone": partial(mone, budget=0.6),
    "tokenlearner": partial(tokenlearner, budget=0.6),
    "adaptive-computation-modules": partial(AdaptiveComputationModules, budget=0.6, gate=4),
}
PICTURES = torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))


def comes_back(model, plug, x):
    """What is spent on x with a plug-in over what is spent without, the model being the same before and after."""
    before, keys, modules = output(model, x), list(model.state_dict()), list(model.modules())
    dense = count_flops(model, x)
    handle = plug(model)
    share = count_flops(model, x) / dense
    assert output(model, x).isfinite().all()
    handle.remove()
    assert torch.equal(output(model, x), before)
    assert list(model.state_dict()) == keys
    assert list(model.modules()) == modules
    return share


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", CHEAPER)
def test_a_vision_transformer_spends_its_budget(timm, name, kind):
    model = filled(timm.models.vision_transformer.VisionTransformer(**VIT, **KINDS[kind]))
    assert 0.4 < comes_back(model, CHEAPER[name], PICTURES) < 0.62


def swin(timm):
    return filled(
        timm.models.swin_transformer.SwinTransformer(
            img_size=64, patch_size=4, embed_dim=8, depths=(2, 2), num_heads=(1, 2), window_size=4, num_classes=3
        )
    )


def test_a_swin_spends_its_budget(timm):
    x = torch.rand(2, 3, 64, 64)
    assert comes_back(swin(timm), partial(SparseViT, budget=0.7), x) == pytest.approx(0.7, abs=0.1)


def test_a_swin_sees_larger_pictures(timm):
    model, x = swin(timm), torch.rand(1, 3, 128, 64)
    handle = XT(model)
    assert output(model, x).isfinite().all()
    handle.remove()
    assert output(model, x[..., :64, :]).shape == (1, 3)
