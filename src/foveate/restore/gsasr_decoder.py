"""Features of a picture and a scale -> the numbers of its Gaussians: the decoder of `foveate.restore.gsasr`.

The map of features is cut into windows of M x M pixels. In every window M x M learned Gaussian embeddings E with places
P [M * M, C], the same everywhere, ask what the window holds. A layer is, with q the Gaussians and t = MLP(1 / s) for
the scale s,

    q <- q + S(t)                                    what attention to the single token t gives, whatever q asks
    q <- q + MLP(norm(q))
    q <- q + attention(norm(q) + P -> features)      or, in the later blocks, attention(norm(q)) among the Gaussians
    q <- q + MLP(norm(q))

with relative position bias; every other layer shifts its windows by M / 2. Pixel shuffle makes g * g Gaussians of each
pixel, and five MLPs give their 9 numbers.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from foveate.errors import InputError
from foveate.layers.implicit import MLP
from foveate.layers.subpixel import subpixel_steps
from foveate.layers.window import cut, paste, wrapped

HEADS = {"sigma": 2, "rho": 1, "alpha": 1, "rgb": 3, "mean": 2}
"""Numbers of a Gaussian, in their order: sizes (vertical, horizontal), correlation, opacity, colour, offset (x, y)."""


class WindowAttention(nn.Module):
    """Multi-head attention between windows, with a learned bias for every difference of places.

    Args:
        dim: channels C.
        heads: number of heads.
        side: M of a window.
        stride: rows of the bias table that a difference of one row skips.

    Shape: queries, context [B, R, K, M * M, C], apart bool [1 or M * M, M * M] or None -> [B, R, K, M * M, C].
    """

    index: Tensor

    def __init__(self, dim: int, heads: int, side: int, stride: int) -> None:
        super().__init__()
        self.heads = heads
        self.qhead, self.khead, self.vhead, self.proj = (nn.Linear(dim, dim) for _ in range(4))
        self.relative_position_bias_table = nn.Parameter(torch.empty((2 * side - 1) ** 2, heads))
        nn.init.trunc_normal_(self.relative_position_bias_table, std=0.02)
        places = torch.cartesian_prod(torch.arange(side), torch.arange(side))
        apart = places[:, None] - places + side - 1
        self.register_buffer("index", apart[..., 0] * stride + apart[..., 1], persistent=False)

    def forward(self, queries: Tensor, context: Tensor, apart: Tensor | None = None) -> Tensor:
        pairs = ((self.qhead, queries), (self.khead, context), (self.vhead, context))
        q, k, v = (head(x).flatten(0, 2).unflatten(-1, (self.heads, -1)).transpose(1, 2) for head, x in pairs)
        bias = self.relative_position_bias_table[self.index].permute(2, 0, 1)
        if apart is not None:
            bias = bias.masked_fill(apart, -torch.inf)
        y = F.scaled_dot_product_attention(q, k, v, bias).transpose(1, 2).flatten(2)
        return self.proj(y.unflatten(0, queries.shape[:3]))


class ScaleBias(nn.Module):
    """What attention to copies of one token gives: softmax weights sum to 1, so queries and keys do not matter.

    Shape: [B, C] -> [B, 1, 1, C].
    """

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.value, self.out = nn.Linear(dim, dim), nn.Linear(dim, dim)

    def forward(self, t: Tensor) -> Tensor:
        return self.out(self.value(t))[:, None, None]


class Layer(nn.Module):
    """Scale, MLP, attention, MLP; see above.

    Args:
        across: attend to the features, not among the Gaussians.
        shift: of the windows, in pixels.
        masked: keep apart what only rolling has made neighbours: opposite borders of the picture.

    Shape: q [B, H, W, C], t [B, C], features [B, H, W, C], places [M * M, C] -> [B, H, W, C].
    """

    def __init__(self, dim: int, heads: int, side: int, across: bool, shift: int, masked: bool) -> None:
        super().__init__()
        self.side, self.across, self.shift, self.masked = side, across, shift, masked
        self.scale, self.norm1, self.mlp1 = ScaleBias(dim), nn.LayerNorm(dim), MLP(dim, [dim], dim)
        # The released table of cross attention has 2M - 2 rows of bias for a row of pixels, one too few.
        self.norm2, self.attention = nn.LayerNorm(dim), WindowAttention(dim, heads, side, 2 * side - 1 - across)
        self.norm3, self.mlp2 = nn.LayerNorm(dim), MLP(dim, [dim], dim)

    def forward(self, q: Tensor, t: Tensor, features: Tensor, places: Tensor) -> Tensor:
        q = q + self.scale(t)
        q = q + self.mlp1(self.norm1(q))
        q = q + self.attend(self.norm2(q), features, places)
        return q + self.mlp2(self.norm3(q))

    def attend(self, q: Tensor, features: Tensor, places: Tensor) -> Tensor:
        """The attention alone. Shape: as `forward`."""
        if self.across:
            return paste(self.between(cut(q, self.side) + places, cut(features, self.side, self.shift)), self.side)
        windows = cut(q, self.side, self.shift)
        return paste(self.between(windows, windows), self.side, self.shift)

    def between(self, queries: Tensor, context: Tensor) -> Tensor:
        """Attention within windows, those at the seam by themselves. Shape: [B, R, K, M * M, C] -> the same."""
        if not (self.masked and self.shift):
            return self.attention(queries, context)
        apart = wrapped(self.side, self.shift).to(queries.device)
        if self.across:  # Gaussians have not been rolled: all are where the first is
            apart = apart[:, :, :1]
        spans = (slice(0, -1), slice(-1, None))
        rows = [
            [self.attention(queries[:, r, k], context[:, r, k], apart[i, j]) for j, k in enumerate(spans)]
            for i, r in enumerate(spans)
        ]
        return torch.cat([torch.cat(row, 2) for row in rows], 1)


class Block(nn.Module):
    """q + MLP(layers(norm(q))). Shape: as `Layer`."""

    def __init__(self, layers: int, dim: int, heads: int, side: int, across: bool, masked: bool) -> None:
        super().__init__()
        self.norm, self.mlp = nn.LayerNorm(dim), MLP(dim, [dim], dim)
        shifts = [side // 2 if i % 2 else 0 for i in range(layers)]
        self.blocks = nn.ModuleList(Layer(dim, heads, side, across, shift, masked) for shift in shifts)

    def forward(self, q: Tensor, t: Tensor, features: Tensor, places: Tensor) -> Tensor:
        y = self.norm(q)
        for layer in self.blocks:
            y = layer(y, t, features, places)
        return q + self.mlp(y)


class GaussianDecoder(nn.Module):
    """The decoder, Fea2GS in the official code.

    Args:
        inputs: channels of the features.
        dim, heads: channels C and heads of attention.
        side: M of a window, in pixels.
        cross, among: (blocks, layers of each) that attend to the features, and among the Gaussians.
        density: g, of which g * g are the Gaussians of a pixel; a power of two, or three.
        expand: width of the last hidden layer of the five MLPs, in C.
        masked: see `Layer`. The released networks are not.

    Shape: features [B, inputs, h, w], h and w multiples of M, scale [B] -> [B, g * h, g * w, 9], numbers of `HEADS`.
    Raises: InputError when C is no multiple of the heads.
    """

    def __init__(
        self,
        inputs: int,
        dim: int,
        heads: int,
        side: int,
        cross: Sequence[int],
        among: Sequence[int],
        density: int,
        expand: int,
        masked: bool,
    ) -> None:
        super().__init__()
        if dim % heads:
            raise InputError(f"{heads} heads cannot share {dim} channels; choose a multiple of {heads}.")
        self.side = side
        self.gs_embedding, self.pos_embedding = (nn.Parameter(torch.randn(side**2, dim)) for _ in range(2))
        self.scale = MLP(1, [4 * dim], dim)
        self.project = nn.Sequential(nn.Conv2d(inputs, dim, 3, padding=1), nn.ReLU(), nn.Conv2d(dim, dim, 3, padding=1))
        self.cross, self.among = (
            nn.ModuleList(Block(layers, dim, heads, side, across, masked) for _ in range(blocks))
            for (blocks, layers), across in ((cross, True), (among, False))
        )
        self.up = nn.Sequential(*subpixel_steps(dim, density))
        self.heads = nn.ModuleDict({name: MLP(dim, [dim, expand * dim], n) for name, n in HEADS.items()})

    def forward(self, features: Tensor, scale: Tensor) -> Tensor:
        features = self.project(features)
        batch, _, height, width = features.shape
        t = self.scale(1 / scale[:, None].to(features))
        features = features.permute(0, 2, 3, 1)
        rows, columns = height // self.side, width // self.side
        # Copies, for parameters and views of them trip the FLOP counter's hooks where no gradient is asked for.
        seeds, places = self.gs_embedding.clone(), self.pos_embedding.clone()
        q = paste(seeds.expand(batch, rows, columns, -1, -1), self.side)
        for block in self.cross:
            q = block(q, t, features, places)
        y = q
        for block in self.among:
            y = block(y, t, features, places)
        y = self.up((q + y).permute(0, 3, 1, 2)).permute(0, 2, 3, 1)
        return torch.cat([head(y) for head in self.heads.values()], -1)

    def focus(self, bias: float = 5.0, spread: float = 0.1) -> None:
        """Begin with Gaussians that look at the pixel they are in, and not at the mean of a window.

        The released code means to do so and then overwrites it.

        Args:
            bias: what is added to the score of the pixel in the attention to features.
            spread: standard deviation of the embeddings, which drown the features at the released 1.
        """
        for layer in _layers(self.cross):
            apart = layer.shift + self.side - 1  # a shifted window's places stand for pixels further on
            layer.attention.relative_position_bias_table.data[apart * (2 * self.side - 2) + apart] += bias
        self.gs_embedding.data *= spread
        self.pos_embedding.data *= spread

    @property
    def halo(self) -> int:
        """Pixels of the features around a pixel that its Gaussians can see, where the decoder is masked."""
        seen = 2 + len(self.up) // 2
        for layer in (*_layers(self.cross), *_layers(self.among)):
            seen += self.side - 1 + (layer.shift if layer.across else 0)
        return seen


def _layers(part: nn.Module) -> list[Layer]:
    return [module for module in part.modules() if isinstance(module, Layer)]
