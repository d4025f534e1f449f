from itertools import pairwise

import pytest
import torch
from torch import nn

from foveate.encode.fit_generative import FITDecoder, FITDenoiser, time_code
from foveate.encode.fit_interleaved import (
    FIT,
    CrossAttention,
    FITBlock,
    Interleaved,
    attention_products,
    chunk_mask,
    groups_for,
    parse_layers,
)
from foveate.errors import InputError
from foveate.meter import count_flops

TINY = {"img_size": 32, "patch_size": 4, "groups": 4, "latents": 2, "dims": (16, 24), "heads": (2, 3)}


def changed(model, x, where):
    """Which groups of the outputs change when one group of tokens does."""
    z = torch.zeros(1, x.shape[1], 2, 24)
    other = x.clone()
    other[:, where] += 1
    with torch.no_grad():
        return [(a != b).flatten(2).any(2)[0].tolist() for a, b in zip(model(x, z), model(other, z), strict=True)]


@pytest.mark.parametrize("text", ["(2)4(2)", "2(4)", "(2)0(2)1", "", "(a)1", "(1)1 "])
def test_other_layer_strings_are_refused(text):
    with pytest.raises(InputError, match="not of the form"):
        parse_layers(text)


def test_one_group_without_global_layers_is_a_vit():
    torch.manual_seed(0)
    body = Interleaved((16, 24), (2, 3), "(3)0")
    x = torch.randn(2, 1, 9, 16)
    plain = nn.Sequential(*body.blocks[0].local, body.norm)
    torch.testing.assert_close(body(x, torch.zeros(2, 1, 2, 24))[0][:, 0], plain(x[:, 0]))


def test_groups_meet_by_global_layers_alone():
    torch.manual_seed(0)
    x = torch.randn(1, 4, 5, 16)
    local = Interleaved((16, 24), (2, 3), "(2)0")
    assert changed(local, x, 1)[0] == [False, True, False, False]
    joined = Interleaved((16, 24), (2, 3), "(1)1(1)0")
    assert changed(joined, x, 1) == [[True] * 4, [True] * 4]


def test_the_last_block_does_not_write():
    assert FITBlock((1, 1), (16, 24), (2, 3), writes=False, causal=False).write is None
    blocks = Interleaved((16, 24), (2, 3), "(1)1(1)1").blocks
    assert [block.write is not None for block in blocks] == [True, False]


def test_a_permutation_of_groups_with_their_latents_permutes_results():
    torch.manual_seed(0)
    body, order = Interleaved((16, 24), (2, 3), "(1)1(1)0"), torch.tensor([2, 0, 3, 1])
    x, z = torch.randn(1, 4, 5, 16), torch.randn(1, 4, 2, 24)
    for a, b in zip(body(x[:, order], z[:, order]), body(x, z), strict=True):
        torch.testing.assert_close(a, b[:, order])


def test_cross_attention_is_as_wide_as_the_narrower_side():
    attend = CrossAttention(24, 16, 3, 2)
    assert attend.heads == 2
    assert (attend.q.out_features, attend.kv.out_features, attend.proj.out_features) == (16, 32, 24)


def test_products_are_what_attention_takes():
    # Counted on a body without linear layers' share: what grows when only groups or latents grow.
    body = Interleaved((16, 16), (1, 1), "(1)2(1)0")
    x, z = torch.zeros(1, 4, 8, 16), torch.zeros(1, 4, 3, 16)
    linear = sum(
        2 * rows * m.weight.numel()
        for block in body.blocks
        for rows, part in ((32, block.local), (12, block.remote))
        for m in part.modules()
        if isinstance(m, nn.Linear)
    )
    linear += 2 * (12 * 256 * 2 + 32 * 512) + 2 * (32 * 256 * 2 + 12 * 512)
    spent = count_flops(body, x, z) - linear
    assert spent == 4 * 16 * attention_products(32, 4, 3, "(1)2(1)0")


def test_latents_see_their_own_group_and_those_before():
    seen = chunk_mask(3, 2)
    for query in range(6):
        for key in range(6):
            assert seen[query, key] == (key // 2 <= query // 2)


@pytest.mark.parametrize("size", [(32, 32), (45, 70), (16, 16)])
@pytest.mark.parametrize("glimpse", [False, True])
def test_pictures_of_any_size(size, glimpse):
    model = FIT(num_classes=3, **TINY, layers="(1)1(1)1", glimpse=glimpse).eval()
    x = torch.rand(2, 3, *size)
    assert model(x).shape == (2, 3)
    assert model.forward_features(x).shape == (2, (4 + glimpse) * 2, 24)


def test_groups_are_parts_of_the_picture():
    model = FIT(num_classes=2, **TINY, layers="(1)0")
    x = torch.rand(1, 3, 32, 32)
    tokens, grid = model.group(x)
    assert grid == (4, 4)
    other = x.clone()
    other[:, :, :16, 16:] += 1
    moved = (model.group(other)[0] != tokens).any(-1)[0]
    assert moved.all(1).tolist() == [False, True, False, False]
    assert not moved[[0, 2, 3]].any()


def test_what_is_read_follows_the_last_number():
    x = torch.rand(1, 3, 32, 32)
    assert FIT(2, **TINY, layers="(1)1(1)0").forward_features(x).shape == (1, 64, 16)
    assert FIT(2, **TINY, layers="(1)1").forward_features(x).shape == (1, 8, 24)


def test_settings_that_do_not_fit():
    with pytest.raises(InputError, match="square"):
        FIT(2, **(TINY | {"groups": 5}))
    with pytest.raises(InputError, match="heads"):
        CrossAttention(16, 16, 3, 3)


def test_groups_grow_as_the_paper_says():
    counts = [groups_for(n) for n in (2**12, 2**15, 2**18)]
    assert all(3.5 < b / a < 4.6 for a, b in pairwise(counts))  # 8^(2/3) = 4


def test_the_decoder_is_causal():
    torch.manual_seed(0)
    model = FITDecoder(7, groups=3, tokens=4, latents=2, dims=(16, 24), heads=(2, 3), layers="(1)1(1)1(1)0")
    symbols = torch.randint(7, (1, 12))
    before = model(symbols)
    for place in (0, 3, 4, 9, 11):
        other = symbols.clone()
        other[0, place] = (other[0, place] + 1) % 7
        moved = (model(other) != before).any(-1)[0]
        assert not moved[:place].any()
        assert moved[place]
    assert moved.sum() == 1
    early = symbols.clone()
    early[0, 0] = (early[0, 0] + 1) % 7
    assert (model(early) != before).any(-1)[0, 4:].all()  # groups further on see it through latents
    with pytest.raises(InputError, match="symbols must be"):
        model(symbols + 7)
    with pytest.raises(InputError, match="expected symbols"):
        model(symbols[:, :5])


def denoiser(**settings):
    torch.manual_seed(0)
    return FITDenoiser(16, 3, 2, 4, 2, (16, 24), (2, 3), "(1)1(1)0", **settings)


def test_the_denoiser_cuts_and_pastes_without_loss():
    model, x = denoiser(), torch.rand(2, 3, 16, 16)
    assert torch.equal(model.paste(model.cut(x)), x)
    assert torch.equal(model.cut(x)[0, 1, 0].view(3, 2, 2), x[0, :, :2, 8:10])


def test_the_denoiser_hears_of_time_and_starts_deaf_to_the_step_before():
    model, x = denoiser(), torch.rand(2, 3, 16, 16)
    early, z = model(x, torch.tensor([0.1, 0.1]))
    late, _ = model(x, torch.tensor([0.9, 0.9]))
    assert early.shape == x.shape
    assert not torch.allclose(early, late)
    again, _ = model(x, torch.tensor([0.1, 0.1]), latents=z)
    torch.testing.assert_close(again, early)
    with torch.no_grad():
        model.before_norm.weight.fill_(1)
    assert not torch.allclose(model(x, torch.tensor([0.1, 0.1]), latents=z)[0], early)


def test_labels_go_with_models_that_have_classes():
    x, time = torch.rand(2, 3, 16, 16), torch.zeros(2)
    model = denoiser(num_classes=3)
    a, _ = model(x, time, torch.tensor([0, 1]))
    b, _ = model(x, time, torch.tensor([0, 2]))
    assert torch.equal(a[0], b[0])
    assert not torch.equal(a[1], b[1])
    with pytest.raises(InputError, match="needs labels"):
        model(x, time)
    with pytest.raises(InputError, match="square"):
        FITDenoiser(16, 3, 3, 4)


def test_time_codes_are_standardised():
    code = time_code(torch.tensor([0.0, 0.3, 1.0]), 33)
    torch.testing.assert_close(code.mean(1), torch.zeros(3), atol=1e-6, rtol=0)
    torch.testing.assert_close(code.std(1, correction=0), torch.ones(3), atol=1e-4, rtol=0)
