"""Let the experts of someone else's mixture model run as ScatterMoE: equal output, the same parameters.

Recognised by what they are made of, whatever their class. In transformers these are the expert layers of Mixtral,
OLMoE and their kin, in both forms that the library has given them:

    stacked   a module with gate_up_proj [E, 2 H, C] and down_proj [E, C, H], called with tokens [T, C], index, gate
    listed    a block of a router `gate` (nn.Linear) and `experts`, a list of gated MLPs made of three nn.Linear

Both compute  y[t] = sum_j gate[t, j] down_e(act(gate_e(x[t])) * up_e(x[t])),  e = index[t, j]  (arXiv:2403.08245).

As a plugin, `foveate.apply(model, "scattermoe")`, it knows the budget as the share of all experts that one token may
use. Mixtures use a quarter or less of theirs, so only a budget below that takes experts away: a token keeps those of
the largest gates, which take over the sum of all.
"""

import inspect
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from foveate.engine.budget import Budget
from foveate.engine.route import Route
from foveate.engine.surgery import Handle, find, join, patch_forward
from foveate.errors import InputError, MissingExtraError
from foveate.ops.grouped_linear import grouped_linear
from foveate.ops.scattermoe import choose

_NAMES = (("w1", "w3", "w2"), ("gate_proj", "up_proj", "down_proj"))
"""What the layers gate, up and down of a listed expert are called."""


def scatter_experts(model: nn.Module, budget: Budget | float | str = 1.0) -> Handle:
    """Run the expert layers of a model by grouped expert linear layers.

    Parameters, state dict and routing stay as they are; outputs are equal to rounding, and gradients flow.

    Args:
        model: a transformers mixture model, or any other whose expert layers have one of the two forms.
        budget: share of a layer's experts that a token may use; at least one is used, and never more than the model's
            own number, with which outputs are equal.

    Returns: a handle; `handle.remove()` gives the model back.
    Raises: InputError when the model holds no expert layer that is recognised; BudgetError for a budget that is no
        share.
    """
    share, handles = Budget.parse(budget).share_of(), []
    for module in [model, *find(model, lambda _, __: True).values()]:
        if _is_stacked(module):
            handles.append(patch_forward(module, partial(_stacked, module, share)))
        elif _is_listed(module):
            handles.append(patch_forward(module, partial(_listed, module, share)))
    if not handles:
        raise InputError(
            f"{type(model).__name__} has no expert layer that is known here: neither stacked experts (gate_up_proj, "
            "down_proj) nor a router `gate` with a list of gated MLPs without biases. Build the layer with MoEMLP."
        )
    return join(handles)


def _afforded(gate: Tensor, index: Tensor, experts: int, share: float) -> tuple[Tensor, Tensor]:
    """What a token may use of its experts, those of the largest gates, with the sum of its gates. Shape: [T, k]."""
    k = max(1, int(share * experts))
    if gate.shape[1] <= k:
        return gate, index
    kept, place = gate.topk(k, dim=1)
    return kept * (gate.sum(1, keepdim=True) / kept.sum(1, keepdim=True)), index.gather(1, place)


def _is_stacked(module: nn.Module) -> bool:
    both, down = (getattr(module, name, None) for name in ("gate_up_proj", "down_proj"))
    if not (isinstance(both, Tensor) and isinstance(down, Tensor) and both.dim() == down.dim() == 3):
        return False
    experts, channels, hidden = down.shape
    usual = {"has_gate": True, "is_concatenated": True, "has_bias": False, "has_post_expert_norm": False}
    return (
        both.shape == (experts, 2 * hidden, channels)
        and (hasattr(module, "act_fn") or hasattr(module, "_apply_gate"))
        and {"gate_up_proj", "down_proj"} == {name for name, _ in module.named_parameters(recurse=False)}
        and all(getattr(module, name, value) == value for name, value in usual.items())
        and len(inspect.signature(module.forward).parameters) == 3
    )


def _stacked(
    module: Any,
    share: float,
    _: Callable[..., Any],
    hidden_states: Tensor,
    top_k_index: Tensor,
    top_k_weights: Tensor,
) -> Tensor:
    weights, index = _afforded(top_k_weights, top_k_index, len(module.down_proj), share)
    route = Route.of(index, len(module.down_proj))
    hidden = grouped_linear(hidden_states, module.gate_up_proj, route, grouped_out=True)
    if hasattr(module, "_apply_gate"):
        hidden = module._apply_gate(hidden)
    else:
        gate, up = hidden.chunk(2, -1)
        hidden = module.act_fn(gate) * up
    return grouped_linear(hidden, module.down_proj, route, gate=weights.to(hidden_states.dtype), grouped_in=True)


def _is_listed(module: nn.Module) -> bool:
    children = dict(module.named_children())
    if set(children) != {"gate", "experts"} or type(children["gate"]) is not nn.Linear:
        return False
    # A subclass of ModuleList may have a forward of its own, and a layer that is not exactly nn.Linear computes more.
    experts = children["experts"]
    return (
        type(experts) is nn.ModuleList
        and len(experts) > 0
        and isinstance(getattr(module, "top_k", None), int)
        and all(_names(expert) == _names(experts[0]) is not None for expert in experts)
    )


def _names(expert: nn.Module) -> tuple[str, str, str] | None:
    layers = {name: child for name, child in expert.named_children() if isinstance(child, nn.Linear)}
    plain = all(type(layer) is nn.Linear and layer.bias is None for layer in layers.values())
    found = [names for names in _NAMES if set(names) == set(layers)]
    return found[0] if found and plain and hasattr(expert, "act_fn") else None


def _listed(module: Any, share: float, _: Callable[..., Any], hidden_states: Tensor) -> tuple[Tensor, Tensor]:
    names = _names(module.experts[0])
    assert names is not None
    noise = getattr(module, "jitter_noise", 0)
    if module.training and noise:
        hidden_states = hidden_states * torch.empty_like(hidden_states).uniform_(1 - noise, 1 + noise)
    rows = hidden_states.reshape(-1, hidden_states.shape[-1])
    # Mixtral's block always lets the gates of a token sum to 1; the others have a switch.
    normalize = bool(getattr(module, "norm_topk_prob", names == _NAMES[0]))
    choice = choose(module.gate(rows), module.top_k, normalize)
    weights, index = _afforded(choice.gate, choice.expert, len(module.experts), share)
    route = Route.of(index, len(module.experts))

    def layer(x: Tensor, name: str, **how: Any) -> Tensor:
        return grouped_linear(x, [getattr(expert, name).weight for expert in module.experts], route, **how)

    gate, up = (layer(rows, name, grouped_out=True) for name in names[:2])
    hidden = module.experts[0].act_fn(gate) * up
    y = layer(hidden, names[2], gate=weights, grouped_in=True)
    return y.view(hidden_states.shape), choice.logits


def conformance_example() -> tuple[nn.Module, tuple[Tensor]]:
    """A small Mixtral of transformers, three of four experts per token, and its tokens."""
    try:
        from transformers import MixtralConfig, MixtralForCausalLM
    except ImportError as error:
        raise MissingExtraError("Mixtral needs transformers. Install it: pip install 'foveate[hosts]'") from error
    config = MixtralConfig(
        vocab_size=50,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        num_local_experts=4,
        num_experts_per_tok=3,
        use_cache=False,
        initializer_range=0.2,
    )
    return MixtralForCausalLM(config).eval(), (torch.randint(50, (2, 9)),)
