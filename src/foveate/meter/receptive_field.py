"""The effective receptive field: which pixels really move what a network says about the one in the middle.

Ding et al. 2022 (arXiv:2203.06717), after Luo et al. 2016. With z the sum over channels of relu of the last features at
their centre, a pixel contributes

    A = sum over pictures and colours of relu(dz / dx)      [H, W]

and its score is log10(A + 1) over the largest of them. The field is summarised by the smallest square around the centre
that holds more than a given share of all scores.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from foveate.errors import InputError


def effective_receptive_field(features: Callable[[Tensor], Tensor], pictures: Tensor) -> Tensor:
    """Score every pixel by how much it moves the features in the middle.

    Args:
        features: pictures -> a map [B, C, h, w]; of a network in eval mode, such as `model.forward_features`.
        pictures: as the network takes them; their contributions are added.

    Shape: pictures [B, C, H, W] -> [H, W] in 0..1.
    Raises: InputError for features that are no map.
    """
    total = pictures.new_zeros(pictures.shape[2:])
    with torch.enable_grad():
        for picture in pictures.split(1):
            x = picture.detach().requires_grad_()
            y = features(x)
            if y.dim() != 4:
                raise InputError(f"a receptive field needs a map of features [B, C, h, w], got {tuple(y.shape)}.")
            z = y[:, :, y.shape[2] // 2, y.shape[3] // 2].relu().sum()
            total += torch.autograd.grad(z, x)[0].relu().sum((0, 1))
    score = torch.log10(total + 1)
    return score / score.max().clamp_min(torch.finfo(score.dtype).tiny)


def side_of(score: Tensor, share: float = 0.5) -> int:
    """The side in pixels of the smallest square around the centre that holds more than a share of all scores.

    >>> side_of(torch.ones(9, 9), 0.5)
    7
    """
    if score.dim() != 2 or not 0 <= share < 1:
        raise InputError(f"side_of takes scores [H, W] and a share in 0..1, got {tuple(score.shape)} and {share}.")
    y, x = (abs(torch.arange(n, device=score.device) - n // 2) for n in score.shape)
    radius = torch.maximum(y[:, None], x[None])
    held = torch.bincount(radius.flatten(), score.flatten().double()).cumsum(0)
    return 2 * int((held <= share * held[-1]).sum()) + 1
