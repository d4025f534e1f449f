"""What every image classifier offers, in timm's words: forward_features, forward_head, reset_classifier."""

import torch
from huggingface_hub import PyTorchModelHubMixin
from torch import Tensor, nn

from foveate.errors import InputError


class ImageClassifier(nn.Module, PyTorchModelHubMixin):
    """Base of networks that classify pictures: forward = forward_head(forward_features(x)).

    A network begins its __init__ with `super().__init__(num_features, in_chans)`, ends it with
    `self.reset_classifier(num_classes)`, defines `forward_features`, which calls `self.check(x)` first, and overrides
    `pool` where its features are not a map.

    Args:
        num_features: C, channels of the pooled features.
        in_chans: channels of the picture.

    Shape: [B, in_chans, H, W] -> [B, num_classes], or [B, C] without a head.
    """

    head: nn.Module
    num_classes: int

    def __init__(self, num_features: int, in_chans: int = 3) -> None:
        super().__init__()
        self.num_features, self.in_chans = num_features, in_chans

    def forward_features(self, x: Tensor) -> Tensor:
        """Features before pooling: a map [B, C, h, w] or tokens [B, N, C]."""
        raise InputError(f"{type(self).__name__} has no forward_features; define it.")

    def pool(self, features: Tensor) -> Tensor:
        """One vector per picture: the mean over the map. Shape: [B, C, h, w] -> [B, C]."""
        return features.mean((2, 3))

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """Classes from features; with `pre_logits`, the pooled features themselves."""
        x = self.pool(x)
        return x if pre_logits else self.head(x)

    def forward(self, x: Tensor) -> Tensor:
        return self.forward_head(self.forward_features(x))

    def get_classifier(self) -> nn.Module:
        """The last layer."""
        return self.head

    def reset_classifier(self, num_classes: int) -> None:
        """Put in a new last layer for another number of classes; 0 leaves it out. `save_pretrained` remembers it.

        Raises: InputError for a negative number.
        """
        if num_classes < 0:
            raise InputError(f"num_classes must be 0 (no head) or more, got {num_classes}.")
        old = next(self.parameters(), None)
        self.num_classes = num_classes
        self.head = nn.Linear(self.num_features, num_classes) if num_classes else nn.Identity()
        if old is not None:
            self.head.to(old.device, old.dtype)
        config = getattr(self, "_hub_mixin_config", None)
        if isinstance(config, dict) and "num_classes" in config:
            config["num_classes"] = num_classes

    def check(self, x: Tensor) -> None:
        """Refuse anything but non-empty float pictures [B, in_chans, H, W]; NaN and infinity in evaluation only.

        Raises: InputError that says what to do.
        """
        shape = tuple(x.shape)
        if x.dim() != 4 or x.shape[1] != self.in_chans:
            raise InputError(f"expected pictures of shape [B, {self.in_chans}, H, W], got {shape}; reshape them.")
        if x.numel() == 0:
            raise InputError(f"the picture is empty: shape {shape}. Pass at least one pixel.")
        if not x.is_floating_point():
            raise InputError(f"expected float values, got {x.dtype}; divide by the type's largest value.")
        # In training a loss shows it, and asking would make an accelerator wait at every step.
        if self.training or x.is_meta or torch.compiler.is_compiling():
            return
        if not torch.isfinite(x).all():
            raise InputError("the picture holds NaN or infinite values; clean it first (torch.nan_to_num).")
