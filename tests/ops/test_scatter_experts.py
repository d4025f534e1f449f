"""Other people's mixture layers with their experts replaced: equal output, and given back unchanged."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import foveate
from foveate.errors import BudgetError, InputError
from foveate.meter import count_flops
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


@pytest.mark.parametrize("host", HOSTS)
def test_a_small_budget_keeps_the_experts_of_the_largest_gates_and_the_sum_of_gates(host):
    torch.manual_seed(0)
    model, x = HOSTS[host]().double(), torch.randn(2, 5, 6, dtype=torch.float64)
    rows = x.view(-1, 6)
    gates, index = model.gate(rows).softmax(-1).topk(2)
    if host in ("mixtral", "qwen3"):
        gates = gates / gates.sum(1, keepdim=True)
    expected = torch.zeros_like(rows)
    for t, (e, total) in enumerate(zip(index[:, 0].tolist(), gates.sum(1), strict=True)):
        if host == "stacked":
            gate, up = (model.experts.gate_up_proj[e] @ rows[t]).chunk(2)
            expected[t] = total * (model.experts.down_proj[e] @ (F.silu(gate) * up))
        else:
            expected[t] = total * model.experts[e](rows[t])
    exact = outputs(model, x)[0]
    for budget in (0.25, 0.1, "49%"):  # of 4 experts, one
        with scatter_experts(model, budget=budget):
            torch.testing.assert_close(outputs(model, x)[0].view(-1, 6), expected)
    for budget in (0.5, 0.99, 1.0):
        with scatter_experts(model, budget=budget):
            torch.testing.assert_close(outputs(model, x)[0], exact)
    with pytest.raises(BudgetError):
        scatter_experts(model, budget="64 tokens")


def of_transformers(family, **changed):
    transformers = pytest.importorskip("transformers")
    sizes = {"num_experts_per_tok": 2, "num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 1}
    sizes["num_local_experts" if family == "Mixtral" else "num_experts"] = 4
    config = getattr(transformers, f"{family}Config")(
        vocab_size=50, hidden_size=16, intermediate_size=24, **{**sizes, **changed}
    )
    torch.manual_seed(0)
    model, ids = getattr(transformers, f"{family}ForCausalLM")(config).eval(), torch.randint(50, (2, 9))
    for p in model.parameters():
        nn.init.normal_(p, std=0.2)
    return model, ids


@pytest.mark.parametrize("family", ["Mixtral", "Olmoe"])
def test_models_of_transformers_are_equal_and_come_back_bit_for_bit(family):
    model, ids = of_transformers(family)
    before = model(ids, labels=ids)
    before.loss.backward()
    wanted = [p.grad.clone() for p in model.parameters()]
    model.zero_grad()
    state, modules = {key: value.clone() for key, value in model.state_dict().items()}, list(model.modules())
    handle = foveate.apply(model, "scattermoe")
    assert sum("forward" in vars(module) for module in modules) == 2  # of the experts of each layer
    during = model(ids, labels=ids)
    during.loss.backward()
    torch.testing.assert_close(during.logits, before.logits, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close([p.grad for p in model.parameters()], wanted, atol=1e-4, rtol=1e-3)
    handle.remove()
    assert not any("forward" in vars(module) for module in modules)
    assert list(model.modules()) == modules
    assert list(model.state_dict()) == list(state)
    assert all(torch.equal(model.state_dict()[key], value) for key, value in state.items())
    with torch.no_grad():
        assert torch.equal(model(ids).logits, before.logits)


def test_mixtral_with_a_smaller_budget_is_mixtral_with_fewer_experts_per_token():
    (model, ids), (fewer, _) = of_transformers("Mixtral", num_experts_per_tok=3), of_transformers("Mixtral")
    fewer.load_state_dict(model.state_dict())
    with torch.no_grad(), scatter_experts(model, budget=0.5):
        torch.testing.assert_close(model(ids).logits, fewer(ids).logits, atol=1e-4, rtol=1e-4)
        few = count_flops(model, ids)
    with torch.no_grad(), scatter_experts(model):
        assert few < count_flops(model, ids)
