"""VGG: layers by name, official weights, and what it refuses."""

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import save_file

from foveate.errors import InputError, WeightsError
from foveate.layers.fold import fuse
from foveate.layers.vgg import CAFFE, IMAGENET, VGG, VGG16, small_vgg

# torchvision's vgg16: index in `features`, inputs and outputs of each convolution.
CONVS = {0: (3, 64), 2: (64, 64), 5: (64, 128), 7: (128, 128), 10: (128, 256), 12: (256, 256), 14: (256, 256),
         17: (256, 512), 19: (512, 512), 21: (512, 512), 24: (512, 512), 26: (512, 512), 28: (512, 512)}  # fmt: skip


def narrow(divisor=1):
    """An official state dict, or one of the same names with fewer channels."""
    state = {}
    for i, (inputs, outputs) in CONVS.items():
        inputs = inputs if inputs == 3 else inputs // divisor
        state[f"features.{i}.weight"] = torch.randn(outputs // divisor, inputs, 3, 3) / (3 * inputs**0.5)
        state[f"features.{i}.bias"] = torch.randn(outputs // divisor) / 10
    for i in (0, 3, 6):
        state[f"classifier.{i}.weight"], state[f"classifier.{i}.bias"] = torch.zeros(2, 2), torch.zeros(2)
    return state


def test_vgg16_has_the_published_parameters_and_the_indices_of_torchvision():
    with torch.device("meta"):
        network = VGG(VGG16)
    assert sum(p.numel() for p in network.parameters()) == 14_714_688
    assert [network.layers[name] for name in ("relu1_2", "relu2_2", "relu3_3", "relu4_3")] == [3, 8, 15, 22]
    expected = {f"features.{i}.weight": (o, c, 3, 3) for i, (c, o) in CONVS.items()}
    expected |= {f"features.{i}.bias": (o,) for i, (c, o) in CONVS.items()}
    assert {k: tuple(v.shape) for k, v in network.state_dict().items()} == expected


def test_official_weights_give_what_the_formula_says(tmp_path):
    torch.manual_seed(0)
    state = narrow(16)
    save_file(state, tmp_path / "vgg16.safetensors")
    x = torch.rand(2, 3, 32, 48)
    y = (x - torch.tensor(IMAGENET[0]).view(3, 1, 1)) / torch.tensor(IMAGENET[1]).view(3, 1, 1)
    for i in (0, 2):
        y = F.relu(F.conv2d(y, state[f"features.{i}.weight"], state[f"features.{i}.bias"], padding=1))
    first = y
    y = F.max_pool2d(y, 2)
    for i in (5, 7):
        y = F.relu(F.conv2d(y, state[f"features.{i}.weight"], state[f"features.{i}.bias"], padding=1))
    for given in (state, tmp_path / "vgg16.safetensors", {k: v.double() for k, v in state.items()}):
        found = VGG.load_official(given)(x, ["relu2_2", "relu1_2"])
        torch.testing.assert_close(found["relu1_2"], first)
        torch.testing.assert_close(found["relu2_2"], y)


def test_weights_from_caffe_see_blue_first_in_bytes():
    torch.manual_seed(0)
    state, x = narrow(16), torch.rand(1, 3, 16, 16)
    network = VGG.load_official(state, caffe=True)
    bytes_ = 255 * x.flip(1) - torch.tensor([103.939, 116.779, 123.68]).view(3, 1, 1)
    expected = F.relu(F.conv2d(bytes_, state["features.0.weight"], state["features.0.bias"], padding=1))
    torch.testing.assert_close(network(x, ["relu1_1"])["relu1_1"], expected, atol=1e-3, rtol=1e-4)
    assert network.bgr
    assert CAFFE[0][0] < CAFFE[0][2]


def test_layers_after_the_deepest_one_asked_for_are_not_run():
    network = VGG(((4,), (4,), (4,)))
    network.features[6].weight.data.fill_(float("nan"))
    assert set(network(torch.rand(1, 3, 8, 8), ["relu2_1"])) == {"relu2_1"}
    assert network(torch.rand(1, 3, 8, 8))["relu3_1"].isnan().any()


def test_batch_norms_fold_into_the_same_names():
    torch.manual_seed(0)
    network = VGG(((4, 4), (6,)), norm=True)
    network.train()(torch.rand(4, 3, 8, 8))
    x = torch.rand(2, 3, 12, 12)
    before = network.eval()(x)
    folded = fuse(network)
    assert list(folded.state_dict()) == list(VGG(((4, 4), (6,))).state_dict())
    for name, activation in folded(x).items():
        torch.testing.assert_close(activation, before[name])


def test_the_network_that_comes_along_is_frozen_and_sees_something():
    network, x = small_vgg(), torch.rand(1, 3, 32, 32)
    assert not any(p.requires_grad for p in network.parameters())
    found = network(x, ["relu4_2"])["relu4_2"]
    assert found.shape == (1, 96, 4, 4)
    assert float(found.std()) > 0.01
    assert not torch.equal(found, network(x.flip(3), ["relu4_2"])["relu4_2"])


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: small_vgg()(torch.rand(1, 3, 8, 8), ["relu9_1"]), "no layer relu9_1.*relu1_1"),
        (lambda: small_vgg()(torch.rand(1, 3, 7, 9), ["relu4_1"]), "9 x 7 pixels are too small for relu4_1.*8 x 8"),
        (lambda: small_vgg()(torch.rand(3, 8, 8)), r"\[B, 3, H, W\]"),
        (lambda: small_vgg()(torch.zeros(1, 3, 8, 8, dtype=torch.uint8)), "uint8"),
    ],
)
def test_pictures_and_layers_that_do_not_fit(call, words):
    with pytest.raises(InputError, match=words):
        call()


@pytest.mark.parametrize(
    "state", [{}, {"conv.weight": torch.zeros(1)}, {"features.0.weight": torch.zeros(4, 3, 5, 5)}, "absent.safetensors"]
)
def test_other_weights(state):
    with pytest.raises(WeightsError):
        VGG.load_official(state)


def test_vgg_with_batch_norms_is_no_official_form():
    state = narrow(16)
    state["features.1.running_mean"] = torch.zeros(4)
    with pytest.raises(WeightsError, match="running_mean"):
        VGG.load_official(state)
