import os
from pathlib import Path

import pytest

from foveate.batch.journal import NAME, Entry, Journal, settings_digest
from foveate.errors import FoveateError, InputError

TARGET = Path("a.png")


@pytest.fixture
def source(tmp_path):
    path = tmp_path / "in.png"
    path.write_bytes(b"source")
    return path


@pytest.fixture
def out(tmp_path):
    folder = tmp_path / "out"
    folder.mkdir()
    return folder


def test_done_needs_the_row_the_file_the_source_and_the_settings(source, out):
    with Journal(out, {"scale": 2}) as journal:
        assert not journal.is_done(source, TARGET)
        journal.plan([(source, TARGET)])
        (out / TARGET).write_bytes(b"result")
        assert not journal.is_done(source, TARGET)  # the file alone proves nothing
        journal.done(TARGET, {"seconds": 1.5})
        assert journal.is_done(source, TARGET)
        assert journal.entries() == [Entry("a.png", "done", None, {"seconds": 1.5})]
    with Journal(out, {"scale": 3}) as journal:
        assert not journal.is_done(source, TARGET)
    with Journal(out, {"scale": 2}) as journal:
        assert journal.is_done(source, TARGET)
        os.utime(source, ns=(1, 1))
        assert not journal.is_done(source, TARGET)


def test_a_removed_result_is_made_again(source, out):
    with Journal(out, {}) as journal:
        journal.plan([(source, TARGET)])
        journal.done(TARGET, {})
        assert not journal.is_done(source, TARGET)


def test_failures_keep_their_reason_and_are_tried_again(source, out):
    with Journal(out, {}) as journal:
        journal.plan([(source, TARGET)])
        journal.failed(TARGET, "no luck")
        assert journal.entries() == [Entry("a.png", "failed", "no luck", None)]
        journal.plan([(source, TARGET)])
        assert journal.entries() == [Entry("a.png", "pending", None, None)]


def test_a_missing_source_is_never_done(out):
    with Journal(out, {}) as journal:
        journal.plan([(Path("no/such.png"), TARGET)])
        assert not journal.is_done(Path("no/such.png"), TARGET)


def test_one_run_per_folder(out):
    with Journal(out, {}), pytest.raises(InputError, match="Another run"):
        Journal(out, {})
    Journal(out, {}).close()


def test_a_file_that_is_no_journal(out):
    (out / NAME).write_bytes(b"this is not a database at all" * 99)
    with pytest.raises(FoveateError, match="remove it"):
        Journal(out, {})


def test_digest_depends_on_values_only():
    assert settings_digest({"a": 1, "b": Path("x")}) == settings_digest({"b": Path("x"), "a": 1})
    assert settings_digest({"a": 1}) != settings_digest({"a": 2})
