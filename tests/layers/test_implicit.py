import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from foveate.layers.implicit import MLP, queries, subpixel_offsets
from foveate.meter import count_flops
from foveate.ops import use

SIDES, SCALES, SEEDS = st.integers(1, 6), st.integers(1, 5), st.integers(0, 2**32 - 1)


def features(channels, h, w, seed=0):
    return torch.randn(2, channels, h, w, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@given(SIDES, SIDES, SCALES, SEEDS)
@settings(deadline=None, max_examples=40)
def test_at_a_whole_scale_a_query_is_the_repeated_feature_and_the_tiled_offset(h, w, s, seed):
    f = features(3, h, w, seed)
    z = queries(f, h * s, w * s).view(2, h * s, w * s, 7)
    repeated = f.repeat_interleave(s, 2).repeat_interleave(s, 3).permute(0, 2, 3, 1)
    tiled = subpixel_offsets(s).view(s, s, 4).tile(h, w, 1)
    assert torch.equal(z[..., :3], repeated)
    torch.testing.assert_close(z[..., 3:], tiled.expand(2, -1, -1, -1), atol=1e-12, rtol=0)


@given(SIDES, SIDES, st.integers(1, 20), st.integers(1, 20))
@settings(deadline=None, max_examples=40)
def test_at_any_size_a_query_lies_within_its_nearest_pixel(h, w, height, width):
    z = queries(features(1, h, w), height, width)
    assert z.shape == (2, height * width, 5)
    assert z[..., 1:3].abs().max() <= 1 + 1e-9  # a low-resolution pixel is 2 wide
    cell = torch.tensor([2 * h / height, 2 * w / width], dtype=torch.float64)
    torch.testing.assert_close(z[0, 0, 3:], cell)


@given(st.integers(1, 9), st.lists(st.integers(1, 6), max_size=3), SCALES, SEEDS)
@settings(deadline=None, max_examples=40)
def test_the_split_first_layer_gives_what_the_plain_definition_gives(count, hidden, s, seed):
    torch.manual_seed(seed)
    mlp = MLP(3 + 4, hidden, 2).double()
    rows, offsets = torch.randn(count, 3, dtype=torch.float64), subpixel_offsets(s)
    pairs = torch.cat([rows.repeat_interleave(s * s, 0), offsets.repeat(count, 1)], 1)
    plain = mlp(pairs).view(count, s * s, 2)
    torch.testing.assert_close(mlp.everywhere(rows, offsets), plain, atol=1e-12, rtol=1e-12)
    with torch.no_grad():
        torch.testing.assert_close(mlp.everywhere(rows, offsets), plain, atol=1e-12, rtol=1e-12)


@pytest.mark.parametrize("hidden", [[], [5], [6, 5]])
def test_the_cost_is_what_runs_but_for_the_handful_of_offsets(hidden):
    mlp, rows, offsets = MLP(8 + 4, hidden, 3), torch.zeros(100, 8), subpixel_offsets(3).float()
    per_feature, per_pixel = mlp.cost(9)
    of_offsets = 2 * 9 * 4 * (hidden or [3])[0]
    with use("reference"):  # the counter does not see into fast kernels
        counted = count_flops(mlp.everywhere, rows, offsets)
    assert 100 * (per_feature + 9 * per_pixel) + of_offsets == counted


def test_a_combination_of_outputs_is_folded_into_the_last_layer():
    torch.manual_seed(0)
    rows, offsets, combine = torch.randn(5, 3).double(), subpixel_offsets(2), torch.tensor([[-1.0, 1.0]]).double()
    for hidden in ([], [6], [6, 5]):
        mlp = MLP(3 + 4, hidden, 2).double()
        both = mlp.everywhere(rows, offsets)
        torch.testing.assert_close(mlp.everywhere(rows, offsets, combine)[..., 0], both[..., 1] - both[..., 0])


@given(SIDES, SIDES, st.integers(1, 20), st.integers(1, 20), SEEDS)
@settings(deadline=None, max_examples=40)
def test_a_query_is_what_its_definition_says(h, w, height, width, seed):
    f = features(3, h, w, seed)
    z = queries(f, height, width).view(2, height, width, 7)
    for i, j in {(0, 0), (height // 2, width // 3), (height // 3, width // 2), (height - 1, width - 1)}:
        qy, qx = -1 + (2 * i + 1) / height, -1 + (2 * j + 1) / width
        # rel is the distance to the nearest centre in half pixels; a point midway between two may take either.
        rel_y, rel_x = z[0, i, j, 3].item(), z[0, i, j, 4].item()
        y, x = ((qy - rel_y / h + 1) * h - 1) / 2, ((qx - rel_x / w + 1) * w - 1) / 2
        assert (y, x) == (pytest.approx(round(y), abs=1e-9), pytest.approx(round(x), abs=1e-9))
        for at, chosen, size in ((qy, round(y), h), (qx, round(x), w)):
            distances = [abs(at - (-1 + (2 * k + 1) / size)) for k in range(size)]
            assert distances[chosen] == pytest.approx(min(distances), abs=1e-9)
        assert torch.equal(z[:, i, j, :3], f[:, :, round(y), round(x)])
        assert z[0, i, j, 5:].tolist() == pytest.approx([2 * h / height, 2 * w / width])


def test_an_offset_runs_over_the_rows_of_a_pixel_first():
    assert subpixel_offsets(1).tolist() == [[0, 0, 2, 2]]
    third = subpixel_offsets(3)
    assert third[:, :2].mul(3).round().tolist() == [[y, x] for y in (-2, 0, 2) for x in (-2, 0, 2)]
    assert third[:, 2:].unique().tolist() == [2 / 3]


@pytest.mark.parametrize("combine", [None, torch.tensor([[-1.0, 1.0]]), torch.tensor([[1.0, 0], [1, 1], [0, 2]])])
@pytest.mark.parametrize("hidden", [[], [5], [6, 5], [4, 6, 5]])
def test_fast_kernels_give_what_the_plain_definition_gives(hidden, combine):
    torch.manual_seed(0)
    mlp, rows, offsets = MLP(3 + 4, hidden, 2), torch.randn(7, 3), subpixel_offsets(3).float()
    plain = mlp(torch.cat([rows.repeat_interleave(9, 0), offsets.repeat(7, 1)], 1)).view(7, 9, 2)
    expected = plain if combine is None else torch.einsum("ko,nso->nsk", combine, plain)
    with torch.no_grad():
        torch.testing.assert_close(mlp.everywhere(rows, offsets, combine), expected, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(mlp.everywhere(rows, offsets, combine), expected, atol=1e-5, rtol=1e-5)


def test_split_and_rest_join_to_the_plain_definition_on_any_queries():
    torch.manual_seed(0)
    mlp, rows, offsets = MLP(3 + 4, [6, 5], 2).double(), torch.randn(7, 3).double(), subpixel_offsets(2)
    n, s = torch.tensor([0, 6, 6, 3]), torch.tensor([3, 0, 2, 1])
    per_feature, per_offset = mlp.split(rows, offsets)
    joined = mlp.rest(torch.relu(per_feature[n] + per_offset[s]))
    torch.testing.assert_close(joined, mlp(torch.cat([rows[n], offsets[s]], 1)), atol=1e-12, rtol=1e-12)


def test_gradients_reach_every_parameter_through_everywhere():
    mlp = MLP(3 + 4, [6, 5], 2)
    mlp.everywhere(torch.randn(7, 3), subpixel_offsets(2).float()).square().sum().backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in mlp.parameters())


def test_the_layers_alternate_with_relu_and_end_without():
    mlp = MLP(7, [6, 5], 2)
    assert [(m.in_features, m.out_features) for m in mlp.linears] == [(7, 6), (6, 5), (5, 2)]
    assert [type(m).__name__ for m in mlp.layers] == ["Linear", "ReLU", "Linear", "ReLU", "Linear"]
