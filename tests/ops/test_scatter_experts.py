"""Other people's mixture layers with their experts replaced: equal output, and given back unchanged."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from foveate.errors import InputError
from foveate.ops.scatter_experts import scatter_experts


class Stacked(nn.Module):
    """Experts as transformers 5 holds them."""

    def __init__(self, experts=4, dim=6, hidden=8):
        super().__init__()
        self.gate_up_proj = nn.Parameter(torch.randn(experts, 2 * hidden, dim))
        self.down_proj = nn.Parameter(torch.randn(experts, dim, hidden))
        self.act_fn = nn.SiLU()

    def forward(self, hidden_states, top_k_index, top_k_weights):
        y = torch.zeros_like(hidden_states)
        for e in range(len(self.down_proj)):
            token, place = torch.where(top_k_index == e)
            gate, up = F.linear(hidden_states[token], self.gate_up_proj[e]).chunk(2, -1)
            out = F.linear(self.act_fn(gate) * up, self.down_proj[e]) * top_k_weights[token, place, None]
            y = y.index_add(0, token, out)
        return y


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.gate, self.experts = nn.Linear(6, 4, bias=False), Stacked()

    def forward(self, x):
        rows = x.view(-1, 6)
        weights, index = self.gate(rows).softmax(-1).topk(2)
        return self.experts(rows, index, weights).view(x.shape)


class Gated(nn.Module):
    def __init__(self, names, dim=6, hidden=8):
        super().__init__()
        self.names = names
        for name, sizes in zip(names, ((dim, hidden), (dim, hidden), (hidden, dim)), strict=True):
            self.add_module(name, nn.Linear(*sizes, bias=False))
        self.act_fn = nn.SiLU()

    def forward(self, x):
        gate, up, down = (self.get_submodule(name) for name in self.names)
        return down(self.act_fn(gate(x)) * up(x))


class Listed(nn.Module):
    """A block as transformers 4 has it: Mixtral's names, or OLMoE's with its switch."""

    def __init__(self, names, normalize=None):
        super().__init__()
        self.gate = nn.Linear(6, 4, bias=False)
        self.experts = nn.ModuleList([Gated(names) for _ in range(4)])
        self.top_k = 2
        if normalize is not None:
            self.norm_topk_prob = normalize

    def forward(self, x):
        rows = x.view(-1, 6)
        logits = self.gate(rows)
        weights, index = logits.softmax(-1).topk(2)
        if getattr(self, "norm_topk_prob", True):
            weights = weights / weights.sum(-1, keepdim=True)
        y = torch.zeros_like(rows)
        for e, expert in enumerate(self.experts):
            token, place = torch.where(index == e)
            y = y.index_add(0, token, expert(rows[token]) * weights[token, place, None])
        return y.view(x.shape), logits


MIXTRAL, OLMOE = ("w1", "w3", "w2"), ("gate_proj", "up_proj", "down_proj")
HOSTS = {
    "stacked": Block,
    "mixtral": lambda: Listed(MIXTRAL),
    "olmoe": lambda: Listed(OLMOE, False),
    "qwen3": lambda: Listed(OLMOE, True),
}


def outputs(model, x):
    y = model(x)
    return list(y) if isinstance(y, tuple) else [y]


@pytest.mark.parametrize("host", HOSTS)
def test_output_and_gradients_are_equal_and_removing_gives_the_host_back(host):
    torch.manual_seed(0)
    model, x = nn.Sequential(HOSTS[host]()).double(), torch.randn(3, 5, 6, dtype=torch.float64, requires_grad=True)
    keys, inputs = list(model.state_dict()), [x, *model.parameters()]
    before = outputs(model, x)
    wanted = torch.autograd.grad(before[0].square().sum(), inputs)
    with scatter_experts(model):
        during = outputs(model, x)
        torch.testing.assert_close(during, before)
        torch.testing.assert_close(torch.autograd.grad(during[0].square().sum(), inputs), wanted)
        assert list(model.state_dict()) == keys
    assert all(torch.equal(a, b) for a, b in zip(outputs(model, x), before, strict=True))


@pytest.mark.parametrize("host", HOSTS)
def test_grouped_linear_does_the_work_and_a_copy_uses_its_own_weights(host, monkeypatch):
    model, x, calls = nn.Sequential(HOSTS[host]()), torch.randn(2, 5, 6), []
    original = scatter_experts.__globals__["grouped_linear"]
    monkeypatch.setitem(
        scatter_experts.__globals__, "grouped_linear", lambda *a, **k: (calls.append(1), original(*a, **k))[1]
    )
    scatter_experts(model)
    expected = outputs(model, x)[0]
    assert len(calls) == (2 if host == "stacked" else 3)
    other = copy.deepcopy(model)
    with torch.no_grad():
        for p in model.parameters():
            p.zero_()
    assert torch.equal(outputs(other, x)[0], expected)
    assert outputs(model, x)[0].abs().max() == 0


def test_jitter_of_training_is_kept():
    model, x = Listed(MIXTRAL), torch.randn(2, 5, 6)
    model.jitter_noise = 0.5
    expected = model(x)[0]
    with scatter_experts(model):
        torch.testing.assert_close(model.eval()(x)[0], expected)
        assert not torch.allclose(model.train()(x)[0], expected)


def biased():
    block = Listed(OLMOE)
    block.experts[2].up_proj = nn.Linear(6, 8)
    return block


def wrapped():
    class Adapter(nn.Linear):
        pass

    block = Listed(OLMOE)
    block.experts[1].up_proj = Adapter(6, 8, bias=False)
    return block


def with_shared_expert():
    block = Listed(OLMOE)
    block.shared_expert = Gated(OLMOE)
    return block


def transposed():
    block = Stacked()
    block.is_concatenated = False
    return block


@pytest.mark.parametrize("build", [biased, wrapped, with_shared_expert, transposed, lambda: nn.Linear(2, 2)])
def test_layers_that_compute_something_else_are_left_alone(build):
    model = nn.Sequential(build())
    with pytest.raises(InputError, match="Sequential has no expert layer"):
        scatter_experts(model)
    assert all("forward" not in module.__dict__ for module in model.modules())


@pytest.mark.parametrize("family", ["Mixtral", "Olmoe"])
def test_layers_of_transformers(family):
    transformers = pytest.importorskip("transformers")
    sizes = {"num_experts_per_tok": 2, "num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 1}
    experts = "num_local_experts" if family == "Mixtral" else "num_experts"
    config = getattr(transformers, f"{family}Config")(
        vocab_size=50, hidden_size=16, intermediate_size=24, **{experts: 4}, **sizes
    )
    torch.manual_seed(0)
    model, ids = getattr(transformers, f"{family}ForCausalLM")(config).eval(), torch.randint(50, (2, 9))
    for p in model.parameters():
        nn.init.normal_(p, std=0.2)
    before = model(ids, labels=ids)
    before.loss.backward()
    wanted = [p.grad.clone() for p in model.parameters()]
    model.zero_grad()
    with scatter_experts(model):
        during = model(ids, labels=ids)
        during.loss.backward()
    torch.testing.assert_close(during.logits, before.logits, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close([p.grad for p in model.parameters()], wanted, atol=1e-4, rtol=1e-3)
    with torch.no_grad():
        assert torch.equal(model(ids).logits, model(ids).logits)
