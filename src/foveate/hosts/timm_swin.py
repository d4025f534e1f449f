"""timm's `SwinTransformer`, described as `foveate.hosts.swin.Swin`; by duck typing, timm is never imported here."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from foveate.engine.surgery import Handle, patch_forward
from foveate.hosts.picture import IMAGENET, Pixels
from foveate.hosts.swin import OnMap, Stage, Swin, WindowBlock


@dataclass(frozen=True, eq=False)
class TimmWindowBlock(WindowBlock):
    """`SwinTransformerBlock`, of square windows."""

    rolls_first = True

    def attend(self, windows: Tensor, mask: Tensor | None) -> Tensor:
        y: Tensor = self.attention(windows, mask)
        return y

    def size(self, grid: tuple[int, int]) -> tuple[int, int]:
        block: Any = self.module
        return int(block.window_size[0]), int(block.shift_size[0])

    def patch(self, fn: Callable[[OnMap, Tensor], Tensor]) -> Handle:
        return patch_forward(self.module, fn)


@dataclass(frozen=True, eq=False)
class TimmSwin(Swin):
    """timm's `SwinTransformer`."""

    def features(self, pixels: Tensor) -> Tensor:
        body: Any = self.body
        y: Tensor = body.forward_features(pixels)
        return y.permute(0, 3, 1, 2)


def describe_timm_swin(model: nn.Module, body: nn.Module) -> TimmSwin | None:
    """Describe the body when it has the parts of timm's SwinTransformer, else None."""
    parts: Any = body
    patches = getattr(getattr(parts, "patch_embed", None), "proj", None)
    if not all(hasattr(parts, name) for name in ("layers", "norm", "forward_features")) or not isinstance(
        patches, nn.Conv2d
    ):
        return None
    stages = []
    for layer in parts.layers:
        blocks = list(getattr(layer, "blocks", []))
        if not blocks or any(type(block).__name__ != "SwinTransformerBlock" for block in blocks):
            return None
        found = tuple(TimmWindowBlock(b, b.norm1, b.attn, b.norm2, b.mlp, b.drop_path1, b.drop_path2) for b in blocks)
        if any(len(set(block.window_size)) > 1 or len(set(block.shift_size)) > 1 for block in blocks):
            return None
        shrink = None if isinstance(layer.downsample, nn.Identity) else layer.downsample
        stages.append(Stage(layer, found, blocks[0].dim, shrink))
    config = getattr(parts, "pretrained_cfg", None) or {}
    mean, std = (tuple(config.get(key, default)) for key, default in zip(("mean", "std"), IMAGENET, strict=True))
    rows, columns = parts.patch_embed.img_size
    pixels = Pixels(mean, std, (rows, columns), int(patches.stride[0]))
    return TimmSwin(model, body, patches, tuple(stages), parts.norm, getattr(parts, "head", None), pixels)
