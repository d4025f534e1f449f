"""Losses that look at pictures as people do, in one place.

>>> import torch
>>> x, y = torch.rand(2, 1, 3, 48, 48)
>>> all(bool(loss(x, y) > loss(y, y)) for loss in (SSIMLoss(), MSSSIMLoss(), MSSSIMLoss(mix=0.16), PerceptualLosses()))
True
"""

from foveate.learn.ms_ssim_learning import ExpectedLossVAE, MSSSIMLoss, SSIMLoss, kl_to_normal
from foveate.learn.perceptual_losses import (
    PerceptualLosses,
    Tapped,
    Terms,
    feature_loss,
    gram,
    style_loss,
    total_variation,
)

__all__ = [
    "ExpectedLossVAE",
    "MSSSIMLoss",
    "PerceptualLosses",
    "SSIMLoss",
    "Tapped",
    "Terms",
    "feature_loss",
    "gram",
    "kl_to_normal",
    "style_loss",
    "total_variation",
]
