import math
from itertools import pairwise

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from foveate.engine.tiles import plan
from foveate.errors import BudgetError, InputError
from foveate.layers import upscaler
from foveate.layers.implicit import queries
from foveate.layers.upscaler import enlarge, gather_strips, window_reader
from foveate.meter import count_flops
from foveate.ops import use
from foveate.restore import pcsr
from foveate.restore.pcsr import PCSR, probes, refine

TINY = {"encoder_config": {"channels": 8, "blocks": 1}, "heavy": [40, 40, 40], "light": [4], "classifier": [4]}


def tiny(scale=2, dtype=torch.float64, **changes):
    torch.manual_seed(0)
    return PCSR(scale, **(TINY | changes)).to(dtype).eval()


def picture(h, w, seed=0, dtype=torch.float64):
    return torch.rand(1, 3, h, w, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def answered(net, mlp, x):
    """A head by its definition: every output pixel a query. Shape: [1, outputs, s*h, s*w]."""
    h, w = x.shape[2] * net.scale, x.shape[3] * net.scale
    return mlp(queries(net.encoder(x), h, w)).transpose(1, 2).unflatten(2, (h, w))


def flags_of(net, x, threshold):
    """Which output pixels are heavy, by the definition of the score. Shape: [1, 1, s*h, s*w]."""
    logits = answered(net, net.classifier, x)
    return logits[:, 1:] - logits[:, :1] > threshold


# ---------------------------------------------------------------------- the heads


@given(st.integers(1, 7), st.integers(1, 7), st.integers(1, 4), st.sampled_from([[], [6], [9, 5]]), st.integers(0, 99))
@settings(deadline=None, max_examples=30)
def test_the_network_is_the_plain_definition(h, w, scale, heavy, seed):
    net, x = tiny(scale, heavy=heavy), picture(h, w, seed)
    expected = answered(net, net.heavy, x) + F.interpolate(x, size=(h * scale, w * scale), mode="bilinear")
    torch.testing.assert_close(net(x), expected, atol=1e-12, rtol=0)


def test_all_heavy_is_the_network_of_phase_0_bit_for_bit_and_all_light_its_light_head():
    net, x = tiny(), picture(9, 11)
    with torch.no_grad():
        rows, base = net._rows(net.encoder(x)), enlarge(x, 2)
        assert torch.equal(net._assemble(net.colours(rows, None, 1.0)[0], base), net(x))
        colours, flags = net.colours(rows, -math.inf)
        assert flags.all()
        torch.testing.assert_close(net._assemble(colours, base), net(x), atol=1e-12, rtol=0)
        colours, flags = net.colours(rows, math.inf)
        assert not flags.any()
        light = answered(net, net.light, x) + base
        torch.testing.assert_close(net._assemble(colours, base), light, atol=1e-12, rtol=0)


@pytest.mark.parametrize("scale", [1, 2, 3, 4])
@pytest.mark.parametrize("size", [(1, 1), (5, 8)])
def test_gathered_and_scattered_is_the_choice_between_the_dense_heads(scale, size):
    net, x = tiny(scale), picture(*size)
    with torch.no_grad():
        threshold = float(net.scores(net._rows(net.encoder(x))).median()) - 1e-9
        colours, flags = net.colours(net._rows(net.encoder(x)), threshold)
        heavy = flags_of(net, x, threshold)
        assert torch.equal(net._picture_of(flags, *size), heavy)
        dense = torch.where(heavy, answered(net, net.heavy, x), answered(net, net.light, x))
        nothing = torch.zeros(1, 3, size[0] * scale, size[1] * scale, dtype=torch.float64)
        torch.testing.assert_close(net._assemble(colours, nothing), dense, atol=1e-12, rtol=0)


@pytest.mark.parametrize("chunk", [1, 7, 64])
def test_the_result_does_not_depend_on_the_chunks(monkeypatch, chunk):
    net, x = tiny(), picture(9, 11)
    expected = net.upscale(x, 0.8)
    monkeypatch.setattr(pcsr, "CHUNK", chunk)
    monkeypatch.setattr(pcsr, "HEAVY_ROWS", 4 * chunk)
    for share in (0.8, 1.0):
        torch.testing.assert_close(net.upscale(x, share).image, tiny().upscale(x, share).image, atol=1e-12, rtol=0)
    assert net.upscale(x, 0.8).counts == expected.counts


def test_a_threshold_on_the_score_is_the_papers_cost_weighted_choice():
    net, x = tiny(), picture(12, 12)
    with torch.no_grad():
        p = answered(net, net.classifier, x).softmax(1)
        encoder = count_flops(net.encoder, x)
        heads = [count_flops(mlp, queries(net.encoder(x), 24, 24)) for mlp in (net.light, net.heavy)]
        cost = [(encoder + head) / (2 * encoder + sum(heads)) for head in heads]
        shares = []
        for k in (-25, -1, -0.1, 0, 0.1, 1, 2, 25):
            chosen = (p / torch.tensor(cost).pow(k).view(1, 2, 1, 1)).argmax(1, keepdim=True) == 1
            _, flags = net.colours(net._rows(net.encoder(x)), k * math.log(cost[1] / cost[0]))
            assert torch.equal(net._picture_of(flags, 12, 12), chosen)
            shares.append(float(chosen.double().mean()))
    assert shares == sorted(shares, reverse=True)
    assert shares[0] == 1
    assert shares[-1] == 0


@pytest.mark.parametrize("heavy", [[], [24], [24, 24]])
@pytest.mark.parametrize("share", [0.0, 0.4, 1.0])
def test_fast_kernels_give_what_the_reference_gives(heavy, share):
    net, x = tiny(3, torch.float32, heavy=heavy, classifier=[4]), picture(9, 11, dtype=torch.float32)
    with torch.no_grad():
        rows = net._rows(net.encoder(x))
        threshold = net._threshold(net.scores(rows), share)
        fast = net.colours(rows, threshold)
        with use("reference"):
            plain = net.colours(rows, threshold)
    assert torch.equal(fast[1], plain[1])
    torch.testing.assert_close(fast[0], plain[0], atol=1e-5, rtol=0)


# ---------------------------------------------------------------------- budgets and costs


@pytest.mark.parametrize("scale", [2, 3, 4])
def test_the_budget_is_met_and_more_budget_is_never_less_heavy(scale):
    net, x = tiny(scale, classifier=[]), picture(64, 80)  # a linear classifier gives no two pixels the same score
    full, before = net.full_flops(64, 80), -1
    for share in (net.floor, *(net.floor + (1 - net.floor) * t for t in (0.1, 0.3, 0.6, 0.9)), 1.0):
        done = net.upscale(x, share)
        assert share - 0.02 <= done.flops / full <= share + 1e-9
        assert done.counts["heavy"] + done.counts["light"] == 64 * 80 * scale**2
        assert done.counts["heavy"] > before
        before = done.counts["heavy"]
        assert done.effort.shape == (1, 1, 64, 80)
        assert 0 < done.effort.min() <= done.effort.max() <= 1
    assert before == 64 * 80 * scale**2
    assert done.effort.min() == 1


@pytest.mark.parametrize("scale", [2, 3])
def test_the_budget_is_met_where_the_threshold_rests_on_a_sample_of_the_scores(monkeypatch, scale):
    net, x = tiny(scale, classifier=[]), picture(40, 50)
    net.classifier.layers[0].weight.data[:, 8:] *= 20  # the score depends on the sub-pixel as much as on the feature
    n = 40 * 50 * scale**2
    for stride in (2, 3, 8, 9):
        monkeypatch.setattr(pcsr, "SAMPLES", n // stride)
        done = net.upscale(x, 0.75)
        assert done.flops / net.full_flops(40, 50) == pytest.approx(0.75, abs=0.02), f"one of {stride} scores"


def test_the_cost_is_the_encoder_and_the_heads_and_rises_with_the_heavy_share():
    net = tiny(2)
    encoder = 2 * 9 * (3 * 8 + 3 * 8 * 8)
    heavy = [2 * 8 * 40, 2 * (40 * 40 + 40 * 40 + 40 * 3)]  # per feature, per output pixel
    small = 2 * 8 * (4 + 4) + 4 * 2 * (4 * 3 + 4 * 2)  # light head and classifier
    assert net.cost(1.0) == encoder + heavy[0] + 4 * heavy[1]
    for share in (0.0, 0.25, 0.9):
        assert net.cost(share) == pytest.approx(encoder + heavy[0] + small + share * 4 * heavy[1])
    assert net.floor == pytest.approx(net.cost(0) / net.cost(1))
    assert net.heavy_share(net.cost(0.3) / net.cost(1)) == pytest.approx(0.3)
    assert net.heavy_share(net.floor) == pytest.approx(0, abs=1e-12)


@pytest.mark.parametrize("scale", [2, 4])
def test_reported_flops_are_those_of_the_run(scale):
    torch.manual_seed(0)
    net, x = PCSR(scale).eval(), picture(24, 20, dtype=torch.float32)
    for share in (net.floor, 0.5 + net.floor / 2, 1.0):
        with use("reference"):  # the counter does not see into fast kernels
            counted = count_flops(net.upscale, x, share)
        assert net.upscale(x, share).flops == pytest.approx(counted, rel=0.01)


@pytest.mark.parametrize("tile", [32, 12])
def test_flops_that_finding_a_threshold_costs_are_reported_too(tile):
    torch.manual_seed(0)
    net, x = PCSR(4).eval(), picture(24, 20, dtype=torch.float32)
    reported = net.upscale(x, 0.75, tile).flops
    with use("reference"):
        counted = count_flops(net.upscale, x, 0.75, tile)
    windows = [t.window for t in plan(24, 20, tile, net.encoder.halo)]
    overlap = sum((x1 - x0) * (y1 - y0) for x0, y0, x1, y1 in windows) - 24 * 20
    assert reported == pytest.approx(counted - overlap * count_flops(net.encoder, x) / (24 * 20), rel=0.01)


@pytest.mark.parametrize("share", [0.01, 0.0, 1.5, float("nan")])
def test_a_budget_below_the_floor_is_refused_with_the_floor_and_the_cheaper_method(share):
    net = tiny()
    with pytest.raises(BudgetError, match=rf"{net.floor:.2f} to 1 .* got {share:g}; for less, use method 'espcn'"):
        net.upscale(picture(4, 4), share)


# ---------------------------------------------------------------------- pictures of any size


@pytest.mark.parametrize("size", [(1, 1), (3, 5), (17, 23), (40, 33)])
@pytest.mark.parametrize("refined", [False, True])
@pytest.mark.parametrize("share", [1.0, 0.75, "floor"])
def test_tiles_give_what_the_whole_picture_gives(size, refined, share):
    net, x = tiny(refine=refined), picture(*size)
    share = net.floor if share == "floor" else share
    whole = net.upscale(x, share)
    for tile in (1, 8, 19) if max(size) < 20 else (8, 19):
        cut = net.upscale(x, share, tile)
        torch.testing.assert_close(cut.image, whole.image, atol=1e-10, rtol=0)
        torch.testing.assert_close(cut.effort, whole.effort)
        assert cut.counts == whole.counts


@pytest.mark.parametrize("size", [(40, 50), (12, 90), (90, 5)])
def test_a_large_picture_is_streamed_with_one_threshold(monkeypatch, size):
    for module in (upscaler, pcsr):
        monkeypatch.setattr(module, "STRIP_PIXELS", 320)
    monkeypatch.setattr(pcsr, "PROBE", 8)
    net, x = tiny(refine=True), picture(*size)
    with torch.no_grad():
        read = window_reader(x)
        strips = list(net.strips(read, *size, 0.75))
        assert len(strips) == -(-size[0] // max(16, 320 // size[1]))
        whole = gather_strips(strips)
        heavy = flags_of(net, x, net.decide(read, *size, 0.75))
        expected = enlarge(x, 2) + torch.where(heavy, answered(net, net.heavy, x), answered(net, net.light, x))
    torch.testing.assert_close(whole.image, refine(expected, heavy), atol=1e-10, rtol=0)
    torch.testing.assert_close(whole.image, net.upscale(x, 0.75, tile=11).image, atol=1e-10, rtol=0)
    assert whole.counts["heavy"] == int(heavy.sum())
    assert whole.counts["heavy"] / heavy.numel() <= net.heavy_share(0.75) + 0.1


@given(st.integers(1, 300), st.integers(1, 64), st.integers(1, 8))
@settings(deadline=None, max_examples=40)
def test_probes_lie_apart_and_inside(length, side, count):
    starts = probes(length, side, count)
    assert len(starts) == min(count, length // side)
    assert all(0 <= a <= length - side for a in starts)
    assert all(b - a >= side for a, b in pairwise(starts))


def test_pictures_of_a_batch_do_not_see_each_other():
    net, x = tiny(), torch.cat([picture(6, 7), picture(6, 7, 1)])
    both = net.upscale(x, 0.75)
    alone = [net.upscale(one[None], 0.75) for one in x]
    torch.testing.assert_close(both.image, torch.cat([a.image for a in alone]))
    assert both.flops == sum(a.flops for a in alone)


# ---------------------------------------------------------------------- refinement


def test_refinement_averages_light_pixels_beside_heavy_ones_and_spares_the_border():
    x, heavy = picture(9, 10), torch.zeros(1, 1, 9, 10, dtype=torch.bool)
    heavy[..., 4, 5] = heavy[..., 0, 0] = heavy[..., 1, 8] = True
    expected = x.clone()
    light_beside = [(1, 1), (1, 7), *((y, x) for y in (3, 4, 5) for x in (4, 5, 6) if (y, x) != (4, 5)), (2, 7), (2, 8)]
    for i, j in light_beside:
        expected[..., i, j] = x[..., i - 1 : i + 2, j - 1 : j + 2].mean((2, 3))
    torch.testing.assert_close(refine(x, heavy), expected)


@pytest.mark.parametrize(("top", "bottom"), [(False, True), (True, False), (False, False)])
def test_refinement_of_a_strip_spares_only_true_borders(top, bottom):
    x, heavy = picture(4, 5), torch.zeros(1, 1, 4, 5, dtype=torch.bool)
    heavy[..., 1:3, 2] = True
    changed = (refine(x, heavy, top, bottom) != x).any(1)[0]
    assert changed[0, 1:4].tolist() == [not top] * 3
    assert changed[3, 1:4].tolist() == [not bottom] * 3
    assert not changed[:, 0].any()
    assert not changed[:, 4].any()


@pytest.mark.parametrize("size", [(1, 1), (1, 6), (2, 2)])
def test_refinement_leaves_pictures_without_an_inside_alone(size):
    x, heavy = picture(*size), torch.zeros(1, 1, *size, dtype=torch.bool)
    heavy[..., 0, 0] = True
    assert torch.equal(refine(x, heavy), x)


# ---------------------------------------------------------------------- training


def test_the_losses_are_the_published_ones():
    net, low, high = tiny(), picture(5, 6), picture(10, 12, 1)
    torch.testing.assert_close(net.dense_loss(low, high), (net(low) - high).abs().mean())
    p = answered(net, net.classifier, low).softmax(1)
    mixed = p[:, :1] * answered(net, net.light, low) + p[:, 1:] * answered(net, net.heavy, low) + enlarge(low, 2)
    half = 10 * 12 / 2
    expected = 1000 * (mixed - high).abs().mean() + 3 * (p[:, 1].sum() - half).abs() / half
    torch.testing.assert_close(net.routed_loss(low, high), expected)


def test_drawn_subpixels_are_pixels_of_the_target():
    net, low, high = tiny(3), picture(4, 5), picture(12, 15, 1)
    errors = (net(low) - high).abs()
    means = F.pixel_unshuffle(errors, 3).unflatten(1, (3, 9)).mean((0, 1, 3, 4))
    for seed in range(5):
        torch.manual_seed(seed)
        assert (means - net.dense_loss(low, high, 1)).abs().min() < 1e-12


def test_gradients_of_both_phases_together_reach_every_parameter():
    net, low, high = tiny().train(), picture(8, 8), picture(16, 16, 1)
    net.routed_loss(low, high).backward()
    second = {n for n, p in net.named_parameters() if p.grad is not None and p.grad.any()}
    assert second == {n for n, _ in net.named_parameters() if n.startswith(("light", "classifier"))}
    net.dense_loss(low, high).backward()
    assert all(p.grad is not None and p.grad.any() for p in net.parameters())


def test_the_second_phase_does_not_move_the_statistics_of_the_frozen_encoder():
    net = tiny(encoder="carn", encoder_config={"channels": 8}).train()
    before = {k: v.clone() for k, v in net.state_dict().items()}
    net.routed_loss(picture(8, 8), picture(16, 16, 1))
    assert [k for k, v in net.state_dict().items() if not torch.equal(v, before[k])] == []
    assert net.training


# ---------------------------------------------------------------------- as a model


def test_bfloat16_runs_at_every_budget():
    net, x = tiny(dtype=torch.bfloat16, refine=True), picture(9, 8)
    for share in (net.floor, 0.75, 1.0):
        image = net.upscale(x, share).image
        assert image.dtype == torch.bfloat16
        assert torch.isfinite(image).all()
    torch.testing.assert_close(image.double(), tiny().upscale(x).image, atol=0.05, rtol=0)


@pytest.mark.parametrize("encoder", ["residual", "carn"])
def test_saving_and_loading_gives_the_same_network(tmp_path, encoder):
    config = {"channels": 8, "blocks": 1} if encoder == "residual" else {"channels": 8, "groups": 2}
    net = tiny(3, torch.float32, encoder=encoder, encoder_config=config, refine=True)
    net.save_pretrained(tmp_path)
    again, x = PCSR.from_pretrained(tmp_path).eval(), picture(7, 6, dtype=torch.float32)
    assert again.refine
    assert torch.equal(again.upscale(x, 0.8).image, net.upscale(x, 0.8).image)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [({"encoder": "vgg"}, "'vgg'; use one of residual, fsrcnn, carn"), ({"scale": 1.5}, "1.5"), ({"scale": 0}, "0")],
)
def test_arguments_out_of_range_are_refused(arguments, message):
    with pytest.raises(InputError, match=message):
        PCSR(**arguments)
