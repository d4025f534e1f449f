"""LSNet: a large static kernel looks around and decides how a small dynamic one mixes.

Wang, Chen, Lin, Han, Ding 2025, "LSNet: See Large, Focus Small", arXiv:2503.23135.

Looking and mixing need not share a window. An LS convolution on C channels sees 7x7 pixels through half of them, says
at each pixel p and for each of G = C / 8 groups a kernel of 3x3 weights, and mixes with it:

    w = GroupNorm_G(Conv1x1(ReLU(N(Conv1x1(N(DW7x7(ReLU(N(Conv1x1(C -> C/2)(x))))))))))    [B, G, 9, H, W]
    y[c, p] = sum_t w[c mod G, t, p] x[c, p + t],      out = N(y) + x

(N is BatchNorm; every kernel is normalised over its taps and over the picture, so tiles of a picture do not give what
the whole gives). Cost is linear in pixels, and no map of attention is formed.

The network halves its picture three times in a stem and between four stages. Blocks alternate a static mixer (depth-
wise 3x3 + 1x1 + identity, folded into one 3x3 for inference, then squeeze-and-excitation) with an LS convolution, or,
in the last stage, with attention over all pixels; each is followed by x + Conv1x1(ReLU(Conv1x1(x))).
"""

import re
from collections.abc import Mapping, Sequence
from typing import Any, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from foveate.errors import InputError, WeightsError
from foveate.layers.classifier import ImageClassifier
from foveate.layers.fold import ConvNorm, DistilledHead, NormLinear, fuse, merge_convs
from foveate.layers.residual import add_
from foveate.ops.gathered import gathered

SIZES: dict[str, dict[str, Any]] = {
    "t": {"widths": (64, 128, 256, 384), "depths": (0, 2, 8, 10)},
    "s": {"widths": (96, 192, 320, 448), "depths": (1, 2, 8, 10)},
    "b": {"widths": (128, 256, 384, 512), "depths": (4, 6, 8, 10)},
}
"""Settings of the published networks: `LSNet(**SIZES["t"])`."""

_OFFICIAL_NAMES = {
    r"^patch_embed\.": "stem.",
    **{rf"^blocks{i + 1}\.": f"stages.{i}." for i in range(4)},
    r"\.(mixer|ffn)\.m\.": r".\1.",
    r"\.lkp\.cv1\.": ".look.0.",
    r"\.lkp\.cv2\.": ".look.2.",
    r"\.lkp\.cv3\.": ".look.3.",
    r"\.lkp\.cv4\.": ".look.5.",
    r"\.lkp\.norm\.": ".look.6.",
    r"\.proj\.1\.": ".proj.",
    r"\.attention_biases$": ".biases",
}


class LSConv(nn.Module):
    """Mix the pixels around each one by weights that a wider look decides, and add the input.

    Stands wherever a depth-wise convolution does.

    Args:
        dim: C.
        large, small: sides of what is seen and of what is mixed, odd.
        sharing: channels that share a kernel; divides C.

    Shape: [B, C, H, W] -> the same.
    Raises: InputError for even kernels, or channels that cannot be shared out.
    """

    def __init__(self, dim: int, large: int = 7, small: int = 3, sharing: int = 8) -> None:
        super().__init__()
        if dim % sharing or dim % 2:
            raise InputError(f"{sharing} channels share a kernel, so dim must be an even multiple of it, got {dim}.")
        if large % 2 == 0 or small % 2 == 0:
            raise InputError(f"kernels have a centre: large and small must be odd, got {large} and {small}.")
        self.small, self.groups, half = small, dim // sharing, dim // 2
        self.look = nn.Sequential(
            ConvNorm(dim, half),
            nn.ReLU(),
            ConvNorm(half, half, large, groups=half),
            ConvNorm(half, half),
            nn.ReLU(),
            nn.Conv2d(half, small**2 * self.groups, 1),
            nn.GroupNorm(self.groups, small**2 * self.groups),
        )
        self.bn = nn.BatchNorm2d(dim)

    def kernels(self, x: Tensor) -> Tensor:
        """w of the equations above. Shape: [B, C, H, W] -> [B, G, small * small, H, W]."""
        return self.look(x).unflatten(1, (self.groups, -1))

    def forward(self, x: Tensor) -> Tensor:
        y = gathered(x, self.kernels(x), kernel_size=self.small, interleaved=True)
        return add_(self.bn(y), x)


class RepMixer(nn.Module):
    """Depth-wise 3x3 + depth-wise 1x1 + identity, which fold into one depth-wise 3x3. Shape: [B, C, H, W] -> same."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.conv, self.conv1 = ConvNorm(dim, dim, 3, groups=dim), ConvNorm(dim, dim, 1, groups=dim)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x) + self.conv1(x) + x

    def folded(self) -> nn.Conv2d:
        """The three as one convolution."""
        return merge_convs([self.conv.folded(), self.conv1.folded()], identity=True)


class SqueezeExcite(nn.Module):
    """Weigh channels by what the whole picture holds: x * sigmoid(fc2(ReLU(fc1(mean(x))))) (Hu et al. 2018).

    Args:
        dim: C.
        share: of C that fc1 keeps, rounded to a multiple of 8.

    Shape: [B, C, H, W] -> the same.
    """

    def __init__(self, dim: int, share: float = 0.25) -> None:
        super().__init__()
        hidden = max(8, int(dim * share + 4) // 8 * 8)
        self.fc1, self.fc2 = nn.Conv2d(dim, hidden, 1), nn.Conv2d(hidden, dim, 1)

    def forward(self, x: Tensor) -> Tensor:
        return x * self.fc2(F.relu(self.fc1(x.mean((2, 3), keepdim=True)))).sigmoid()


class Attention(nn.Module):
    """x + attention of all pixels to all, with a learned bias for every distance.

    The bias of pixels (dy, dx) apart is a table over |dy|, |dx| learned on a map of side R. On a map of another size
    it is resampled, so that the same share of the picture apart gets the same bias.

    Args:
        dim: C.
        heads: their number; divides C.
        key_dim: channels of a query.
        resolution: R.

    Shape: [B, C, H, W] -> the same.
    """

    def __init__(self, dim: int, heads: int, key_dim: int, resolution: int) -> None:
        super().__init__()
        if dim % heads:
            raise InputError(f"{heads} heads cannot share {dim} channels; give a width that heads divide.")
        self.heads, self.key_dim, self.resolution = heads, key_dim, resolution
        self.qkv = ConvNorm(dim, 2 * heads * key_dim + dim)
        self.dw = ConvNorm(heads * key_dim, heads * key_dim, 3, groups=heads * key_dim)
        self.proj = ConvNorm(dim, dim, gamma=0.0)
        self.biases = nn.Parameter(torch.zeros(heads, resolution**2))

    def bias(self, height: int, width: int) -> Tensor:
        """What is added to logits. Shape: -> [heads, N, N], N = height * width, row by row."""
        table = self.biases.unflatten(1, (self.resolution, self.resolution))
        if (height, width) != table.shape[1:]:
            table = F.interpolate(table[None], (height, width), mode="bilinear", align_corners=True)[0]
        rows, columns = (torch.arange(n, device=table.device) for n in (height, width))
        down, across = (rows[:, None] - rows).abs(), (columns[:, None] - columns).abs()
        return table[:, down[:, None, :, None], across[None, :, None, :]].flatten(3).flatten(1, 2)

    def forward(self, x: Tensor) -> Tensor:
        queries = self.heads * self.key_dim
        q, k, v = self.qkv(x).split([queries, queries, x.shape[1]], 1)
        q, k, v = (t.flatten(2).unflatten(1, (self.heads, -1)).mT for t in (self.dw(q), k, v))
        y = F.scaled_dot_product_attention(q, k, v, self.bias(*x.shape[2:])[None])
        return add_(self.proj(F.relu(y.mT.flatten(1, 2).view_as(x))), x)


class FeedForward(nn.Module):
    """x + Conv1x1(2C -> C)(ReLU(Conv1x1(C -> 2C)(x))). Shape: [B, C, H, W] -> the same."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.pw1, self.pw2 = ConvNorm(dim, 2 * dim), ConvNorm(2 * dim, dim, gamma=0.0)

    def forward(self, x: Tensor) -> Tensor:
        return add_(self.pw2(F.relu(self.pw1(x))), x)


class Block(nn.Module):
    """A mixer, squeeze-and-excitation where the mixer is static, and a feed-forward part. Keeps shapes."""

    def __init__(self, mixer: nn.Module, dim: int) -> None:
        super().__init__()
        self.mixer = mixer
        self.se = SqueezeExcite(dim) if isinstance(mixer, RepMixer) else nn.Identity()
        self.ffn = FeedForward(dim)

    def forward(self, x: Tensor) -> Tensor:
        return self.ffn(self.se(self.mixer(x)))


class LSNet(ImageClassifier):
    """Classify pictures.

    Args:
        num_classes, in_chans: see `ImageClassifier`.
        widths: channels of the four stages.
        depths: blocks of the four stages.
        heads, key_dim: of attention in the last stage.
        img_size: side in pixels of the pictures it is trained on; the last stage's biases belong to it, and are
            resampled for pictures of another size.
        distilled: a second head, for a teacher's answers; in training forward returns both answers.

    Shape: [B, in_chans, H, W] -> [B, num_classes]; features [B, widths[-1], ceil(H / 64), ceil(W / 64)].
    Raises: InputError for settings that do not fit, or an input of another shape.
    """

    def __init__(
        self,
        num_classes: int = 1000,
        in_chans: int = 3,
        widths: Sequence[int] = (64, 128, 256, 384),
        depths: Sequence[int] = (0, 2, 8, 10),
        heads: int = 4,
        key_dim: int = 16,
        img_size: int = 224,
        distilled: bool = False,
    ) -> None:
        if len(widths) != 4 or len(depths) != 4 or widths[0] % 4:
            raise InputError(f"LSNet has four stages, the first of a multiple of 4 channels; got {widths}, {depths}.")
        super().__init__(widths[-1], in_chans)
        self.distilled, first = distilled, widths[0]
        self.stem = nn.Sequential(
            ConvNorm(in_chans, first // 4, 3, 2),
            nn.ReLU(),
            ConvNorm(first // 4, first // 2, 3, 2),
            nn.ReLU(),
            ConvNorm(first // 2, first, 3, 2),
        )
        self.stages = nn.ModuleList()
        for stage, (dim, depth) in enumerate(zip(widths, depths, strict=True)):
            before = widths[max(stage - 1, 0)]
            shrink = [ConvNorm(before, before, 3, 2, groups=before), ConvNorm(before, dim)] if stage else []
            blocks = []
            for i in range(depth):
                if i % 2 == 0:
                    mixer: nn.Module = RepMixer(dim)
                elif stage < 3:
                    mixer = LSConv(dim)
                else:
                    mixer = Attention(dim, heads, key_dim, -(-img_size // 64))
                blocks.append(Block(mixer, dim))
            self.stages.append(nn.Sequential(*shrink, *blocks))
        self.reset_classifier(num_classes)

    def forward_features(self, x: Tensor) -> Tensor:
        """Features before pooling, see Shape."""
        return self.forward_stages(x)[-1]

    def forward_stages(self, x: Tensor) -> list[Tensor]:
        """The maps of the four stages, at an 8th, 16th, 32nd and 64th of the size; sizes are rounded up."""
        self.check(x)
        x, maps = self.stem(x), []
        for stage in self.stages:
            x = stage(x)
            maps.append(x)
        return maps

    def reset_classifier(self, num_classes: int) -> None:
        """Put in a new last layer, or two with `distilled`, for another number of classes; 0 leaves it out."""
        super().reset_classifier(num_classes)
        if num_classes:
            head = (DistilledHead if self.distilled else NormLinear)(self.num_features, num_classes)
            self.head = head.to(next(self.parameters()))

    def no_weight_decay(self) -> set[str]:
        """Names of the parameters that weight decay leaves alone: the biases of distances."""
        return {name for name, _ in self.named_parameters() if name.endswith("mixer.biases")}

    def fuse(self) -> Self:
        """Fold batch norms and parallel branches for inference, in place; returns the network in eval mode.

        The norm after a dynamic kernel stays: no static layer stands beside it.
        """
        return fuse(self)

    @classmethod
    def load_official(cls, state: Mapping[str, Any]) -> Self:
        """Build the network that an official checkpoint (jameslahm/lsnet) was trained as.

        Args:
            state: keys `patch_embed.*`, `blocks{1..4}.*`, `head.*` and, where distilled, `head_dist.*`; or a
                checkpoint that holds them under "model".

        Raises: WeightsError when keys are missing or unknown.
        """
        state = state.get("model", state)
        mapped = {key: value for key, value in state.items() if not key.endswith(".attention_bias_idxs")}
        distilled = any(key.startswith("head_dist.") for key in mapped)
        names = {
            **_OFFICIAL_NAMES,
            **({r"^head\.": "head.labels.", r"^head_dist\.": "head.teacher."} if distilled else {}),
        }
        for old, new in names.items():
            mapped = {re.sub(old, new, key): value for key, value in mapped.items()}
        try:
            network = cls(**_settings(mapped), distilled=distilled)
            network.load_state_dict(mapped)
        except (ValueError, KeyError, RuntimeError) as error:
            raise WeightsError(f"no checkpoint of an LSNet (keys begin with {sorted(state)[:3]}): {error}") from error
        return network.eval()


def conformance_example(larger: bool = False) -> tuple[LSNet, tuple[Tensor]]:
    """A small classifier and pictures of an odd size."""
    network = LSNet(5, widths=(8, 16, 16, 32), depths=(1, 2, 2, 2), heads=2, key_dim=8, img_size=128)
    for norm in network.modules():
        if isinstance(norm, nn.BatchNorm2d):  # a fresh residual branch ends in zeros, behind which nothing learns
            nn.init.uniform_(norm.weight, 0.5, 1.5)
    side = 130 if larger else 97
    return network, (torch.rand(2, 3, side, side + 7),)


def _settings(mapped: Mapping[str, Tensor]) -> dict[str, Any]:
    """What the shapes of a state dict under our names tell."""
    widths = [len(mapped["stem.4.bn.bias"]), *(len(mapped[f"stages.{stage}.1.bn.bias"]) for stage in (1, 2, 3))]
    indices = [{int(k.split(".")[2]) for k in mapped if k.startswith(f"stages.{stage}.")} for stage in range(4)]
    settings = {
        "num_classes": len(mapped.get("head.l.bias", mapped.get("head.labels.l.bias", ()))),
        "in_chans": mapped["stem.0.c.weight"].shape[1],
        "widths": widths,
        "depths": [len(found) - (2 if stage else 0) for stage, found in enumerate(indices)],
    }
    table = next((value for key, value in mapped.items() if key.endswith(".mixer.biases")), None)
    if table is None:
        return settings
    heads, distances = table.shape
    keys = next((len(value) for key, value in mapped.items() if key.endswith(".mixer.dw.bn.bias")), 0)
    return settings | {"heads": heads, "key_dim": keys // heads, "img_size": 64 * round(distances**0.5)}
