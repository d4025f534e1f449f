"""Adaptive neural images as a codec: levels in one file, bits, budgets, what forged files may not do."""

import copy
from itertools import accumulate, pairwise

import numpy as np
import pytest
import torch

pytest.importorskip("constriction")
from foveate.compress import neural_codes, neural_streams
from foveate.compress.adaptive_neural_images import AdaptiveNeuralImages
from foveate.compress.container import Container
from foveate.compress.fields import Reader
from foveate.compress.gaussian_fit import pace, psnr
from foveate.compress.neural_codes import encode
from foveate.compress.neural_decode import render
from foveate.compress.neural_fit import fit, quantise
from foveate.data import pictures
from foveate.engine.budget import Budget
from foveate.errors import BitstreamError, InputError

CODECS = {
    "coded": AdaptiveNeuralImages(steps=40),
    "plain": AdaptiveNeuralImages(steps=40, entropy=False),
    "siren": AdaptiveNeuralImages("siren", steps=40),
    "depths": AdaptiveNeuralImages(bits=5, shares=(0.5, 0.5001, 1.0), depths=(1, 2, 3), steps=40),
}


@pytest.fixture(scope="module")
def photo():
    return pictures.samples()["astronaut"][None, :, 40:72, 190:230].contiguous()


@pytest.fixture(scope="module")
def files(photo):
    return {name: codec.encode(photo, budget=Budget(1200, "bytes")) for name, codec in CODECS.items()}


@pytest.fixture(params=CODECS)
def name(request):
    return request.param


def test_a_file_gives_back_the_network_bit_for_bit(name, files, photo):
    codec = CODECS[name]
    net = codec._network(photo, 13, torch.Generator().manual_seed(0))
    codes = quantise(net, photo[0], codec.bits)
    sections = codec.pack(net, codes)
    again, present = codec.unpack(Container(codec.slug, 40, 32, 3, sections))
    assert present == len(net.levels) == len(sections) - 1
    assert (again.levels, again.kind, again.top) == (net.levels, net.kind, net.top)
    assert all(torch.equal(a, b) for a, b in zip(again.parameters(), net.parameters(), strict=True))
    assert torch.equal(again.frequencies, net.frequencies)
    for level in range(present):
        assert torch.equal(render(again, 32, 40, level), render(net, 32, 40, level))
    rows = again.hidden.detach().flatten(0, 1)
    assert max(len(row.unique()) for row in rows) <= 2**codec.bits - 1


def test_budgets_are_met_and_used(name, files, photo):
    data = files[name].to_bytes()
    assert 900 < len(data) <= 1200
    assert psnr(CODECS[name].decode(Container.read(data))[0], photo[0]) > 15
    assert CODECS[name].encode(photo, budget=Budget(1200, "bytes")).to_bytes() == data


def test_a_file_cut_off_behind_a_level_is_the_file_of_that_level(name, files):
    codec, container = CODECS[name], files[name]
    data = container.to_bytes()
    lengths = list(accumulate(map(len, container.sections.values())))
    start = len(data) - lengths[-1]
    levels = len(container.sections) - 1
    narrow = [codec.narrowed(container, level) for level in range(levels)]
    for level, own in enumerate(narrow):
        cut = Container.read(data[: start + lengths[level + 1]], allow_prefix=True)
        picture = codec.decode(container, level=level)
        assert torch.equal(codec.decode(cut), picture)
        assert torch.equal(codec.decode(Container.read(own.to_bytes())), picture)
        assert torch.equal(codec.decode(own, level=0), codec.decode(container, level=0))
    for small, large in pairwise([b"".join([*c.sections.values()][1:]) for c in narrow]):
        assert large.startswith(small)
        assert len(large) > len(small)
    assert torch.equal(codec.decode(narrow[-1]), codec.decode(container))
    with pytest.raises(InputError, match="levels 0 to 0"):
        codec.decode(narrow[0], level=1)
    with pytest.raises(InputError, match="level=9"):
        codec.narrowed(container, 9)
    with pytest.raises(BitstreamError, match="without its section 'level-0'"):
        codec.decode(Container.read(data[: start + lengths[1] - 1], allow_prefix=True))


def test_the_rate_is_weights_times_bits(files, photo):
    codec, container = CODECS["plain"], files["plain"]
    net, _ = codec.unpack(container)
    width, count = net.levels[-1][0], sum(n for n, _ in net.levels)
    numbers = 3 * width**2 * 4 + 3 * width * 8 + 3 * count * 8 + 4 * 3 * 8
    steps = 3 * width * 8 + 3 * 8 + 4 * 3 * 8 + 4 * 8
    assert neural_codes.rate(net, 4) == numbers + steps
    payload = 8 * sum(len(data) for name, data in container.sections.items() if name != "head")
    assert 0 <= payload - numbers - steps < 8 * 4
    coded = AdaptiveNeuralImages().pack(
        net, {n: encode(p, neural_codes.bits_of(n, 4)) for n, p in net.named_parameters()}
    )
    assert set(coded) == set(container.sections)


def test_levels_without_a_wider_depth_are_refused():
    for wrong in (
        {"shares": (0.5, 0.25, 1.0)},
        {"shares": (0.5,)},
        {"depths": (3, 2, 3, 3)},
        {"depths": (3, 3)},
        {"depths": 9},
        {"bits": 1},
        {"kind": "relu"},
        {"width": 0},
        {"steps": 0},
    ):
        with pytest.raises(InputError, match="give"):
            AdaptiveNeuralImages(**wrong)


def test_seconds_grey_and_pictures_of_one_pixel(photo):
    codec = AdaptiveNeuralImages()
    grey = codec.encode(photo[:, :1], budget=Budget(300, "ms"))
    assert codec.decode(grey).shape == (1, 1, 32, 40)
    for shape in ((1, 3, 1, 1), (1, 1, 1, 30), (1, 3, 9, 2)):
        container = AdaptiveNeuralImages(steps=4, width=3).encode(torch.rand(shape))
        assert codec.decode(Container.read(container.to_bytes())).shape == shape


def test_a_stop_keeps_what_was_learned_and_progress_ascends(photo):
    seen = []
    whole = AdaptiveNeuralImages(steps=60, width=12)
    whole.encode(photo, progress=lambda share, dB: seen.append((share, dB)) or False)
    shares = [share for share, _ in seen]
    assert shares == sorted(shares)
    assert (len(shares), shares[0]) == (60, 0)
    assert seen[-1][1] > seen[0][1] + 3
    stopped = whole.encode(photo, progress=lambda share, dB: share >= 0.49)
    unlearned = whole.encode(photo, progress=lambda share, dB: True)
    quality = [psnr(whole.decode(c)[0], photo[0]) for c in (unlearned, stopped)]
    assert quality[1] > quality[0] + 0.5


def test_quality_is_reached_by_a_network_hardly_wider_than_needed(photo):
    codec = AdaptiveNeuralImages(steps=10)
    container = codec.encode_to(photo, 16.0)
    rounded = (codec.decode(container) * 255).round() / 255
    assert psnr(rounded[0], photo[0]) >= 16
    width = codec.unpack(container)[0].levels[-1][0]
    assert width < 60


def test_training_with_rounded_weights_beats_rounding_afterwards(photo):
    generator = torch.Generator().manual_seed(0)
    net = AdaptiveNeuralImages(shares=(1.0,))._network(photo, 16, generator)
    fit(net, photo[0], pace(120), generator)
    afterwards = copy.deepcopy(net)
    quantise(afterwards, photo[0], 3)
    fit(net, photo[0], pace(60), generator, bits=3)
    quantise(net, photo[0], 3)
    assert psnr(render(net, 32, 40), photo[0]) > psnr(render(afterwards, 32, 40), photo[0]) + 0.5


def test_a_head_that_promises_more_than_its_bytes_is_refused(files):
    codec, container = CODECS["coded"], files["coded"]
    head = container.sections["head"]
    huge = bytes([0, 1, 4]) + head[3:4] + bytes([1, 0x80, 2, 8, 1])
    with pytest.raises(BitstreamError, match="weights in"):
        codec.decode(container.with_sections(head=huge))
    for place, value in ((0, 2), (1, 7), (2, 12), (-1, 0), (-1, 9), (-1, 200)):
        damaged = bytearray(head)
        damaged[place] = value
        with pytest.raises(BitstreamError):
            codec.decode(container.with_sections(head=bytes(damaged)))


@pytest.mark.parametrize("entropy", [True, False])
def test_streams_give_back_columns_and_refuse_other_lengths(entropy):
    random = np.random.default_rng(0)
    columns = [(random.integers(0, 1 << bits, count), f"{bits}", bits) for bits, count in ((4, 37), (8, 5), (4, 0))]
    writer = neural_streams.Writer(entropy)
    sections = []
    for _ in range(2):
        for column in columns:
            writer.put(*column)
        sections.append(writer.finish())
    source = neural_streams.Source(entropy)
    for section in sections:
        source.begin(Reader(section, "x"), "x")
        for column, name, bits in columns:
            assert np.array_equal(source.get(len(column), name, bits), column)
        source.end()
    if not entropy:
        assert len(sections[0]) == -(-(37 * 4 + 5 * 8) // 8)
    source = neural_streams.Source(entropy)
    source.begin(Reader(sections[0], "x"), "x")
    source.get(3, "4", 4)
    with pytest.raises(BitstreamError):
        source.end()
