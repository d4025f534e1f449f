import math
import subprocess
import sys

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from foveate.engine.budget import UNITS, Budget
from foveate.errors import BudgetError, InputError


@pytest.mark.parametrize(
    ("written", "amount", "unit"),
    [
        (0.5, 0.5, "share"),
        (1, 1.0, "share"),
        (np.float32(0.25), 0.25, "share"),
        ("0.5", 0.5, "share"),
        (" 50 % ", 0.5, "share"),
        ("57%", 0.57, "share"),
        ("20 GFLOPs", 20.0, "gflops"),
        ("500 MFLOPs", 0.5, "gflops"),
        ("1.5tflops", 1500.0, "gflops"),
        ("3 GMACs", 6.0, "gflops"),
        ("35 ms", 35.0, "ms"),
        ("0.2 s", 200.0, "ms"),
        ("1 token", 1.0, "tokens"),
        ("64 tokens", 64.0, "tokens"),
        (".5 bpp", 0.5, "bpp"),
        ("200 kB", 200e3, "bytes"),
        ("200KB", 200e3, "bytes"),
        ("2 KiB", 2048.0, "bytes"),
        ("1e3 bytes", 1000.0, "bytes"),
        ("12 B", 12.0, "bytes"),
        ("1 gaussian", 1.0, "gaussians"),
        ("2000 Gaussians", 2000.0, "gaussians"),
        ("30 s", 30e3, "ms"),
    ],
)
def test_reads_what_people_write(written, amount, unit):
    assert Budget.parse(written) == Budget(amount, unit)


@pytest.mark.parametrize(
    ("written", "message"),
    [
        (0, "above 0"),
        (-0.5, "above 0"),
        (math.nan, "finite"),
        (math.inf, "finite"),
        (50, "did you mean '50%'"),
        ("120%", "at most 1"),
        ("200 kb", "write '200 kB'"),
        ("3 Mb", "write '3 MB'"),
        ("20 horses", "Unknown unit 'horses'"),
        ("half", "Cannot read 'half'"),
        ("", "Cannot read ''"),
        ("nan", "Cannot read 'nan'"),
        (True, "Cannot read True"),
        (None, "Cannot read None"),
        ([0.5], "Cannot read"),
    ],
)
def test_says_what_is_wrong_and_what_to_write(written, message):
    with pytest.raises(BudgetError, match=message):
        Budget.parse(written)


def test_unknown_unit_of_the_type():
    with pytest.raises(BudgetError, match="'watts'"):
        Budget(3, "watts")
    with pytest.raises(BudgetError, match="number"):
        Budget("3", "ms")


def test_parse_returns_a_budget_as_it_is():
    budget = Budget(3, "ms")
    assert Budget.parse(budget) is budget


@settings(deadline=None, max_examples=50)
@given(
    st.sampled_from(UNITS[1:]).flatmap(lambda u: st.tuples(st.floats(1e-9, 1e12), st.just(u)))
    | st.tuples(st.floats(1e-9, 1), st.just("share"))
)
def test_text_round_trip_is_exact(pair):
    budget = Budget(*pair)
    assert Budget.parse(str(budget)) == budget


@settings(deadline=None, max_examples=50)
@given(st.floats(1e-6, 1e6), st.floats(1e-6, 1e6))
def test_share_is_the_clipped_ratio(amount, full):
    assert Budget(amount, "ms").share_of(ms=full, gflops=7) == min(1, amount / full)


def test_share_passes_through_and_unknown_cost_is_named():
    assert Budget(0.3).share_of(gflops=40) == 0.3
    with pytest.raises(BudgetError, match=r"20 GFLOPs.*in ms or in tokens"):
        Budget.parse("20 GFLOPs").share_of(ms=3, tokens=5)
    with pytest.raises(InputError, match="gflops=0"):
        Budget(0.3).share_of(gflops=0)
    with pytest.raises(InputError, match="watts"):
        Budget(0.3).share_of(watts=3)


def test_reading_a_budget_does_not_load_torch():
    code = "import sys, foveate.engine.budget; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
