"""What other libraries' vision models look like, so that a plug-in says once what it does and works on all of them.

    host = foveate.hosts.vit(model)      transformers ViT, DINOv2, CLIP's vision tower; timm's VisionTransformer; ours
    host = foveate.hosts.swin(model)     transformers Swin and Swin v2; timm's SwinTransformer
    model = foveate.hosts.load(name)     from a folder or the Hub, through transformers

Nothing here imports transformers or timm but `load`: a host is known by its parts.
"""

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, TypeVar

from torch import nn

from foveate.errors import InputError, MissingExtraError
from foveate.hosts.swin import Swin
from foveate.hosts.timm_swin import describe_timm_swin
from foveate.hosts.timm_vit import describe_timm
from foveate.hosts.transformers_swin import describe_swin
from foveate.hosts.transformers_vit import describe_vit
from foveate.hosts.vit import ViT

Host = TypeVar("Host", ViT, Swin)


def vit(model: nn.Module) -> ViT:
    """Describe the plain vision transformer that a model is or holds.

    Raises: InputError when there is none that is known.
    """
    known = "a plain vision transformer (transformers: ViT, DINOv2, CLIP vision; timm: VisionTransformer)"
    return _describe(model, (describe_vit, describe_timm), known)


def swin(model: nn.Module) -> Swin:
    """Describe the Swin transformer that a model is or holds.

    Raises: InputError when there is none that is known.
    """
    known = "a Swin transformer (transformers: Swin, Swin v2; timm: SwinTransformer)"
    return _describe(model, (describe_swin, describe_timm_swin), known)


def load(name: str | Path) -> nn.Module:
    """Load a vision model of transformers, for classification where it has a head for that, in evaluation mode.

    Args:
        name: a folder that `save_pretrained` wrote, or a name on the Hugging Face Hub.

    Raises: MissingExtraError without transformers; InputError when there is no such model.
    """
    try:
        from transformers import AutoConfig, AutoModel, AutoModelForImageClassification
    except ImportError as error:
        raise MissingExtraError("Loading a host needs transformers: pip install 'foveate[hosts]'") from error
    try:
        config = AutoConfig.from_pretrained(name)
        classifies = any("Classification" in kind for kind in config.architectures or [])
        kind: Any = AutoModelForImageClassification if classifies else AutoModel
        model: nn.Module = kind.from_pretrained(name).eval()
    except (OSError, ValueError) as error:
        raise InputError(
            f"cannot load the model {str(name)!r} ({error}); name a folder or a model of the Hub."
        ) from error
    return getattr(model, "vision_model", model)


def _describe(model: nn.Module, adapters: Iterable[Callable[[nn.Module, nn.Module], Host | None]], known: str) -> Host:
    if not isinstance(model, nn.Module):
        raise InputError(f"expected a model, got {type(model).__name__}; pass the nn.Module itself.")
    for body in model.modules():
        for adapter in adapters:
            found = adapter(model, body)
            if found is not None:
                return found
    raise InputError(f"{type(model).__name__} neither is nor holds {known}.")
