"""Train the dictionary and the predictor of the codec predictive-sparse-decomposition.

    python recipes/sparse_patches.py --data pictures/          # pictures/bsds300

Reads luminance patches of 8x8 from the training photographs, learns both by predictive sparse decomposition, orders the
atoms by how often exact codes use them, and writes weights and card. Two to five minutes on one core.
"""

import argparse
import time
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from foveate.compress.predictive_sparse_decomposition import (
    PredictiveSparseDecomposition,
    contrast_normalised,
    energy,
    fista,
)
from foveate.compress.sparse_patches import SIDE, SLUG, save_weights
from foveate.weights import FOLDER


def patches(folder: Path, count: int, seed: int) -> torch.Tensor:
    """Random luminance patches of all pictures, equally many of each. Shape: [count, 64] in 0..1."""
    files, random, found = sorted(folder.glob("*.jpg")), np.random.default_rng(seed), []
    each = -(-count // len(files))
    for file in files:
        picture = Image.open(file).convert("L")
        picture = picture.resize((picture.width * 2 // 3, picture.height * 2 // 3), Image.Resampling.LANCZOS)
        views = np.lib.stride_tricks.sliding_window_view(np.array(picture), (SIDE, SIDE))
        ys, xs = random.integers(0, views.shape[0], each), random.integers(0, views.shape[1], each)
        found.append(views[ys, xs].reshape(each, -1))
    return torch.from_numpy(np.concatenate(found)).float() / 255


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder in which bsds300/ lies")
    parser.add_argument("--atoms", type=int, default=128)
    parser.add_argument("--patches", type=int, default=60_000)
    parser.add_argument("--epochs", type=int, default=8)
    parser.add_argument("--out", type=Path, default=FOLDER)
    args = parser.parse_args()
    began = time.perf_counter()
    data = contrast_normalised(patches(args.data / "bsds300", args.patches, seed=0), flat=0.01)
    model = PredictiveSparseDecomposition(
        args.atoms, max_iter=args.epochs, batch_size=500, dictionary_rate=1.0, learning_rate=2e-3
    )
    model.fit(data[2000:].numpy())
    held_out, atoms = data[:2000], torch.from_numpy(model.components_)
    with torch.no_grad():
        exact, predicted = fista(held_out, atoms, model.penalty, steps=200), model.predictor_(held_out)
    order = (exact != 0).float().sum(0).argsort(descending=True)
    scores = {
        "energy of exact codes": energy(held_out, exact, atoms, model.penalty).mean().item(),
        "energy of predicted codes": energy(held_out, predicted, atoms, model.penalty).mean().item(),
        "active share of exact codes": (exact != 0).float().mean().item(),
    }
    card = {
        "data": f"{len(data) - 2000} luminance patches of 8x8 from bsds300 at 2/3 size, contrast normalised",
        "recipe": f"recipes/sparse_patches.py, {model!r}",
        "seconds": round(time.perf_counter() - began),
        "scores": {name: round(value, 4) for name, value in scores.items()},
    }
    save_weights(atoms[order], model.predictor_, order, card, args.out)
    print(f"{SLUG}: {card}")


if __name__ == "__main__":
    main()
