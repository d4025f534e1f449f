"""foveate: spend pixels, tokens, layers, bits and parameters where an image needs them.

The face of the library. One name per way to use a system, and one knob, the `budget`, which means the same in all:

* job: `foveate.upscale("in.jpg", "out.png", scale=4, budget=0.5)`, `foveate.compress("in.png", budget="0.5 bpp")`
* model: `foveate.create("espcn", scale=3)`
* plugin: `handle = foveate.apply(model, "fastv", budget=0.5)`
* any: `foveate.prove("pcsr")` re-runs its headline claim; `foveate.list_systems()` says what there is

Nothing heavy is imported until it is used: `import foveate` alone does not load torch.
"""

import importlib
import sys
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from os import PathLike

    from foveate import errors as errors
    from foveate.catalog import Card
    from foveate.compress.verbs import compress as compress
    from foveate.compress.verbs import decompress as decompress
    from foveate.engine.budget import Budget as Budget
    from foveate.learn.stylize import stylize as stylize
    from foveate.proofs import Evidence
    from foveate.restore.downscale import downscale as downscale
    from foveate.restore.upscale import upscale as upscale

__version__ = "0.1.0"

__all__ = [
    "Budget",
    "apply",
    "compress",
    "create",
    "decompress",
    "downscale",
    "errors",
    "list_systems",
    "prove",
    "stylize",
    "upscale",
]

# Public name -> (module, attribute); an empty attribute means the module itself.
_LAZY = {
    "Budget": ("foveate.engine.budget", "Budget"),
    "compress": ("foveate.compress", ""),  # the package, which can be called
    "decompress": ("foveate.compress.verbs", "decompress"),
    "downscale": ("foveate.restore.downscale", "downscale"),
    "errors": ("foveate.errors", ""),
    "stylize": ("foveate.learn.stylize", "stylize"),
    "upscale": ("foveate.restore.upscale", "upscale"),
}


def __getattr__(name: str) -> Any:
    if name not in _LAZY:
        raise AttributeError(f"module 'foveate' has no attribute {name!r}")
    module, attribute = _LAZY[name]
    value = importlib.import_module(module)
    globals()[name] = value = getattr(value, attribute) if attribute else value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


def list_systems(
    text: str = "", *, wing: str | None = None, kind: str | None = None, works: bool | None = None
) -> list[str]:
    """List the names of systems, in the order of the catalogue.

    Args:
        text: words to look for in name, title and claim; all systems when empty.
        wing: only this wing, e.g. "restore".
        kind: only this kind: "job", "model", "plugin" or "tool".
        works: True for systems that can be used today, False for those with a card only, None for both.

    >>> "pcsr" in list_systems(wing="restore")
    True
    """
    from foveate import catalog

    return [card.slug for card in catalog.search(text, wing=wing, kind=kind, works=works)]


def create(name: str, pretrained: bool = False, **config: Any) -> Any:
    """Build the network of a system.

    Args:
        name: the system's name, as `foveate list` shows it, with or without a published size: "lsnet", "lsnet_t".
        pretrained: load the weights that come with foveate instead of random ones.
        config: the network's settings, e.g. `scale=3`, `num_classes=100`.

    Raises:
        UnknownSystemError: no card carries the name; the nearest names are given.
        NotBuiltError: the system has a card but no code yet.
        InputError: the system is not a network, or has no such setting.
    """
    from foveate import catalog
    from foveate.errors import InputError

    card, size = catalog.sized(name)
    target, config = card.builder(), size | config
    if card.kind == "plugin":
        raise InputError(
            f"{card.slug} is a plugin: it changes a model you already have. "
            f'Use foveate.apply(model, "{card.slug}", budget=0.5).'
        )
    if (card.kind == "tool" and not card.network) or (card.kind == "job" and not isinstance(target, type)):
        raise InputError(f"{card.slug} is a {card.kind}, not a network. Use {_import_line(card)}.")
    if pretrained:
        from foveate import weights

        _check_settings(card, weights.load, card.slug, **config)
        return weights.load(card.slug, **config)
    _check_settings(card, target, **config)
    return target(**config)


def apply(model: Any, name: str, budget: "Budget | float | str" = 0.5, **config: Any) -> Any:
    """Make a model you already have adaptive.

    Some models and tools can also change a model that is there; they offer a function `plugin` beside their entry.

    Args:
        model: the model, changed in place.
        name: the system's name, as `foveate list --kind plugin` shows it.
        budget: what the changed model may spend, e.g. 0.5, "50%", "64 tokens".
        config: the plugin's further settings.

    Returns: a handle; `handle.remove()` gives the model back as it was, bit for bit.
    Raises: UnknownSystemError, NotBuiltError, BudgetError; InputError when the system is not a plugin.
    """
    from foveate import catalog
    from foveate.engine.budget import Budget
    from foveate.errors import InputError

    card = catalog.card(name)
    target = card.target()
    if card.kind != "plugin":
        target = getattr(sys.modules[target.__module__], "plugin", None)
    if target is None:
        call = _import_line(card) if card.kind == "tool" else f'foveate.create("{card.slug}", ...)'
        if card.kind == "job":
            call = f"the commands that `foveate show {card.slug}` lists"
        raise InputError(f"{card.slug} is a {card.kind}, not a plugin: it does not change another model. Use {call}.")
    settings = {"budget": Budget.parse(budget), **config}
    _check_settings(card, target, model, **settings)
    return target(model, **settings)


def prove(
    name: str,
    *,
    full: bool = False,
    device: str = "cpu",
    seed: int = 0,
    data: "str | PathLike[str] | None" = None,
    progress: bool = True,
) -> "Evidence":
    """Re-run a system's headline claim against its baseline.

    Args:
        name: the system's name.
        full: run the longer experiment (minutes) instead of the quick one (under a minute).
        device: where to run, e.g. "cpu", "cuda".
        seed: of every random number.
        data: folder with the pictures of the literature (set5/, kodak12/ ...), for proofs that use them.
        progress: show progress bars on a terminal.
    """
    from pathlib import Path

    from foveate.proofs import ProofContext, run

    folder = None if data is None else Path(data)
    return run(name, ProofContext(device=device, seed=seed, full=full, data=folder, progress=progress))


def _import_line(card: "Card") -> str:
    module, _, attribute = str(card.entry).partition(":")
    return f"`from {module} import {attribute}`"


def _check_settings(card: "Card", target: Any, *args: Any, **settings: Any) -> None:
    """Refuse settings that the system does not have, naming those it has."""
    import inspect

    from foveate.errors import InputError

    signature = inspect.signature(target)
    try:
        signature.bind(*args, **settings)
    except TypeError as error:
        given = ", ".join(f"{key}={value!r}" for key, value in settings.items()) or "no settings"
        known = ", ".join(str(p) for p in list(signature.parameters.values())[len(args) :]) or "none"
        raise InputError(f"{card.slug} cannot be built with {given}: {error}. Its settings are: {known}.") from error
