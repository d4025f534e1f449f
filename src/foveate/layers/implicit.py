"""Implicit pictures: every output pixel is a query, answered by a small network.

`NeuralImage` (at the end) is asked for a place alone and holds one picture in its weights. `MLP` is asked for a place
and the nearest feature, the query of LIIF (Chen et al. 2021, arXiv:2012.09161) without feature unfolding and local
ensemble: with features F [h, w, C], output pixel q at its centre, c_q the centre of the nearest low-resolution pixel,

    z_q = [F_q, rel_y, rel_x, cell_y, cell_x] in R^(C+4),   rel = (q - c_q) * (h, w),   cell = (2/H, 2/W) * (h, w),

coordinates in -1..1, so that a low-resolution pixel is 2 wide. At an integer scale s, rel and cell take s*s values.
"""

import math
from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from foveate.errors import InputError
from foveate.layers.residual import relu_
from foveate.ops import subpixel


def queries(features: Tensor, height: int, width: int) -> Tensor:
    """The query vectors by their definition, for any output size.

    Shape: features [B, C, h, w] -> [B, height * width, C + 4], rows first.
    """
    b, _, h, w = features.shape

    def centres(rows: int, columns: int) -> Tensor:
        y = -1 + (2 * torch.arange(rows, dtype=features.dtype) + 1) / rows
        x = -1 + (2 * torch.arange(columns, dtype=features.dtype) + 1) / columns
        return torch.stack(torch.meshgrid(y, x, indexing="ij")).to(features.device).expand(b, -1, -1, -1)

    at = centres(height, width).flatten(2).transpose(1, 2)
    grid = at.flip(-1).unsqueeze(1)  # grid_sample wants (x, y)
    joined = torch.cat([features, centres(h, w)], 1)
    nearest = F.grid_sample(joined, grid, mode="nearest", align_corners=False)[:, :, 0].transpose(1, 2)
    size = features.new_tensor([h, w])
    rel = (at - nearest[..., -2:]) * size
    cell = (features.new_tensor([2 / height, 2 / width]) * size).expand_as(rel)
    return torch.cat([nearest[..., :-2], rel, cell], -1)


def subpixel_offsets(scale: int) -> Tensor:
    """[rel_y, rel_x, cell_y, cell_x] of the s*s sub-pixels of a low-resolution pixel, rows first.

    >>> subpixel_offsets(2).tolist()
    [[-0.5, -0.5, 1.0, 1.0], [-0.5, 0.5, 1.0, 1.0], [0.5, -0.5, 1.0, 1.0], [0.5, 0.5, 1.0, 1.0]]
    """
    rel = ((torch.arange(scale, dtype=torch.float64) + 0.5) / scale - 0.5) * 2
    y, x = torch.meshgrid(rel, rel, indexing="ij")
    cell = torch.full((scale**2,), 2 / scale, dtype=torch.float64)
    return torch.stack([y.flatten(), x.flatten(), cell, cell], 1)


class MLP(nn.Module):
    """Linear layers with ReLU between, on queries z = [feature, offset, cell]."""

    def __init__(self, inputs: int, hidden: list[int], outputs: int) -> None:
        super().__init__()
        widths = [inputs, *hidden, outputs]
        layers: list[nn.Module] = []
        for a, b in pairwise(widths):
            layers += [nn.Linear(a, b), nn.ReLU()]
        self.layers = nn.Sequential(*layers[:-1])

    def forward(self, z: Tensor) -> Tensor:
        """Shape: [..., inputs] -> [..., outputs]. The plain definition; `split` and `rest` are its fast form."""
        return self.layers(z)

    @property
    def linears(self) -> list[nn.Linear]:
        """The linear layers in order."""
        return [m for m in self.layers if isinstance(m, nn.Linear)]

    def split(self, features: Tensor, offsets: Tensor) -> tuple[Tensor, Tensor]:
        """The two terms of the first layer: per feature [N, C] -> [N, H], per offset [S, 4] -> [S, H]."""
        first = self.linears[0]
        c = features.shape[1]
        weight = first.weight[:, :c]
        # One hidden layer is summed over by `subpixel.two_layers`, which wants its values column by column.
        per_feature = (weight @ features.T).T if len(self.linears) == 2 else features @ weight.T
        return per_feature, torch.addmm(first.bias, offsets, first.weight[:, c:].T)

    def rest(
        self,
        hidden: Tensor,
        out: Tensor | None = None,
        index: Tensor | None = None,
        combine: Tensor | None = None,
    ) -> Tensor:
        """All that follows the first ReLU.

        Args:
            out, index: where to write it, as in `foveate.ops.subpixel.last_layer`.
            combine: [K, outputs], linear combinations to return in place of the outputs; folded into the last layer.

        Shape: [M, H] -> [M, outputs or K], or `out`.
        """
        for i, linear in enumerate(self.linears[1:-1]):
            hidden = torch.addmm(linear.bias, relu_(hidden) if i else hidden, linear.weight.T)
        return subpixel.last_layer(hidden, *self._last(combine), out, index)

    def everywhere(
        self, features: Tensor, offsets: Tensor, combine: Tensor | None = None, out: Tensor | None = None
    ) -> Tensor:
        """The output at all S sub-pixels of each feature.

        Args:
            combine: as in `rest`.
            out: where to write it; needs no gradient.

        Shape: [N, C], [S, 4] -> [N, S, outputs or K].
        """
        a, b = self.split(features, offsets)
        if len(self.linears) == 1:
            values = a[:, None] + b
            values = values if combine is None else values @ combine.T
            return values if out is None else out.copy_(values)
        if len(self.linears) == 2:
            return subpixel.two_layers(a, b, *self._last(combine), out)
        flat = None if out is None else out.view(-1, out.shape[-1])
        return self.rest(subpixel.hidden(a, b), flat, combine=combine).view(len(a), len(b), -1)

    def somewhere(self, features: Tensor, offsets: Tensor, index: Tensor, out: Tensor, rows: int = 4096) -> None:
        """The output at some of the sub-pixels, written to where it belongs; without gradients.

        Args:
            index: n * S + s of the sub-pixels, int64.
            out: what has all outputs.
            rows: sub-pixels at a time, whose hidden values stay in cache.

        Shape: [N, C], [S, 4], [M] -> M rows of out [N * S, outputs].
        """
        a, b = self.split(features, offsets)
        for part in index.split(rows):
            if len(self.linears) == 1:
                out.index_copy_(0, part, a[part // len(b)] + b[part % len(b)])
            else:
                self.rest(subpixel.hidden(a, b, part), out, part)

    def _last(self, combine: Tensor | None) -> tuple[Tensor, Tensor]:
        """Weight and bias of the last layer, or of combinations of its outputs."""
        last = self.linears[-1]
        return (last.weight, last.bias) if combine is None else (combine @ last.weight, combine @ last.bias)

    def cost(self, pixels: int) -> tuple[float, float]:
        """FLOPs of the first layer per feature and of the rest per output pixel."""
        first, *rest = self.linears
        return 2.0 * (first.in_features - 4) * first.out_features, 2.0 * sum(m.weight.numel() for m in rest)


class Arithmetic(NamedTuple):
    """How a `NeuralImage` computes.

    Attributes:
        sine: turns -> sin(2 pi turns).
        snap: applied to what every layer gives.
    """

    sine: Callable[[Tensor], Tensor]
    snap: Callable[[Tensor], Tensor]


FLOAT = Arithmetic(lambda turns: torch.sin(2 * math.pi * turns), lambda values: values)


class NeuralImage(nn.Module):
    """A picture as a network from places to colours; narrower and shallower pictures are slices of it.

    With filters g_i(p) = sin(2 pi (f_i p + phi_i)), places p = (x, y) in -1..1 along the longer side, and z_1 = g_1(p),

        fourier   z_{i+1} = (W_i z_i + b_i) g_{i+1}(p)     multiplicative filters (Fathony et al. 2021), not trained
        siren     z_{i+1} = sin(30 (W_i z_i + b_i))        (Sitzmann et al. 2020, arXiv:2006.09661)

    A level (n, d) uses the first n rows and columns of the first d matrices, and has a head of its own for the colours
    H z_{d+1} + h. Filters are sorted by frequency, so that the narrow levels are the coarse ones; they follow from a
    rule (`lattice`) and need not be stored.

    Args:
        levels: (width, depth) of each, none smaller than the one before.
        channels: of a colour.
        kind: "fourier" or "siren".
        top: largest frequency of a filter along an axis, in periods for each unit of place.
        generator: of the first weights.

    Raises: InputError for another kind, or levels that do not ascend.
    """

    frequencies: Tensor
    phases: Tensor

    def __init__(
        self,
        levels: Sequence[tuple[int, int]],
        channels: int = 3,
        kind: str = "fourier",
        top: float = 8.0,
        generator: torch.Generator | None = None,
    ) -> None:
        super().__init__()
        steps = list(pairwise([(1, 0), *levels]))
        if kind not in ("fourier", "siren") or not steps or any(b[i] < a[i] for a, b in steps for i in (0, 1)):
            raise InputError(f"a neural image is 'fourier' or 'siren' with ascending levels, got {kind!r}, {levels}.")
        self.levels, self.kind, self.top = tuple(levels), kind, top
        width, depth = self.levels[-1]

        def uniform(bound: float, *shape: int) -> nn.Parameter:
            return nn.Parameter((2 * torch.rand(*shape, generator=generator) - 1) * bound)

        if kind == "fourier":
            frequencies, phases = lattice(depth + 1, width, top)
            self.register_buffer("frequencies", frequencies)
            self.register_buffer("phases", phases)
            bound, gain = width**-0.5, 1.0
        else:
            self.frequencies = uniform(_OMEGA / (4 * math.pi), 1, width, 2)
            self.phases = uniform(0.5, 1, width)
            bound = gain = math.sqrt(6 / width) / _OMEGA
            gain *= math.sqrt(width)
        self.hidden = uniform(bound, depth, width, width)
        self.biases = uniform(bound, depth, width)
        self.heads = nn.ParameterList(uniform(gain * n**-0.5, channels, n) for n, _ in self.levels)
        self.offsets = nn.ParameterList(nn.Parameter(torch.full((channels,), 0.5)) for _ in self.levels)

    def at(self, places: Tensor, level: int = -1) -> Tensor:
        """Colours at any places: the plain definition.

        Shape: places (x, y) [..., 2] -> colours [..., channels].
        """
        filters = [FLOAT.sine(places @ f.T + phase) for f, phase in zip(self.frequencies, self.phases, strict=True)]
        return self._head(self._features(filters, level, FLOAT), level)

    def forward(
        self, y: Tensor, x: Tensor, levels: Sequence[int] = (-1,), arithmetic: Arithmetic = FLOAT, heads: bool = True
    ) -> list[Tensor]:
        """Colours, or what the heads see, where rows y and columns x cross.

        A filter is sin(a + b) = sin a cos b + cos a sin b with a of the row and b of the column, so that sines are
        taken of rows and columns and not of pixels.

        Shape: y [h], x [w] -> for each level [h * w, channels or width].
        """
        sine, snap = arithmetic
        widest = max(self.levels[level][0] for level in levels)
        deepest = max(self.levels[level][1] for level in levels) if self.kind == "fourier" else 0
        filters = []
        for f, phase in zip(self.frequencies[: deepest + 1, :widest], self.phases[:, :widest], strict=False):
            a, b = (y[:, None] * f[:, 1] + phase)[:, None], x[:, None] * f[:, 0]
            filters.append((sine(a) * sine(b + 0.25) + sine(a + 0.25) * sine(b)).flatten(0, 1))
        found = [self._features(filters, level, arithmetic) for level in levels]
        return [snap(self._head(z, level)) for z, level in zip(found, levels, strict=True)] if heads else found

    def _features(self, filters: list[Tensor], level: int, arithmetic: Arithmetic) -> Tensor:
        width, depth = self.levels[level]
        z = arithmetic.snap(filters[0][..., :width])
        for i in range(depth):
            mixed = F.linear(z, self.hidden[i, :width, :width], self.biases[i, :width])
            if self.kind == "fourier":
                z = arithmetic.snap(mixed * filters[i + 1][..., :width])
            else:
                z = arithmetic.snap(arithmetic.sine(mixed * _OMEGA / (2 * math.pi)))
        return z

    def _head(self, z: Tensor, level: int) -> Tensor:
        return F.linear(z, self.heads[level], self.offsets[level])


_OMEGA = 30.0


def lattice(filters: int, width: int, top: float) -> tuple[Tensor, Tensor]:
    """Frequencies and phases by a rule in whole numbers, the same on every machine.

    Channel c of n has (c + 1/2) / n of the largest frequency along one axis and less along the other. How much less,
    along which, and the phase are multiples, modulo 1, of the golden ratio and of the square root of two, both as
    16-bit fractions.

    Shape: -> frequencies (x, y) in periods for a unit of place [filters, width, 2], phases in turns [filters, width].
    """
    number = torch.arange(filters * width).view(filters, width)
    radius = top * (2 * torch.arange(width).double() + 1) / (2 * width)
    turn = number * 40503 & 65535
    along, other = radius.expand(filters, -1), radius * ((turn & 32767).double() / 16384 - 1)
    first = turn < 32768
    frequencies = torch.stack([torch.where(first, along, other), torch.where(first, other, along)], -1)
    return ((frequencies * 64).round() / 64).float(), (number * 27146 & 65535).float() / 65536
