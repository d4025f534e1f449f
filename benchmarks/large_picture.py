"""Memory of a large picture, and that tiling changes nothing.

    python benchmarks/large_picture.py --side 8192 --scale 2

Makes a picture of side x side pixels, upscales it in a process of its own and reports that process's peak memory above
that of importing torch. Then compares tiled and untiled results of a small picture.
"""

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
from PIL import Image

from foveate import upscale
from foveate.data.pictures import samples

CHILD = """
import json, re, sys
import torch
def highest():  # not getrusage, whose figure a process inherits from the one that started it
    return int(re.search(r"VmHWM:\\s+(\\d+)", open("/proc/self/status").read())[1])
base = highest()
import foveate
report = foveate.upscale(sys.argv[1], sys.argv[2], scale=int(sys.argv[3]), budget=float(sys.argv[4])).report
peak = highest()
print(json.dumps({"above torch MB": (peak - base) / 1024, "seconds": report.seconds, "share": report.share,
                  "size": [report.width, report.height]}))
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--side", type=int, default=8192)
    parser.add_argument("--scale", type=int, default=2)
    parser.add_argument("--budget", type=float, default=0.5)
    args = parser.parse_args()

    photograph = np.uint8(samples()["astronaut"].permute(1, 2, 0).mul(255).round().numpy())
    for budget in (1.0, args.budget):
        whole = upscale(photograph, scale=args.scale, budget=budget).image
        for tile in (64, 100):
            tiled = upscale(photograph, scale=args.scale, budget=budget, tile=tile).image
            difference = np.abs(whole.astype(int) - tiled).max()
            print(f"budget {budget:g}, tile {tile}: largest difference {difference}/255", flush=True)

    with tempfile.TemporaryDirectory() as folder:
        source, target = Path(folder) / "large.png", Path(folder) / "larger.png"
        repeats = -(-args.side // len(photograph))
        large = np.tile(photograph, (repeats, repeats, 1))[: args.side, : args.side]
        Image.fromarray(large).save(source, compress_level=1)
        command = [sys.executable, "-c", CHILD, str(source), str(target), str(args.scale), str(args.budget)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        print(json.loads(done.stdout) if done.returncode == 0 else done.stderr)


if __name__ == "__main__":
    main()
