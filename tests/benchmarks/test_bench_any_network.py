"""The benchmark of third-party networks compares gradients before timing anything."""

import json
import re
import sys

import bench_any_network as bench
import torch

DIT = ["bench_any_network.py", "--quick", "--rounds", "1", "--networks", "dit"]


def test_one_wrong_gradient_is_detected():
    right = torch.tensor(2.0), torch.ones(3), torch.zeros(2)
    assert bench.agreement(right, right) == 0
    assert bench.agreement((right[0], right[1] * 1.01, right[2]), right) > bench.LIMIT
    assert bench.agreement((right[0] * 1.01, *right[1:]), right) > bench.LIMIT


def test_wrong_gradients_end_the_run_before_anything_is_timed(monkeypatch, capsys):
    monkeypatch.setattr(bench.pmf, "Jvp", lambda network: lambda *args: (network(*args[0]), args[0][0]))
    monkeypatch.setattr(sys, "argv", DIT)
    assert bench.main() == 1
    printed = capsys.readouterr()
    assert "nothing was timed" in printed.err and "dit=" not in printed.out


def test_quick_run_ends_with_both_ratios(tmp_path, monkeypatch, capsys):
    out = tmp_path / "record.json"
    monkeypatch.setattr(sys, "argv", [*DIT, "--out", str(out)])
    monkeypatch.setattr(bench, "peak_memory", lambda network, contestant, quick: 1000 + len(contestant))
    assert bench.main() == 0
    assert re.fullmatch(r"dit=\d+\.\d{3},\d\.\d{3}", capsys.readouterr().out.splitlines()[-1])
    rows = json.loads(out.read_text())["rows"]
    assert [row["contestant"] for row in rows] == [
        bench.OURS, bench.FIRST, bench.MATH, bench.TWO_PASSES, bench.PLAIN,
    ]  # fmt: skip
    assert all(row["error"] <= bench.LIMIT and row["median_ms"] > 0 for row in rows)


def test_memory_is_measured_in_a_separate_process():
    assert bench.peak_memory("dit", bench.OURS, quick=True) > 2**23
