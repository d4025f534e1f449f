import pytest
import torch

from foveate.errors import InputError
from foveate.layers.patch import PatchEmbed, resample_positions


def test_a_token_is_a_linear_map_of_its_patch():
    torch.manual_seed(0)
    embed, x = PatchEmbed(3, 5, 4).double(), torch.rand(2, 3, 8, 12, dtype=torch.float64)
    y = embed(x)
    patch = x[1, :, 4:8, 8:12].flatten()
    torch.testing.assert_close(y[1, :, 1, 2], embed.proj.weight.flatten(1) @ patch + embed.proj.bias)
    assert y.shape == (2, 5, 2, 3)


@pytest.mark.parametrize(("height", "width"), [(8, 9), (5, 12), (1, 1)])
def test_sides_are_padded_with_zeros_to_the_right_and_below(height, width):
    embed, x = PatchEmbed(3, 5, 4), torch.rand(1, 3, height, width)
    whole = torch.zeros(1, 3, -(-height // 4) * 4, -(-width // 4) * 4)
    whole[..., :height, :width] = x
    torch.testing.assert_close(embed(x), embed(whole))


def test_positions_keep_their_prefix_and_their_shape_on_another_grid():
    grid = torch.linspace(0, 1, 8).expand(6, 8).reshape(1, 48, 1)  # rises along a row, the same in all rows
    positions = torch.cat([torch.full((1, 1, 1), 7.0), grid], 1)
    found = resample_positions(positions, (6, 8), (3, 16))
    assert found.shape == (1, 49, 1)
    assert found[0, 0, 0] == 7
    rows = found[0, 1:, 0].view(3, 16)
    torch.testing.assert_close(rows, rows[:1].expand(3, 16))
    assert (rows.diff(dim=1) > 0).all()
    assert resample_positions(positions, (6, 8), (6, 8)) is positions
    assert resample_positions(positions.bfloat16(), (6, 8), (3, 4)).dtype == torch.bfloat16


def test_too_few_positions_are_refused():
    with pytest.raises(InputError, match=r"5 positions do not fill a grid of \(2, 3\)"):
        resample_positions(torch.zeros(1, 5, 2), (2, 3), (2, 2))
