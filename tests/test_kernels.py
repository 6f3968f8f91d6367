"""PMF_KERNELS: references in place of kernels, everywhere; and the reminder to check a GPU."""

import subprocess
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from helpers.levels import EMULATED, at_level
from helpers.pmf_process import environment

import pmf
from pmf import checked, env, kernels, plans
from pmf.errors import UserError
from pmf.ops._dispatch import functions

EVERY = f"choose from {', '.join(kernels.NAMES)}"


@pytest.fixture(autouse=True)
def kernels_again() -> Iterator[None]:
    yield
    kernels.choose("auto")


class _Without:
    """torch.ops.pmf, in which the named ops must not be called."""

    def __init__(self, *prefixes: str) -> None:
        self._ops, self._prefixes, self.used = torch.ops.pmf, prefixes, set[str]()

    def __getattr__(self, name: str) -> Any:
        assert name in HARMLESS or not name.startswith(self._prefixes), f"{name} ran"
        self.used.add(name)
        return getattr(self._ops, name)


HARMLESS = ("newton_schulz_segments", "cpu_level")  # these compute nothing


def test_valid_choices() -> None:
    assert kernels.parse("auto") == kernels.parse("") == frozenset()
    assert kernels.parse("reference") == frozenset(kernels.NAMES)
    assert kernels.parse(" reference : attention , ema,ema ") == {"attention", "ema"}


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        (
            "referense",
            "PMF_KERNELS=referense is not a choice of kernels: use auto, reference, or reference: followed",
        ),
        ("auto:swiglu", "PMF_KERNELS=auto:swiglu is not a choice"),
        ("reference:", f"PMF_KERNELS=reference: names '', which has no kernels of its own: {EVERY}"),
        (
            "reference:swiglu,attention_varlen",
            "PMF_KERNELS=reference:swiglu,attention_varlen names 'attention_varlen', which has no kernels of "
            f"its own: {EVERY}",
        ),
    ],
)
def test_invalid_choices(text: str, sentence: str) -> None:
    with pytest.raises(UserError) as problem:
        kernels.parse(text)
    assert str(problem.value).startswith(sentence)


def test_an_invalid_choice_in_the_environment(tmp_path: Path) -> None:
    """Reported by `pmf env`; an error of other commands and of the first op, though not of the import."""
    text = "reference:soft"
    sentence = f"PMF_KERNELS={text} names 'soft', which has no kernels of its own: {EVERY}"
    code = (
        "import torch, pmf\nfrom pmf.cli import main\nassert main(['env']) == 0\n"
        "assert main(['check', '--quick']) == 2 and main(['train', '--dry-run']) == 2\n"
        "x = torch.ones(3)\ntry:\n    pmf.ops.swiglu(x, x)\nexcept pmf.errors.UserError as e:\n"
        "    print('OP', e)"
    )
    told = {**environment(), "PMF_KERNELS": text}
    done = subprocess.run(
        [sys.executable, "-c", code], env=told, cwd=tmp_path, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert f"ops by         {sentence}" in done.stdout and f"OP {sentence}" in done.stdout
    assert done.stderr.count(f"error: {sentence}") == 2 and len(done.stderr.splitlines()) == 2


def test_every_function_belongs_to_a_named_op() -> None:
    """Except the branches of a block, whose ops choose separately."""
    found = {f.family() for name, f in functions.items() if "branch" not in name}
    assert found | {"ema", "muon", "newton_schulz", "product"} == set(kernels.NAMES)


def step(dtype: torch.dtype = torch.float32) -> list[torch.Tensor]:
    """Everything that training computes: objective with tangents, gradients, Muon, averages."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "depth": 2, "head_depth": 1, "num_heads": 2, "bottleneck": 4}
    model = pmf.create_model("digits", **sizes).to(dtype)
    optimizer, average = pmf.optim.Muon(model, lr=0.02), pmf.optim.EMA(model, (0.02,))
    objective = pmf.flow.Objective(noise_scale=model.config.noise_scale)
    generator = torch.Generator().manual_seed(1)
    images = torch.rand(4, 1, 8, 8, generator=generator, dtype=dtype) * 2 - 1
    draws = objective.draw(images, torch.arange(4), generator)
    terms = objective(model, images, torch.arange(4), draws)
    terms.loss.backward()
    gradients = [p.grad.clone() for p in model.parameters() if p.grad is not None]
    optimizer.step()
    average.update(4)
    return [terms.loss.detach(), *gradients, *(p.detach() for p in model.parameters())]


def distance(found: list[torch.Tensor], expected: list[torch.Tensor]) -> float:
    pairs = list(zip(found, expected, strict=True))
    assert len(pairs) > 50
    return max(((a - b).norm() / (b.norm() + 1e-6)).item() for a, b in pairs)


def test_a_training_step_on_references_runs_no_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    expected = step()
    kernels.choose("reference")
    without = _Without("")
    monkeypatch.setattr(torch.ops, "pmf", without)
    assert distance(step(), expected) < 1e-4


@pytest.mark.parametrize("name", ["attention", "rms_norm", "rotary_qk_norm", "swiglu", "patch_embed"])
def test_only_named_ops_use_their_references(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = step()
    kernels.choose(f"reference:{name}")
    without = _Without(name)
    monkeypatch.setattr(torch.ops, "pmf", without)
    assert distance(step(), expected) < 1e-4
    assert any(op.startswith("swiglu" if name != "swiglu" else "attention") for op in without.used)


@pytest.mark.skipif(not EMULATED, reason="needs the emulator")
def test_float64_on_a_gpu_uses_references_in_branches_too() -> None:
    """CUDA kernels have no float64; the fused branches called them and failed."""
    expected = step(torch.float64)
    with at_level("emulated"):
        found = step(torch.float64)
    assert distance(found, expected) < 1e-9


def test_compiled_code_uses_the_references(monkeypatch: pytest.MonkeyPatch) -> None:
    kernels.choose("reference")
    monkeypatch.setattr(torch.ops, "pmf", _Without("swiglu", "rms_norm"))
    x, w = torch.randn(3, 4, requires_grad=True), torch.randn(4, requires_grad=True)

    def function(x: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
        return pmf.ops.swiglu(pmf.ops.rms_norm(x, w), x).sum()

    found = torch.compile(function, backend="aot_eager", fullgraph=True)(x, w)
    gradients = torch.autograd.grad(found, (x, w))
    expected = function(x, w)
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(gradients, torch.autograd.grad(expected, (x, w)))


def test_env_reports_the_choice(capsys: pytest.CaptureFixture[str]) -> None:
    kernels.choose("reference:swiglu,ema")
    assert env.facts()["ops by"] == "references for ema, swiglu"
    kernels.choose("auto")
    assert env.facts()["ops by"].startswith("kernels for every op")


# ---- the reminder


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> SimpleNamespace:
    """The attributes of a tensor on an imaginary GPU that the reminder reads."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(checked, "_reminded", set())
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "Test Card")
    return SimpleNamespace(is_cuda=True, device=torch.device("cuda", 1))


def reminders(x: Any) -> list[str]:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        checked.remind(x)
    return [str(warning.message) for warning in caught]


def test_an_unchecked_gpu_warns_once(gpu: Any) -> None:
    assert reminders(torch.ones(1)) == []
    (said,) = reminders(gpu)
    assert "not been checked on this Test Card" in said and "run `pmf check`" in said
    assert reminders(gpu) == []
    other = SimpleNamespace(is_cuda=True, device=torch.device("cuda", 0))
    assert len(reminders(other)) == 1


def test_compiled_code_warns_too(gpu: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its graphs call the kernels directly, so plans are loaded, too, when ops are compiled."""
    remind, x, used = checked.remind, torch.ones(2, 3), plans.use
    path = plans.table_file("Test Card")
    assert path is not None
    plan = plans.Plan("forward", "float16", False, False, 276, 276, 64, 64, 0, 4, 3)
    plans.write(path, plans.record("Test Card", [plan]))
    loaded = []

    def remind_of_gpu(_: torch.Tensor) -> None:
        with monkeypatch.context() as patch:
            patch.setattr(torch.cuda, "is_available", lambda: True)
            remind(gpu)

    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)  # for the compiler
    monkeypatch.setattr(plans, "use", lambda *table: loaded.append(table) or used(*table))
    monkeypatch.setattr(checked, "remind", remind_of_gpu)
    with pytest.warns(RuntimeWarning, match="not been checked on this Test Card"):
        torch.compile(lambda x: pmf.ops.swiglu(x, x), backend="aot_eager", fullgraph=True)(x)
    assert loaded == [(1, [plan])]
    used(1, [])


def test_a_checked_gpu_does_not_warn(gpu: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    assert checked.mark("Test Card", True) and checked.passed_on("Test Card") is not None
    assert reminders(gpu) == []
    checked._reminded.clear()
    monkeypatch.setattr(torch, "__version__", "2.99")  # another torch is another machine
    assert len(reminders(gpu)) == 1


def test_a_failed_check_removes_the_record(gpu: Any) -> None:
    checked.mark("Test Card", True)
    checked.mark("Other", True)
    checked.mark("Test Card", False)
    assert checked.passed_on("Test Card") is None and checked.passed_on("Other") is not None


@pytest.mark.parametrize("content", ["", "{", "[1]", '"x"', '{"a": 1}'])
def test_a_damaged_file_of_records_counts_as_none(gpu: Any, tmp_path: Path, content: str) -> None:
    (tmp_path / "pixelmeanflow").mkdir()
    (tmp_path / "pixelmeanflow" / "checked.json").write_text(content)
    assert checked.passed_on("Test Card") is None
    assert len(reminders(gpu)) == 1
    assert checked.mark("Test Card", True) and checked.passed_on("Test Card") is not None


def test_without_home_or_writable_folder_there_are_no_records(
    gpu: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))  # a folder cannot be made there
    assert not checked.mark("Test Card", True)
    assert len(reminders(gpu)) == 1
    checked._reminded.clear()
    monkeypatch.delenv("XDG_CACHE_HOME")

    def homeless() -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.setattr(Path, "home", homeless)
    assert not checked.mark("Test Card", True)
    assert len(reminders(gpu)) == 1


def test_every_raw_operator_warns(gpu: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []
    monkeypatch.setattr(checked, "remind", lambda x: seen.append(x.shape))
    x = torch.ones(2, 3)
    pmf.ops.swiglu(x, x)
    pmf.ops.newton_schulz(x)
    assert seen == [x.shape] * 2
