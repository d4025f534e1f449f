"""Proofs of the restore wing: the baselines are what they claim to be, and the verdicts can fail."""

import math
from types import ModuleType

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from foveate.errors import InputError
from foveate.meter import Comparison, count_parameters
from foveate.proofs import Evidence, ProofContext
from foveate.proofs.restore import _shared, adaptive_patch_exiting, espcn, pcsr, scnet
from foveate.proofs.restore._shared import HELD_OUT, NATURAL, Pair, crops, measured_pairs, pair, quality, train
from foveate.restore.adaptive_patch_exiting import APE
from foveate.restore.espcn import ESPCN
from foveate.restore.pcsr import PCSR
from foveate.restore.scnet import SCNet, SCResBlock


def picture(height: int = 48, width: int = 60, seed: int = 0) -> Tensor:
    """Smooth on the left, rough on the right."""
    dice = torch.Generator().manual_seed(seed)
    ramp = torch.linspace(0.2, 0.8, width).expand(3, height, width)
    return (ramp + 0.2 * torch.randn(3, height, width, generator=dice) * torch.linspace(0, 1, width)).clamp(0, 1)


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> ProofContext:
    """A context in which every proof sees small pictures, trains for two steps and times each thing once."""
    photographs = [(n, picture(132, 136, i)) for i, n in enumerate(dict.fromkeys([*NATURAL, *HELD_OUT, "brick"]))]
    monkeypatch.setattr(ProofContext, "photographs", lambda self: photographs)
    monkeypatch.setattr("foveate.weights.available", dict)
    for module, steps in ((espcn, 2), (scnet, 2), (adaptive_patch_exiting, 2), (pcsr, (2, 2))):
        monkeypatch.setattr(module, "STEPS", {"quick": steps, "full": steps})
    for module in (espcn, scnet, _shared):
        monkeypatch.setattr(module, "compare", compared_once)
    for module in (pcsr, _shared):
        monkeypatch.setattr(module, "curve_and_map", lambda *_: None)
    monkeypatch.setattr(adaptive_patch_exiting, "curve_and_map", lambda *_: None)
    monkeypatch.setattr(
        adaptive_patch_exiting, "crops", lambda pairs, seed: lambda b, n: crops(pairs, seed)(min(b, 8), n)
    )
    return ProofContext(progress=False)


def compared_once(
    baseline: object, method: object, *_: object, names: tuple[str, str] = ("a", "b"), **__: object
) -> object:
    return Comparison(names, ((0.2,), (0.1,)), (200.0, 100.0), (None, None))


# ---------------------------------------------------------------------- what they share


def test_a_pair_is_cut_and_reduced() -> None:
    p = pair("x", picture(50, 61), 3)
    assert p.high.shape == (1, 3, 48, 60)
    assert p.low.shape == (1, 3, 16, 20)
    assert torch.equal(p.low, (p.low * 255).round() / 255)
    assert p.luminance.low.shape == (1, 1, 16, 20)


@settings(deadline=None, max_examples=25)
@given(scale=st.integers(2, 4), side=st.integers(1, 8), seed=st.integers(0, 99))
def test_crops_stay_aligned_through_flips(scale: int, side: int, seed: int) -> None:
    low = torch.rand(1, 3, 9, 11)
    high = low.repeat_interleave(scale, 2).repeat_interleave(scale, 3)
    small, large = crops([Pair("x", low, high)], seed)(3, side)
    assert torch.equal(large, small.repeat_interleave(scale, 2).repeat_interleave(scale, 3))
    again = crops([Pair("x", low, high)], seed)(3, side)[0]
    assert torch.equal(small, again)


def test_crops_say_when_a_picture_is_too_small() -> None:
    with pytest.raises(InputError, match="crops of 17 pixels do not fit in a picture of 16"):
        crops([pair("x", picture(), 3)], 0)(1, 17)


def test_nothing_is_trained_on_that_is_measured(small: ProofContext) -> None:
    trained = {p.name for p in _shared.training_pairs(small, 2)}
    measured = {p.name for p in measured_pairs(small, 2)[0]}
    assert measured == set(HELD_OUT)
    assert not trained & measured


def test_full_proofs_take_the_sets_of_the_literature(tmp_path, small: ProofContext) -> None:  # type: ignore[no-untyped-def]
    from foveate.data import pictures

    (tmp_path / "set5").mkdir()
    pictures.save(tmp_path / "set5" / "baby.png", picture().permute(1, 2, 0).numpy())
    found, where = measured_pairs(ProofContext(full=True, data=tmp_path, progress=False), 2)
    assert [p.name for p in found] == ["baby"]
    assert "set5 (1 pictures)" in where
    assert len(measured_pairs(ProofContext(data=tmp_path, progress=False), 2)[0]) == len(HELD_OUT)


def test_quality_shaves_a_border_and_agrees_on_luminance() -> None:
    p = pair("x", picture(), 2)
    wrong = p.high.clone()
    wrong[..., :2, :] = 0
    assert quality(wrong, p) == math.inf
    noisy = (p.high + 10 / 255).clamp(0, 1)
    grey = Pair("x", p.low[:, :1], torch.full((1, 1, 48, 60), 0.5))
    assert quality(grey.high + 10 / 255, grey) == pytest.approx(20 * math.log10(255 / 10), abs=0.3)
    assert 25 < quality(noisy, p) < 35


def test_training_lowers_the_loss_and_ends_in_evaluation(small: ProofContext) -> None:
    model = torch.nn.Linear(1, 1)
    before = model.weight.item()
    seconds = train(small, model, lambda: (model(torch.ones(1, 1)) - 3).square().mean(), 30, "fitting", lr=0.1)
    assert seconds > 0
    assert not model.training
    assert model.weight.item() > before


# ---------------------------------------------------------------------- espcn


def test_multiply_accumulates_are_the_published_ones() -> None:
    srcnn, net = espcn.macs_per_pixel(espcn.SRCNN()), espcn.macs_per_pixel(ESPCN(3))
    assert srcnn == 57_184
    assert net == pytest.approx((25 * 64 + 9 * 64 * 32 + 9 * 32 * 9) / 9)
    assert srcnn / net == pytest.approx(22.7, abs=0.05)


def test_a_checkerboard_is_seen() -> None:
    model = ESPCN(3)
    model.last.bias.data.zero_()
    assert espcn.checkerboard(model) < 1e-6  # all phases start with the same kernels
    with torch.no_grad():
        model.last.bias[4] += 0.25
    assert espcn.checkerboard(model) == pytest.approx(0.25, abs=1e-5)


@pytest.mark.parametrize("broken", [{"speedup": 6.9}, {"gain": 0.39}, {"lead": -0.01}, {"board": 0.002}])
def test_espcns_verdict_needs_all_of_it(broken: dict[str, float]) -> None:
    fine = {"speedup": 7.0, "gain": 0.4, "lead": 0.0, "board": 0.001}
    assert espcn.verdict(**fine)
    assert not espcn.verdict(**(fine | broken))


# ---------------------------------------------------------------------- scnet


def test_a_block_has_a_ninth_of_the_work() -> None:
    from foveate.layers.residual import ResidualBlock

    assert scnet.block_macs(SCResBlock(32)) == 2 * 32 * 32
    assert scnet.block_macs(ResidualBlock(32)) == 9 * 2 * 32 * 32


def test_the_narrow_rival_has_as_many_parameters() -> None:
    target = count_parameters(SCNet(2, 32, 8, "ps"))
    width = scnet.matched_width(target)
    assert count_parameters(scnet.Spatial(width)) <= target < count_parameters(scnet.Spatial(width + 1))


def test_shifts_written_out_are_the_same_function() -> None:
    model = SCNet(2, 16, 2, "ps").eval()
    written = scnet.written_out(model)
    x = torch.rand(1, 3, 9, 11)
    with torch.no_grad():
        assert torch.equal(written(x), model(x))
        assert not torch.equal(SCNet(2, 16, 2, "ps", shift=False)(x), model(x))
    assert count_parameters(written) > count_parameters(model)


@pytest.mark.parametrize("broken", [{"gain": 0.1}, {"ratio": 8.9}, {"apart": 1e-3}])
def test_scnets_verdict_needs_all_of_it(broken: dict[str, float]) -> None:
    fine = {"gain": 0.2, "margin": 0.2, "ratio": 9.0, "apart": 0.0}
    assert scnet.verdict(**fine)
    assert not scnet.verdict(**(fine | broken))


# ---------------------------------------------------------------------- pcsr


def small_pcsr() -> PCSR:
    torch.manual_seed(0)
    return PCSR(2, "residual", {"channels": 8, "blocks": 1}, heavy=[32, 32], light=[4], classifier=[4]).eval()


def test_both_heads_are_those_of_the_network() -> None:
    model, p = small_pcsr(), pair("x", picture(), 2)
    with torch.inference_mode():
        both = pcsr.both_heads(model, p)
        torch.testing.assert_close(both.heavy, model(p.low), atol=1e-5, rtol=0)
        torch.testing.assert_close(both.light, model.upscale(p.low, model.floor).image, atol=1e-5, rtol=0)
        share = model.heavy_share((1 + model.floor) / 2)
        by_hand = both.mixed(both.flagged(both.score, share))
        theirs = model.upscale(p.low, (1 + model.floor) / 2).image
    different = (by_hand - theirs).abs().amax(1) > 1e-5
    assert different.float().mean() < 0.002  # a pixel on the threshold may fall to either side


@pytest.mark.parametrize("way", pcsr.WAYS)
def test_every_way_spends_the_same_number_of_pixels(way: str) -> None:
    score = torch.randn(1, 1, 70, 90)
    both = pcsr.Both(pair("x", picture(), 2), torch.zeros(1, 3, 70, 90), torch.ones(1, 3, 70, 90), score)
    ranking = both.ranking(way, torch.Generator().manual_seed(0))
    assert ranking.shape == score.shape
    flags = both.flagged(ranking, 0.3)
    assert int(flags.sum()) == int(0.3 * score.numel())
    assert torch.equal(both.mixed(flags)[:, :1], flags.float())
    if way == "patches":
        inside = flags[..., :64, :64].unfold(2, 32, 32).unfold(3, 32, 32).float().mean((-1, -2))
        assert ((inside == 0) | (inside == 1)).sum() >= inside.numel() - 1  # at most one patch is cut


def test_recovery_is_a_share_of_the_gap() -> None:
    assert pcsr.recovery(30.0, 30.0, 32.0) == 0
    assert pcsr.recovery(32.0, 30.0, 32.0) == 1
    assert math.isnan(pcsr.recovery(32.0, 32.0, 32.0))


def test_two_means_finds_two_clusters() -> None:
    score = torch.cat([torch.full((30,), -4.0), torch.full((10,), 3.0)]).view(1, 1, 4, 10)
    assert torch.equal(pcsr.two_means(score), score > 0)
    assert pcsr.two_means(torch.full((1, 1, 2, 2), -1.0)).sum() == 0


def test_pcsrs_verdict_needs_all_of_it() -> None:
    fine = {"pixels": 0.9, "patches": 0.6, "random": 0.35}
    assert pcsr.verdict(fine, 0.05, gap=0.5)
    assert not pcsr.verdict(fine, 0.11, gap=0.5)
    assert not pcsr.verdict(fine, 0.05, gap=0.1)  # all light is as good: nothing was shown
    assert not pcsr.verdict(fine | {"random": 0.9}, 0.05, gap=0.5)
    assert not pcsr.verdict(fine | {"patches": 0.95}, 0.05, gap=0.5)
    assert not pcsr.verdict(fine | {"pixels": math.nan}, 0.05, gap=0.5)


# ---------------------------------------------------------------------- adaptive patch exiting


def small_ape() -> APE:
    torch.manual_seed(0)
    return APE(2, channels=8, blocks=3, interval=1, patch=16, step=14).eval()


def test_patches_cover_the_picture_and_keep_their_number() -> None:
    pairs = [pair("a", picture(50, 62), 2), pair("tiny", picture(20, 40), 2), pair("b", picture(64, 64, 1), 2)]
    patches = adaptive_patch_exiting.cut(pairs, 16, 14)
    assert patches.low.shape[0] == 2 * 3 + 3 * 3
    assert patches.picture.tolist() == [0] * 6 + [2] * 9
    assert torch.equal(patches.low[5], pairs[0].low[0, :, -16:, -16:])
    assert torch.equal(patches.high[5], pairs[0].high[0, :, -32:, -32:])
    assert patches.psnr_y(patches.high) == pytest.approx(100)
    assert patches.psnr_y(patches.high + 0.1) < 30


def test_exits_given_beforehand_are_taken() -> None:
    model, patches = small_ape(), adaptive_patch_exiting.cut([pair("a", picture(64, 64), 2)], 16, 14)
    wanted = torch.randint(1, 4, (9,), generator=torch.Generator().manual_seed(1))
    with torch.inference_mode():
        images, exits = model.run(patches.low, adaptive_patch_exiting.by_exits(wanted))
        dense = torch.stack(model.all_exits(patches.low)[0])
    assert torch.equal(exits, wanted)
    torch.testing.assert_close(images, dense[wanted - 1, torch.arange(9)], atol=1e-5, rtol=0)


def test_each_picture_spends_its_own_budget() -> None:
    model = small_ape()
    patches = adaptive_patch_exiting.cut([pair("a", picture(64, 64), 2), pair("b", picture(50, 62, 1), 2)], 16, 14)
    with torch.inference_mode():
        model.calibrate(patches.low)
        found = adaptive_patch_exiting.per_picture(model, patches, 0.7)
        dense = torch.stack(model.all_exits(patches.low)[0])
        own = dense[found.exits - 1, torch.arange(len(found.exits))]
    assert found.psnr == pytest.approx(patches.psnr_y(own), abs=1e-4)
    for i in (0, 1):
        assert 0.5 < adaptive_patch_exiting.cost_share(model, found.exits[patches.picture == i]) <= 0.7


def test_random_exits_have_the_same_histogram() -> None:
    exits = torch.tensor([1] * 20 + [2] * 5 + [3] * 7)
    dealt = adaptive_patch_exiting.dealt(exits, 0)
    assert torch.equal(dealt.bincount(), exits.bincount())
    assert not torch.equal(dealt, exits)


@settings(deadline=None, max_examples=25)
@given(part=st.floats(0, 1), seed=st.integers(0, 99))
def test_a_threshold_does_not_overspend(part: float, seed: int) -> None:
    model = small_ape()
    scores = torch.rand(40, 3, generator=torch.Generator().manual_seed(seed)) * 2
    share = model.floor + part * (1 - model.floor)
    tau = adaptive_patch_exiting.threshold(model, scores, share)
    spent = adaptive_patch_exiting.cost_share(model, adaptive_patch_exiting.exits_at(scores, tau))
    assert spent <= share + 1e-9
    assert share - spent < 0.06


def test_static_exits_are_joined_by_lines() -> None:
    ends = [adaptive_patch_exiting.Outcome(p, s, torch.ones(1)) for p, s in ((30.0, 0.4), (31.0, 0.6), (31.5, 1.0))]
    assert adaptive_patch_exiting.between(ends, 0.5) == pytest.approx(30.5)
    assert adaptive_patch_exiting.between(ends, 0.9) == pytest.approx(31.375)


@pytest.mark.parametrize(
    "broken",
    [{"over_static": -0.01}, {"over_random": 0.0}, {"loss": 0.05}, {"depth": 0.05}, {"time_share": 0.8}],
)
def test_apes_verdict_needs_all_of_it(broken: dict[str, float]) -> None:
    fine = {"over_static": 0.0, "over_random": 0.01, "loss": 0.04, "depth": 0.2, "time_share": 0.6}
    assert adaptive_patch_exiting.verdict(**fine)
    assert not adaptive_patch_exiting.verdict(**(fine | broken))


# ---------------------------------------------------------------------- the proofs as a whole


@pytest.mark.parametrize(
    ("module", "slug", "rows"),
    [
        (espcn, "espcn", ("bicubic", "SRCNN 9-5-5, as long", "ESPCN as published", "ESPCN with a residual")),
        (scnet, "scnet", ("bilinear", "1x1, no shift", "1x1 and Shift8", "3x3, same width", "1x1 and one-hot 3x3")),
        (pcsr, "pcsr", ("PCSR, budget 1", "PCSR, budget 0.5", "random flags, 30% heavy", "PCSR, 30% heavy")),
        (
            adaptive_patch_exiting,
            "adaptive-patch-exiting",
            ("exit 1 for all", "exit 3 for all", "APE, budget 0.60 per picture"),
        ),
    ],
)
def test_a_proof_reports_system_and_baselines(
    module: ModuleType, slug: str, rows: tuple[str, ...], small: ProofContext, monkeypatch: pytest.MonkeyPatch
) -> None:
    if module is espcn:
        monkeypatch.setattr(espcn, "training_ratio", lambda *_: 2.0)
    found = module.prove(small)
    assert isinstance(found, Evidence)
    assert found.system == slug
    assert set(rows) <= {row.name for row in found.rows}
    assert any("Holds when" in note for note in found.notes)
    assert found.holds is False  # two steps teach nothing
    assert all(math.isfinite(row.metrics["psnr_y_db"]) for row in found.rows if "psnr_y_db" in row.metrics)
