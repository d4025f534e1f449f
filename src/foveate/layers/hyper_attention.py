"""Causal attention over long sequences at nearly linear cost: exact where short, sorted and sampled where long.

Han, Jayaram, Karbasi, Mirrokni, Woodruff, Zandieh 2023, "HyperAttention: Long-context Attention in Near-Linear Time",
arXiv:2310.05869.

Without a mask, queries and keys are sorted by the cell of an angular hash (signs of random projections, cells in Gray
order, so that neighbours differ in one sign). Attention within blocks along the diagonal of the sorted matrix holds its
large entries exactly; m columns drawn at random stand for the n others, each with weight n / m:

    out = merge(block(q, k, v), sample(q, k, v)),     merge: sums weighted by exp(lse), lse = log sum exp of scores

A causal mask is a triangle over, for halves of the sequence: two causal triangles and one square without a mask.

    causal(q, k, v) = [causal(q1, k1, v1), merge(causal(q2, k2, v2), square(q2, k1, v1))]

Up to `exact` positions everything is exact. Queries, keys and values are [B, h, n, d].
"""

from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from foveate.errors import InputError

Part = tuple[Tensor, Tensor]
"""Output [B, h, n, d] and log of the summed exponentials [B, h, n, 1]."""

ROWS = 512
"""Queries whose scores are held at once."""


def hyper_attention(
    q: Tensor, k: Tensor, v: Tensor, exact: int = 4096, block: int = 256, sample: int = 256, projections: int = 7
) -> Tensor:
    """Attend causally: position i sees positions 0 .. i.

    The random choices are the same at every call.

    Args:
        exact: longest sequence, and longest half, that is attended to exactly.
        block: keys per block of the sorted matrix.
        sample: m, columns that stand for all outside the block.
        projections: signs in a hash.

    Shape: [B, h, n, d] each -> [B, h, n, d].
    Raises: InputError for shapes that differ.

    >>> q = torch.ones(1, 1, 3, 2)
    >>> hyper_attention(q, q, torch.tensor([[[[3.0, 0], [1, 0], [2, 0]]]]))[0, 0, :, 0]
    tensor([3., 2., 2.])
    """
    if q.dim() != 4 or not q.shape == k.shape == v.shape:
        shapes = tuple(tuple(t.shape) for t in (q, k, v))
        raise InputError(f"expected queries, keys and values of one shape [B, h, n, d], got {shapes}.")
    if q.shape[2] <= exact:
        return F.scaled_dot_product_attention(q, k, v, is_causal=True)
    dice = torch.Generator(q.device).manual_seed(0)
    planes = torch.randn(q.shape[3], projections, generator=dice, device=q.device, dtype=torch.float32)
    return _causal(q, k, v, exact, partial(_square, exact=exact, block=block, sample=sample, planes=planes, dice=dice))[
        0
    ]


def _causal(q: Tensor, k: Tensor, v: Tensor, exact: int, square: partial[Part]) -> Part:
    n = q.shape[2]
    if n <= exact:
        return attend(q, k, v, causal=True)
    first, second = slice(0, n // 2), slice(n // 2, n)
    upper = _causal(q[:, :, first], k[:, :, first], v[:, :, first], exact, square)
    lower = merge(
        _causal(q[:, :, second], k[:, :, second], v[:, :, second], exact, square),
        square(q[:, :, second], k[:, :, first], v[:, :, first]),
    )
    return torch.cat([upper[0], lower[0]], 2), torch.cat([upper[1], lower[1]], 2)


def _square(
    q: Tensor, k: Tensor, v: Tensor, exact: int, block: int, sample: int, planes: Tensor, dice: torch.Generator
) -> Part:
    """Attention of all queries to all keys, about."""
    n, m = q.shape[2], k.shape[2]
    if m <= exact:
        return attend(q, k, v)
    by_q, by_k = (cells(t, planes).sort(dim=2, stable=True).indices for t in (q, k))
    q, k, v = _rows(q, by_q), _rows(k, by_k), _rows(v, by_k)
    blocks = -(-m // block)
    width = -(-n // blocks)
    near = _blocks(q, k, v, blocks, width, block)
    drawn = torch.randint(m, (*k.shape[:2], sample), generator=dice, device=k.device)
    own = torch.arange(n, device=q.device)[:, None] // width == (drawn // block)[:, :, None]
    far, lse = attend(q, _rows(k, drawn), _rows(v, drawn), ~own)
    out, total = merge(near, (far, lse + torch.log(lse.new_tensor(m / sample))))
    back = by_q.argsort(2)
    return _rows(out, back), _rows(total, back)


def _blocks(q: Tensor, k: Tensor, v: Tensor, blocks: int, width: int, block: int) -> Part:
    """Attention within blocks along the diagonal."""
    n, m = q.shape[2], k.shape[2]
    q = F.pad(q, (0, 0, 0, blocks * width - n)).unflatten(2, (blocks, width)).flatten(1, 2)
    k, v = (F.pad(t, (0, 0, 0, blocks * block - m)).unflatten(2, (blocks, block)).flatten(1, 2) for t in (k, v))
    real = (torch.arange(blocks * block, device=k.device) < m).view(1, blocks, 1, block)
    real = real.expand(1, blocks, width, block).repeat(1, q.shape[1] // blocks, 1, 1)
    parts = attend(q, k, v, real)
    out, lse = (t.unflatten(1, (-1, blocks)).flatten(2, 3)[:, :, :n] for t in parts)
    return out, lse


def attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None, causal: bool = False) -> Part:
    """Plain attention with the log of its denominators, some queries at a time.

    Args:
        mask: bool [B or 1, h, n, m], True where a query may look; a query that may look nowhere gets zeros.
        causal: query i sees keys 0 .. i.
    """
    parts = []
    for start in range(0, q.shape[2], ROWS):
        rows = slice(start, start + ROWS)
        stop = min(start + ROWS, k.shape[2]) if causal else k.shape[2]
        own = None if mask is None else mask[:, :, rows]
        if causal:
            own = torch.ones(q[:, :, rows].shape[2], stop, dtype=torch.bool, device=q.device).tril(start)
        given = q[:, :, rows], k[:, :, :stop], v[:, :, :stop], own
        parts.append(checkpoint(_attend, *given, use_reentrant=False) if torch.is_grad_enabled() else _attend(*given))
    out, lse = (torch.cat(t, 2) for t in zip(*parts, strict=True))
    return out, lse


def _attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Part:
    scores = (q @ k.mT).float() * q.shape[3] ** -0.5
    if mask is not None:
        scores = scores.masked_fill(~mask, torch.finfo(scores.dtype).min / 2)
    lse = scores.logsumexp(3, keepdim=True)
    return (scores - lse).exp().to(v.dtype) @ v, lse


def merge(a: Part, b: Part) -> Part:
    """Attention to two sets of keys from attention to each."""
    lse = torch.logaddexp(a[1], b[1])
    return a[0] * (a[1] - lse).exp().to(a[0].dtype) + b[0] * (b[1] - lse).exp().to(b[0].dtype), lse


def cells(x: Tensor, planes: Tensor) -> Tensor:
    """Cell of an angular hash, counted in Gray order. Shape: [..., n, d], [d, p] -> int64 [..., n] below 2^p."""
    signs = (x.float() @ planes > 0).long()
    code = (signs << torch.arange(planes.shape[1], device=x.device)).sum(-1)
    place, shift = code, 1
    while shift < planes.shape[1]:
        place, shift = place ^ (place >> shift), 2 * shift
    return place


def _rows(x: Tensor, index: Tensor) -> Tensor:
    return x.gather(2, index[..., None].expand(-1, -1, -1, x.shape[3]))
