import threading

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from foveate.ops import use
from foveate.ops.threads import each, in_parts


def parts(length, threads, **least):
    """The (start, stop) pairs that in_parts calls for when PyTorch uses a number of threads."""
    seen = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch, "get_num_threads", lambda: threads)
        in_parts(lambda start, stop: seen.append((start, stop)), length, **least)
    return sorted(seen)


@given(st.integers(1, 5000), st.integers(1, 9), st.integers(1, 2000))
@settings(deadline=None, max_examples=50)
def test_every_index_is_in_exactly_one_part(length, threads, least):
    found = parts(length, threads, least=least)
    assert [i for start, stop in found for i in range(start, stop)] == list(range(length))
    sizes = [stop - start for start, stop in found]
    assert len(sizes) == max(1, min(threads, length // least))
    assert max(sizes) - min(sizes) <= 1
    assert len(sizes) == 1 or min(sizes) >= least


def test_nothing_is_one_empty_part():
    assert parts(0, 4) == [(0, 0)]


def test_little_work_stays_in_one_part():
    assert parts(2047, 4) == [(0, 2047)]
    assert parts(2048, 4) == [(0, 1024), (1024, 2048)]


def test_parts_run_at_once(monkeypatch):
    monkeypatch.setattr(torch, "get_num_threads", lambda: 3)
    meeting = threading.Barrier(3, timeout=60)  # breaks unless all three parts are there together
    in_parts(lambda start, stop: meeting.wait(), 3, least=1)
    assert not meeting.broken


def test_one_part_runs_where_it_was_called(monkeypatch):
    monkeypatch.setattr(torch, "get_num_threads", lambda: 1)
    names = []
    in_parts(lambda start, stop: names.append(threading.current_thread()), 10, least=1)
    assert names == [threading.current_thread()]


@pytest.mark.parametrize("threads", [1, 3])
def test_an_error_in_a_part_reaches_the_caller(monkeypatch, threads):
    def broken(start, stop):
        if stop == 9:
            raise ZeroDivisionError("part")

    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    with pytest.raises(ZeroDivisionError, match="part"):
        in_parts(broken, 9, least=1)
    in_parts(lambda start, stop: None, 9, least=1)  # and the threads still serve


@pytest.fixture
def three_threads():
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    yield
    torch.set_num_threads(before)


def test_chunks_run_at_once_on_threads_of_one_core(three_threads):
    meeting = threading.Barrier(3, timeout=60)
    cores, modes = [], []

    def note(chunk):
        meeting.wait()
        cores.append(torch.get_num_threads())
        modes.append(torch.is_inference_mode_enabled())

    with torch.inference_mode():
        each(note, range(3))
    assert cores == [1, 1, 1]
    assert modes == [True, True, True]
    assert torch.get_num_threads() == 3
    started = []
    later = threading.Thread(target=lambda: started.append(torch.get_num_threads()))
    later.start()
    later.join()
    assert started == [3]  # other threads of the process are left alone


@given(st.integers(0, 20))
@settings(deadline=None, max_examples=20)
def test_every_chunk_is_met_once(count):
    seen = []
    with torch.no_grad():
        each(seen.append, range(count))
    assert sorted(seen) == list(range(count))


def test_gradients_and_the_reference_stay_in_the_calling_thread(three_threads):
    def where(run):
        seen = []
        run(lambda chunk: seen.append(threading.current_thread()))
        return set(seen)

    here = {threading.current_thread()}
    assert where(lambda note: each(note, range(4))) == here
    with torch.no_grad(), use("reference"):
        assert where(lambda note: each(note, range(4))) == here
    with torch.no_grad():
        assert where(lambda note: each(note, range(1))) == here
        assert here.isdisjoint(where(lambda note: each(note, range(4))))


def test_an_error_in_a_chunk_reaches_the_caller(three_threads):
    def broken(chunk):
        if chunk == 2:
            raise ZeroDivisionError("chunk")

    with torch.no_grad(), pytest.raises(ZeroDivisionError, match="chunk"):
        each(broken, range(4))
