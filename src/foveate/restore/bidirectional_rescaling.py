"""BAIRNet: a network that shrinks and one that enlarges, to any size, learned together.

Pan, Li, He, Lin, Hou, Ling 2022, "Towards Bidirectional Arbitrary Image Rescaling: Joint Optimization and Cycle
Idempotence", arXiv:2203.00911.

Whoever may choose how a picture is made small can leave in it what enlarging will need. Down- and upscaler are built
alike: a body of residual blocks on the given pixels, a resampling layer, and a convolution whose result, zero at first,
is added to the bicubically resampled picture. After every fourth block the body adapts to the scale,

    f <- f + M(f) * conv_w(f),   w = sum_k softmax(MLP(1/s_y, 1/s_x))_k w_k,   M a mask in 0..1

An output pixel p lies at u = (i + 1/2) r - 1/2 among the given ones, r = given / wanted. Its code is
e = (u - round(u), r) on both axes, and it is resampled by

    g0 = sum_t softmax_t(MLP(t - u, e)) f(t)      over the n x n pixels nearest to u, n = ceil(r) up to 4  (merging)
       = f(u), bilinear                           when pictures are enlarged          (splitting)
    h  = MLP(e, g0),   o = offset(h),   m = sigmoid(routing(h)) in R^8
    g  = f(u + o), bilinear,   result  g + B A g,   A = sum_k m_k A_k: C -> 8,   B = sum_k m_k B_k: 8 -> C

so every output pixel has a filter of its own, from its place and from what is there. The paper's layers are known from
its abstract and from networks that it builds on; sizes follow ArbSR (arXiv:2004.04434). Offsets stay within 2 pixels,
so that a window of a picture knows how much context it needs.

Between the two networks the small picture is rounded to 8 bits, in training with straight-through gradients: what it
hides in fractions of a level would be lost in any file.
"""

from itertools import pairwise
from math import ceil
from typing import Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from foveate.engine.tiles import Box
from foveate.errors import InputError
from foveate.layers.resample import Axes, Axis, Size, cropped, grown_region, had, parts, resize, wholes
from foveate.layers.rescaler import Rescaler, check_turn, quantise, read_region, region_of, whole_box
from foveate.layers.residual import ResidualBlock, add_
from foveate.layers.upscaler import Read, window_reader
from foveate.ops.gathered import gathered

MEAN = (0.4488, 0.4371, 0.4040)
"""Mean colour of DIV2K, taken off before the first convolution."""

REACH = 2.0
"""Largest offset in given pixels."""

TAPS = 4
"""Given pixels merged along a side, at most."""


class ScaleAdaption(nn.Module):
    """Add a convolution that depends on the scale, where a mask wants it.

    Args:
        channels: C.
        experts: kernels that are mixed.

    Shape: f [B, C, H, W], scales [2] -> as f.
    """

    def __init__(self, channels: int, experts: int = 4) -> None:
        super().__init__()
        narrow = max(4, channels // 4)
        self.mixture = nn.Sequential(nn.Linear(2, channels), nn.ReLU(), nn.Linear(channels, experts))
        self.weight = nn.Parameter(torch.empty(experts, channels, channels, 3, 3))
        self.bias = nn.Parameter(torch.zeros(experts, channels))
        nn.init.uniform_(self.weight, -1 / (3 * channels**0.5), 1 / (3 * channels**0.5))
        widths = (channels, narrow, narrow, narrow, 1)
        convs = [nn.Conv2d(a, b, 3, padding=1) for a, b in pairwise(widths)]
        self.mask = nn.Sequential(*(m for conv in convs for m in (conv, nn.LeakyReLU(0.1))))
        self.mask[-1] = nn.Sigmoid()

    def forward(self, f: Tensor, scales: Tensor) -> Tensor:
        share = self.mixture(scales).softmax(0)
        weight, bias = torch.einsum("k,koihw->oihw", share, self.weight), share @ self.bias
        return f + self.mask(f) * F.conv2d(f, weight, bias, padding=1)


class Body(nn.Module):
    """Residual blocks with a scale-aware adaption after every `every` of them.

    Args:
        channels, blocks: of the residual blocks.
        every: blocks between adaptions; 0 for none.

    Shape: x [B, 3, H, W], scales [2] -> [B, C, H, W].
    """

    def __init__(self, channels: int, blocks: int, every: int) -> None:
        super().__init__()
        self.entry = nn.Conv2d(3, channels, 3, padding=1)
        self.blocks = nn.ModuleList(ResidualBlock(channels) for _ in range(blocks))
        self.every = every
        self.adaptions = nn.ModuleList(ScaleAdaption(channels) for _ in range(blocks // every if every else 0))
        self.last = nn.Conv2d(channels, channels, 3, padding=1)
        self.halo = 2 + 2 * blocks + 4 * len(self.adaptions)

    def forward(self, x: Tensor, scales: Tensor) -> Tensor:
        first = f = self.entry(x - x.new_tensor(MEAN)[:, None, None])
        for i, block in enumerate(self.blocks, 1):
            f = block(f)
            if self.every and i % self.every == 0:
                f = self.adaptions[i // self.every - 1](f, scales)
        return self.last(f) + first


class Resampler(nn.Module):
    """Features at the places of other pixels, each through a filter of its own.

    Args:
        channels: C.
        merging: whether it shrinks pictures.
        experts: K, low-rank filters that are mixed.
        rank: of a filter.

    Shape: f [B, C, axes.have] -> [B, C, axes.want].
    """

    def __init__(self, channels: int, merging: bool, experts: int = 8, rank: int = 8) -> None:
        super().__init__()
        self.experts = experts
        self.merge = nn.Sequential(nn.Conv2d(6, 16, 1), nn.ReLU(), nn.Conv2d(16, 1, 1, bias=False)) if merging else None
        self.look = nn.Sequential(nn.Conv2d(channels + 4, channels, 1), nn.ReLU(), nn.Conv2d(channels, channels, 1))
        self.offset = nn.Conv2d(channels, 2, 1)
        self.routing = nn.Conv2d(channels, experts, 1)
        self.compress = nn.Conv2d(channels, experts * rank, 1, bias=False)
        self.expand = nn.Conv2d(experts * rank, channels, 1, bias=False)
        nn.init.zeros_(self.offset.weight)
        nn.init.zeros_(self.offset.bias)  # type: ignore[arg-type]

    def forward(self, f: Tensor, axes: Axes) -> Tensor:
        centres = (axes[0].centres(f.device), axes[1].centres(f.device))
        plain = _places(centres[1], centres[0]).to(f.dtype)
        codes = codes_of(axes, f)
        if self.merge is None:
            seen = _sampled(f, plain[None, None])
        else:
            y, x = (_nearest(at, axis).T for at, axis in zip(centres, axes, strict=True))
            taps = torch.stack([_places(across, down) for down in y for across in x]).to(f.dtype)
            weight = self.merge(torch.cat([taps - plain, codes.expand(len(taps), -1, -1, -1)], 1)).softmax(0)
            seen = _sampled(f, taps[None], weight.transpose(0, 1)[None])
        h = F.relu(self.look(torch.cat([codes.expand(len(f), -1, -1, -1), seen], 1)))
        g = _sampled(f, (plain + REACH * torch.tanh(self.offset(h) / REACH))[:, None])
        routing = torch.sigmoid(self.routing(h))[:, :, None]
        z = (routing * self.compress(g).unflatten(1, (self.experts, -1))).sum(1, keepdim=True)
        return g + self.expand((routing * z).flatten(1, 2))


class Half(nn.Module):
    """One direction: body, resampling, and what is added to the bicubic result. The last layer is zero at first.

    Args:
        channels, blocks, every: of the body.
        merging: whether it shrinks pictures.
    """

    def __init__(self, channels: int, blocks: int, every: int, merging: bool) -> None:
        super().__init__()
        self.body = Body(channels, blocks, every)
        self.resample = Resampler(channels, merging)
        self.tail = nn.Conv2d(channels, 3, 3, padding=1)
        nn.init.zeros_(self.tail.weight)
        nn.init.zeros_(self.tail.bias)  # type: ignore[arg-type]

    def forward(self, read: Read, source: Size, size: Size, box: Box) -> Tensor:
        """Compute some pixels of the result.

        Args:
            read: gives windows of the source.
            source, size: of the whole picture and of the whole result.
            box: the pixels wanted, xyxy in the result.
        """
        want = region_of(box)
        region = grown_region(want, 1, size)  # the last convolution looks one pixel around
        axes = parts(source, size, region, margin=3)  # offset, merged pixels and the neighbour of a bilinear sample
        window = grown_region(had(axes), self.body.halo, source)
        x = read_region(read, window)
        scales = x.new_tensor([min(n, m) / max(n, m) for n, m in zip(source, size, strict=True)])
        f = cropped(self.body(x, scales), window, had(axes))
        y = cropped(self.tail(self.resample(f, axes)), region, want)
        plain = parts(source, size, want)
        return add_(y, resize(cropped(x, window, had(plain)), plain))


class BAIRNet(Rescaler):
    """Bidirectional rescaling to any size.

    Args:
        channels, blocks: of both bodies.
        every: blocks between scale-aware adaptions; 0 for none.

    Shape: x [B, 3, H, W] in 0..1, size (h, w) -> (small picture [B, 3, h, w] of 8 bits, restored [B, 3, H, W]).
    Raises: InputError for a network without channels.
    """

    slug, recipe = "bidirectional-rescaling", "recipes/rescale.py bidirectional-rescaling"
    largest = 512

    def __init__(self, channels: int = 64, blocks: int = 16, every: int = 4) -> None:
        super().__init__()
        if channels < 1 or blocks < 0 or every < 0:
            raise InputError(f"BAIRNet needs channels >= 1, got channels={channels}, blocks={blocks}, every={every}.")
        self.down, self.up = (Half(channels, blocks, every, merging) for merging in (True, False))
        self.halo = self.down.body.halo + TAPS

    def forward(self, x: Tensor, size: Size) -> tuple[Tensor, Tensor]:
        low = quantise(self.reduce(x, size))
        return low, self.enlarge(low, (x.shape[2], x.shape[3]))

    def reduce(self, x: Tensor, size: Size) -> Tensor:
        check_turn(x, size, shrink=True)
        low: Tensor = self.down(window_reader(x), (x.shape[2], x.shape[3]), size, whole_box(size))
        return low

    def enlarge(self, x: Tensor, size: Size) -> Tensor:
        check_turn(x, size, shrink=False)
        high: Tensor = self.up(window_reader(x), (x.shape[2], x.shape[3]), size, whole_box(size))
        return high

    def part(self, read: Read, source: Size, size: Size, box: Box, shrink: bool) -> Tensor:
        result: Tensor = (self.down if shrink else self.up)(read, source, size, box)
        return result

    def loss(self, x: Tensor, size: Size, fidelity: float = 4.0, idempotence: float = 0.1) -> Tensor:
        """How far pictures are from coming back, their small versions from bicubic ones, a second cycle from the first.

        mean |x - x^| + fidelity mean (D(x) - bicubic(x))^2 + idempotence mean |U(Q(D(Q(x^)))) - x^|

        The square is IRN's. An absolute difference has its kink where the downscaler starts, and holds it there.
        """
        source = (x.shape[2], x.shape[3])
        low = self.reduce(x, size)
        plain = resize(x, wholes(source, size))
        back = self.enlarge(quantise(low), source)
        total = (x - back).abs().mean() + fidelity * (low - plain).square().mean()
        if idempotence:
            total = total + idempotence * (self(quantise(back), size)[1] - back).abs().mean()
        return total

    @classmethod
    def conformance_example(cls, larger: bool = False) -> tuple[Self, tuple[Tensor, Size]]:
        """A small network whose last layers have left zero, and pictures for it."""
        model = cls(channels=8, blocks=2, every=2)
        for module in model.modules():
            if isinstance(module, Resampler):
                nn.init.normal_(module.offset.weight, std=0.05)
            if isinstance(module, Half):
                nn.init.normal_(module.tail.weight, std=0.02)
        return model, (torch.rand(2, 3, *((13, 18) if larger else (9, 11))), (5, 6))


def codes_of(axes: Axes, like: Tensor) -> Tensor:
    """e of each wanted pixel: where it lies between the given ones, and the ratios. Shape: -> [1, 4, want, want]."""
    down, across = (at - _rounded(at) for at in (axes[0].centres(), axes[1].centres()))
    down, across = torch.broadcast_tensors(down[:, None], across)
    ratios = [torch.full_like(down, ratio) for ratio in (axes[0].ratio, axes[1].ratio)]
    return torch.stack([down, across, *ratios])[None].to(like)


def _nearest(centres: Tensor, axis: Axis) -> Tensor:
    """The given pixels that are merged for each wanted one, [want, n]."""
    n = min(TAPS, ceil(max(1.0, axis.ratio) - 1e-3))
    return _rounded(centres - (n - 1) / 2)[:, None] + torch.arange(n, device=centres.device)


def _rounded(x: Tensor) -> Tensor:
    """Round, halves up: at simple ratios there are many, and neither rounding errors nor windows may decide them."""
    return (x + 0.5 + 1e-3).floor()


def _places(across: Tensor, down: Tensor) -> Tensor:
    """Points (x, y) of a grid, [2, down, across]."""
    return torch.stack(torch.broadcast_tensors(across, down[:, None]))


def _sampled(f: Tensor, places: Tensor, weight: Tensor | None = None) -> Tensor:
    """Bilinear samples, the outermost pixels continued, weighted and summed.

    Shape: f [B, C, H, W]; places (x, y) [B or 1, T, 2, h, w]; weight [1, 1, T, h, w], without which T is 1
    -> [B, C, h, w].
    """
    weight = f.new_ones(1, 1, 1, *places.shape[3:]) if weight is None else weight
    h, w = places.shape[3:]
    if h == w == 1:  # a single place would stand for all pixels
        places, weight = places.expand(-1, -1, -1, 1, 2), weight.expand(-1, -1, -1, 1, 2)
    last = places.new_tensor([f.shape[3] - 1, f.shape[2] - 1])[:, None, None]
    grid = _places(torch.arange(places.shape[4]), torch.arange(h)).to(places)
    offset = places.clamp(min=torch.zeros_like(last), max=last) - grid
    return gathered(f, weight, offset[:, None])[..., :w]
