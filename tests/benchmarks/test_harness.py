"""The harness detects wrong results before timing, and interleaves the contestants."""

import functools
import importlib
import json
import math
import os
import subprocess
import sys
import types
from pathlib import Path

import pytest
import torch
from helpers.pmf_process import environment

from pmf.bench import device
from pmf.bench.device import Cpu, Cuda
from pmf.bench.harness import (
    PEER_SLACK,
    Case,
    DeviceLostError,
    Planned,
    Setting,
    against,
    is_good,
    relative_error,
    run_case,
    write_record,
)

EXACT = torch.ones(4, dtype=torch.float64)


def run(errors: dict[str, float], limit: float = 0.1, **options):
    """Run contestants whose results are off by these amounts."""
    runs = {name: lambda e=e: torch.full((4,), 1 + e) for name, e in errors.items()}
    case = Case(runs, against(runs, EXACT), limit, **options)
    rows = run_case(Planned("a case", lambda: case, {"op": "o"}), Cpu(), 0.0)
    return {row["contestant"]: row for row in rows}


def test_peers_may_round_more_often_than_ours():
    rows = run({"ours": 0.05, "near": 0.1 * PEER_SLACK - 0.01, "far": 0.1 * PEER_SLACK + 0.01})
    assert [row["right"] for row in rows.values()] == [True, True, False]
    assert rows["near"]["time_over_ours"] > 0 and rows["ours"]["op"] == "o"
    assert all(map(is_good, rows.values()))
    assert not is_good(run({"ours": 0.11})["ours"])


def test_our_other_forms_are_no_peers():
    """A default that is wrong beside a right one in another dtype ended with status 0."""
    rows = run({"pmf, bfloat16": 0.05, "pmf, at its default": 0.2, "torch": 0.2})
    assert [row["right"] for row in rows.values()] == [True, False, True]
    assert [is_good(row) for row in rows.values()] == [True, False, True]


def test_nan_is_wrong_and_zero_is_compared_absolutely():
    assert relative_error(EXACT * torch.nan, EXACT) == float("inf")
    assert relative_error(1e-3 * EXACT, 0 * EXACT) == pytest.approx(1e-3)
    assert relative_error((EXACT, 1.5 * EXACT), (EXACT, EXACT)) == pytest.approx(0.5)


def test_a_check_only_case_is_not_timed():
    assert "median_ms" not in run({"ours": 0.0}, timed=False)["ours"]


def test_a_failure_while_timing_does_not_lose_the_others_times():
    calls = []

    def fails_later():
        calls.append(0)
        if len(calls) > 2:
            raise RuntimeError("tired")

    case = Case({"ours": lambda: None, "peer": fails_later})
    ours, peer = run_case(Planned("c", lambda: case), Cpu(), 0.0)
    assert ours["median_ms"] > 0 and is_good(ours)
    assert peer["failed"] == "while timed: RuntimeError: tired" and "median_ms" not in peer


def test_a_lost_device_ends_the_process():
    class Lost(Cpu):
        def settle(self) -> None:
            raise RuntimeError("an illegal memory access was encountered")

    with pytest.raises(DeviceLostError, match="illegal memory access"):
        run_case(Planned("c", lambda: Case({"ours": lambda: None})), Lost(), 0.0)


def test_clocks_are_what_nvidia_smi_says(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    tool = tmp_path / "nvidia-smi"
    tool.write_text(
        f"#!/bin/sh\necho \"$@\" > {tmp_path}/asked\necho '580.1, 1980 MHz, 2619 MHz, 1, 2, 700 W'\n"
    )
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: types.SimpleNamespace(uuid="7-8"))
    gpu = object.__new__(Cuda)
    gpu.device = torch.device("cuda", 1)
    found = gpu.clocks()
    assert found and found["driver_version"] == "580.1" and found["clocks.sm"] == "1980 MHz"
    assert "--id=GPU-7-8" in (tmp_path / "asked").read_text()
    tool.write_text("#!/bin/sh\necho No devices were found\n")
    assert gpu.clocks() is None
    tool.write_text("#!/bin/sh\nexec sleep 60\n")
    monkeypatch.setattr(device, "SMI_SECONDS", 0.2)
    assert gpu.clocks() is None
    tool.write_text("no program")
    assert gpu.clocks() is None


def test_gpu_contestants_are_interleaved_by_do_bench(monkeypatch: pytest.MonkeyPatch):
    asked = []

    def do_bench(run, warmup, rep, return_mode):
        assert return_mode == "all" and warmup < rep < 1000
        asked.append(run())
        return [2.0, 4.0] if run() == "a" else [6.0]

    monkeypatch.setitem(sys.modules, "triton", types.ModuleType("triton"))
    module = types.ModuleType("triton.testing")
    module.do_bench = do_bench
    monkeypatch.setitem(sys.modules, "triton.testing", module)
    times = Cuda.times(object.__new__(Cuda), {"a": lambda: "a", "b": lambda: "b"}, 1.0)
    assert asked == ["a", "b"] * (len(asked) // 2) and len(asked) >= 4
    assert times["a"][:2] == [0.002, 0.004] and times["b"][0] == 0.006


def test_a_record_is_replaced_as_a_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    path = tmp_path / "new" / "record.json"
    write_record(path, {"rows": [1]})

    def ended(self: Path, text: str) -> None:
        self.write_bytes(text[:5].encode())
        raise KeyboardInterrupt

    monkeypatch.setattr(Path, "write_text", ended)
    with pytest.raises(KeyboardInterrupt):
        write_record(path, {"rows": [1, 2]})
    assert json.loads(path.read_bytes()) == {"rows": [1]}


def test_no_contestant_always_follows_the_same_one():
    """What one leaves in memory, the next pays for."""
    ran: list[str] = []
    times = Cpu().times({name: functools.partial(ran.append, name) for name in "abc"}, 0.0, 20)
    assert [len(found) for found in times.values()] == [20, 20, 20]
    assert len(set(zip(ran[3:], ran[4:], strict=False))) > 6


FAULTS = """
import resource, sys, torch
from pmf.bench.device import keep_freed_memory
if sys.argv[1] == "keep":
    keep_freed_memory()
def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    torch.ones(1 << 24)  # 64 MB, which malloc maps anew for every call by default
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
print(min(faults() for _ in range(8)))  # the first two or three extend the heap
"""


def test_freed_memory_is_used_again_without_page_faults():
    def faults(mode: str) -> int:
        command = [sys.executable, "-c", FAULTS, mode]
        done = subprocess.run(command, capture_output=True, text=True, check=True, env=environment())
        return int(done.stdout)

    assert faults("keep") < 100 < faults("default")


@pytest.mark.parametrize(
    ("name", "read", "written"),
    [
        ("patch_velocity", {"forward": 2, "forward + JVP": 4, "backward": 1}, (1, 2, 1)),
        ("gated_residual", {"forward": 2, "forward + JVP": 4, "backward": 2}, (1, 2, 1)),
        ("swiglu", {"forward": 2, "forward + JVP": 4, "backward": 3}, (1, 2, 2)),
    ],
)
def test_an_elementwise_op_is_held_against_a_copy_of_as_many_bytes(
    name: str, read: dict[str, int], written: tuple[int, ...]
):
    """In units of one tensor; what backward neither reads nor writes is not counted."""
    module = importlib.import_module(f"pmf.bench.{name}")
    cases = list(module.cases(Setting(Cpu(), "tiny")))[:3]  # the first dtype
    for planned, (kind, reads), writes in zip(cases, read.items(), written, strict=True):
        unit = 4 * math.prod(planned.facts["shape"])
        case = planned.build()
        assert planned.label.startswith(f"{kind} [")
        assert case.bytes == pytest.approx((reads + writes) * unit, rel=0.06)  # times and a gate are small
        copied = case.contestants["torch clone"]()
        assert 2 * copied.nbytes == pytest.approx(case.bytes, abs=8)
        assert case.error("torch clone") is None and case.error("plain PyTorch") < case.limit
