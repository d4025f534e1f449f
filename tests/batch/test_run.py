import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from foveate.batch.journal import Journal
from foveate.batch.run import run, targets
from foveate.data.files import Partial
from foveate.errors import InputError, NotBuiltError, PictureError

WORK = """
import os, sys, time
from pathlib import Path
from foveate.batch.run import run
from foveate.data.files import Partial

def work(source, target):
    data = source.read_bytes()
    with open(source.parent / "calls.log", "a") as log:
        log.write(f"{source.name} {os.getpid()} {os.environ.get('OMP_NUM_THREADS')}\\n")
    if data == b"die":
        os._exit(9)
    part = Partial(target)
    part.file.write(data[:1].upper())
    part.file.flush()
    time.sleep(0.04)
    part.file.write(data[1:].upper())
    part.commit()
    return {"torch": "torch" in sys.modules}

if __name__ == "__main__":
    source, out = Path(sys.argv[1]), Path(sys.argv[2])
    run([(p, Path(p.name)) for p in sorted(source.glob("*.txt"))], work, out, jobs=2, progress=False)
"""


@pytest.fixture
def folders(tmp_path):
    (tmp_path / "in").mkdir()
    return tmp_path / "in", tmp_path / "out"


@pytest.fixture
def items(folders):
    source, _ = folders
    for i in range(12):
        (source / f"{i:02}.txt").write_text(f"file {i}")
    return [(path, Path(path.name)) for path in sorted(source.glob("*.txt"))]


def upper(source, target):
    data = source.read_bytes()
    if data == b"bad":
        raise PictureError("cannot read this.")
    if data == b"odd":
        raise KeyError("odd")
    target.write_bytes(data.upper())
    return {"bytes": len(data)}


def contents(out):
    return {path.name: path.read_text() for path in out.glob("*.txt")}


EXPECTED = {f"{i:02}.txt": f"FILE {i}" for i in range(12)}


def test_every_file_is_done_once(items, folders):
    _, out = folders
    first = run(items, upper, out, progress=False)
    assert (first.done, first.skipped, first.failed, first.interrupted) == (12, 0, (), False)
    assert contents(out) == EXPECTED
    again = run(items, upper, out, progress=False)
    assert (again.done, again.skipped) == (0, 12)
    (out / "03.txt").unlink()
    items[4][0].write_text("changed")
    assert run(items, upper, out, progress=False).done == 2
    assert run(items, upper, out, progress=False, settings={"scale": 3}).done == 12
    assert run(items, upper, out, progress=False, settings={"scale": 3}, resume=False).done == 12


def test_failures_do_not_stop_the_rest(items, folders):
    _, out = folders
    items[2][0].write_bytes(b"bad")
    items[5][0].write_bytes(b"odd")
    items[7][0].unlink()
    summary = run(items, upper, out, progress=False)
    assert summary.done == 9
    assert [failure.source.name for failure in summary.failed] == ["02.txt", "05.txt", "07.txt"]
    assert summary.failed[0].message == "cannot read this."
    assert summary.failed[1].message == "KeyError: 'odd'"
    assert "FileNotFoundError" in summary.failed[2].message
    with Journal(out, {}) as journal:
        states = [entry.state for entry in journal.entries()]
    assert states.count("failed") == 3
    items[2][0].write_bytes(b"good")
    assert run(items, upper, out, progress=False).done == 1


def test_interrupted_runs_keep_what_is_done(items, folders):
    _, out = folders

    def interrupted(source, target):
        if source.name == "05.txt":
            Partial(target)
            raise KeyboardInterrupt
        return upper(source, target)

    summary = run(items, interrupted, out, progress=False)
    assert summary.interrupted
    assert summary.done == 5
    assert not list(out.glob(".*.part"))
    assert run(items, upper, out, progress=False).skipped == 5
    assert contents(out) == EXPECTED


def test_a_process_that_dies_takes_only_its_own_file(items, folders, monkeypatch):
    source, out = folders
    (source / "worker_that_dies.py").write_text(WORK)
    monkeypatch.syspath_prepend(str(source))
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    from worker_that_dies import work

    items[1][0].write_bytes(b"die")
    summary = run(items[:5], work, out, jobs=2, progress=False)
    assert summary.done == 4
    assert [failure.source.name for failure in summary.failed] == ["01.txt"]
    assert "process died" in summary.failed[0].message
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    calls = [line.split() for line in (source / "calls.log").read_text().splitlines()]
    assert {threads for _, _, threads in calls} == {str(max(1, cores // 2))}
    with Journal(out, {}) as journal:
        assert all(not entry.report["torch"] for entry in journal.entries() if entry.report)


def is_running(pid):
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except FileNotFoundError:
        return False


def wait_until(condition, seconds=20.0):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "waited too long"
        time.sleep(0.01)


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="looks into /proc")
def test_a_killed_run_resumes_with_nothing_lost_or_half_written(items, folders):
    source, out = folders
    script = source / "script.py"
    script.write_text(WORK)
    process = subprocess.Popen([sys.executable, str(script), str(source), str(out)])
    wait_until(lambda: len(list(out.glob("*.txt"))) >= 3)
    process.send_signal(signal.SIGKILL)
    process.wait()
    calls = source / "calls.log"
    workers = {int(line.split()[1]) for line in calls.read_text().splitlines()}
    wait_until(lambda: not any(map(is_running, workers)))
    assert len(list(out.glob("*.txt"))) < 12
    assert all(EXPECTED[name] == text for name, text in contents(out).items())
    with Journal(out, {}) as journal:
        finished = {entry.target for entry in journal.entries() if entry.state == "done"}
    Partial(out / "12.txt").file.close()  # as a kill in the middle of a file leaves it

    redone = []

    def resumed(source, target):
        redone.append(source.name)
        assert not list(out.glob(".*.part"))
        return upper(source, target)

    summary = run(items, resumed, out, progress=False)
    assert summary.failed == ()
    assert summary.skipped == len(finished) >= 1
    assert set(redone) == set(EXPECTED) - finished
    assert contents(out) == EXPECTED
    assert not list(out.glob(".*.part"))


def test_bad_arguments(items, folders):
    _, out = folders
    with pytest.raises(NotBuiltError, match="later version"):
        run(items, upper, out, engine="ray")
    with pytest.raises(InputError, match="'process', 'ray'"):
        run(items, upper, out, engine="threads")
    with pytest.raises(InputError, match="jobs=0"):
        run(items, upper, out, jobs=0)
    with pytest.raises(InputError, match="both become"):
        run([items[0], (items[1][0], items[0][1])], upper, out)
    for outside in (Path("../a.txt"), Path("/a.txt")):
        with pytest.raises(InputError, match="outside"):
            run([(items[0][0], outside)], upper, out)
    assert not out.exists()
    with pytest.raises(InputError, match="output folder"):
        run(items, upper, items[0][0] / "out")


def test_results_keep_the_folders_of_their_sources(items, folders):
    _, out = folders
    run([(items[0][0], Path("a/b/c.txt"))], upper, out, progress=False)
    assert (out / "a/b/c.txt").read_text() == "FILE 0"


def test_targets_stay_apart():
    found = [(Path(name), Path(name)) for name in ("x/a.jpg", "x/a.tif", "y/a.jpg")]
    assert [target.as_posix() for _, target in targets(found, ".png")] == ["x/a_jpg.png", "x/a_tif.png", "y/a.png"]
    assert targets(found) == found
