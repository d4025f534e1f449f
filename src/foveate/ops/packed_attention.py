"""Attention within sequences that lie end to end, without padding: each token sees its own sequence only.

    out[t] = sum_u softmax_u(scale q[t] . k[u]) v[u],   u over the sequence of t

On the CPU, and wherever gradients are asked for, sequences of one length form one call of PyTorch's own attention. On
CUDA a Triton kernel takes them all at once. Both equal attention on a padded batch with the padding masked, which is
the reference.
"""

from collections.abc import Sequence
from itertools import accumulate, groupby

import torch
import torch.nn.functional as F
from torch import Tensor

from foveate.errors import InputError
from foveate.ops.tile import on_triton


def packed_attention(
    q: Tensor, k: Tensor, v: Tensor, lengths: Sequence[int], scale: float | None = None, dropout: float = 0.0
) -> Tensor:
    """Attend within each sequence.

    Args:
        lengths: tokens of each sequence; they sum to T.
        scale: of the scores; default C ** -0.5.
        dropout: share of attention weights that is dropped.

    Shape: q, k [H, T, C], v [H, T, D] -> [H, T, D].
    Raises: InputError for shapes that do not fit.

    >>> x = torch.eye(2)[None]
    >>> packed_attention(x, x, x, (1, 1))[0]  # a token alone sees itself
    tensor([[1., 0.],
            [0., 1.]])
    """
    if not (q.dim() == 3 and q.shape == k.shape and q.shape[:2] == v.shape[:2]) or sum(lengths) != q.shape[1]:
        raise InputError(
            f"packed_attention takes q, k [H, T, C], v [H, T, D] and lengths that sum to T, got {tuple(q.shape)}, "
            f"{tuple(k.shape)}, {tuple(v.shape)} and {list(lengths)}."
        )
    alike = len(set(lengths)) == 1  # one call of PyTorch's own kernel, which is the fastest there is
    learning = torch.is_grad_enabled() and any(t.requires_grad for t in (q, k, v))
    if not alike and not dropout and not learning and on_triton(q, k, v):
        from foveate.ops._packed_attention_triton import attend

        return attend(q, k, v, lengths, q.shape[-1] ** -0.5 if scale is None else scale)
    return _by_length(q, k, v, lengths, scale, dropout)


def packed_attention_reference(
    q: Tensor, k: Tensor, v: Tensor, lengths: Sequence[int], scale: float | None = None
) -> Tensor:
    """`packed_attention` on a padded batch, the padding masked."""
    wide = [torch.nn.utils.rnn.pad_sequence(t.transpose(0, 1).split(tuple(lengths)), True) for t in (q, k, v)]
    heads = [t.transpose(1, 2) for t in wide]  # [B, H, longest, C]
    there = torch.arange(wide[0].shape[1], device=q.device) < torch.tensor(lengths, device=q.device)[:, None]
    scores = (heads[0] @ heads[1].mT) * (q.shape[-1] ** -0.5 if scale is None else scale)
    p = scores.masked_fill(~there[:, None, None], -torch.inf).softmax(-1)
    return (p @ heads[2]).transpose(1, 2)[there].transpose(0, 1)


def _by_length(q: Tensor, k: Tensor, v: Tensor, lengths: Sequence[int], scale: float | None, dropout: float) -> Tensor:
    """One call for all sequences of a length; where they are neighbours nothing is copied."""
    starts = list(accumulate(lengths, initial=0))
    parts, rows = [], []
    for n, group in groupby(sorted(range(len(lengths)), key=lambda i: lengths[i]), key=lambda i: lengths[i]):
        members = list(group)
        if n == 0:
            continue
        if members[-1] - members[0] == len(members) - 1:
            first = starts[members[0]]
            heads = [t[:, first : first + n * len(members)] for t in (q, k, v)]
            rows.append(torch.arange(first, first + n * len(members)))
        else:
            at = (torch.tensor([starts[i] for i in members])[:, None] + torch.arange(n)).flatten()
            heads = [t.index_select(1, at.to(t.device)) for t in (q, k, v)]
            rows.append(at)
        a, b, c = (t.unflatten(1, (len(members), n)).transpose(0, 1) for t in heads)
        out = F.scaled_dot_product_attention(a, b, c, dropout_p=dropout, scale=scale)
        parts.append(out.transpose(0, 1).flatten(1, 2))
    if not parts:
        return v.clone()
    y = parts[0] if len(parts) == 1 else torch.cat(parts, 1)
    place = torch.cat(rows)
    if bool((place[1:] > place[:-1]).all()):
        return y
    return y.index_select(1, place.argsort().to(y.device))
