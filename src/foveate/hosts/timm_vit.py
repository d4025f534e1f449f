"""timm's `VisionTransformer`, and whatever has its parts (ours in `foveate.layers.transformer` too), as a `ViT`.

By duck typing: timm is never imported here.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from foveate.engine.surgery import Handle, join, patch_forward, patch_method
from foveate.hosts.picture import HALF, Pixels
from foveate.hosts.vit import Attention, Block, ViT


@dataclass(frozen=True, eq=False)
class TimmAttention(Attention):
    """Attention with what timm may put around it: norms of queries, keys and the result, a gate."""

    def project(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        q, k, v = super().project(x)
        return self._part("q_norm")(q), self._part("k_norm")(k), v

    def finish(self, y: Tensor, x: Tensor) -> Tensor:
        y = self._part("norm")(y.transpose(1, 2).flatten(2))
        gate = getattr(self.module, "gate", None)
        if gate is not None:
            y = y * gate(x).sigmoid()
        return self._part("proj_drop")(self.out(y))

    def _part(self, name: str) -> Callable[[Tensor], Tensor]:
        part: Callable[[Tensor], Tensor] | None = getattr(self.module, name, None)
        return part if part is not None else lambda x: x


@dataclass(frozen=True, eq=False)
class TimmViT(ViT):
    """timm's `VisionTransformer`."""

    @property
    def antialias(self) -> bool:
        return True

    def prefix(self) -> Tensor:
        body: Any = self.body
        tokens = [body.cls_token, getattr(body, "reg_token", None)]
        found = [token for token in tokens if token is not None]
        if not found:
            return body.pos_embed[:, :0]  # of the right type, on the right device
        x = torch.cat(found, 1)
        return x if body.no_embed_class else x + body.pos_embed[:, : x.shape[1]]

    def table(self) -> Tensor:
        body: Any = self.body
        return body.pos_embed if body.no_embed_class else body.pos_embed[:, self.prefixes :]

    def patch_embedding(self, embed: Callable[[Tensor], Tensor]) -> Handle:
        # Positions come from a method that has no picture, so the picture takes the place of its patches until then.
        body: Any = self.body
        pictures = patch_forward(body.patch_embed, _hand_on)
        return join([pictures, patch_method(self.body, "_pos_embed", partial(self._embedded, embed))])

    def tokens(self, pixels: Tensor) -> Tensor:
        body: Any = self.body
        return body.forward_features(pixels)

    def _embedded(self, embed: Callable[[Tensor], Tensor], _: Any, pixels: Tensor) -> Tensor:
        body: Any = self.body
        return body.pos_drop(embed(pixels))


def describe_timm(model: nn.Module, body: nn.Module) -> TimmViT | None:
    """Describe the body when it has the parts of timm's VisionTransformer, else None."""
    parts: Any = body
    names = (
        "patch_embed",
        "_pos_embed",
        "pos_embed",
        "cls_token",
        "no_embed_class",
        "blocks",
        "norm",
        "forward_features",
    )
    patches = getattr(getattr(parts, "patch_embed", None), "proj", None)
    if not all(hasattr(parts, name) for name in names) or not isinstance(patches, nn.Conv2d) or parts.pos_embed is None:
        return None
    blocks = [_block(block) for block in parts.blocks]
    if not blocks or any(block is None for block in blocks):
        return None
    config = getattr(parts, "pretrained_cfg", None) or {}
    mean, std = (tuple(config.get(key, default)) for key, default in zip(("mean", "std"), HALF, strict=True))
    rows, columns = parts.img_size if hasattr(parts, "img_size") else parts.patch_embed.img_size
    return TimmViT(
        model,
        body,
        patches,
        tuple(block for block in blocks if block is not None),
        parts.norm,
        getattr(parts, "head", None),
        Pixels(mean, std, (rows, columns), int(patches.stride[0])),
    )


def _block(block: Any) -> Block | None:
    attention: Any = getattr(block, "attn", None)
    linear: list[Any] = [getattr(attention, name, None) for name in ("qkv", "proj")]
    # Other blocks and attentions of timm have parts of the same names but put them together otherwise.
    if type(block).__name__ != "Block" or type(attention).__name__ != "Attention":
        return None
    if not all(isinstance(layer, nn.Linear) for layer in linear):
        return None
    drop = getattr(attention, "attn_drop", None)
    return Block(
        block,
        block.norm1,
        TimmAttention(attention, attention.num_heads, (linear[0],), linear[1], float(getattr(drop, "p", 0.0))),
        block.norm2,
        block.mlp,
        getattr(block, "ls1", nn.Identity()),
        getattr(block, "ls2", nn.Identity()),
    )


def _hand_on(_: Any, pixels: Tensor) -> Tensor:
    return pixels
