"""Kill a batch at random moments, resume it, and look whether every picture is there and right.

python benchmarks/killed_batch.py --pictures 40 --kills 5
"""

import argparse
import random
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
from PIL import Image

from foveate import upscale
from foveate.data.pictures import samples


def finished(folder: Path) -> int:
    """Pictures that lie complete in a folder."""
    return len(list(folder.glob("*.png")))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pictures", type=int, default=40)
    parser.add_argument("--kills", type=int, default=5)
    parser.add_argument("--method", default="pcsr")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    rng = random.Random(args.seed)

    with tempfile.TemporaryDirectory() as name:
        inputs, outputs = Path(name) / "in", Path(name) / "out"
        inputs.mkdir()
        large = [x for x in samples().values() if min(x.shape[1:]) > 200]
        photographs = [np.uint8(x.permute(1, 2, 0).mul(255).numpy()) for x in large]
        for i in range(args.pictures):
            picture = photographs[i % len(photographs)]
            y, x = rng.randrange(0, picture.shape[0] - 200), rng.randrange(0, picture.shape[1] - 200)
            Image.fromarray(picture[y : y + 160, x : x + 200].squeeze()).save(inputs / f"{i:03}.png")
        command = [sys.executable, "-m", "foveate", "upscale", str(inputs), str(outputs)]
        command += ["--scale", "2", "--method", args.method, "--jobs", "2"]
        for kill in range(args.kills):
            process = subprocess.Popen(command, stderr=subprocess.DEVNULL)
            before, started = finished(outputs), time.monotonic()
            while finished(outputs) == before and process.poll() is None:
                time.sleep(0.05)  # starting takes seconds; what matters is to be killed at work
            time.sleep(rng.uniform(0, 2))
            wait = time.monotonic() - started
            alive = process.poll() is None
            process.send_signal(signal.SIGKILL)
            process.wait()
            state = "running" if alive else "ended"
            print(f"kill {kill + 1} after {wait:.1f} s ({state}): {finished(outputs)} files", flush=True)
        last = subprocess.run(command, capture_output=True, text=True, check=False)
        print(last.stderr.strip().splitlines()[-1], f"(exit code {last.returncode})")
        wrong = 0
        for source in sorted(inputs.iterdir()):
            expected = upscale(np.asarray(Image.open(source)), scale=2, method=args.method).image
            got = np.asarray(Image.open(outputs / source.name))
            wrong += got.shape != expected.shape or int(np.abs(got.astype(int) - expected).max()) > 1
        left = [p.name for p in outputs.iterdir() if p.suffix == ".part"]
        print(f"{args.pictures - wrong} of {args.pictures} pictures right, half-written files left: {len(left)}")
        sys.exit(bool(wrong or left))


if __name__ == "__main__":
    main()
