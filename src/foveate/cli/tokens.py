"""foveate tokens: a picture of what a model will look at."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from foveate.cli.console import note

if TYPE_CHECKING:
    from torch import nn

_ON_WINDOWS = ("sparsevit",)
"""Methods whose hosts are Swin transformers."""


def tokens(
    picture: Annotated[Path, typer.Argument(metavar="PICTURE", help="A photograph.")],
    out: Annotated[Path, typer.Option("--out", "-o", help="Where the drawing goes: map.png, map.jpg, ...")],
    method: Annotated[
        str, typer.Option("--method", "-m", help="A plug-in that chooses tokens: `foveate list --kind plugin`.")
    ] = "adaptive-patch-transformer",
    budget: Annotated[
        str, typer.Option("--budget", "-b", help="What to spend: a share (0.5, 50%), '20 GFLOPs', '200 tokens'.")
    ] = "0.5",
    model: Annotated[
        str | None,
        typer.Option("--model", help="A vision model: a folder or a name on the Hub.  [default: one without training]"),
    ] = None,
    side: Annotated[
        int | None, typer.Option("--side", help="Longer side in pixels.  [default: cut to what the model takes]")
    ] = None,
) -> None:
    """Draw where a vision model's tokens go: dark where it hardly looks, cells outlined.

    Without --model an untrained ViT-S/16 for 384 x 384 pixels stands in (for sparsevit a Swin-T), which is the same to
    methods that choose by the picture alone.

    \b
    Examples:
      foveate tokens photo.jpg --out map.png
      foveate tokens photo.jpg --budget 0.25 --side 1024 --out map.png
      foveate tokens photo.jpg --model google/vit-base-patch16-384 --out map.png
    """
    import torch

    import foveate
    from foveate.data.pictures import save
    from foveate.errors import InputError
    from foveate.hosts.plugin import TokenHandle

    if model is None:
        torch.manual_seed(0)
        host = _stand_in(method)
    else:
        from foveate.hosts import load

        host = load(model)
    with foveate.apply(host, method, budget=budget) as handle:
        if not isinstance(handle, TokenHandle):
            raise InputError(f"{method} chooses no tokens, so there is nothing to draw; see `foveate list`.")
        drawn, look = handle.draw(picture, side)
    save(out, drawn)
    note(f"{out}: {look.tokens[0]} of {look.full} {look.unit}")


def _stand_in(method: str) -> "nn.Module":
    """A host of random weights."""
    if method not in _ON_WINDOWS:
        from foveate.layers.transformer import VisionTransformer

        return VisionTransformer(img_size=384, num_classes=0).eval()
    try:
        from transformers import SwinConfig, SwinModel
    except ImportError as error:
        from foveate.errors import MissingExtraError

        raise MissingExtraError("A Swin transformer needs transformers: pip install 'foveate[hosts]'") from error
    return SwinModel(SwinConfig(image_size=448)).eval()
