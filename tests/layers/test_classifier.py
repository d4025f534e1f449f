import json

import pytest
import torch
from torch import Tensor, nn

from foveate.errors import InputError
from foveate.layers.classifier import ImageClassifier


class Tiny(ImageClassifier):
    """A convolution and a head."""

    def __init__(self, num_classes: int = 4, in_chans: int = 3) -> None:
        super().__init__(6, in_chans)
        self.conv = nn.Conv2d(in_chans, 6, 3, padding=1)
        self.reset_classifier(num_classes)

    def forward_features(self, x: Tensor) -> Tensor:
        self.check(x)
        return self.conv(x)


def picture(*shape: int) -> Tensor:
    return torch.rand(shape, generator=torch.Generator().manual_seed(0))


def test_forward_is_the_head_on_the_features() -> None:
    net, x = Tiny(), picture(2, 3, 5, 7)
    features = net.forward_features(x)
    pooled = net.forward_head(features, pre_logits=True)
    torch.testing.assert_close(pooled, features.mean((2, 3)))
    assert torch.equal(net(x), net.head(pooled))
    assert net.num_features == 6


def test_another_number_of_classes_is_remembered(tmp_path) -> None:  # type: ignore[no-untyped-def]
    net, x = Tiny().double(), picture(1, 3, 4, 4).double()
    net.reset_classifier(9)
    assert net(x).shape == (1, 9)
    assert net.get_classifier().weight.dtype == torch.float64
    net.float().save_pretrained(tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["num_classes"] == 9
    assert torch.equal(Tiny.from_pretrained(tmp_path)(x.float()), net(x.float()))
    net.reset_classifier(0)
    assert net(x.float()).shape == (1, 6)
    with pytest.raises(InputError, match="got -2"):
        net.reset_classifier(-2)


@pytest.mark.parametrize(
    ("x", "message"),
    [
        (torch.zeros(3, 4, 4), r"\[B, 3, H, W\], got \(3, 4, 4\)"),
        (torch.zeros(1, 1, 4, 4), r"got \(1, 1, 4, 4\)"),
        (torch.zeros(0, 3, 4, 4), "empty"),
        (torch.zeros(1, 3, 4, 4, dtype=torch.uint8), "torch.uint8; divide"),
        (torch.full((1, 3, 4, 4), torch.nan), "NaN"),
        (torch.full((1, 3, 4, 4), torch.inf), "NaN or infinite"),
    ],
)
def test_pictures_that_cannot_be_used_are_refused(x: Tensor, message: str) -> None:
    with pytest.raises(InputError, match=message):
        Tiny().eval()(x)


def test_training_does_not_wait_for_the_values() -> None:
    assert Tiny().train()(torch.full((1, 3, 4, 4), torch.nan)).isnan().all()
