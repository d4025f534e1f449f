"""ScatterMoE: exact sparse mixtures of experts without padding, dropped tokens or copies in expert order.

Tan, Shen, Panda, Courville 2024, arXiv:2403.08245.

A token t goes to its k experts e[t, j] with weights gate[t, j]. One primitive, ParallelLinear (`foveate.ops.
grouped_linear`), reads rows where they lie and writes them in expert order or back in token order, and every mixture
is made of two of them around what happens in between:

    MLP         h = act(PL1(x))     grouped [T k, H]              y[t] = sum_j gate[t, j] PL2(h)[t, j]
    attention   q = PL1(x)          in token order                y[t] = sum_j gate[t, j] PL2(attend(q))[t, j]
    LoRA        h = PL1(x)          grouped [T k, rank]           y[t] = base(x)[t] + sum_j gate[t, j] PL2(h)[t, j]

Work grows with T k alone, whatever the imbalance of the load. `foveate.ops.scatter_experts` puts this under the experts
of a model that someone already has.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from foveate.engine.budget import Budget
from foveate.engine.route import Route
from foveate.engine.surgery import Handle
from foveate.errors import InputError
from foveate.ops.grouped_linear import grouped_linear

Activation = Callable[[Tensor], Tensor]


class ParallelLinear(nn.Module):
    """E linear layers, each for the rows routed to it.

    Args:
        experts: E.
        dim: channels in, C.
        out: channels out, O.
        bias: add a bias per expert.

    Shape: as `foveate.ops.grouped_linear.grouped_linear`; weight [E, O, C], bias [E, O].
    """

    def __init__(self, experts: int, dim: int, out: int, bias: bool = False) -> None:
        super().__init__()
        if min(experts, dim, out) < 1:
            raise InputError(f"Experts and channels are at least 1, got {experts} experts, {dim} to {out} channels.")
        bound = dim**-0.5  # each expert starts as nn.Linear does
        self.weight = nn.Parameter(torch.empty(experts, out, dim).uniform_(-bound, bound))
        self.bias = nn.Parameter(torch.empty(experts, out).uniform_(-bound, bound)) if bias else None

    def forward(
        self,
        x: Tensor,
        route: Route,
        gate: Tensor | None = None,
        grouped_in: bool = False,
        grouped_out: bool = False,
    ) -> Tensor:
        return grouped_linear(
            x, self.weight, route, self.bias, gate=gate, grouped_in=grouped_in, grouped_out=grouped_out
        )

    def extra_repr(self) -> str:
        experts, out, dim = self.weight.shape
        return f"experts={experts}, dim={dim}, out={out}, bias={self.bias is not None}"


class Choice(NamedTuple):
    """What a router chose: each token's experts, their gates [..., k], and the logits [..., E] chosen by."""

    gate: Tensor
    expert: Tensor
    logits: Tensor

    def balance_loss(self) -> Tensor:
        """E sum_e f_e P_e, with f_e the share of slots and P_e the mean probability of an expert; 1 when even.

        Source: Fedus et al. 2021, arXiv:2101.03961, eq. 4.
        """
        experts = self.logits.shape[-1]
        share = torch.bincount(self.expert.flatten(), minlength=experts).float() / max(1, self.expert.numel())
        return experts * (share * self.logits.float().softmax(-1).flatten(0, -2).mean(0)).sum()


class Router(nn.Module):
    """Choose k of E experts for each token by a linear layer, softmax and top-k.

    Args:
        dim: channels C.
        experts: E.
        k: experts per token.
        normalize: let the k gates of a token sum to 1.

    Shape: x [..., C] -> Choice of [..., k], [..., k], [..., E].
    Raises: InputError when k is not in 1..E.

    >>> gate, expert, logits = Router(8, experts=4, k=2)(torch.rand(5, 8))
    >>> expert.shape, logits.shape, torch.allclose(gate.sum(-1), torch.ones(5))
    (torch.Size([5, 2]), torch.Size([5, 4]), True)
    """

    def __init__(self, dim: int, experts: int, k: int, normalize: bool = True) -> None:
        super().__init__()
        if not 1 <= k <= experts:
            raise InputError(f"A token can have 1 to {experts} of {experts} experts, got k={k}.")
        self.layer, self.k, self.normalize = nn.Linear(dim, experts, bias=False), k, normalize

    def forward(self, x: Tensor) -> Choice:
        return choose(self.layer(x), self.k, self.normalize)


def choose(logits: Tensor, k: int, normalize: bool = True) -> Choice:
    """Take the k most probable experts. Shape: logits [..., E]; softmax runs in float32 at least."""
    wide = torch.promote_types(logits.dtype, torch.float32)
    gate, expert = logits.softmax(-1, dtype=wide).topk(k, dim=-1)
    if normalize:
        gate = gate / gate.sum(-1, keepdim=True)
    return Choice(gate.to(logits.dtype), expert, logits)


class MoEMLP(nn.Module):
    """A mixture of MLPs: two layers per expert, one route for both.

    Args:
        dim: channels C.
        hidden: channels between the layers of an expert, H.
        experts: E.
        activation: between the layers.
        gated: the first layer gives 2 H channels (h, g), and activation(h) * g goes on (GLU).
        bias: add biases.

    Shape: x [..., C], gate [..., k], expert [..., k] -> [..., C].
    Raises: InputError for an expert that does not exist or is named twice for one token.

    >>> router, mlp = Router(8, experts=4, k=2), MoEMLP(8, 16, experts=4)
    >>> x = torch.rand(2, 5, 8)
    >>> gate, expert, _ = router(x)
    >>> mlp(x, gate, expert).shape
    torch.Size([2, 5, 8])
    """

    def __init__(
        self,
        dim: int,
        hidden: int,
        experts: int,
        activation: Activation = F.gelu,
        gated: bool = False,
        bias: bool = False,
    ) -> None:
        super().__init__()
        self.experts = ParallelLinear(experts, dim, 2 * hidden if gated else hidden, bias)
        self.output_experts = ParallelLinear(experts, hidden, dim, bias)
        self.activation, self.gated = activation, gated

    def forward(self, x: Tensor, gate: Tensor, expert: Tensor) -> Tensor:
        rows, gate, route = _routed(x, gate, expert, len(self.experts.weight))
        hidden = self.experts(rows, route, grouped_out=True)
        if self.gated:
            h, g = hidden.chunk(2, -1)
            hidden = self.activation(h) * g
        else:
            hidden = self.activation(hidden)
        return self.output_experts(hidden, route, gate=gate, grouped_in=True).view(x.shape)


class MoEAttention(nn.Module):
    """A mixture of attention heads: every expert has its own queries and output, keys and values are shared.

    A token with k experts attends with k * heads heads. Queries stay in token order all the way, so nothing has to be
    regrouped between the two expert layers.

    Args:
        dim: channels C.
        experts: E.
        heads: heads of each expert, and of the shared keys and values.
        head_dim: channels of a head.
        causal: let a token see itself and those before it only.

    Shape: x [B, N, C], gate [B, N, k], expert [B, N, k] -> [B, N, C].
    Raises: InputError as for `MoEMLP`, and when x is not [B, N, C].
    """

    def __init__(self, dim: int, experts: int, heads: int, head_dim: int, causal: bool = False) -> None:
        super().__init__()
        self.heads, self.causal = heads, causal
        self.query = ParallelLinear(experts, dim, heads * head_dim)
        self.key_value = nn.Linear(dim, 2 * heads * head_dim, bias=False)
        self.output = ParallelLinear(experts, heads * head_dim, dim)

    def forward(self, x: Tensor, gate: Tensor, expert: Tensor) -> Tensor:
        if x.dim() != 3:
            raise InputError(f"Attention needs tokens [B, N, C], got shape {tuple(x.shape)}.")
        (b, n, _), k = x.shape, expert.shape[-1]
        rows, gate, route = _routed(x, gate, expert, len(self.query.weight))
        # The queries of a token's experts stand side by side as if they were tokens: heads of all experts share keys.
        q = self.query(rows, route).view(b, n * k, self.heads, -1).transpose(1, 2)
        key, value = self.key_value(x).view(b, n, 2, self.heads, -1).permute(2, 0, 3, 1, 4)
        mask = None
        if self.causal:
            token = torch.arange(n, device=x.device)
            mask = token.repeat_interleave(k)[:, None] >= token
        heads = F.scaled_dot_product_attention(q, key, value, attn_mask=mask)
        return self.output(heads.transpose(1, 2).flatten(0, 1).flatten(1), route, gate=gate).view(x.shape)


class MoELoRA(nn.Module):
    """A frozen linear layer and a mixture of low-rank changes to it.

    Args:
        base: the layer; its parameters are kept out of training.
        experts: E.
        rank: channels between the two factors of a change.
        alpha: the change is scaled by alpha / rank; default rank.

    Shape: x [..., C], gate [..., k], expert [..., k] -> [..., O]; equal to the base until trained.
    """

    def __init__(self, base: nn.Linear, experts: int, rank: int, alpha: float | None = None) -> None:
        super().__init__()
        self.base = base.requires_grad_(False)
        self.down = ParallelLinear(experts, base.in_features, rank)
        self.up = ParallelLinear(experts, rank, base.out_features)
        nn.init.zeros_(self.up.weight)
        self.scale = 1.0 if alpha is None else alpha / rank

    def forward(self, x: Tensor, gate: Tensor, expert: Tensor) -> Tensor:
        y = self.base(x)
        rows, gate, route = _routed(x, gate, expert, len(self.down.weight))
        change = self.up(self.down(rows, route, grouped_out=True), route, gate=gate, grouped_in=True)
        return y + self.scale * change.view(y.shape)


def _routed(x: Tensor, gate: Tensor, expert: Tensor, experts: int) -> tuple[Tensor, Tensor, Route]:
    """Rows [T, C], gates [T, k] and the route of tokens with any number of axes."""
    if x.dim() < 2 or expert.shape != gate.shape or expert.shape[:-1] != x.shape[:-1]:
        raise InputError(
            f"Tokens [..., C] need a gate and an expert [..., k] each, got x {tuple(x.shape)}, gate "
            f"{tuple(gate.shape)}, expert {tuple(expert.shape)}."
        )
    flat = expert.flatten(0, -2)
    if flat.shape[1] > 1 and bool((flat.sort(-1).values.diff(dim=-1) == 0).any()):
        raise InputError("expert names one expert twice for a token; choose the k of a token without repetition.")
    return x.flatten(0, -2), gate.flatten(0, -2), Route.of(flat, experts)


def plugin(model: nn.Module, budget: Budget | float | str = 1.0) -> Handle:
    """Let the experts of a model that is there run this way; see `foveate.ops.scatter_experts.scatter_experts`."""
    from foveate.ops.scatter_experts import scatter_experts

    return scatter_experts(model, budget)


def conformance_example() -> tuple[nn.Module, tuple[Tensor, Tensor, Tensor]]:
    """A small double-precision mixture and its tokens."""
    mlp = MoEMLP(6, 8, experts=4, gated=True, bias=True).double()
    x = torch.rand(5, 6, dtype=torch.float64, requires_grad=True)
    gate, expert, _ = choose(torch.randn(5, 4, dtype=torch.float64), k=2)
    return mlp, (x, gate.requires_grad_(), expert)
