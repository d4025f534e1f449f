"""Small hosts of every class that is known, with random weights: builders by name, for tests that run on them."""

from collections.abc import Callable
from functools import partial

import torch
from torch import nn

from foveate.layers.transformer import VisionTransformer

Builders = dict[str, Callable[[], nn.Module]]


def vits(side: int, patch: int, width: int, depth: int, heads: int, hidden: int = 40) -> Builders:
    """Vision transformers; without transformers, ours alone.

    Args:
        hidden: units of the MLPs, where a class takes any number.
    """
    build = partial(VisionTransformer, side, patch, width, depth, heads, num_classes=4)
    made: Builders = {"ours": build, "ours, averaged": partial(build, global_pool="avg")}
    try:
        import transformers as t
    except ImportError:
        return made
    sizes = {"hidden_size": width, "num_hidden_layers": depth, "num_attention_heads": heads}
    vit = {**sizes, "image_size": side, "patch_size": patch, "intermediate_size": hidden}
    dino = {**sizes, "image_size": side, "patch_size": patch, "mlp_ratio": 2, "layerscale_value": 0.5}
    return made | {
        "ViTModel": lambda: t.ViTModel(t.ViTConfig(**vit)),
        "ViTForImageClassification": lambda: t.ViTForImageClassification(t.ViTConfig(**vit, num_labels=4)),
        "ViTModel, eager": lambda: t.ViTModel(t.ViTConfig(**vit, attn_implementation="eager")),
        "Dinov2Model": lambda: t.Dinov2Model(t.Dinov2Config(**dino)),
        "Dinov2ForImageClassification": lambda: t.Dinov2ForImageClassification(
            t.Dinov2Config(**dino, use_swiglu_ffn=True, num_labels=4)
        ),
        "Dinov2WithRegistersModel": lambda: t.Dinov2WithRegistersModel(t.Dinov2WithRegistersConfig(**dino)),
        "CLIPVisionModel": lambda: t.CLIPVisionModel(t.CLIPVisionConfig(**vit)),
    }


def swins(side: int = 32, depths: tuple[int, ...] = (2, 2)) -> Builders:
    """Swins of stages of so many blocks, 8 channels and windows of 4; none without transformers."""
    try:
        import transformers as t
    except ImportError:
        return {}
    heads = [2**i for i in range(len(depths))]
    sizes = {"embed_dim": 8, "depths": list(depths), "num_heads": heads, "window_size": 4}
    swin = {**sizes, "image_size": side, "patch_size": 4}
    return {
        "SwinModel": lambda: t.SwinModel(t.SwinConfig(**swin)),
        "SwinForImageClassification": lambda: t.SwinForImageClassification(t.SwinConfig(**swin, num_labels=4)),
        "Swinv2Model": lambda: t.Swinv2Model(t.Swinv2Config(**swin)),
        "Swinv2ForImageClassification": lambda: t.Swinv2ForImageClassification(t.Swinv2Config(**swin, num_labels=4)),
    }


def filled(model: nn.Module, std: float = 0.2) -> nn.Module:
    """The model in evaluation, its weights random and large enough that every part shows in what it gives."""
    torch.manual_seed(0)
    with torch.no_grad():
        for p in model.parameters():
            p.normal_(0, std)
    return model.eval()


def output(model: nn.Module, x: torch.Tensor) -> torch.Tensor:
    """What a model gives, or the first thing of it, without gradients."""
    with torch.no_grad():
        y = model(x)
    return y if isinstance(y, torch.Tensor) else y[0]
