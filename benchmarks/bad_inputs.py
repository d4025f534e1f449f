"""The table of bad inputs: what was tried on the command line, and what it got.

python benchmarks/bad_inputs.py > docs/results/bad-inputs.md
"""

import os
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
from PIL import Image


def cases(folder: Path) -> list[tuple[str, list[str]]]:
    """(what it is, arguments of upscale) with the files they need."""
    good = folder / "good.png"
    pixels = np.random.default_rng(0).integers(0, 256, (40, 50, 3), np.uint8)
    Image.fromarray(pixels).save(good)
    whole = good.read_bytes()
    (folder / "truncated.png").write_bytes(whole[: len(whole) // 2])
    (folder / "empty.png").write_bytes(b"")
    (folder / "text.jpg").write_text("this is no picture")
    lying = bytearray(whole)
    lying[16:24] = (2**31 - 1).to_bytes(4, "big") * 2
    (folder / "lying.png").write_bytes(lying)
    Image.fromarray(pixels).convert("RGBA").save(folder / "clear.png")
    out = str(folder / "out.png")
    return [
        ("missing file", [str(folder / "missing.png"), out]),
        ("a truncated PNG", [str(folder / "truncated.png"), out]),
        ("an empty file", [str(folder / "empty.png"), out]),
        ("text named .jpg", [str(folder / "text.jpg"), out]),
        ("a header that promises 2147483647 x 2147483647", [str(folder / "lying.png"), out]),
        ("scale 7", [str(good), out, "--scale", "7"]),
        ("scale 0", [str(good), out, "--scale", "0"]),
        ("budget 0.1", [str(good), out, "--budget", "0.1"]),
        ("budget 50", [str(good), out, "--budget", "50"]),
        ("budget '64 tokens'", [str(good), out, "--budget", "64 tokens"]),
        ("budget 0.5 for espcn", [str(good), out, "--budget", "0.5", "--method", "espcn"]),
        ("method pcrs", [str(good), out, "--method", "pcrs"]),
        ("method fastv", [str(good), out, "--method", "fastv"]),
        ("no output", [str(good)]),
        ("output is the input", [str(good), str(good)]),
        ("output .xyz", [str(good), str(folder / "out.xyz")]),
        ("transparency into a JPEG", [str(folder / "clear.png"), str(folder / "out.jpg")]),
        ("a folder that does not exist", [str(good), str(folder / "nowhere" / "out.png")]),
        ("engine ray", [str(good), str(folder / "many"), "--engine", "ray"]),
        ("an empty folder", [str(folder / "void"), str(folder / "many")]),
    ]


def full_disk(folder: Path) -> list[tuple[str, list[str]]]:
    """A file system of 16 KB, where one may be mounted."""
    small = folder / "small-disk"
    small.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=16k", "tmpfs", str(small)], check=False)
    return [("a full disk", [str(folder / "good.png"), str(small / "out.png")])] if mounted.returncode == 0 else []


def main() -> None:
    print("# Bad inputs\n\nMade by `python benchmarks/bad_inputs.py`.\n")
    print("| tried | exit code | said | output left |\n|---|---|---|---|")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "void").mkdir()
        for what, arguments in [*cases(folder), *full_disk(folder)]:
            before = {p for p in folder.rglob("*") if p.is_file()}
            command = [sys.executable, "-m", "foveate", "upscale", *arguments]
            done = subprocess.run(
                command, capture_output=True, text=True, check=False, env=os.environ | {"COLUMNS": "500"}
            )
            left = sorted(str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_file() and p not in before)
            said = done.stderr.strip().replace(str(folder) + "/", "").replace("\n", " / ").replace("|", "\\|")
            print(f"| {what} | {done.returncode} | {said} | {', '.join(left) or 'none'} |", flush=True)
        subprocess.run(["umount", str(folder / "small-disk")], check=False, capture_output=True)


if __name__ == "__main__":
    main()
