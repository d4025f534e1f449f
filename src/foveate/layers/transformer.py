"""A plain vision transformer, with timm's names, so that weights of timm's `VisionTransformer` fit as they are.

Dosovitskiy et al. 2020, arXiv:2010.11929. With patches of p x p pixels, N = H W / p^2,

    x = [cls, E(patches)] + positions                                  [B, 1 + N, C]
    x = x + attention(norm1(x)),   x = x + mlp(norm2(x))               in every block
    y = head(norm(x)[0])

`foveate.hosts.vit` describes it as it does timm's, so every plug-in for vision transformers works on it.
"""

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from foveate.errors import InputError
from foveate.layers.classifier import ImageClassifier
from foveate.layers.patch import PatchEmbed, resample_positions


class Attention(nn.Module):
    """Multi-head self-attention. Shape: [B, N, C] -> [B, N, C]; mask bool [B, N] or broadcastable to [B, h, N, N]."""

    def __init__(self, dim: int, num_heads: int) -> None:
        super().__init__()
        if dim % num_heads:
            raise InputError(f"{num_heads} heads do not divide {dim} channels.")
        self.num_heads = num_heads
        self.qkv, self.proj = nn.Linear(dim, 3 * dim), nn.Linear(dim, dim)

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        q, k, v = self.qkv(x).unflatten(2, (3, self.num_heads, -1)).permute(2, 0, 3, 1, 4)
        if mask is not None and mask.dim() == 2:
            mask = mask[:, None, None]
        return self.proj(F.scaled_dot_product_attention(q, k, v, attn_mask=mask).transpose(1, 2).flatten(2))


class MLP(nn.Module):
    """Two linear layers with GELU between. Shape: [..., C] -> [..., C]."""

    def __init__(self, dim: int, hidden: int) -> None:
        super().__init__()
        self.fc1, self.act, self.fc2 = nn.Linear(dim, hidden), nn.GELU(), nn.Linear(hidden, dim)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(self.act(self.fc1(x)))


class Block(nn.Module):
    """Attention and MLP, each after a norm and added to what came in. Shape: [B, N, C] -> [B, N, C].

    Args:
        dim: C.
        num_heads: h.
        mlp_ratio: hidden channels of the MLP over C.
    """

    def __init__(self, dim: int, num_heads: int, mlp_ratio: float = 4.0) -> None:
        super().__init__()
        self.norm1, self.attn = nn.LayerNorm(dim, eps=1e-6), Attention(dim, num_heads)
        self.norm2, self.mlp = nn.LayerNorm(dim, eps=1e-6), MLP(dim, int(dim * mlp_ratio))

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        x = x + self.attn(self.norm1(x), mask)
        return x + self.mlp(self.norm2(x))


class VisionTransformer(ImageClassifier):
    """A plain ViT; positions are resampled to pictures of other sizes.

    Args:
        img_size: side of the pictures it is made for.
        patch_size: p.
        embed_dim: C.
        depth: blocks.
        num_heads: h.
        mlp_ratio: hidden channels of the MLPs over C.
        num_classes: outputs; 0 for none.
        global_pool: "token" reads the class token; "avg" the mean of the others, and there is no class token then.
        in_chans: channels of the picture.

    Shape: [B, in_chans, H, W] -> [B, num_classes].
    """

    def __init__(
        self,
        img_size: int = 224,
        patch_size: int = 16,
        embed_dim: int = 384,
        depth: int = 12,
        num_heads: int = 6,
        mlp_ratio: float = 4.0,
        num_classes: int = 1000,
        global_pool: Literal["token", "avg"] = "token",
        in_chans: int = 3,
    ) -> None:
        super().__init__(embed_dim, in_chans)
        if img_size % patch_size:
            raise InputError(f"patches of {patch_size} pixels do not divide pictures of {img_size}.")
        side = img_size // patch_size
        self.global_pool, self.no_embed_class, self.img_size = global_pool, False, (img_size, img_size)
        self.patch_embed = PatchEmbed(in_chans, embed_dim, patch_size)
        self.cls_token = nn.Parameter(torch.zeros(1, 1, embed_dim)) if global_pool == "token" else None
        self.pos_embed = nn.Parameter(torch.empty(1, side * side + (self.cls_token is not None), embed_dim))
        self.pos_drop = nn.Identity()
        self.blocks = nn.Sequential(*(Block(embed_dim, num_heads, mlp_ratio) for _ in range(depth)))
        self.norm = nn.LayerNorm(embed_dim, eps=1e-6)
        nn.init.trunc_normal_(self.pos_embed, std=0.02)
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.trunc_normal_(module.weight, std=0.02)
                nn.init.zeros_(module.bias)
        self.reset_classifier(num_classes)

    def forward_features(self, x: Tensor) -> Tensor:
        """Tokens after the last norm, [B, 1 + N, C], or [B, N, C] without a class token."""
        self.check(x)
        return self.norm(self.blocks(self._pos_embed(self.patch_embed(x))))

    def pool(self, features: Tensor) -> Tensor:
        return features.mean(1) if self.cls_token is None else features[:, 0]

    def _pos_embed(self, x: Tensor) -> Tensor:
        side = self.img_size[0] // self.patch_embed.proj.stride[0]
        positions = resample_positions(self.pos_embed, (side, side), (x.shape[2], x.shape[3]))
        x = x.flatten(2).mT
        if self.cls_token is not None:
            x = torch.cat([self.cls_token.expand(len(x), -1, -1), x], 1)
        return x + positions
