"""FIT as a decoder of token sequences, and as a denoiser of pictures (Chen, Li 2023, arXiv:2305.12689, section 2).

FITDecoder    causal in every place: tokens see those before them in their group, latents the groups up to their
              own, and a group is written by the latents of the one before. So the logits at a token depend on the
              tokens up to it, and one forward pass trains on them all.
FITDenoiser   tokens are patches of a noisy picture, latents also read the time (and class), and may begin with the
              latents of the step before, through a norm whose gain starts at zero (self-conditioning, as in RIN,
              Jabri, Fleet, Chen 2022, arXiv:2212.11972).
"""

import torch
import torch.nn.functional as F
from huggingface_hub import PyTorchModelHubMixin
from torch import Tensor, nn

from foveate.encode.fit_interleaved import CrossAttention, Interleaved
from foveate.errors import InputError
from foveate.layers.transformer import MLP


class FITDecoder(nn.Module, PyTorchModelHubMixin):
    """Predict the next token of a long sequence.

    Args:
        vocabulary: number of symbols.
        groups, tokens: t groups of n tokens; sequences have t n.
        latents: m of each group.
        dims, heads, layers: see `foveate.encode.fit_interleaved.FIT`.

    Shape: symbols [B, t n] -> logits [B, t n, vocabulary]; those at place i are for symbol i + 1 and depend on symbols
        up to i.
    Raises: InputError for another length or symbols out of range.
    """

    def __init__(
        self,
        vocabulary: int,
        groups: int,
        tokens: int,
        latents: int = 8,
        dims: tuple[int, int] = (384, 768),
        heads: tuple[int, int] = (6, 12),
        layers: str = "(2)4(2)4(2)0",
    ) -> None:
        super().__init__()
        self.groups, self.tokens, self.vocabulary = groups, tokens, vocabulary
        self.embed = nn.Embedding(vocabulary, dims[0])
        self.positions = nn.Parameter(0.02 * torch.randn(1, 1, tokens, dims[0]))
        self.latent_positions = nn.Parameter(0.02 * torch.randn(1, groups, latents, dims[1]))
        self.body = Interleaved(dims, heads, layers, causal=True)
        self.body.norm_latents = nn.Identity()  # type: ignore[assignment]
        self.bias = nn.Parameter(torch.zeros(vocabulary))
        nn.init.trunc_normal_(self.embed.weight, std=0.02)

    def forward(self, symbols: Tensor) -> Tensor:
        length = self.groups * self.tokens
        if symbols.dim() != 2 or symbols.shape[1] != length or symbols.is_floating_point():
            raise InputError(f"expected symbols [B, {length}], got {symbols.dtype} {tuple(symbols.shape)}.")
        if symbols.numel() and not 0 <= int(symbols.min()) <= int(symbols.max()) < self.vocabulary:
            raise InputError(f"symbols must be 0 to {self.vocabulary - 1}, got {symbols.min()} to {symbols.max()}.")
        x = self.embed(symbols).unflatten(1, (self.groups, self.tokens)) + self.positions
        x, _ = self.body(x, self.latent_positions.expand(len(symbols), -1, -1, -1))
        return F.linear(x.flatten(1, 2), self.embed.weight, self.bias)


class FITDenoiser(nn.Module, PyTorchModelHubMixin):
    """Predict what is asked of a diffusion model (noise or picture) from a noisy picture.

    Args:
        img_size, in_chans, patch_size: of the picture.
        groups: t, a square.
        latents: m of each group.
        dims, heads, layers: see `foveate.encode.fit_interleaved.FIT`; layers end in 0.
        num_classes: 0 for a model without classes.

    Shape: x [B, C, H, W], time [B] in 0..1, label [B] int64 or None, latents [B, t, m, D_z] of the step before or
        None -> picture [B, C, H, W], latents [B, t, m, D_z].
    Raises: InputError for settings or inputs that do not fit.
    """

    def __init__(
        self,
        img_size: int = 64,
        in_chans: int = 3,
        patch_size: int = 4,
        groups: int = 16,
        latents: int = 8,
        dims: tuple[int, int] = (256, 512),
        heads: tuple[int, int] = (4, 8),
        layers: str = "(2)4(2)4(2)0",
        num_classes: int = 0,
    ) -> None:
        super().__init__()
        side = round(max(groups, 0) ** 0.5)
        if side < 1 or side * side != groups or img_size % (side * patch_size) or not layers.endswith(")0"):
            raise InputError(
                f"groups must be a square whose root times the patch divides the picture, and layers end in ')0'; got "
                f"{img_size=}, {patch_size=}, {groups=}, {layers=}."
            )
        self.img_size, self.in_chans, self.patch, self.side = img_size, in_chans, patch_size, side
        self.part = img_size // side // patch_size
        pixels = in_chans * patch_size**2
        self.embed, self.embed_norm = nn.Linear(pixels, dims[0]), nn.LayerNorm(dims[0], eps=1e-6)
        self.positions = nn.Parameter(0.02 * torch.randn(1, 1, self.part**2, dims[0]))
        self.latent_positions = nn.Parameter(0.02 * torch.randn(1, groups, latents, dims[1]))
        self.time = nn.Sequential(nn.Linear(dims[1], dims[1]), nn.SiLU(), nn.Linear(dims[1], dims[1]))
        self.label = nn.Embedding(num_classes, dims[1]) if num_classes else None
        self.condition = CrossAttention(dims[1], dims[1], heads[1], heads[1])
        self.before, self.before_norm = MLP(dims[1], 4 * dims[1]), nn.LayerNorm(dims[1], eps=1e-6)
        nn.init.zeros_(self.before_norm.weight)
        self.body = Interleaved(dims, heads, layers)
        self.out = nn.Linear(dims[0], pixels)

    def forward(
        self, x: Tensor, time: Tensor, label: Tensor | None = None, latents: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        size = (self.in_chans, self.img_size, self.img_size)
        if tuple(x.shape[1:]) != size or time.shape != x.shape[:1]:
            raise InputError(f"expected x [B, {size}] and time [B], got {tuple(x.shape)} and {tuple(time.shape)}.")
        if (label is None) != (self.label is None):
            raise InputError("a model with classes needs labels, and one without takes none.")
        context = self.time(time_code(time, self.latent_positions.shape[3]))[:, None]
        if label is not None and self.label is not None:
            context = torch.cat([context, self.label(label)[:, None]], 1)
        z = self.latent_positions.expand(len(x), -1, -1, -1)
        if latents is not None:
            z = z + self.before_norm(self.before(latents))
        tokens = self.embed_norm(self.embed(self.cut(x))) + self.positions
        tokens, z = self.body(tokens, z, lambda now: self.condition(now, context))
        return self.paste(self.out(tokens)), z

    def cut(self, x: Tensor) -> Tensor:
        """Patches of every part. Shape: [B, C, H, W] -> [B, t, n, C patch^2]."""
        s, n, p = self.side, self.part, self.patch
        y = x.unflatten(3, (s, n, p)).unflatten(2, (s, n, p))  # [B, C, s, n, p, s, n, p]
        return y.permute(0, 2, 5, 3, 6, 1, 4, 7).flatten(5).flatten(3, 4).flatten(1, 2)

    def paste(self, tokens: Tensor) -> Tensor:
        """The picture of which these are the patches; undoes `cut`."""
        s, n, p = self.side, self.part, self.patch
        y = tokens.unflatten(3, (self.in_chans, p, p)).unflatten(2, (n, n)).unflatten(1, (s, s))
        return y.permute(0, 5, 1, 3, 6, 2, 4, 7).flatten(5, 7).flatten(2, 4)


def time_code(time: Tensor, width: int) -> Tensor:
    """Sines and cosines of 1000 times the time, of zero mean and unit variance. Shape: [B] -> [B, width]."""
    rates = torch.exp(-torch.arange(width // 2, device=time.device) * (9.21034 / max(width // 2 - 1, 1)))
    angle = 1000 * time[:, None].float() * rates
    code = torch.cat([angle.sin(), angle.cos()], 1)
    code = F.pad(code, (0, width - code.shape[1]))
    return (code - code.mean(1, keepdim=True)) / (code.std(1, keepdim=True, correction=0) + 1e-6)
