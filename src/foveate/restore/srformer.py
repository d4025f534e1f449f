"""SRFormer: windows of 24 x 24 at the cost of small ones, for keys and values move their places into channels.

Zhou, Li, Guo, Bai, Cheng, Hou 2023, "SRFormer: Permuted Self-Attention for Single Image Super-Resolution",
arXiv:2303.09735.

Within a window of S x S, N = S*S places x [N, C], and with a reduction r (2 as published):

    Q = x Wq                [N, C]
    K, V = permute(x Wkv)   [N, 2C/r^2] -> twice [N/r^2, C]: the r x r places of a cell lie side by side in one vector,
                            channel (dy r + dx) C/r^2 + c is channel c of place (dy, dx)
    out = softmax(Q K^T / sqrt(d) + bias) V, projected;

nothing is pooled away, and scores are N x N/r^2. r = 1 is Swin's attention. The bias is learned per head and offset
between cells; the r^2 queries of a cell share it. Odd blocks shift their windows by S/2.

    block     x = x + attention(norm(x)),   x = x + FFN(norm(x)),   FFN(x) = W2 (u + GELU(dw5x5(u))), u = GELU(W1 x)
    group     x = x + conv(blocks(x))
    network   y = upsampler(f0 + conv(norm(groups(norm(f0))))) + mean,   f0 = conv(x - mean)

A picture is extended to whole windows by reflection, windows lie on the grid that begins at its origin, and a picture
of more than 768 pixels a side is cut into fixed pieces on that grid, with four windows of context
(`foveate.layers.whole_upscaler`).
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from foveate.errors import InputError, WeightsError
from foveate.layers.checkpoint import Checkpoint
from foveate.layers.subpixel import subpixel_steps
from foveate.layers.upscaler import enlarge
from foveate.layers.whole_upscaler import WholeUpscaler
from foveate.layers.window import cut, fill_windows, paste, wrapped

SIZES: dict[str, dict[str, Any]] = {
    "light": {"channels": 60, "depths": (6, 6, 6, 6), "window": 16, "upsampler": "direct"},
    "classical": {"channels": 180, "depths": (6,) * 6, "window": 24, "upsampler": "classical"},
}
"""The published networks, as arguments of `SRFormer`."""


class PermutedAttention(nn.Module):
    """Attention within windows, to keys that stand for cells of r x r places and keep all their channels.

    Args:
        dim: C, divisible by heads and by r^2.
        heads: H.
        window: S, divisible by r, and by 2r where windows are shifted.
        reduce: r; 1 gives the window attention of Swin.
        shift: how far windows are moved, in places, a multiple of r.

    Shape: maps [B, H, W, C], H and W multiples of S -> the same.
    Raises: InputError when these do not divide.
    """

    blocked: Tensor
    index: Tensor

    def __init__(self, dim: int, heads: int, window: int, reduce: int = 2, shift: int = 0) -> None:
        super().__init__()
        if dim % heads or dim % reduce**2:
            raise InputError(f"{dim} channels must be divisible by {heads} heads and by {reduce}^2.")
        if window % reduce or shift % reduce:
            raise InputError(f"window {window} and shift {shift} must be divisible by the reduction {reduce}.")
        self.heads, self.window, self.reduce, self.shift = heads, window, reduce, shift
        self.q, self.kv, self.proj = nn.Linear(dim, dim), nn.Linear(dim, 2 * dim // reduce**2), nn.Linear(dim, dim)
        self.relative_position_bias_table = nn.Parameter(torch.empty((2 * window // reduce - 1) ** 2, heads))
        nn.init.trunc_normal_(self.relative_position_bias_table, std=0.02)
        self.register_buffer("index", aligned_index(window, reduce), persistent=False)
        self.register_buffer("blocked", wrapped(window, shift, reduce), persistent=False)

    def permute(self, kv: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values of cells. Shape: [..., N, 2C/r^2] -> twice [..., N/r^2, C]."""
        r, cells = self.reduce, self.window // self.reduce
        kv = kv.unflatten(-2, (cells, r, cells, r)).unflatten(-1, (2, -1))  # [.., cy, dy, cx, dx, 2, C/r^2]
        kv = kv.movedim((-6, -4, -2, -5, -3, -1), (-6, -5, -4, -3, -2, -1))  # [.., cy, cx, 2, dy, dx, C/r^2]
        k, v = kv.flatten(-3).flatten(-4, -3).unbind(-2)
        return k, v

    def bias(self) -> Tensor:
        """What is added to scores. Shape: [H, N, N/r^2]."""
        return self.relative_position_bias_table[self.index].permute(2, 0, 1)

    def forward(self, x: Tensor) -> Tensor:
        windows = cut(x, self.window, self.shift)  # [B, R, K, N, C]
        q, (k, v) = self.q(windows), self.permute(self.kv(windows))
        # -100 and not minus infinity, as published: the authors' weights have learned with it.
        biases = self.bias() - 100.0 * self.blocked[:, :, None].to(q.dtype)  # [2, 2, H, N, N/r^2]
        rows, columns = (_kinds(n, self.shift) for n in windows.shape[1:3])
        bands = []
        for j, y in rows:
            band = [self._attend(q[:, y, x], k[:, y, x], v[:, y, x], biases[j, i]) for i, x in columns]
            bands.append(torch.cat(band, 2))
        return paste(self.proj(torch.cat(bands, 1)), self.window, self.shift)

    def _attend(self, q: Tensor, k: Tensor, v: Tensor, bias: Tensor) -> Tensor:
        """Windows that share a mask. Shape: q [B, R, K, N, C], k and v [B, R, K, N/r^2, C] -> like q."""
        shape = q.shape[:3]
        q, k, v = (t.flatten(0, 2).unflatten(-1, (self.heads, -1)).transpose(1, 2) for t in (q, k, v))
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=bias[None])
        return out.transpose(1, 2).flatten(2).unflatten(0, shape)


def aligned_index(window: int, reduce: int) -> Tensor:
    """Row of the bias table for each query and key: by the offset between their cells. Shape: [S*S, (S/r)^2].

    >>> aligned_index(2, 1)[0].tolist()
    [4, 3, 1, 0]
    """
    cells = window // reduce
    query, key = torch.arange(window) // reduce, torch.arange(cells)
    apart = query[:, None] - key + cells - 1  # [S, S/r]
    index = apart[:, None, :, None] * (2 * cells - 1) + apart[None, :, None, :]
    return index.flatten(2).flatten(0, 1)


def _kinds(count: int, shift: int) -> list[tuple[int, slice]]:
    """Rows (or columns) of windows by their mask: all but the last, and the last, where there is a shift."""
    if not shift:
        return [(0, slice(0, count))]
    return [(0, slice(0, count - 1))] * (count > 1) + [(1, slice(count - 1, count))]


class ConvFFN(nn.Module):
    """W2 (u + GELU(dw5x5(u))) with u = GELU(W1 x). Shape: [B, H, W, C] -> the same."""

    def __init__(self, dim: int, hidden: int) -> None:
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(dim, hidden), nn.Linear(hidden, dim)
        depthwise = nn.Conv2d(hidden, hidden, 5, padding=2, groups=hidden)
        self.dwconv = nn.ModuleDict({"depthwise_conv": nn.Sequential(depthwise, nn.GELU())})

    def forward(self, x: Tensor) -> Tensor:
        u = F.gelu(self.fc1(x))
        around = self.dwconv["depthwise_conv"](u.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)
        return self.fc2(u + around)


class Block(nn.Module):
    """Attention and feed-forward, each after a norm and added to what came in. Shape: [B, H, W, C] -> the same.

    Args:
        attention: the mixer.
        hidden: width of the feed-forward.
        drop: share of pictures that a branch leaves out in training.
    """

    def __init__(self, attention: nn.Module, dim: int, hidden: int, drop: float = 0.0) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.attn, self.mlp, self.drop = attention, ConvFFN(dim, hidden), drop

    def forward(self, x: Tensor) -> Tensor:
        x = x + self._kept(self.attn(self.norm1(x)))
        return x + self._kept(self.mlp(self.norm2(x)))

    def _kept(self, y: Tensor) -> Tensor:
        return y * F.dropout(y.new_ones(len(y), 1, 1, 1), self.drop, self.training) if self.drop else y


class SRFormer(WholeUpscaler):
    """The network. State-dict keys are the official ones, without their tables of indices and masks.

    Args:
        scale: enlargement s; 2, 3 or 4 (also other powers of two with "classical", any with "direct").
        channels, depths, heads: C, blocks of each group, H.
        window: S, a multiple of 2r.
        mlp_ratio: width of the feed-forward over C.
        upsampler: "direct" (a convolution and a pixel shuffle; the light networks), "classical" (conv to 64 channels,
            shuffles in steps, conv), or "nearest" (nearest neighbours and convolutions, x4, for real photographs).
        reduce: r.
        drop: share of pictures a branch leaves out in training, rising linearly to this.
        base: add the bilinearly enlarged input, which shortens training; the published networks add the mean colour.

    Shape: [B, 3, h, w] in 0..1 -> [B, 3, s*h, s*w]; of any size.
    Raises: InputError for arguments that do not fit.
    """

    slug = "srformer"
    cheaper = "espcn"
    mean: Tensor

    def __init__(
        self,
        scale: int = 4,
        channels: int = 60,
        depths: Sequence[int] = (6, 6, 6, 6),
        heads: int = 6,
        window: int = 16,
        mlp_ratio: float = 2.0,
        upsampler: str = "direct",
        reduce: int = 2,
        drop: float = 0.1,
        base: bool = False,
    ) -> None:
        super().__init__()
        if scale < 1 or int(scale) != scale:
            raise InputError(f"SRFormer needs an integer scale of at least 1, got {scale!r}.")
        if window % (2 * reduce):
            raise InputError(f"windows are shifted by half of their side: {window} must be divisible by {2 * reduce}.")
        self.scale, self.window, self.upsampler, self.base = int(scale), window, upsampler, base
        self.grid, self.halo = window, 4 * window
        drops = iter(torch.linspace(0, drop, sum(depths)).tolist())

        def block(index: int) -> Block:
            attention = PermutedAttention(channels, heads, window, reduce, window // 2 if index % 2 else 0)
            return Block(attention, channels, int(channels * mlp_ratio), next(drops))

        self.conv_first = nn.Conv2d(3, channels, 3, padding=1)
        self.patch_embed = nn.ModuleDict({"norm": nn.LayerNorm(channels)})
        self.layers = nn.ModuleList()
        for depth in depths:
            blocks = nn.ModuleDict({"blocks": nn.Sequential(*(block(i) for i in range(depth)))})
            conv = nn.Conv2d(channels, channels, 3, padding=1)
            self.layers.append(nn.ModuleDict({"residual_group": blocks, "conv": conv}))
        self.norm = nn.LayerNorm(channels)
        self.conv_after_body = nn.Conv2d(channels, channels, 3, padding=1)
        self._add_upsampler(channels)
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.trunc_normal_(module.weight, std=0.02)
                nn.init.zeros_(module.bias)
        self.register_buffer("mean", torch.tensor([0.4488, 0.4371, 0.4040]).view(3, 1, 1), persistent=False)

    def _add_upsampler(self, channels: int) -> None:
        if self.upsampler == "direct":
            last = nn.Conv2d(channels, 3 * self.scale**2, 3, padding=1)
            self.upsample = nn.Sequential(last, nn.PixelShuffle(self.scale))
            return
        if self.upsampler not in ("classical", "nearest"):
            raise InputError(f"unknown upsampler {self.upsampler!r}; use 'direct', 'classical' or 'nearest'.")
        if self.upsampler == "nearest" and self.scale != 4:
            raise InputError(f"the upsampler 'nearest' enlarges by 4, got {self.scale}.")
        self.conv_before_upsample = nn.Sequential(nn.Conv2d(channels, 64, 3, padding=1), nn.LeakyReLU(0.01))
        if self.upsampler == "classical":
            self.upsample = nn.Sequential(*subpixel_steps(64, self.scale))
        else:
            self.conv_up1, self.conv_up2, self.conv_hr = (nn.Conv2d(64, 64, 3, padding=1) for _ in range(3))
        self.conv_last = nn.Conv2d(64, 3, 3, padding=1)

    def features(self, x: Tensor) -> Tensor:
        """What the upsampler is given. Shape: [B, 3, H, W], H and W multiples of S -> [B, C, H, W]."""
        f0 = self.conv_first(x - self.mean)
        f = self.patch_embed["norm"](f0.permute(0, 2, 3, 1))
        for layer in self.layers:
            group = cast(nn.ModuleDict, layer)
            y = cast(nn.ModuleDict, group["residual_group"])["blocks"](f)
            f = f + group["conv"](y.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)
        return self.conv_after_body(self.norm(f).permute(0, 3, 1, 2)) + f0

    def picture(self, f: Tensor) -> Tensor:
        """The upsampler. Shape: [B, C, H, W] -> [B, 3, s*H, s*W]."""
        if self.upsampler == "direct":
            return self.upsample(f)
        f = self.conv_before_upsample(f)
        if self.upsampler == "classical":
            return self.conv_last(self.upsample(f))
        for conv in (self.conv_up1, self.conv_up2):
            f = F.leaky_relu(conv(F.interpolate(f, scale_factor=2, mode="nearest")), 0.2)
        return self.conv_last(F.leaky_relu(self.conv_hr(f), 0.2))

    def forward(self, x: Tensor) -> Tensor:
        h, w = x.shape[2:]
        x = fill_windows(x, self.window)
        y = self.picture(self.features(x)) + (enlarge(x, self.scale) if self.base else self.mean)
        return y[..., : self.scale * h, : self.scale * w]

    # ------------------------------------------------------------------ what it costs

    def _flops_per_pixel(self) -> float:
        """Counted on one window."""
        from foveate.meter import count_flops

        if "full" not in self.__dict__:
            x = torch.zeros(1, 3, self.window, self.window, dtype=self.dtype, device=self.device)
            with torch.no_grad():
                self.__dict__["full"] = count_flops(self.forward, x) / self.window**2
        return self.__dict__["full"]

    def full_flops(self, height: int, width: int) -> float:
        """FLOPs of whole windows, those that the picture only begins to fill included."""
        filled = math.prod(-(-n // self.window) * self.window for n in (height, width))
        return self._flops_per_pixel() * filled

    # ------------------------------------------------------------------ official weights

    @classmethod
    def load_official(cls, state: Mapping[str, Tensor]) -> "SRFormer":
        """Build the network of an official checkpoint (HVision-NKU/SRFormer; its weights are CC BY-NC 4.0).

        Takes a state dict, bare or as {"params": ...}. Tables of indices and masks are left out: they follow from the
        window, and the masks from the size of the training pictures.

        Raises: WeightsError when the keys do not fit.
        """
        found, first = Checkpoint(state, "SRFormer"), "layers.0.residual_group.blocks.0."
        channels = found.size("conv_first.weight")[0]
        table, heads = found.size(f"{first}attn.relative_position_bias_table")
        reduce = math.isqrt(2 * channels // found.size(f"{first}attn.kv.weight")[0])
        if "conv_up1.weight" in found.state:
            kind, factor = "nearest", 16
        elif "conv_last.weight" in found.state:
            steps = [n for n in (0, 2, 4) if f"upsample.{n}.weight" in found.state]
            kind, factor = "classical", math.prod(found.size(f"upsample.{n}.weight")[0] // 64 for n in steps)
        else:
            kind, factor = "direct", found.size("upsample.0.weight")[0] // 3
        try:
            model = cls(
                scale=math.isqrt(factor),
                channels=channels,
                depths=[found.count(f"layers.{g}.residual_group.blocks.") for g in range(found.count("layers."))],
                heads=heads,
                window=(math.isqrt(table) + 1) // 2 * reduce,
                mlp_ratio=found.size(f"{first}mlp.fc1.weight")[0] / channels,
                upsampler=kind,
                reduce=reduce,
            )
        except InputError as error:
            raise WeightsError(f"the checkpoint does not fit SRFormer: {error}") from error
        return found.into(model, skip=("attn_mask", "aligned_relative_position_index"))
