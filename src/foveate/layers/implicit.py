"""Implicit pictures: every output pixel is a query to the nearest feature, answered by an MLP.

The query of LIIF (Chen et al. 2021, arXiv:2012.09161) without feature unfolding and local ensemble: with features
F [h, w, C], output pixel q at its centre, c_q the centre of the nearest low-resolution pixel,

    z_q = [F_q, rel_y, rel_x, cell_y, cell_x] in R^(C+4),   rel = (q - c_q) * (h, w),   cell = (2/H, 2/W) * (h, w),

coordinates in -1..1, so that a low-resolution pixel is 2 wide. At an integer scale s, rel and cell take s*s values.
"""

from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn

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
