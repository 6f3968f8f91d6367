"""Two processes against one: losses, weights, checkpoints, and error messages."""

import json
import socket
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import two_ranks

from pmf import checkpoint
from pmf.errors import UserError
from pmf.optim._ranks import assign_owners
from pmf.ranks import joined_ranks
from pmf.training import prepare, resume_config, train

EXACT = 1e-5
"""Limit for losses and weights after ten steps in float32: sums are taken in another order."""


@pytest.fixture(scope="module")
def out(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The results of two ranks: one pair of processes, since starting them takes seconds."""
    out = tmp_path_factory.mktemp("ranks")
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    train(two_ranks.config(steps=4), out / "one", dataset=two_ranks.IMAGES)
    torch.set_num_threads(threads)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    torch.multiprocessing.spawn(two_ranks.main, (port, out), nprocs=2)
    return out


@pytest.fixture(scope="module")
def two(out: Path) -> dict[str, Any]:
    """The first rank's results; the second got the same weights."""
    first, second = (torch.load(out / f"rank{rank}.pt") for rank in range(2))
    assert first.keys() == second.keys()
    for name in first:
        if isinstance(first[name], dict):
            assert difference(first[name], second[name]) == 0, name
    return first


@pytest.fixture(scope="module")
def one() -> dict[str, Any]:
    return two_ranks.steps(prepare(two_ranks.config(), dataset=two_ranks.IMAGES))


def difference(found: dict[str, Any], expected: dict[str, Any]) -> float:
    """The largest difference of losses, weights and averages; losses are compared from the end."""
    count = min(len(found["losses"]), len(expected["losses"]))
    worst = (found["losses"][-count:] - expected["losses"][-count:]).abs().max().item()
    for kind in ("weights", "averages"):
        assert found[kind].keys() == expected[kind].keys()
        for name, weight in expected[kind].items():
            worst = max(worst, (found[kind][name] - weight).abs().max().item())
    return worst


@pytest.mark.parametrize("how", ["ddp", "fsdp", "ddp, accumulated", "fsdp, accumulated"])
def test_two_ranks_equal_one_process(two: dict[str, Any], one: dict[str, Any], how: str) -> None:
    assert one["losses"][:, 1:].std(dim=0).min() > 1e-3  # the steps do something
    assert difference(two[how], one) < EXACT
    assert one["norms"].std() > 1e-3 and torch.allclose(two[how]["norms"], one["norms"], rtol=1e-4)


@pytest.mark.parametrize("parallel", ["ddp", "fsdp"])
def test_bf16_on_ranks_equals_one_process(two: dict[str, Any], parallel: str) -> None:
    alone = two_ranks.steps(prepare(two_ranks.config(precision="bf16", steps=4), dataset=two_ranks.IMAGES))
    losses = two[f"{parallel}, bf16"]["losses"]
    assert losses.isfinite().all() and not torch.equal(losses, two[parallel]["losses"][:4])
    assert torch.allclose(losses[:, 1:], alone["losses"][:, 1:], rtol=0.03)


@pytest.mark.parametrize("how", ["ddp by ddp", "ddp by fsdp", "fsdp by fsdp", "one by ddp", "one by fsdp"])
def test_a_run_resumes_on_another_number_of_ranks(two: dict[str, Any], one: dict[str, Any], how: str) -> None:
    assert difference(two[how], one) < EXACT


@pytest.mark.parametrize("parallel", ["ddp", "fsdp"])
def test_the_same_ranks_resume_bit_for_bit(two: dict[str, Any], parallel: str) -> None:
    assert difference(two[f"{parallel} by {parallel}"], two[parallel]) == 0


@pytest.mark.parametrize("parallel", ["ddp", "fsdp"])
def test_one_process_resumes_a_run_of_two(out: Path, one: dict[str, Any], parallel: str) -> None:
    config = resume_config(out / parallel, {"steps": 10})
    alone = prepare(config, resume_from=out / parallel, dataset=two_ranks.IMAGES)
    assert alone.step == 4
    assert difference(two_ranks.steps(alone), one) < EXACT


@pytest.mark.parametrize("parallel", ["ddp", "fsdp"])
def test_checkpoints_of_two_ranks_load_for_sampling(out: Path, parallel: str) -> None:
    expected = checkpoint.load_checkpoint(out / "one")
    (folder,) = checkpoint.checkpoint_folders(out / parallel)
    final = checkpoint.load_model(out / parallel)
    assert final.path == folder / "ema-0.02.safetensors"
    for file in folder.glob("*.safetensors"):  # like every checkpoint of such a run except the last
        file.rename(file.with_suffix(".moved"))
    try:
        with pytest.raises(UserError, match=r"has no ema-7: --ema can be none, 0\.02"):
            checkpoint.load_model(out / parallel, "7")
        middle = checkpoint.load_model(out / parallel, v_head=False)
        assert middle.class_names == [str(digit) for digit in range(10)]
    finally:
        for file in folder.glob("*.moved"):
            file.rename(file.with_suffix(".safetensors"))
    assert not any(name.startswith("v_") for name, _ in middle.model.named_parameters())
    weights = dict(expected.named_parameters())
    for loaded in (final.model, middle.model):
        for name, weight in loaded.named_parameters():
            assert (weight - weights[name]).abs().max() < EXACT


def test_a_damaged_shard_of_a_checkpoint_is_named(out: Path) -> None:
    folder = checkpoint.newest_checkpoint(out / "stopped")
    for file in (folder / "shards").glob("*.distcp"):
        file.write_bytes(file.read_bytes()[:100])
    with pytest.raises(UserError, match=r"shards is truncated or belongs to another model"):
        prepare(resume_config(out / "stopped", {}), resume_from=out / "stopped", dataset=two_ranks.IMAGES)


def test_the_log_has_the_means_over_ranks(out: Path, one: dict[str, Any]) -> None:
    rows = [json.loads(line) for line in (out / "fsdp" / "log.jsonl").read_text().splitlines()]
    assert [row["images"] for row in rows] == [8, 16, 24, 32]
    losses = torch.tensor([[row["loss_u"], row["loss_v"]] for row in rows])
    assert (losses - one["losses"][:4, 1:]).abs().max() < EXACT


@pytest.mark.parametrize("how", ["muon", "muon of shards"])
def test_distributing_the_matrices_changes_no_bit(two: dict[str, Any], how: str) -> None:
    """Including fused and stacked ones: a parameter's owner has all of its matrices."""
    for found, expected in zip(two[how], two_ranks.muon_steps(None), strict=True):
        assert torch.equal(found, expected)


@pytest.mark.parametrize("name", two_ranks.WRAPPERS)
def test_a_users_loop_accepts_wrapped_models(two: dict[str, Any], name: str) -> None:
    """Gradients are averaged, ranks may need different passes, names are the model's."""
    found, alone = dict(two["own loop"])[name], two_ranks.wrapped_steps(lambda model: model)
    assert found["routing"] == alone["routing"]
    for part in ("weights", "averages"):
        assert found[part].keys() == alone[part].keys()
        for key, expected in alone[part].items():
            torch.testing.assert_close(found[part][key], expected, rtol=1e-4, atol=EXACT)
    torch.testing.assert_close(found["images"], alone["images"], rtol=1e-3, atol=1e-4)


def test_the_largest_matrix_is_assigned_first() -> None:
    assert assign_owners([8 * side**3 for side in (2, 64, 32, 33, 8)], 2) == [1, 0, 1, 1, 1]
    assert sorted(assign_owners([9] * 6, 3)) == [0, 0, 1, 1, 2, 2]


def test_ranks_stay_in_step_if_one_needs_no_guidance(two: dict[str, Any]) -> None:
    assert two["fm"]["losses"].isfinite().all()


def test_one_signal_stops_all_ranks(two: dict[str, Any], out: Path) -> None:
    assert two["stopped"] == (3, True)
    assert checkpoint.newest_checkpoint(out / "stopped").name == "step-00000003"


def test_one_unreadable_image_costs_no_step(two: dict[str, Any], out: Path) -> None:
    assert two["damaged"] == ("7.png is damaged", 24)
    assert checkpoint.newest_checkpoint(out / "damaged").name == "step-00000003"


def test_disagreeing_ranks_and_indivisible_batches_are_rejected(two: dict[str, Any]) -> None:
    assert "disagree on their settings: --lr is 0.001 on rank 0 and 0.002 on rank 1" in two["settings"]
    assert "--batch-size 9 does not split into 2 ranks x 1 parts" in two["batch"]
    assert "use a multiple of 6" in two["parts"]
    assert "--compile does not work with --parallel fsdp" in two["compile"]


@pytest.mark.parametrize(
    ("variables", "words"),
    [
        ({"WORLD_SIZE": "two"}, "WORLD_SIZE must be a whole number"),
        ({"WORLD_SIZE": "2"}, "the other ranks cannot be reached .* start with torchrun"),
    ],
)
def test_a_broken_environment_is_explained(
    monkeypatch: pytest.MonkeyPatch, variables: dict[str, str], words: str
) -> None:
    for name in ("RANK", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(UserError, match=words), joined_ranks():
        pass


def test_waiting_for_others_is_said(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    for name, value in {"WORLD_SIZE": "2", "MASTER_ADDR": "10.0.0.9", "MASTER_PORT": "4242"}.items():
        monkeypatch.setenv(name, value)

    def nobody_comes(backend: str) -> None:
        for _ in range(200):
            if caplog.messages:
                break
            time.sleep(0.05)
        raise RuntimeError("timed out")

    monkeypatch.setattr("pmf.ranks._PATIENCE", 0.05)
    monkeypatch.setattr("torch.distributed.init_process_group", nobody_comes)
    with pytest.raises(UserError, match="timed out"), joined_ranks():
        pass
    assert "waiting at 10.0.0.9:4242 for all 2 processes" in caplog.messages[0]
