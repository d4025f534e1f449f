"""SeiT: what the network sees of tokens, the stem that changes, and that it learns."""

import pytest
import torch
from torch import nn

from foveate.curate import seit
from foveate.curate.seit import NONE, Changes, SeiT, adapt_stem, draws
from foveate.errors import InputError
from foveate.layers.transformer import VisionTransformer


def _vit(**settings: int) -> VisionTransformer:
    options = {"num_classes": 3, "in_chans": 4} | settings
    return VisionTransformer(8, 2, 16, 1, 2, global_pool="avg", **options)  # type: ignore[arg-type]


def test_the_stem_overlaps_and_comes_off_again() -> None:
    network, x = _vit(), torch.randn(2, 4, 8, 8)
    before, keys = network.eval()(x), list(network.state_dict())
    handle = adapt_stem(network)
    stem = network.patch_embed.proj
    assert (stem.kernel_size, stem.stride, stem.padding) == ((4, 4), (2, 2), (1, 1))
    assert stem.weight.shape == (16, 4, 4, 4)
    assert list(network.state_dict()) == keys
    assert network(x).shape == (2, 3)
    handle.remove()
    assert torch.equal(network(x), before)


def test_the_stem_of_a_transformers_vit() -> None:
    transformers = pytest.importorskip("transformers")
    config = transformers.ViTConfig(
        hidden_size=8, num_hidden_layers=1, num_attention_heads=2, intermediate_size=8, image_size=8, patch_size=2,
        num_channels=4, num_labels=3,
    )  # fmt: skip
    network = transformers.ViTForImageClassification(config).eval()
    x = torch.randn(1, 4, 8, 8)
    with torch.no_grad():
        before = network(x).logits
        handle = adapt_stem(network)
        assert network(x).logits.shape == (1, 3)
        assert not torch.equal(network(x).logits, before)
        handle.remove()
        assert torch.equal(network(x).logits, before)


def test_a_network_without_patches_is_refused() -> None:
    for network in (nn.Sequential(nn.Conv2d(3, 4, 3, 2)), nn.Linear(2, 2), nn.Sequential(nn.Conv2d(3, 4, 3, 3))):
        with pytest.raises(InputError, match="patches of 2 features"):
            adapt_stem(network)


def test_testing_sees_the_words_of_the_middle() -> None:
    torch.manual_seed(0)
    book, tokens = torch.randn(9, 4), torch.randint(0, 9, (2, 10, 10))
    model = SeiT(nn.Identity(), book, size=8).eval()
    expected = ((book - book.mean(0)) / book.std())[tokens].permute(0, 3, 1, 2)[..., 1:9, 1:9]
    assert torch.allclose(model(tokens), expected, atol=1e-6)
    assert torch.equal(model.features(tokens, changed=False), model(tokens))
    plain = SeiT(nn.Identity(), book, size=8, changes=NONE)
    assert torch.equal(plain.features(tokens, changed=True), model(tokens))


def test_changes_depend_on_the_seed_alone() -> None:
    torch.manual_seed(0)
    book, tokens = torch.randn(9, 4), torch.randint(0, 9, (6, 8, 8))
    made = [SeiT(nn.Identity(), book, seed=seed).features(tokens, changed=True) for seed in (1, 1, 2)]
    assert made[0].shape == (6, 4, 8, 8)
    assert torch.equal(made[0], made[1])
    assert not torch.equal(made[0], made[2])


def test_it_learns_from_tokens() -> None:
    torch.manual_seed(0)
    labels = torch.arange(3).repeat(40)
    tokens = torch.randint(0, 12, (120, 8, 8))
    common = torch.rand(120, 8, 8) < 0.6
    tokens = torch.where(common, 4 * labels[:, None, None], tokens)  # a class has a word of its own, most of the time
    network = _vit()
    adapt_stem(network)
    model = SeiT(network, torch.randn(12, 4), changes=Changes(scale=(0.5, 1)))
    adam, batches, lost = torch.optim.Adam(model.parameters(), 3e-3), draws(tokens, labels, 40), []
    for _ in range(40):
        loss = model.loss(*next(batches))
        adam.zero_grad()
        loss.backward()
        adam.step()
        lost.append(float(loss.detach()))
    assert sum(lost[-5:]) < 0.9 * sum(lost[:5])
    assert (model.eval()(tokens).argmax(1) == labels).float().mean() > 0.9


def test_draws_show_every_picture_before_any_comes_twice() -> None:
    batches = draws(torch.arange(12).view(12, 1, 1), torch.arange(12), 4)
    seen = torch.cat([next(batches)[1] for _ in range(3)])
    assert sorted(seen.tolist()) == list(range(12))


@pytest.mark.parametrize(
    "tokens",
    [
        torch.zeros(2, 8),
        torch.zeros(1, 8, 8),
        torch.zeros(0, 8, 8).long(),
        torch.full((1, 8, 8), 9),
        -torch.ones(1, 8, 8).long(),
    ],
)
def test_unusable_tokens(tokens: torch.Tensor) -> None:
    with pytest.raises(InputError, match="tokens are"):
        SeiT(nn.Identity(), torch.randn(9, 4))(tokens)


def test_unusable_settings() -> None:
    with pytest.raises(InputError, match="chances"):
        Changes(replace=0.8, swap=0.3)
    with pytest.raises(InputError, match="scale"):
        Changes(scale=(0.5, 0.2))
    with pytest.raises(InputError, match="codebook"):
        SeiT(nn.Identity(), torch.randn(9))
    with pytest.raises(InputError, match="smaller than size=9"):
        SeiT(nn.Identity(), torch.randn(9, 4), size=9)(torch.zeros(1, 8, 8).long())
    with pytest.raises(InputError, match="num_classes"):
        SeiT(nn.Identity(), torch.randn(9, 4)).loss(torch.zeros(2, 8, 8).long(), torch.zeros(2).long())


def test_the_example_is_repeatable() -> None:
    outputs = []
    for _ in range(2):
        torch.manual_seed(0)
        call, inputs = seit.conformance_example()
        outputs.append(call(*inputs))
    assert outputs[0].shape == (3, 4)
    assert torch.equal(*outputs)
