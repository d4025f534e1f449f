"""`foveate list` and `foveate show`: what systems there are, and how each is used."""

from typing import TYPE_CHECKING, Annotated, Any

import typer

from foveate.cli.console import note, on_terminal, print_json, print_table

if TYPE_CHECKING:
    from foveate.catalog import Card


def list_(
    text: Annotated[str, typer.Argument(help="Words to look for in names, titles and claims.")] = "",
    wing: Annotated[str | None, typer.Option(help="Only this wing, e.g. restore, compress, language.")] = None,
    kind: Annotated[str | None, typer.Option(help="Only this kind: job, model, plugin or tool.")] = None,
    works: Annotated[bool, typer.Option("--works/--all", help="Only systems that can be used today.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """List the systems, and which of them work today.

    \b
    Examples:
      foveate list --works
      foveate list "super-resolution" --wing restore --kind job
    """
    from foveate import catalog

    cards = catalog.search(text, wing=wing, kind=kind, works=True if works else None)
    if as_json:
        print_json([as_dict(card) for card in cards])
        return
    if not cards:
        note("No system matches. Try fewer words, or `foveate list` for all of them.")
        return
    rows = [[card.slug, card.wing, card.kind, "yes" if card.works else "", card.title] for card in cards]
    print_table(["system", "wing", "kind", "works", "title"], rows)
    if on_terminal():
        working = sum(card.works for card in cards)
        note(f"Systems: {len(cards)}, working today: {working}. `foveate show <system>` tells more.")


def show(
    system: Annotated[str, typer.Argument(help="Name of the system, as `foveate list` prints it.")],
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Show a system's card, its use and its last figures.

    \b
    Examples:
      foveate show pcsr
      foveate show adaptive-patch-exiting --json
    """
    from foveate import catalog
    from foveate.proofs.evidence import Evidence
    from foveate.proofs.report import last_results

    card = catalog.card(system)
    results = last_results(card.slug)
    if as_json:
        print_json({**as_dict(card), "use": how_to_use(card), "results": results})
        return
    typer.echo(f"{card.slug}: {card.title}")
    typer.echo(f"  paper   {card.paper}, {card.year}")
    typer.echo(f"  wing    {card.wing}, a {card.kind}")
    typer.echo(f"  adapts  {card.adapts}")
    typer.echo(f"  claim   {card.claim}")
    if not card.works:
        working = ", ".join(other.slug for other in catalog.search(wing=card.wing, works=True)) or "none"
        typer.echo(f"\nNot built yet. Working systems of this wing: {working}.")
        return
    typer.echo("\nUse:")
    for line in how_to_use(card):
        typer.echo(f"  {line}")
    typer.echo("\nProof:" if results else f"\nProof: no figures at hand. Run: foveate prove {card.slug}")
    for entry in results:
        typer.echo(f"  {Evidence.from_dict(entry).verdict}")


def as_dict(card: "Card") -> dict[str, Any]:
    """A card as JSON-safe values."""
    from dataclasses import asdict

    return {**asdict(card), "works": card.works}


def _adaptive(slug: str) -> bool:
    """Whether the weights that come with a system can run on half of its compute."""
    from foveate import weights

    return any(weights.card(slug, scale).get("floor", 1) <= 0.5 for scale in weights.available().get(slug, []))


def _resizing(card: "Card") -> list[str]:
    """How to enlarge or shrink by a system; one without weights is built and passed."""
    from foveate import weights

    verb = card.verb or "upscale"
    call = f'foveate.{verb}("in.jpg", "out.png", scale=2, method='
    option, argument = (" --budget 0.5", ", budget=0.5") if _adaptive(card.slug) else ("", "")
    if weights.place(card.slug).exists():
        scale, settings = 2.7, ""
    elif card.slug in weights.available():
        scale, settings = weights.available()[card.slug][0], f", scale={weights.available()[card.slug][0]}"
    else:
        return [f'network = foveate.create("{card.slug}")', f"{call}network)"]
    return [
        f"{card.command} --scale {scale}{option}",
        f'{call.replace("scale=2", f"scale={scale}")}"{card.slug}"{argument})',
        f'network = foveate.create("{card.slug}", pretrained=True{settings})',
    ]


def how_to_use(card: "Card") -> list[str]:
    """Lines to copy, by the kind of the system; none when it does not work yet."""
    if card.entry is None:
        return []
    module, _, name = card.entry.partition(":")
    by_kind = {
        "job": [f"from {module} import {name}"],
        "model": [f'model = foveate.create("{card.slug}")'],
        "plugin": [f'handle = foveate.apply(model, "{card.slug}", budget=0.5)', "handle.remove()"],
        "tool": [f"from {module} import {name}"],
    }
    lines = by_kind[card.kind]
    if card.command and card.wing == "compress":
        lines = [card.command, f'data = foveate.compress("in.png", method="{card.slug}")', "foveate.decompress(data)"]
    elif card.kind == "job" and card.wing == "restore":
        lines = _resizing(card)
    return [*lines, f"foveate prove {card.slug}"] if card.proof else lines
