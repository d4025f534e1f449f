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


def ship(slug: str) -> bool:
    """Whether weights of a system come with foveate, for some scale or for any."""
    return place(slug).exists() or slug in available()


def place(slug: str, scale: int | None = None, folder: Path | None = None) -> Path:
    """Where the card of a set of weights lies; the weights lie beside it."""
    return (folder or FOLDER) / (f"{slug}.json" if scale is None else f"{slug}-x{scale}.json")


def card(slug: str, scale: int | None = None) -> dict[str, Any]:
    """The card of one set of weights: how the network is built, how it was trained, what it scores.

    Args:
        slug: the system, e.g. "pcsr".
        scale: of the weights; None for networks of any scale.

    Raises: WeightsError naming the scales there are.
    """
    path = place(slug, scale)
    if not path.exists():
        there = available().get(slug)
        have = f"scales {', '.join(map(str, there))}" if there else f"weights for {', '.join(available()) or 'nothing'}"
        wanted = "any scale" if scale is None else f"scale {scale}"
        raise WeightsError(f"no weights of {slug!r} for {wanted}; foveate ships {have}.")
    return json.loads(path.read_text())


def load(slug: str, scale: int | None = None, **changes: Any) -> Any:
    """Build a system's network and fill it with the weights that come with foveate.

    Args:
        slug: the system, e.g. "pcsr".
        scale: the scale of the weights; None for networks of any scale.
        changes: constructor arguments that do not change the shapes (e.g. `refine=True`).

    Returns: the network in eval mode.
    Raises: WeightsError when there are none, or they do not fit.
    """
    from foveate import catalog

    config = card(slug, scale)["config"] | changes
    return fill(catalog.card(slug).target()(**config), slug, scale)


def fill(model: Any, slug: str, scale: int | None = None) -> Any:
    """Fill a network with the weights that come with foveate; returns it in eval mode.

    Raises: WeightsError when they cannot be read or do not fit.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    name = slug if scale is None else f"{slug} x{scale}"
    try:
        model.load_state_dict(load_file(place(slug, scale).with_suffix(".safetensors")))
    except (OSError, SafetensorError) as error:
        raise WeightsError(f"the weights of {name} cannot be read: {error}; install foveate anew.") from error
    except RuntimeError as error:
        raise WeightsError(f"the weights of {name} do not fit {type(model).__name__}: {error}") from error
    return model.eval()


def save(model: Any, slug: str, scale: int | None, description: dict[str, Any], folder: Path | None = None) -> Path:
    """Write weights and card, each to a temporary name first; returns where the weights are.

    `description` must hold "config".
    """
    from safetensors.torch import save_file

    written = place(slug, scale, folder)
    written.parent.mkdir(parents=True, exist_ok=True)
    part = written.with_suffix(".part")
    save_file({k: v.detach().contiguous() for k, v in model.state_dict().items()}, part)
    os.replace(part, written.with_suffix(".safetensors"))
    about = {"system": slug} if scale is None else {"system": slug, "scale": scale}
    part.write_text(json.dumps(about | description, indent=2) + "\n")
    os.replace(part, written)
    return written.with_suffix(".safetensors")
