"""FFTNet: tokens are mixed by a filter on their spectrum, and each picture shapes its own filter.

Fein-Ashley, Gupta, Kannan, Prasanna 2025, "The FFT Strikes Back: An Efficient Alternative to Self-Attention",
arXiv:2502.18394.

Attention compares N^2 pairs of tokens. A circular convolution also lets every token reach every other one and costs
N log N; to depend on what it sees, its filter is bent by an MLP on the mean token. With x [B, N, D], H heads and
K = N // 2 + 1 bins, real gains W shared by the D / H channels of a head, and b learned per head and bin,

    c = mean_n x[:, n]                        [B, D]
    W = W_base + MLP(c)                       [B, H, K]     W_base starts at 1
    F = rfft(x),   u = W F                    [B, K, D]     along the tokens
    z = u relu(|u| + b) / (|u| + eps)         modReLU: a threshold on magnitudes, phases stay
    mixer(x) = LayerNorm(x + dropout(irfft(z)))

and a block is  x = mixer(x);  x = x + FFN(LayerNorm(x)).  The tokens are a cycle, row after row: the right end of a row
meets the left end of the next one, and the class token has its place in it. W is real, so a layer blurs and sharpens
but cannot move anything.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from foveate.errors import InputError
from foveate.layers.classifier import ImageClassifier
from foveate.layers.patch import PatchEmbed, resample_positions
from foveate.ops.spectral import at_length, mix, mix_affine

SIZES: dict[str, dict[str, int]] = {
    "base": {"embed_dim": 768, "depth": 12, "num_heads": 12},
    "large": {"embed_dim": 1024, "depth": 24, "num_heads": 16},
    "huge": {"embed_dim": 1280, "depth": 32, "num_heads": 16},
}
"""Published sizes."""


class SpectralMixer(nn.Module):
    """Mix tokens through their spectrum, in place of self-attention.

    Args:
        dim: D.
        tokens: N that the filter is built for.
        heads: H, dividing D; each has a filter of its own.
        dropout: share of outputs dropped, after the inverse transform.
        adaptive: let an MLP on the mean token bend the filter; False keeps it the same for every picture.
        modulation: "modrelu" (the paper), or "affine" (a later revision of its code): layer norm first, a real offset
            added to the spectrum, u = W_base (1 + s) F + (b + o) with s and o from the MLP, and GELU on magnitudes. An
            offset is an impulse on the first token; without it a shift of the tokens only shifts the result.
        local: "haar" adds GELU of averages and differences of neighbouring tokens, blended in by a learned share.
        residual: True gives the layer its own norm and its one residual; False returns what is to be added, for blocks
            that have both around their attention (timm's `Block.attn`).
        flexible: take any number of tokens, the filter being read at their frequencies.

    Shape: [B, N, D] -> [B, N, D].
    Raises: InputError for settings or shapes that do not fit, and for masks: the mean token sees the whole sequence.
    """

    def __init__(
        self,
        dim: int,
        tokens: int,
        heads: int = 8,
        dropout: float = 0.0,
        adaptive: bool = True,
        modulation: str = "modrelu",
        local: str | None = None,
        residual: bool = True,
        flexible: bool = False,
    ) -> None:
        super().__init__()
        if min(dim, tokens, heads) < 1 or dim % heads:
            raise InputError(f"dim must be a multiple of heads, tokens at least 1; got {dim=}, {heads=}, {tokens=}.")
        if modulation not in ("modrelu", "affine"):
            raise InputError(f"unknown modulation {modulation!r}; use 'modrelu' or 'affine'.")
        if local not in (None, "haar"):
            raise InputError(f"unknown local branch {local!r}; use None or 'haar'.")
        self.heads, self.tokens, self.flexible, self.affine = heads, tokens, flexible, modulation == "affine"
        bins = tokens // 2 + 1
        self.base_filter = nn.Parameter(torch.ones(heads, bins, 1))
        if self.affine:
            self.base_bias = nn.Parameter(torch.full((heads, bins, 1), -0.1))
        else:
            self.modrelu_bias = nn.Parameter(torch.zeros(heads, bins, 1))
        outputs = heads * bins * (2 if self.affine else 1)
        self.adaptive_mlp = nn.Sequential(nn.Linear(dim, dim), nn.GELU(), nn.Linear(dim, outputs)) if adaptive else None
        self.blend = nn.Parameter(torch.zeros(())) if local else None
        self.dropout = nn.Dropout(dropout)
        self.norm = nn.LayerNorm(dim) if residual else None

    def filters(self, context: Tensor) -> tuple[Tensor, Tensor]:
        """The filter for pictures with these mean tokens, and what goes with it.

        Shape: context [B, D] -> gain [B, H, K] ([1, H, K] without the MLP), and b [H, K] of modReLU, or the offset of
            the same shape as the gain.
        """
        base, bent = self.base_filter[..., 0], None if self.adaptive_mlp is None else self.adaptive_mlp(context)
        if not self.affine:
            gain = base[None] if bent is None else base + bent.unflatten(1, (self.heads, -1))
            return gain, self.modrelu_bias[..., 0]
        if bent is None:
            return base[None], self.base_bias[None, ..., 0]
        scale, offset = bent.unflatten(1, (self.heads, -1, 2)).unbind(-1)
        return base * (1 + scale), self.base_bias[..., 0] + offset

    def forward(self, x: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False) -> Tensor:
        if attn_mask is not None or is_causal:
            raise InputError("FFTNet mixes all tokens with all: it takes no mask and cannot be causal. Use attention.")
        if x.dim() != 3 or not x.numel():
            raise InputError(f"expected tokens [B, N, D] that are not empty, got {tuple(x.shape)}.")
        if x.shape[1] != self.tokens and not self.flexible:
            raise InputError(
                f"the filter is made for {self.tokens} tokens, got {x.shape[1]}; pass flexible=True (a network: "
                "dynamic_img_size=True) to read it at other frequencies."
            )
        inner = x if self.norm is None or not self.affine else self.norm(x)
        gain, other = self.filters(inner.mean(1))
        gain, other = (at_length(t, self.tokens, x.shape[1]) for t in (gain, other))
        y = mix_affine(inner, gain, other) if self.affine else mix(inner, gain, other)
        if self.blend is not None:
            y = torch.lerp(haar_gelu(inner), y, self.blend.sigmoid())
        y = self.dropout(y)
        if self.norm is None:
            return y
        return x + y if self.affine else self.norm(x + y)


def haar_gelu(x: Tensor) -> Tensor:
    """GELU of the averages and differences of tokens 2i and 2i + 1, put together again; an odd last one stands alone.

    Shape: [B, N, D] -> the same.
    """
    n = x.shape[1]
    even, odd = (torch.cat([x, x[:, -1:]], 1) if n % 2 else x).unflatten(1, (-1, 2)).unbind(2)
    mean, half = F.gelu((even + odd) / 2), F.gelu((even - odd) / 2)
    return torch.stack([mean + half, mean - half], 2).flatten(1, 2)[:, :n]


class FFTBlock(nn.Module):
    """A mixer and a feed-forward network, x + W2 GELU(W1 LayerNorm(x)).

    Args:
        attention: the mixer, with its own residual.
        ratio: width of the hidden layer over D.

    Shape: [B, N, D] -> the same.
    """

    def __init__(self, attention: nn.Module, dim: int, ratio: float = 4.0, dropout: float = 0.0) -> None:
        super().__init__()
        hidden = int(dim * ratio)
        self.attention, self.norm = attention, nn.LayerNorm(dim)
        self.mlp = nn.Sequential(
            nn.Linear(dim, hidden), nn.GELU(), nn.Dropout(dropout), nn.Linear(hidden, dim), nn.Dropout(dropout)
        )

    def forward(self, x: Tensor) -> Tensor:
        x = self.attention(x)
        return x + self.mlp(self.norm(x))


class FFTNet(ImageClassifier):
    """A vision transformer whose attention layers are spectral mixers.

    Args:
        size: "base", "large" or "huge", which `embed_dim`, `depth` and `num_heads` override.
        num_classes: outputs; 0 leaves the head out.
        img_size: side or (height, width) in pixels that filters and positions are made for.
        patch_size: side of a patch in pixels.
        drop_rate: dropout after positions, mixers and in feed-forward layers.
        class_token: read the class from a token of its own; False takes the mean of all. A grid without it has a number
            of tokens that FFTs are several times faster at.
        adaptive, modulation, local: of the mixers, see `SpectralMixer`.
        dynamic_img_size: take pictures of any size, positions and filters being resampled.

    Shape: [B, in_chans, H, W] -> [B, num_classes].
    Raises: InputError for settings or pictures that do not fit.

    >>> net = FFTNet(img_size=32, patch_size=8, embed_dim=24, depth=1, num_heads=2, num_classes=10)
    >>> net(torch.zeros(2, 3, 32, 32)).shape, net.forward_features(torch.zeros(2, 3, 32, 32)).shape
    (torch.Size([2, 10]), torch.Size([2, 17, 24]))
    """

    def __init__(
        self,
        size: str = "base",
        num_classes: int = 1000,
        img_size: int | tuple[int, int] = 224,
        patch_size: int = 16,
        in_chans: int = 3,
        embed_dim: int | None = None,
        depth: int | None = None,
        num_heads: int | None = None,
        mlp_ratio: float = 4.0,
        drop_rate: float = 0.1,
        class_token: bool = True,
        adaptive: bool = True,
        modulation: str = "modrelu",
        local: str | None = None,
        dynamic_img_size: bool = False,
    ) -> None:
        if size not in SIZES:
            raise InputError(f"unknown size {size!r}; use one of {', '.join(map(repr, SIZES))}, or give the widths.")
        given = zip((embed_dim, depth, num_heads), SIZES[size].values(), strict=True)
        dim, layers, heads = (own if value is None else value for value, own in given)
        height, width = (img_size, img_size) if isinstance(img_size, int) else img_size
        if min(height, width, patch_size) < 1:
            raise InputError(f"img_size and patch_size must be at least 1, got {img_size} and {patch_size}.")
        super().__init__(dim, in_chans)
        self.img_size, self.dynamic_img_size = (height, width), dynamic_img_size
        self.grid_size = (-(-height // patch_size), -(-width // patch_size))
        tokens = self.grid_size[0] * self.grid_size[1] + class_token
        self.patch_embed = PatchEmbed(in_chans, dim, patch_size)
        self.cls_token = nn.Parameter(torch.zeros(1, 1, dim)) if class_token else None
        self.pos_embed = nn.Parameter(torch.zeros(1, tokens, dim))
        self.pos_drop = nn.Dropout(drop_rate)
        mixer: dict[str, Any] = {"adaptive": adaptive, "modulation": modulation, "local": local}
        self.blocks = nn.Sequential(
            *(
                FFTBlock(
                    SpectralMixer(dim, tokens, heads, drop_rate, flexible=dynamic_img_size, **mixer),
                    dim,
                    mlp_ratio,
                    drop_rate,
                )
                for _ in range(layers)
            )
        )
        self.norm = nn.LayerNorm(dim)
        self.reset_classifier(num_classes)
        for parameter in (self.pos_embed, self.cls_token):
            if parameter is not None:
                nn.init.trunc_normal_(parameter, std=0.02)
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                nn.init.zeros_(module.bias)

    def forward_features(self, x: Tensor) -> Tensor:
        """All tokens after the last norm, the class token first. Shape: [B, in_chans, H, W] -> [B, N, D]."""
        self.check(x)
        if x.shape[2:] != self.img_size and not self.dynamic_img_size:
            raise InputError(
                f"this network is made for pictures of {self.img_size}, got {tuple(x.shape[2:])}; resize them, or "
                "build it with dynamic_img_size=True."
            )
        grid = self.patch_embed(x)
        x = grid.flatten(2).mT
        if self.cls_token is not None:
            x = torch.cat([self.cls_token.expand(len(x), -1, -1), x], 1)
        x = x + resample_positions(self.pos_embed, self.grid_size, (grid.shape[2], grid.shape[3]))
        return self.norm(self.blocks(self.pos_drop(x)))

    def pool(self, features: Tensor) -> Tensor:
        """The class token, or the mean of all without one. Shape: [B, N, D] -> [B, D]."""
        return features.mean(1) if self.cls_token is None else features[:, 0]

    @classmethod
    def conformance_example(cls, larger: bool = False) -> tuple["FFTNet", tuple[Tensor]]:
        """A small network and a crop of a photograph."""
        from foveate.data import pictures

        net = cls(num_classes=7, img_size=48, patch_size=8, embed_dim=32, depth=2, num_heads=4, dynamic_img_size=True)
        height, width = (75, 61) if larger else (48, 48)
        return net, (pictures.samples()["chelsea"][None, :, :height, :width],)
