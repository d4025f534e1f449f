"""Neighbourhood attention: every pixel attends to the k x k pixels around it.

Hassani, Walton, Li, Li, Shi 2022, "Neighborhood Attention Transformer", arXiv:2204.07143.

    A[p, t] = softmax_t( scale q[p] . k[p + t] + bias[t] ),        y[p] = sum_t A[p, t] v[p + t]

in each head, t over the k x k neighbours. At the picture's border the neighbourhood is moved inside, not padded: row i
has the rows s_i .. s_i + k - 1, s_i = clamp(i - k // 2, 0, H - k), columns likewise, so that every pixel has exactly
k * k keys. The bias follows, read from its table [h, 2k - 1, 2k - 1] at (s_i + a - i + k - 1, s_j + b - j + k - 1).

The reference gathers the neighbours, k * k copies of keys and values. On the CPU compiled loops need no copy, forward
or backward, where numbers are float32 or less; elsewhere the reference runs, a few rows at a time to spare memory.
"""

import torch
from torch import Tensor

from foveate.errors import InputError
from foveate.ops import fast_allowed

GATHERED = 1 << 25
"""Keys (and values) that the reference holds copies of at a time, in numbers; at least a row's."""


def neighbourhood_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    kernel_size: int,
    heads: int = 1,
    bias: Tensor | None = None,
    scale: float | None = None,
) -> Tensor:
    """Attend to the kernel_size x kernel_size pixels around each pixel. Gradients reach q, k, v and bias.

    Args:
        q, k, v: queries, keys and values; heads are runs of neighbouring channels.
        kernel_size: odd, and no more than H and W.
        bias: added to the scores by relative position, [heads, 2 * kernel_size - 1, 2 * kernel_size - 1]; default none.
        scale: of q . k, default 1 / sqrt(channels of a head).

    Shape: q, k, v [B, C, H, W] -> [B, C, H, W].
    Raises: InputError when shapes do not fit together, or the neighbourhood is even or larger than the picture.

    >>> x = torch.arange(4.0).expand(1, 1, 4, 4)
    >>> neighbourhood_attention(torch.zeros_like(x), x, x, 3)[0, 0, 0]
    tensor([1., 1., 2., 2.])
    """
    _check(q, k, v, kernel_size, heads, bias)
    width = q.shape[1] // heads
    dtype = q.dtype
    if dtype in (torch.float16, torch.bfloat16):  # a softmax of so many, and its exponents, want more digits
        q, k, v = q.float(), k.float(), v.float()
    q = q * (width**-0.5 if scale is None else scale)
    if bias is not None:
        bias = bias.to(q.dtype)
    q, k, v = (x.unflatten(1, (heads, width)) for x in (q, k, v))
    if fast_allowed() and q.device.type == "cpu" and q.dtype == torch.float32:
        from foveate.ops._neighbourhood_cpu import neighbourhood_cpu

        y = neighbourhood_cpu(q, k, v, bias, kernel_size)
    else:
        rows = max(1, GATHERED // (q.numel() // q.shape[3] * kernel_size**2))
        y = neighbourhood_reference(q, k, v, bias, kernel_size, rows)
    return y.flatten(1, 2).to(dtype)


def neighbourhood_reference(
    q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, kernel_size: int, rows: int | None = None
) -> Tensor:
    """`neighbourhood_attention` in plain PyTorch, with copies of each pixel's neighbours.

    Args:
        rows: of queries at a time, default all.

    Shape: q (scaled), k, v [B, h, d, H, W], bias [h, 2k - 1, 2k - 1] or None -> [B, h, d, H, W].
    """
    height, width = q.shape[-2:]
    down, dy = _neighbours(height, kernel_size, q.device)
    across, dx = _neighbours(width, kernel_size, q.device)
    parts = []
    for at in torch.arange(height, device=q.device).split(rows or height):
        place = (..., down[at][:, None, :, None], across[None, :, None, :])
        scores = torch.einsum("bhdyx,bhdyxuv->bhyxuv", q[..., at, :], k[place])
        if bias is not None:
            scores = scores + bias[:, dy[at][:, None, :, None], dx[None, :, None, :]]
        attention = scores.flatten(-2).softmax(-1).view_as(scores)
        parts.append(torch.einsum("bhyxuv,bhdyxuv->bhdyx", attention, v[place]))
    return torch.cat(parts, -2)


def _neighbours(length: int, kernel_size: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Neighbours of each place of an axis, and where the table has their bias. Shape: [length, kernel_size] each."""
    place = torch.arange(length, device=device)[:, None]
    start = (place - kernel_size // 2).clamp(0, length - kernel_size)
    index = start + torch.arange(kernel_size, device=device)
    return index, index - place + kernel_size - 1


def _check(q: Tensor, k: Tensor, v: Tensor, kernel_size: int, heads: int, bias: Tensor | None) -> None:
    if q.dim() != 4 or not q.shape == k.shape == v.shape or not q.numel():
        raise InputError(
            "neighbourhood_attention takes q, k and v of one shape [B, C, H, W], "
            f"got {tuple(q.shape)}, {tuple(k.shape)} and {tuple(v.shape)}."
        )
    if not q.is_floating_point() or not q.dtype == k.dtype == v.dtype:
        raise InputError(f"q, k and v are floating-point numbers of one type, got {q.dtype}, {k.dtype} and {v.dtype}.")
    if kernel_size < 1 or kernel_size % 2 == 0:
        raise InputError(f"A neighbourhood has a centre, so kernel_size must be odd, got {kernel_size}.")
    if min(q.shape[2:]) < kernel_size:
        raise InputError(
            f"A {kernel_size} x {kernel_size} neighbourhood does not fit in {q.shape[2]} x {q.shape[3]} pixels; "
            "use a smaller one, or pad the picture."
        )
    if heads < 1 or q.shape[1] % heads:
        raise InputError(f"{heads} heads do not divide {q.shape[1]} channels.")
    side = 2 * kernel_size - 1
    if bias is not None and tuple(bias.shape) != (heads, side, side):
        raise InputError(f"the bias of {heads} heads is [{heads}, {side}, {side}], got {tuple(bias.shape)}.")
