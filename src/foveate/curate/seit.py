"""SeiT: classifiers learn from stored tokens, about a hundredth of the bytes of the pictures.

Park, Chun, Heo, Kim, Yun 2023, "SeiT: Storage-Efficient Vision Training with Tokens Using 1% of Pixel Storage",
arXiv:2303.11114.

    once       k = tokeniser(picture)                      [h, w] of K words, stored (`foveate.data.token_store`)
    learning   k -> replace or swap or neither -> words E[k] [D, h, w] -> random crop -> noise or exchange or neither
               -> cutmix -> stem -> any network
    testing    k -> words -> middle -> stem -> network

Only the stem of the network changes: where a vision transformer cuts patches of s x s, here D-channel features are
mixed by a convolution of 2 s x 2 s with stride s, whose neighbours overlap (the Stem-Adapter; s = 2 in the paper).
`foveate.curate.token_augment` holds the changes to tokens, `foveate.curate.tokeniser` a tokeniser that needs no
training. Other tokens are as good: those of a ViT-VQGAN with 391 words are the paper's.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from foveate.curate import token_augment as augment
from foveate.engine.surgery import Handle, find
from foveate.engine.surgery import replace as put_in
from foveate.errors import InputError


@dataclass(frozen=True)
class Changes:
    """What is done to tokens and features while learning; the paper's settings are the defaults.

    Args:
        replace, swap: chance of either, neither otherwise.
        replaced: share of the tokens that become synonyms.
        swapped: largest side of a swapped square over the grid's.
        scale: area of a random crop; (1, 1) leaves all.
        noise, exchange: chance of either for a batch, neither otherwise.
        strength: of the noise, in standard deviations of the words' numbers.
        cutmix: alpha; 0 for none.
        smoothing: of labels.
    """

    replace: float = 0.25
    swap: float = 0.25
    replaced: float = 0.25
    swapped: float = 0.25
    scale: tuple[float, float] = (0.08, 1.0)
    noise: float = 0.5
    exchange: float = 0.25
    strength: float = 1.0
    cutmix: float = 1.0
    smoothing: float = 0.1

    def __post_init__(self) -> None:
        shares = (self.replace, self.swap, self.replaced, self.swapped, self.noise, self.exchange, self.smoothing)
        chances = max(self.replace + self.swap, self.noise + self.exchange, *shares)
        if min(shares) < 0 or chances > 1 or min(self.strength, self.cutmix) < 0 or self.swapped > 0.5:
            raise InputError(f"chances are 0 to 1 and those of either kind at most 1 together; got {self}.")
        if not 0 < self.scale[0] <= self.scale[1] <= 1:
            raise InputError(f"scale is two shares of the area in order, got {self.scale}.")


NONE = Changes(replace=0, swap=0, scale=(1, 1), noise=0, exchange=0, cutmix=0)
"""Tokens as they are."""


class SeiT(nn.Module):
    """A network that reads tokens.

    Args:
        network: takes features [B, D, size, size] and gives classes; see `adapt_stem`.
        codebook: [K, D].
        size: side of what the network sees: a random crop of the grid is resampled to it while learning, the middle is
            cut when testing (28 of 32 in the paper); all of the grid when None.
        changes: to tokens and features while learning.
        seed: of them.

    Shape: int [B, h, w] -> [B, classes].
    Raises: InputError for tokens of another kind or range.
    """

    mean: Tensor
    spread: Tensor
    codebook: Tensor
    synonyms: Tensor

    def __init__(
        self,
        network: nn.Module,
        codebook: Tensor,
        *,
        size: int | None = None,
        changes: Changes | None = None,
        seed: int = 0,
    ) -> None:
        super().__init__()
        if codebook.dim() != 2 or len(codebook) < 2 or (size is not None and size < 1):
            raise InputError(f"a codebook is [K, D] with 2 words or more, got {tuple(codebook.shape)}, {size=}.")
        self.network, self.size, self.changes = network, size, changes or Changes()
        words = codebook.detach().float()
        # Words at unit spread, so that noise and learning rates mean the same with every codebook.
        self.register_buffer("codebook", (words - words.mean(0)) / words.std().clamp_min(1e-6))
        table = augment.synonyms(words, min(5, len(words) - 1))
        self.register_buffer("synonyms", table, persistent=False)
        self.dice = torch.Generator().manual_seed(seed)

    def forward(self, tokens: Tensor) -> Tensor:
        """Classes of tokens as they are. In training, call `loss` instead."""
        return self.network(self.features(tokens, changed=False))

    def loss(self, tokens: Tensor, labels: Tensor) -> Tensor:
        """Cross-entropy on changed tokens. Shape: [B, h, w], [B] -> scalar."""
        features = self.features(tokens, changed=True)
        classes = self._classes()
        mixed, target = augment.cutmix(
            features, labels, classes, self.dice, self.changes.cutmix, self.changes.smoothing
        )
        return F.cross_entropy(self.network(mixed), target)

    def features(self, tokens: Tensor, changed: bool) -> Tensor:
        """What the network sees. Shape: [B, h, w] -> [B, D, size, size]."""
        tokens = self._checked(tokens)
        size = self.size or min(tokens.shape[1:])
        if not changed:
            return augment.centre(self._words(tokens), size)
        features = self._words(self._change_tokens(tokens))
        if self.changes.scale != (1, 1):
            features = augment.crop(features, augment.boxes(len(features), self.dice, self.changes.scale), size)
        else:
            features = augment.centre(features, size)
        roll = float(torch.rand((), generator=self.dice))
        if roll < self.changes.noise:
            return augment.noise(features, self.changes.strength, self.dice)
        if roll < self.changes.noise + self.changes.exchange:
            return augment.exchange(features, self.dice)
        return features

    def _change_tokens(self, tokens: Tensor) -> Tensor:
        """One change, or none, for every picture."""
        roll = torch.rand(len(tokens), 1, 1, generator=self.dice).to(tokens.device)
        chance = self.changes.replace
        replaced = augment.replace(tokens, self.synonyms, self.changes.replaced, self.dice)
        swapped = augment.swap(tokens, self.dice, self.changes.swapped)
        return torch.where(roll < chance, replaced, torch.where(roll < chance + self.changes.swap, swapped, tokens))

    def _words(self, tokens: Tensor) -> Tensor:
        return F.embedding(tokens, self.codebook).permute(0, 3, 1, 2)

    def _checked(self, tokens: Tensor) -> Tensor:
        if tokens.dim() != 3 or not tokens.numel() or tokens.is_floating_point() or tokens.is_complex():
            raise InputError(f"tokens are whole numbers [B, h, w], got {tokens.dtype} {tuple(tokens.shape)}.")
        if self.size is not None and min(tokens.shape[1:]) < self.size:
            raise InputError(f"a grid of {tuple(tokens.shape[1:])} tokens is smaller than size={self.size}.")
        if int(tokens.min()) < 0 or int(tokens.max()) >= len(self.codebook):
            raise InputError(f"tokens are 0 to {len(self.codebook) - 1} with this codebook, got up to {tokens.max()}.")
        return tokens.long()

    def _classes(self) -> int:
        classes: Any = getattr(self.network, "num_classes", None)
        if not isinstance(classes, int) or classes < 1:
            raise InputError(f"{type(self.network).__name__} does not say its num_classes; set the attribute.")
        return classes


def adapt_stem(network: nn.Module) -> Handle:
    """Let the patches of a vision transformer overlap: Conv(s x s, stride s) becomes Conv(2 s x 2 s, stride s).

    The network is to be built for features: channels D in place of 3, patches of s features (timm's and
    `foveate.layers.transformer`'s `in_chans`, transformers' `num_channels`).

    Returns: a handle whose `remove()` puts the old convolution back.
    Raises: InputError for a network that does not begin with a convolution whose stride is its kernel, of an even size.
    """
    for name, conv in find(network, nn.Conv2d).items():
        assert isinstance(conv, nn.Conv2d)
        stride = conv.stride[0]
        if conv.kernel_size == conv.stride == (stride, stride) and stride % 2 == 0:
            new = nn.Conv2d(
                conv.in_channels, conv.out_channels, 2 * stride, stride, stride // 2, bias=conv.bias is not None
            )
            return put_in(network, {name: new.to(conv.weight)})
        break
    raise InputError(
        f"{type(network).__name__} does not begin with a convolution that cuts patches of an even side; build it with "
        "patches of 2 features."
    )


def draws(tokens: Tensor, labels: Tensor, batch: int, seed: int = 0) -> Iterator[tuple[Tensor, Tensor]]:
    """Random batches for ever, every picture once before any comes twice."""
    dice = torch.Generator().manual_seed(seed)
    while True:
        for index in torch.randperm(len(labels), generator=dice).split(batch):
            if len(index) == min(batch, len(labels)):
                yield tokens[index], labels[index]


def conformance_example() -> tuple[SeiT, tuple[Tensor]]:
    """A small network and the tokens of three pictures."""
    from foveate.layers.transformer import VisionTransformer

    network = VisionTransformer(8, 2, 16, 1, 2, num_classes=4, global_pool="avg", in_chans=6)
    adapt_stem(network)
    return SeiT(network, torch.randn(12, 6)).eval(), (torch.randint(0, 12, (3, 8, 8)),)
