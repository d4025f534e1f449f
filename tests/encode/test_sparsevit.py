"""SparseViT: which windows are computed, what that costs, and that everything comes back."""

import copy
import random

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from foveate.encode.sparsevit import SparseViT, _Seen, activity
from foveate.encode.sparsevit_ratios import DEEPEST, LEVELS, kept
from foveate.engine.budget import Budget
from foveate.errors import BudgetError, InputError
from foveate.hosts import swin
from foveate.meter import count_flops
from small_hosts import filled, output, swins

pytest.importorskip("transformers")
HOSTS = swins(side=64)


@pytest.fixture(params=["SwinModel", "SwinForImageClassification", "Swinv2Model"])
def host(request):
    return filled(HOSTS[request.param]())


def pixels(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


# ------------------------------------------------------------------------------------------------- one block


@pytest.mark.parametrize("grid", [(16, 16), (13, 18)])
@pytest.mark.parametrize("shifted", [0, 1])
def test_kept_windows_are_the_dense_blocks_and_the_others_are_untouched(host, grid, shifted):
    block = swin(host).stages[0].blocks[shifted]
    x, side = pixels(2, *grid, 8), block.size(grid)[0]
    n = -(-grid[0] // side) * -(-grid[1] // side)
    chooser = SparseViT(host, ratios=((0.5, 0.5), (0, 0))).chooser
    chooser._record, chooser._seen[0] = [], _Seen()
    with torch.no_grad():
        windows = [block.run(w, block.mask(grid, x), block.inside(grid, x)) for w in block.cut(x)]
        dense = block.paste(torch.stack(windows), grid)
        y = chooser.run(0, shifted, lambda z: z, x)
    ((_, _, chosen),) = chooser._record
    cells = torch.zeros(2, n).scatter(1, chosen, 1.0)[:, :, None, None].expand(-1, -1, side**2, 1)
    computed = block.paste(cells, grid)[..., 0] > 0
    assert chosen.shape == (2, kept(n, 0.5))
    assert torch.equal(y[~computed], x[~computed])
    torch.testing.assert_close(y[computed], dense[computed], atol=2e-5, rtol=1e-5)
    assert not torch.equal(y, x)


def test_the_most_active_windows_are_kept():
    model = filled(HOSTS["SwinModel"]())
    chooser = SparseViT(model, ratios=((0.5, 0.5), (0, 0))).chooser
    x = pixels(1, 16, 16, 8) * 0.01
    x[:, :4, 4:8] += 3  # window 1
    x[:, 8:12, 12:] -= 9  # window 11; signs do not count
    order = chooser._order(_Seen(), swin(model).blocks[0], x)
    assert order[0, :2].tolist() == [11, 1]
    louder = chooser._order(_Seen(), swin(model).blocks[0], -7 * x)
    assert torch.equal(order, louder)
    assert activity(x.bfloat16()).dtype == torch.float32


def test_blocks_of_a_kind_compute_nested_sets():
    model = filled(swins(64, (6, 2))["SwinModel"]())
    handle = SparseViT(model, ratios=((0.2, 0.2, 0.5, 0.5, 0.4, 0.8), (0, 0)))
    handle.chooser._record = record = []
    output(model, pixels(2, 3, 64, 64))
    for parity in (0, 1):
        own = [set(chosen[0].tolist()) for _, _, chosen in record[:6][parity::2]]
        assert all(a <= b or b <= a for a in own for b in own)
    assert [len(chosen[0]) for _, _, chosen in record[:6]] == [12, 12, 8, 8, 9, 3]
    assert record[6][2] is None


# ------------------------------------------------------------------------------------------------- the host


def test_ratio_0_is_the_host_bit_for_bit_and_removal_gives_it_back(host):
    x, before = pixels(2, 3, 64, 64), list(host.state_dict())
    dense = output(host, x)
    handle = SparseViT(host, 1.0)
    assert torch.equal(output(host, x), dense)
    handle.ratios = ((0.5, 0.5), (0.5, 0.5))
    assert not torch.equal(output(host, x), dense)
    handle.remove()
    assert torch.equal(output(host, x), dense)
    assert list(host.state_dict()) == before


@pytest.mark.parametrize("budget", [0.5, 0.6, 0.8])
@pytest.mark.parametrize("size", [(64, 64), (76, 52)])
def test_flops_are_what_is_predicted_and_within_the_budget(host, budget, size):
    x = pixels(1, 3, *size)
    full = count_flops(output, host, x)
    with SparseViT(host, budget, size=size) as handle:
        spent = count_flops(output, host, x)
        assert spent == pytest.approx(handle.chooser.flops(handle.ratios), rel=0.01)
    assert handle.chooser.flops(handle.chooser.dense) == pytest.approx(full, rel=0.01)
    assert 0.4 * budget * full < spent <= budget * full * 1.01


def test_the_rule_gives_the_authors_configuration_at_its_own_cost():
    chooser = SparseViT(swins(128, (2, 2, 6, 2))["SwinModel"](), 1.0, size=(512, 512)).chooser
    pattern = chooser.pattern()
    assert pattern == ((0.6, 0.6), (0, 0), (*[DEEPEST[0]] * 2, *[DEEPEST[1]] * 2, *[DEEPEST[2]] * 2), (0, 0))
    found = chooser.within(Budget(chooser.flops(pattern) / chooser.flops(chooser.dense) + 1e-6))
    for own, other in zip(found, pattern, strict=True):
        assert own == pytest.approx(other, abs=0.02)


def test_a_batch_is_its_pictures(host):
    x = pixels(3, 3, 64, 64)
    SparseViT(host, 0.5)
    torch.testing.assert_close(output(host, x), torch.cat([output(host, p[None]) for p in x]), atol=1e-4, rtol=1e-4)


def test_a_copy_works_by_itself(host):
    x = pixels(1, 3, 64, 64)
    handle = SparseViT(host, 0.5)
    other, expected = copy.deepcopy(host), output(host, x)
    handle.ratios = handle.chooser.dense
    assert torch.equal(output(other, x), expected)
    assert not torch.equal(output(host, x), expected)


def test_gradients_flow_through_kept_windows():
    model = filled(HOSTS["SwinModel"]()).train()
    SparseViT(model, 0.5)
    model(pixels(2, 3, 64, 64))[0].square().mean().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.encoder.parameters())


def test_bfloat16():
    model = filled(HOSTS["SwinModel"]())
    SparseViT(model, 0.5)
    exact, rough = output(model, pixels(1, 3, 64, 64)), output(model.bfloat16(), pixels(1, 3, 64, 64).bfloat16())
    assert rough.dtype == torch.bfloat16
    assert rough.isfinite().all()
    assert exact.shape == rough.shape


def test_look_counts_and_draws_what_is_computed(host):
    handle = SparseViT(host, ratios=((0.5, 0.5), (0, 0.5)))
    look = handle.look(pixels(2, 3, 64, 64))
    assert look.tokens == (8 + 8 + 4 + 2,) * 2
    assert look.full == 40
    assert look.effort.shape == (2, 16, 16)
    assert 0 <= look.effort.min() < look.effort.max() <= 1
    each = torch.tensor([float(c.each * c.windows) for stage in handle.chooser.costs() for c in stage])
    share = (each * torch.tensor([0.5, 0.5, 1, 0.5])).sum() / each.sum()
    assert look.effort.mean() == pytest.approx(float(share), rel=1e-5)
    assert look.boxes[0].shape == (8, 4)
    report = handle.report(pixels(1, 3, 64, 64))
    assert report.unit == "windows"
    assert report.flop_reduction > 1


# ------------------------------------------------------------------------------------------------- adapt, search


def test_adaptation_draws_ascending_tenths_in_training_only():
    model = filled(swins(64, (6, 2))["SwinModel"]())
    handle, drawn = SparseViT(model, 1.0), set()
    with handle.adaptation(seed=3):
        output(model, pixels(1, 3, 64, 64))
        assert handle.ratios == handle.chooser.dense
        model.train()
        for _ in range(6):
            output(model, pixels(1, 3, 64, 64))
            first = handle.ratios[0]
            assert first[::2] == first[1::2]
            assert list(first) == sorted(first)
            drawn.add(handle.ratios)
    assert len(drawn) > 3
    assert {round(10 * r) for ratios in drawn for stage in ratios for r in stage} <= set(range(LEVELS))
    assert handle.ratios == handle.chooser.dense
    handle.remove()


def test_search_finds_the_best_affordable_ratios():
    model = filled(HOSTS["SwinModel"]())
    handle = SparseViT(model, 1.0)
    tried = []

    def worth():
        tried.append(handle.ratios)
        return -abs(handle.ratios[0][0] - 0.4) - abs(handle.ratios[1][0] - 0.2)

    found = handle.search(worth, 0.75, population=20, generations=6, seed=1)
    assert found.ratios == handle.ratios == ((0.4, 0.4), (0.2, 0.2))
    assert found.worth == 0
    assert found.share <= 0.75
    full = handle.chooser.flops(handle.chooser.dense)
    assert all(handle.chooser.flops(ratios) <= 0.75 * full for ratios in tried)
    assert len(tried) == len(set(tried))


def test_a_latency_budget_is_measured(monkeypatch):
    model = filled(HOSTS["SwinModel"]())
    handle = SparseViT(model, 1.0)
    chooser = handle.chooser
    full = chooser.flops(chooser.dense)
    monkeypatch.setattr(type(chooser), "seconds", lambda self, ratios: 0.040 * self.flops(ratios) / full)
    found = handle.search(lambda: -sum(map(sum, handle.ratios)), "30 ms", population=20, generations=2)
    assert 0.5 < found.share <= 0.75
    with SparseViT(filled(HOSTS["SwinModel"]()), "20 ms") as other:
        assert other.chooser.flops(other.ratios) <= 0.5 * full


def test_time_is_measured_in_evaluation_mode_and_leaves_no_trace():
    model = filled(HOSTS["SwinModel"]()).train()
    handle = SparseViT(model, 0.5)
    before = handle.ratios
    assert handle.chooser.seconds(handle.chooser.dense, runs=4) > 0
    assert handle.ratios == before
    assert all(m.training for m in model.modules())


def test_what_does_not_fit_is_refused_and_the_host_left_alone(host):
    x = pixels(1, 3, 64, 64)
    dense = output(host, x)
    for settings_, error in (
        ({"ratios": ((0.5,), (0.5, 0.5))}, InputError),
        ({"ratios": ((0.5, 1.0), (0.5, 0.5))}, InputError),
        ({"budget": 0.01}, BudgetError),
        ({"budget": "64 tokens"}, BudgetError),
        ({"budget": "0.0001 ms"}, BudgetError),
    ):
        with pytest.raises(error):
            SparseViT(host, **settings_)
        assert torch.equal(output(host, x), dense)
    with pytest.raises(InputError):
        SparseViT(torch.nn.Linear(2, 2))


@given(st.integers(1, 500), st.floats(0, 0.999), st.floats(0, 0.999))
@settings(deadline=None, max_examples=40)
def test_kept_windows_are_the_papers_number(n, a, b):
    assert kept(n, 0) == n
    assert 1 <= kept(n, a) <= n
    assert n * (1 - a) - 1 < kept(n, a) <= max(1, n * (1 - a) + 1e-5)
    assert (kept(n, a) >= kept(n, b)) or a > b


@given(st.integers(0, 2**32 - 1))
@settings(deadline=None, max_examples=20)
def test_genomes_and_ratios_agree(seed):
    chooser = CHOOSER
    dice = random.Random(seed)
    genome = chooser.ascending(tuple(dice.randrange(n) for n in chooser.options()))
    ratios = chooser.of_genome(genome)
    assert chooser.checked(ratios) == ratios
    assert tuple(round(10 * r) for stage in ratios for r in stage[::2]) == genome


CHOOSER = SparseViT(swins(64, (2, 5))["SwinModel"](), 1.0).chooser
