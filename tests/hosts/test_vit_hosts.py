"""What a description says of a host is what the host does."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils._pytree import tree_leaves

from foveate import hosts
from foveate.engine.budget import Budget
from foveate.engine.packed import Packed
from foveate.engine.surgery import replace
from foveate.errors import BudgetError, InputError
from foveate.hosts.packing import Plan, run_packed
from foveate.meter import count_flops


@pytest.fixture
def pixels():
    return torch.rand(3, 3, 32, 32, generator=torch.Generator().manual_seed(1))


def outputs(model, x):
    with torch.no_grad():
        return [leaf for leaf in tree_leaves(model(x)) if isinstance(leaf, torch.Tensor)]


def same(a, b):
    return len(a) == len(b) and all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


def whole(host):
    """All tokens, packed."""

    def plan(x):
        tokens = host.embed(x)
        lengths = (tokens.shape[1],) * len(x)
        return Plan(Packed(tokens.flatten(0, 1), lengths), lambda y: y.unflatten(0, (len(x), -1)))

    return plan


def test_packed_all_tokens_give_the_output_bit_for_bit(a_vit, pixels):
    host = hosts.vit(a_vit)
    before, keys = outputs(a_vit, pixels), list(a_vit.state_dict())
    with run_packed(host, whole(host)):
        during = outputs(a_vit, pixels)
    if getattr(getattr(a_vit, "config", None), "_attn_implementation", "sdpa") == "eager":
        for a, b in zip(before, during, strict=True):  # the host's own attention sums in another order
            torch.testing.assert_close(a, b, atol=1e-4, rtol=1e-4)
    else:
        assert same(before, during)
    assert same(before, outputs(a_vit, pixels))
    assert list(a_vit.state_dict()) == keys


def test_pictures_of_different_lengths_do_not_see_each_other(a_vit, pixels):
    host = hosts.vit(a_vit)

    def plan(x):
        tokens = host.embed(x)
        count = [host.prefixes + 3 + round(float(p.sum())) % 9 for p in x]
        packed = Packed.of([t[:n] for t, n in zip(tokens, count, strict=True)])
        return Plan(packed, lambda y: packed.replaced(y).padded()[:, : host.prefixes + 3])

    with run_packed(host, plan):
        together = outputs(a_vit, pixels)
        alone = [outputs(a_vit, x) for x in pixels.split(1)]
    for whole_output, *parts in zip(together, *alone, strict=True):
        torch.testing.assert_close(whole_output, torch.cat(parts), atol=1e-4, rtol=1e-4)


def test_blocks_put_together_from_their_parts_are_the_host(a_vit, pixels):
    host = hosts.vit(a_vit)

    def attend(q, k, v, dropout):
        return F.scaled_dot_product_attention(q, k, v, dropout_p=dropout)

    with torch.no_grad():
        x = host.embed(pixels)
        for block in host.blocks:
            y = block.module(x, None)
            x = x + block.scale1(block.attention.run(block.norm1(x), attend))
            x = x + block.scale2(block.mlp(block.norm2(x)))
            torch.testing.assert_close(x, y, atol=1e-5, rtol=1e-5)


def test_embedded_tokens_are_what_the_first_block_gets(a_vit, pixels):
    if hasattr(a_vit, "pre_layrnorm"):
        pytest.skip("a norm lies between")
    host, seen = hosts.vit(a_vit), []
    with host.blocks[0].patch(lambda run, x: seen.append(x) or run(x)):
        outputs(a_vit, pixels)
    assert torch.equal(seen[0], host.embed(pixels))


def test_a_patched_embedding_takes_the_place_of_the_hosts(a_vit, pixels):
    host, seen = hosts.vit(a_vit), []
    before = outputs(a_vit, pixels)
    with host.patch_embedding(lambda x: seen.append(x) or host.embed(x)):
        assert same(before, outputs(a_vit, pixels))
    assert torch.equal(seen[0], pixels)
    assert same(before, outputs(a_vit, pixels))


def test_positions_at_another_size_are_the_hosts_own(a_vit):
    host, x = hosts.vit(a_vit), torch.rand(1, 3, 24, 48)
    flexible = not hasattr(a_vit, "config") or a_vit.config.model_type.startswith("dinov2")
    named = {} if flexible else {"interpolate_pos_encoding": True}
    with torch.no_grad():
        host_output = tree_leaves(a_vit(x, **named))[0]
        with host.patch_embedding(host.embed):
            torch.testing.assert_close(tree_leaves(a_vit(x, **named))[0], host_output, atol=1e-5, rtol=1e-5)
    assert host.positions((3, 6)).shape == (1, 18, 24)


def test_features_are_a_map_of_the_patches(a_vit, pixels):
    host = hosts.vit(a_vit)
    with torch.no_grad():
        y = host.features(pixels[:, :, :16] if host.prefixes == 0 else pixels)
        assert y.shape == (3, 24, 2 if host.prefixes == 0 else 4, 4)
        tokens = host.tokens(pixels)
        assert tokens.shape == (3, host.prefixes + 16, 24)
        assert host.features(pixels)[0, :, 1, 2].equal(tokens[0, host.prefixes + 6])


def test_flops_are_those_counted(a_vit, pixels):
    host = hosts.vit(a_vit)
    counted = count_flops(a_vit, pixels[:1])
    assert host.flops(16, (4, 4)) <= counted <= 1.01 * host.flops(16, (4, 4))


def test_a_budget_buys_the_tokens_whose_flops_it_pays(a_vit):
    host, grid = hosts.vit(a_vit), (12, 12)
    full = host.flops(144, grid)
    for share in (0.3, 0.5, 0.9):
        count = host.affordable(Budget(share), grid)
        assert host.flops(count, grid) <= share * full < host.flops(count + 1, grid)
        assert host.affordable(Budget(share * full / 1e9, "gflops"), grid) == count
        assert host.affordable(Budget(share), grid, lambda n: 0.1 * full) <= count
    assert host.affordable(Budget(1.0), grid, lambda n: full) == 144
    assert host.affordable(Budget(9, "tokens"), grid) == 9
    with pytest.raises(BudgetError, match="tokens"):
        host.affordable(Budget(3, "bpp"), grid)
    with pytest.raises(BudgetError, match="one token"):
        host.affordable(Budget(1e-4), grid)


def test_modules_are_found_by_name_and_can_be_replaced(a_vit, pixels):
    host = hosts.vit(a_vit)
    before = outputs(a_vit, pixels)
    names = [host.name_of(block.mlp) for block in host.blocks]
    zero = nn.Linear(24, 24)
    nn.init.zeros_(zero.weight)
    with replace(a_vit, {names[0]: zero}):
        assert not same(before, outputs(a_vit, pixels))
    assert same(before, outputs(a_vit, pixels))


def test_a_copy_of_a_patched_model_is_patched_by_itself(a_vit, pixels):
    host = hosts.vit(a_vit)
    kept = _Half(host)
    with run_packed(host, kept.plan):
        before = outputs(a_vit, pixels)
        copied = copy.deepcopy(a_vit)
    with torch.no_grad():
        for p in a_vit.parameters():
            p.zero_()
    assert same(outputs(copied, pixels), before)


class _Half:
    """The prefix and the first eight patches."""

    def __init__(self, host):
        self.host = host

    def plan(self, x):
        tokens = self.host.embed(x)[:, : self.host.prefixes + 8]
        lengths = (tokens.shape[1],) * len(x)
        return Plan(Packed(tokens.flatten(0, 1), lengths), lambda y: y.unflatten(0, (len(x), -1)))


def test_masks_are_refused(a_vit, pixels):
    host = hosts.vit(a_vit)
    attention = host.blocks[0].attention
    with run_packed(host, whole(host)), pytest.raises(InputError, match="attention masks"):
        attention.module(torch.rand(1, 2, 24), torch.ones(1, 2))


def test_pictures_that_do_not_fit_are_refused(a_vit):
    host = hosts.vit(a_vit)
    with pytest.raises(InputError, match="multiples of the patch of 8"):
        host.grid(torch.rand(1, 3, 32, 30))
    for shape in ((3, 32, 32), (1, 1, 32, 32), (0, 3, 32, 32)):
        with pytest.raises(InputError, match="expected pictures"):
            host.grid(torch.rand(*shape))


def test_stochastic_depth_drops_whole_pictures():
    t = pytest.importorskip("transformers")
    config = t.Dinov2Config(hidden_size=24, num_hidden_layers=1, num_attention_heads=3, image_size=32, patch_size=8,
                            mlp_ratio=2, drop_path_rate=0.5, layerscale_value=1.0)  # fmt: skip
    torch.manual_seed(0)
    model, seen = t.Dinov2Model(config).train(), []
    host = hosts.vit(model)
    with run_packed(host, whole(host)), host.blocks[0].patch(lambda run, x: seen.extend((x, run(x))) or seen[1]):
        model(torch.rand(60, 3, 32, 32))
    unchanged = (seen[0].view_as(seen[1]) == seen[1]).all(-1)  # tokens that both branches left alone
    assert set(unchanged.sum(1).tolist()) == {0, 17}
    assert 5 < unchanged[:, 0].sum() < 30


def test_masked_patches_are_refused():
    t = pytest.importorskip("transformers")
    config = t.ViTConfig(hidden_size=24, num_hidden_layers=1, num_attention_heads=3, intermediate_size=40,
                         image_size=32, patch_size=8)  # fmt: skip
    model = t.ViTModel(config, use_mask_token=True)
    host = hosts.vit(model)
    with run_packed(host, whole(host)), pytest.raises(InputError, match="bool_masked_pos"):
        model(torch.rand(1, 3, 32, 32), bool_masked_pos=torch.zeros(1, 16, dtype=torch.bool))


def test_models_without_a_vision_transformer_are_refused(a_vit):
    with pytest.raises(InputError, match="Linear neither is nor holds a plain vision transformer"):
        hosts.vit(nn.Linear(2, 2))
    with pytest.raises(InputError, match="expected a model, got str"):
        hosts.vit("vit")
    with pytest.raises(InputError, match="Swin"):
        hosts.swin(a_vit)


def test_a_host_is_found_inside_another_model(a_vit):
    assert hosts.vit(nn.Sequential(nn.Identity(), a_vit)).width == 24


def test_hosts_load_from_a_folder(tmp_path):
    t = pytest.importorskip("transformers")
    config = t.ViTConfig(hidden_size=24, num_hidden_layers=1, num_attention_heads=3, intermediate_size=40,
                         image_size=32, patch_size=8, num_labels=3)  # fmt: skip
    t.ViTForImageClassification(config).save_pretrained(tmp_path)
    model = hosts.load(tmp_path)
    assert type(model).__name__ == "ViTForImageClassification"
    assert not model.training
    assert hosts.vit(model).head is model.classifier
    with pytest.raises(InputError, match="cannot load the model"):
        hosts.load(tmp_path / "nothing")
