"""pmf train --compile."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from helpers.inductor import requires_inductor
from helpers.pmf_process import TINY, run_in

from pmf.training import TrainConfig, Trainer, train
from pmf.training.folders import resume_config

Tiny = Callable[..., TrainConfig]


@requires_inductor
def test_a_compiled_run_follows_an_eager_one_and_resumes_without_compiling(
    tmp_path: Path, tiny: Tiny
) -> None:
    torch.compiler.reset()
    rows = {}
    for compile in (False, True):
        folder = tmp_path / str(compile)
        train(tiny(steps=4, log_every=1, compile=compile), folder)
        rows[compile] = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
        assert json.loads((folder / "config.json").read_text())["run"]["compile"] is compile
    for eager, compiled in zip(rows[False], rows[True], strict=True):
        assert compiled["loss_u"] == pytest.approx(eager["loss_u"], rel=1e-3)
        assert compiled["loss_v"] == pytest.approx(eager["loss_v"], rel=1e-3)
    config = resume_config(tmp_path / "True", {"compile": False, "steps": 5})
    assert train(config, tmp_path / "True", resume=True).step == 5


def test_a_runs_network_is_compiled_but_not_its_sampling(tiny: Tiny, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []

    def compile(network: torch.nn.Module, **options: object) -> object:
        calls.append((network, options))
        return network

    monkeypatch.setattr(torch, "compile", compile)
    for precision in ("fp32", "bf16"):
        calls.clear()
        result = train(tiny(steps=1, compile=True, precision=precision))
        probe, (network, options) = calls  # first something tiny, to see whether anything compiles
        assert probe[0] is torch.sin and options == {"fullgraph": True}
        assert network.position.dtype == (torch.float32 if precision == "fp32" else torch.bfloat16)
        assert result.model is not network


def test_room_for_every_graph_whatever_the_process_compiled_before(tiny: Tiny) -> None:
    from pmf.data import load_digits

    trainer = Trainer(tiny(), load_digits())
    graphs = []

    def count(graph: torch.fx.GraphModule, inputs: list[torch.Tensor]) -> Callable[..., object]:
        graphs.append(graph)
        return graph.forward

    trainer.config = tiny(compile=True)
    with torch._dynamo.config.patch(recompile_limit=1):
        trainer.network = torch.compile(trainer.computing, fullgraph=True, backend=count)  # type: ignore
        trainer.train_step()  # two graphs: the guidance pass and the training pass
    assert len(graphs) == 2


def test_a_missing_compiler_is_one_sentence_before_the_run_begins(tmp_path: Path) -> None:
    (tmp_path / "cache").mkdir()  # an empty one: what was compiled before needs no compiler
    nothing = "import os; os.environ |= {'CXX': '/nonexistent', 'TORCHINDUCTOR_CACHE_DIR': 'cache'}"
    done = run_in(tmp_path, "train", *TINY, "--compile", "--steps", "2", "--out", "run", before=nothing)
    assert done.returncode == 2, done.stderr
    assert done.stderr.startswith("error: --compile: torch.compile failed (") and done.stderr.count("\n") == 1
    assert "train without --compile" in done.stderr and not (tmp_path / "run").exists()
