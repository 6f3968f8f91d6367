"""run_all.py keeps its measurements whatever fails, and runs on the CPU like on a GPU."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import readme_table
import run_all
import torch
from gpu import runner, targets
from gpu.runner import NO_TIME, Runner, failures
from gpu.sections import PARTS, SECTIONS, Limits, Section
from helpers.pmf_process import environment

from pmf.bench.device import Cpu
from pmf.bench.harness import Case, Planned, Setting


def test_the_sections_fit_into_the_promised_time():
    assert sum(part.full.section for part in PARTS) < 1800 - 60
    assert sum(part.quick.section for part in PARTS) < 150 - 10


def test_a_run_on_the_cpu(tmp_path: Path):
    done = subprocess.run(
        [sys.executable, str(Path(run_all.__file__)), "--out", str(tmp_path), "--device", "cpu"],
        env=environment(),
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    record = json.loads((tmp_path / "run_all.json").read_text())
    assert record["command"].startswith("python benchmarks/run_all.py --out") and record["scale"] == "tiny"
    rows = {section["name"]: section["rows"] for section in record["sections"]}
    assert list(rows) == [part.name for part in PARTS]
    assert all(row["right"] for row in rows["checks"]) and len(rows["checks"]) > 30
    assert json.loads((tmp_path / "check.json").read_text())["off"] == []
    assert " passed" in rows["op tests"][0]["said"] and (tmp_path / "logs" / "op_tests.txt").exists()
    assert rows["mma sums"][0]["bits"] >= 8 and rows["mma sums"][0]["below"] in ("cut", "rounded")
    left_out = ("machine rates", "racecheck", "plans", *(name for name in rows if name.startswith("ncu")))
    assert all("GPU" in rows[name][0]["skipped"] for name in left_out) and len(left_out) == 5
    (judged,) = (row for row in rows["training step"] if row["ours"])
    assert [target["target"] for target in judged["targets"]] == ["2x the plain port"]
    assert all(row["share_of_copy_rate"] > 0 for row in rows["elementwise"])
    assert all("seconds" in section for section in record["sections"])
    last = done.stdout.rpartition("target\n")[2].splitlines()  # the final table
    assert f"{len(rows['checks'])} of {len(rows['checks'])} right" in done.stdout
    assert any(line.startswith("patch_embed") for line in last)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_says_so(tmp_path: Path, capfd: pytest.CaptureFixture[str]):
    assert run_all.main(["--out", str(tmp_path)]) == 2
    printed = capfd.readouterr()
    assert len(printed.err.splitlines()) == 1 and "no CUDA device" in printed.err
    assert not list(tmp_path.iterdir())


def case(label: str, run, **facts) -> Planned:
    return Planned(label, lambda: Case({"pmf": run, "peer": lambda: None}), facts)


def fail(message: str):
    raise ValueError(message)


def run(*sections: Section) -> dict[str, list[dict]]:
    record: dict = {}
    Runner("cpu", "tiny", record, lambda: None).run(sections)
    assert failures(record) == [
        row for s in record["sections"] for row in s["rows"] if row.get("ours") and "failed" in row
    ]
    return {section["name"]: section["rows"] for section in record["sections"]}


def section(name: str, *cases: Planned, limit: float = 20.0) -> Section:
    return Section(name, lambda setting: iter(cases), Limits(limit, 0), Limits(0, 0))


def test_a_failure_is_a_row_and_the_rest_continues():
    rows = run(
        section(
            "first",
            case("good", lambda: None),
            case("raises", lambda: fail("one\nmore")),
            Planned("cannot be built", lambda: fail("no")),
            case("ends the process", lambda: os._exit(3)),
            case("behind it", lambda: None),
        ),
        section("second", case("last", lambda: None)),
    )
    found = {row["case"]: row for row in rows["first"] if row["ours"]}
    assert list(found) == ["good", "raises", "cannot be built", "ends the process", "behind it"]
    assert found["raises"]["failed"] == "ValueError: one"
    assert found["cannot be built"]["failed"] == "ValueError: no"
    assert found["ends the process"]["failed"] == "the process ended without a message"
    peers = {row["case"]: row for row in rows["first"] if not row["ours"]}
    assert all("median_ms" in found[label] for label in ("good", "behind it"))
    assert "median_ms" in peers["raises"]  # the others of its case are timed
    assert "median_ms" in rows["second"][0]


def test_a_section_ends_at_its_time_limit():
    started = time.monotonic()
    rows = run(
        section("hangs", case("good", lambda: None), case("hangs", lambda: time.sleep(60)), limit=2.0),
        section(
            "slow",
            case("slow", lambda: time.sleep(0.22)),  # eight times
            case("too late", lambda: None),
            limit=2.0,
        ),
        section("next", case("good", lambda: None)),
    )
    assert time.monotonic() - started < 20
    assert rows["hangs"][-1] | {"failed": ""} == {
        "case": "hangs", "contestant": "pmf", "ours": True, "failed": ""
    }  # fmt: skip
    assert "the section's limit" in rows["hangs"][-1]["failed"] and "median_ms" in rows["hangs"][0]
    assert rows["slow"][-1].get("skipped") == NO_TIME or "limit" in rows["slow"][-1]["failed"]
    assert "median_ms" in rows["next"][0]


def test_a_failing_generator_ends_only_its_section():
    def broken(setting):
        yield case("good", lambda: None)
        fail("no more")

    rows = run(Section("broken", broken, Limits(20, 0), Limits(0, 0)), section("next", case("good", len)))
    assert [row["case"] for row in rows["broken"]] == ["good", "good", "between cases"]
    assert rows["next"]


def attention_rows(length: int, **peers: float) -> list[dict]:
    facts = {"op": "attention forward + JVP", "shape": [1, 1, length, 64], "dtype": "bfloat16"}
    ours = {"contestant": "pmf", "ours": True, "median_ms": 1.0, "gflop_per_s": 65.0}
    ours |= {"gbyte_per_s": 8.0, "bytes": 8e6}
    rows = [{**facts, **ours}]
    for name, milliseconds in peers.items():
        right = not name.startswith("wrong")
        name = targets.MATH_JVP if name == "math" else name
        rows.append({**facts, "contestant": name, "ours": False, "median_ms": milliseconds, "right": right})
    return rows


def test_targets_are_judged_by_measurements():
    rates = targets.Rates()
    rates.learn({"op": "copy", "gbyte_per_s": 10.0})
    rates.learn({"op": "gemm", "dtype": "bfloat16", "gflop_per_s": 100.0})
    rows = attention_rows(276, math=6.0, triton=1.9, wrong_peer=1.5)
    targets.add_shares(rows[0], rates)
    assert rows[0]["memory_floor_ms"] == pytest.approx(0.8)
    near, best, math = targets.judge(rows)
    assert near == {"target": "at most 1.4x the memory floor", "found": "1.25x", "met": True}
    assert best["found"] == "1.90x triton" and best["met"] is False  # the faster one is wrong
    assert math["met"] is True
    rows = attention_rows(1024)
    targets.add_shares(rows[0], rates)
    near, best, math = targets.judge(rows)
    assert near == {"target": "at least 60% of the matrix rate", "found": "65%", "met": True}
    assert best["met"] is None and math["met"] is None
    assert targets.judge([{**rows[0], "dtype": "float16"}]) == []


def test_every_row_of_the_readme_is_measured_by_a_full_run():
    setting = Setting(Cpu(), "full")
    planned = [planned for section in SECTIONS for planned in section.cases(setting)]
    for label, facts in readme_table.GPU_ROWS:
        found = [p for p in planned if facts.items() <= p.facts.items()]
        assert len(found) == 1, label


def test_reaching_the_device_is_not_part_of_a_sections_time(monkeypatch: pytest.MonkeyPatch):
    def slow(name: str) -> Cpu:
        time.sleep(1.0)
        return Cpu()

    monkeypatch.setattr(runner, "make_device", slow)  # the process is a fork of this one
    rows = run(section("first", case("good", lambda: None), limit=0.6))
    assert all("median_ms" in row for row in rows["first"])


def test_an_unreachable_device_is_a_row(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(runner, "START_S", 0.2)
    monkeypatch.setattr(runner, "make_device", lambda device: time.sleep(60))
    rows = run(section("first", case("good", lambda: None)))
    assert [row["failed"] for row in rows["first"]] == ["no device after 0 s"]


def test_checks_without_time_are_counted():
    checked = {"op": "check swiglu", "contestant": "pmf", "ours": True}
    rows = [
        {**checked, "case": "a", "error": 0.5, "right": True},
        {**checked, "case": "b", "skipped": NO_TIME},
    ]
    printed = run_all.table({"sections": [{"name": "checks", "rows": rows}]}).splitlines()
    assert printed[1:] == [f"checks         1 of 2 right, 1 not checked: {NO_TIME}"]
