"""The report of benchmarks: one table per operator, slopes, and entries that replace their own kind only."""

import json

import pytest

from foveate.bench.report import growth, page, read_report, write_report
from foveate.errors import InputError


def entry(op="squares", n=10, against="reference", seconds=(2e-3, 1e-3), device="cpu", **changed):
    found = {
        "op": op,
        "pass": "forward",
        "size": f"{n} numbers",
        "n": n,
        "unit": "numbers",
        "against": against,
        "device": device,
        "mode": "full",
        "seconds": list(seconds),
        "speedup": seconds[0] / seconds[1],
        "speedup_range": [1.9, 2.1],
        "peak_bytes": [3_000_000, 1_500_000],
        "memory_ratio": 2.0,
        "apart": 1e-7,
        "environment": {"CPU": "quick one", "threads": 2},
    }
    return {**found, **changed}


def test_the_page_has_a_line_per_entry_and_says_where_it_was_measured():
    text = page([entry(), entry(against="attention", apart=None, peak_bytes=[None, 5], memory_ratio=None)])
    assert (
        "| 10 numbers | forward | reference | 2 | 1 | 2.00x (1.90 to 2.10) | 3 | 1.5 | 2.00x | 1e-07 |\n"
        "| 10 numbers | forward | attention | 2 | 1 | 2.00x (1.90 to 2.10) |  | 5e-06 |  |  |"
    ) in text
    assert text.count("## squares (cpu)") == 1
    assert text.count("Measured on: CPU quick one, threads 2.") == 1


def test_slopes_are_of_log_time_over_log_n():
    entries = [
        entry(n=n, against=way, seconds=(cost(n), 1e-6 * n))
        for n in (10, 100, 1000)
        for way, cost in (("square", lambda n: 3e-7 * n * n), ("flat", lambda n: 1.0))
    ]
    assert growth(entries) == ["Time, forward, n numbers: fast n^1.00, square n^2.00, flat n^0.00"]
    assert growth(entries[:4]) == []


def test_a_new_run_replaces_the_operator_on_its_device_only(tmp_path):
    write_report([entry(), entry(n=20), entry(device="cuda"), entry("cubes")], tmp_path)
    target = write_report([entry(n=30)], tmp_path)
    kept = [(e["op"], e["device"], e["n"]) for e in json.loads((tmp_path / "ops.json").read_text())]
    assert kept == [("cubes", "cpu", 10), ("squares", "cpu", 30), ("squares", "cuda", 10)]
    assert "30 numbers" in target.read_text()
    assert "20 numbers" not in target.read_text()
    assert not list(tmp_path.glob("*.partial"))


def test_a_figure_is_drawn(tmp_path):
    pytest.importorskip("matplotlib")
    text = write_report([entry(n=n) for n in (10, 20)], tmp_path).read_text()
    assert (tmp_path / "ops.png").read_bytes().startswith(b"\x89PNG")
    assert text.endswith("![Time against size](ops.png)\n")


@pytest.mark.parametrize("content", ["{", '[{"op": "squares"}]', '["squares"]'])
def test_a_damaged_file_is_refused(tmp_path, content):
    (tmp_path / "ops.json").write_text(content)
    with pytest.raises(InputError, match=r"ops\.json is not a list of benchmarks .* Delete it"):
        read_report(tmp_path / "ops.json")


def test_a_folder_that_cannot_be_made_is_refused(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="cannot be written"):
        write_report([entry()], tmp_path / "file" / "folder")
