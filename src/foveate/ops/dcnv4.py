"""DCNv4: every pixel says where to look, and how much to weigh what it sees, without a softmax.

Xiong, Li, Chen et al. 2024, "Efficient Deformable ConvNets: Rethinking Dynamic and Sparse Operator for Vision
Applications", arXiv:2401.06197.

From its own feature a pixel p predicts for each of G groups of channels K = 9 offsets o_t and K weights m_t, packed as
(dx_0, dy_0, dx_1, dy_1, ..., m_0, m_1, ...) group by group, and gathers

    y[p] = sum_t m_t v(p + a (tap_t + o_t)),    v bilinear between pixels and zero outside,

where a scales offsets. DCNv3 takes softmax_t(m) for m: convex averages, so that no group can tell an edge from its
opposite. DCNv4 leaves m as it is, like the weights of a convolution. Taps run down columns: t = 3 i + j lies at
x = i - 1, y = j - 1, the transpose of the order of PyTorch's kernels.

It is a case of `foveate.ops.gathered`, whose kernels read what belongs to a pixel and group once for all the group's
channels: 3 K numbers per pixel and group instead of 3 K per pixel and channel (`packed_reads`).
"""

import torch
from torch import Tensor, nn

from foveate.errors import InputError
from foveate.ops.gathered import gathered


def dcnv4(
    value: Tensor,
    packed: Tensor,
    groups: int,
    *,
    kernel_size: int = 3,
    stride: int = 1,
    padding: int | None = None,
    dilation: int = 1,
    offset_scale: float = 1.0,
    remove_center: bool = False,
    softmax: bool = False,
) -> Tensor:
    """Gather what every pixel asks for.

    Args:
        value: v.
        packed: offsets in pixels and weights, packed as above; what follows the 3 K G-th number is left alone.
        groups: G, divides C.
        kernel_size, stride, padding, dilation: of the taps, as in a convolution; padding keeps the size by default.
        offset_scale: a.
        remove_center: leave out the tap in the middle, so K is one less.
        softmax: weigh by softmax_t(m), as DCNv3 does.

    Shape: value [B, H, W, C], packed [B, Ho, Wo, P], P >= 3 K G -> [B, Ho, Wo, C].
    Raises: InputError when shapes do not fit together.
    """
    taps = column_taps(kernel_size, padding, dilation, offset_scale, remove_center)
    used = 3 * len(taps) * groups
    if value.dim() != 4 or packed.dim() != 4 or packed.shape[-1] < used:
        raise InputError(
            f"dcnv4 takes value [B, H, W, C] and, for {groups} groups of {len(taps)} taps, packed [B, Ho, Wo, {used}] "
            f"or wider; got {tuple(value.shape)} and {tuple(packed.shape)}."
        )
    parts = packed[..., :used].unflatten(-1, (groups, -1))
    shifts, weight = parts.split([2 * len(taps), len(taps)], -1)
    offset = shifts.unflatten(-1, (-1, 2)).permute(0, 3, 4, 5, 1, 2)
    weight = (weight.softmax(-1) if softmax else weight).permute(0, 3, 4, 1, 2)
    if offset_scale != 1:
        offset = offset * offset_scale
    return gathered(value.permute(0, 3, 1, 2), weight, offset, stride=stride, taps=taps).permute(0, 2, 3, 1)


def column_taps(
    kernel_size: int, padding: int | None = None, dilation: int = 1, scale: float = 1.0, remove_center: bool = False
) -> tuple[tuple[float, float], ...]:
    """Places (x, y) of DCNv4's taps around p * stride, column by column, `scale` times as far from the kernel's centre.

    >>> column_taps(3)[:4]
    ((-1.0, -1.0), (-1.0, 0.0), (-1.0, 1.0), (0.0, -1.0))
    """
    half = dilation * (kernel_size - 1) // 2
    centre = half - (half if padding is None else padding)
    steps = [centre + (i * dilation - half) * float(scale) for i in range(kernel_size)]
    middle = (kernel_size // 2,) * 2 if remove_center else None
    return tuple((steps[i], steps[j]) for i in range(kernel_size) for j in range(kernel_size) if (i, j) != middle)


def packed_reads(channels: int, groups: int, taps: int = 9) -> tuple[int, int]:
    """Offsets and weights that are read per pixel: once for every channel, and once for every group.

    >>> packed_reads(128, 8)
    (3456, 216)
    """
    return 3 * taps * channels, 3 * taps * groups


class DCNv4(nn.Module):
    """Project, gather what every pixel asks for, project again.

    A fresh one gives its output bias everywhere: its pixels ask for nothing (zero weights) until they learn to.

    Args:
        channels: C.
        groups: G, divides C; the published networks have 16 channels per group.
        kernel_size, dilation, offset_scale, remove_center, softmax: see `dcnv4`; the stride is 1 and padding
            keeps the size, as every pixel asks for itself.
        dw_kernel_size: side of a depth-wise convolution by which pixels look around before they ask; None for none.
        center_feature_scale: mix what was gathered with the pixel's own value, by a learned gate per group.
        output_bias: of the last projection.
        pointwise: have the projections at all.

    Shape: [B, H, W, C] -> [B, H, W, C].
    Raises: InputError for groups that do not divide the channels, even kernels, or an input of another shape.
    """

    def __init__(
        self,
        channels: int = 64,
        groups: int = 4,
        kernel_size: int = 3,
        dilation: int = 1,
        offset_scale: float = 1.0,
        dw_kernel_size: int | None = None,
        center_feature_scale: bool = False,
        remove_center: bool = False,
        output_bias: bool = True,
        pointwise: bool = True,
        softmax: bool = False,
    ) -> None:
        super().__init__()
        if groups < 1 or channels % groups:
            raise InputError(f"{groups} groups cannot share {channels} channels; give a number that divides them.")
        taps = kernel_size**2 - remove_center
        if dilation * (kernel_size - 1) % 2 or (dw_kernel_size is not None and dw_kernel_size % 2 == 0):
            raise InputError(
                "a map keeps its size where kernels have a centre; got "
                f"kernel_size={kernel_size}, dilation={dilation}, dw_kernel_size={dw_kernel_size}."
            )
        self.channels, self.groups, self.kernel_size, self.dilation = channels, groups, kernel_size, dilation
        self.offset_scale, self.remove_center, self.softmax = offset_scale, remove_center, softmax
        if dw_kernel_size is not None:
            side = (dw_kernel_size - 1) // 2
            self.offset_mask_dw = nn.Conv2d(channels, channels, dw_kernel_size, padding=side, groups=channels)
        self.offset_mask = nn.Linear(channels, -(-3 * groups * taps // 8) * 8)
        if pointwise:
            self.value_proj = nn.Linear(channels, channels)
            self.output_proj = nn.Linear(channels, channels, bias=output_bias)
        if center_feature_scale:
            self.center_feature_scale_proj_weight = nn.Parameter(torch.zeros(groups, channels))
            self.center_feature_scale_proj_bias = nn.Parameter(torch.zeros(groups))
        self.look, self.gated, self.pointwise = dw_kernel_size is not None, center_feature_scale, pointwise
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Begin with weights of zero, and Xavier's projections."""
        nn.init.zeros_(self.offset_mask.weight)
        nn.init.zeros_(self.offset_mask.bias)
        for layer in (self.value_proj, self.output_proj) if self.pointwise else ():
            nn.init.xavier_uniform_(layer.weight)
            if layer.bias is not None:
                nn.init.zeros_(layer.bias)

    def forward(self, x: Tensor) -> Tensor:
        if x.dim() != 4 or x.shape[-1] != self.channels or not x.numel():
            raise InputError(f"expected a map [B, H, W, {self.channels}] with something in it, got {tuple(x.shape)}.")
        value = self.value_proj(x) if self.pointwise else x
        seen = self.offset_mask_dw(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1) if self.look else x
        y = dcnv4(
            value,
            self.offset_mask(seen),
            self.groups,
            kernel_size=self.kernel_size,
            dilation=self.dilation,
            offset_scale=self.offset_scale,
            remove_center=self.remove_center,
            softmax=self.softmax,
        )
        if self.gated:
            gate = nn.functional.linear(y, self.center_feature_scale_proj_weight, self.center_feature_scale_proj_bias)
            gate = gate.sigmoid().repeat_interleave(self.channels // self.groups, -1)
            y = torch.lerp(y, value, gate)
        return self.output_proj(y) if self.pointwise else y


def conformance_example() -> tuple[DCNv4, tuple[Tensor]]:
    """A small module that already asks, and a map of which to take finite differences; no place is on a pixel."""
    module = DCNv4(4, 2, dw_kernel_size=3, center_feature_scale=True, offset_scale=0.5).double()
    nn.init.normal_(module.offset_mask.weight, std=0.02)
    nn.init.uniform_(module.offset_mask.bias, 0.3, 0.6)
    return module, (torch.rand(1, 4, 3, 4, dtype=torch.float64, requires_grad=True),)
