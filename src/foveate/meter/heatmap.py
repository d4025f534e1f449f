"""A picture of where the compute went: grey photograph, coloured by effort."""

import numpy as np
from PIL import Image
from torch import Tensor

# Dark violet over red and orange to light yellow: reads as cold to hot, also in grey and by the colour-blind.
_ANCHORS = np.array([[0, 0, 4], [81, 18, 124], [183, 55, 121], [252, 137, 97], [252, 253, 191]], np.float32)


def colors(values: np.ndarray) -> np.ndarray:
    """Colours of values in 0..1. Shape: [...] -> [..., 3] float in 0..255.

    >>> colors(np.array([0.0, 1.0])).astype(int).tolist()
    [[0, 0, 4], [252, 253, 191]]
    """
    at = np.clip(values, 0, 1) * (len(_ANCHORS) - 1)
    low = np.minimum(at.astype(int), len(_ANCHORS) - 2)
    part = (at - low)[..., None]
    return _ANCHORS[low] * (1 - part) + _ANCHORS[low + 1] * part


def heatmap(effort: Tensor, picture: Tensor | None = None, opacity: float = 0.7) -> Image.Image:
    """Draw effort over a photograph.

    Args:
        effort: [1, 1, h, w] in 0..1, the share of the full cost that each pixel was given.
        picture: [1, 3, h, w] in 0..1, shown in grey beneath; default none.
        opacity: of the colours over the photograph.

    Shape: a picture of w x h pixels.
    """
    heat = colors(effort[0, 0].float().cpu().numpy())
    if picture is not None:
        grey = picture[0].float().mean(0).cpu().numpy()[..., None] * 255
        heat = opacity * heat + (1 - opacity) * grey
    return Image.fromarray(heat.round().clip(0, 255).astype(np.uint8))
