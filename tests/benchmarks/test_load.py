"""Processor time used by other programs is detected, and the process's own is not counted."""

import os
import subprocess
import sys
import time

import pytest

from pmf.bench import load


@pytest.fixture
def clocks(monkeypatch: pytest.MonkeyPatch):
    """Two readings of (now, busy, own) seconds."""

    def use(*readings):
        values = iter(readings)
        monkeypatch.setattr(load, "_clocks", lambda: next(values))
        monkeypatch.setattr(os, "cpu_count", lambda: 2)

    return use


def test_share_is_of_all_processors(clocks):
    clocks((10.0, 100.0, 5.0), (20.0, 118.0, 21.0))
    with load.OtherLoad() as others:
        pass
    assert others.share == pytest.approx((18 - 16) / (10 * 2))
    assert others.sentence().endswith("10.0% of the processor during this run: do not trust these times.")


def test_clock_rounding_is_not_load(clocks):
    clocks((10.0, 100.0, 5.0), (20.0, 115.0, 21.0))
    with load.OtherLoad() as others:
        pass
    assert others.share == 0.0
    assert others.sentence() == "Other programs used 0.0% of the processor during this run."


def test_a_system_without_the_information(monkeypatch, tmp_path):
    monkeypatch.setattr(load, "STAT", tmp_path / "absent")
    with load.OtherLoad() as others:
        pass
    assert others.share is None and "unknown" in others.sentence()


def test_another_process_is_detected():
    if not load.STAT.exists():
        pytest.skip("needs /proc/stat")
    before = load._clocks()
    busy = subprocess.Popen([sys.executable, "-c", "while True: pass"])
    try:
        time.sleep(0.5)
        after = load._clocks()
    finally:
        busy.kill()
        busy.wait()
    assert after[1] - before[1] > after[2] - before[2]  # busy, but not by this process
