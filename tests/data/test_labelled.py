"""Small pictures with classes: what is read, and what is drawn from it."""

import io
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from foveate.data.labelled import Labelled, read_archive, read_folder, standardised
from foveate.errors import InputError, PictureError


def archive(file: Path, count: int, **more: np.ndarray) -> None:
    """A set of even pictures, sorted by class as CIFAR-10 is kept: class k has the grey 20 k."""
    labels = np.sort(np.arange(count) % 10).astype(np.uint8)
    streams = []
    for label in labels:
        stream = io.BytesIO()
        Image.new("RGB", (32, 32), (int(20 * label),) * 3).save(stream, "JPEG")
        streams.append(stream.getvalue())
    offsets = np.cumsum([0, *map(len, streams)])
    np.savez(file, bytes=np.frombuffer(b"".join(streams), np.uint8), offsets=offsets, labels=labels, **more)


def coordinates(count: int = 3, height: int = 6, width: int = 7) -> Labelled:
    """Pictures whose channels are their number, row and column."""
    i, y, x = torch.meshgrid(torch.arange(count), torch.arange(height), torch.arange(width), indexing="ij")
    return Labelled(torch.stack([i, y, x], 3).byte(), torch.arange(count), tuple("abc"[:count]))


def test_an_archive_sorted_by_class_is_read_evenly(tmp_path: Path) -> None:
    archive(tmp_path / "set.npz", 40)
    part = read_archive(tmp_path / "set.npz", 20)
    assert part.pictures.shape == (20, 32, 32, 3)
    assert part.pictures.dtype == torch.uint8
    assert sorted(set(part.labels.tolist())) == list(range(10))
    assert part.classes == tuple(map(str, range(10)))
    means = part.pictures.float().mean((1, 2, 3))
    torch.testing.assert_close(means, 20.0 * part.labels, atol=2, rtol=0)
    seen: list[int] = []
    whole = read_archive(tmp_path / "set.npz", track=lambda items: (seen.append(i) or i for i in items))
    assert len(whole) == len(seen) == 40
    assert torch.equal(whole.spread(5).labels, torch.tensor([0, 2, 4, 7, 9]))
    assert len(whole.spread(100)) == 40


def test_names_of_classes_come_from_the_archive(tmp_path: Path) -> None:
    archive(tmp_path / "set.npz", 20, classes=np.array([f"thing {k}" for k in range(10)]))
    assert read_archive(tmp_path / "set.npz").classes[3] == "thing 3"


def test_what_is_no_archive_is_refused(tmp_path: Path) -> None:
    np.savez(tmp_path / "other.npz", pictures=np.zeros(3))
    (tmp_path / "text.npz").write_text("no archive")
    for name in ("other.npz", "text.npz", "missing.npz"):
        with pytest.raises(InputError, match=f"{name}.*is no archive"):
            read_archive(tmp_path / name)


def test_a_folder_of_classes_is_read(tmp_path: Path) -> None:
    for name, grey in (("tulip 10", 200), ("tulip 9", 100), (".hidden", 0)):
        (tmp_path / name).mkdir()
        for i in range(2):
            picture = Image.new("RGB" if i else "L", (40, 20), (grey,) * 3 if i else grey)
            picture.paste(0 if picture.mode == "L" else (0, 0, 0), (0, 0, 10, 20))  # beyond the middle square
            picture.save(tmp_path / name / f"{i}.png")
        (tmp_path / name / "notes.txt").write_text("")
    found = read_folder(tmp_path, 8)
    assert found.classes == ("tulip 9", "tulip 10")
    assert found.labels.tolist() == [0, 0, 1, 1]
    assert found.pictures.shape == (4, 8, 8, 3)
    assert torch.equal(found.pictures.flatten(1), torch.tensor([[100], [100], [200], [200]]).byte().expand(4, 192))
    (tmp_path / "tulip 9" / "0.png").write_bytes(b"broken")
    with pytest.raises(PictureError, match=r"0\.png"):
        read_folder(tmp_path, 8)


def test_folders_that_hold_no_classes_are_refused(tmp_path: Path) -> None:
    (tmp_path / "one").mkdir()
    with pytest.raises(InputError, match="found 1 folders"):
        read_folder(tmp_path, 8)
    (tmp_path / "two").mkdir()
    Image.new("L", (9, 9)).save(tmp_path / "two" / "a.png")
    with pytest.raises(InputError, match="two or more folders of pictures"):
        read_folder(tmp_path, 8)


@given(st.integers(0, 5), st.integers(0, 1000))
@settings(deadline=None, max_examples=30)
def test_a_drawn_picture_is_shifted_mirrored_and_goes_on_as_its_mirror_image(shift: int, seed: int) -> None:
    known = coordinates()
    x, labels = known.draws(seed, shift)(8)
    assert x.shape == (8, 3, 6, 7)
    number, rows, columns = ((x + 2) * 63.75).round().long().unbind(1)
    assert torch.equal(number, labels[:, None, None].expand(8, 6, 7))
    assert torch.equal(rows, rows[:, :, :1].expand_as(rows))
    assert torch.equal(columns, columns[:, :1].expand_as(columns))
    for found, size in ((rows[:, :, 0], 6), (columns[:, 0], 7)):
        mirror = [*range(size), *range(size - 2, 0, -1)] * 3
        windows = [mirror[i : i + size] for i in range(len(mirror) - size)]
        near = [
            [abs(n) if n < size else 2 * (size - 1) - n for n in range(d, d + size)] for d in range(-shift, shift + 1)
        ]
        for line in found.tolist():
            assert line in windows
            assert line in near or line[::-1] in near


def test_all_shifts_and_both_directions_are_drawn_and_a_seed_repeats_them() -> None:
    known = coordinates()
    x, labels = known.draws(0, 2)(600)
    again, _ = known.draws(0, 2)(600)
    assert torch.equal(x, again)
    first = ((x + 2) * 63.75).round().long()
    assert len(set(map(tuple, first[:, 1, :, 0].tolist()))) == 5
    assert len(set(map(tuple, first[:, 2, 0].tolist()))) == 10
    assert set(labels.tolist()) == {0, 1, 2}
    plain, _ = known.draws(1)(100)
    columns = ((plain + 2) * 63.75).round().long()[:, 2, 0].tolist()
    assert {tuple(line) for line in columns} == {tuple(range(7)), tuple(range(6, -1, -1))}
    with pytest.raises(InputError, match="got 6"):
        known.draws(0, 6)


def test_batches_are_the_whole_set_in_order_in_channels_last_memory() -> None:
    known = coordinates()
    parts = list(known.batches(2))
    assert [len(labels) for _, labels in parts] == [2, 1]
    assert torch.equal(torch.cat([x for x, _ in parts]), standardised(known.pictures))
    assert parts[0][0].is_contiguous(memory_format=torch.channels_last)
    ends = standardised(torch.tensor([0, 255]).byte().view(2, 1, 1, 1))
    assert ends.flatten().tolist() == pytest.approx([-2, 2])
