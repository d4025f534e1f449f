"""TCSR: convolutions whose kernels every pixel makes for itself, by attending to its neighbourhood.

Wu, Jiang, Jiang, Liu 2023, "Incorporating Transformer Designs into Convolutions for Lightweight Image
Super-Resolution", arXiv:2303.14324.

A k x k convolution sees far at k * k weights per pair of channels. Neighbourhood attention slides the same window and
computes its weights from content, so that k costs no parameters but a table of positions:

    NA(x):    q, k, v = W x;   y[p] = W' sum_t softmax_t(q[p] . k[p + t] / sqrt(d) + P[t]) v[p + t],  P [h, 2k-1, 2k-1]
    EFFN(x):  W2 GELU(Shift8(W1 x)),      W1: C -> 2C,  W2: 2C -> C,  the shift mixes neighbours for free
    block:    x = x + NA(LN(x));  x = x + EFFN(LN(x))

between a 3x3 convolution before the blocks, and one after them, added to the first, and a pixel shuffle. At the
picture's border neighbourhoods are moved inside; a picture smaller than k is mirrored to k and the result cut.

The authors published neither code nor weights: sizes follow their parameter counts (682K and 1,030K at x4).
"""

from typing import Any

import torch
from torch import Tensor, nn

from foveate.errors import InputError
from foveate.layers.shift import SpatialShift
from foveate.layers.upscaler import Upscaler, enlarge
from foveate.layers.window import mirrored
from foveate.ops.neighbourhood_attention import neighbourhood_attention

SIZES: dict[str, dict[str, Any]] = {"B": {"blocks": 18}, "L": {"blocks": 28}}
"""The published sizes, as arguments of `TCSR`."""


class NeighbourhoodAttention(nn.Module):
    """Every pixel attends to the pixels around it, with a learned bias by relative position.

    Args:
        dim: C.
        kernel_size: side k of the neighbourhood, odd.
        heads: h, a divisor of C.

    Shape: [B, H, W, C] -> the same; H and W at least k.
    """

    def __init__(self, dim: int, kernel_size: int = 9, heads: int = 4) -> None:
        super().__init__()
        if kernel_size < 1 or kernel_size % 2 == 0:
            raise InputError(f"a neighbourhood has a centre, so kernel_size must be odd, got {kernel_size}.")
        if heads < 1 or dim % heads:
            raise InputError(f"{heads} heads do not divide {dim} channels.")
        self.kernel_size, self.heads = kernel_size, heads
        self.qkv, self.proj = nn.Linear(dim, 3 * dim), nn.Linear(dim, dim)
        self.bias = nn.Parameter(torch.zeros(heads, 2 * kernel_size - 1, 2 * kernel_size - 1))
        nn.init.trunc_normal_(self.bias, std=0.02)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).permute(0, 3, 1, 2).chunk(3, 1)
        y = neighbourhood_attention(q, k, v, self.kernel_size, self.heads, self.bias)
        return self.proj(y.permute(0, 2, 3, 1))


class EFFN(nn.Module):
    """Two linear layers with a spatial shift and GELU between. Shape: [B, H, W, C] -> the same; ratio * C / 8 whole."""

    def __init__(self, dim: int, ratio: int = 2) -> None:
        super().__init__()
        self.fc1, self.shift, self.act = nn.Linear(dim, ratio * dim), SpatialShift(), nn.GELU()
        self.fc2 = nn.Linear(ratio * dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        shifted = self.shift(self.fc1(x).permute(0, 3, 1, 2)).permute(0, 2, 3, 1)
        return self.fc2(self.act(shifted))


class Block(nn.Module):
    """x = x + NA(LN(x)); x = x + EFFN(LN(x)). Shape: [B, H, W, C] -> the same."""

    def __init__(self, dim: int, kernel_size: int, heads: int) -> None:
        super().__init__()
        self.norm1, self.attn = nn.LayerNorm(dim), NeighbourhoodAttention(dim, kernel_size, heads)
        self.norm2, self.ffn = nn.LayerNorm(dim), EFFN(dim)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attn(self.norm1(x))
        return x + self.ffn(self.norm2(x))


class TCSR(Upscaler):
    """The network; the defaults are TCSR-B.

    Args:
        scale: integer enlargement s.
        channels: C, divisible by 4 and by the heads.
        blocks: 18 in TCSR-B, 28 in TCSR-L.
        kernel_size: side of the neighbourhoods, odd.
        heads: of the attention.
        base: add the bilinearly enlarged input, which shortens training; off in the published network.

    Shape: [B, 3, h, w] in 0..1 -> [B, 3, s*h, s*w].
    Raises: InputError for settings that do not fit together.
    """

    slug = "tcsr"
    cheaper = "espcn"
    mean: Tensor

    def __init__(
        self,
        scale: int = 4,
        channels: int = 64,
        blocks: int = 18,
        kernel_size: int = 9,
        heads: int = 4,
        base: bool = False,
    ) -> None:
        super().__init__()
        if scale < 1 or blocks < 1:
            raise InputError(f"TCSR enlarges by 1 or more with 1 block or more, got {scale!r} and {blocks!r}.")
        if channels % 4:
            raise InputError(f"TCSR shifts 2 * channels in 8 groups: channels must be divisible by 4, got {channels}.")
        self.scale, self.kernel_size, self.base = scale, kernel_size, base
        # A reach of k // 2 per attention and 1 per shift or convolution. One k // 2 more, so that queries next to the
        # picture's border, whose neighbourhood reaches up to k - 1 inwards, find all of it in a tile however narrow.
        self.halo = blocks * (kernel_size // 2 + 1) + kernel_size // 2 + 4
        self.conv_first = nn.Conv2d(3, channels, 3, padding=1)
        self.body = nn.Sequential(*(Block(channels, kernel_size, heads) for _ in range(blocks)))
        self.norm = nn.LayerNorm(channels)
        self.conv_body = nn.Conv2d(channels, channels, 3, padding=1)
        self.tail = nn.Sequential(nn.Conv2d(channels, 3 * scale**2, 3, padding=1), nn.PixelShuffle(scale))
        self.register_buffer("mean", torch.tensor([0.4488, 0.4371, 0.4040]).view(3, 1, 1), persistent=False)
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.trunc_normal_(module.weight, std=0.02)
                nn.init.zeros_(module.bias)

    def forward(self, x: Tensor) -> Tensor:
        height, width = x.shape[2:]
        rows, columns = (mirrored(n, max(n, self.kernel_size)).to(x.device) for n in (height, width))
        shallow = self.conv_first(x[:, :, rows][..., columns] - self.mean)
        deep = self.norm(self.body(shallow.permute(0, 2, 3, 1))).permute(0, 3, 1, 2)
        y = self.tail(self.conv_body(deep) + shallow)[..., : self.scale * height, : self.scale * width]
        return y + (enlarge(x, self.scale) if self.base else self.mean)

    def _flops_per_pixel(self) -> float:
        """Counted on a picture that needs no mirroring, which would be counted too."""
        from foveate.meter import count_flops

        if "flops_per_pixel" not in self.__dict__:
            example = torch.zeros(1, 3, self.kernel_size, self.kernel_size, dtype=self.dtype, device=self.device)
            with torch.no_grad():
                self.__dict__["flops_per_pixel"] = count_flops(self.forward, example) / self.kernel_size**2
        return self.__dict__["flops_per_pixel"]
