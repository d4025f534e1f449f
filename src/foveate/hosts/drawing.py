"""A picture that anyone understands: the photograph, dark where a model hardly looks, with its cells outlined."""

import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw
from torch import Tensor

_LINE = (255, 196, 0)
_OPACITY = 0.6  # of the lines: where cells are small they must not hide the picture
_DIMMEST = 0.25
_LEAST_WIDTH = 640


def draw(picture: Tensor, effort: Tensor, boxes: Tensor | None, text: str) -> Image.Image:
    """Draw where the work goes.

    Args:
        picture: [3, H, W] in 0..1.
        effort: [h, w] in 0..1, of any grid over the picture.
        boxes: cells as xyxy in pixels, [n, 4], or None.
        text: written below the picture.

    Shape: a picture of W x H pixels or a whole multiple of it, and a line of text below.
    """
    times = max(1, -(-_LEAST_WIDTH // picture.shape[2]))
    size = (picture.shape[1] * times, picture.shape[2] * times)
    light = F.interpolate(effort[None, None].float().cpu(), size, mode="nearest")[0]
    shown = F.interpolate(picture[None].float().cpu(), size, mode="nearest")[0]
    # Effort falls by powers of four where cells grow; its square root keeps the steps apart for the eye.
    shown = shown * (_DIMMEST + (1 - _DIMMEST) * light.clamp(0, 1).sqrt())
    pixels = (shown.clamp(0, 1) * 255).round().to(torch.uint8).permute(1, 2, 0).numpy()
    photograph = Image.fromarray(pixels)
    lined = photograph.copy()
    pen = ImageDraw.Draw(lined)
    for x0, y0, x1, y1 in (boxes.cpu() * times).tolist() if boxes is not None else []:
        pen.rectangle((x0, y0, min(x1, size[1] - 1), min(y1, size[0] - 1)), outline=_LINE)
    out = Image.new("RGB", (size[1], size[0] + 28), "black")
    out.paste(Image.blend(photograph, lined, _OPACITY), (0, 0))
    ImageDraw.Draw(out).text((8, size[0] + 6), text, fill="white", font_size=16)
    return out
