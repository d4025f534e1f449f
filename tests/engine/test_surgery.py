import copy
import inspect

import pytest
import torch
from torch import nn

from foveate.engine.surgery import add, find, join, name_of, patch_forward, patch_method, replace
from foveate.errors import InputError


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.attn = nn.Linear(4, 4)
        self.drop = nn.Dropout(0.5)
        self.mlp = nn.Sequential(nn.Linear(4, 8), nn.GELU(), nn.Linear(8, 4))

    def forward(self, x, scale=1.0):
        return self.mlp(self.drop(self.attn(x))) * scale


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.blocks = nn.ModuleList([Block(), Block()])
        self.head = nn.Linear(4, 4)
        self.tied = self.head  # one module under two names

    def forward(self, x):
        for block in self.blocks:
            x = block(x)
        return self.tied(self.head(x))


class Wrapped(nn.Module):
    def __init__(self, inner, factor=1.0):
        super().__init__()
        self.inner, self.factor = inner, factor

    def forward(self, x):
        return self.inner(x) * self.factor


@pytest.fixture
def model():
    torch.manual_seed(0)
    model = Model()
    model.blocks[1].drop.eval()  # a mixed state that must survive
    return model


def photograph(model):
    """All that undoing must restore: objects, names, modes, own attributes of each module."""
    named = list(model.named_modules(remove_duplicate=False))
    return [(n, id(m), m.training, sorted(m.__dict__)) for n, m in named], list(model.state_dict())


x = torch.arange(8.0).view(2, 4)


def test_find_by_class_name_and_predicate(model):
    linear = ["blocks.0.attn", "blocks.0.mlp.0", "blocks.0.mlp.2", "blocks.1.attn", "blocks.1.mlp.0", "blocks.1.mlp.2"]
    assert list(find(model, nn.Linear)) == [*linear, "head"]
    assert list(find(model, (nn.GELU, nn.Dropout)))[:2] == ["blocks.0.drop", "blocks.0.mlp.1"]
    assert list(find(model, "blocks.*.attn")) == ["blocks.0.attn", "blocks.1.attn"]
    assert list(find(model, "blocks.*")) == ["blocks.0", "blocks.1"]
    assert list(find(model, "blocks.1.**")) == ["blocks.1.attn", "blocks.1.drop", "blocks.1.mlp",
                                                "blocks.1.mlp.0", "blocks.1.mlp.1", "blocks.1.mlp.2"]  # fmt: skip
    assert list(find(model, "**.attn")) == ["blocks.0.attn", "blocks.1.attn"]
    assert list(find(model, "**.head")) == ["head"]
    assert list(find(model, "blocks.?.mlp.[02]")) == []
    assert list(find(model, lambda name, m: name.endswith("2") and isinstance(m, nn.Linear))) == linear[2::3]
    assert find(model, "head")["head"] is model.head


def test_replace_and_remove_restores_everything(model):
    before, picture = copy.deepcopy(model.state_dict()), photograph(model)
    torch.manual_seed(1)
    expected = model(x)
    handle = replace(model, {name: nn.Identity() for name in find(model, "blocks.*.mlp")})
    assert handle.active
    assert isinstance(model.blocks[1].mlp, nn.Identity)
    assert photograph(model) != picture
    handle.remove()
    assert not handle.active
    assert photograph(model) == picture
    torch.manual_seed(1)
    assert torch.equal(model(x), expected)
    assert all(torch.equal(model.state_dict()[k], v) for k, v in before.items())
    handle.remove()
    assert photograph(model) == picture


def test_wrapping_keeps_modes_and_the_wrapper_takes_them_over(model):
    model.blocks[0].eval()
    model.blocks[0].mlp[1].train()
    picture = photograph(model)
    wrapper = Wrapped(model.blocks[0].mlp)
    with replace(model, {"blocks.0.mlp": wrapper}):
        assert not wrapper.training
        assert model.blocks[0].mlp.inner[1].training
    assert photograph(model) == picture


def test_switching_mode_meanwhile_reaches_what_comes_back(model):
    model.train()
    handle = replace(model, {"blocks.0": nn.Identity()})
    model.eval()
    handle.remove()
    assert not any(m.training for m in model.modules())


def test_context_manager_undoes_after_an_error(model):
    picture = photograph(model)
    with pytest.raises(ZeroDivisionError), replace(model, {"head": nn.Identity()}):
        raise ZeroDivisionError
    assert photograph(model) == picture


@pytest.mark.parametrize("name", ["head", "tied"])
def test_a_shared_module_stays_one_module(model, name):
    picture, new = photograph(model), nn.Identity()
    with replace(model, {name: new}):
        assert model.head is new
        assert model.tied is new
    assert photograph(model) == picture
    with replace(model, {"head": new, "tied": new}):
        assert model.head is model.tied


def test_handles_nest_and_come_off_in_reverse_order(model):
    picture, old = photograph(model), model.head
    outer = replace(model, {"head": Wrapped(old, 2.0)})
    inner = replace(model, {"head": Wrapped(model.head, 3.0), "blocks.0.attn": nn.Identity()})
    torch.testing.assert_close(model.head(x), 6 * old(x))
    nested = photograph(model)
    with pytest.raises(InputError, match="'head' was changed again since; remove the later change first"):
        outer.remove()
    assert photograph(model) == nested
    assert outer.active
    inner.remove()
    outer.remove()
    assert photograph(model) == picture


def test_changes_elsewhere_do_not_hold_each_other_up(model):
    picture = photograph(model)
    first = replace(model, {"head": nn.Identity()})
    second = replace(model, {"blocks.0": nn.Identity()})
    first.remove()
    second.remove()
    assert photograph(model) == picture


def test_patch_forward_wraps_what_ran_before_and_leaves_no_trace(model):
    model.eval()
    block, picture = model.blocks[0], photograph(model)
    expected = block(x)
    first = patch_forward(block, lambda forward, x, scale=1.0: forward(x, scale=scale) + 1)
    second = patch_forward(block, lambda forward, x, **kw: forward(x, **kw) * 10)
    torch.testing.assert_close(block(x, scale=2.0), (expected * 2 + 1) * 10)
    assert list(inspect.signature(block.forward).parameters) == ["x", "scale"]
    assert list(model.state_dict()) == picture[1]
    with pytest.raises(InputError, match=r"'Block.forward' was changed again"):
        first.remove()
    second.remove()
    torch.testing.assert_close(block(x), expected + 1)
    first.remove()
    assert photograph(model) == picture
    assert torch.equal(block(x), expected)


def test_a_patched_forward_follows_its_module_into_a_copy(model):
    model.eval()
    with patch_forward(model.blocks[0], lambda forward, x: forward(x) + 1):
        twin = copy.deepcopy(model)
        for p in twin.parameters():
            p.detach().zero_()
        assert torch.equal(twin.blocks[0](x), torch.ones(2, 4))


def test_join_makes_one_handle_even_of_changes_on_top_of_each_other(model):
    picture = photograph(model)
    parts = [
        replace(model, {"head": Wrapped(model.head)}),
        replace(model, {"head": nn.Identity()}),
        patch_forward(model.blocks[0], lambda forward, x: x),
    ]
    handle = join(parts)
    assert not any(p.active for p in parts)
    handle.remove()
    assert photograph(model) == picture


def test_bad_replacements_leave_the_model_alone(model):
    picture = photograph(model)
    with pytest.raises(InputError, match=r"Model has no submodule 'blocks.0.atn'; did you mean 'blocks.0.attn'"):
        replace(model, {"head": nn.Identity(), "blocks.0.atn": nn.Identity()})
    with pytest.raises(InputError, match="no submodule ''"):
        replace(model, {"": nn.Identity()})
    with pytest.raises(InputError, match="'head' is a function"):
        replace(model, {"head": lambda x: x})
    with pytest.raises(InputError, match="'head' and 'tied' are one shared module"):
        replace(model, {"head": nn.Identity(), "tied": nn.Identity()})
    assert photograph(model) == picture


def test_an_added_module_trains_and_saves_with_its_parent_until_it_is_removed(model):
    before = photograph(model)
    handle = add(model.blocks[0], "gate", nn.Linear(4, 1))
    assert "blocks.0.gate.weight" in model.state_dict()
    assert model.blocks[0].gate in set(model.modules())
    handle.remove()
    assert photograph(model) == before
    assert not hasattr(model.blocks[0], "gate")


def test_an_added_module_takes_over_the_mode(model):
    model.eval()
    with add(model, "extra", nn.Dropout()) as handle:
        assert not model.extra.training
        assert handle.active


@pytest.mark.parametrize("name", ["attn", "forward", "no name", ""])
def test_a_name_that_is_taken_or_is_none_is_refused(model, name):
    before = photograph(model)
    with pytest.raises(InputError, match="choose a name"):
        add(model.blocks[0], name, nn.Identity())
    assert photograph(model) == before


def test_any_method_can_be_patched(model):
    with patch_method(model, "extra_repr", lambda original: f"<{original()}>"):
        assert model.extra_repr() == "<>"
    assert model.extra_repr() == ""
    with pytest.raises(InputError, match="no method 'fly'"):
        patch_method(model, "fly", lambda original: None)


def test_names_are_found_by_module(model):
    assert name_of(model, model.blocks[1].mlp[0]) == "blocks.1.mlp.0"
    assert name_of(model, model) == ""
    with pytest.raises(InputError, match="does not hold"):
        name_of(model, nn.ReLU())


def test_a_pause_gives_the_model_back_and_takes_it_again(model):
    model.eval()
    plain, before = model(x), photograph(model)
    first = replace(model, {"head": Wrapped(model.head, 2.0)})
    second = join([add(model, "extra", nn.ReLU()), patch_forward(model.blocks[0], lambda run, x: run(x) + 1)])
    changed, during = model(x), photograph(model)
    with second.paused(), first.paused():
        assert torch.equal(model(x), plain)
        assert photograph(model) == before
    assert torch.equal(model(x), changed)
    assert photograph(model) == during
    with pytest.raises(KeyError), second.paused():
        raise KeyError
    assert photograph(model) == during
    with pytest.raises(InputError, match="remove the later"), replace(model, {"head": nn.ReLU()}), first.paused():
        pass
