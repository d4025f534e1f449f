"""The codec of shallow decoders: levels, budgets, annealing, exact decoding, damaged files."""

import math
from contextlib import suppress
from dataclasses import replace

import numpy as np
import pytest
import torch

pytest.importorskip("constriction")

from foveate.compress import latent_contexts
from foveate.compress.container import Container
from foveate.compress.entropy import Encoder
from foveate.compress.fields import varint
from foveate.compress.shallow_ntc import ShallowNTC, _rendered, machine
from foveate.compress.transform_coder import LEVELS
from foveate.compress.verbs import measured
from foveate.compress.whole import UNIT
from foveate.data import pictures
from foveate.engine.budget import Budget
from foveate.errors import BitstreamError, BudgetError, InputError


@pytest.fixture(scope="module")
def photo() -> torch.Tensor:
    return pictures.samples()["astronaut"][None, :, 40:130, 180:290].contiguous()


@pytest.fixture(scope="module")
def plain(photo: torch.Tensor) -> Container:
    return ShallowNTC(steps=0).encode(photo)


def test_higher_levels_cost_more_and_give_more(photo: torch.Tensor) -> None:
    codec = ShallowNTC(steps=0)
    scene = codec._scene(photo)
    codes = [codec._plain(scene, level) for level in (0, 5, 10, 15, LEVELS - 1)]
    sizes = [len(codec._container(code, scene, 8).to_bytes()) for code in codes]
    decibels = [measured(codec._pixels(code, scene), photo, 8) for code in codes]
    assert sizes == sorted(sizes)
    assert decibels == sorted(decibels)
    assert decibels[2] > 28
    assert decibels[-1] > 33


@pytest.mark.parametrize("synthesis", ["two-layer", "linear"])
def test_decoding_gives_what_the_encoder_saw(photo: torch.Tensor, synthesis: str) -> None:
    codec = ShallowNTC(steps=0, synthesis=synthesis)
    scene = codec._scene(photo)
    code = codec._plain(scene, 12)
    decoded = ShallowNTC().decode(Container.read(codec._container(code, scene, 8).to_bytes()))
    assert decoded.shape == photo.shape
    assert torch.equal(decoded, codec._pixels(code, scene))
    network = machine(codec._kind).synthesis((code.latents / UNIT).float())[..., :90, :110] + 0.5
    assert float((network.clamp(0, 1) - decoded).abs().max()) < 0.02


def test_the_file_is_as_long_as_its_probabilities_say(photo: torch.Tensor) -> None:
    codec = ShallowNTC(steps=0)
    scene = codec._scene(photo)
    code = codec._plain(scene, 10)
    symbols, numbers, tables = code.main[0].numpy(), code.tables[0].numpy(), machine(0).tables
    bits = sum(
        tables[i].bits(symbols[group][chosen == i])
        for group, chosen in latent_contexts._groups(symbols, numbers)
        for i in np.unique(chosen)
    )
    stream = codec._container(code, scene, 8).sections["main"]
    assert abs(8 * len(stream) - bits) < 0.01 * bits + 64


def test_annealing_lowers_the_cost_and_repeats_itself(photo: torch.Tensor) -> None:
    part = photo[..., :64, :64]
    assert len({ShallowNTC(steps=3).encode(part).to_bytes() for _ in range(2)}) == 1
    codec = ShallowNTC(steps=40)
    scene, made = codec._scene(part), codec.encode(part)
    before = codec._cost(codec._plain(scene, 10), scene)
    bits = 8 * len(made.to_bytes()) / 64**2
    after = bits + 0.00125 * 2**2.5 * 255**2 * float((codec.decode(made) - part).square().mean())
    assert after < 0.998 * before


def test_a_size_is_kept_and_used(photo: torch.Tensor) -> None:
    codec = ShallowNTC(steps=8)
    for size in (600.0, 1200.0):
        made = codec.encode(photo, budget=Budget(size, "bytes"))
        assert 0.85 * size < len(made.to_bytes()) <= size
    with pytest.raises(BudgetError, match="at least"):
        codec.encode(photo, budget=Budget(60, "bytes"))


def test_a_quality_is_reached_with_little_to_spare(photo: torch.Tensor) -> None:
    codec = ShallowNTC(steps=12)
    assert 30.0 <= measured(codec.decode(codec.encode_to(photo, 30.0)), photo, 8) < 30.6
    with pytest.raises(BudgetError, match="asked 90 dB"):
        ShallowNTC(steps=0).encode_to(photo, 90.0)


def test_time_is_a_budget(photo: torch.Tensor) -> None:
    told: list[float] = []
    codec = ShallowNTC(steps=10**6)
    made = codec.encode(photo[..., :40, :40], budget=Budget(300, "ms"), progress=lambda share, dB: told.append(share))
    assert codec.decode(made).shape == (1, 3, 40, 40)
    assert told == sorted(told)
    assert 0 <= told[0] < told[-1] <= 1


def test_a_stop_keeps_the_better_state(photo: torch.Tensor, plain: Container) -> None:
    decibels: list[float] = []

    def stop(share: float, dB: float | None) -> bool:
        decibels.append(dB or 0)
        return len(decibels) == 2

    made = ShallowNTC(steps=10**6).encode(photo, progress=stop)
    assert len(decibels) == 2
    assert math.isfinite(sum(decibels))
    assert measured(ShallowNTC().decode(made), photo, 8) > measured(ShallowNTC().decode(plain), photo, 8) - 1


def test_windows_are_parts_whatever_the_strips() -> None:
    latents = (3 * UNIT * torch.randn(1, 320, 36, 5).double()).round()
    for kind in (0, 1):
        whole = _rendered(latents, kind, (0, 0, 77, 570))
        for x, y, w, h in ((0, 0, 1, 1), (3, 250, 60, 20), (76, 569, 1, 1), (16, 16, 48, 500)):
            assert torch.equal(_rendered(latents, kind, (x, y, w, h)), whole[..., y : y + h, x : x + w])


@pytest.mark.parametrize("section", ["head", "side", "main"])
def test_cut_sections_are_refused_or_decode_to_something(plain: Container, section: str) -> None:
    codec = ShallowNTC()
    for data in (b"", plain.sections[section][:-3], plain.sections[section] + b"\1\2\3\4\5\6\7\10"):
        with suppress(BitstreamError):
            assert codec.decode(plain.with_sections(**{section: data})).isfinite().all()
    with pytest.raises(BitstreamError, match="damaged"):
        codec.decode(plain.with_sections(head=varint(LEVELS, 0)))
    with pytest.raises(BitstreamError, match="damaged"):
        codec.decode(plain.with_sections(head=varint(3, 2)))


def test_latents_beyond_any_picture_are_refused(plain: Container) -> None:
    small = replace(plain, width=8, height=8)
    side = Encoder()
    for table in machine(0).agreed.tables(10):
        side.put([2**40], table)
    with pytest.raises(BitstreamError, match="too large"):
        ShallowNTC().decode(small.with_sections(head=varint(10, 0), side=side.finish()))


def test_settings_that_do_not_exist() -> None:
    for wrong in ({"steps": -1}, {"synthesis": "deep"}):
        with pytest.raises(InputError, match="two-layer"):
            ShallowNTC(**wrong)  # type: ignore[arg-type]
