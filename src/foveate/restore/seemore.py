"""SeemoRe: an expert whose rank is chosen for each picture, and one that looks along wide stripes, in turn.

Zamfir, Wu, Mehta, Zhang, Timofte 2024, "See More Details: Efficient Image Super-Resolution by Experts Mining",
arXiv:2402.03412.

Between an entry convolution f0 and  y = PixelShuffle_s(conv(conv(norm(f)) + f0)) + mean  lie L groups, each a

    rank-modulating expert      x = x + P(a + sum_{e in top} w_e E_e(a, k)),   x = x + FFN(norm(x)),
    spatial-modulating expert   x = x + P(Striped_11(q) v),                    x = x + FFN(norm(x)).

In the first, a local branch a (a striped 3x3 convolution) meets a context branch k: four by four places are aggregated
R times by the same depth-wise weights, mixed, enlarged bilinearly and added. Experts modulate at low rank,

    E_e(a, k) = W3 (W1 a * W2 k),   W1, W2: C -> r_e,   W3: r_e -> C,   r = 2, 4, 8,

and a router decides on the pooled local branch, w = softmax(W mean(a)): the `top` experts with the largest weights run,
their weights as they are. In training all run and those not chosen count zero, which is the same function. A striped
convolution is a depth-wise 1 x k and a depth-wise k x 1; FFN(x) = g(W2 (u * dw3x3(v))), (u, v) = g(W1 x), g = GELU.

What is routed is a picture: all of it, up to 768 pixels a side, otherwise each of its fixed pieces by itself (see
`foveate.layers.whole_upscaler`). A picture below 4^R pixels a side is extended to that by its last row and column.
The rank is all that adapts, and the picture decides on it; there is no budget to be met, so budgets other than 1 are
refused.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from foveate.errors import InputError, WeightsError
from foveate.layers.checkpoint import Checkpoint
from foveate.layers.map_norm import MapNorm
from foveate.layers.residual import add_
from foveate.layers.upscaler import enlarge
from foveate.layers.whole_upscaler import WholeUpscaler

SIZES: dict[str, dict[str, Any]] = {
    "T": {"channels": 36, "groups": 6},
    "B": {"channels": 48, "groups": 8},
    "L": {"channels": 48, "groups": 16, "shuffle": False, "recursive": 1},
}
"""The published networks, as arguments of `SeemoRe`."""


class Striped(nn.Module):
    """A depth-wise 1 x k and a depth-wise k x 1 convolution. Shape: [B, C, H, W] -> the same."""

    def __init__(self, channels: int, kernel: int) -> None:
        super().__init__()
        shapes = ((1, kernel), (kernel, 1))
        self.conv = nn.Sequential(*(nn.Conv2d(channels, channels, k, padding="same", groups=channels) for k in shapes))

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x)


class GatedFFN(nn.Module):
    """GELU(W2 (u * dw3x3(v))) with (u, v) = GELU(W1 x). Shape: [B, C, H, W] -> the same."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.fn_1 = nn.Sequential(nn.Conv2d(channels, 2 * channels, 1), nn.GELU())
        self.fn_2 = nn.Sequential(nn.Conv2d(channels, channels, 1), nn.GELU())
        self.gate = nn.Conv2d(channels, channels, 3, padding=1, groups=channels)

    def forward(self, x: Tensor) -> Tensor:
        u, v = self.fn_1(x).chunk(2, 1)
        return self.fn_2(u * self.gate(v))


class Expert(nn.Module):
    """W3 (W1 a * W2 k): a map of rank `rank` at every place. Shape: [B, C, H, W] twice -> the same."""

    def __init__(self, channels: int, rank: int) -> None:
        super().__init__()
        self.conv_1, self.conv_2 = (nn.Conv2d(channels, rank, 1) for _ in range(2))
        self.conv_3 = nn.Conv2d(rank, channels, 1)

    def forward(self, a: Tensor, k: Tensor) -> Tensor:
        return self.conv_3(self.conv_1(a) * self.conv_2(k))


class Experts(nn.Module):
    """a + sum of the `top` experts of each picture, weighted by the router.

    Shape: a, k [B, C, H, W] -> ([B, C, H, W], experts chosen [B, top]).
    """

    def __init__(self, channels: int, ranks: Sequence[int], top: int) -> None:
        super().__init__()
        self.top = top
        self.experts = nn.ModuleList(Expert(channels, rank) for rank in ranks)
        linear = nn.Linear(channels, len(ranks), bias=False)
        self.gate = nn.ModuleDict({"body": nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), linear)})

    def weights(self, a: Tensor) -> Tensor:
        """The router's say, a softmax in float32 at least. Shape: [B, C, H, W] -> [B, E]."""
        logits = self.gate["body"](a)
        return logits.softmax(1, dtype=torch.promote_types(a.dtype, torch.float32)).to(a.dtype)

    def forward(self, a: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
        weights, chosen = self.weights(a).topk(self.top, 1)
        out = a
        for e, expert in enumerate(self.experts):
            share = weights.masked_fill(chosen != e, 0).sum(1)[:, None, None, None]
            # Whole maps are routed, and in use one at a time: what is not moved keeps its memory layout.
            rows = (chosen == e).any(1).nonzero()[:, 0]
            if self.training or len(rows) == len(a):
                out = out + share * expert(a, k)
            elif len(rows):
                out = out.index_add(0, rows, share[rows] * expert(a[rows], k[rows]))
        return out, chosen


class LocalBlock(nn.Module):
    """The rank-modulating mixer: local and context branch, experts, projection.

    Args:
        shuffle: interleave the channels of the two branches before they part.
        recursive: R, how often the context is aggregated.

    Shape: [B, C, H, W] -> ([B, C, H, W], experts chosen [B, top]).
    """

    def __init__(self, channels: int, ranks: Sequence[int], top: int, shuffle: bool, recursive: int) -> None:
        super().__init__()
        self.shuffle, self.recursive = shuffle, recursive
        self.conv_1 = nn.Sequential(
            nn.Conv2d(channels, channels, 3, padding=1), nn.GELU(), nn.Conv2d(channels, 2 * channels, 1)
        )
        self.agg_conv = nn.Sequential(nn.Conv2d(channels, channels, 4, 4, groups=channels), nn.GELU())
        self.conv = nn.Sequential(
            nn.Conv2d(channels, channels, 3, padding=1, groups=channels), nn.Conv2d(channels, channels, 1)
        )
        self.conv_2 = nn.Sequential(Striped(channels, 3), nn.GELU())
        self.moe_layer = Experts(channels, ranks, top)
        self.proj = nn.Conv2d(channels, channels, 1)

    def context(self, k: Tensor) -> Tensor:
        """k and what lies around, aggregated over cells of 4^R x 4^R places."""
        r = k
        for _ in range(self.recursive):
            r = self.agg_conv(r)
        return k + F.interpolate(self.conv(r), k.shape[2:], mode="bilinear", align_corners=False)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        x = self.conv_1(x)
        if self.shuffle:
            x = x.unflatten(1, (2, -1)).transpose(1, 2).flatten(1, 2)
        a, k = x.chunk(2, 1)
        out, chosen = self.moe_layer(self.conv_2(a), self.context(k))
        return self.proj(out), chosen


class StripedAttention(nn.Module):
    """The spatial-modulating mixer, P(Striped(q) * v) with (q, v) = GELU(W x). Shape: [B, C, H, W] -> the same."""

    def __init__(self, channels: int, kernel: int) -> None:
        super().__init__()
        self.proj = nn.Conv2d(channels, channels, 1)
        self.to_qv = nn.Sequential(nn.Conv2d(channels, 2 * channels, 1), nn.GELU())
        self.attn = Striped(channels, kernel)

    def forward(self, x: Tensor) -> Tensor:
        q, v = self.to_qv(x).chunk(2, 1)
        return self.proj(self.attn(q) * v)


class Mixing(nn.Module):
    """x + mixer(norm(x)), then x + FFN(norm(x))."""

    def __init__(self, channels: int, mixer: nn.Module) -> None:
        super().__init__()
        self.norm_1, self.norm_2 = (MapNorm(channels, eps=1e-6) for _ in range(2))
        self.block, self.ffn = mixer, GatedFFN(channels)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor | None]:
        y = self.block(self.norm_1(x))
        y, chosen = y if isinstance(y, tuple) else (y, None)
        x = x + y
        return add_(self.ffn(self.norm_2(x)), x), chosen


def fourier_l1(y: Tensor, high: Tensor, weight: float = 0.1) -> Tensor:
    """Mean |y - high|, and `weight` times the mean between their (unscaled) Fourier transforms, part by part.

    >>> round(fourier_l1(torch.ones(1, 1, 2, 2), torch.zeros(1, 1, 2, 2)).item(), 3)
    1.05
    """
    apart = y - high
    return apart.abs().mean() + weight * torch.view_as_real(torch.fft.rfft2(apart)).abs().mean()


class SeemoRe(WholeUpscaler):
    """The network. State-dict keys are the official ones.

    Args:
        scale: integer enlargement s.
        channels: C.
        groups: L, pairs of a rank-modulating and a spatial-modulating expert.
        ranks: r_e, ranks of the experts.
        top: experts that run for a picture.
        shuffle, recursive: of the `LocalBlock`.
        kernel: length of the stripes, odd.
        base: add the bilinearly enlarged input, which shortens training; the published networks add the mean colour.

    Shape: [B, 3, h, w] in 0..1 -> [B, 3, s*h, s*w]; of any size.
    Raises: InputError for arguments out of range.
    """

    slug = "seemore"
    cheaper = "espcn"
    halo = 48
    mean: Tensor

    def __init__(
        self,
        scale: int = 4,
        channels: int = 36,
        groups: int = 6,
        ranks: Sequence[int] = (2, 4, 8),
        top: int = 1,
        shuffle: bool = True,
        recursive: int = 2,
        kernel: int = 11,
        base: bool = False,
    ) -> None:
        super().__init__()
        if scale < 1 or int(scale) != scale:
            raise InputError(f"SeemoRe needs an integer scale of at least 1, got {scale!r}.")
        if not 1 <= top <= len(ranks):
            raise InputError(f"top must lie in 1..{len(ranks)} (the number of experts), got {top}.")
        if not kernel % 2:
            raise InputError(f"the kernel must be odd to keep the size, got {kernel}.")
        self.scale, self.ranks, self.grid, self.base = int(scale), tuple(ranks), 4**recursive, base
        self.conv_1 = nn.Conv2d(3, channels, 3, padding=1)
        self.body = nn.ModuleList(
            nn.ModuleDict(
                {
                    "local_block": Mixing(channels, LocalBlock(channels, ranks, top, shuffle, recursive)),
                    "global_block": Mixing(channels, StripedAttention(channels, kernel)),
                }
            )
            for _ in range(groups)
        )
        self.norm = MapNorm(channels, eps=1e-6)
        self.conv_2 = nn.Conv2d(channels, channels, 3, padding=1)
        self.upsampler = nn.Sequential(
            nn.Conv2d(channels, 3 * self.scale**2, 3, padding=1), nn.PixelShuffle(self.scale)
        )
        self.register_buffer("mean", torch.tensor([0.4488, 0.4371, 0.4040]).view(3, 1, 1), persistent=False)

    def run(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Enlarge pictures as wholes, and say which experts ran. Shape: -> ([B, 3, s*h, s*w], [L, B, top])."""
        h, w = x.shape[2:]
        down, right = (max(0, self.grid - n) for n in (h, w))
        if down or right:
            x = F.pad(x, (0, right, 0, down), mode="replicate")
        f = f0 = self.conv_1(x - self.mean)
        routes = []
        for group in self.body:
            f, chosen = cast(nn.ModuleDict, group)["local_block"](f)
            f, _ = cast(nn.ModuleDict, group)["global_block"](f)
            routes.append(chosen)
        y = self.upsampler(self.conv_2(self.norm(f)) + f0) + (enlarge(x, self.scale) if self.base else self.mean)
        return y[..., : self.scale * h, : self.scale * w], torch.stack(routes)

    def forward(self, x: Tensor) -> Tensor:
        return self.run(x)[0]

    def loss(self, low: Tensor, high: Tensor) -> Tensor:
        """The published one, `fourier_l1`, on a batch of crops."""
        return fourier_l1(self(low), high)

    # ------------------------------------------------------------------ what it costs

    def expert_flops(self, rank: int) -> float:
        """FLOPs of an expert per low-resolution pixel."""
        return 6.0 * self.conv_1.out_channels * rank

    def router_flops(self) -> float:
        """FLOPs of all routers, once per picture."""
        return 2.0 * self.conv_1.out_channels * len(self.ranks) * len(self.body)

    def _flops_per_pixel(self) -> float:
        """With the costliest experts in every group, without routers; counted on a picture of one context cell."""
        from foveate.meter import count_flops

        if "full" not in self.__dict__:
            x = torch.zeros(1, 3, self.grid, self.grid, dtype=self.dtype, device=self.device)
            routes: list[Tensor] = []
            training = self.training
            with torch.no_grad():
                counted = count_flops(lambda: routes.append(self.eval().run(x)[1]))
            self.train(training)
            per_pixel = (counted - self.router_flops()) / self.grid**2
            chosen = [self.expert_flops(self.ranks[e]) for e in routes[0].flatten().tolist()]
            most = sum(self.expert_flops(rank) for rank in sorted(self.ranks)[-routes[0].shape[2] :])
            self.__dict__["full"] = per_pixel - sum(chosen) + most * len(self.body)
        return self.__dict__["full"]

    def full_flops(self, height: int, width: int) -> float:
        """FLOPs with the largest rank in every group; exact where 4^R divides the sides."""
        return self._flops_per_pixel() * max(height, self.grid) * max(width, self.grid) + self.router_flops()

    def render(self, x: Tensor) -> tuple[Tensor, float, dict[str, int]]:
        """See `WholeUpscaler.render`. Counted are the groups that ran an expert of each rank."""
        y, routes = self.run(x)
        ranks = [self.ranks[e] for e in routes.flatten().tolist()]
        most = sum(sorted(self.ranks)[-routes.shape[2] :]) * len(self.body)
        h, w = (max(n, self.grid) for n in x.shape[2:])
        saved = self.expert_flops(1) * (most - sum(ranks)) * h * w / self.full_flops(h, w)
        return y, 1 - saved, {f"rank {rank}": ranks.count(rank) for rank in sorted(self.ranks)}

    # ------------------------------------------------------------------ official weights

    @classmethod
    def load_official(cls, state: Mapping[str, Tensor], **config: Any) -> "SeemoRe":
        """Build the network of an official checkpoint (eduardzamfir/seemoredetails), bare or as {"params": ...}.

        Args:
            config: `top`, `shuffle`, `recursive`, which the weights do not tell; default as published, by depth.

        Raises: WeightsError when the keys do not fit.
        """
        found, experts = Checkpoint(state, "SeemoRe"), "body.0.local_block.block.moe_layer.experts."
        groups = found.count("body.")
        published = SIZES["L"] if groups == SIZES["L"]["groups"] else {}
        shape = {
            "scale": math.isqrt(found.size("upsampler.0.weight")[0] // 3),
            "channels": found.size("conv_1.weight")[0],
            "groups": groups,
            "ranks": [found.size(f"{experts}{e}.conv_1.weight")[0] for e in range(found.count(experts))],
            "kernel": found.size("body.0.global_block.block.attn.conv.0.weight")[-1],
        }
        try:
            model = cls(**(published | shape | config))
        except InputError as error:
            raise WeightsError(f"the checkpoint does not fit SeemoRe: {error}") from error
        return found.into(model)
