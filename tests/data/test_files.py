import errno
import os

import pytest

from foveate.data.files import Partial, check_target, list_pictures, natural_key, remove_partials
from foveate.errors import PictureError


def touch(folder, *names):
    for name in names:
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"x")


def test_folders_are_listed_recursively_in_natural_order(tmp_path):
    touch(tmp_path, "img10.png", "img9.PNG", "sub/a.jpg", "notes.txt", ".hidden.png", ".git/b.png", "out/old.png")
    found = list_pictures(tmp_path, skip=tmp_path / "out")
    assert [relative.as_posix() for _, relative in found] == ["img9.PNG", "img10.png", "sub/a.jpg"]
    assert all(file == tmp_path / relative for file, relative in found)


def test_named_files_are_kept_whatever_they_are(tmp_path):
    paths = [tmp_path / "missing.png", tmp_path / "odd.xyz"]
    assert [relative.name for _, relative in list_pictures(paths)] == ["missing.png", "odd.xyz"]


def test_natural_key_handles_names_that_start_with_either():
    assert sorted(["b", "2a", "10", "a1", "a"], key=natural_key) == ["2a", "10", "a", "a1", "b"]


def test_a_partial_becomes_the_target_only_at_commit(tmp_path):
    target = tmp_path / "a.png"
    target.write_bytes(b"old")
    part = Partial(target)
    part.file.write(b"new")
    assert target.read_bytes() == b"old"
    part.commit()
    assert target.read_bytes() == b"new"
    assert os.listdir(tmp_path) == ["a.png"]


def test_a_discarded_partial_leaves_the_old_file(tmp_path):
    target = tmp_path / "a.png"
    target.write_bytes(b"old")
    part = Partial(target)
    part.discard()
    part.discard()
    assert os.listdir(tmp_path) == ["a.png"]
    assert target.read_bytes() == b"old"


def test_a_full_disk_leaves_nothing(tmp_path, monkeypatch):
    def full(_):
        raise OSError(errno.ENOSPC, "No space left on device")

    part = Partial(tmp_path / "a.png")
    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(PictureError, match="the disk is full"):
        part.commit()
    assert os.listdir(tmp_path) == []


def test_remove_partials_removes_only_those(tmp_path):
    (tmp_path / "sub").mkdir()
    part = Partial(tmp_path / "sub" / "a.png")
    part.file.close()
    touch(tmp_path, "b.part", "c.png")
    assert remove_partials(tmp_path) == 1
    assert sorted(os.listdir(tmp_path)) == ["b.part", "c.png", "sub"]
    assert os.listdir(tmp_path / "sub") == []


@pytest.mark.parametrize(
    ("target", "reason"),
    [("a.xyz", "extension"), ("a", "extension"), ("no/a.png", "no folder"), (".", "is a folder"), ("in.png", "being")],
)
def test_bad_targets(tmp_path, target, reason):
    touch(tmp_path, "in.png")
    with pytest.raises(PictureError, match=reason):
        check_target(tmp_path / target, tmp_path / "in.png")


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() == 0, reason="root may write anywhere")
def test_no_permission(tmp_path):
    tmp_path.chmod(0o500)
    with pytest.raises(PictureError, match="no permission"):
        Partial(tmp_path / "a.png")
