"""Swin and Swin v2 of transformers, described as `foveate.hosts.swin.Swin`."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

from torch import Tensor, nn

from foveate.engine.surgery import Handle, patch_forward
from foveate.hosts.picture import IMAGENET, Pixels
from foveate.hosts.swin import OnMap, Stage, Swin, WindowBlock


@dataclass(frozen=True, eq=False)
class SwinBlock(WindowBlock):
    """`SwinLayer`."""

    def attend(self, windows: Tensor, mask: Tensor | None) -> Tensor:
        y: Tensor = self.attention(windows, mask)[0]
        return y

    def size(self, grid: tuple[int, int]) -> tuple[int, int]:
        layer: Any = self.module
        if min(grid) <= layer.window_size and not self.post_norm:  # the second version is built for its map
            return min(grid), 0
        return int(layer.window_size), int(layer.shift_size)

    def patch(self, fn: Callable[[OnMap, Tensor], Tensor]) -> Handle:
        return patch_forward(self.module, partial(self._forward, fn))

    def _forward(
        self,
        fn: Callable[[OnMap, Tensor], Tensor],
        forward: Callable[..., Any],
        hidden_states: Tensor,
        input_dimensions: tuple[int, int],
        *more: Any,
        **named: Any,
    ) -> tuple[Any, ...]:
        # Version 1 gives weights of attention after the map; there are none where the block does not run as it was.
        rest: list[tuple[Any, ...]] = [() if self.post_norm else (None,)]

        def run(x: Tensor) -> Tensor:
            y, *others = forward(x.flatten(1, 2), input_dimensions, *more, **named)
            rest[0] = tuple(others)
            return y.unflatten(1, tuple(input_dimensions))

        y = fn(run, hidden_states.unflatten(1, tuple(input_dimensions)))
        return (y.flatten(1, 2), *rest[0])


@dataclass(frozen=True, eq=False)
class Swinv2Block(SwinBlock):
    """`Swinv2Layer`."""

    post_norm = True


@dataclass(frozen=True, eq=False)
class TransformersSwin(Swin):
    """`SwinModel`, `Swinv2Model` and what is built on them."""

    def features(self, pixels: Tensor) -> Tensor:
        grid = [-(-s // self.patch) for s in pixels.shape[2:]]
        for _ in self.stages[1:]:
            grid = [-(-s // 2) for s in grid]
        return self.body(pixels).last_hidden_state.mT.unflatten(2, grid)


def describe_swin(model: nn.Module, body: nn.Module) -> TransformersSwin | None:
    """Describe the body when it is a Swin of transformers, else None."""
    parts: Any = body
    patches = getattr(getattr(getattr(parts, "embeddings", None), "patch_embeddings", None), "projection", None)
    layers = getattr(getattr(parts, "encoder", None), "layers", None)
    if not isinstance(patches, nn.Conv2d) or not isinstance(layers, nn.ModuleList) or not hasattr(parts, "layernorm"):
        return None
    stages = []
    layer: Any
    for layer in layers:
        blocks = [_block(block) for block in getattr(layer, "blocks", [])]
        found = tuple(block for block in blocks if block is not None)
        if not found or len(found) < len(blocks):
            return None
        stages.append(Stage(layer, found, _width(found[0].norm1), layer.downsample))
    size = parts.config.image_size
    rows, columns = (size, size) if isinstance(size, int) else size
    pixels = Pixels(*IMAGENET, (rows, columns), int(patches.stride[0]))
    head = getattr(model, "classifier", None)
    return TransformersSwin(model, body, patches, tuple(stages), parts.layernorm, head, pixels)


def _block(layer: Any) -> SwinBlock | None:
    kind = type(layer).__name__
    if kind == "Swinv2Layer":
        mlp, drop = nn.Sequential(layer.intermediate, layer.output), layer.drop_path
        return Swinv2Block(layer, layer.layernorm_before, layer.attention, layer.layernorm_after, mlp, drop, drop)
    if kind != "SwinLayer" or not hasattr(layer, "mlp"):
        return None
    drop1, drop2 = nn.Sequential(layer.dropout, layer.drop_path), layer.dropout
    return SwinBlock(layer, layer.layernorm_before, layer.attention, layer.layernorm_after, layer.mlp, drop1, drop2)


def _width(norm: nn.Module) -> int:
    shape: Any = norm.normalized_shape
    return int(shape[0])
