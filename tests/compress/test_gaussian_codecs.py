"""GaussianImage and Image-GS as codecs: bits, budgets, sizes, levels, quantisation in the loop."""

import math
from itertools import pairwise

import numpy as np
import pytest
import torch

pytest.importorskip("constriction")
from foveate.compress import gaussian_image, image_gs
from foveate.compress.container import Container
from foveate.compress.gaussian_coding import plan, strongest
from foveate.compress.gaussian_fit import AXES, CHOLESKY, Fit, psnr, run
from foveate.compress.gaussian_image import GaussianImage
from foveate.compress.image_gs import ImageGS, level_ends, widened
from foveate.data import pictures
from foveate.engine.budget import Budget
from foveate.errors import BitstreamError, InputError

CODECS = [GaussianImage, ImageGS]


@pytest.fixture(scope="module")
def photo():
    return pictures.samples()["astronaut"][None, :, 40:104, 190:270].contiguous()


@pytest.fixture(scope="module")
def files(photo):
    budget = Budget(150, "gaussians")
    return {codec: codec(steps=60).encode(photo, budget=budget) for codec in CODECS}


@pytest.mark.parametrize("codec", CODECS)
def test_a_file_gives_back_what_was_quantised(codec, files, photo):
    container = Container.read(files[codec].to_bytes())
    method = codec()
    found = method.unpack(container)
    coded = found if codec is GaussianImage else found[0]
    assert len(coded) == 150
    again = method.pack(coded)
    assert again == dict(container.sections)
    assert psnr(method.decode(container)[0], photo[0]) > 20


@pytest.mark.parametrize("codec", CODECS)
def test_windows_are_cut_from_the_whole_at_any_size(codec, files):
    method, container = codec(), files[codec]
    for size in (None, (160, 128), (37, 29)):
        whole = method.decode(container, size)
        assert whole.shape == (1, 3, *(size[::-1] if size else (64, 80)))
        assert 0 <= whole.min() <= whole.max() <= 1
        part = method.decode(container, size, (5, 3, 20, 17))
        torch.testing.assert_close(part, whole[..., 3:20, 5:25], atol=1e-6 if size else 0, rtol=0)
    large = method.decode(container, (240, 192))
    torch.testing.assert_close(large[..., 1::3, 1::3], method.decode(container), atol=1e-4, rtol=0)


@pytest.mark.parametrize("codec", CODECS)
def test_budgets(codec, photo):
    method = codec(steps=20)
    for limit in (700, 1500):
        container = method.encode(photo, budget=Budget(limit, "bytes"))
        assert 0.85 * limit < len(container.to_bytes()) <= limit
    container = method.encode(photo[:, :1], budget=Budget(300, "ms"))
    assert container.channels == 1
    assert method.decode(container).shape == (1, 1, 64, 80)
    assert len(method.encode(photo, budget=Budget(1, "bytes")).to_bytes()) < 400  # the face says that it is too much


def test_a_plain_file_has_the_bits_of_the_paper(photo):
    method = GaussianImage(steps=8, entropy=False, words=8)
    container = method.encode(photo, budget=Budget(100, "gaussians"))
    assert len(container.sections["gaussians"]) == 100 * 56 / 8
    side = 2 * 8 * 3 * 32 + 6 * 32
    assert 8 * len(container.sections["head"]) == side + 8 * 5
    coded = method.unpack(container)
    compact = GaussianImage(words=8)
    recoded = Container(**{**vars(container), "sections": compact.pack(coded)})
    assert len(recoded.sections["gaussians"]) < 0.95 * len(container.sections["gaussians"])
    assert torch.equal(compact.decode(recoded), method.decode(container))


@pytest.mark.parametrize("codec", CODECS)
def test_one_gaussian_and_one_pixel(codec):
    for image, count in ((torch.rand(1, 3, 9, 7), 1), (torch.full((1, 3, 1, 1), 0.3), 5), (torch.rand(1, 1, 1, 30), 4)):
        container = codec(steps=4).encode(image, budget=Budget(count, "gaussians"))
        assert codec().decode(Container.read(container.to_bytes())).shape == image.shape


def test_half_precision_keys_keep_their_order_and_come_back():
    reals = torch.tensor([-4.0, -1.5, -1e-3, -6e-8, 0.0, -0.0, 6e-8, 0.1, 3.99, 4.0])
    keys = gaussian_image._to_keys(reals)
    assert (np.diff(keys) >= 0).all()
    assert keys.min() == 0
    assert keys.max() == gaussian_image._TOP
    assert torch.equal(gaussian_image._from_keys(keys), reals.half().float())
    every = np.arange(gaussian_image._TOP + 1)
    assert np.array_equal(gaussian_image._to_keys(gaussian_image._from_keys(every)), every)


def test_fitting_under_quantisation_beats_quantising_afterwards(photo):
    target, budget = photo[0], Budget(150, "gaussians")
    fit = Fit(target, CHOLESKY, gaussian_image.MODE, torch.Generator().manual_seed(0))
    run(fit, 150, iter([i / 78 for i in range(78)]), 0.25)
    quantiser = gaussian_image.Quantiser(fit, 6, 2, 8)
    after = psnr(fit.draw(quantiser.settle(fit, False).splats(64, 80)), target)
    method = GaussianImage(steps=120)
    during = psnr(method.decode(method.encode(photo, budget=budget))[0], target)
    assert during > after + 1


def test_colours_are_committed_to_codewords_that_are_learned(photo):
    fit = Fit(photo[0], CHOLESKY, gaussian_image.MODE, torch.Generator().manual_seed(0))
    fit.grow(40, 40, torch.ones(64, 80))
    quantiser = gaussian_image.Quantiser(fit, 6, 2, 8)
    moved = fit.splats._replace(colours=fit.splats.colours + 0.2)
    pulled = quantiser.pull(moved)
    held = quantiser.vq.values(quantiser.vq.codes(moved.colours))
    torch.testing.assert_close(pulled.colours, (moved.colours - held) * 64 * 80 / 40)
    assert not pulled.centres.any()
    assert not pulled.shapes.any()
    before = quantiser.vq.words.clone()
    fit.step(1, quantiser)
    assert not torch.equal(quantiser.vq.words, before)


def test_what_is_drawn_while_fitting_is_what_the_file_holds(photo):
    for form, module in ((CHOLESKY, gaussian_image), (AXES, image_gs)):
        fit = Fit(photo[0], form, module.MODE, torch.Generator().manual_seed(0))
        run(fit, 60, iter([0.0, 0.3, 0.6]), 1.0)
        quantiser = (
            gaussian_image.Quantiser(fit, 6, 2, 8)
            if form is CHOLESKY
            else image_gs.Quantiser(fit, (9, 6, 6, 6), progressive=False)
        )
        drawn, held = fit.draw(quantiser(fit.splats)), fit.draw(quantiser.settle(fit, False).splats(64, 80))
        assert (drawn - held).abs().mean() < 2e-3


def test_a_beginning_of_an_image_gs_file_is_a_coarser_picture(files, photo):
    container = files[ImageGS]
    data, method = container.to_bytes(), ImageGS()
    ends = np.cumsum([len(section) for section in container.sections.values()])
    start = len(data) - ends[-1]
    reached = []
    for level in range(1, image_gs.LEVELS + 1):
        part = Container.read(data[: start + ends[level]], allow_prefix=True)
        coded, total = method.unpack(part)
        assert (len(coded), total) == (level_ends(150)[level - 1], 150)
        reached.append(psnr(method.decode(part)[0], photo[0]))
    assert reached[-1] > reached[2] > reached[0] > 8
    assert reached[-1] > reached[0] + 4
    with pytest.raises(BitstreamError, match="level-0"):
        method.decode(Container.read(data[: start + ends[0]], allow_prefix=True))
    cut = Container.read(files[GaussianImage].to_bytes()[:-1], allow_prefix=True)
    with pytest.raises(BitstreamError, match="gaussians"):
        GaussianImage().decode(cut)


def test_levels_double_and_what_is_missing_is_made_up_for_in_width():
    for total in (1, 2, 5, 64, 1000):
        ends = level_ends(total)
        assert ends[-1] == total
        assert all(a < b <= 2 * a + 1 for a, b in pairwise(ends))
    fit = Fit(torch.rand(3, 8, 8), AXES, "topk", torch.Generator().manual_seed(0))
    fit.grow(4, 4, torch.ones(8, 8))
    wider = widened(fit.splats, 16)
    torch.testing.assert_close(AXES.size(wider.shapes)[0], 2 * AXES.size(fit.splats.shapes)[0])
    assert widened(fit.splats, 4) is fit.splats


def test_content_beats_random_placement_at_equal_bytes(photo):
    budget, reached = Budget(1200, "bytes"), []
    for placement in ("content", "random"):
        method = ImageGS(steps=100, placement=placement)
        reached.append(psnr(method.decode(method.encode(photo, budget=budget))[0], photo[0]))
    assert reached[0] > reached[1] + 0.3


def test_the_published_loss_is_what_it_says():
    g = torch.Generator().manual_seed(0)
    target, drawn = torch.rand(3, 16, 16, generator=g), torch.rand(3, 16, 16, generator=g)
    found = image_gs.published(drawn, target)
    step = 1e-2 * found / found.abs().max()

    def loss(x):
        return (x - target).abs().mean() + 0.1 * (1 - image_gs.ssim(x[None], target[None]).mean())

    assert (loss(drawn) - loss(drawn - step)).item() == pytest.approx((found * step).sum().item(), rel=0.1)
    assert ImageGS(steps=3, loss="published").encode(torch.rand(1, 3, 12, 12, generator=g)).sections


@pytest.mark.parametrize("codec", CODECS)
def test_progress_is_told_and_can_stop(codec, photo):
    seen = []
    codec(steps=20).encode(
        photo, budget=Budget(30, "gaussians"), progress=lambda share, dB: bool(seen.append((share, dB)))
    )
    shares = [share for share, _ in seen]
    assert shares == sorted(shares)
    assert len(shares) == 20
    assert 0.9 < shares[-1] < 1
    assert all(math.isfinite(dB) for _, dB in seen)
    stopped = codec(steps=10**6).encode(photo, budget=Budget(30, "gaussians"), progress=lambda share, dB: True)
    assert codec().decode(stopped).shape == photo.shape


def test_a_plan_reads_budgets():
    assert plan(None, 5000, 40, float).count == 100
    assert plan(Budget(9e9, "gaussians"), 5000, 40, float).count == 5000
    aim = plan(Budget(140, "bytes"), 5000, 40, lambda room: room / 10)
    assert (aim.count, aim.room, aim.seconds) == (10, 100, None)
    assert plan(Budget(2500, "ms"), 5000, 40, float).seconds == 2.5
    assert plan(Budget(3, "bytes"), 5000, 40, float).count == 1


def test_the_strongest_are_large_and_where_colours_add_up_bright():
    fit = Fit(torch.rand(3, 8, 8), CHOLESKY, "cut", torch.Generator().manual_seed(0))
    fit.grow(3, 3, torch.ones(8, 8))
    splats = fit.splats._replace(
        shapes=CHOLESKY.start(torch.tensor([3.0, 1.0, 2.0])), colours=torch.tensor([[0.1] * 3, [1.0] * 3, [1.0] * 3])
    )
    assert strongest(splats, fit, 2).tolist() == [1, 2]
    fit.mode = "topk"
    assert strongest(splats, fit, 2).tolist() == [0, 2]


@pytest.mark.parametrize("codec", CODECS)
def test_forged_numbers_are_refused(codec, files):
    container, method = files[codec], codec()
    head = container.sections["head"]
    for forged in (b"", head[:-1], head + b"\0", b"\xff\xff\x7f" + head[2:], head[:2] + b"\xff" + head[3:]):
        with pytest.raises(BitstreamError):
            method.decode(container.with_sections(head=forged))
    name = list(container.sections)[1]
    with pytest.raises(BitstreamError):
        method.decode(container.with_sections(**{name: container.sections[name] * 3}))


@pytest.mark.parametrize(
    ("codec", "settings"),
    [
        (GaussianImage, {"words": 12}),
        (GaussianImage, {"bits": 9}),
        (GaussianImage, {"steps": 0}),
        (ImageGS, {"loss": "L9"}),
        (ImageGS, {"placement": "corner"}),
        (ImageGS, {"bits": (5, 6, 6, 6)}),
    ],
)
def test_settings_out_of_range_are_refused(codec, settings):
    with pytest.raises(InputError, match="give"):
        codec(**settings)
