"""The catalogue: one card per system, read without importing torch.

A card (a table of `systems.toml`) says what a system is, where it comes from, what it spends unevenly and what that
buys. Two addresses, `entry` and `proof`, are there only where the system works, and are imported only when asked for:
listing 119 systems costs no more than reading one small file.
"""

import re
import tomllib
from collections.abc import Callable
from dataclasses import MISSING, dataclass, fields
from difflib import SequenceMatcher
from functools import cache
from importlib import import_module
from pathlib import Path
from typing import Any

from foveate import weights
from foveate.errors import InputError, NotBuiltError, UnknownSystemError

__all__ = ["KINDS", "WINGS", "Card", "card", "load", "parse", "resolve", "search", "sized"]

WINGS = (
    "encode",
    "restore",
    "compress",
    "generate",
    "recognize",
    "scenes",
    "language",
    "adapt",
    "learn",
    "curate",
    "evaluate",
    "protect",
    "ops",
)
KINDS = ("job", "model", "plugin", "tool")
_COMMANDS = {
    "restore": "foveate upscale in.jpg out.png",
    "downscale": "foveate downscale in.jpg out.png",
    "compress": "foveate compress in.png out.fov",
}


@dataclass(frozen=True)
class Card:
    """Hold what is known of one system before any of its code is imported.

    Args:
        slug: the system's name, as in `foveate show <slug>`.
        title: the paper's title.
        paper: where to read it, "arXiv:2407.21448".
        year: when it first appeared in public.
        wing: the task it serves, one of `WINGS`.
        kind: how a user meets it, one of `KINDS`.
        adapts: what is spent unevenly, and by what.
        claim: the paper's headline figure and the baseline it is measured against.
        entry: "module:name" of its code; None while there is none.
        proof: "module:name" of the function that re-runs the claim; None while there is none.
        network: "module:name" of the network that `foveate.create` builds, where the entry is a part of one.
        verb: the command that runs a job, where it is not the usual one of its wing.
    """

    slug: str
    title: str
    paper: str
    year: int
    wing: str
    kind: str
    adapts: str
    claim: str
    entry: str | None = None
    proof: str | None = None
    network: str | None = None
    verb: str | None = None

    @property
    def works(self) -> bool:
        """Whether the system has code."""
        return self.entry is not None

    @property
    def command(self) -> str | None:
        """The command line that runs a job; None for other kinds, for wings without a verb, and without weights."""
        start = _COMMANDS.get(self.verb or self.wing) if self.kind == "job" else None
        if self.wing == "restore" and not weights.ship(self.slug):
            return None
        return start and f"{start} --method {self.slug}"

    def target(self) -> Any:
        """Import what `entry` names: a class or a function.

        Raises:
            NotBuiltError: the system has a card but no code yet.
        """
        return _follow(self, "entry", "code")

    def builder(self) -> Any:
        """Import what builds the system's network: what `network` names, else `entry`.

        Raises:
            NotBuiltError: the system has a card but no code yet.
        """
        return _follow(self, "network" if self.network else "entry", "code")

    def proof_function(self) -> Callable[..., Any]:
        """Import what `proof` names: a function from a `ProofContext` to `Evidence`.

        Raises:
            NotBuiltError: the system has no proof yet.
        """
        return _follow(self, "proof", "proof")


def parse(text: str, source: str = "systems.toml") -> dict[str, Card]:
    """Read cards from TOML, one table per system, and check every key.

    Args:
        text: the file's content.
        source: the file's name, for messages.

    Raises:
        InputError: not TOML, or a card with an unknown, missing or misshapen key; the message names card and key.
    """
    try:
        tables = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise InputError(f"{source} is not valid TOML: {error}. Mend that place.") from error
    return {slug: _checked(slug, table, source) for slug, table in tables.items()}


def load() -> dict[str, Card]:
    """Return every card by slug, in the order of `WINGS`, then alphabetical.

    The file is read once; the dictionary is the caller's own.

    >>> len(load())
    119
    """
    return dict(_all())


def card(name: str) -> Card:
    """Find one card by slug or by the name of its class or network; case, hyphens and underscores do not matter.

    Raises:
        UnknownSystemError: no such system; the message names the nearest ones.

    >>> card("PCSR").slug, card("Adaptive_Patch_Exiting").slug
    ('pcsr', 'adaptive-patch-exiting')
    >>> card("token-lerner")
    Traceback (most recent call last):
    ...
    foveate.errors.UnknownSystemError: No system is called 'token-lerner'. Nearest: tokenlearner...
    """
    cards, key = _all().values(), _squeezed(name)
    for names in (
        [(c.slug, c) for c in cards],
        [(address.rpartition(":")[2], c) for c in cards for address in (c.entry, c.network) if address],
    ):
        for known, found in names:
            if _squeezed(known) == key:
                return found
    near = _nearest(name)
    hint = f"Nearest: {', '.join(near)}. " if near else ""
    raise UnknownSystemError(f"No system is called {name!r}. {hint}`foveate list` shows all {len(cards)}.")


def sized(name: str) -> tuple[Card, dict[str, Any]]:
    """Find a card by its name, or by its name and one of the published sizes that its module lists as `SIZES`.

    Returns: the card, and the settings of that size; none where no size was given.
    Raises:
        UnknownSystemError: no such system.
        InputError: no such size; the message names those there are.

    >>> sized("lsnet_t")[0].slug, sized("LSNet-T")[1]["depths"], sized("lsnet")[1]
    ('lsnet', (0, 2, 8, 10), {})
    """
    try:
        return card(name), {}
    except UnknownSystemError:
        for cut in reversed([match.start() for match in re.finditer(r"[-_]", name)]):
            try:
                found = card(name[:cut])
            except UnknownSystemError:
                continue
            sizes = getattr(import_module(found.builder().__module__), "SIZES", {})
            for size, settings in sizes.items():
                if _squeezed(size) == _squeezed(name[cut:]):
                    return found, dict(settings)
            if sizes:
                known = ", ".join(map(repr, sizes))
                raise InputError(f"{found.slug} has no size {name[cut + 1 :]!r}; use one of {known}.") from None
        raise


def search(text: str = "", wing: str | None = None, kind: str | None = None, works: bool | None = None) -> list[Card]:
    """List the cards that meet every condition given, in the order of the catalogue.

    Args:
        text: words that must all occur (parts of words count, case does not) in slug, title, paper, adapts or claim.
        wing: one of `WINGS`; None for any.
        kind: one of `KINDS`; None for any.
        works: True for systems with code, False for those without; None for both.

    Raises:
        InputError: an unknown wing or kind.

    >>> [c.slug for c in search("pixel-level", wing="restore")]
    ['pcsr']
    """
    _known("wing", wing, WINGS)
    _known("kind", kind, KINDS)
    words = text.casefold().split()
    return [
        c
        for c in _all().values()
        if wing in (None, c.wing)
        and kind in (None, c.kind)
        and works in (None, c.works)
        and all(word in f"{c.slug} {c.title} {c.paper} {c.adapts} {c.claim}".casefold() for word in words)
    ]


def resolve(name: str) -> Any:
    """Import the code of the system called `name`: `card(name).target()`.

    Raises:
        UnknownSystemError: no such system.
        NotBuiltError: the system has a card but no code yet.
    """
    return card(name).target()


@cache
def _all() -> dict[str, Card]:
    path = Path(__file__).with_name("systems.toml")
    return parse(path.read_text(encoding="utf-8"), path.name)


def _checked(slug: str, table: Any, source: str) -> Card:
    where = f"{source}, card [{slug}]"
    if not isinstance(table, dict):
        raise InputError(f"{source}: {slug} = {table!r} stands outside a card. Put it under a [slug] heading.")
    known = {f.name: f for f in fields(Card) if f.name != "slug"}
    if extra := [key for key in table if key not in known]:
        raise InputError(f"{where}: unknown key {extra[0]!r}. Use {', '.join(known)}.")
    if missing := [key for key, f in known.items() if f.default is MISSING and key not in table]:
        raise InputError(f"{where}: {', '.join(missing)} missing. Add it.")
    for key, value in table.items():
        want = int if key == "year" else str
        if type(value) is not want or not value:
            raise InputError(f"{where}: {key} = {value!r}; expected a non-empty {want.__name__}. Correct it.")
        if key in ("entry", "network", "proof") and not re.fullmatch(r"\w+(\.\w+)*:\w+", str(value)):
            raise InputError(f'{where}: {key} = {value!r}; expected "module:name". Correct it.')
    _known("wing", table["wing"], WINGS, where)
    _known("kind", table["kind"], KINDS, where)
    if "proof" in table and "entry" not in table:
        raise InputError(f"{where}: a proof without an entry. Name the code that it proves, or remove the proof.")
    return Card(slug, **table)


def _known(what: str, value: str | None, choices: tuple[str, ...], where: str = "The catalogue") -> None:
    if value is not None and value not in choices:
        raise InputError(f"{where}: no {what} is called {value!r}. Choose one of {', '.join(choices)}.")


def _follow(holder: Card, field: str, noun: str) -> Any:
    address = getattr(holder, field)
    if address is None:
        ready = [c for c in _all().values() if getattr(c, field)]
        beside = [c.slug for c in ready if c.wing == holder.wing]
        place, names = (f"in its wing ({holder.wing})", beside) if beside else ("so far", [c.slug for c in ready])
        raise NotBuiltError(
            f"{holder.slug!r} has a card but no {noun} yet. With {noun} {place}: {', '.join(names) or 'none'}. "
            f"Use one of those; `foveate show {holder.slug}` says what is known of this one."
        )
    module, _, name = address.partition(":")
    return getattr(import_module(module), name)


def _squeezed(name: str) -> str:
    return re.sub(r"[\W_]", "", name.casefold())


def _nearest(name: str, count: int = 3, floor: float = 0.6) -> list[str]:
    """Rank slugs by likeness, 0..1: of the whole name to the slug, or, word by word, to the words of slug and title."""

    def alike(a: str, b: str) -> float:
        return SequenceMatcher(None, a, b, autojunk=False).ratio()

    whole, words = _squeezed(name), re.findall(r"[^\W_]+", name.casefold())

    def likeness(c: Card) -> tuple[float, float]:
        said = f"{c.slug} {c.title}".casefold()
        vocabulary = {*re.findall(r"[^\W_]+", said), *map(_squeezed, said.split())}
        by_slug = alike(whole, _squeezed(c.slug))
        by_word = sum(max(alike(word, own) for own in vocabulary) for word in words) / max(len(words), 1)
        return max(by_slug, by_word), by_slug

    scores = {c.slug: likeness(c) for c in _all().values()}
    ranked = sorted(scores, key=lambda slug: scores[slug], reverse=True)
    enough = max(floor, 0.8 * scores[ranked[0]][0])  # a close hit needs no far-fetched company
    return [slug for slug in ranked[:count] if scores[slug][0] >= enough]
