"""Train the networks of the codec shallow-ntc.

    python recipes/shallow_ntc.py --data pictures/          # bsds300, sunhays80 and kodak12 lie in pictures/

One network for six rates: a rate is drawn for every crop, and only gains tell the rates apart. Analysis and synthesis
begin as a block transform, the principal components of 16x16 patches; training makes the blocks overlap, and adds what
is not linear. Where the checkpoint exists, training goes on from it.
"""

import argparse
import json
import math
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from foveate.compress import latent_contexts
from foveate.compress.entropy import Ints
from foveate.compress.hyperprior import OCTAVE, SMALLEST, TOP
from foveate.compress.transform_coder import LATENTS, RATES, TransformCoder, price, save, small
from foveate.compress.transforms import FACTOR, JpegLike, start_at_basis
from foveate.engine.fit import fit
from foveate.learn.crops import Crops
from foveate.meter.cost import count_parameters
from foveate.weights import FOLDER

SCALE = 4.2  # latents to coefficients of an orthonormal basis: about one step at the middle rate


def begin(network: TransformCoder, crops: Crops, batches: int) -> None:
    """Start as a block transform whose latents have the scales that they have."""
    patches = torch.cat(
        [F.unfold(crops(64, 64)[1] - 0.5, FACTOR, stride=FACTOR).mT.flatten(0, 1) for _ in range(batches)]
    )
    basis = torch.linalg.eigh(patches.T @ patches)[1].flip(1)[:, :LATENTS].T
    start_at_basis(network.analysis, network.synthesis, basis.reshape(-1, 3, FACTOR, FACTOR), SCALE)
    describe(network, crops)


def describe(network: TransformCoder, crops: Crops) -> None:
    """Start the hyperprior at the scales that latents have, and its side latents at scales that survive rounding."""
    with torch.no_grad():
        y = network.analysis(crops(32, 128)[1] - 0.5)
        spread = y.transpose(0, 1).flatten(1).std(1).clamp(min=1e-6)
        first, last = network.prior.down[-1], network.prior.up[-1]
        first.weight.mul_(3 / network.prior.down(y).std())
        last.weight.mul_(0.3)
        last.bias[:LATENTS] = 0
        last.bias[LATENTS:] = OCTAVE * (spread / SMALLEST).log2()


def lagrangian(network: TransformCoder, x: Tensor, rate: Tensor) -> Tensor:
    """Mean of bits per pixel + lambda * squared error in levels of 255, rates weighed about equally."""
    decoded, coded = network(x, rate)
    rates = (coded.bits + coded.side_bits) / x[0, 0].numel()
    costs = rates + price(rate) * 255**2 * (decoded - x).square().mean((1, 2, 3))
    return (costs * 2 ** (-0.4 * rate)).mean()


def linear_twin(network: TransformCoder, crops: Crops, steps: int, side: int) -> JpegLike:
    """A JPEG-like synthesis for the same latents: the two layers in one, cut to its kernel, then fitted."""
    twin, two = JpegLike(LATENTS), network.synthesis
    with torch.no_grad():
        inner = two.skip.weight + two.gdn.beta.abs()[:, None, None] * two.base.weight
        whole = F.conv_transpose2d(inner, two.out.weight, stride=2)  # from 5 pixels before the block on
        kernel = twin.up.kernel_size[0]
        twin.up.weight.copy_(whole[..., 4 : 4 + kernel, 4 : 4 + kernel])
        twin.up.bias.copy_(two(torch.zeros(1, LATENTS, 2, 2))[0, :, 16, 16])
    network.eval().requires_grad_(False)

    def loss(step: int) -> Tensor:
        x = crops(4, side)[1]
        with torch.no_grad():
            latents = network.prior(network.analysis(x - 0.5), (RATES - 1) * torch.rand(len(x))).latents
        return 255**2 * F.mse_loss(twin(latents) + 0.5, x)

    fit(twin, loss, steps, lr=2e-4, average=0.99)
    return twin.eval()


def contexts(network: TransformCoder, crops: Crops, batches: int) -> Ints:
    """How often each context of the coder meets each symbol, over all rates."""
    found, side = np.zeros((latent_contexts.COUNT, 2 * latent_contexts.REACH + 2), np.int64), 192
    for _ in range(batches):
        x, rate = crops(2, side)[1], (RATES - 1) * torch.rand(2)
        with torch.no_grad():
            a, b = network.prior.at(rate)
            y = network.analysis(x - 0.5)
            k_z = (network.prior.down(y) * torch.exp2(b)).round()
            mean, index = network.prior.describe(k_z * torch.exp2(-b))
            k = ((y - mean) * torch.exp2(a)).round().long().numpy()
            numbers = (index + OCTAVE * a).round().clamp(0, TOP).long().numpy()
        for symbols, number in zip(k, numbers, strict=True):
            found += latent_contexts.count(symbols, number)
    return found


def scores(network: TransformCoder, pictures: list[Tensor]) -> dict[str, float]:
    """Bits per pixel and PSNR of pictures not trained on, by plain rounding, estimated."""
    network.eval()
    result = {}
    for rate in range(RATES):
        bpp, dB = [], []
        for x in pictures:
            with torch.no_grad():
                decoded, coded = network(x, torch.tensor([float(rate)]))
            bpp.append(float(coded.bits + coded.side_bits) / x[0, 0].numel())
            dB.append(-10 * math.log10(float((decoded.clamp(0, 1) - x).square().mean())))
        result |= {f"bpp at {rate}": sum(bpp) / len(bpp), f"dB at {rate}": sum(dB) / len(dB)}
    network.train()
    return {name: round(value, 4) for name, value in result.items()}


def read(folder: Path, side: int) -> list[Tensor]:
    """The middles of pictures."""
    found = []
    for file in sorted(folder.glob("*.png")):
        x = torch.from_numpy(np.array(Image.open(file).convert("RGB"))).permute(2, 0, 1)[None].float() / 255
        y, z = ((n - side) // 2 for n in x.shape[2:])
        found.append(x[..., y : y + side, z : z + side])
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--work", type=Path, default=Path("work"), help="where the checkpoint lies")
    parser.add_argument("--steps", type=int, default=7_250)
    parser.add_argument("--batch", type=int, default=6)
    parser.add_argument("--side", type=int, default=128)
    parser.add_argument("--out", type=Path, default=FOLDER)
    parser.add_argument("--lr", type=float, default=6e-4)
    args = parser.parse_args()
    torch.manual_seed(0)
    crops = Crops([args.data / name for name in ("bsds300", "sunhays80")], 1)
    network = small().train()
    begin(network, crops, 40)
    print(json.dumps({part: count_parameters(m) for part, m in network.named_children()}))
    held_out = read(args.data / "kodak12", 256)
    print(json.dumps(scores(network, held_out)))

    def loss(step: int) -> Tensor:
        return lagrangian(network, crops(args.batch, args.side)[1], (RATES - 1) * torch.rand(args.batch))

    figures = fit(
        network,
        loss,
        args.steps,
        lr=args.lr,
        checkpoint=args.work / "shallow-ntc.safetensors",
        every=250,
        evaluate=lambda model: scores(model, held_out[::3]),
    )

    twin = linear_twin(network, crops, args.steps // 15, args.side)
    card = {
        "data": f"bsds300 and sunhays80, crops of {args.side}x{args.side}",
        "recipe": f"recipes/shallow_ntc.py, {args.steps} steps of {args.batch} crops, learning rate {args.lr:g}",
        "parameters": {part: count_parameters(m) for part, m in network.named_children()},
        **{name: figures[name] for name in ("steps", "seconds")},
        "scores": {
            "two-layer, kodak12": scores(network, held_out),
            "linear, kodak12": scores(TransformCoder(network.analysis, twin, network.prior), held_out),
            "of": "middles of 256x256 by rounding, bits estimated under Gaussians without contexts",
        },
    }
    save(network, twin, contexts(network, crops, 200), card, args.out)


if __name__ == "__main__":
    main()
