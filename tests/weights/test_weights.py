import json
import os

import pytest
import torch

from foveate import weights
from foveate.errors import WeightsError
from foveate.restore.espcn import ESPCN
from foveate.restore.pcsr import PCSR

CONFIG = {
    "scale": 2,
    "encoder_config": {"channels": 8, "blocks": 1},
    "heavy": [8],
    "light": [4],
    "classifier": [],
}


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.setattr(weights, "FOLDER", tmp_path)
    return tmp_path


@pytest.fixture
def saved(folder):
    torch.manual_seed(0)
    net = PCSR(**CONFIG).eval()
    weights.save(net, "pcsr", 2, {"config": CONFIG, "scores": {"set5": 30.5}}, folder)
    return net


def test_what_was_saved_is_loaded_again(saved):
    x = torch.rand(1, 3, 6, 7)
    net = weights.load("pcsr", 2)
    assert not net.training
    assert torch.equal(net(x), saved(x))
    assert torch.equal(PCSR.pretrained(2)(x), saved(x))


def test_arguments_that_keep_the_shapes_may_change(saved):
    assert not weights.load("pcsr", 2).refine
    assert weights.load("pcsr", 2, refine=True).refine
    assert PCSR.pretrained(2, refine=True).refine


def test_the_card_tells_how_the_weights_were_made(saved):
    assert weights.card("pcsr", 2) == {"system": "pcsr", "scale": 2, "config": CONFIG, "scores": {"set5": 30.5}}


def test_available_lists_the_scales_by_system(folder):
    assert weights.available() == {}
    for name in ("pcsr-x2", "pcsr-x4", "adaptive-patch-exiting-x3"):
        (folder / f"{name}.json").write_text("{}")
    assert weights.available() == {"adaptive-patch-exiting": [3], "pcsr": [2, 4]}


def test_saving_leaves_two_files_each_written_to_another_name_first(folder, monkeypatch):
    renamed = []
    replace = os.replace

    def watched(source, target):
        renamed.append(os.path.basename(target))
        replace(source, target)

    monkeypatch.setattr(os, "replace", watched)
    weights.save(PCSR(**CONFIG), "pcsr", 2, {"config": CONFIG}, folder / "new")
    assert sorted(os.listdir(folder / "new")) == ["pcsr-x2.json", "pcsr-x2.safetensors"]
    assert renamed == ["pcsr-x2.safetensors", "pcsr-x2.json"]  # no card without its weights


def test_weights_in_any_memory_format_are_saved(folder):
    net = PCSR(**CONFIG).to(memory_format=torch.channels_last).eval()
    weights.save(net, "pcsr", 2, {"config": CONFIG}, folder)
    x = torch.rand(1, 3, 4, 4)
    torch.testing.assert_close(weights.load("pcsr", 2)(x), net(x))


def test_an_unknown_scale_names_the_scales_there_are(saved):
    with pytest.raises(WeightsError, match="no weights of 'pcsr' for scale 7; foveate ships scales 2"):
        weights.load("pcsr", 7)


def test_an_unknown_system_names_those_there_are(saved):
    with pytest.raises(WeightsError, match="no weights of 'scnet' for scale 2; foveate ships weights for pcsr"):
        weights.load("scnet", 2)


def test_with_no_weights_at_all_that_is_said(folder):
    with pytest.raises(WeightsError, match="weights for nothing"):
        weights.card("pcsr", 2)


def test_weights_of_another_architecture_are_refused(saved):
    with pytest.raises(WeightsError, match="pcsr x2 do not fit"):
        weights.load("pcsr", 2, heavy=[9])


@pytest.mark.parametrize("content", [b"", b"\x08\x00\x00\x00\x00\x00\x00\x00{}", b"not a safetensors file at all"])
def test_damaged_weights_are_refused(saved, folder, content):
    (folder / "pcsr-x2.safetensors").write_bytes(content)
    with pytest.raises(WeightsError, match="pcsr"):
        weights.load("pcsr", 2)


def test_a_card_without_its_weights_is_refused(saved, folder):
    (folder / "pcsr-x2.safetensors").unlink()
    with pytest.raises(WeightsError, match="pcsr"):
        weights.load("pcsr", 2)


def test_every_shipped_set_has_card_and_weights():
    for slug, scales in weights.available().items():
        for scale in scales:
            assert (weights.FOLDER / f"{slug}-x{scale}.safetensors").exists()
            text = json.dumps(weights.card(slug, scale))
            assert {"config", "recipe", "data", "scores", "licence"} <= set(json.loads(text))


def test_weights_of_any_scale_have_no_scale_in_their_name(folder):
    assert not weights.ship("espcn")
    model = ESPCN(2)
    weights.save(model, "espcn", None, {"config": {"scale": 2}})
    assert sorted(p.name for p in folder.iterdir()) == ["espcn.json", "espcn.safetensors"]
    assert weights.ship("espcn")
    assert weights.available() == {}
    again = weights.load("espcn")
    assert all(torch.equal(a, b) for a, b in zip(model.state_dict().values(), again.state_dict().values(), strict=True))
    with pytest.raises(WeightsError, match="'pcsr' for any scale"):
        weights.card("pcsr")
