"""Tuned plans: which compete, how a table affects launchers, and which tables are rejected."""

import json
import warnings
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import tune
from helpers.levels import EMULATED, at_level
from tune import Limits, Problem, competitors, launched, signature

from pmf import _library, plans
from pmf.plans import Plan

# On a 9.0 the forward pass would use the Hopper kernels, which have one plan each.
LARGE, A100 = Limits(227 * 1024, 228 * 1024, 132, (10, 0)), Limits(163 * 1024, 164 * 1024, 4, (8, 0))
PROBLEMS = [Problem(276, 64, "bfloat16", *kind) for kind in tune.PASSES.values()]
NAMES = list(tune.PASSES)
PLAN = PROBLEMS[0].plan("forward", 0, 4, 3)
module = _library.introspection()

pytestmark = pytest.mark.skipif(
    module is None or not module.build_facts()["has_cuda"], reason="this build has no CUDA kernels"
)


@pytest.fixture(autouse=True)
def no_plans_left() -> Iterator[None]:
    yield
    plans.use(-1, [])


def all_competitors(problem: Problem, limits: Limits) -> list[Plan]:
    return [plan for launch in problem.launches for plan in competitors(problem, launch, limits)]


@pytest.mark.parametrize("problem", PROBLEMS, ids=NAMES)
def test_several_plans_compete_and_all_fit(problem: Problem) -> None:
    model = launched(problem, LARGE, [])
    for place, launch in enumerate(problem.launches):
        found = list(competitors(problem, launch, LARGE))
        assert len(found) >= 3
        signatures = {signature(launched(problem, LARGE, [plan])[place]) for plan in found}
        assert len(signatures) == len(found) and signature(model[place]) not in signatures
        for plan in found:
            one = launched(problem, LARGE, [plan])[place]
            assert one["threads"] == 32 * plan.warps and one["shared_bytes"] <= LARGE.shared_per_block


def test_plans_compete_in_kernels_warps_and_slots() -> None:
    found = [plan for problem in PROBLEMS for plan in all_competitors(problem, LARGE)]
    for axis in ("kernel", "warps", "slots"):
        assert len({getattr(plan, axis) for plan in found}) > 1, axis


@pytest.mark.parametrize("problem", PROBLEMS, ids=NAMES)
def test_a_table_affects_only_its_own_problem(problem: Problem) -> None:
    plan = all_competitors(problem, LARGE)[0]
    others = [
        problem._replace(tokens=277),
        problem._replace(dtype="float16"),
        problem._replace(tangent=not problem.tangent),
        problem._replace(backward=not problem.backward),
    ]
    for other in others:
        assert launched(other, LARGE, [plan]) == launched(other, LARGE, [])


@pytest.mark.parametrize("problem", PROBLEMS, ids=NAMES)
@pytest.mark.parametrize("change", [{"kernel": 50}, {"warps": 99}, {"warps": 0}, {"slots": 9}, {"slots": 0}])
def test_an_invalid_plan_leaves_the_models_choice(problem: Problem, change: dict[str, int]) -> None:
    plan = all_competitors(problem, LARGE)[0]._replace(**change)
    assert launched(problem, LARGE, [plan]) == launched(problem, LARGE, [])


def test_a_plan_that_does_not_fit_the_card_leaves_the_models_choice() -> None:
    small = Limits(99 * 1024, 100 * 1024, 4, (8, 6))
    for problem in PROBLEMS:
        for plan in all_competitors(problem, LARGE):
            for one in launched(problem, small, [plan]):
                assert one["shared_bytes"] <= small.shared_per_block


def test_rows_of_a_wrong_length_are_rejected() -> None:
    with pytest.raises(ValueError, match="rows must have 11 numbers each, got 3"):
        torch.ops.pmf.set_attention_plans(-1, [1, 2, 3])


@pytest.mark.skipif(not EMULATED, reason="needs the emulator")
@pytest.mark.parametrize("kind", tune.PASSES)
def test_every_competing_plan_gives_the_models_bits(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    backward, tangent = tune.PASSES[kind]
    problem = Problem(70, 64, "bfloat16", backward, tangent)
    found = all_competitors(problem, A100)
    assert found
    monkeypatch.setattr(tune, "TOKENS", 2 * problem.tokens)  # two heads
    error = tune.check(problem, torch.device("cpu"))
    with at_level("emulated"):
        call = tune.run(problem, torch.device("cpu"))
        expected = call()
        for plan in found:
            plans.use(0, [plan])
            results = call()
            plans.use(0, [])
            pairs = (
                [(results, expected)]
                if isinstance(results, torch.Tensor)
                else zip(results, expected, strict=True)
            )
            assert all(torch.equal(a, b) for a, b in pairs), plan
        plans.use(0, found[-1:])
        assert error() <= 1
        plans.use(0, [])


# ---- choosing


def test_the_models_own_plan_is_tested_too() -> None:
    """It was recorded as right, whatever it computed."""
    call = {"error": lambda: 7.0, "timed": lambda: 1.0, "say": lambda text: None}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(plans, "use", lambda device, chosen: None)
        best, rows = tune.tune(PROBLEMS[0], 0, LARGE, **call)  # type: ignore[arg-type]
    assert best == [] and not any(row["right"] for row in rows) and rows[0]["error"] == 7.0


def test_the_fastest_correct_plan_wins_by_two_percent() -> None:
    problem = PROBLEMS[0]
    candidates = list(competitors(problem, "forward", LARGE))
    times = {None: 1.0, candidates[0]: 0.99, candidates[1]: 0.5, candidates[2]: 0.7}
    inside: list[Any] = [None]

    def use(device: int, chosen: list[Plan]) -> None:
        if device == 0:
            inside[0] = chosen[-1] if chosen else None
        else:
            original(device, chosen)

    original = plans.use
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(plans, "use", use)
        best, rows = tune.tune(
            problem,
            0,
            LARGE,
            error=lambda: 7.0 if inside[0] == candidates[1] else 0.5,
            timed=lambda: times.get(inside[0], 2.0),
            say=lambda text: None,
        )
    assert best == [candidates[2]]  # the faster one is wrong
    assert [row["right"] for row in rows].count(False) == 1 and len(rows) == len(candidates) + 1
    assert "ms" not in next(row for row in rows if not row["right"])


# ---- tables


@pytest.fixture
def table(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A table for "Test Card", of this library."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    path = plans.table_file("Test Card")
    assert path is not None
    plans.write(path, plans.record("Test Card", all_competitors(PROBLEMS[0], LARGE)[:1]))
    return path


def said(device: int, gpu: str) -> list[str]:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        plans.load(device, gpu)
    return [str(warning.message) for warning in caught]


def test_a_table_is_read_back_and_used(table: Path) -> None:
    (plan,) = all_competitors(PROBLEMS[0], LARGE)[:1]
    assert plans.read("Test Card") == ([plan], None)
    model = launched(PROBLEMS[0], LARGE, [])
    assert said(-1, "Test Card") == []
    sizes = {"batch": 1, "heads": 1, "key_heads": 1, "queries": 276, "keys": 276}
    now = module.attention_launches(**sizes, width=64, value_width=64, **LARGE._asdict())["launches"]
    assert now != model and now[0]["threads"] == 32 * plan.warps


def test_without_a_table_there_is_no_warning() -> None:
    assert plans.read("A card that nobody has") == ([], None)


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"library": "pmf 0.0.1, build 1-2"}, "holds plans of pmf 0.0.1, build 1-2, not of this library"),
        ({"device": "Other Card"}, "holds plans for Other Card, not for this Test Card"),
        ({"plans": [{"kernel": 1}]}, "is not a table of plans"),
        ({"plans": 3}, "is not a table of plans"),
        *(
            ({"plans": [{**PLAN._asdict(), "kernel": kernel}]}, "is not a table of plans")
            for kernel in (float("inf"), 2**70, -1, 1.5)
        ),
    ],
)
def test_a_table_for_something_else_is_rejected(table: Path, change: dict[str, Any], sentence: str) -> None:
    table.write_text(json.dumps(json.loads(table.read_text()) | change))
    model = launched(PROBLEMS[0], LARGE, [])
    (warning,) = said(-1, "Test Card")
    assert sentence in warning and "pmf's model chooses instead: run benchmarks/tune.py again" in warning
    assert launched(PROBLEMS[0], LARGE, []) == model


@pytest.mark.parametrize("content", ["", "[]", '{"device": 3}', "\x00"])
def test_a_damaged_table_is_rejected(table: Path, content: str) -> None:
    table.write_text(content)
    (warning,) = said(-1, "Test Card")
    assert "is not a table of plans" in warning


# ---- the command


def test_the_list_needs_no_gpu(capsys: pytest.CaptureFixture[str]) -> None:
    assert tune.main(["--list", "--shapes", "276x64"]) == 0
    printed = capsys.readouterr().out
    assert all(f"276x64 bfloat16 {name}, " in printed for name in tune.PASSES)
    assert "276x64 bfloat16 forward + JVP, forward: the only kernel has one plan\n" in printed
    assert tune.main(["--list", "--shapes", "276x64", "--capability", "8.0"]) == 0
    assert "one plan" not in capsys.readouterr().out


def test_without_a_gpu_it_says_so(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    assert tune.main([]) == 2
    assert capsys.readouterr().err.startswith("torch finds no such CUDA device")


@pytest.fixture
def card(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An imaginary GPU, on which every plan is correct and twice as fast as the model's choice."""
    facts = {
        "name": "Test Card", "shared_memory_per_block_optin": LARGE.shared_per_block,
        "shared_memory_per_multiprocessor": LARGE.shared_per_processor,
        "multi_processor_count": LARGE.processors, "major": 10, "minor": 0,
    }  # fmt: skip
    for name, answer in {
        "device_count": 1, "set_device": None, "get_device_properties": SimpleNamespace(**facts)
    }.items():  # fmt: skip
        monkeypatch.setattr(torch.cuda, name, lambda *_, answer=answer: answer)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(tune, "run", lambda problem, device: None)
    monkeypatch.setattr(tune, "check", lambda problem, device: lambda: 0.5)
    monkeypatch.setattr(tune, "competitors", lambda problem, launch, *_: [problem.plan(launch, 0, 4, 3)])
    used: list[list[Plan]] = [[]]
    monkeypatch.setattr(plans, "use", lambda device, chosen: used.append(chosen))
    monkeypatch.setattr(tune, "milliseconds", lambda call, seconds: 1.0 / (1 + len(used[-1])))


def test_plans_of_other_problems_stay_in_the_table(card: None) -> None:
    assert tune.main(["--shapes", "276x64"]) == 0
    first, _ = plans.read("Test Card")
    assert [plan.launch for plan in first] == ["forward", "forward", *plans.LAUNCHES[1:] * 2]
    assert tune.main(["--shapes", "100x80", "276x64"]) == 0
    both, _ = plans.read("Test Card")
    assert len(both) == 2 * len(first) and both[len(first) :] == first


def test_a_table_that_cannot_be_written_is_one_sentence(
    card: None, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Before anything is measured; a record of the measurements is still made where one is asked for."""
    (tmp_path / "cache").write_text("a file")
    assert tune.main(["--shapes", "276x64"]) == 2
    printed = capsys.readouterr()
    assert printed.out == "" and len(printed.err.splitlines()) == 1
    assert printed.err.startswith("the table of plans cannot be written: ")
    assert tune.main(["--shapes", "276x64", "--out", str(tmp_path / "out.json")]) == 0
    assert len(json.loads((tmp_path / "out.json").read_text())["plans"]) == 6


def test_a_problem_without_memory_keeps_its_plans(
    card: None, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    tune.main(["--shapes", "276x64"])
    before = plans.read("Test Card")

    def run(problem: Problem, device: torch.device) -> None:
        if problem.backward:
            raise torch.cuda.OutOfMemoryError("CUDA out of memory. Tried to allocate")

    monkeypatch.setattr(tune, "run", run)
    capsys.readouterr()
    assert tune.main(["--shapes", "276x64"]) == 1
    said = capsys.readouterr().err.splitlines()
    assert len(said) == 2 and all(line.startswith("not tuned, as memory ran out: ") for line in said)
    assert sorted(plans.read("Test Card")[0]) == sorted(before[0])


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["--shared-kb", "48"], "--list plans for at least 99 KB per block and one multiprocessor"),
        (["--processors", "0"], "--list plans for at least 99 KB per block and one multiprocessor"),
        (["--capability", "H100"], "argument --capability: invalid capability value: 'H100'"),
    ],
)
def test_an_impossible_gpu_is_one_sentence(
    words: list[str], sentence: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit, match="2"):
        tune.main(["--list", *words])
    assert sentence in capsys.readouterr().err


@pytest.mark.parametrize("shape", ["276", "x64", "276x300", "0x64"])
def test_an_invalid_shape_is_one_sentence(shape: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        tune.main(["--shapes", shape])
    assert stop.value.code == 2
    assert f"--shapes {shape} is not tokens x width" in capsys.readouterr().err
