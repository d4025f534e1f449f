"""What regions of a picture know of each other: a light causal model over all their tokens, a class token at the end.

The context encoder of xT (Gupta et al. 2024, arXiv:2403.01915); see `foveate.encode.xt`.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from foveate.errors import InputError, MissingExtraError, WeightsError
from foveate.layers.hyper_attention import hyper_attention


class Context(nn.Module):
    """Let all places of a map know of those before them, and a class token of all.

    Names of parameters are the authors' own.

    Args:
        channels: C of the map.
        dim: of tokens, a multiple of 4; heads have up to 128 channels.
        depth: layers.
        kind: "hyper", or "mamba" (of transformers; every second layer scans backwards).
        num_classes: outputs of the head `cls`; 0 for none.

    Shape: [B, C, H, W] -> what to add to the map [B, C, H, W], class token [B, dim].
    """

    def __init__(
        self, channels: int, dim: int = 768, depth: int = 2, kind: str = "hyper", num_classes: int = 0
    ) -> None:
        super().__init__()
        if kind not in ("hyper", "mamba") or dim < 4 or dim % 4 or depth < 1:
            raise InputError(
                f"kind is 'hyper' or 'mamba', dim a multiple of 4 and depth 1 or more; got {kind!r}, {dim}, {depth}."
            )
        make: Callable[[int], nn.Module] = partial(_Layer, dim) if kind == "hyper" else partial(_MambaLayer, dim)
        self.input_proj = nn.Linear(channels, dim)
        self.cls_token = nn.Parameter(torch.zeros(1, 1, dim))
        self.layers = nn.ModuleList(make(i) for i in range(depth))
        self.output_proj = nn.Linear(dim, channels)
        nn.init.trunc_normal_(self.cls_token, std=0.02)
        nn.init.zeros_(self.output_proj.weight)
        nn.init.zeros_(self.output_proj.bias)
        self.cls = nn.Sequential(nn.LayerNorm(dim), nn.Linear(dim, num_classes)) if num_classes else None

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        grid = (x.shape[2], x.shape[3])
        t = self.input_proj(x.flatten(2).mT)
        t = torch.cat([t + sincos(grid, t.shape[2]).to(t), self.cls_token.expand(len(t), -1, -1)], 1)
        for layer in self.layers:
            t = layer(t)
        return self.output_proj(t[:, :-1]).mT.unflatten(2, grid), t[:, -1]

    def load_official(self, state: dict[str, Tensor]) -> None:
        """Take the weights of an official checkpoint with HyperAttention; what they do not have stays.

        Args:
            state: with keys `decoder.input_proj.weight` and so on, as in bair-climate-initiative/xT.

        Raises: WeightsError for keys or shapes that do not fit.
        """
        given = {
            k.partition("decoder.")[2]: v for k, v in state.items() if k.startswith(("decoder.", "model.decoder."))
        }
        own = self.state_dict()
        missing = [k for k in own if k not in given and not k.startswith("output_proj.")]
        wrong = [k for k, v in given.items() if k not in own or own[k].shape != v.shape]
        if missing or wrong:
            raise WeightsError(f"no weights of this Context: missing {missing[:3]}, not fitting {wrong[:3]}.")
        self.load_state_dict(own | given)


class _Layer(nn.Module):
    """Causal attention and a gated MLP, as LLaMA's."""

    def __init__(self, dim: int, _: int) -> None:
        super().__init__()
        self.attn = _Attention(dim)
        self.mlp = _GatedMLP(dim)
        self.input_layernorm, self.post_attention_layernorm = nn.RMSNorm(dim, eps=1e-6), nn.RMSNorm(dim, eps=1e-6)

    def forward(self, t: Tensor) -> Tensor:
        t = t + self.attn(self.input_layernorm(t))
        return t + self.mlp(self.post_attention_layernorm(t))


class _Attention(nn.Module):
    def __init__(self, dim: int) -> None:
        super().__init__()
        self.heads = next(h for h in range(max(1, dim // 128), dim + 1) if dim % h == 0)
        self.qkv, self.proj = nn.Linear(dim, 3 * dim), nn.Linear(dim, dim)

    def forward(self, t: Tensor) -> Tensor:
        q, k, v = self.qkv(t).unflatten(2, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        return self.proj(hyper_attention(q, k, v).transpose(1, 2).flatten(2))


class _GatedMLP(nn.Module):
    def __init__(self, dim: int) -> None:
        super().__init__()
        self.gate_proj, self.up_proj = nn.Linear(dim, 4 * dim, bias=False), nn.Linear(dim, 4 * dim, bias=False)
        self.down_proj = nn.Linear(4 * dim, dim, bias=False)

    def forward(self, t: Tensor) -> Tensor:
        return self.down_proj(F.gelu(self.gate_proj(t)) * self.up_proj(t))


class _MambaLayer(nn.Module):
    """t = LN(t) + Mamba(LN(t)), even layers from the end to the beginning."""

    def __init__(self, dim: int, index: int) -> None:
        super().__init__()
        try:
            from transformers import MambaConfig
            from transformers.models.mamba.modeling_mamba import MambaMixer
        except ImportError as error:
            raise MissingExtraError("Mamba needs transformers. Install it: pip install 'foveate[hosts]'") from error
        config: Any = MambaConfig(hidden_size=dim, state_size=16, num_hidden_layers=1)
        self.norm, self.mixer, self.backwards = nn.LayerNorm(dim), MambaMixer(config, 0), index % 2 == 0

    def forward(self, t: Tensor) -> Tensor:
        t = self.norm(t)
        y: Tensor = self.mixer(t.flip(1) if self.backwards else t)
        return t + (y.flip(1) if self.backwards else y)


def sincos(grid: tuple[int, int], dim: int) -> Tensor:
    """Positions: sines of row and column at dim / 4 frequencies, then cosines. Shape: -> [H * W, dim]."""
    bands = 10000.0 ** -(torch.arange(dim // 4) / (dim // 4))
    places = torch.stack(torch.meshgrid(*(torch.arange(s) for s in grid), indexing="ij"), -1).flatten(0, 1)
    angles = (places[..., None] * bands).flatten(1)
    return torch.cat([angles.sin(), angles.cos()], 1)
