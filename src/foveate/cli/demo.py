"""foveate demo: the main job on a real photograph, with pictures to look at."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from PIL import Image


def demo(
    folder: Annotated[Path, typer.Argument(help="Where the pictures go.")] = Path("demo"),
    budget: Annotated[str, typer.Option("--budget", "-b", help="What to spend on the second run.")] = "0.5",
) -> None:
    """Upscale a photograph on all and on half of the compute, and show where the compute went.

    \b
    Examples:
      foveate demo pictures/
      foveate demo --budget 0.7
    """
    from PIL import Image

    from foveate.data import pictures
    from foveate.data.degrade import downscale, mod_crop
    from foveate.meter.quality import psnr_y
    from foveate.restore.upscale import upscale

    folder.mkdir(parents=True, exist_ok=True)
    original = mod_crop(pictures.samples()["chelsea"][None], 4)
    small = downscale(original, 4, rounded=True)
    pictures.save(folder / "small.png", small)
    upscale(small, scale=4)  # the first run in a process also pays for loading

    typer.echo(f"A photograph of {small.shape[3]}x{small.shape[2]} pixels, enlarged 4 times:")
    panels: list[tuple[str, Image.Image]] = []
    with Image.open(folder / "small.png") as opened:
        bicubic = opened.convert("RGB").resize((original.shape[3], original.shape[2]), Image.Resampling.BICUBIC)
    plain = psnr_y(pictures.load(bicubic).window(0, bicubic.height, 0, bicubic.width)[0], original, border=4).item()
    panels.append((f"bicubic, {plain:.2f} dB", bicubic))
    for share in ("1", budget):
        image, report = upscale(small, scale=4, budget=share, map=folder / f"where-{share}.png")
        quality = psnr_y(image, original, border=4).item()
        path = pictures.save(folder / f"enlarged-{share}.png", image)
        typer.echo(f"  budget {share}: {quality:.2f} dB; {report}")
        with Image.open(path) as opened:
            panels.append((f"budget {share}, {quality:.2f} dB", opened.convert("RGB")))
        drawn = report.map
    assert drawn is not None
    panels.append((f"where budget {budget} went", drawn.resize(bicubic.size, Image.Resampling.NEAREST)))
    panels.append(("original", pictures_to_image(original)))
    side_by_side(panels, (130, 40, 290, 200)).save(folder / "compare.png")
    typer.echo(f"The pictures lie in {folder}/; open {folder / 'compare.png'} first.")


def pictures_to_image(x: "object") -> "Image.Image":
    """A tensor [1, 3, H, W] as a Pillow image."""
    import numpy as np
    from PIL import Image

    return Image.fromarray(np.uint8(x[0].permute(1, 2, 0).mul(255).round().numpy()))  # type: ignore[index]


def side_by_side(
    panels: "list[tuple[str, Image.Image]]", box: tuple[int, int, int, int], zoom: int = 2
) -> "Image.Image":
    """Crops of the same box, enlarged without smoothing, each with its caption above."""
    from PIL import Image, ImageDraw, ImageFont

    font = ImageFont.load_default(size=16)
    width, height = zoom * (box[2] - box[0]), zoom * (box[3] - box[1])
    sheet = Image.new("RGB", (len(panels) * (width + 8) - 8, height + 28), "white")
    draw = ImageDraw.Draw(sheet)
    for i, (caption, image) in enumerate(panels):
        crop = image.crop(box).resize((width, height), Image.Resampling.NEAREST)
        sheet.paste(crop, (i * (width + 8), 28))
        draw.text((i * (width + 8) + 4, 4), caption, fill="black", font=font)
    return sheet
