"""Damage compressed files at random and see what decoding makes of them.

    python benchmarks/fuzz_container.py --files 20000

Half of the files are damaged blindly: bits flipped, bytes overwritten, zeroed, cut, removed, inserted or doubled. Each
must be refused by one BitstreamError (or be equal to the original). The other half are forged: the damage is done to
sections or header fields, and all checksums are made right again. Those may decode to anything or be refused by an
error of foveate's; they may not crash or hang.
"""

import argparse
import time
from collections import Counter
from collections.abc import Iterable
from dataclasses import replace
from typing import Any

import numpy as np

import foveate
from foveate.compress.codec import methods
from foveate.compress.container import Container
from foveate.data import pictures
from foveate.errors import BitstreamError, FoveateError

BUDGETS = {"bytes": "1500 B", "gaussians": "40 gaussians", "ms": "0.3 s"}
LIMIT = 2**20


def originals(chosen: Iterable[str] | None = None) -> dict[str, bytes]:
    """A small file of every chosen codec, or of all, for a piece of photograph in colour with alpha and one in grey."""
    from foveate.compress.codec import resolve

    piece = (pictures.samples()["astronaut"][:, 90:130, 200:248] * 255).round().byte().permute(1, 2, 0).numpy()
    found = {}
    for method in methods() if chosen is None else chosen:
        units = resolve(method).units
        budget = BUDGETS[units[0]] if units else None
        found[method] = foveate.compress(piece, method=method, budget=budget)
        found[f"{method}, grey"] = foveate.compress(piece[..., 0], method=method, budget=budget)
    return found


def damaged(data: bytes, random: np.random.Generator) -> bytes:
    """One to three blind changes."""
    out = bytearray(data)
    for _ in range(random.integers(1, 4)):
        at, length = int(random.integers(0, len(out) + 1)), int(random.integers(1, 40))
        kind = random.integers(0, 7)
        if kind == 0 and out:
            out[at % len(out)] ^= 1 << int(random.integers(0, 8))
        elif kind == 1:
            out[at : at + length] = random.bytes(len(out[at : at + length]))
        elif kind == 2:
            del out[at:]
        elif kind == 3:
            del out[at : at + length]
        elif kind == 4:
            out[at:at] = random.bytes(length)
        elif kind == 5:
            out[at:at] = out[at : at + length]
        else:
            out[at : at + length] = bytes(len(out[at : at + length]))
    return bytes(out)


def forged(data: bytes, random: np.random.Generator) -> bytes:
    """A change inside sections or of header fields, with checksums that are right."""
    container = Container.read(data)
    name = list(container.sections)[int(random.integers(0, len(container.sections)))]
    kind = random.integers(0, 8)
    if kind < 5:
        return container.with_sections(**{name: damaged(container.sections[name], random)}).to_bytes()
    if kind == 5:
        return replace(container, width=int(random.integers(1, 2000)), height=int(random.integers(1, 500))).to_bytes()
    if kind == 6:
        channels, bits = int(random.integers(1, 5)), int(random.choice([8, 16, 32]))
        return replace(container, channels=channels, bits=bits).to_bytes()
    names = [str(n) for n in random.permutation(list(container.sections))]
    shuffled = dict(zip(names, container.sections.values(), strict=True))
    del shuffled[names[0]]
    return replace(container, sections=shuffled).to_bytes()


def outcome(data: bytes, original: bytes, honest: bool) -> str:
    """What decoding did: "refused", "unchanged", "decoded", or what may not happen."""
    try:
        picture: Any = foveate.decompress(data, kind="array", limit=LIMIT)
    except BitstreamError as error:
        return "refused" if "\n" not in str(error) else "REFUSED IN SEVERAL LINES"
    except FoveateError:
        return "refused" if not honest else "REFUSED BY ANOTHER ERROR"
    except Exception as error:
        return f"CRASHED: {type(error).__name__}: {error}"
    if data == original:
        return "unchanged"
    return "SILENT RUBBISH" if honest else "decoded" if np.isfinite(picture).all() else "NOT FINITE"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--files", type=int, default=20_000)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    random, files, began = np.random.default_rng(args.seed), originals(), time.perf_counter()
    counts: Counter[tuple[str, str, str]] = Counter()
    slowest, names = 0.0, list(files)
    for number in range(args.files):
        name, honest = names[number // 2 % len(names)], number % 2 == 0
        data = (damaged if honest else forged)(files[name], random)
        start = time.perf_counter()
        result = outcome(data, files[name], honest)
        slowest = max(slowest, time.perf_counter() - start)
        counts[name, "blind" if honest else "forged", result] += 1
    print("| codec | damage | outcome | files |\n|---|---|---|---|")
    for (name, how, result), count in sorted(counts.items()):
        print(f"| {name} | {how} | {result} | {count} |")
    bad = sum(count for (_, _, result), count in counts.items() if result[0].isupper())
    seconds = time.perf_counter() - began
    print(
        f"\n{args.files} files, {bad} bad outcomes, slowest {slowest:.2f} s, {seconds:.0f} s in all, seed {args.seed}"
    )
    raise SystemExit(bad > 0 or slowest > 10)


if __name__ == "__main__":
    main()
