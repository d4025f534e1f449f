from copy import deepcopy
from functools import cache

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from foveate.errors import BudgetError, InputError, WeightsError
from foveate.layers.upscaler import enlarge, gather_strips, window_reader
from foveate.meter import count_flops
from foveate.restore import adaptive_patch_exiting as module
from foveate.restore.adaptive_patch_exiting import APE

MEAN = torch.tensor([0.4488, 0.4371, 0.4040], dtype=torch.float64).view(3, 1, 1)


def tiny(scale=2, dtype=torch.float64, **changes):
    """Four exits, one block each; the regressor is scaled so that scores spread over -1..1."""
    return deepcopy(_tiny(scale, tuple(changes.items()))).to(dtype)


@cache
def _tiny(scale, changes):
    torch.manual_seed(0)
    config = {"channels": 8, "blocks": 4, "interval": 1, "patch": 8, "step": 6} | dict(changes)
    net = APE(scale, **config).double().eval()
    net.regressor[2].weight.data *= 20
    with torch.no_grad():
        _, scores = net.all_exits(noise(64))
        net.regressor[2].bias.data -= torch.atanh(scores.clamp(-0.99, 0.99)).mean()
        net.calibrate(noise(256, seed=1))
    return net


def noise(count, h=8, w=8, seed=0, dtype=torch.float64):
    return torch.rand(count, 3, h, w, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def rendered(net, x, **how):
    with torch.no_grad():
        return gather_strips(list(net.strips(window_reader(x), *x.shape[2:], **how)))


# ---------------------------------------------------------------------- exits


def test_each_exit_is_the_shared_tail_on_the_features_so_far():
    net, x = tiny(interval=2, channels=8, blocks=5), noise(2)
    pictures, scores = net.all_exits(x)
    x0 = h = net.head(x - MEAN)
    assert net.exits == len(pictures) == 2
    for e in range(2):
        h = net.body[2 * e + 1](net.body[2 * e](h))
        torch.testing.assert_close(pictures[e], net.tail(x0 + net.body[5](h)) + enlarge(x, 2))
        linear = net.regressor[2]
        torch.testing.assert_close(scores[:, e], (h.mean((2, 3)) @ linear.weight[0] + linear.bias).tanh())
    torch.testing.assert_close(net(x), pictures[-1])


@pytest.mark.parametrize("bias", [0.0, 100.0])
def test_a_threshold_of_1_is_the_last_exit_for_all(bias):
    net, x = tiny(), noise(20)
    net.regressor[2].bias.data += bias  # scores that round to 1 must not stop a patch either
    with torch.no_grad():
        pictures, exits = net.run(x, net.by_threshold(1.0))
        torch.testing.assert_close(pictures, net(x), atol=1e-6, rtol=0)
    assert (exits == net.exits).all()


@pytest.mark.parametrize("interval", [1, 2])
def test_a_threshold_of_minus_1_is_the_first_exit_and_exactly_its_blocks(interval):
    net, x, ran = tiny(interval=interval), noise(8), []
    for i, block in enumerate(net.body):
        block.register_forward_hook(lambda *_, i=i: ran.append(i))
    with torch.no_grad():
        pictures, exits = net.run(x, net.by_threshold(-1.0))
    assert ran == [*range(interval), 4]  # the last is the closing convolution
    assert (exits == 1).all()
    torch.testing.assert_close(pictures, net.all_exits(x)[0][0], atol=1e-12, rtol=0)


@given(st.lists(st.integers(1, 4), min_size=1, max_size=20))
@settings(deadline=None, max_examples=25)
def test_a_patch_gets_its_exits_picture_as_computed_densely_whoever_else_leaves(wanted):
    net, x = NET, noise(len(wanted))
    leave = torch.tensor(wanted)
    present, asked = torch.arange(len(wanted)), []

    def stay(e, scores):
        nonlocal present
        torch.testing.assert_close(scores, DENSE(x)[1][present, e - 1], atol=1e-12, rtol=0)
        asked.append(len(scores))
        go_on = leave[present] > e
        present = present[go_on]
        return go_on

    with torch.no_grad():
        pictures, exits = net.run(x, stay)
        dense = torch.stack(DENSE(x)[0])
    assert torch.equal(exits, leave)
    torch.testing.assert_close(pictures, dense[leave - 1, torch.arange(len(wanted))], atol=1e-12, rtol=0)
    # The regressor is asked about those that are still there, and about nobody else.
    assert asked == [n for e in range(1, 4) if (n := int((leave >= e).sum()))]


NET = tiny()


def DENSE(x):
    with torch.no_grad():
        return NET.all_exits(x)


@given(st.integers(0, 999), st.floats(-1, 1), st.floats(-1, 1))
@settings(deadline=None, max_examples=25)
def test_a_higher_threshold_keeps_every_patch_at_least_as_long(seed, a, b):
    x = noise(1, 14, 20, seed)
    with torch.no_grad():
        patches = torch.cat([x[..., i : i + 8, j : j + 8] for i in (0, 6) for j in (0, 6, 12)])
        low, high = (NET.run(patches, NET.by_threshold(t))[1] for t in sorted((a, b)))
    assert (low <= high).all()
    cheap, dear = (rendered(NET, x, tau=t) for t in sorted((a, b)))
    assert cheap.flops <= dear.flops
    costs = torch.tensor(NET.exit_costs(), dtype=torch.float64)
    assert cheap.flops == pytest.approx(float(costs[low - 1].sum()) * 64)


# ---------------------------------------------------------------------- budgets and costs


def test_the_budget_is_met_and_the_easiest_patches_leave_first():
    net, x = tiny(step=8), noise(1, 64, 80)
    full, before = net.full_flops(64, 80), 0
    for share in (net.floor, *(net.floor + (1 - net.floor) * t for t in (0.1, 0.3, 0.5, 0.7, 0.9)), 1.0):
        done = net.upscale(x, share)
        assert share - 0.02 <= done.flops / full <= share + 1e-9
        assert sum(done.counts.values()) == 80
        assert done.effort.mean() == pytest.approx(done.flops / full)
        assert done.flops > before
        before = done.flops
    patches = F.unfold(x, 8, stride=8)[0].T.view(-1, 3, 8, 8)
    with torch.no_grad():
        _, exits = net.run(patches, net.by_budget(0.6, 80))
        first = net.all_exits(patches)[1][:, 0]
    assert first[exits > 1].max() <= first[exits == 1].min()


def test_survivors_cost_the_budget_and_are_never_more_than_before():
    net = tiny()
    costs = torch.tensor(net.exit_costs(), dtype=torch.float64)
    for share in (net.floor, 0.55, 0.7, 0.95):
        passing = torch.tensor([1.0, *net.survivors(share)], dtype=torch.float64)
        spent = (costs[0] + (passing[1:] * costs.diff()).sum()) / costs[-1]
        assert float(spent) == pytest.approx(share)
        assert (passing.diff() <= 1e-12).all()
    assert net.survivors(1.0) == [1, 1, 1]


def test_costs_are_those_of_the_layers_and_equally_spaced():
    net = tiny(3)
    block, last, tail = (2 * 9 * 8 * c for c in (2 * 8, 8, 27))
    steps = torch.tensor(net.exit_costs()).diff()
    torch.testing.assert_close(steps, torch.full((3,), float(block)))
    interpolation = 2 * 4 * 3 * 9
    head = net.exit_costs()[0] - block - last - tail - interpolation
    assert head in (2 * 27 * 8, 2 * 2 * 27 * 8)  # once as a whole picture, twice where features are not kept
    assert net.floor == pytest.approx(net.exit_costs()[0] / net.exit_costs()[-1])


@pytest.mark.parametrize("scale", [2, 4])
def test_reported_flops_are_those_of_the_run(scale):
    torch.manual_seed(0)
    net, x = APE(scale, patch=24, step=22).eval(), noise(1, 46, 68, dtype=torch.float32)
    net.calibrate(noise(32, 24, 24, dtype=torch.float32))
    for share in (net.floor, 0.75, 1.0):
        assert net.upscale(x, share).flops == pytest.approx(count_flops(net.upscale, x, share), rel=0.01)
    assert net.full_flops(46, 68) == net.upscale(x).flops


def test_a_budget_below_the_floor_is_refused_with_the_floor_and_the_cheaper_method():
    net = tiny()
    for share in (0.1, 0.0, float("nan")):
        with pytest.raises(BudgetError, match=rf"{net.floor:.2f} to 1 .* got {share:g}; for less, use method 'espcn'"):
            net.upscale(noise(1), share)


def test_a_budget_needs_calibration_scores_and_the_full_network_does_not():
    net, x = APE(2, 8, 4, 1).eval(), noise(1, dtype=torch.float32)
    with pytest.raises(WeightsError, match=r"calibrate\(patches\)"):
        net.upscale(x, 0.8)
    torch.testing.assert_close(net.upscale(x).image, net(x).detach())


def test_calibration_keeps_the_scores_of_every_exit():
    net, patches = tiny(), noise(256, seed=5)
    net.calibrate(patches)
    assert net.calibration.std() > 0.1
    torch.testing.assert_close(net.calibration, net.all_exits(patches)[1].detach())


# ---------------------------------------------------------------------- pictures of any size


def identity(net, monkeypatch):
    """Replace the network by one that repeats pixels."""

    def run(patches, stay):
        s = net.scale
        return patches.repeat_interleave(s, 2).repeat_interleave(s, 3), torch.full((len(patches),), net.exits)

    monkeypatch.setattr(net, "run", run)
    return net


@pytest.mark.parametrize("size", [(1, 1), (9, 30), (23, 21)])
@pytest.mark.parametrize("step", [3, 6, 8])
@pytest.mark.parametrize("strip", [1, 200, 1 << 20])
def test_cutting_and_averaging_an_identity_gives_the_picture_back(monkeypatch, size, step, strip):
    monkeypatch.setattr(module, "STRIP_PIXELS", strip)
    net, x = identity(tiny(3, step=step), monkeypatch), noise(1, *size)
    done = rendered(net, x, share=1.0)
    torch.testing.assert_close(done.image, x.repeat_interleave(3, 2).repeat_interleave(3, 3), atol=1e-12, rtol=0)
    torch.testing.assert_close(done.effort, torch.ones(1, 1, *size, dtype=torch.float64))
    assert done.flops == pytest.approx(net.full_flops(*size))


@pytest.mark.parametrize("size", [(1, 1), (5, 30), (17, 23), (40, 33)])
@pytest.mark.parametrize("tau", [1.0, 0.1, -1.0])
def test_strips_of_any_height_give_the_same_picture(monkeypatch, size, tau):
    net, x = tiny(), noise(1, *size)
    whole = rendered(net, x, tau=tau)
    for pixels in (1, 300, 600):
        monkeypatch.setattr(module, "STRIP_PIXELS", pixels)
        cut = rendered(net, x, tau=tau)
        torch.testing.assert_close(cut.image, whole.image, atol=1e-12, rtol=0)
        torch.testing.assert_close(cut.effort, whole.effort)
        assert cut.counts == whole.counts


@pytest.mark.parametrize("size", [(1, 1), (17, 23), (40, 33)])
@pytest.mark.parametrize("share", [1.0, 0.75, "floor"])
def test_tiles_give_what_the_whole_picture_gives(size, share):
    net, x = tiny(), noise(1, *size)
    share = net.floor if share == "floor" else share
    whole, cut = net.upscale(x, share), net.upscale(x, share, tile=5)
    assert torch.equal(cut.image, whole.image)
    assert cut.counts == whole.counts


def test_a_picture_smaller_than_a_patch_is_one_patch():
    net, x = tiny(), noise(2, 5, 3)
    done = net.upscale(x)
    assert done.counts == {"exit 1": 0, "exit 2": 0, "exit 3": 0, "exit 4": 2}
    torch.testing.assert_close(done.image, net(x).detach())


# ---------------------------------------------------------------------- training


@pytest.mark.parametrize("from_zero", [False, True])
def test_the_loss_is_the_error_of_every_exit_and_of_its_score(from_zero):
    net, low, high = tiny(), noise(2, 12, 13), noise(2, 24, 26, 1)
    pictures, scores = net.all_exits(low)

    def psnr(y):  # 2 + 6 pixels are shaved
        return -10 * torch.log10((y - high)[..., 8:-8, 8:-8].square().mean((1, 2, 3)))

    quality = [torch.zeros(2) if from_zero else psnr(enlarge(low, 2)), *map(psnr, pictures)]
    expected = sum(255 * (y - high).abs().mean() for y in pictures)
    for e in range(4):
        target = 1 - torch.tanh(quality[e + 1] - quality[e])
        expected = expected + (scores[:, e] - target.detach()).square().mean()
    torch.testing.assert_close(net.loss(low, high, from_zero), expected)


def test_scores_of_the_kind_error_look_ahead_to_what_the_next_stage_saves():
    net, low, high = tiny(gain="error"), noise(2, 12, 13), noise(2, 24, 26, 1)
    pictures, _ = net.all_exits(low)
    errors = [(y - high)[..., 8:-8, 8:-8].square().mean((1, 2, 3)) for y in pictures]
    targets = net.targets(low, high, pictures)
    for e in range(3):
        saved = (errors[e] - errors[e + 1]).clamp_min(1e-7)
        torch.testing.assert_close(targets[:, e], -torch.tanh((saved.log10() + 5) / 2))
    torch.testing.assert_close(targets[:, 3], torch.tensor([1.0, 1.0], dtype=torch.float64).tanh())
    with pytest.raises(InputError, match="gain 'db'"):
        tiny(gain="db")


@pytest.mark.parametrize("gain", ["psnr", "error"])
def test_a_fitted_regressor_is_nearer_to_the_targets_than_before_and_than_their_mean(gain):
    net, low = tiny(gain=gain), noise(96, 20, 20) * torch.linspace(0.1, 1, 96, dtype=torch.float64).view(-1, 1, 1, 1)
    high = enlarge(low, 2) + 0.05 * noise(96, 40, 40, 1) * low.amax((1, 2, 3), keepdim=True)

    def distance():
        with torch.no_grad():
            pictures, scores = net.all_exits(low)
        wanted = net.targets(low, high, pictures)[:, :-1].clamp(-0.99, 0.99)
        return (scores[:, :-1].atanh() - wanted.atanh()).square().mean(), wanted.atanh().var()

    before = distance()[0]
    net.fit_regressor(low, high)
    after, spread = distance()
    assert after < before
    assert after < spread


def test_a_perfect_patch_gives_a_finite_loss():
    net, low = tiny(), noise(1, 12, 12)
    assert torch.isfinite(net.loss(low, net(low).detach()))


def test_gradients_reach_every_parameter():
    net = tiny().train()
    net.loss(noise(2, 12, 12), noise(2, 24, 24, 1)).backward()
    assert [n for n, p in net.named_parameters() if p.grad is None or not p.grad.any()] == []


# ---------------------------------------------------------------------- as a model


def test_bfloat16_runs_at_every_budget():
    net, x = tiny(dtype=torch.bfloat16), noise(1, 17, 20)
    for share in (net.floor, 0.75, 1.0):
        image = net.upscale(x, share).image
        assert image.dtype == torch.bfloat16
    torch.testing.assert_close(image.double(), tiny().upscale(x).image, atol=0.05, rtol=0)


@pytest.mark.parametrize("patches", [256, 40])
def test_saving_and_loading_gives_the_same_network_and_calibration(tmp_path, patches):
    net, x = tiny(3, torch.float32, tail="edsr"), noise(1, 17, 20, dtype=torch.float32)
    net.calibrate(noise(patches, dtype=torch.float32))
    net.save_pretrained(tmp_path)
    again = APE.from_pretrained(tmp_path).eval()
    assert torch.equal(again.upscale(x, 0.8).image, net.upscale(x, 0.8).image)


def test_batch_normalisation_in_training_mode_is_refused():
    net = tiny()
    net.body[0].body.append(torch.nn.BatchNorm2d(8))
    with pytest.raises(InputError, match=r"call eval\(\)"):
        net.train().run(noise(2), net.by_threshold(0))


def test_a_threshold_that_is_no_number_is_refused():
    with pytest.raises(InputError, match="threshold is NaN"):
        rendered(tiny(), noise(1), tau=float("nan"))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"interval": 9}, r"1\.\.8 .* got 9"),
        ({"interval": 0}, "got 0"),
        ({"step": 49}, r"1\.\.48 .* got 49"),
        ({"step": 0}, "got 0"),
        ({"tail": "wide"}, "'wide'; use 'direct' or 'edsr'"),
        ({"tail": "edsr", "scale": 5}, "2, 3 or 4, got 5"),
    ],
)
def test_arguments_out_of_range_are_refused(arguments, message):
    with pytest.raises(InputError, match=message):
        APE(**arguments)


# ---------------------------------------------------------------------- official weights


def official(scale, c=8, blocks=4):
    """A made-up checkpoint with the names and shapes of EDSR's in the released code."""
    torch.manual_seed(0)
    shapes = {"head.0": (c, 3, 3, 3), f"body.{blocks}": (c, c, 3, 3), "tail.1": (3, c, 3, 3)}
    shapes |= {f"body.{i}.body.{j}": (c, c, 3, 3) for i in range(blocks) for j in (0, 2)}
    shapes |= {f"tail.0.{i}": (c * (9 if scale == 3 else 4), c, 3, 3) for i in ((0, 2) if scale == 4 else (0,))}
    state = {f"{name}.weight": torch.randn(shape) / 8 for name, shape in shapes.items()}
    state |= {f"{name}.bias": torch.randn(shape[0]) / 8 for name, shape in shapes.items()}
    state |= {"regressor.2.weight": torch.randn(1, c), "regressor.2.bias": torch.randn(1)}
    for name, sign in (("sub_mean", -255), ("add_mean", 255)):
        state |= {f"{name}.weight": torch.eye(3).view(3, 3, 1, 1), f"{name}.bias": sign * MEAN.float().flatten()}
    return state


def by_the_book(state, x, scale, interval, res_scale):
    """Pictures and scores of all exits as the paper draws them, on a state dict; values in 0..255."""

    def conv(x, name):
        weight = state[f"{name}.weight"]
        return F.conv2d(x, weight, state[f"{name}.bias"], padding=weight.shape[2] // 2)

    x0 = h = conv(conv(x, "sub_mean"), "head.0")
    blocks = sum(k.endswith("body.0.weight") for k in state)
    pictures, scores = [], []
    for i in range(blocks):
        h = h + res_scale * conv(conv(h, f"body.{i}.body.0").relu(), f"body.{i}.body.2")
        if (i + 1) % interval == 0:
            y = x0 + conv(h, f"body.{blocks}")
            for j, step in enumerate({2: [2], 3: [3], 4: [2, 2]}[scale]):
                y = F.pixel_shuffle(conv(y, f"tail.0.{2 * j}"), step)
            pictures.append(conv(conv(y, "tail.1"), "add_mean"))
            scores.append(F.linear(h.mean((2, 3)), state["regressor.2.weight"], state["regressor.2.bias"]).tanh())
    return pictures, torch.cat(scores, 1)


@pytest.mark.parametrize(("scale", "channels", "res_scale"), [(2, 8, 1.0), (3, 8, 1.0), (4, 8, 1.0), (2, 72, 0.1)])
def test_an_official_checkpoint_gives_the_published_network(scale, channels, res_scale):
    state, x = official(scale, channels), noise(2, 5, 6, dtype=torch.float32)
    net = APE.load_official(state, scale, interval=2)
    assert not net.training
    with torch.no_grad():
        pictures, scores = by_the_book(state, x * 255, scale, 2, res_scale)
        ours, our_scores = net.all_exits(x)
    for mine, theirs in zip(ours, pictures, strict=True):
        torch.testing.assert_close(mine * 255, theirs, atol=1e-2, rtol=1e-4)
    torch.testing.assert_close(our_scores, scores, atol=1e-4, rtol=1e-4)


def test_a_checkpoint_with_a_key_missing_or_too_many_is_refused():
    state = official(4)
    for missing in (k for k in state if "mean" not in k):
        with pytest.raises(WeightsError):
            APE.load_official({k: v for k, v in state.items() if k != missing}, interval=2)
    with pytest.raises(WeightsError, match="more"):
        APE.load_official(state | {"more": torch.zeros(1)}, interval=2)
    with pytest.raises(WeightsError):
        APE.load_official({k: v for k, v in state.items() if not k.startswith("body.")})
    with pytest.raises(WeightsError, match="no APE-EDSR"):
        APE.load_official({})
