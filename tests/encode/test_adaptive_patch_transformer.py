import copy

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from foveate.encode.adaptive_patch_transformer import AdaptivePatchTransformer, MixedPatch
from foveate.engine.surgery import patch_forward
from foveate.errors import BudgetError, InputError
from foveate.hosts.picture import HALF, Pixels
from foveate.layers.patch import resample_positions
from foveate.layers.transformer import VisionTransformer
from foveate.meter import count_flops

SIDE, PATCH, WIDTH = 64, 8, 24
PIXELS = Pixels(*HALF, (SIDE, SIDE), PATCH)


@pytest.fixture
def model():
    torch.manual_seed(0)
    return VisionTransformer(SIDE, PATCH, WIDTH, 3, 3, num_classes=5).eval()


@pytest.fixture
def pictures():
    """Noise; noise in one corner and flat elsewhere; and flat alone: normalised."""
    x = torch.full((3, 3, SIDE, SIDE), 0.4)
    noise = torch.rand(2, 3, SIDE, SIDE, generator=torch.Generator().manual_seed(0))
    x[0], x[1, :, :24, :24] = noise[0], noise[1, :, :24, :24]
    return PIXELS.normalise(x)


def inputs_of_blocks(model, x):
    """Packed tokens as they enter the first block, [T, C]."""
    seen = []
    with patch_forward(model.blocks[0], lambda run, x, *more: seen.append(x) or run(x, *more)):
        model(x)
    return seen[0][0]


def plain_tokens(model, x):
    """Tokens of the host's own embedding, before positions, as a map [B, C, h, w]."""
    return model.patch_embed.proj(x)


@pytest.mark.parametrize(
    "settings", [{"thresholds": (0.0, 0.0)}, {"thresholds": ()}, {"budget": 1.0}, {"scales": 1, "budget": 1.0}]
)
def test_with_small_patches_only_it_is_the_host_bit_for_bit(model, pictures, settings):
    with torch.no_grad():
        before = model(pictures), model.forward_features(pictures)
        with AdaptivePatchTransformer(model, **settings):
            assert torch.equal(model(pictures), before[0])
            assert torch.equal(model.forward_features(pictures), before[1])


def test_removal_gives_the_host_back(model, pictures):
    keys, modules, before = list(model.state_dict()), list(model.modules()), model(pictures)
    handle = AdaptivePatchTransformer(model, 0.5)
    assert [k for k in model.state_dict() if k not in keys] == [
        f"mixed_patch.{name}" for name in ("patch_attn.weight", "patch_attn.bias", "zero_conv.weight", "zero_conv.bias")
    ]
    assert not torch.equal(model(pictures), before)
    handle.remove()
    assert list(model.state_dict()) == keys
    assert list(model.modules()) == modules
    assert torch.equal(model(pictures), before)


def test_a_token_of_a_flat_square_is_that_of_any_of_its_patches(model, pictures):
    with torch.no_grad(), AdaptivePatchTransformer(model, thresholds=(float("inf"), float("inf"))):
        tokens = inputs_of_blocks(model, pictures[2:])
        patch = plain_tokens(model, pictures[2:])[0, :, 0, 0]
    positions = resample_positions(model.pos_embed[:, 1:], (8, 8), (2, 2))[0]
    torch.testing.assert_close(tokens[1:] - positions, patch.expand(4, -1), atol=1e-5, rtol=1e-5)


def test_tokens_are_what_the_equations_say(model, pictures):
    handle = AdaptivePatchTransformer(model, thresholds=(4.0, 3.0))
    torch.nn.init.normal_(handle.chooser.mixed.zero_conv.weight)
    x = pictures[1:2]
    with torch.no_grad():
        tokens = inputs_of_blocks(model, x)
        fine, tree = plain_tokens(model, x)[0], handle.chooser.tree(x)
        counts = [int(m.sum()) for m in tree.masks]
        assert min(counts) > 0
        positions = model.pos_embed[:, 1:]
        expected = [model.cls_token[0, 0] + model.pos_embed[0, 0]]
        for s, mask in enumerate(tree.masks):
            small = x if s == 0 else F.interpolate(x, scale_factor=0.5**s, mode="bilinear")
            grid = resample_positions(positions, (8, 8), (8 >> s, 8 >> s))[0]
            for _, row, column in mask.nonzero().tolist():
                side = 2**s
                token = plain_tokens(model, small)[0, :, row, column] + grid[row * (8 >> s) + column]
                if s:
                    cells = fine[:, row * side : (row + 1) * side, column * side : (column + 1) * side]
                    token = token + handle.chooser.mixed(cells[None])[0]
                expected.append(token)
    torch.testing.assert_close(tokens, torch.stack(expected), atol=1e-4, rtol=1e-4)


def test_a_coarse_token_stands_for_all_patches_it_covers(model, pictures):
    handle = AdaptivePatchTransformer(model, thresholds=(4.0,))
    with torch.no_grad():
        y = model.forward_features(pictures[1:2])
    owner = handle.chooser.tree(pictures[1:2]).owner.flatten()
    assert y.shape == (1, 65, WIDTH)
    assert 1 < len(y[0, 1:].unique(dim=0)) == int(owner.max()) + 1 < 64
    for i in range(64):
        assert torch.equal(y[0, 1 + i], y[0, 1 + int((owner == owner[i]).nonzero()[0])])


def test_a_batch_gives_what_its_pictures_give_alone(model, pictures):
    with torch.no_grad(), AdaptivePatchTransformer(model, thresholds=(4.0, 3.0)) as handle:
        assert len(set(handle.look(pictures).tokens)) == 3
        together, alone = model(pictures), torch.cat([model(x) for x in pictures.split(1)])
    torch.testing.assert_close(together, alone, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("budget", [0.4, 0.5, 0.75, "40 tokens", "0.005 GFLOPs"])
def test_each_picture_meets_the_budget_for_itself(model, pictures, budget):
    with torch.no_grad():
        dense = count_flops(model, pictures[:1])
        with AdaptivePatchTransformer(model, budget) as handle:
            allowed = handle.chooser.allowed((8, 8))
            assert all(allowed - 15 < n <= allowed for n in handle.look(pictures).tokens)
            spent = [count_flops(model, x) for x in pictures.split(1)]
    if isinstance(budget, float):
        # Resampling of positions, which all pictures of a batch share, is not in the budget.
        assert all(0.6 * budget < s / dense < budget + 0.02 for s in spent)


def test_the_easiest_squares_are_joined_first(model, pictures):
    with AdaptivePatchTransformer(model, "40 tokens", scales=2) as handle:
        scales = handle.chooser.tree(pictures[1:2]).scales[0]
    assert not scales[:3, :3].any()


@settings(deadline=None, max_examples=12)
@given(st.floats(0.6, 0.95), st.integers(2, 3))
def test_calibrated_thresholds_meet_the_budget_on_average(share, scales):
    torch.manual_seed(1)
    model = VisionTransformer(SIDE, PATCH, WIDTH, 1, 3).eval()
    x = torch.rand(5, 3, SIDE, SIDE)
    ramp = torch.linspace(0, 1, 5).view(-1, 1, 1, 1) * torch.linspace(0, 1, SIDE)
    sample = [PIXELS.normalise(x[:3] * ramp[:3]), PIXELS.normalise((x * ramp)[3:])]
    with AdaptivePatchTransformer(model, share, scales=scales, pictures=sample) as handle:
        tokens = [n for part in sample for n in handle.look(part).tokens]
        allowed = handle.chooser.allowed((8, 8))
    assert sum(tokens) / len(tokens) <= allowed
    assert handle.thresholds is not None
    # A little lower, and more tokens than allowed would be left.
    with AdaptivePatchTransformer(model, thresholds=[t - 1e-4 for t in handle.thresholds]) as lower:
        more = [n for part in sample for n in lower.look(part).tokens]
    assert sum(more) / len(more) > allowed or sum(more) == 64 * len(more)


def test_one_patch_size_has_no_thresholds_to_calibrate(model, pictures):
    with pytest.raises(InputError, match="two patch sizes"):
        AdaptivePatchTransformer(model, 1.0, scales=1, pictures=pictures)


def test_entropy_of_levels():
    levels = torch.arange(256).view(16, 16).float() / 255
    x = PIXELS.normalise(levels.repeat(4, 4)[None, None].expand(1, 3, -1, -1))
    model = VisionTransformer(SIDE, PATCH, WIDTH, 1, 3)
    with AdaptivePatchTransformer(model, 1.0, scales=2) as handle:
        (bits,) = handle.chooser.scores(x, (8, 8))
        torch.testing.assert_close(bits, torch.full((1, 4, 4), 8.0), atol=1e-4, rtol=0)
        (bits,) = handle.chooser.scores(torch.zeros_like(x), (8, 8))
        assert bits.abs().max() < 1e-5
        checkerboard = (torch.arange(SIDE)[:, None] + torch.arange(SIDE)).remainder(2).float()
        (bits,) = handle.chooser.scores(PIXELS.normalise(checkerboard.expand_as(x)), (8, 8))
        torch.testing.assert_close(bits, torch.ones(1, 4, 4), atol=1e-4, rtol=0)


@pytest.mark.parametrize(("level", "bits"), [(200.4, 0.0), (200.6, 1.0), (17.4, 0.0), (17.6, 1.0)])
def test_bins_of_entropy_are_half_a_level_wide(model, level, bits):
    x = torch.full((1, 3, SIDE, SIDE), float(int(level)))
    x[..., ::2] = level
    with AdaptivePatchTransformer(model, 1.0, scales=2) as handle:
        (found,) = handle.chooser.scores(PIXELS.normalise(x / 255), (8, 8))
    torch.testing.assert_close(found, torch.full((1, 4, 4), bits), atol=1e-4, rtol=0)


@pytest.mark.parametrize("score", ["laplacian", "error"])
def test_other_scores_see_where_levels_lie(model, score):
    x = torch.zeros(1, 3, SIDE, SIDE)
    x[..., :32, :] = (torch.arange(32)[:, None] + torch.arange(SIDE)).remainder(2)
    x[..., 32:, 32:] = 1.0
    with AdaptivePatchTransformer(model, 1.0, scales=2, score=score) as handle:
        (values,) = handle.chooser.scores(PIXELS.normalise(x), (8, 8))
    assert values[0, 0].min() > 2 * values[0, 2:, :].max()
    assert values[0, 3, 0] == 0


def test_pixels_normalised_otherwise_are_undone_as_told(model, pictures):
    raw = PIXELS.restore(pictures)
    with AdaptivePatchTransformer(model, thresholds=(4.0,)) as handle:
        expected = handle.look(pictures).tokens
    with AdaptivePatchTransformer(model, thresholds=(4.0,), mean=(0, 0, 0), std=(1, 1, 1)) as handle:
        assert handle.look(raw).tokens == expected


def test_squares_that_would_leave_the_picture_stay_small(model):
    x = torch.zeros(1, 3, 7 * PATCH, 9 * PATCH)
    with torch.no_grad(), AdaptivePatchTransformer(model, thresholds=(9.0, 9.0)) as handle:
        tree = handle.chooser.tree(x)
        assert [int(m.sum()) for m in tree.masks] == [63 - 4 * 12, 12 - 4 * 2, 2]
        assert model(x).shape == (1, 5)


def test_the_correction_learns_from_the_first_step_though_it_adds_nothing(model, pictures):
    with torch.no_grad(), AdaptivePatchTransformer(model, 0.5):
        before = model(pictures)
    handle = AdaptivePatchTransformer(model, 0.5)
    y = model(pictures)
    torch.testing.assert_close(y.detach(), before, atol=1e-6, rtol=1e-5)
    y.square().sum().backward()
    gradient = handle.chooser.mixed.zero_conv.weight.grad
    assert gradient is not None
    assert bool(gradient.any())
    assert all(p.grad is not None for name, p in model.named_parameters() if "patch_attn" not in name)


def test_corrections_of_larger_squares_go_through_the_convolution_twice():
    mixed = MixedPatch(4)
    torch.nn.init.normal_(mixed.zero_conv.weight)
    x = torch.rand(3, 4, 4, 4)
    expected = mixed.zero_conv(mixed.patch_attn(mixed.patch_attn(x)).flatten(1))
    assert torch.equal(mixed(x), expected)
    assert mixed.trained
    assert not MixedPatch(4).trained


def test_a_trained_correction_is_paid_for(model, pictures):
    with torch.no_grad():
        dense = count_flops(model, pictures[:1])
        handle = AdaptivePatchTransformer(model, 0.6)
        untrained = handle.chooser.allowed((32, 32))
        torch.nn.init.normal_(handle.chooser.mixed.zero_conv.weight)
        assert handle.chooser.allowed((32, 32)) < untrained
        assert count_flops(model, pictures[:1]) / dense < 0.62


def test_a_copy_is_adaptive_by_itself(model, pictures):
    handle = AdaptivePatchTransformer(model, 0.5)
    with torch.no_grad():
        before = model(pictures)
        copied = copy.deepcopy(model)
        handle.remove()
        assert not torch.equal(model(pictures), before)
        for p in model.parameters():
            p.zero_()
        assert torch.equal(copied(pictures), before)


def test_bfloat16_works_and_chooses_alike(model, pictures):
    with torch.no_grad(), AdaptivePatchTransformer(model.bfloat16(), 0.5) as handle:
        y = model(pictures.bfloat16())
        assert y.dtype == torch.bfloat16
        assert y.isfinite().all()
        assert len(handle.look(pictures.bfloat16()).tokens) == 3


def test_a_look_says_what_is_chosen(model, pictures):
    with AdaptivePatchTransformer(model, thresholds=(4.0, 3.0)) as handle:
        look = handle.look(pictures)
    assert look.full == 64
    assert look.tokens[0] == 64
    assert look.tokens[2] == 4
    assert look.effort[2].unique().tolist() == [1 / 16]
    torch.testing.assert_close(look.effort.flatten(1).sum(1), torch.tensor(look.tokens, dtype=torch.float32))
    assert look.boxes[2].tolist() == [[0, 0, 32, 32], [32, 0, 64, 32], [0, 32, 32, 64], [32, 32, 64, 64]]


@pytest.mark.parametrize(
    ("settings", "error", "message"),
    [
        ({"score": "beauty"}, InputError, "no score 'beauty'"),
        ({"scales": 0}, InputError, "at least one patch size"),
        ({"scales": 5}, InputError, "reach 128 pixels"),
        ({"budget": "3 tokens"}, BudgetError, "need 4 at least; ask for a share of 0.22"),
        ({"budget": "3 bpp"}, BudgetError, "cannot be weighed"),
    ],
)
def test_what_cannot_be_done_is_refused_and_the_host_left_alone(model, pictures, settings, error, message):
    before = model(pictures)
    with pytest.raises(error, match=message):
        AdaptivePatchTransformer(model, **settings)
    assert torch.equal(model(pictures), before)
    assert not hasattr(model, "mixed_patch")


def test_applying_it_twice_is_refused(model):
    with AdaptivePatchTransformer(model, 0.5), pytest.raises(InputError, match="mixed_patch"):
        AdaptivePatchTransformer(model, 0.5)
