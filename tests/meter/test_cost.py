import statistics
import threading

import pytest
import torch
from torch import nn

from foveate.errors import InputError
from foveate.meter import Measurement, cost, count_parameters, measure, peak_memory, stored_bytes, time_call

MEGABYTE = 1 << 20


def test_parameters_are_counted_once_and_by_trainability():
    net = nn.Sequential(nn.Linear(3, 2), nn.Linear(2, 3))
    net[1].requires_grad_(False)
    net.append(net[0])
    assert count_parameters(net) == 8 + 9
    assert count_parameters(net, trainable=True) == 8
    assert count_parameters(net, trainable=False) == 9


def test_time_is_the_clock_around_the_call(monkeypatch):
    ticks = iter([10.0, 10.25])
    monkeypatch.setattr(cost.time, "perf_counter", lambda: next(ticks))
    assert time_call(lambda: None) == 0.25


@pytest.mark.skipif(cost._resident() is None, reason="this system does not tell a process its resident memory")
def test_memory_of_a_call_is_seen_each_time():
    def at_once() -> torch.Tensor:
        return torch.ones(32 * MEGABYTE // 4)

    def in_pieces() -> None:
        [torch.ones(MEGABYTE // 64) for _ in range(16 * 32)]

    for fn in (at_once, in_pieces, in_pieces, at_once):  # what the allocator kept from one must not hide the next
        assert peak_memory(fn) == pytest.approx(32 * MEGABYTE, rel=0.2)
    assert peak_memory(lambda: None) < MEGABYTE


def test_memory_needed_in_passing_is_sampled(monkeypatch):
    level, sampled = 4 * MEGABYTE, threading.Event()

    def resident() -> int:
        sampled.set()
        return level

    def passing() -> None:
        nonlocal level
        level = 9 * MEGABYTE
        for _ in range(2):  # a sample under way when the level rose may still have read the old one
            sampled.clear()
            assert sampled.wait(10)
        level = 6 * MEGABYTE

    monkeypatch.setattr(cost, "_resident", resident)
    monkeypatch.setattr(cost, "_record_resident", lambda: 100 * MEGABYTE)
    assert peak_memory(passing) == 5 * MEGABYTE


def test_without_proc_the_record_is_a_lower_bound(monkeypatch):
    records = iter([5 * MEGABYTE, 7 * MEGABYTE])
    monkeypatch.setattr(cost, "_resident", lambda: None)
    monkeypatch.setattr(cost, "_record_resident", lambda: next(records))
    assert peak_memory(lambda: None) == 2 * MEGABYTE
    monkeypatch.setattr(cost, "_record_resident", lambda: None)
    assert peak_memory(lambda: None) is None


def test_a_new_record_counts_even_when_no_sample_caught_it(monkeypatch):
    records = iter([5 * MEGABYTE, 9 * MEGABYTE])
    monkeypatch.setattr(cost, "_resident", lambda: 4 * MEGABYTE)
    monkeypatch.setattr(cost, "_record_resident", lambda: next(records))
    assert peak_memory(lambda: None) == 5 * MEGABYTE


def test_measure_runs_as_often_as_it_says_and_takes_the_median(monkeypatch):
    calls: list[tuple[int, int]] = []
    times = iter([5.0, 1.0, 2.0])
    monkeypatch.setattr(cost, "time_call", lambda fn: (fn(), next(times))[1])
    monkeypatch.setattr(cost, "energy_counters", list)

    def product(n: int, width: int = 1) -> torch.Tensor:
        calls.append((n, width))
        return torch.rand(n, n) @ torch.rand(n, width)

    found = measure(product, 4, width=2, repeats=3, warmup=2)
    assert calls == [(4, 2)] * (3 + 2 + 2)
    assert found.seconds == statistics.median([5.0, 1.0, 2.0])
    assert found.flops == 2 * 4 * 4 * 2
    assert found.energy_joules is None
    assert found.energy_from == ()


def test_energy_is_summed_over_counters_that_moved_and_shared_among_runs(monkeypatch):
    readings = {"package-0": iter([9.0, 1.0]), "package-1": iter([1.0, 3.0]), "gpu-0": iter([4.0, 4.0])}
    counters = [
        cost.EnergyCounter("package-0", lambda: next(readings["package-0"]), wraps_at=10.0),
        cost.EnergyCounter("package-1", lambda: next(readings["package-1"])),
        cost.EnergyCounter("gpu-0", lambda: next(readings["gpu-0"])),
    ]
    monkeypatch.setattr(cost, "energy_counters", lambda: counters)
    found = measure(lambda: None, repeats=2)
    assert isinstance(found, Measurement)
    assert found.energy_joules == pytest.approx((2.0 + 2.0) / 2)
    assert found.energy_from == ("package-0", "package-1")


def test_packages_are_read_from_powercap_and_their_parts_are_not(tmp_path):
    for zone, joules in (("intel-rapl:0", 2_500_000), ("intel-rapl:0:0", 1_000_000), ("intel-rapl:1", None)):
        folder = tmp_path / zone
        folder.mkdir()
        (folder / "name").write_text("package-0\n")
        (folder / "max_energy_range_uj").write_text("262143328850\n")
        if joules is not None:
            (folder / "energy_uj").write_text(f"{joules}\n")
    (counter,) = cost.energy_counters(tmp_path)
    assert (counter.name, counter.read(), counter.wraps_at) == ("package-0", 2.5, pytest.approx(262143.32885))
    assert cost.energy_counters(tmp_path / "absent") == []


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: count_parameters([]), "list"),
        (lambda: measure(None), "got None"),
        (lambda: measure(len, repeats=0), "0 runs"),
        (lambda: measure(len, warmup=-1), "-1 warm-ups"),
    ],
)
def test_errors_quote_what_was_passed(call, words):
    with pytest.raises(InputError, match=words):
        call()


def test_stored_bytes_are_those_that_backward_needs() -> None:
    linear, x = nn.Linear(8, 3), torch.rand(5, 8)
    assert stored_bytes(linear, x) == 4 * x.numel()
    assert stored_bytes(nn.ReLU(), x) == 4 * x.numel()
    assert stored_bytes(nn.Sequential(linear, nn.ReLU()), x) == 4 * (x.numel() + 15)
    assert stored_bytes(nn.Identity(), x) == 0
