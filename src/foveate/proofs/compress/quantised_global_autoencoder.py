"""Proof of QG-VAE: tokens that describe the whole picture against tokens that describe a patch each, at equal bits.

Both are trained in this run on the same pictures, in the same order, for as many steps, with as many tokens of as many
words of as many numbers, started and revived in the same way, with parameters equal to a fifth:

    global   `foveate.compress.global_tokens.GlobalAutoencoder`, a codebook for every token
    patch    van den Oord et al. 2017 (arXiv:1711.00937): strided convolutions to a grid, residual blocks, one codebook

Pictures are the faces that come with scikit-image, which are aligned, and pieces of its textures, which are not. A
third kind of global tokens is trained with prefixes, to see whether each further token helps. The quick proof is the
faces alone, without prefixes.
"""

from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from foveate.compress.global_tokens import GlobalAutoencoder
from foveate.data.labelled import read_archive
from foveate.engine.fit import fit
from foveate.layers.residual import ResidualBlock
from foveate.layers.vector_quantise import Quantised, VectorQuantiser
from foveate.meter import count_parameters
from foveate.proofs.evidence import Evidence, ProofContext, Row
from foveate.proofs.report import figure_to_picture

if TYPE_CHECKING:
    from PIL import Image

SIDE, WORDS, DIM, BATCH, LR = 24, 32, 16, 16, 5e-3
STEPS = {"quick": 220, "full": 600}
BITS = WORDS.bit_length() - 1
PRICE = 0.1
"""Of the quantiser's loss, a tenth of the published one for both: pictures are to be learned in few steps."""

PLAIN, FREEZE, REVIVE = 0.15, 0.8, 20
"""Share of the steps before words are placed, share after which none is revived, and steps between."""

FEW, MANY = 4, 16
GRIDS = {FEW: (2, 2, 3), MANY: (2, 3)}
"""Strides that leave so many patches."""

WIDTHS = {FEW: 26, MANY: 32}
"""Channels of the patch network, which make its parameters as many as the other's."""

PREFIXES = (1, 2, 4, 8, 16)
TEXTURES = ("brick", "grass", "gravel", "page", "coins", "moon")
TESTED = 30
RATIO, RANDOM_SHARE = 0.9, 1 / 3


class PatchAutoencoder(nn.Module):
    """A VQ-VAE: strided convolutions to a grid of patches, a word for each, and back.

    Args:
        strides: of the convolutions; the grid's side is the picture's divided by all.
        width: channels.
        channels: of a picture.
    """

    def __init__(self, strides: tuple[int, ...], width: int, channels: int = 1) -> None:
        super().__init__()
        down: list[nn.Module] = []
        up: list[nn.Module] = [nn.Conv2d(DIM, width, 1), ResidualBlock(width)]
        for i, stride in enumerate(strides):
            down += [nn.Conv2d(width if i else channels, width, stride, stride), ResidualBlock(width)]
        for stride in reversed(strides):
            up += [nn.ConvTranspose2d(width, width, stride, stride), ResidualBlock(width)]
        self.encoder = nn.Sequential(*down, nn.Conv2d(width, DIM, 1))
        self.decoder = nn.Sequential(*up, nn.Conv2d(width, channels, 1))
        self.quantiser = VectorQuantiser(WORDS, DIM)

    def vectors(self, x: Tensor) -> Tensor:
        """Every patch as one for the single codebook. Shape: [B, channels, H, W] -> [B patches, 1, D]."""
        return self.encoder(x).permute(0, 2, 3, 1).reshape(-1, 1, DIM)

    def forward(self, x: Tensor, kept: Tensor | None = None, quantised: bool = True) -> tuple[Tensor, Quantised | None]:
        vectors = self.vectors(x)
        found = self.quantiser(vectors) if quantised else None
        side = round((len(vectors) / len(x)) ** 0.5)
        words = (vectors if found is None else found.values).view(len(x), side, side, DIM)
        return self.decoder(words.permute(0, 3, 1, 2)), found


Network = GlobalAutoencoder | PatchAutoencoder


@dataclass(frozen=True)
class Pictures:
    """Grey or coloured squares to learn from and to test on, [N, n, SIDE, SIDE]."""

    learned: Tensor
    tested: Tensor


def prove(context: ProofContext) -> Evidence:
    """Train pairs of networks, and compare what is lost."""
    sets = {"faces": faces(context)}
    if context.full:
        sets |= {"textures": textures(context)} | photographs(context)
    jobs = [(name, tokens) for name in sets for tokens in ((FEW, MANY) if name == "faces" else (MANY,))]
    rows, ratios, drawn = [], {}, {}
    for name, tokens in context.track(jobs, "training pairs"):
        pictures, lost = sets[name], {}
        for kind in ("patch", "global"):
            network = trained(kind, tokens, pictures, context)
            lost[kind], drawn[kind] = error(network, pictures.tested), network
            rows.append(
                Row(
                    f"{name}, {kind}, {tokens} tokens",
                    mse=lost[kind],
                    bits_per_picture=tokens * BITS,
                    words_in_use=used(network, pictures.learned),
                    parameters=count_parameters(network),
                )
            )
        ratios[name, tokens] = lost["global"] / lost["patch"]
        rows[-1].metrics["ratio"] = ratios[name, tokens]
        if (name, tokens) == ("faces", MANY):
            shown = {kind: _drawn(network, pictures.tested[:8]) for kind, network in drawn.items()}
    prefixes = []
    if context.full:
        ordered = trained("global", MANY, sets["faces"], context, prefixes=True)
        for kept in PREFIXES:
            prefixes.append(error(ordered, sets["faces"].tested, kept))
            rows.append(Row(f"faces, global and ordered, first {kept}", mse=prefixes[-1], bits_per_picture=BITS * kept))
    few, many = ratios["faces", FEW], ratios["faces", MANY]
    rest = ", ".join(f"{name} {ratio:.2f}" for (name, _), ratio in ratios.items() if name != "faces")
    return Evidence(
        system="quantised-global-autoencoder",
        claim="At the same bits, global tokens lose less than patch tokens, most of all at few tokens",
        rows=tuple(rows),
        claimed="a ratio of squared errors below 1, lower at few tokens",
        measured=f"on faces {few:.2f} at {FEW} tokens, {many:.2f} at {MANY}"
        + (f"; at {MANY} on {rest}" if rest else ""),
        holds=verdict(few, many, prefixes),
        notes=(
            f"Holds when the ratio on faces is at most {RATIO} at {MANY} tokens, no higher at {FEW}, and in the full "
            "proof every further token of an ordered prefix brings the picture nearer.",
            f"{SIDE}x{SIDE} pixels, {WORDS} words of {DIM} numbers, {STEPS[context.mode]} steps of {BATCH} pictures; "
            f"{len(sets['faces'].learned)} faces to learn from, mirrored and shifted by up to a pixel, "
            f"{len(sets['faces'].tested)} to test.",
            "A few hundred steps stand for the paper's hundreds of thousands; it measures ImageNet and CelebA.",
        ),
        figure=_figure(sets["faces"].tested[:8], shown),
        claimed_ratio=RATIO,
        measured_ratio=many,
    )


def verdict(few: float, many: float, prefixes: list[float]) -> bool:
    """Whether the claim holds.

    Args:
        few, many: ratios of squared errors, global over patch, at few and at many tokens.
        prefixes: squared errors of longer and longer prefixes.
    """
    return many <= RATIO and few <= many and all(a > b for a, b in pairwise(prefixes))


def build(kind: str, tokens: int, channels: int = 1) -> Network:
    """A network with random weights."""
    if kind == "patch":
        return PatchAutoencoder(GRIDS[tokens], WIDTHS[tokens], channels)
    return GlobalAutoencoder(
        SIDE, tokens, WORDS, DIM, heads=min(8, tokens), halvings=1, widths=(16, 24), channels=channels
    )


def trained(kind: str, tokens: int, pictures: Pictures, context: ProofContext, prefixes: bool = False) -> Network:
    """Train a network; pictures come in the same order for all."""
    torch.manual_seed(context.seed)
    channels, steps = pictures.learned.shape[1], STEPS[context.mode]
    network, dice = build(kind, tokens, channels).to(context.device), torch.Generator().manual_seed(context.seed)
    choice, plain = torch.Generator().manual_seed(context.seed + 1), int(PLAIN * steps)

    def loss(step: int) -> Tensor:
        quantiser = network.quantiser
        if step == plain:
            with torch.no_grad():
                quantiser.start(network.vectors(torch.cat([shaken(pictures.learned, dice) for _ in range(8)])), choice)
        if plain < step < FREEZE * steps:
            quantiser.observe()
            if step % REVIVE == 0:
                quantiser.revive(choice)
        x = shaken(pictures.learned[torch.randint(len(pictures.learned), (BATCH,), generator=dice)], dice)
        kept = None
        if prefixes:
            short = torch.rand(BATCH, generator=choice) < RANDOM_SHARE
            kept = torch.where(short, torch.randint(1, tokens, (BATCH,), generator=choice), tokens).to(x.device)
        y, found = network(x, kept, quantised=step >= plain)
        return F.mse_loss(y, x) + (0 if found is None else PRICE * found.loss)

    fit(network, loss, steps, lr=LR, average=0.98, every=steps, log=lambda _: None)
    return network.eval()


@torch.no_grad()
def error(network: Network, x: Tensor, kept: int | None = None) -> float:
    """Mean squared error, of the first tokens only where asked."""
    return float(F.mse_loss(_drawn(network, x, kept), x))


@torch.no_grad()
def used(network: Network, x: Tensor) -> float:
    """Share of the words that are chosen at all."""
    codes = network.quantiser.codes(network.vectors(x))
    return sum(len(column.unique()) for column in codes.T) / (WORDS * codes.shape[1])


def shaken(x: Tensor, dice: torch.Generator) -> Tensor:
    """Mirrored or not, and shifted by up to a pixel. Shape: [B, n, S, S] -> the same."""
    down, across, mirrored = torch.randint(0, 3, (3,), generator=dice).tolist()
    wide = F.pad(x.flip(3) if mirrored == 0 else x, (1, 1, 1, 1), mode="replicate")
    return wide[..., down : down + x.shape[2], across : across + x.shape[3]]


def faces(context: ProofContext) -> Pictures:
    """The hundred faces of scikit-image, aligned by their eyes."""
    from importlib.resources import files

    import numpy as np

    with (files("skimage") / "data" / "lfw_subset.npy").open("rb") as file:
        all_of_them = np.load(file, allow_pickle=False)[:100]
    x = torch.from_numpy(all_of_them).float()[:, None, :SIDE, :SIDE].to(context.device)
    return Pictures(x[TESTED:], x[:TESTED])


def textures(context: ProofContext) -> Pictures:
    """Pieces of photographs of textures, which no two have aligned; their right quarters are tested."""
    named = dict(context.photographs())
    halves: tuple[list[Tensor], list[Tensor]] = ([], [])
    for grey in (named[name].mean(0) for name in TEXTURES):
        cut = 3 * grey.shape[1] // 4
        for part, pieces in zip((grey[:, :cut], grey[:, cut:]), halves, strict=True):
            pieces.append(part.unfold(0, SIDE, SIDE).unfold(1, SIDE, SIDE).flatten(0, 1))
    learned, tested = (torch.cat(pieces)[:, None] for pieces in halves)
    return Pictures(learned, tested)


def photographs(context: ProofContext) -> dict[str, Pictures]:
    """CIFAR-10 in the middle 24 x 24 pixels, where it is at hand."""
    folder = context.data
    names = [f"cifar10_{part}_jpeg.npz" for part in ("train", "test")]
    if folder is None or not all((folder / name).is_file() for name in names):
        return {}
    parts = [read_archive(folder / name, count) for name, count in zip(names, (5000, 500), strict=True)]
    edge = (parts[0].pictures.shape[1] - SIDE) // 2
    learned, tested = (
        p.pictures.permute(0, 3, 1, 2)[..., edge : edge + SIDE, edge : edge + SIDE].float().to(context.device) / 255
        for p in parts
    )
    return {"CIFAR-10": Pictures(learned, tested)}


@torch.no_grad()
def _drawn(network: Network, x: Tensor, kept: int | None = None) -> Tensor:
    return network(x, None if kept is None else torch.full((len(x),), kept, device=x.device))[0].clamp(0, 1)


def _figure(tested: Tensor, drawn: dict[str, Tensor]) -> "Image.Image | None":
    """Faces, and what either kind of tokens makes of them."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        return None
    figure = Figure(figsize=(8, 3.4), layout="constrained")
    named = {"picture": tested, "patch tokens": drawn["patch"], "global tokens": drawn["global"]}
    for axes, (name, pictures) in zip(figure.subplots(3, 1), named.items(), strict=True):
        axes.imshow(torch.cat(list(pictures[:, 0].cpu()), 1), cmap="gray", vmin=0, vmax=1)
        axes.set_ylabel(name)
        axes.set(xticks=[], yticks=[])
    return figure_to_picture(figure)
