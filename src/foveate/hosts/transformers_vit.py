"""ViT, DINOv2 and CLIP's vision tower of transformers, described as `foveate.hosts.vit.ViT`."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from foveate.engine.surgery import Handle, patch_forward
from foveate.errors import InputError
from foveate.hosts.picture import HALF, IMAGENET, OPENAI, Pixels
from foveate.hosts.vit import Attention, Block, ViT

Embed = Callable[[Tensor], Tensor]


@dataclass(frozen=True, eq=False)
class TransformersViT(ViT):
    """`ViTModel`, `Dinov2Model`, `Dinov2WithRegistersModel` and what is built on them."""

    @property
    def antialias(self) -> bool:
        return hasattr(self.body.embeddings, "register_tokens")

    def prefix(self) -> Tensor:
        inner: Any = self.body.embeddings
        first = inner.cls_token + inner.position_embeddings[:, :1]
        registers = getattr(inner, "register_tokens", None)
        return first if registers is None else torch.cat([first, registers], 1)

    def table(self) -> Tensor:
        table: Any = self.body.embeddings
        return table.position_embeddings[:, 1:]

    def patch_embedding(self, embed: Embed) -> Handle:
        return patch_forward(_module(self.body.embeddings), partial(self._embedded, embed))

    def tokens(self, pixels: Tensor) -> Tensor:
        if pixels.shape[2:] == self.pixels.size or not _is_plain(self.body):
            return self.body(pixels).last_hidden_state
        return self.body(pixels, interpolate_pos_encoding=True).last_hidden_state

    def _embedded(self, embed: Embed, _: Any, pixel_values: Tensor, bool_masked_pos: Any = None, **__: Any) -> Tensor:
        if bool_masked_pos is not None:
            raise InputError("masked patches cannot be combined with chosen tokens; leave bool_masked_pos out.")
        x = embed(pixel_values.to(self.patches.weight.dtype))
        dropout: nn.Module | None = getattr(self.body.embeddings, "dropout", None)
        return x if dropout is None else dropout(x)


@dataclass(frozen=True, eq=False)
class TransformersCLIP(TransformersViT):
    """`CLIPVisionModel` and the tower inside `CLIPModel`."""

    def prefix(self) -> Tensor:
        inner: Any = self.body.embeddings
        return inner.class_embedding.expand(1, 1, -1) + inner.position_embedding.weight[:1]

    def table(self) -> Tensor:
        inner: Any = self.body.embeddings
        return inner.position_embedding.weight[None, 1:]


def describe_vit(model: nn.Module, body: nn.Module) -> TransformersViT | None:
    """Describe the body when it is one of these, else None."""
    inner: Any = getattr(body, "embeddings", None)
    layers: Any = getattr(body, "layers", None)
    if layers is None:
        encoder = getattr(body, "encoder", None)
        layers = getattr(encoder, "layer", getattr(encoder, "layers", None))
    if not isinstance(inner, nn.Module) or not isinstance(layers, nn.ModuleList):
        return None
    clip = hasattr(inner, "class_embedding")
    names = ("class_embedding", "patch_embedding", "position_embedding")
    if not clip:
        names = ("cls_token", "patch_embeddings", "position_embeddings")
    norm = getattr(body, "post_layernorm" if clip else "layernorm", None)
    if not all(hasattr(inner, name) for name in names) or hasattr(inner, "distillation_token") or norm is None:
        return None
    source: Any = inner if clip else inner.patch_embeddings
    patches = inner.patch_embedding if clip else getattr(source, "projection", None)
    blocks = [_block(layer) for layer in layers]
    if not isinstance(patches, nn.Conv2d) or not blocks or any(block is None for block in blocks):
        return None
    size = source.image_size
    rows, columns = (size, size) if isinstance(size, int) else size
    kind = getattr(getattr(body, "config", None), "model_type", "")
    mean, std = OPENAI if clip else IMAGENET if kind.startswith("dinov2") else HALF
    return (TransformersCLIP if clip else TransformersViT)(
        model,
        body,
        patches,
        tuple(block for block in blocks if block is not None),
        norm,
        getattr(model, "classifier", None),
        Pixels(mean, std, (rows, columns), int(patches.stride[0])),
    )


def _block(layer: Any) -> Block | None:
    """A pre-norm layer of transformers 5 by its names; None for another."""
    attention: Any = getattr(layer, "attention", getattr(layer, "self_attn", None))
    norms = [("layernorm_before", "layernorm_after"), ("norm1", "norm2"), ("layer_norm1", "layer_norm2")]
    found = [pair for pair in norms if all(hasattr(layer, name) for name in pair)]
    out: Any = getattr(attention, "o_proj", getattr(attention, "out_proj", None))
    projections: Any = tuple(getattr(attention, name, None) for name in ("q_proj", "k_proj", "v_proj"))
    if not found or not hasattr(layer, "mlp") or not all(isinstance(p, nn.Linear) for p in (*projections, out)):
        return None
    heads: Any = getattr(attention, "num_attention_heads", getattr(attention, "num_heads", None))
    dropped = getattr(attention, "attention_dropout", getattr(attention, "dropout", 0.0))
    return Block(
        layer,
        getattr(layer, found[0][0]),
        Attention(attention, int(heads), projections, out, float(dropped), paired=True),
        getattr(layer, found[0][1]),
        layer.mlp,
        getattr(layer, "layer_scale1", nn.Identity()),
        getattr(layer, "layer_scale2", nn.Identity()),
    )


def _is_plain(body: Any) -> bool:
    """Whether the body has to be asked to resample its positions; DINOv2 always does."""
    return not getattr(getattr(body, "config", None), "model_type", "").startswith("dinov2")


def _module(value: Any) -> nn.Module:
    assert isinstance(value, nn.Module)
    return value
