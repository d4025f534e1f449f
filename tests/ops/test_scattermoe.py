"""ScatterMoE's layers: equal to running every expert on every token and letting the gates choose."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from foveate.errors import InputError
from foveate.meter import count_flops, count_parameters
from foveate.ops.scattermoe import MoEAttention, MoELoRA, MoEMLP, ParallelLinear, Router, choose


def weights_of_all(gate, expert, experts):
    """Gates of all experts, zero where not chosen: [..., E]."""
    return torch.zeros(*gate.shape[:-1], experts, dtype=gate.dtype).scatter(-1, expert, gate)


def every_expert(mlp, x, gate, expert):
    """All experts on all tokens, one by one."""
    experts = len(mlp.experts.weight)
    weight = weights_of_all(gate, expert, experts)
    y = torch.zeros_like(x)
    for e in range(experts):
        bias = [None if layer.bias is None else layer.bias[e] for layer in (mlp.experts, mlp.output_experts)]
        h = F.linear(x, mlp.experts.weight[e], bias[0])
        h = mlp.activation(h[..., : h.shape[-1] // 2]) * h[..., h.shape[-1] // 2 :] if mlp.gated else mlp.activation(h)
        y = y + weight[..., e, None] * F.linear(h, mlp.output_experts.weight[e], bias[1])
    return y


def chosen(*shape, experts, k, seed=0, normalize=True):
    generator = torch.Generator().manual_seed(seed)
    return choose(torch.randn(*shape, experts, generator=generator, dtype=torch.float64), k, normalize)


@settings(deadline=None, max_examples=40)
@given(
    t=st.integers(1, 40),
    e=st.integers(1, 6),
    k=st.integers(1, 6),
    gated=st.booleans(),
    bias=st.booleans(),
    seed=st.integers(0, 999),
)
def test_mlp_equals_every_expert_on_every_token_and_so_do_its_gradients(t, e, k, gated, bias, seed):
    torch.manual_seed(seed)
    mlp = MoEMLP(4, 6, e, gated=gated, bias=bias).double()
    x = torch.randn(t, 4, dtype=torch.float64, requires_grad=True)
    gate, expert, _ = chosen(t, experts=e, k=min(k, e), seed=seed)
    inputs = [x, gate.requires_grad_(), *mlp.parameters()]
    y, expected = mlp(x, gate, expert), every_expert(mlp, x, gate, expert)
    torch.testing.assert_close(y, expected)
    upstream = torch.randn_like(y)
    torch.testing.assert_close(
        torch.autograd.grad(y, inputs, upstream), torch.autograd.grad(expected, inputs, upstream)
    )


def test_gradients_of_a_mixture_are_those_of_finite_differences():
    torch.manual_seed(0)
    mlp = MoEMLP(6, 8, experts=4, gated=True, bias=True).double()
    x, (gate, expert, _) = torch.rand(5, 6, dtype=torch.float64, requires_grad=True), chosen(5, experts=4, k=2)
    assert torch.autograd.gradcheck(lambda x, gate: mlp(x, gate, expert), (x, gate.requires_grad_()))


def test_published_sizes_have_the_published_parameters():
    # Mixtral 8x7B: 45.1 G of its 46.7 G parameters are 32 layers of experts; OLMoE 1B-7B: 6.44 G in 16 layers.
    with torch.device("meta"):
        mixtral, olmoe = (
            MoEMLP(*sizes, activation=F.silu, gated=True) for sizes in ((4096, 14336, 8), (2048, 1024, 64))
        )
    assert 32 * count_parameters(mixtral) == 45_097_156_608
    assert 16 * count_parameters(olmoe) == 6_442_450_944
    # Outside its experts, Mixtral has 2 x 32000 x 4096 of embedding and, per layer, attention, router and two norms.
    other = 2 * 32000 * 4096 + 4096 + 32 * (2 * 4096 * 4096 + 2 * 4096 * 1024 + 8 * 4096 + 2 * 4096)
    assert 32 * count_parameters(mixtral) + other == 46_702_792_704


def test_work_is_that_of_the_chosen_experts_whatever_the_load():
    mlp, x, gate = MoEMLP(8, 16, experts=8), torch.rand(64, 8), torch.rand(64, 2)
    even = torch.stack([torch.arange(64) % 8, (torch.arange(64) + 1) % 8], 1)
    one_sided = torch.tensor([3, 5]).expand(64, 2)
    work = 2 * (64 * 2) * 2 * 8 * 16
    with torch.no_grad():
        assert count_flops(mlp, x, gate, even) == count_flops(mlp, x, gate, one_sided) == work


def test_tokens_may_have_any_axes():
    mlp, x = MoEMLP(4, 8, experts=3), torch.rand(2, 3, 5, 4)
    gate, expert, _ = Router(4, 3, 2)(x)
    flat = mlp(x.flatten(0, 2), gate.flatten(0, 2), expert.flatten(0, 2))
    assert torch.equal(mlp(x, gate, expert), flat.view(x.shape))
    assert mlp(x[:0], gate[:0], expert[:0]).shape == (0, 3, 5, 4)


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("k", [1, 2, 3])
def test_attention_equals_attention_of_each_expert_with_shared_keys(causal, k):
    torch.manual_seed(0)
    attention = MoEAttention(6, experts=3, heads=2, head_dim=4, causal=causal).double()
    x = torch.randn(2, 7, 6, dtype=torch.float64, requires_grad=True)
    gate, expert, _ = chosen(2, 7, experts=3, k=k)
    key, value = attention.key_value(x).view(2, 7, 2, 2, 4).unbind(2)
    weight, expected = weights_of_all(gate, expert, 3), torch.zeros_like(x)
    for e in range(3):
        q = (x @ attention.query.weight[e].T).view(2, 7, 2, 4)
        heads = F.scaled_dot_product_attention(*(v.transpose(1, 2) for v in (q, key, value)), is_causal=causal)
        expected = expected + weight[..., e, None] * (heads.transpose(1, 2).flatten(2) @ attention.output.weight[e].T)
    y = attention(x, gate, expert)
    torch.testing.assert_close(y, expected)
    inputs, upstream = [x, *attention.parameters()], torch.randn_like(y)
    torch.testing.assert_close(
        torch.autograd.grad(y, inputs, upstream), torch.autograd.grad(expected, inputs, upstream)
    )


def test_lora_is_the_base_until_trained_and_then_the_sum_of_its_changes():
    torch.manual_seed(0)
    base = nn.Linear(6, 5).double()
    lora, x = MoELoRA(base, experts=4, rank=2, alpha=6).double(), torch.randn(9, 6, dtype=torch.float64)
    gate, expert, _ = chosen(9, experts=4, k=2)
    assert torch.equal(lora(x, gate, expert), base(x))
    assert {n for n, p in lora.named_parameters() if p.requires_grad} == {"down.weight", "up.weight"}
    nn.init.normal_(lora.up.weight)
    change = torch.einsum("te,eor,erc->toc", weights_of_all(gate, expert, 4), lora.up.weight, lora.down.weight)
    expected = base(x) + 6 / 2 * torch.einsum("toc,tc->to", change, x)
    torch.testing.assert_close(lora(x, gate, expert), expected)
    lora(x, gate, expert).sum().backward()
    assert base.weight.grad is None
    assert lora.up.weight.grad.abs().sum() > 0


def test_router_takes_the_most_probable_experts():
    logits = torch.tensor([[0.0, 2.0, 1.0, -1.0]])
    gate, expert, _ = choose(logits, 2, normalize=False)
    assert expert.tolist() == [[1, 2]]
    torch.testing.assert_close(gate, logits.softmax(-1)[:, 1:3])
    torch.testing.assert_close(choose(logits, 2).gate, torch.tensor([[2.0, 1.0]]).softmax(-1))
    assert choose(logits.bfloat16(), 2).gate.dtype == torch.bfloat16


def test_balance_loss_is_one_when_even_and_grows_to_the_number_of_experts():
    even = torch.eye(4).repeat(5, 1) * 1e-6
    torch.testing.assert_close(choose(even, 1).balance_loss(), torch.tensor(1.0))
    one_sided = torch.tensor([[100.0, 0, 0, 0]]).repeat(9, 1).requires_grad_()
    torch.testing.assert_close(choose(one_sided, 1).balance_loss(), torch.tensor(4.0))
    skewed = torch.tensor([[1.0, 0, 0, 0]]).repeat(9, 1).requires_grad_()
    choose(skewed, 1).balance_loss().backward()
    assert (skewed.grad[:, 0] > 0).all()  # going down the loss lowers the crowded expert
    assert (skewed.grad[:, 1:] < 0).all()


def test_training_reaches_every_parameter():
    torch.manual_seed(0)
    router, mlp, x = Router(6, 4, 2), MoEMLP(6, 8, 4, gated=True, bias=True), torch.randn(50, 6)
    choice = router(x)
    (mlp(x, choice.gate, choice.expert).square().mean() + 0.01 * choice.balance_loss()).backward()
    assert all(p.grad.isfinite().all() and p.grad.abs().sum() > 0 for m in (router, mlp) for p in m.parameters())


def test_bfloat16_is_close_to_float32():
    torch.manual_seed(0)
    mlp, x = MoEMLP(32, 64, experts=4), torch.randn(40, 32)
    gate, expert, _ = Router(32, 4, 2)(x)
    exact, low = mlp(x, gate, expert), mlp.bfloat16()(x.bfloat16(), gate.bfloat16(), expert)
    assert low.dtype == torch.bfloat16
    assert (low.float() - exact).abs().max() <= 2e-2 * exact.abs().max()


def test_errors_say_what_was_passed():
    mlp, x = MoEMLP(4, 8, experts=3), torch.rand(5, 4)
    with pytest.raises(InputError, match="names one expert twice"):
        mlp(x, torch.rand(5, 2), torch.ones(5, 2, dtype=torch.int64))
    with pytest.raises(InputError, match=r"x \(5, 4\), gate \(5, 2\), expert \(5, 1\)"):
        mlp(x, torch.rand(5, 2), torch.ones(5, 1, dtype=torch.int64))
    with pytest.raises(InputError, match="experts 0 to 2, but the route names 3 to 3"):
        mlp(x, torch.rand(5, 1), torch.full((5, 1), 3))
    with pytest.raises(InputError, match=r"weight is \[3, O, 5\]"):
        mlp(torch.rand(5, 5), torch.rand(5, 1), torch.ones(5, 1, dtype=torch.int64))
    with pytest.raises(InputError, match="1 to 3 of 3 experts, got k=4"):
        Router(4, experts=3, k=4)
    with pytest.raises(InputError, match="0 experts"):
        ParallelLinear(0, 4, 4)
    with pytest.raises(InputError, match=r"\[B, N, C\], got shape \(5, 4\)"):
        MoEAttention(4, 3, 1, 4)(x, torch.rand(5, 1), torch.ones(5, 1, dtype=torch.int64))
