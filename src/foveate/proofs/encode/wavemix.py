"""Proof of WaveMix: a block does with a third of a residual block's multiply-accumulates and stores less of them.

Both blocks have 64 channels on a map of 64 x 64. A residual block is two 3x3 convolutions with batch norm; a WaveMix
block mixes at half size and below. Counted are multiply-accumulates, and the bytes that the forward pass keeps for the
backward pass (every storage once, parameters left out); timed is a training step. The residual block drops nothing, so
neither does the WaveMix block it is compared with; what the published dropout adds (its mask) is a row of its own.

Then two classifiers of equal parameters learn the same pictures in the same order for as many steps: three WaveMix
blocks of 32 channels and two levels, and three residual blocks as wide as the parameters allow, after the same kind of
stem. Quick: six textures of scikit-image, in 32 x 32 crops of grey, each of zero mean and unit variance, learned on the
left of a photograph and measured on its right. Full: CIFAR-10 where the context has it.
"""

from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from foveate.data.labelled import read_archive, standardised
from foveate.encode.wavemix import PatchStem, WaveBlock, WaveMix
from foveate.engine.fit import fit
from foveate.layers.classifier import ImageClassifier
from foveate.layers.resnet import BasicBlock
from foveate.meter import Comparison, compare, count_flops, count_parameters, stored_bytes
from foveate.proofs.evidence import Evidence, ProofContext, Row

CHANNELS, MAP = 64, 64
WIDTH, DEPTH, LEVELS = 32, 3, 2
PATCH = 2
"""Of the stems: 32 x 32 pictures are mixed as 16 x 16 maps."""

TEXTURES = ("brick", "grass", "gravel", "page", "hubble", "coins")
SIDE, BATCH, LR = 32, 32, 3e-3
STEPS = {"quick": 150, "full": 1200}
TESTED = {"quick": 600, "full": 2000}
TRAINED = 20_000
"""Pictures of CIFAR-10 that are learned from."""

Draw = Callable[[int], tuple[Tensor, Tensor]]
"""draw(batch) -> pictures [batch, C, 32, 32] and their classes [batch]."""


class Residual(ImageClassifier):
    """WaveMix with residual blocks in place of its own. Shape: [B, C, H, W] -> [B, num_classes]."""

    def __init__(self, num_classes: int, in_chans: int, dim: int) -> None:
        super().__init__(dim, in_chans)
        self.stem = PatchStem(in_chans, dim, PATCH)
        self.blocks = nn.Sequential(*(BasicBlock(dim, dim) for _ in range(DEPTH)))
        self.reset_classifier(num_classes)

    def forward_features(self, x: Tensor) -> Tensor:
        self.check(x)
        return self.blocks(self.stem(x))


def prove(context: ProofContext) -> Evidence:
    """Count and time single blocks, then train a classifier of each kind."""
    residual = BasicBlock(CHANNELS, CHANNELS)
    blocks = {
        "WaveMix block, 1 level": WaveBlock(CHANNELS, 1, dropout=0.0),
        "WaveMix block, 1 level, dropout 0.5": WaveBlock(CHANNELS, 1),
        "WaveMix block, 3 levels": WaveBlock(CHANNELS, 3, dropout=0.0),
    }
    x = torch.rand(1, CHANNELS, MAP, MAP, generator=context.generator(), device=context.device)
    rows = [block_row(f"residual block, {CHANNELS} channels", residual.to(context.device), x)]
    for name, block in blocks.items():
        rows.append(block_row(name, block.to(context.device), x, race(residual, block, x)))
    macs, stored = (rows[1].metrics[key] / rows[0].metrics[key] for key in ("gmacs", "stored_mb"))
    dropping = rows[2].metrics["stored_mb"] / rows[0].metrics["stored_mb"]

    draw, test, classes, where = data(context)
    pictures, labels = test
    ours = WaveMix(classes, pictures.shape[1], WIDTH, DEPTH, LEVELS, dropout=0.0, patch=PATCH)
    theirs = Residual(classes, pictures.shape[1], matched_width(count_parameters(ours), classes, pictures.shape[1]))
    networks: dict[str, nn.Module] = {
        f"{DEPTH} residual blocks, {theirs.num_features} channels": theirs,
        f"{DEPTH} WaveMix blocks, {WIDTH} channels": ours,
    }
    batch = pictures[:BATCH]
    clock = race(theirs.to(context.device), ours.to(context.device), batch)
    for name, network in networks.items():
        train(context, network, draw(), name)
        figures = {
            "parameters": count_parameters(network),
            "gmacs": gmacs(network, batch) / len(batch),
            "stored_mb": stored_bytes(network, batch) / 1e6 / len(batch),
            "speedup": clock.speedup if network is ours else 1.0,
        }
        rows.append(Row(name, **figures, accuracy_percent=100 * accuracy(network.eval(), pictures, labels)))
    lag = rows[-2].metrics["accuracy_percent"] - rows[-1].metrics["accuracy_percent"]
    return Evidence(
        system="wavemix",
        claim="0.3x the multiply-adds and 0.7x the stored activations of a residual block of equal width",
        rows=tuple(rows),
        claimed="0.3x the multiply-accumulates and 0.7x the activations",
        measured=f"{macs:.2f}x the multiply-accumulates, {stored:.2f}x the activations, accuracy {-lag:+.1f} points",
        holds=verdict(macs, stored, lag),
        notes=(
            "Holds when a block of one level has at most 0.33x the multiply-accumulates and 0.75x the bytes kept for "
            "the backward pass, and the trained classifier is at most 5 points behind residual blocks of equal "
            "parameters.",
            f"With the published dropout of 0.5 a block keeps {dropping:.2f}x the bytes. Speed-ups are of a training "
            f"step over residual blocks; that of the classifier is {clock.speedup:.2f}.",
            f"{where}, {STEPS[context.mode]} steps of {BATCH}.",
        ),
        claimed_ratio=0.3,
        measured_ratio=macs,
    )


def verdict(macs: float, stored: float, lag: float) -> bool:
    """Whether the claim holds.

    Args:
        macs, stored: multiply-accumulates and stored bytes of a WaveMix block over those of a residual one.
        lag: points of accuracy by which WaveMix is behind.
    """
    return macs <= 0.33 and stored <= 0.75 and lag <= 5


def block_row(name: str, block: nn.Module, x: Tensor, clock: Comparison | None = None) -> Row:
    """What a block costs on x; `clock` is of the residual block against it."""
    return Row(
        name,
        parameters=count_parameters(block),
        gmacs=gmacs(block, x),
        stored_mb=stored_bytes(block, x) / 1e6,
        speedup=clock.speedup if clock else 1.0,
    )


def gmacs(module: nn.Module, x: Tensor) -> float:
    """Billions of multiply-accumulates."""
    with torch.no_grad():
        return count_flops(module.eval(), x) / 2e9


def race(baseline: nn.Module, network: nn.Module, x: Tensor, pairs: int = 7) -> Comparison:
    """Time a training step (forward and backward, no optimiser) of both on the same input."""

    def step(module: nn.Module) -> None:
        module.zero_grad(set_to_none=True)
        module.train()(x).square().mean().backward()

    return compare(partial(step, baseline), partial(step, network), pairs, flops=False)


def matched_width(parameters: int, classes: int, channels: int) -> int:
    """The largest width at which `Residual` has no more parameters than given."""
    width = 4
    with torch.device("meta"):
        while count_parameters(Residual(classes, channels, width + 1)) <= parameters:
            width += 1
    return width


def train(context: ProofContext, network: nn.Module, draw: Draw, name: str) -> None:
    """Minimise the cross-entropy of what is drawn; the network is left in evaluation mode."""
    steps = STEPS[context.mode]
    bar = iter(context.track(range(steps), f"training {name}"))

    def loss(_: int) -> Tensor:
        next(bar)
        pictures, labels = draw(BATCH)
        return F.cross_entropy(network(pictures), labels)

    # Averaged weights would not fit the statistics that batch norms gather, so none are kept.
    fit(network.to(context.device).train(), loss, steps, lr=LR, average=0.0, log=lambda _: None)
    network.eval()


def accuracy(network: nn.Module, pictures: Tensor, labels: Tensor) -> float:
    """The share of pictures whose class is found."""
    with torch.inference_mode():
        found = torch.cat([network(part).argmax(1) for part in pictures.split(200)])
    return float((found == labels).float().mean())


# ---------------------------------------------------------------------- pictures


def data(context: ProofContext) -> tuple[Callable[[], Draw], tuple[Tensor, Tensor], int, str]:
    """A maker of training streams that start alike, test pictures and classes, how many classes, and what it all is."""
    tested, folder = TESTED[context.mode], context.data
    if context.full and folder is not None and (folder / "cifar10_train_jpeg.npz").is_file():
        learned = read_archive(folder / "cifar10_train_jpeg.npz", TRAINED).to(context.device)
        held = read_archive(folder / "cifar10_test_jpeg.npz", tested).to(context.device)
        where = f"CIFAR-10, {TRAINED} pictures to learn from and {tested} to measure on"
        return partial(learned.draws, context.seed), (standardised(held.pictures), held.labels), 10, where
    photographs = dict(context.photographs())
    left, right = zip(*(halves(photographs[name].mean(0)) for name in TEXTURES), strict=True)
    test = crops_of(right, context.seed + 1)(tested)
    where = f"Textures of scikit-image ({', '.join(TEXTURES)}), {tested} crops to measure on"
    return partial(crops_of, left, context.seed), test, len(TEXTURES), where


def halves(picture: Tensor) -> tuple[Tensor, Tensor]:
    """Left and right of a picture [H, W]."""
    middle = picture.shape[1] // 2
    return picture[:, :middle], picture[:, middle:]


def crops_of(pictures: tuple[Tensor, ...], seed: int) -> Draw:
    """Random crops of pictures [H, W], standardised one by one; the class is the picture."""
    dice = torch.Generator().manual_seed(seed)

    def draw(batch: int) -> tuple[Tensor, Tensor]:
        labels = torch.randint(len(pictures), (batch,), generator=dice)
        places = torch.rand(batch, 2, generator=dice).tolist()
        crops = []
        for label, place in zip(labels.tolist(), places, strict=True):
            top, left = (int(p * (n - SIDE + 1)) for p, n in zip(place, pictures[label].shape, strict=True))
            crops.append(pictures[label][top : top + SIDE, left : left + SIDE])
        x = torch.stack(crops)[:, None]
        mean, std = x.mean((2, 3), keepdim=True), x.std((2, 3), keepdim=True)
        return (x - mean) / (std + 1e-3), labels.to(x.device)

    return draw
