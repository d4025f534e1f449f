import json

import pytest

from foveate.bench.frontier import Panel, Report, averaged
from foveate.errors import InputError

REPORT = Report(
    "things", "Things", "Text.", {"cost": ("cost (s)", ".1f"), "gain": ("gain", ".2f")}, (Panel("cost", "gain"),)
)


def entry(method, setting, pictures="a", cost=1.0, gain=2.0):
    return {"method": method, "setting": setting, "pictures": pictures, "cost": cost, "gain": gain}


def test_a_second_run_replaces_its_own_entries_alone(tmp_path):
    REPORT.write([entry("one", "x"), entry("one", "y"), entry("two", "x"), entry("one", "x", "b")], tmp_path)
    page = REPORT.write([entry("one", "z", cost=3.0, gain=None)], tmp_path)
    kept = {(e["method"], e["setting"], e["pictures"]) for e in json.loads((tmp_path / "things.json").read_text())}
    assert kept == {("one", "z", "a"), ("two", "x", "a"), ("one", "x", "b")}
    text = page.read_text()
    assert "| one | z | 3.0 |  |" in text
    assert text.index("## a") < text.index("## b")


def test_a_damaged_file_is_refused_and_kept(tmp_path):
    (tmp_path / "things.json").write_text('[{"method": 1}]')
    with pytest.raises(InputError, match="not a list of benchmarks"):
        REPORT.write([entry("one", "x")], tmp_path)
    assert (tmp_path / "things.json").read_text() == '[{"method": 1}]'


def test_averages_need_every_number():
    found = averaged([{"a": 1.0, "b": None}, {"a": 4.0, "b": 2.0}], max)
    assert found == {"a": 4.0, "b": None}


def test_the_figure_leaves_out_what_has_no_number():
    pytest.importorskip("matplotlib")
    drawn = REPORT.figure([entry("one", "x"), entry("two", "x", gain=None)])
    assert drawn.width > drawn.height > 100
