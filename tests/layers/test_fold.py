import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from foveate.errors import InputError
from foveate.layers.fold import (
    ConvNorm,
    DistilledHead,
    NormLinear,
    fold_bn_before,
    fold_conv_bn,
    fold_linear_bn,
    fuse,
    merge_convs,
)


def seasoned(module):
    """The module in eval mode, its batch norms with statistics and weights of their own."""
    for norm in module.modules():
        if isinstance(norm, nn.modules.batchnorm._BatchNorm):
            nn.init.normal_(norm.running_mean)
            nn.init.uniform_(norm.running_var, 0.3, 2)
            if norm.affine:
                nn.init.normal_(norm.weight)
                nn.init.normal_(norm.bias)
    return module.double().eval()


def close(a, b):
    torch.testing.assert_close(a, b, atol=1e-10, rtol=1e-10)


@given(st.integers(1, 5), st.sampled_from([1, 2]), st.sampled_from([1, 2, 4]), st.booleans(), st.booleans())
@settings(deadline=None, max_examples=25)
def test_a_norm_after_a_convolution_folds_into_it(kernel, stride, groups, bias, affine):
    conv = nn.Conv2d(4, 8, kernel, stride, kernel // 2, groups=groups, bias=bias)
    both, x = seasoned(nn.Sequential(conv, nn.BatchNorm2d(8, affine=affine))), torch.randn(2, 4, 7, 6).double()
    before = conv.weight.clone()
    close(fold_conv_bn(*both)(x), both(x))
    assert torch.equal(conv.weight, before)


@given(st.booleans(), st.booleans(), st.booleans())
@settings(deadline=None, max_examples=10)
def test_a_norm_beside_a_linear_layer_folds_into_it(bias, affine, first):
    norm, linear = nn.BatchNorm1d(5 if first else 3, affine=affine), nn.Linear(5, 3, bias=bias)
    both, x = seasoned(nn.Sequential(*((norm, linear) if first else (linear, norm)))), torch.randn(4, 5).double()
    close((fold_bn_before if first else fold_linear_bn)(*both)(x), both(x))


@given(st.integers(1, 4), st.booleans())
@settings(deadline=None, max_examples=10)
def test_a_norm_before_an_unpadded_convolution_folds_into_it(kernel, bias):
    both = seasoned(nn.Sequential(nn.BatchNorm2d(3), nn.Conv2d(3, 6, kernel, bias=bias)))
    x = torch.randn(2, 3, 6, 5).double()
    close(fold_bn_before(*both)(x), both(x))


@given(
    st.lists(st.sampled_from([1, 3, 5, 7]), min_size=1, max_size=3),
    st.sampled_from([1, 2, 6]),
    st.sampled_from([1, 2]),
    st.booleans(),
)
@settings(deadline=None, max_examples=25)
def test_parallel_convolutions_become_one(kernels, groups, stride, identity):
    convs = [nn.Conv2d(6, 6, k, stride, k // 2, groups=groups, bias=k != 3).double() for k in kernels]
    x = torch.randn(2, 6, 9, 8).double()
    identity = identity and stride == 1
    expected = sum(conv(x) for conv in convs) + (x if identity else 0)
    merged = merge_convs(convs, identity)
    close(merged(x), expected)
    assert merged.kernel_size == (max(kernels), max(kernels))


class Branches(nn.Module):
    def __init__(self):
        super().__init__()
        self.wide, self.narrow = ConvNorm(4, 4, 3, groups=4), ConvNorm(4, 4, 1, groups=4)

    def forward(self, x):
        return self.wide(x) + self.narrow(x) + x

    def folded(self):
        return merge_convs([self.wide.folded(), self.narrow.folded()], identity=True)


def test_fuse_puts_folded_forms_in_place_and_can_run_twice():
    inside = nn.Sequential(nn.ReLU(), Branches())
    network = seasoned(nn.Sequential(ConvNorm(3, 4, 3, 2), inside, nn.Flatten(1), NormLinear(64, 5)))
    x = torch.randn(2, 3, 8, 8).double()
    expected = network(x)
    branches = inside[1]
    assert fuse(network.train()) is network
    assert not network.training
    assert network[1] is inside
    close(network(x), expected)
    close(fuse(network)(x), expected)
    assert [type(m) for m in network.modules() if not list(m.children())] == [
        nn.Conv2d, nn.ReLU, nn.Conv2d, nn.Flatten, nn.Linear,
    ]  # fmt: skip
    assert isinstance(fuse(branches), nn.Conv2d)  # whose own parts were left as they were


def test_two_heads_answer_apart_in_training_and_fold_into_their_mean():
    head, x = seasoned(DistilledHead(6, 3)), torch.randn(5, 6).double()
    expected = (head.labels(x) + head.teacher(x)) / 2
    close(head(x), expected)
    close(head.folded()(x), expected)
    close(head(x), expected)
    labels, teacher = head.train()(x)
    assert labels.shape == teacher.shape == (5, 3)
    assert not torch.equal(labels, teacher)


def test_a_gamma_of_zero_makes_a_branch_silent():
    assert not ConvNorm(3, 4, 3, gamma=0.0)(torch.randn(2, 3, 5, 5)).any()


def test_folded_layers_keep_what_is_trained_and_the_type():
    conv = ConvNorm(2, 2).bfloat16().requires_grad_(False).eval().folded()
    assert conv.weight.dtype == torch.bfloat16
    assert not conv.weight.requires_grad


@pytest.mark.parametrize(
    ("call", "says"),
    [
        (lambda: ConvNorm(2, 2).train().folded(), "training=True.*after .eval"),
        (lambda: NormLinear(2, 2).train().folded(), "training=True"),
        (lambda: fold_conv_bn(nn.Conv2d(2, 2, 1), nn.GroupNorm(1, 2).eval()), "GroupNorm"),
        (lambda: fold_conv_bn(nn.Conv2d(2, 2, 1), nn.BatchNorm2d(2, track_running_stats=False).eval()), "statistics"),
        (lambda: fold_bn_before(nn.BatchNorm2d(2).eval(), nn.Conv2d(2, 2, 3, padding=1)), "unpadded"),
        (lambda: fold_bn_before(nn.BatchNorm2d(2).eval(), nn.Conv2d(2, 2, 3, padding="same")), "unpadded"),
        (lambda: fold_bn_before(nn.BatchNorm2d(2).eval(), nn.Conv2d(2, 2, 1, groups=2)), "groups"),
        (lambda: merge_convs([nn.Conv2d(2, 2, 3, padding=1), nn.Conv2d(2, 2, 1, 2)]), "alike"),
        (lambda: merge_convs([nn.Conv2d(2, 2, 3)]), "centred"),
        (lambda: merge_convs([nn.Conv2d(2, 2, 2, padding="same")]), "centred"),
        (lambda: merge_convs([nn.Conv2d(2, 4, 1)], identity=True), "identity"),
    ],
)
def test_what_cannot_be_folded_is_refused(call, says):
    with pytest.raises(InputError, match=says):
        call()
