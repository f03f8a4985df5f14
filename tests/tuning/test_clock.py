"""How long a candidate is measured, on a device whose clock the test holds."""

from __future__ import annotations

import math
from types import SimpleNamespace

import pytest

from spdsl.runtime.tuning import trials


class Device:
    """Calls take the given milliseconds, one after the other, the last one for ever; a write takes 0.05."""

    def __init__(self, *calls: float) -> None:
        self.now, self.calls, self.runs, self.writes = 0.0, list(calls), 0, 0

    def run(self) -> None:
        self.now += self.calls.pop(0) if len(self.calls) > 1 else self.calls[0]
        self.runs += 1

    def zero_(self) -> None:
        self.now += 0.05
        self.writes += 1

    def event(self, enable_timing: bool) -> SimpleNamespace:
        made = SimpleNamespace(at=0.0, synchronize=lambda: None)
        made.record = lambda: setattr(made, "at", self.now)
        made.elapsed_time = lambda end: end.at - made.at
        return made


def measured(device: Device, most: float, monkeypatch: pytest.MonkeyPatch) -> float:
    cuda = SimpleNamespace(Event=device.event, synchronize=lambda: None)
    monkeypatch.setattr(trials, "torch", SimpleNamespace(cuda=cuda, int8=None, empty=lambda *size, **named: device))
    return trials.milliseconds(device.run, most)


def test_the_median_without_the_compilation(monkeypatch: pytest.MonkeyPatch) -> None:
    device = Device(9000.0, 7.0, 1.0, 1.0, 50.0, 1.0)
    assert measured(device, math.inf, monkeypatch) == pytest.approx(1.0)
    assert device.writes >= device.runs - 1


def test_short_calls_end_by_number_and_long_ones_by_time(monkeypatch: pytest.MonkeyPatch) -> None:
    short, long = Device(0.02), Device(400.0)
    measured(short, math.inf, monkeypatch)
    measured(long, math.inf, monkeypatch)
    assert short.runs == 1 + trials._MOST_RUNS
    assert long.runs == 1 + 3


def test_what_is_far_too_slow_is_not_repeated(monkeypatch: pytest.MonkeyPatch) -> None:
    slow, near = Device(400.0), Device(150.0)
    assert measured(slow, 100.0, monkeypatch) == pytest.approx(400.0)
    measured(near, 100.0, monkeypatch)
    assert (slow.runs, near.runs) == (2, 4)
