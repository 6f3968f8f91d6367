"""`pmf check`: it passes if everything is correct; planted faults are named and spoil no other case."""

import contextlib
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.levels import CPU_LEVELS, EMULATED, at_level
from helpers.pmf_process import environment

from pmf import checked, kernels, ops
from pmf.check import report, work
from pmf.check.cases import prepare
from pmf.check.table import FAMILIES, SIZES, cases, checks
from pmf.check.tolerance import relative_error
from pmf.cli import main

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)
    kernels.choose("auto")


def test_every_op_is_a_family() -> None:
    public = {name.removesuffix("_jvp") for name in ops.__all__}
    assert public | {"ema", "muon", "product"} == set(FAMILIES)
    assert set(kernels.NAMES) | {"attention_varlen"} == set(FAMILIES)


@pytest.mark.parametrize("shape", [(3,), (2, 1), (1, 2, 3)])
def test_a_result_of_another_shape_is_wrong(shape: tuple[int, ...]) -> None:
    """Its difference from the right one may broadcast."""
    assert relative_error(torch.ones(2, 3), torch.ones(2, 3).double()) == 0
    assert relative_error(torch.ones(shape), torch.ones(2, 3).double()) == float("inf")


@pytest.mark.parametrize("size", SIZES)
def test_labels_are_unique(size: str) -> None:
    labels = [check.label for check in checks(size)]
    assert len(labels) == len(set(labels))
    dtypes = {family: {c.dtype for c in checks(size, (family,))} for family in FAMILIES}
    assert all(len(found) == 4 for family, found in dtypes.items() if family not in ("ema", "product"))


@pytest.mark.parametrize("level", [*CPU_LEVELS, *EMULATED, "reference"])
def test_everything_passes(level: str) -> None:
    if level == "reference":
        kernels.choose("reference")
    with contextlib.nullcontext() if level == "reference" else at_level(level):
        errors = {check.label: check.prepare(CPU)() for check in checks("tiny")}
    wrong = {label: found for label, found in errors.items() if max(found.values()) > 1}
    assert not wrong
    directions = {what for found in errors.values() for what in found}
    assert {"forward", "jvp", "backward", "backward of jvp", "jvp of first samples"} <= directions


@pytest.mark.parametrize("family", sorted({case.name for case in cases("tiny")}))
@pytest.mark.parametrize("half", ["value", "tangent"])
def test_an_output_off_by_two_roundings_exceeds_the_limit(
    family: str, half: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The limits are near what rounding costs: no room for a kernel that rounds twice as much."""
    case = next(case for case in cases("tiny") if case.name == family)
    measure = prepare(case, torch.bfloat16, CPU)
    assert max(measure().values()) <= 1
    name = family + "_jvp"
    right = getattr(ops, name)

    def wrong(*args: Any, **options: Any) -> Any:
        found = list(right(*args, **options))
        n = len(found) // 2
        off = range(n) if half == "value" else range(n, len(found))
        noise = torch.Generator().manual_seed(0)
        for i in off:
            found[i] = found[i] * (
                1 + 2**-7 * torch.randn(found[i].shape, generator=noise).to(found[i].dtype)
            )
        return tuple(found)

    monkeypatch.setattr(ops, name, wrong)
    assert measure()["jvp"] > 1


# ---- the command


PLANT = """
import os, signal, time, torch, pmf
library = torch.library.Library("pmf", "IMPL")
def plant(op, wrong):
    compiled = torch.library.get_kernel("pmf::" + op, "CPU")
    def call(keys, *args):
        return wrong(lambda *given: compiled.call_boxed(keys, *given), *args)
    library.impl(op, call, "CPU", with_keyset=True, allow_override=True)
{body}
"""


@pytest.fixture
def planted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Register a wrong kernel in the processes of a check."""

    def plant(body: str) -> None:
        folder = tmp_path / "site"
        folder.mkdir()
        (folder / "sitecustomize.py").write_text(PLANT.format(body=body))
        paths = environment()["PYTHONPATH"]
        monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(folder), paths]))

    return plant


def check(*words: str, out: Path) -> tuple[int, dict[str, Any]]:
    status = main(["check", "--quick", "--device", "cpu", "--out", str(out), *words])
    return status, json.loads(out.read_text())


def test_the_command_passes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    status, record = check(out=tmp_path / "new" / "check.json")
    printed = capsys.readouterr()
    assert status == 0 and printed.err == "" and record["off"] == []
    (place,) = record["places"]
    assert place["right"] and place["columns"][: len(CPU_LEVELS)] == list(CPU_LEVELS)
    lines = printed.out.splitlines()
    assert [line.split()[0] for line in lines[2:-1]] == list(FAMILIES)
    assert lines[-1].startswith(f"correct on {', '.join(CPU_LEVELS)}")
    found = {(row["family"], row["place"], row["dtype"]) for row in place["rows"]}
    assert {("attention", level, "bfloat16") for level in CPU_LEVELS} <= found


def test_references_pass_and_are_reported_as_such(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("PMF_KERNELS", "reference")
    kernels.choose("reference")
    status, record = check("swiglu", "newton_schulz", out=tmp_path / "check.json")
    assert status == 0 and record["kernels"] == "PMF_KERNELS: references for all"
    assert {row["family"] for row in record["places"][0]["rows"]} == {"swiglu", "newton_schulz"}


@pytest.mark.parametrize("level", [CPU_LEVELS[0], CPU_LEVELS[-1]])
def test_a_wrong_kernel_is_named(
    level: str, planted: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    planted(
        f"""
def wrong(right, grad, gate, up):
    grads = right(grad, gate, up)
    return grads if torch.ops.pmf.cpu_level("") != {level!r} else (grads[0] * 1.01, grads[1])
plant("swiglu_backward", wrong)
"""
    )
    status, record = check("swiglu", "rms_norm", out=tmp_path / "check.json")
    printed = capsys.readouterr()
    assert status == 1
    (sentence,) = printed.err.splitlines()
    assert sentence.startswith(f"off: swiglu is wrong on {level}") and "the backward" in sentence
    assert "PMF_KERNELS=reference:swiglu" in sentence and sentence == f"off: {record['off'][0]}"
    assert "correct on" not in printed.out and "WRONG" in printed.out
    named = sentence.partition(": the")[0].removeprefix("off: swiglu is wrong on ").split(", ")
    assert named == [level] or (named[0] == level and named[1].endswith(" threads"))


def test_a_wrong_op_passes_without_its_kernel(
    planted: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    planted("plant('swiglu', lambda right, gate, up: right(gate, up) * 2)")
    assert check("swiglu", out=tmp_path / "a.json")[0] == 1
    monkeypatch.setenv("PMF_KERNELS", "reference:swiglu")
    assert check("swiglu", out=tmp_path / "b.json")[0] == 0


def test_a_crashing_kernel_spoils_one_case(
    planted: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    planted(
        """
def wrong(right, x, weight, eps):
    if x.dtype == torch.float16:
        os.kill(os.getpid(), signal.SIGSEGV)
    return right(x, weight, eps)
plant("rms_norm", wrong)
"""
    )
    status, record = check("rms_norm", "swiglu", out=tmp_path / "check.json")
    (sentence,) = capsys.readouterr().err.splitlines()
    assert status == 1 and sentence.startswith("off: rms_norm is wrong on portable: rms_norm 2x20x32 float16")
    assert "ended by SIGSEGV" in sentence
    rows = record["places"][0]["rows"]
    assert {row["dtype"] for row in rows if row["family"] == "rms_norm" and "errors" in row} >= {"float64"}
    assert "float16" in {row["dtype"] for row in rows if "failed" in row}
    assert any(row["family"] == "swiglu" for row in rows)


def test_a_hanging_kernel_spoils_one_case(
    planted: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    planted(
        "plant('rms_norm', lambda right, x, *rest: "
        "x.dtype == torch.float16 and time.sleep(60) or right(x, *rest))"
    )
    monkeypatch.setattr(report, "CASE_S", 4.0)
    status, record = check("rms_norm", out=tmp_path / "check.json")
    assert status == 1 and "no answer within 4 s" in capsys.readouterr().err
    assert {row["dtype"] for row in record["places"][0]["rows"] if "errors" in row} >= {"float32", "float64"}


def test_a_process_that_cannot_start_is_one_sentence(
    planted: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    planted("os._exit(7)")
    status, record = check(out=tmp_path / "check.json")
    assert status == 1 and record["places"][0]["rows"] == []
    assert capsys.readouterr().err == (
        "off: cpu was not checked to the end: its process did not start: the process ended with status 7\n"
    )


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["swish"], "there is no op 'swish' to check: choose from attention, "),
        (["--device", "tpu"], "--device tpu does not exist; available: "),
        (["--out", "."], "--out . is a folder: name a file"),
        (["--out", f"{__file__}/a.json"], f"--out {__file__}/a.json cannot be written: "),
    ],
)
def test_invalid_arguments(words: list[str], sentence: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["check", *words]) == 2
    assert capsys.readouterr().err.startswith(f"error: {sentence}")


# ---- GPUs, as far as one can go without


class Gpu:
    """An imaginary GPU that answers what `work` asks."""

    def __init__(
        self, monkeypatch: pytest.MonkeyPatch, free: int = 60 << 30, capability: Any = (9, 0)
    ) -> None:
        answers = {
            "set_device": None,
            "get_device_name": "Test Card",
            "mem_get_info": (free, 80 << 30),
            "get_device_capability": capability,
            "device_count": 1,
            "synchronize": None,
            "empty_cache": None,
        }
        for name, answer in answers.items():
            monkeypatch.setattr(torch.cuda, name, lambda *_, answer=answer: answer)
        monkeypatch.setattr(checked, "_reminded", set())


@pytest.mark.parametrize(
    ("gpu", "sentence"),
    [
        (
            {"free": 300 << 20},
            "Test Card has only 0.3 of 80 GiB free, but a check needs 4 GiB: run it again",
        ),
        ({"capability": (7, 5)}, "Test Card is older than sm_80"),
    ],
)
def test_a_gpu_that_cannot_be_checked(gpu: Any, sentence: str, monkeypatch: pytest.MonkeyPatch) -> None:
    Gpu(monkeypatch, **gpu)
    with pytest.raises(work._NothingToCheckError) as problem:
        work._gpu("cuda:0")
    assert str(problem.value).startswith(sentence)


def test_a_gpu_held_by_another_program(monkeypatch: pytest.MonkeyPatch) -> None:
    Gpu(monkeypatch)

    def busy(*_: Any) -> None:
        raise RuntimeError("CUDA error: all CUDA-capable devices are busy or unavailable\nmore")

    monkeypatch.setattr(torch.cuda, "mem_get_info", busy)
    with pytest.raises(work._NothingToCheckError, match="cannot be used now .*busy or unavailable.$"):
        work._gpu("cuda:0")


def a_check(measure: Any) -> Any:
    return checks("tiny", ("swiglu",))[0]._replace(prepare=lambda device: measure)


@pytest.mark.parametrize(
    "problem",
    [
        torch.cuda.OutOfMemoryError("CUDA out of memory. Tried to allocate"),
        RuntimeError("CUDA error: out of memory"),
        RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
        RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried to"),
        MemoryError(),
    ],
    ids=lambda problem: str(problem)[:24],
)
def test_running_out_of_memory_is_unchecked_not_wrong(
    problem: Exception, monkeypatch: pytest.MonkeyPatch
) -> None:
    Gpu(monkeypatch)

    def measure() -> None:
        raise problem

    (row,) = work._rows(a_check(measure), torch.device("cuda", 0), {"Test Card": lambda: None})
    assert row["not_checked"] == "memory ran out" and "failed" not in row
    place = report._Place("cuda:0", "tiny", ("swiglu",))
    place.columns, place.rows = ["Test Card"], [row]
    (sentence,) = place.off()
    assert sentence.startswith(
        "swiglu on cuda:0, Test Card could not be checked to the end, as memory ran out"
    )
    assert place._cell("swiglu", "Test Card") == "not checked"
    wrong = {"family": "swiglu", "case": "swiglu 2x3", "place": "Test Card", "errors": {"jvp": 2.0}}
    place.rows = [row, wrong]
    assert place._cell("swiglu", "Test Card") == "WRONG 2.00" and len(place.off()) == 2


def test_a_fatal_device_fault_ends_its_process(monkeypatch: pytest.MonkeyPatch) -> None:
    Gpu(monkeypatch)

    def fault(*_: Any) -> None:
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    monkeypatch.setattr(torch.cuda, "synchronize", fault)
    (row,) = work._rows(a_check(fault), torch.device("cuda", 0), {"Test Card": lambda: None})
    assert row["lost"] and "illegal memory access" in row["failed"]


def test_a_result_with_nan_is_wrong_and_the_record_is_json() -> None:
    place = report._Place("cuda:0", "tiny", ("swiglu",))
    place.columns = ["Test Card"]
    row = {"family": "swiglu", "case": "swiglu 2x3", "place": "Test Card"}
    place.rows = [{**row, "errors": {"forward": 0.5, "jvp": float("inf")}}]
    (found,) = json.loads(json.dumps(place.record(), allow_nan=False))["rows"]
    assert found["errors"] == {"forward": 0.5, "jvp": None}
    assert "the jvp of swiglu 2x3 is inf times its limit" in place.off()[0]


@pytest.mark.parametrize("found", ["right", "wrong", "part", "references"])
def test_which_checks_record_a_gpu(found: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A pass of all kernels is recorded; a wrong one removes the record; a partial check changes nothing."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    families = ("swiglu",) if found == "part" else ()
    place = report._Place("cuda:0", "tiny", families)
    place.columns = ["Test Card"]
    error = 3.0 if found == "wrong" else 0.5
    place.rows = [
        {"family": c.family, "case": c.label, "place": "Test Card", "errors": {"forward": error}}
        for c in place.checks
    ]
    if found == "references":
        kernels.choose("reference:ema")
    if found == "wrong":
        checked.mark("Test Card", True)
    report._mark([place], families)
    assert (checked.passed_on("Test Card") is not None) == (found == "right")
