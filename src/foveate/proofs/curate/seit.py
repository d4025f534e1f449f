"""Proof of SeiT: a classifier from stored tokens against classifiers from pixels, of as many pictures or as many bytes.

The set is CIFAR-10 where it is at hand, else pieces of six textures, the left halves of the photographs to learn from,
the right halves to test. A tokeniser is fitted and the set stored in this run; what it takes on the disk, codebook and
all, is the budget. The same network learns for as many steps

    from pixels         all pictures, shifted and mirrored
    from a subset       as many of them as take the bytes of the store
    from tokens         all pictures, tokens replaced or swapped, random crops

and differs in the stem alone: three strided convolutions bring pixels to the 4x4 maps that the Stem-Adapter makes of
8x8 tokens. The full proof adds what the changes to tokens are worth.
"""

import io
from collections.abc import Callable
from itertools import pairwise
from tempfile import TemporaryDirectory

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn
from torch.optim.swa_utils import update_bn

from foveate.curate.seit import NONE, Changes, SeiT, draws
from foveate.curate.tokeniser import PatchTokeniser
from foveate.data.labelled import Labelled, read_archive
from foveate.data.token_store import TokenStore
from foveate.engine.fit import fit
from foveate.layers.fold import ConvNorm
from foveate.layers.resnet import ResNet
from foveate.proofs.evidence import Evidence, ProofContext, Row

SIDE, PATCH, WORDS, DIM, WIDTH = 32, 4, 391, 16, 64
BATCH, LR, SHIFT, NORMING = 128, 2e-3, 4, 10
STEPS = {"quick": 180, "full": 700}
COUNTS = {"quick": (5000, 1000), "full": (20_000, 4000)}
"""Pictures of CIFAR-10 to learn from and to test."""

TEXTURES, PIECES = ("brick", "grass", "gravel", "moon", "page", "coins"), (700, 150)
LIGHT = Changes(scale=(0.5, 1.0), noise=0, exchange=0, cutmix=0)
"""What a short training bears: synonyms, swaps and mild crops."""

SHRINK, KEPT, AHEAD = 10.0, 0.9, 5.0

Tokens = tuple[Tensor, Tensor]
"""Tokens [N, h, w] and classes [N]."""


def prove(context: ProofContext) -> Evidence:
    """Store tokens, and train from them and from pixels."""
    name, learned, tested, stored = cifar(context) or textures(context)
    tokeniser = PatchTokeniser(PATCH, WORDS, DIM).fit(_float(learned), context.seed, rounds=10, most=20_000)
    with TemporaryDirectory() as folder:
        parts = zip(learned.pictures.split(1000), learned.labels.split(1000), strict=True)
        batches = ((tokeniser(_unit(pictures)), labels) for pictures, labels in parts)
        store = TokenStore.write(f"{folder}/tokens", batches, tokeniser.codebook, learned.classes, kind="npz")
        taken, least = store.total_bytes, store.entropy
        tokens = store.all()
    png = png_bytes(learned)
    subset = learned.spread(max(len(learned.classes), int(taken / stored)))
    seen = (tokeniser(_float(tested)), tested.labels)
    found: dict[str, tuple[float, float, int]] = {}
    plans: list[tuple[str, Callable[[], float], float, int]] = [
        ("pixels", lambda: from_pixels(learned, tested, context), stored * len(learned), len(learned)),
        ("pixels, as many bytes as the tokens", lambda: from_pixels(subset, tested, context), taken, len(subset)),
    ]
    changes = {"tokens": LIGHT}
    if context.full:
        changes |= {"tokens, unchanged": NONE, "tokens, all of the paper's changes": Changes()}
    for label, change in changes.items():

        def run(change: Changes = change) -> float:
            return from_tokens(tokens, seen, tokeniser.codebook, change, context)

        plans.append((label, run, taken, len(learned)))
    for label, train, size, count in context.track(plans, "training"):
        found[label] = (train(), size, count)
    rows = [
        Row(label, accuracy_percent=right, kilobytes=size / 1e3, bytes_per_picture=size / count, pictures=count)
        for label, (right, size, count) in found.items()
    ]
    rows.append(Row("pixels as PNG", kilobytes=png * len(learned) / 1e3, bytes_per_picture=png, pictures=len(learned)))
    pixels, few, ours = (found[key][0] for key in ("pixels", "pixels, as many bytes as the tokens", "tokens"))
    shrink = png * len(learned) / taken
    return Evidence(
        system="seit",
        claim="Tokens of a hundredth of the bytes train a classifier to 90% of the accuracy of pixels",
        rows=tuple(rows),
        claimed="1% of the bytes, 90% of the accuracy (74.0% against 81.8%)",
        measured=f"{100 / shrink:.1f}% of the bytes of PNG, {ours / pixels:.0%} of the accuracy ({ours:.1f}% against "
        f"{pixels:.1f}%); a subset of as many bytes reaches {few:.1f}%",
        holds=verdict(shrink, ours, pixels, few),
        notes=(
            f"Holds when tokens take at most a {1 / SHRINK:.0%} share of PNG's bytes, reach {KEPT:.0%} of the accuracy "
            f"of pixels, and are {AHEAD:g} points ahead of as many bytes of pixels.",
            f"{name}: {len(learned)} pictures of {SIDE}x{SIDE} to learn from, {len(tested)} to test; "
            f"{STEPS[context.mode]} steps of {BATCH}. Stored pixels are {stored:.0f} bytes a picture.",
            f"{WORDS} words for patches of {PATCH}x{PATCH} by k-means, where the paper has a ViT-VQGAN of 8x8; a token "
            f"carries {least:.2f} bits and takes {8 * taken / tokens[0].numel():.2f} with all that is stored.",
            "A small residual network for ViT-B, on ImageNet in the paper.",
        ),
        claimed_ratio=0.905,
        measured_ratio=ours / pixels,
    )


def verdict(shrink: float, tokens: float, pixels: float, subset: float) -> bool:
    """Whether the claim holds.

    Args:
        shrink: bytes of PNG over those of the store.
        tokens, pixels, subset: accuracies in percent.
    """
    return shrink >= SHRINK and tokens >= KEPT * pixels and tokens >= subset + AHEAD


def network(channels: int, classes: int) -> ResNet:
    """The residual network on 4x4 maps, with a stem for pixels (3 channels) or for words."""
    made = ResNet(classes, channels, widths=(WIDTH, 2 * WIDTH), depths=(1, 1))
    if channels == 3:
        widths = (channels, 32, 48, WIDTH)
        steps = [[ConvNorm(a, b, 3, 2), nn.ReLU()] for a, b in pairwise(widths)]
        made.stem = nn.Sequential(*(layer for step in steps for layer in step))
    else:
        made.stem = nn.Sequential(nn.Conv2d(channels, WIDTH, 4, 2, 1), nn.BatchNorm2d(WIDTH), nn.ReLU())
    return made


def from_pixels(learned: Labelled, tested: Labelled, context: ProofContext) -> float:
    """Accuracy in percent of a network that learned from pictures."""
    torch.manual_seed(context.seed)
    made, draw = network(3, len(learned.classes)).train(), learned.draws(context.seed, SHIFT)

    def loss(step: int) -> Tensor:
        pictures, labels = draw(BATCH)
        return F.cross_entropy(made(pictures), labels, label_smoothing=0.1)

    steps = STEPS[context.mode]
    fit(made, loss, steps, lr=LR, average=0.98, every=steps, log=lambda _: None)
    update_bn((draw(BATCH)[0] for _ in range(NORMING)), made)
    with torch.inference_mode():
        right = [(made.eval()(x).argmax(1) == y).sum() for x, y in tested.batches(500)]
    return 100 * int(sum(right)) / len(tested)


def from_tokens(learned: Tokens, tested: Tokens, codebook: Tensor, changes: Changes, context: ProofContext) -> float:
    """Accuracy in percent of a network that learned from tokens."""
    (tokens, labels), (seen, truth) = learned, tested
    torch.manual_seed(context.seed)
    made = network(codebook.shape[1], int(labels.max()) + 1)
    model, batches = SeiT(made, codebook, changes=changes, seed=context.seed).train(), draws(tokens, labels, BATCH)
    steps = STEPS[context.mode]
    fit(model, lambda step: model.loss(*next(batches)), steps, lr=LR, average=0.98, every=steps, log=lambda _: None)
    update_bn((model.features(next(batches)[0], changed=True) for _ in range(NORMING)), made)
    with torch.inference_mode():
        right = [(model.eval()(x).argmax(1) == y).sum() for x, y in zip(seen.split(500), truth.split(500), strict=True)]
    return 100 * int(sum(right)) / len(truth)


def cifar(context: ProofContext) -> tuple[str, Labelled, Labelled, float] | None:
    """CIFAR-10 and the bytes of a picture as it is stored, where it is at hand."""
    files = [context.data / f"cifar10_{part}_jpeg.npz" for part in ("train", "test")] if context.data else []
    if not files or not all(file.is_file() for file in files):
        return None
    learned, tested = (read_archive(file, count) for file, count in zip(files, COUNTS[context.mode], strict=True))
    with np.load(files[0]) as archive:
        offsets = archive["offsets"]
    return "CIFAR-10", learned, tested, float(offsets[-1]) / (len(offsets) - 1)


def textures(context: ProofContext) -> tuple[str, Labelled, Labelled, float]:
    """Pieces of textures, and the bytes of one as PNG."""
    named, dice, halves = dict(context.photographs()), torch.Generator().manual_seed(context.seed), []
    for side, count in enumerate(PIECES):
        pieces = []
        for name in TEXTURES:
            views = named[name].chunk(2, 2)[side].unfold(1, SIDE, 1).unfold(2, SIDE, 1)
            ys, xs = (torch.randint(0, views.shape[axis], (count,), generator=dice) for axis in (1, 2))
            pieces.append(views[:, ys, xs].permute(1, 2, 3, 0))
        pixels = (255 * torch.cat(pieces)).round().byte().cpu()
        labels = torch.arange(len(TEXTURES)).repeat_interleave(count)
        order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(context.seed))
        halves.append(Labelled(pixels[order].contiguous(), labels[order], TEXTURES))
    return "Pieces of textures", halves[0], halves[1], png_bytes(halves[0])


def png_bytes(pictures: Labelled, sample: int = 300) -> float:
    """Bytes that a picture takes as PNG, on average; grey ones as grey."""
    total, some = 0, pictures.spread(sample).pictures.numpy()
    for pixels in some:
        grey = (pixels == pixels[..., :1]).all()
        stream = io.BytesIO()
        Image.fromarray(pixels[..., 0] if grey else pixels).save(stream, "PNG", optimize=True)
        total += stream.tell()
    return total / len(some)


def _unit(pixels: Tensor) -> Tensor:
    return pixels.permute(0, 3, 1, 2).float() / 255


def _float(pictures: Labelled) -> Tensor:
    return _unit(pictures.pictures)
