import pytest
import torch

from foveate.encode.atlas import Atlas, Cut, MultiScaleAttention, pooled, scales_for
from foveate.errors import InputError


def pyramid(side=16, scales=2, pool=2, seed=0):
    finest = torch.randn(1, side, side, 16, generator=torch.Generator().manual_seed(seed))
    return [finest if i == 0 else pooled(finest, pool**i) for i in range(scales)]


def block(scales, seed=0, **settings):
    torch.manual_seed(seed)
    return MultiScaleAttention(16, 2, scales, window=4, pool=2, **settings)


@pytest.mark.parametrize("power", range(1, 6))
def test_scales_end_where_one_window_holds_all(power):
    assert scales_for((4 * 2**power) ** 2, 4, 2) == power + 1


@pytest.mark.parametrize("size", [(8, 12), (9, 5), (3, 17)])
def test_windows_paste_back(size):
    x = torch.randn(2, *size, 3)
    cut = Cut(size, (min(4, size[0]), min(4, size[1])))
    windows = cut.cut(x)
    assert torch.equal(cut.paste(windows), x)
    inside = cut.inside(x.device)
    kept = windows.shape[1] * windows.shape[2] if inside is None else int(inside.sum())
    assert kept == size[0] * size[1]


def test_a_window_finds_the_coarse_one_that_covers_it():
    side, pool = 32, 2
    rows = torch.arange(side)[:, None].expand(side, side)
    places = torch.stack([rows, rows.T], -1)[None].float()
    fine, coarse = Cut((32, 32), (4, 4)), Cut((8, 8), (4, 4))
    lowest = -torch.nn.functional.max_pool2d(-places.permute(0, 3, 1, 2), pool**2).permute(0, 2, 3, 1)
    children, parents = fine.cut(places)[0], coarse.cut(lowest)[0]
    for child, parent in enumerate(fine.parents(coarse, pool**2, places.device).tolist()):
        first, last = parents[parent].amin(0), parents[parent].amax(0) + pool**2
        assert (children[child] >= first).all()
        assert (children[child] < last).all()


def test_one_scale_in_one_window_is_a_transformer_layer():
    attend, x = block(1), torch.randn(2, 4, 4, 16)
    own = attend.blocks[0]
    tokens = (x + attend.posemb[0]((4, 4))).flatten(1, 2)
    q = own.attn["q"](own.norm1_q(tokens)).unflatten(2, (2, 8)).transpose(1, 2)
    k, v = own.attn["kv"](own.norm1_kv(tokens)).unflatten(2, (2, 2, 8)).permute(2, 0, 3, 1, 4)
    weights = (q @ k.mT / 8**0.5).softmax(-1)
    tokens = tokens + own.attn["proj"]((weights @ v).transpose(1, 2).flatten(2))
    tokens = tokens + own.mlp(own.norm2(tokens))
    torch.testing.assert_close(attend([x])[0].flatten(1, 2), tokens)


def moved(attend, scales, blocks=1):
    maps = pyramid(16, scales)
    other = [m.clone() for m in maps]
    other[0][0, 1, 1] += 3
    with torch.no_grad():
        for _ in range(blocks):
            maps, other = attend(maps), attend(other)
    return (maps[0] != other[0]).any(-1)[0]


def test_without_exchange_a_pixel_moves_its_own_window_alone():
    assert moved(block(2, top_down=False, bottom_up=False), 2, blocks=2).nonzero().amax() == 3


def test_with_exchange_a_pixel_moves_everything_in_two_blocks():
    assert moved(block(3), 3, blocks=2).all()


def test_filling_is_seen_by_nobody():
    attend = block(2)
    maps = pyramid(16, 2)
    cropped = [maps[0][:, :10, :13], maps[1][:, :5, :7]]
    before = attend(cropped)
    assert [tuple(m.shape[1:3]) for m in before] == [(10, 13), (5, 7)]
    cut = Cut.cut

    def noisy(self, x):
        windows = cut(self, x)
        inside = self.inside(x.device) if x.shape[-1] > 1 else None
        return windows if inside is None else windows + 5 * (~inside)[None, :, :, None]

    Cut.cut = noisy
    try:
        after = attend(cropped)
    finally:
        Cut.cut = cut
    for a, b in zip(before, after, strict=True):
        torch.testing.assert_close(a, b)


def test_pooling_twice_is_pooling_by_the_square():
    x = torch.randn(1, 16, 16, 3)
    assert torch.equal(pooled(pooled(x, 2), 2), pooled(x, 4))


def test_layout_of_scales():
    assert sum(m.shape[1] * m.shape[2] for m in pyramid(16, 3)) == 256 * (1 + 1 / 4 + 1 / 16)


def test_the_finest_scale_is_dropped_after_its_stage():
    model = Atlas(3, dim=16, num_heads=2, depths=(1, 2, 1), window=4, pool=2, stem_depth=1).eval()
    assert [[len(b.blocks) for b in stage] for stage in model.stages] == [[3], [2, 2], [1]]
    x = torch.rand(2, 3, 128, 128)
    assert model.forward_features(x).shape == (2, 2, 2, 16)
    assert model(x).shape == (2, 3)


def test_settings_that_do_not_fit():
    with pytest.raises(InputError, match="pool the window"):
        MultiScaleAttention(16, 2, 2, window=6, pool=4)
    with pytest.raises(InputError, match="depths"):
        Atlas(3, depths=())
    with pytest.raises(InputError, match="2 scales"):
        block(2)(pyramid(16, 3))
