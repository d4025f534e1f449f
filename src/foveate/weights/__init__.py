"""Small trained weights that make jobs work offline: safetensors, each with a JSON card of data, recipe and scores."""

import json
import os
from pathlib import Path
from typing import Any

from foveate.errors import WeightsError

FOLDER = Path(__file__).parent


def available() -> dict[str, list[int]]:
    """Scales there are weights for, by system."""
    found: dict[str, list[int]] = {}
    for card in sorted(FOLDER.glob("*-x*.json")):
        slug, scale = card.stem.rsplit("-x", 1)
        found.setdefault(slug, []).append(int(scale))
    return found


def card(slug: str, scale: int) -> dict[str, Any]:
    """The card of one set of weights: how the network is built, how it was trained, what it scores.

    Raises: WeightsError naming the scales there are.
    """
    path = FOLDER / f"{slug}-x{scale}.json"
    if not path.exists():
        there = available().get(slug)
        have = f"scales {', '.join(map(str, there))}" if there else f"weights for {', '.join(available()) or 'nothing'}"
        raise WeightsError(f"no weights of {slug!r} for scale {scale}; foveate ships {have}.")
    return json.loads(path.read_text())


def load(slug: str, scale: int, **changes: Any) -> Any:
    """Build a system's network and fill it with the weights that come with foveate.

    Args:
        slug: the system, e.g. "pcsr".
        scale: the scale of the weights.
        changes: constructor arguments that do not change the shapes (e.g. `refine=True`).

    Returns: the network in eval mode.
    Raises: WeightsError when there are none, or they do not fit.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    from foveate import catalog

    config = card(slug, scale)["config"] | changes
    model = catalog.card(slug).target()(**config)
    try:
        model.load_state_dict(load_file(FOLDER / f"{slug}-x{scale}.safetensors"))
    except (OSError, SafetensorError) as error:
        raise WeightsError(f"the weights of {slug} x{scale} cannot be read: {error}; install foveate anew.") from error
    except RuntimeError as error:
        raise WeightsError(f"the weights of {slug} x{scale} do not fit {config}: {error}") from error
    return model.eval()


def save(model: Any, slug: str, scale: int, description: dict[str, Any], folder: Path = FOLDER) -> None:
    """Write weights and card, each to a temporary name first. `description` must hold "config"."""
    from safetensors.torch import save_file

    folder.mkdir(parents=True, exist_ok=True)
    target = folder / f"{slug}-x{scale}.safetensors"
    save_file({k: v.detach().contiguous() for k, v in model.state_dict().items()}, target.with_suffix(".part"))
    os.replace(target.with_suffix(".part"), target)
    text = json.dumps({"system": slug, "scale": scale, **description}, indent=2)
    target.with_suffix(".part").write_text(text + "\n")
    os.replace(target.with_suffix(".part"), target.with_suffix(".json"))
