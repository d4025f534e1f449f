"""FIT: local layers inside groups of tokens, global layers among a few latents of each group, and ways between them.

Chen, Li 2023, "FIT: Far-reaching Interleaved Transformers", arXiv:2305.12689.

A picture's L tokens are cut into t groups of n, and every group owns m latents. With tokens x [B, t, n, D_x] and
latents z [B, t, m, D_z], a block "(a)b" of the layer string is

    x = local(x)                a transformer layers on (B t, n)
    z = z + attend(z, x)        read: latents from the tokens of their group
    z = global(z)               b transformer layers on (B, t m)
    x = x + attend(x, z)        write: tokens from the latents of their group; not in the last block

so any two tokens meet in one block, by ordinary layers alone, for a t n^2 + b (t m)^2 + 2 t n m products of attention
a block. With m fixed and t in proportion to L^(2/3) that is O(L^(4/3)). Positions P_x are the same in all groups; the
latents' own P_z tell groups apart. Heads of a read or write: the fewer of both sides'; width: the narrower.

`FIT` encodes pictures; `foveate.encode.fit_generative` has the decoder of token sequences and the denoiser.
"""

import re
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from foveate.errors import InputError
from foveate.layers.classifier import ImageClassifier
from foveate.layers.patch import PatchEmbed, resample_positions
from foveate.layers.transformer import Block


def parse_layers(text: str) -> list[tuple[int, int]]:
    """Local and global layers of every block.

    Raises: InputError for anything but "(a)b(c)d ..."; only the last number may be 0.

    >>> parse_layers("(2)4(2)0")
    [(2, 4), (2, 0)]
    """
    found = [(int(a), int(b)) for a, b in re.findall(r"\((\d+)\)(\d+)", text)]
    if not re.fullmatch(r"(\(\d+\)\d+)+", text) or any(b == 0 for _, b in found[:-1]):
        raise InputError(
            f"layers={text!r} are not of the form '(2)4(2)0': local layers in brackets, then global ones, at least one "
            "in all blocks but the last."
        )
    return found


def groups_for(tokens: int) -> int:
    """The number of groups t, a square, near L^(2/3) / 4, which is where cost grows as L^(4/3).

    >>> [groups_for(side * side) for side in (16, 32, 64, 128)]
    [9, 25, 64, 169]
    """
    return max(1, round((tokens ** (2 / 3) / 4) ** 0.5)) ** 2


class CrossAttention(nn.Module):
    """What tokens take from others; both sides have a norm, and nothing is added here.

    Args:
        dim, other: channels of the asking and of the other side.
        heads, other_heads: of both sides; the fewer are used, on the narrower width.

    Shape: x [B, N, dim], context [B, M, other] -> [B, N, dim].
    """

    def __init__(self, dim: int, other: int, heads: int, other_heads: int) -> None:
        super().__init__()
        self.heads, width = min(heads, other_heads), min(dim, other)
        if width % self.heads:
            raise InputError(f"{self.heads} heads do not divide {width} channels; choose other heads or widths.")
        self.norm, self.norm_context = nn.LayerNorm(dim, eps=1e-6), nn.LayerNorm(other, eps=1e-6)
        self.q, self.kv, self.proj = nn.Linear(dim, width), nn.Linear(other, 2 * width), nn.Linear(width, dim)

    def forward(self, x: Tensor, context: Tensor) -> Tensor:
        q = self.q(self.norm(x)).unflatten(2, (self.heads, -1)).transpose(1, 2)
        k, v = self.kv(self.norm_context(context)).unflatten(2, (2, self.heads, -1)).permute(2, 0, 3, 1, 4)
        return self.proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


class FITBlock(nn.Module):
    """One block "(a)b", on x [B, t, n, D_x] and z [B, t, m, D_z].

    Args:
        layers: a, b.
        dims, heads: of tokens and of latents.
        writes: whether latents are written back.
        causal: tokens see those before them in their group; latents see groups up to their own; and groups are written
            by the latents of the group before.
    """

    def __init__(
        self, layers: tuple[int, int], dims: tuple[int, int], heads: tuple[int, int], writes: bool, causal: bool
    ) -> None:
        super().__init__()
        self.causal = causal
        self.local = nn.ModuleList(Block(dims[0], heads[0]) for _ in range(layers[0]))
        self.remote = nn.ModuleList(Block(dims[1], heads[1]) for _ in range(layers[1]))
        self.read = CrossAttention(dims[1], dims[0], heads[1], heads[0]) if layers[1] else None
        self.write = CrossAttention(dims[0], dims[1], heads[0], heads[1]) if layers[1] and writes else None

    def forward(
        self, x: Tensor, z: Tensor, condition: Callable[[Tensor], Tensor] | None = None
    ) -> tuple[Tensor, Tensor]:
        b, t, n, m = *x.shape[:3], z.shape[2]
        inside = torch.ones(n, n, dtype=torch.bool, device=x.device).tril() if self.causal else None
        tokens = x.flatten(0, 1)
        for layer in self.local:
            tokens = layer(tokens, None if inside is None else inside[None, None])
        if self.read is not None:
            latents = z.flatten(0, 1)
            latents = (latents + self.read(latents, tokens)).view(b, t * m, -1)
            if condition is not None:
                latents = latents + condition(latents)
            among = chunk_mask(t, m, x.device)[None, None] if self.causal else None
            for layer in self.remote:
                latents = layer(latents, among)
            z = latents.view(b, t, m, -1)
        if self.write is not None:
            source = F.pad(z, (0, 0, 0, 0, 1, 0))[:, :-1] if self.causal else z
            tokens = tokens + self.write(tokens, source.flatten(0, 1))
        return tokens.view_as(x), z


def chunk_mask(groups: int, latents: int, device: torch.device | str = "cpu") -> Tensor:
    """Which latents see which: those of groups up to their own. Shape: -> bool [t m, t m], True where one sees.

    >>> chunk_mask(2, 1).tolist()
    [[True, False], [True, True]]
    """
    group = torch.arange(groups, device=device).repeat_interleave(latents)
    return group[:, None] >= group


class Interleaved(nn.Module):
    """All blocks, and a norm for tokens and one for latents.

    Args:
        dims, heads: of tokens and of latents.
        layers: "(a)b(c)d ...": a local layers, b global ones, and so on.
        causal: see `FITBlock`.

    Shape: x [B, t, n, D_x], z [B, t, m, D_z] -> the same two.
    """

    def __init__(self, dims: tuple[int, int], heads: tuple[int, int], layers: str, causal: bool = False) -> None:
        super().__init__()
        plan = parse_layers(layers)
        self.blocks = nn.ModuleList(
            FITBlock(own, dims, heads, writes=i + 1 < len(plan), causal=causal) for i, own in enumerate(plan)
        )
        self.norm, self.norm_latents = (nn.LayerNorm(dim, eps=1e-6) for dim in dims)

    def forward(
        self, x: Tensor, z: Tensor, condition: Callable[[Tensor], Tensor] | None = None
    ) -> tuple[Tensor, Tensor]:
        for block in self.blocks:
            x, z = block(x, z, condition)
        return self.norm(x), self.norm_latents(z)


class FIT(ImageClassifier):
    """Classify pictures, large ones above all.

    Args:
        num_classes, in_chans: see `ImageClassifier`.
        img_size: side that positions are made for; they are resampled to others.
        patch_size: side of a patch.
        groups: t, a square: sqrt(t) x sqrt(t) parts of the picture; `groups_for(tokens)` when None.
        latents: m of each group.
        dims, heads: of tokens and of latents.
        layers: see `parse_layers`. Where the last number is 0 classes are read from tokens, else from latents.
        glimpse: add a group that sees the whole picture, shrunk to the size of a part.

    Shape: [B, in_chans, H, W] -> [B, num_classes].
    Raises: InputError for settings or pictures that do not fit.
    """

    def __init__(
        self,
        num_classes: int = 1000,
        in_chans: int = 3,
        img_size: int = 512,
        patch_size: int = 16,
        groups: int | None = None,
        latents: int = 8,
        dims: tuple[int, int] = (384, 768),
        heads: tuple[int, int] = (6, 12),
        layers: str = "(2)4(2)4(2)0",
        glimpse: bool = False,
    ) -> None:
        side = max(1, img_size // patch_size)
        groups = groups_for(side * side) if groups is None else groups
        self_side = round(max(groups, 0) ** 0.5)
        if groups < 1 or self_side**2 != groups or latents < 1:
            raise InputError(f"groups must be a square and latents at least 1, got {groups=}, {latents=}.")
        reads = parse_layers(layers)[-1][1] == 0
        super().__init__(dims[0] if reads else dims[1], in_chans)
        self.side, self.patch, self.latents, self.glimpse, self.reads = self_side, patch_size, latents, glimpse, reads
        self.part = -(-side // self.side)
        self.embed = PatchEmbed(in_chans, dims[0], patch_size)
        self.embed_norm = nn.LayerNorm(dims[0], eps=1e-6)
        self.positions = nn.Parameter(torch.empty(1, self.part**2, dims[0]))
        self.latent_positions = nn.Parameter(torch.empty(1, groups + glimpse, latents, dims[1]))
        self.body = Interleaved(dims, heads, layers)
        setattr(self.body, "norm_latents" if reads else "norm", nn.Identity())  # of what is not read
        for values in (self.positions, self.latent_positions):
            nn.init.trunc_normal_(values, std=0.02)
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.trunc_normal_(module.weight, std=0.02)
                nn.init.zeros_(module.bias)
        self.reset_classifier(num_classes)

    def group(self, x: Tensor) -> tuple[Tensor, tuple[int, int]]:
        """Tokens of all parts, without positions. Shape: [B, in_chans, H, W] -> [B, t, n, D_x], (rows, columns) of n.

        Sides are filled up with zeros to whole patches in each part.
        """
        whole = self.patch * self.side
        down, across = -x.shape[2] % whole, -x.shape[3] % whole
        parts = self.embed(F.pad(x, (0, across, 0, down)))
        h, w = parts.shape[2] // self.side, parts.shape[3] // self.side
        parts = parts.unflatten(3, (self.side, w)).unflatten(2, (self.side, h))  # [B, D, s, h, s, w]
        tokens = parts.permute(0, 2, 4, 3, 5, 1).flatten(3, 4).flatten(1, 2)
        if self.glimpse:
            small = F.interpolate(x, (h * self.patch, w * self.patch), mode="bilinear", antialias=True)
            tokens = torch.cat([tokens, self.embed(small).flatten(2).mT[:, None]], 1)
        return tokens, (h, w)

    def forward_features(self, x: Tensor) -> Tensor:
        """Tokens [B, t n, D_x], or latents [B, t m, D_z], after their norm."""
        self.check(x)
        tokens, grid = self.group(x)
        places = resample_positions(self.positions, (self.part, self.part), grid)
        tokens = self.embed_norm(tokens) + places[:, None]
        tokens, latents = self.body(tokens, self.latent_positions.expand(len(x), -1, -1, -1))
        return (tokens if self.reads else latents).flatten(1, 2)

    def pool(self, features: Tensor) -> Tensor:
        return features.mean(1)


def attention_products(tokens: int, groups: int, latents: int, layers: str) -> int:
    """Pairs of tokens whose product attention takes: sum of a t n^2 + b (t m)^2 + 2 t n m over blocks.

    >>> attention_products(64, 4, 2, "(1)1(1)0")
    2368
    """
    plan, n = parse_layers(layers), tokens // groups
    total = sum(a * groups * n * n + b * (groups * latents) ** 2 for a, b in plan)
    ways = sum((b > 0) + (b > 0 and i + 1 < len(plan)) for i, (_, b) in enumerate(plan))
    return total + ways * groups * n * latents


def conformance_example(larger: bool = False) -> tuple[nn.Module, tuple[Tensor]]:
    """A small network and pictures for it."""
    side = 61 if larger else 32
    network = FIT(
        num_classes=5, img_size=32, patch_size=4, groups=4, latents=2, dims=(16, 24), heads=(2, 3), layers="(1)1(1)1"
    )
    return network.eval(), (torch.rand(2, 3, side, side + 8),)
