"""`foveate bench`: how fast this machine runs what foveate is made of."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from foveate.cli.console import note, print_json, print_table

if TYPE_CHECKING:
    from foveate.bench.case import Entry

bench = typer.Typer(no_args_is_help=True, help="Time what foveate is made of on this machine.")


@bench.callback()
def _group() -> None:
    """Time what foveate is made of on this machine."""


@bench.command("ops")
def ops(
    names: Annotated[list[str] | None, typer.Option("--op", help="Only this operator; may be given again.")] = None,
    quick: Annotated[bool, typer.Option("--quick", help="The two smallest sizes, and fewer runs.")] = False,
    device: Annotated[
        str | None, typer.Option(help="Where to run, e.g. cpu or cuda.  [default: cpu, then cuda where there is one]")
    ] = None,
    seed: Annotated[int, typer.Option(help="Seed of all random numbers.")] = 0,
    out: Annotated[
        Path | None,
        typer.Option(help="Folder of the report.  [default: docs/results, without --op and --quick]"),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Time every operator's fast path against its reference and other ways to the same values.

    CPU, and GPU if there; sizes from small to large; time, peak memory and how far the values are apart.

    \b
    Examples:
      foveate bench ops
      foveate bench ops --op grouped-linear --quick
    """
    import torch

    from foveate.bench.case import measured
    from foveate.bench.ops import OPERATORS
    from foveate.bench.report import HEADINGS, cells, growth, write_report
    from foveate.errors import InputError
    from foveate.proofs import ProofContext
    from foveate.proofs.report import RESULTS

    unknown = [name for name in names or () if name not in OPERATORS]
    if unknown:
        raise InputError(f"No operator is called {unknown[0]!r}. There are {', '.join(OPERATORS)}.")
    chosen = [OPERATORS[name] for name in dict.fromkeys(names or OPERATORS)]
    devices = [device] if device else ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]
    folder = RESULTS if out is None and not quick and not names else out
    entries: list[Entry] = []
    for place in devices:
        entries += measured(chosen, ProofContext(device=place, seed=seed, full=not quick))
    if as_json:
        print_json(entries)
    else:
        print_table(
            ("operator", "device", *HEADINGS), [[e["op"], e["device"], *cells(e)] for e in entries], HEADINGS[3:]
        )
        for name, place in dict.fromkeys((e["op"], e["device"]) for e in entries):
            for line in growth([e for e in entries if (e["op"], e["device"]) == (name, place)]):
                note(f"{name} ({place}): {line}")
    if folder is not None:
        note(f"written to {write_report(entries, folder)}")


@bench.command("codecs")
def codecs(
    data: Annotated[Path, typer.Option(help="Folder of pictures, such as the Kodak set.", exists=True)],
    names: Annotated[
        list[str] | None, typer.Option("--method", help="Only this codec, JPEG and so on too; may be given again.")
    ] = None,
    rates: Annotated[list[str] | None, typer.Option("--rate", help="Only this budget; may be given again.")] = None,
    limit: Annotated[int | None, typer.Option(min=1, help="Pictures at most.")] = None,
    seed: Annotated[int, typer.Option(help="Seed of all random numbers.")] = 0,
    out: Annotated[Path | None, typer.Option(help="Folder of the report.  [default: docs/results]")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON, write nothing.")] = False,
) -> None:
    """Measure rate, distortion and time of every codec, JPEG and WebP beside them.

    The report is written after every codec; those that are in it already are measured again.

    \b
    Examples:
      foveate bench codecs --data kodak/
      foveate bench codecs --data kodak/ --method gaussian-image --rate "0.5 bpp" --limit 3
    """
    from foveate.bench.codecs import RATES, REPORT, Way, baselines, measured, ours
    from foveate.compress.codec import methods
    from foveate.proofs import ProofContext
    from foveate.proofs.report import RESULTS

    context = ProofContext(seed=seed)
    skipped: list[str] = []
    everything: list[Entry] = []
    beside: dict[str, list[Way]] = {}
    for way in baselines():
        beside.setdefault(way.method, []).append(way)
    for name in dict.fromkeys(names or [*beside, *methods()]):
        ways = beside.get(name) or ours(name, rates or RATES)
        entries = list(measured(ways, data, context, limit, skipped))
        everything += entries
        if not as_json and entries:
            print_table(REPORT.headings, [REPORT.cells(entry) for entry in entries], REPORT.headings[2:])
            note(f"written to {REPORT.write(entries, out or RESULTS)}")
    for line in skipped:
        note(f"left out: {line}")
    if as_json:
        print_json(everything)


@bench.command("upscale")
def upscale(
    data: Annotated[Path, typer.Option(help="Folder that holds set5/ and kodak12/, or pictures.", exists=True)],
    names: Annotated[list[str] | None, typer.Option("--method", help="Only this method; may be given again.")] = None,
    scales: Annotated[list[int] | None, typer.Option("--scale", help="May be given again.  [default: 2, 4]")] = None,
    budgets: Annotated[
        list[float] | None, typer.Option("--budget", help="May be given again.  [default: 1, 0.75, 0.5]")
    ] = None,
    limit: Annotated[int | None, typer.Option(min=1, help="Pictures of a set at most.")] = None,
    device: Annotated[str, typer.Option(help="Where to run, e.g. cpu or cuda.")] = "cpu",
    out: Annotated[Path | None, typer.Option(help="Folder of the report.  [default: docs/results]")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON, write nothing.")] = False,
) -> None:
    """Measure quality and cost of every super-resolution network at several budgets.

    The report is written after every set of pictures, and last a sheet with one hard crop through all methods.

    \b
    Examples:
      foveate bench upscale --data pictures/
      foveate bench upscale --data set5/ --method pcsr --scale 4 --budget 0.5
    """
    from foveate.bench.upscale import BUDGETS, REPORT, SETS, measured, sheet
    from foveate.data.pictures import read_folder
    from foveate.proofs import ProofContext
    from foveate.proofs.report import RESULTS

    context = ProofContext(device=device)
    everything: list[Entry] = []
    folders = [data / name for name in SETS if (data / name).is_dir()] or [data]
    for folder in folders:
        originals = read_folder(folder, limit)
        for scale in scales or (2, 4):
            entries = list(measured(originals, folder.name, scale, context, names, budgets or BUDGETS))
            everything += entries
            if not as_json:
                print_table(REPORT.headings, [REPORT.cells(entry) for entry in entries], REPORT.headings[2:])
                note(f"written to {REPORT.write(entries, out or RESULTS)}")
    if as_json:
        print_json(everything)
        return
    place = Path(out or RESULTS) / "upscale-crop.png"
    sheet(originals, max(scales or (4,)), context, names).save(place)
    note(f"written to {place}")
