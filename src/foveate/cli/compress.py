"""foveate compress, decompress, inspect: pictures to files of ours, back, and what is in them."""

import ast
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from types import FrameType
from typing import Annotated, Any

import typer

from foveate.cli.batch import bar, check_folder, is_batch, items_of, leave, numbers, run_batch, split
from foveate.cli.console import note, print_json, print_table
from foveate.errors import InputError

_Paths = Annotated[
    list[Path], typer.Argument(metavar="INPUT... OUTPUT", help="Files or folders, and last where the result goes.")
]
_Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="No progress, no summary.")]
_Jobs = Annotated[int, typer.Option("--jobs", "-j", help="Processes of a batch.")]
_Resume = Annotated[bool, typer.Option("--resume/--again", help="Skip files done before, or make all again.")]


def compress(
    paths: _Paths,
    method: Annotated[
        str | None, typer.Option("--method", "-m", help="A codec: `foveate list --wing compress --works`.")
    ] = None,
    budget: Annotated[
        str | None,
        typer.Option("--budget", "-b", help="'0.5 bpp', '20 kB', a share of the raw size, '2000 gaussians', '30 s'."),
    ] = None,
    quality: Annotated[
        float | None, typer.Option("--quality", help="PSNR in dB to reach, instead of a budget.")
    ] = None,
    set: Annotated[
        list[str] | None, typer.Option("--set", metavar="NAME=VALUE", help="A setting of the codec; may be repeated.")
    ] = None,
    jobs: _Jobs = 1,
    resume: _Resume = True,
    quiet: _Quiet = False,
) -> None:
    """Compress pictures under a budget, or to a quality.

    Ctrl-C stops an encoder that optimises, and writes the best it has so far; a second Ctrl-C gives up.

    \b
    Examples:
      foveate compress photo.png photo.fov --budget "0.5 bpp"
      foveate compress photo.png photo.fov --method gaussian-image --budget "2000 gaussians"
      foveate compress holiday/ small/ --quality 32
    """
    from foveate.compress.verbs import DEFAULT, check

    sources, out = split("compress", paths)
    settings = {"method": method or DEFAULT, "budget": budget, "quality": quality, **_settings(set or [])}
    check(**settings)
    if is_batch(sources, out):
        _many(sources, out, ".fov", compress_file, settings, jobs, resume, quiet)
    else:
        _one(sources[0], out, quiet, settings)


def decompress(
    paths: _Paths,
    size: Annotated[str | None, typer.Option("--size", help="WxH to render at, for codecs that can.")] = None,
    window: Annotated[str | None, typer.Option("--window", help="x,y,width,height: decode this part.")] = None,
    prefix: Annotated[bool, typer.Option("--prefix", help="Accept a file cut off, for a coarser picture.")] = False,
    format: Annotated[str, typer.Option("--format", help="Files of a batch: png, tiff, jpg, webp, avif.")] = "png",
    jobs: _Jobs = 1,
    resume: _Resume = True,
    quiet: _Quiet = False,
) -> None:
    """Decompress files that foveate compressed.

    \b
    Examples:
      foveate decompress photo.fov photo.png
      foveate decompress photo.fov large.png --size 4096x4096
      foveate decompress photo.fov corner.png --window 0,0,256,256
    """
    sources, out = split("decompress", paths)
    settings = {
        "size": numbers("--size", size, "x", 2),
        "window": numbers("--window", window, ",", 4),
        "prefix": prefix,
    }
    if is_batch(sources, out):
        _many(sources, out, f".{format.lower().lstrip('.')}", decompress_file, settings, jobs, resume, quiet)
        return
    began = time.perf_counter()
    decompress_file(sources[0], out, **settings)
    if not quiet:
        note(f"{out}: {time.perf_counter() - began:.2f} s")


def inspect(
    file: Annotated[Path, typer.Argument(metavar="FILE", help="A file that foveate compressed.")],
    prefix: Annotated[bool, typer.Option("--prefix", help="Accept a file cut off.")] = False,
    json: Annotated[bool, typer.Option("--json", help="As JSON.")] = False,
) -> None:
    """Say what is inside a compressed file; nothing is decoded.

    \b
    Examples:
      foveate inspect photo.fov
      foveate inspect half-loaded.fov --prefix --json
    """
    from foveate.compress.container import Container, header_length
    from foveate.compress.verbs import read_file

    data = read_file(file)
    container = Container.read(data, allow_prefix=prefix)
    facts: dict[str, Any] = {
        "method": container.method,
        "width": container.width,
        "height": container.height,
        "channels": container.channels,
        "bits": container.bits,
        "bytes": len(data),
        "bpp": round(8 * len(data) / (container.width * container.height), 5),
    }
    sections = {"header": header_length(data)} | {name: len(held) for name, held in container.sections.items()}
    if json:
        print_json({**facts, "sections": sections, "missing": list(container.missing)})
        return
    print_table(["", ""], [[name, f"{value}"] for name, value in facts.items()])
    lines = [[name, str(size), f"{size / len(data):.1%}"] for name, size in sections.items()]
    print_table(
        ["section", "bytes", "share"], lines + [[name, "missing", ""] for name in container.missing], ["bytes", "share"]
    )


def compress_file(source: Path, target: Path, **settings: Any) -> dict[str, Any]:
    """Compress one file of a batch; return its rate."""
    from foveate.compress.container import Container
    from foveate.compress.verbs import compress, write_file

    data = compress(source, **settings)
    write_file(target, data, source)
    held = Container.read(data)
    return {"bytes": len(data), "bpp": 8 * len(data) / (held.width * held.height)}


def decompress_file(source: Path, target: Path, **settings: Any) -> dict[str, Any]:
    """Decompress one file of a batch."""
    from foveate.compress.verbs import decompress

    decompress(source, target, **settings)
    return {}


def _one(source: Path, out: Path, quiet: bool, settings: dict[str, Any]) -> None:
    began, seen = time.perf_counter(), {"psnr": ""}
    with bar(quiet) as shown, _stopping(shown.console.print) as asked:
        line = shown.add_task(source.name, total=1.0)

        def progress(share: float, psnr: float | None) -> bool:
            if psnr is not None:
                seen["psnr"] = f"{psnr:.2f} dB, "
            shown.update(line, completed=share, description=f"{source.name}  {seen['psnr'].rstrip(', ')}")
            return asked()

        rate = compress_file(source, out, progress=progress, **settings)
        stopped = asked()
    if not quiet:
        seconds = time.perf_counter() - began
        what = f"{rate['bytes']} bytes, {rate['bpp']:.3f} bpp, {seen['psnr']}{seconds:.2f} s"
        note(f"{out}: {what}" + (" (stopped; the best so far)" if stopped else ""))


@contextmanager
def _stopping(say: Callable[[str], object]) -> Iterator[Callable[[], bool]]:
    """Turn the first Ctrl-C into a wish that the encoder is told of; the second one breaks off as always."""
    wished = False

    def on_signal(number: int, frame: FrameType | None) -> None:
        nonlocal wished
        if wished:
            raise KeyboardInterrupt
        wished = True
        say("stopping with the best so far; Ctrl-C again gives up")

    before = signal.signal(signal.SIGINT, on_signal)
    try:
        yield lambda: wished
    finally:
        signal.signal(signal.SIGINT, before)


def _many(
    sources: list[Path],
    out: Path,
    suffix: str,
    worker: Callable[..., dict[str, Any]],
    settings: dict[str, Any],
    jobs: int,
    resume: bool,
    quiet: bool,
) -> None:
    check_folder(out)
    compressed = worker is decompress_file
    found = _list(sources, out, compressed)
    items = items_of(found, sources, suffix, "compressed files" if compressed else "pictures")
    kept = {name: str(value) for name, value in settings.items()} | {"suffix": suffix}
    leave(run_batch(items, partial(worker, **settings), out, kept, jobs, resume, quiet))


def _list(sources: list[Path], out: Path, compressed: bool) -> list[tuple[Path, Path]]:
    from foveate.data.files import list_pictures, natural_key

    if not compressed:
        return list_pictures(sources, skip=out)
    found: list[tuple[Path, Path]] = []
    for source in sources:
        inside = sorted(source.rglob("*.fov"), key=lambda path: natural_key(path.as_posix())) if source.is_dir() else []
        found += [(path, path.relative_to(source)) for path in inside] or [(source, Path(source.name))]
    return [(path, relative) for path, relative in found if not path.is_dir()]


def _settings(pairs: list[str]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for pair in pairs:
        name, equals, value = pair.partition("=")
        if not equals or not name.isidentifier():
            raise InputError(f"--set takes NAME=VALUE, got {pair!r}; write for example --set steps=500.")
        try:
            found[name] = ast.literal_eval(value)
        except (ValueError, SyntaxError):
            found[name] = value
    return found
