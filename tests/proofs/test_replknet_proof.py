"""The proof of RepLKNet: fields are those of its kernels, baselines are what they claim, and the verdict can fail."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from foveate.encode.replknet import RepLKNet
from foveate.meter import Comparison
from foveate.ops import fast_allowed
from foveate.proofs import ProofContext
from foveate.proofs.encode import replknet as proof


def compared_once(*calls, **_):
    for call in calls[:2]:
        call()
    return Comparison(("a", "b"), ((0.2,), (0.1,)), None, (None, None))


@pytest.mark.parametrize("swin", [True, False])
def test_the_proof_runs(swin: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(proof, "compare", compared_once)
    monkeypatch.setattr(proof, "SIDE", 64)
    monkeypatch.setattr(proof, "NOISE", 65)
    monkeypatch.setattr(proof, "CHANNELS", 1)
    monkeypatch.setattr(proof, "STAGES", ((8, 7, 13),))
    small = {"widths": (8, 8), "depths": (1, 1), "kernels": (31, 13), "small": 5}
    cut = {"kernels": lambda sides: sides[:2], "small": lambda side: side}
    monkeypatch.setattr(
        proof, "RepLKNet", lambda **s: RepLKNet(**small | {name: cut[name](value) for name, value in s.items()})
    )
    if swin:
        monkeypatch.setattr(proof, "swin", lambda context, network, x: (compared_once(lambda: 0, lambda: 0), "Swin."))
    else:
        monkeypatch.setitem(__import__("sys").modules, "transformers", None)
    evidence = proof.prove(ProofContext(progress=False))
    assert evidence.measured_ratio == (2.0 if swin else None)
    assert evidence.rows[0].metrics["field_px"] < evidence.rows[1].metrics["field_px"] <= 31
    assert swin or not evidence.holds
    assert swin or "transformers" in evidence.notes[1]


def test_a_large_kernel_is_moved_by_half_of_its_window() -> None:
    assert proof.field(ProofContext(), 31, 1) == 23  # half of 31 x 31 pixels is a square of 22
    assert proof.field(ProofContext(), 3, 15) <= 15


def test_the_other_way_is_pytorchs_on_channels_last(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []

    class Spy(torch.nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            seen.append((fast_allowed(), x.is_contiguous(memory_format=torch.channels_last)))
            return x

    proof.ChannelsLast(Spy())(torch.rand(1, 3, 4, 4))
    assert seen == [(False, True)]
    assert fast_allowed()


@given(st.floats(1, 3), st.floats(1, 3), st.floats(1, 1.5), st.floats(0.5, 2))
@settings(deadline=None, max_examples=50)
def test_the_verdict_needs_all_of_it(one: float, two: float, macs: float, faster: float) -> None:
    assert proof.verdict([one, two], macs, faster) == (one >= 1.4 and two >= 1.7 and macs <= 1.2 and faster >= 1.17)
    assert not proof.verdict([3, 3], 1.1, None)
    assert not proof.verdict([1.3, two], macs, faster)
    assert not proof.verdict([one, two], 1.21, faster)
