"""Perceptual losses: the distance of two pictures in the features of a fixed network, not in their pixels.

Johnson, Alahi, Fei-Fei 2016, "Perceptual Losses for Real-Time Style Transfer and Super-Resolution", arXiv:1603.08155.
With f_j(x) [C, H, W] what layer j of a frozen network makes of x, and psi its C x HW matrix:

    content    |f_j(y) - f_j(x)|^2 / (C H W)                           what is where
    style      |G_j(y) - G_j(s)|_F^2,  G_j = psi psi^T / (C H W)       which features come together, wherever
    variation  sum of squared differences of neighbours / (C H W)      how smooth y is
    total      a sum over layers of the first two and the third, each with its weight

The paper uses VGG-16 with style at relu1_2, relu2_2, relu3_3 and relu4_3 and content at relu2_2; its text takes the
norm above, its released code the mean over the C^2 entries of G (`entries`). Weights depend on the network's units:

    network                                        content   style   variation (ours divides by C H W, theirs does not)
    VGG-16 from Caffe, the released code               1        5    1e-6 * C H W
    VGG-16 from torchvision, PyTorch's example       1e5     1e10    0
    the small network that comes with foveate          1      300    0.1

`relative_to` makes weights independent of the network: each layer then counts relative to what pictures have there.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from copy import deepcopy
from functools import partial
from typing import Any, NamedTuple, Self

import torch
from torch import Tensor, nn

from foveate.errors import InputError
from foveate.layers.vgg import VGG, small_vgg

STYLE_LAYERS = ("relu1_2", "relu2_2", "relu3_3", "relu4_2")
"""Of the small network; VGG-16's last one is relu4_3."""

CONTENT_LAYERS = ("relu2_2",)

Layers = Sequence[str] | Mapping[str, float]
Activations = Mapping[str, Tensor]


def feature_loss(x: Tensor, y: Tensor) -> Tensor:
    """Mean squared difference of two activations. Shape: [B, C, H, W] twice -> [].

    Raises: InputError when their shapes differ.
    """
    if x.shape != y.shape:
        raise InputError(f"features of shapes {tuple(x.shape)} and {tuple(y.shape)}; compare pictures of one size.")
    return (x - y).square().mean()


def gram(x: Tensor) -> Tensor:
    """psi psi^T / (C H W), in single precision at least, where the sums of squares of half precision would overflow.

    Shape: [B, C, H, W] -> [B, C, C].
    """
    flat = x.flatten(2).to(torch.promote_types(x.dtype, torch.float32))
    return flat @ flat.transpose(1, 2) / flat[0].numel()


def style_loss(x: Tensor, y: Tensor, entries: str = "mean") -> Tensor:
    """Squared difference of two Gram matrices, the mean over the batch.

    Args:
        entries: "mean" over the C^2 entries, as the released code, or their "sum", as the paper.

    Shape: [B, C, C] twice, where either B may be 1 -> [].
    """
    difference = (x - y).square().mean(0)
    return difference.mean() if entries == "mean" else difference.sum()


def total_variation(x: Tensor) -> Tensor:
    """Squared differences of neighbours, across and down, divided by C H W; the mean over the batch.

    Shape: [B, C, H, W] -> [].

    >>> float(total_variation(torch.full((1, 3, 4, 4), 0.3)))
    0.0
    """
    return (x.diff(dim=2).square().sum() + x.diff(dim=3).square().sum()) / x.numel()


class Tapped(nn.Module):
    """Make a feature network of any network: it gives the outputs of some of its modules by name.

    The network is copied and frozen, and runs only as far as the last module asked for.

    Args:
        network: takes pictures of 0..1, or what `prepare` makes of them.
        layers: names of modules, as `network.named_modules()` gives them.
        prepare: applied to the pictures first, e.g. to subtract a mean.

    Raises: InputError for a module that is not there.

    >>> net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Conv2d(4, 8, 3))
    >>> {name: tuple(out.shape) for name, out in Tapped(net, ["1"])(torch.rand(1, 3, 8, 8)).items()}
    {'1': (1, 4, 6, 6)}
    """

    class _Done(Exception):
        """All that was asked for is there."""

    def __init__(
        self, network: nn.Module, layers: Sequence[str], prepare: Callable[[Tensor], Tensor] | None = None
    ) -> None:
        super().__init__()
        modules = dict(network.named_modules())
        if unknown := [name for name in layers if name not in modules]:
            some = ", ".join(list(modules)[1:9])
            raise InputError(f"no module {', '.join(map(repr, unknown))}; the network has {some}, ...")
        self.network, self.layers, self.prepare = deepcopy(network), tuple(layers), prepare

    def forward(self, x: Tensor, layers: Sequence[str] | None = None) -> dict[str, Tensor]:
        """The outputs of some of the layers, by default of all.

        Raises: InputError when a later module changed an output in place, or one did not run.
        """
        found: dict[str, tuple[Tensor, int]] = {}
        asked = self.layers if layers is None else tuple(layers)
        with self._hooks(asked, found), suppress(Tapped._Done):
            self.network(x if self.prepare is None else self.prepare(x))
        for name in asked:
            if name not in found:
                raise InputError(f"the module {name!r} did not run; ask for one that does.")
            if _version(found[name][0]) != found[name][1]:
                raise InputError(
                    f"what {name!r} gave was changed in place by a later module; build that one with inplace=False."
                )
        return {name: found[name][0] for name in asked}

    @contextmanager
    def _hooks(self, asked: Sequence[str], found: dict[str, tuple[Tensor, int]]) -> Iterator[None]:
        def keep(name: str, module: nn.Module, inputs: Any, output: Tensor) -> None:
            found[name] = output, _version(output)
            if len(found) == len(asked):
                raise Tapped._Done

        handles = [self.network.get_submodule(name).register_forward_hook(partial(keep, name)) for name in asked]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()


class Terms(NamedTuple):
    """The parts of the loss, each with its weight in it; an absent one is 0."""

    content: Tensor
    style: Tensor
    variation: Tensor

    @property
    def total(self) -> Tensor:
        """Their sum."""
        return self.content + self.style + self.variation


class PerceptualLosses(nn.Module):
    """Content, style and total variation, as one loss.

    The feature network is a copy, frozen and always in evaluation mode: pictures receive gradients, it does not.

    Args:
        network: called as network(pictures, layers), it gives activations by name: a `VGG`, or any network in `Tapped`;
            None for the small one that comes with foveate.
        content, style: names of layers, or weights by name.
        content_weight, style_weight, variation_weight: of the three parts; see the table above.
        entries: "mean" or "sum" over the entries of a difference of Gram matrices, see `style_loss`.

    Shape: y, content, style [B, 3, H, W] in 0..1 -> []; `style` may have another size, and one picture for all.

    >>> loss, x = PerceptualLosses(), torch.rand(1, 3, 32, 32)
    >>> float(loss(x, content=x)) == float(loss.variation_weight * total_variation(x))
    True
    """

    def __init__(
        self,
        network: nn.Module | None = None,
        content: Layers = CONTENT_LAYERS,
        style: Layers = STYLE_LAYERS,
        content_weight: float = 1.0,
        style_weight: float = 300.0,
        variation_weight: float = 0.1,
        entries: str = "mean",
    ) -> None:
        super().__init__()
        if entries not in ("mean", "sum"):
            raise InputError(f"entries={entries!r} is not known; use 'mean' or 'sum'.")
        self.network = deepcopy(small_vgg() if network is None else network).eval().requires_grad_(False)
        self.content_layers, self.style_layers = (_weighed(layers) for layers in (content, style))
        known = getattr(self.network, "layers", None)
        unknown = [] if known is None else [n for n in self.content_layers | self.style_layers if n not in known]
        if unknown:
            raise InputError(f"the feature network gives no {', '.join(unknown)}; it has {', '.join(known or ())}.")
        self.content_weight, self.style_weight, self.variation_weight = content_weight, style_weight, variation_weight
        self.entries = entries

    def train(self, mode: bool = True) -> Self:
        """Keep the feature network in evaluation mode."""
        super().train(mode)
        self.network.eval()
        return self

    def relative_to(self, style: Tensor, content: Tensor) -> Self:
        """Divide the weight of every layer by what these pictures have there, in place.

        A picture of which a layer sees nothing then loses 1 in content, and 1 in style, times the layer's own weight.

        Args:
            style: the style picture.
            content: some of the pictures to be judged.
        """
        for layers, found, summed in (
            (self.content_layers, self.activations(content), False),
            (self.style_layers, self.grams(style), self.entries == "sum"),
        ):
            for name, x in found.items():
                squares = x.square().mean(0)
                layers[name] /= float(squares.sum() if summed else squares.mean())
        return self

    def grams(self, style: Tensor) -> dict[str, Tensor]:
        """Gram matrices of style pictures, to be computed once. Shape: [B, 3, H, W] -> {name: [B, C, C]}."""
        with torch.no_grad():
            return {name: gram(x) for name, x in self.network(style, list(self.style_layers)).items()}

    def activations(self, content: Tensor) -> dict[str, Tensor]:
        """What content pictures are at the content layers, to be computed once. Shape: [B, 3, H, W] -> by name."""
        with torch.no_grad():
            return dict(self.network(content, list(self.content_layers)))

    def terms(
        self, y: Tensor, content: Tensor | Activations | None = None, style: Tensor | Activations | None = None
    ) -> Terms:
        """The parts of the loss of y.

        Args:
            y: pictures to be judged.
            content: what they should show: pictures of the same size, or what `activations` made of them.
            style: what they should look like: pictures, or what `grams` made of them.
        """
        _check("y", y)
        if isinstance(content, Tensor) and content.shape != y.shape:
            raise InputError(f"y is {tuple(y.shape)}, content {tuple(content.shape)}; give pictures of one size.")
        wanted = _given(content, lambda x: self.activations(_check("content", x)))
        grams = _given(style, lambda x: self.grams(_check("style", x)))
        layers = list(dict.fromkeys([*wanted, *grams]))
        seen = self.network(y, layers) if layers else {}
        none = y.new_zeros(())
        like = sum((w * feature_loss(seen[n], wanted[n]) for n, w in self.content_layers.items() if n in wanted), none)
        styled = sum(
            (w * style_loss(gram(seen[n]), grams[n], self.entries) for n, w in self.style_layers.items() if n in grams),
            none,
        )
        smooth = total_variation(y) if self.variation_weight else none
        return Terms(self.content_weight * like, self.style_weight * styled, self.variation_weight * smooth)

    def forward(
        self, y: Tensor, content: Tensor | Activations | None = None, style: Tensor | Activations | None = None
    ) -> Tensor:
        return self.terms(y, content, style).total

    @staticmethod
    def conformance_example() -> tuple[Callable[..., Tensor], tuple[Tensor, ...]]:
        """A narrow VGG of two blocks, on noise."""
        network = VGG(((4, 4), (6,))).double()
        loss = PerceptualLosses(network, ("relu2_1",), ("relu1_2", "relu2_1"), style_weight=50.0)
        y = torch.rand(1, 3, 8, 9, dtype=torch.float64, requires_grad=True)
        return loss, (y, torch.rand_like(y).detach(), torch.rand(1, 3, 6, 6, dtype=torch.float64))


def _version(x: Tensor) -> int:
    return 0 if x.is_inference() else x._version  # inference mode does not count changes


def _given(x: Tensor | Activations | None, measure: Callable[[Tensor], Activations]) -> Activations:
    return {} if x is None else x if isinstance(x, Mapping) else measure(x)


def _weighed(layers: Layers) -> dict[str, float]:
    return dict(layers) if isinstance(layers, Mapping) else dict.fromkeys(layers, 1.0)


def _check(name: str, x: Tensor) -> Tensor:
    if not isinstance(x, Tensor) or x.dim() != 4 or not x.is_floating_point() or x.numel() == 0:
        got = f"{x.dtype} of shape {tuple(x.shape)}" if isinstance(x, Tensor) else type(x).__name__
        raise InputError(f"{name} is {got}; give float pictures [B, 3, H, W] in 0..1.")
    return x
