"""Proofs of tcsr, acla and adk-net: the baselines are what they claim to be, and the verdicts can fail."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from foveate.layers.shift import SpatialShift
from foveate.meter import Comparison, count_parameters
from foveate.proofs import ProofContext
from foveate.proofs.restore import acla, adk_net, tcsr
from foveate.proofs.restore._shared import HELD_OUT
from foveate.restore.acla import ACLA
from foveate.restore.adk_net import sample_camera
from foveate.restore.tcsr import NeighbourhoodAttention


def picture(seed: int) -> Tensor:
    return torch.rand(3, 70, 240, generator=torch.Generator().manual_seed(seed))


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> ProofContext:
    """A context in which every proof sees small pictures, trains for two steps and times each thing once."""
    photographs = [(name, picture(i)) for i, name in enumerate([*HELD_OUT, "brick", "astronaut"])]
    monkeypatch.setattr(ProofContext, "photographs", lambda self: photographs)
    for module, steps in ((tcsr, (2, 2)), (acla, 2), (adk_net, 2)):
        monkeypatch.setattr(module, "STEPS", {"quick": steps, "full": steps})
    once = Comparison(("a", "b"), ((0.2,), (0.1,)), (200.0, 100.0), (None, None))
    monkeypatch.setattr(tcsr, "compare", lambda *_: once)
    monkeypatch.setattr(tcsr, "peak_memory", lambda _: 1 << 21)
    monkeypatch.setattr(adk_net, "drawn", lambda *_: None)
    monkeypatch.setattr(acla, "TEST_SIDE", 64)
    return ProofContext(progress=False)


# ---------------------------------------------------------------------- tcsr


def test_tcsr_runs_to_a_verdict(small: ProofContext) -> None:
    evidence = tcsr.prove(small)
    names = [row.name for row in evidence.rows]
    assert names[:5] == ["bilinear", "1x1 only", "depth-wise kernels", "no shift", "TCSR"]
    assert evidence.measured_ratio == pytest.approx(689_848 / 844_000)
    assert "2 times as fast" in evidence.notes[-1]
    assert "2 2." in evidence.notes[-1]
    assert not evidence.holds  # nothing is learned in two steps


def test_tcsr_holds_only_where_every_part_does() -> None:
    good = {"TCSR": 30.0, "depth-wise kernels": 30.04, "no shift": 29.9, "1x1 only": 29.5}
    assert tcsr.verdict("full", good, 0.3, 36.1, 0.81)
    for mode, name, level in (
        ("full", "depth-wise kernels", 30.06),
        ("full", "no shift", 29.96),
        ("full", "1x1 only", 29.7),
        ("quick", "no shift", 30.01),
        ("quick", "1x1 only", 29.85),
    ):
        assert not tcsr.verdict(mode, good | {name: level}, 0.3, 36.1, 0.81)
    assert not tcsr.verdict("full", good, 0.29, 36.1, 0.81)
    assert not tcsr.verdict("full", good, 0.3, 35.9, 0.81)
    assert not tcsr.verdict("full", good, 0.3, 36.1, 0.83)


def test_a_layer_with_a_neighbourhood_of_13_has_a_36th_of_the_parameters() -> None:
    assert tcsr.law() == pytest.approx(692_288 / 19_140)


@pytest.mark.parametrize(("attention", "side"), [("none", 1), ("depthwise", 11)])
def test_variants_lack_what_they_should_and_see_no_content(attention: str, side: int) -> None:
    torch.manual_seed(0)
    model = tcsr.variant(1, tcsr.TEXTURED, attention, shift=False)
    assert not [m for m in model.modules() if isinstance(m, NeighbourhoodAttention | SpatialShift)]
    layer = model.body[0].attn.double()
    a, b = torch.randn(2, 1, 13, 13, 16, dtype=torch.float64)
    bias = layer(torch.zeros_like(a))
    torch.testing.assert_close(layer(a + b), layer(a) + layer(b) - bias)  # fixed kernels are linear
    a.requires_grad_()
    (gradient,) = torch.autograd.grad(layer(a)[:, 6, 6].sum(), a)
    assert int((gradient.abs().sum((0, 3)) > 0).sum()) == side**2


def test_textures_repeat_in_one_of_four_directions() -> None:
    found = tcsr.textures(40, 24, torch.Generator().manual_seed(0))
    p, seen = tcsr.PERIOD, set()
    for x in found:
        ways = {
            "right": (x[:, :, p:], x[:, :, :-p]),
            "below": (x[:, p:], x[:, :-p]),
            "diagonal": (x[:, p:, p:], x[:, :-p, :-p]),
            "other diagonal": (x[:, p:, :-p], x[:, :-p, p:]),
        }
        right = [name for name, (a, b) in ways.items() if torch.equal(a, b)]
        assert len(right) == 1
        seen.update(right)
    assert len(seen) == 4


# ---------------------------------------------------------------------- acla


def test_acla_runs_to_a_verdict(small: ProofContext) -> None:
    evidence = acla.prove(small)
    cost = {row.name: row.metrics.get("macs_per_pixel") for row in evidence.rows}
    assert cost["deeper"] >= cost["CLA"] > cost["plain"]
    assert evidence.measured_ratio == pytest.approx(1.0676, abs=1e-3)
    assert not evidence.holds


def test_acla_holds_only_where_every_part_does() -> None:
    scores = {
        "plain": {"textures": 25.0, "photographs": 27.0},
        "deeper": {"textures": 25.1, "photographs": 27.0},
        "CLA": {"textures": 25.3, "photographs": 27.0},
        "ACLA": {"textures": 25.2, "photographs": 26.96},
    }
    assert acla.verdict("full", 1.068, scores, 0.5, 0.9, 0.2)
    assert not acla.verdict("full", 1.08, scores, 0.5, 0.9, 0.2)
    assert not acla.verdict("full", 1.068, scores, 0.6, 0.9, 0.2)
    assert not acla.verdict("full", 1.068, scores, 0.5, 1.0, 0.2)
    assert not acla.verdict("full", 1.068, scores, 0.5, 0.9, 0.1)
    for name, where, level in (
        ("plain", "textures", 25.01),
        ("deeper", "textures", 25.21),
        ("CLA", "photographs", 27.02),
    ):
        assert not acla.verdict("full", 1.068, scores | {name: {**scores[name], where: level}}, 0.5, 0.9, 0.2)
    closer = scores | {"plain": {"textures": 25.09, "photographs": 27.0}}
    assert acla.verdict("quick", 1.068, closer, 0.5, 0.9, 0.2)


def test_tiles_repeat() -> None:
    x = acla.textures(2, 20, 0)
    assert torch.equal(x[..., acla.PERIOD :], x[..., : -acla.PERIOD])
    assert torch.equal(x[..., acla.PERIOD :, :], x[..., : -acla.PERIOD, :])
    assert not torch.equal(x[0], x[1])


def test_open_keys_are_counted_where_it_is_flat_and_where_it_is_not() -> None:
    torch.manual_seed(0)
    model = ACLA(**acla.CONFIG).eval()
    x = torch.full((1, 3, 24, 24), 0.5)
    x[..., 12:] += 0.4 * torch.rand(1, 3, 24, 12)
    assert acla.activity(model, x, x)[0] > 0.9  # they begin open
    for m in model.modules_by_stage().values():
        m.to_gate.weight.data.zero_()
        m.to_gate.bias.data.fill_(-1)
        m.to_gate.bias.data[:: len(m.to_gate.bias) // m.references].fill_(1)  # one key in four
    assert acla.activity(model, x, x) == pytest.approx((0.25, 0.25, 0.25))
    assert acla.movement(model, x) < 0.1
    model.modules_by_stage()[2].to_offset.bias.data[3] += 1.5
    assert acla.movement(model, x) == pytest.approx(1.5, abs=0.1)


# ---------------------------------------------------------------------- adk-net


def test_adk_net_runs_to_a_verdict(small: ProofContext) -> None:
    evidence = adk_net.prove(small)
    figures = {row.name: row.metrics for row in evidence.rows}
    assert list(figures) == ["bicubic", "best single kernels", "shared kernels", "ADK-Net"]
    assert figures["best single kernels"]["green_db"] > 80  # the box is a single kernel
    assert figures["ADK-Net"]["parameters"] > figures["shared kernels"]["parameters"]
    assert not evidence.holds


def test_adk_net_holds_only_where_every_part_does() -> None:
    assert adk_net.verdict("full", 0.5, 1.0, 2.0, 0.05)
    assert adk_net.verdict("quick", 0.5, 1.0, 0.0, 1.0)
    for figures in ((0.51, 1.0, 2.0, 0.05), (0.5, 0.99, 2.0, 0.05), (0.5, 1.0, 1.9, 0.05), (0.5, 1.0, 2.0, 0.06)):
        assert not adk_net.verdict("full", *figures)
    assert not adk_net.verdict("quick", 0.5, 1.0, -0.01, 0.0)


def test_the_best_kernel_of_a_box_is_the_box() -> None:
    best = adk_net.best_kernels([0.02 * picture(i)[None] for i in range(3)])  # without edges
    assert best.shape == (1, 3, 64, 1, 1)
    assert adk_net.from_box(best[:, 1]) < 0.02
    assert adk_net.from_box(best[:, 2]) > 0.1
    x = 0.02 * picture(5)[None]
    own = adk_net.ADKNet(**adk_net.CONFIG)
    errors = [adk_net._errors(y, sample_camera(x, 2)) for y in (own.resample(x, best), F.avg_pool2d(x, 2))]
    assert (errors[0][[0, 2]] <= errors[1][[0, 2]]).all()
    assert count_parameters(own) > 0
