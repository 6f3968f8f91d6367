"""The parts of run_all.py that are separate programs, and the probes that need a GPU."""

import re
import shutil
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import gpu_model
import machine_rates
import pytest
import torch
from gpu import capture, commands, sums
from gpu.commands import Command, Limit, Run, last_line
from gpu.model.library import demangled, host_functions
from gpu.runner import Runner
from helpers import emulator
from helpers.levels import EMULATED, at_level, float32_on_a_gpu_last
from helpers.machine_code import absent, tool

from pmf import _library
from pmf.bench.device import Cpu
from pmf.bench.harness import Setting

LIMIT = Limit(20.0)


def run(folder: Path, *parts: Command) -> dict[str, list[dict[str, Any]]]:
    record: dict[str, Any] = {}
    Runner("cpu", "tiny", record, lambda: None, folder).run(parts)
    return {section["name"]: section["rows"] for section in record["sections"]}


def program(name: str, code: str, limit: Limit = LIMIT, **more: Any) -> Command:
    return Command(name, lambda _: [sys.executable, "-u", "-c", code], limit, limit, **more)


def test_a_programs_output_is_kept_however_it_ends(tmp_path: Path) -> None:
    started = time.monotonic()
    rows = run(
        tmp_path,
        program("good", "print('one'); print('42 passed')"),
        program("bad", "print('half'); raise SystemExit(3)"),
        program("hangs", "import time; print('begun'); time.sleep(60)", Limit(1.0)),
        Command("not here", lambda _: "no such tool is on PATH", LIMIT, LIMIT),
        program("last", "print('after all')"),
    )
    assert time.monotonic() - started < 30
    assert rows["good"][0]["said"] == "42 passed" and rows["good"][0]["right"]
    assert rows["bad"][0]["failed"] == "status 3: half"
    assert rows["hangs"][0]["skipped"] == "it ran out of time; begun"
    assert rows["not here"][0]["skipped"] == "no such tool is on PATH"
    assert rows["last"][0]["said"] == "after all"
    assert (tmp_path / "logs" / "good.txt").read_text() == "one\n42 passed\n"


@pytest.mark.parametrize("status", [0, 1])
def test_a_profiler_that_may_not_profile_is_skipped(status: int, tmp_path: Path) -> None:
    """ncu ends with 0 if no kernel has the name, and with 1 if the user may not read the counters."""
    kept = tmp_path / "kept.ncu-rep"
    code = f"print('no permission'); raise SystemExit({status})"
    (row,) = run(tmp_path, program("ncu", code, leaves=lambda _: kept))["ncu"]
    assert row["skipped"] == "it left no kept.ncu-rep: no permission"
    kept.write_text("")
    (row,) = run(tmp_path, program("ncu", code, leaves=lambda _: kept))["ncu"]
    assert "skipped" not in row and ("failed" in row) == (status == 1)


def test_children_of_a_program_end_with_it(tmp_path: Path) -> None:
    code = "import subprocess, sys, time\np = subprocess.Popen(['sleep', '50'])\nprint(p.pid)\ntime.sleep(50)"
    run(tmp_path, program("family", code, Limit(2.0)))
    pid = int(last_line(tmp_path / "logs" / "family.txt"))
    time.sleep(0.2)
    status = Path(f"/proc/{pid}/stat")
    assert not status.exists() or status.read_text().split()[2] == "Z"


@pytest.mark.parametrize("status", [0, 1, None])
def test_rows_of_a_check(status: int | None, tmp_path: Path) -> None:
    """From a record with a case that has NaN, from a missing one, and from one that ran out of time."""
    place = {"family": "swiglu", "case": "swiglu 2x3 float32", "dtype": "float32", "place": "avx2"}
    record = {
        "places": [{"rows": [{**place, "errors": {"forward": 0.5, "jvp": None if status == 1 else 0.7}}]}]
    }
    told = Run("cpu", "tiny", tmp_path)
    missing = commands.check_rows(told, status)
    assert (status == 0) == (not any("failed" in row for row in missing))
    import json

    commands.check_record(told).write_text(json.dumps({**record, "off": ["x"] if status == 1 else []}))
    rows = commands.check_rows(told, status)
    assert rows[0]["op"] == "check swiglu"
    assert (rows[0]["failed"] == "results with inf or NaN") if status == 1 else rows[0]["right"]
    assert ("failed" in rows[-1]) == (status != 0)


@pytest.mark.parametrize(
    "words", [commands.race_words, commands.profile_words("2x2x70x64"), commands.rates_words]
)
def test_tools_missing_from_path_are_skipped_by_name(
    words: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shutil, "which", lambda name: None)
    assert "is not on PATH" in words(Run("cuda", "full", tmp_path))
    monkeypatch.setattr(shutil, "which", lambda name: f"/opt/{name}")
    line = words(Run("cuda", "full", tmp_path))
    assert all(Path(word).exists() for word in line if word.endswith(".py"))


def test_the_call_that_a_profiler_watches() -> None:
    script = Path(commands.__file__).with_name("one_call.py")
    words = [sys.executable, str(script), "1x2x5x8", "--backward", "--device", "cpu"]
    done = subprocess.run(words, capture_output=True, text=True, check=False)
    assert done.returncode == 0 and done.stdout == "attention_jvp of 1x2x5x8: 3 calls\n"


@pytest.mark.parametrize("kernels", gpu_model.KERNELS)
def test_ncu_finds_the_kernel_of_either_gpu(kernels: str) -> None:
    """By its name without namespaces and template arguments, as ncu compares it."""
    plans = _library.introspection()
    if plans is None or not plans.build_facts()["has_cuda"]:
        absent("this build of pmf has no CUDA kernels")
    problem = next(each for each in gpu_model.PROBLEMS if each.name == "jvp_276x64")
    (launch,) = gpu_model.planned(plans, problem, kernels)
    name = demangled(host_functions(Path(_library.LIBRARY))[launch["kernel"]])
    assert re.fullmatch(commands.PROFILED, name.partition("<")[0])


def test_the_op_tests_on_a_gpu_end_with_float32() -> None:
    def item(**params: Any) -> SimpleNamespace:
        return SimpleNamespace(callspec=SimpleNamespace(params=params))

    first = item(level="cuda", dtype=torch.float32)
    others = [
        item(level="avx2", dtype=torch.float32), SimpleNamespace(),
        item(level="cuda", dtype=torch.bfloat16), item(level="cuda"),
    ]  # fmt: skip
    items = [first, *others]
    float32_on_a_gpu_last(items)
    assert items == [*others, first]


# ---- probes


@pytest.mark.skipif(not EMULATED, reason="needs the emulator")
@pytest.mark.parametrize("bits", [10, 13, 22, 24, 25])
def test_the_probe_finds_how_many_bits_a_tensor_core_keeps(bits: int) -> None:
    with at_level("emulated"), emulator.tensor_cores(bits, 1):
        found = sums.surviving_bits(torch.device("cpu"))
        assert found == bits and sums.is_cut(torch.device("cpu"), found)


def test_no_graph_is_captured_on_a_cpu() -> None:
    assert list(capture.cases(Setting(Cpu(), "tiny"))) == []


def test_rates_need_a_gpu(monkeypatch: pytest.MonkeyPatch, capsys: Any, tmp_path: Path) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert machine_rates.main(["--out", str(tmp_path / "rates.json")]) == 2
    assert capsys.readouterr().err == "torch finds no CUDA device: rates are measured on a GPU\n"
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    assert machine_rates.main(["--out", str(tmp_path / "rates.json"), "--device", "1"]) == 2
    assert capsys.readouterr().err.startswith("--device 1 does not exist")
    monkeypatch.setattr(shutil, "which", lambda name: None)
    assert machine_rates.main(["--out", str(tmp_path / "rates.json")]) == 2
    assert capsys.readouterr().err.startswith("nvcc is not on PATH")


def test_measured_rates_replace_the_assumed_ones() -> None:
    assumed = {"what": "of an H100", "hmma_cycles": 6.4, "launch_cycles": 700}
    measured = {"what": "measured on a card", "hmma_cycles": 8.1, "clock_hz": 1.9e9}
    table = machine_rates.merged(measured, assumed)
    assert table == {
        "what": "measured on a card; still assumed: launch_cycles",
        "hmma_cycles": 8.1,
        "launch_cycles": 700,
        "clock_hz": 1.9e9,
    }


PROBED = {"Mma": "HMMA", "Ldmatrix": "LDSM", "Exp2": "MUFU.EX2", "Fma": "FFMA"}


@pytest.mark.skipif(tool("nvcc") is None, reason="needs nvcc")
@pytest.mark.parametrize("capability", [(8, 0), (9, 0)])
def test_the_probes_machine_code_contains_the_measured_instructions(
    capability: tuple[int, int], tmp_path: Path
) -> None:
    """A compiler that optimised the loops away would leave nothing to measure."""
    nvcc, cuobjdump = tool("nvcc"), tool("cuobjdump")
    if nvcc is None or cuobjdump is None:
        pytest.skip("needs cuobjdump")
    cubin = tmp_path / "rates.cubin"
    subprocess.run([*machine_rates.build_command(nvcc, capability, cubin), "-cubin"], check=True)
    done = subprocess.run([cuobjdump, "-sass", str(cubin)], capture_output=True, text=True, check=True)
    kernels = dict(part.split("\n", 1) for part in done.stdout.split("Function : ")[1:])
    counts = {
        (instruction, chains): code.count(f" {instruction}")
        for name, code in kernels.items()
        for kind, instruction in (
            ("Mma", "HMMA"),
            ("Ldmatrix", "LDSM"),
            ("Exp2", "MUFU.EX2"),
            ("Fma", "FFMA"),
        )
        for chains in (1, 8)
        if f"{kind}ELi{chains}E" in name or f"{len(kind)}{kind}Li{chains}E" in name
    }
    assert counts == {(name, chains): 4 * chains for name in PROBED.values() for chains in (1, 8)}
    has_wgmma = any("HGMMA" in code for code in kernels.values())
    assert has_wgmma == (capability == (9, 0))
    # Products that are issued between two readings of the clock, none of which is waited for.
    issued = {
        int(count.group(1)): code.split("CS2R")[1]
        for name, code in kernels.items()
        if (count := re.search(r"issueILi(\d+)E", name))
    }
    assert len(issued) == (24 if has_wgmma else 0)
    assert all(code.count("HGMMA") == count and "DEPBAR" not in code for count, code in issued.items())
