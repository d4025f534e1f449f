"""Small hosts of every class that is known, with random weights."""

from collections.abc import Callable

import pytest
import torch
from torch import nn

from foveate.layers.transformer import VisionTransformer

SIDE, PATCH = 32, 8
VIT = {"hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 3, "image_size": SIDE, "patch_size": PATCH}
SWIN = {"embed_dim": 8, "depths": [2, 2], "num_heads": [1, 2], "window_size": 4, "image_size": 32, "patch_size": 4}


def _vits() -> dict[str, Callable[[], nn.Module]]:
    made: dict[str, Callable[[], nn.Module]] = {
        "ours": lambda: VisionTransformer(SIDE, PATCH, 24, 2, 3, num_classes=4),
        "ours, averaged": lambda: VisionTransformer(SIDE, PATCH, 24, 2, 3, num_classes=4, global_pool="avg"),
    }
    try:
        import transformers as t
    except ImportError:
        return made
    clip = {**VIT, "intermediate_size": 40}
    dino = {**VIT, "mlp_ratio": 2, "layerscale_value": 0.5}
    return made | {
        "ViTModel": lambda: t.ViTModel(t.ViTConfig(**clip)),
        "ViTForImageClassification": lambda: t.ViTForImageClassification(t.ViTConfig(**clip, num_labels=4)),
        "ViTModel, eager": lambda: t.ViTModel(t.ViTConfig(**clip, attn_implementation="eager")),
        "Dinov2Model": lambda: t.Dinov2Model(t.Dinov2Config(**dino)),
        "Dinov2ForImageClassification": lambda: t.Dinov2ForImageClassification(
            t.Dinov2Config(**dino, use_swiglu_ffn=True, num_labels=4)
        ),
        "Dinov2WithRegistersModel": lambda: t.Dinov2WithRegistersModel(t.Dinov2WithRegistersConfig(**dino)),
        "CLIPVisionModel": lambda: t.CLIPVisionModel(t.CLIPVisionConfig(**clip)),
    }


def _swins() -> dict[str, Callable[[], nn.Module]]:
    try:
        import transformers as t
    except ImportError:
        return {}
    return {
        "SwinModel": lambda: t.SwinModel(t.SwinConfig(**SWIN)),
        "SwinForImageClassification": lambda: t.SwinForImageClassification(t.SwinConfig(**SWIN, num_labels=4)),
        "Swinv2Model": lambda: t.Swinv2Model(t.Swinv2Config(**SWIN)),
    }


def _made(build: Callable[[], nn.Module]) -> nn.Module:
    torch.manual_seed(0)
    model = build().eval()
    with torch.no_grad():
        for p in model.parameters():  # large enough that every part of a host shows in its output
            p.normal_(0, 0.2)
    return model


@pytest.fixture(params=_vits().values(), ids=_vits())
def a_vit(request: pytest.FixtureRequest) -> nn.Module:
    """A vision transformer of each class that is known, for 32 x 32 pixels, patches of 8, width 24, two blocks."""
    return _made(request.param)


@pytest.fixture(params=_swins().values(), ids=_swins())
def a_swin(request: pytest.FixtureRequest) -> nn.Module:
    """A Swin of each class that is known, for 32 x 32 pixels, two stages of two blocks, windows of 4."""
    return _made(request.param)
