"""Pictures to tokens: features by a frozen encoder, each replaced by the place of the nearest word.

    z = encoder(x)  [B, D, h, w]        k(p) = argmin_j |z(p) - e_j|^2, both of unit length where `normalise` says so

`Tokeniser` takes any encoder, such as that of a VQGAN, with its codebook. `PatchTokeniser` needs no training but
k-means: its encoder are the principal components of p x p patches, which are orthonormal, so that it decodes as well.
Words are sorted by how often they are chosen, as `foveate.data.token_store` wants them.
"""

from typing import Self

import torch
import torch.nn.functional as F
from huggingface_hub import PyTorchModelHubMixin
from torch import Tensor, nn

from foveate.errors import InputError
from foveate.layers.vector_quantise import kmeans, nearest


class Tokeniser(nn.Module):
    """Pictures to tokens by an encoder and a codebook.

    Args:
        encoder: pictures [B, n, H, W] -> features [B, D, h, w].
        codebook: [K, D].
        normalise: compare features and words at unit length, as ViT-VQGAN does.

    Shape: [B, n, H, W] -> int64 [B, h, w].
    Raises: InputError when features and words have not the same number of channels.
    """

    codebook: Tensor

    def __init__(self, encoder: nn.Module, codebook: Tensor, normalise: bool = False) -> None:
        super().__init__()
        if codebook.dim() != 2 or not codebook.numel():
            raise InputError(f"a codebook is [K, D], got {tuple(codebook.shape)}.")
        self.encoder, self.normalise = encoder, normalise
        self.register_buffer("codebook", codebook.detach().clone())

    @torch.no_grad()
    def forward(self, x: Tensor) -> Tensor:
        z = self.encoder(x)
        if z.dim() != 4 or z.shape[1] != self.codebook.shape[1]:
            wanted = f"[B, {self.codebook.shape[1]}, h, w]"
            raise InputError(f"the encoder must give features {wanted} for this codebook, got {tuple(z.shape)}.")
        words = F.normalize(self.codebook, dim=1) if self.normalise else self.codebook
        flat = z.flatten(2).mT
        return nearest(F.normalize(flat, dim=2) if self.normalise else flat, words).unflatten(1, z.shape[2:])

    def features(self, tokens: Tensor) -> Tensor:
        """The words of tokens. Shape: [B, h, w] -> [B, D, h, w]."""
        return self.codebook[tokens.long()].permute(0, 3, 1, 2)

    @torch.no_grad()
    def keep(self, tokens: Tensor, words: int | None = None) -> Self:
        """Sort the words by how often tokens choose them, and keep the `words` most used; all that are used when None.

        Args:
            tokens: of pictures that stand for the set, made with the present codebook. Shape: any.
        """
        counts = torch.bincount(tokens.reshape(-1), minlength=len(self.codebook))
        count = int((counts > 0).sum()) if words is None else min(words, len(counts))
        self.codebook = self.codebook[counts.argsort(descending=True, stable=True)[: max(1, count)]].clone()
        return self


class PatchTokeniser(Tokeniser, PyTorchModelHubMixin):
    """Tokens of square patches, fitted in seconds.

    Args:
        patch: p, side of a patch.
        words: K.
        dim: D, principal components that are compared.
        channels: n of a picture.

    Raises: InputError for sizes that do not fit.
    """

    encoder: nn.Conv2d

    def __init__(self, patch: int = 4, words: int = 391, dim: int = 16, channels: int = 3) -> None:
        if min(patch, words, channels) < 1 or not 1 <= dim <= channels * patch * patch:
            raise InputError(f"dim is 1 to {channels * patch * patch} and all else 1 or more; got {dim=}, {words=}.")
        cut = nn.Conv2d(channels, dim, patch, patch, bias=False)
        super().__init__(cut.requires_grad_(False), torch.zeros(words, dim))
        self.patch = patch

    @torch.no_grad()
    def fit(self, pictures: Tensor, seed: int = 0, rounds: int = 20, most: int = 60_000) -> Self:
        """Find components and words. Shape: [N, n, H, W] in 0..1.

        Args:
            pictures: that stand for the set.
            seed: of the patches that are drawn, and of k-means.
            rounds: of k-means.
            most: patches that are looked at.
        """
        dice = torch.Generator().manual_seed(seed)
        weight = self.encoder.weight
        if pictures.dim() != 4 or not len(pictures) or min(pictures.shape[2:]) < self.patch:
            raise InputError(f"pictures are [N, n, H, W] of {self.patch} pixels or more, got {[*pictures.shape]}.")
        each = (pictures.shape[2] // self.patch) * (pictures.shape[3] // self.patch)
        some = pictures[torch.randperm(len(pictures), generator=dice)[: -(-most // each)]]
        patches = F.unfold(some, self.patch, stride=self.patch).mT.reshape(-1, weight[0].numel())
        patches = patches[torch.randperm(len(patches), generator=dice)[:most]]
        _, _, components = torch.linalg.svd(patches.T @ patches)
        weight.copy_(components[: len(weight)].view_as(weight))
        z = patches @ components[: len(weight)].T
        self.codebook = kmeans(z[None], len(self.codebook), dice, rounds)[0]
        return self.keep(nearest(z, self.codebook), len(self.codebook))

    def decode(self, tokens: Tensor) -> Tensor:
        """Pictures of tokens. Shape: [B, h, w] -> [B, n, h p, w p]."""
        return F.conv_transpose2d(self.features(tokens), self.encoder.weight, stride=self.patch)
