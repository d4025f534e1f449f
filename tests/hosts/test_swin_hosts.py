"""Windows cut, run and pasted one by one are the host's own blocks."""

import pytest
import torch
from torch import nn
from torch.utils._pytree import tree_leaves

from foveate import hosts
from foveate.errors import InputError

SIZES = [(32, 32), (28, 36)]
"""The second has to be padded to whole windows."""


def outputs(model, x):
    with torch.no_grad():
        return [leaf for leaf in tree_leaves(model(x)) if isinstance(leaf, torch.Tensor)]


def by_windows(block, keep=None):
    """A block run on its windows; those not kept stay as they are."""

    def fn(run, x):
        grid = (x.shape[1], x.shape[2])
        windows, mask, inside = block.cut(x), block.mask(grid, x), block.inside(grid, x)
        chosen = torch.arange(windows.shape[1]) if keep is None else keep(windows)
        parts = [None if part is None else part[chosen].repeat(len(x), 1, 1) for part in (mask, inside)]
        out = windows.clone()
        out[:, chosen] = block.run(windows[:, chosen].flatten(0, 1), *parts).unflatten(0, (len(x), len(chosen)))
        return block.paste(out, grid)

    return fn


@pytest.mark.parametrize("size", SIZES)
def test_all_windows_together_are_the_block(a_swin, size):
    host, x = hosts.swin(a_swin), torch.rand(2, 3, *size)
    before = outputs(a_swin, x)
    handles = [block.patch(by_windows(block)) for block in host.blocks]
    during = outputs(a_swin, x)
    for handle in reversed(handles):
        handle.remove()
    for a, b in zip(before, during, strict=True):
        torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-5)
    assert all(torch.equal(a, b) for a, b in zip(before, outputs(a_swin, x), strict=True))


@pytest.mark.parametrize("size", SIZES)
def test_some_windows_are_what_the_block_makes_of_them_and_the_others_stay(a_swin, size):
    host, x = hosts.swin(a_swin), torch.rand(2, 3, *size)
    for block in host.stages[0].blocks:
        seen = []
        with block.patch(lambda run, x, seen=seen: seen.append((x, run(x))) or seen[0][1]):
            outputs(a_swin, x)
        before, after = seen[0]
        grid = (before.shape[1], before.shape[2])
        with torch.no_grad():
            y = by_windows(block, lambda windows: torch.tensor([1, 3]))(None, before)
        pasted = block.cut(torch.ones(1, *grid, 1)).zero_()
        pasted[:, [1, 3]] = 1
        kept = block.paste(pasted, grid)[0, ..., 0] > 0
        torch.testing.assert_close(y[:, kept], after[:, kept], atol=1e-5, rtol=1e-5)
        assert torch.equal(y[:, ~kept], before[:, ~kept])
        assert 0 < kept.sum() < kept.numel()


@pytest.mark.parametrize("size", SIZES)
def test_pasting_undoes_cutting(a_swin, size):
    grid = (size[0] // 4, size[1] // 4)
    for block in hosts.swin(a_swin).stages[0].blocks:
        x = torch.rand(2, *grid, 3)
        assert torch.equal(block.paste(block.cut(x), grid), x)


def test_every_other_block_is_shifted_and_its_mask_parts_what_was_apart(a_swin):
    first, second = hosts.swin(a_swin).stages[0].blocks
    x = torch.rand(1, 8, 8, 1)
    assert first.size((8, 8)) == (4, 0)
    assert second.size((8, 8)) == (4, 2)
    assert first.mask((8, 8), x) is None
    mask = second.mask((8, 8), x)
    assert mask.shape == (4, 16, 16)
    assert not mask[0].any()
    assert mask[3].count_nonzero() == 16 * 12
    assert set(mask.unique().tolist()) == {0.0, -100.0}


def test_features_are_the_last_map(a_swin):
    host = hosts.swin(a_swin)
    assert (host.width, host.patch, len(host.blocks)) == (16, 4, 4)
    with torch.no_grad():
        assert host.features(torch.rand(1, 3, 28, 36)).shape == (1, 16, 4, 5)
    assert host.stages[0].shrink is not None
    assert host.stages[1].shrink is None
    assert host.name_of(host.blocks[0].norm1).endswith("blocks.0.layernorm_before")


def test_models_without_windows_are_refused():
    with pytest.raises(InputError, match="neither is nor holds a Swin transformer"):
        hosts.swin(nn.Linear(2, 2))
