"""Controls against bad steps, and what the log records of one."""

import json
import math
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from pmf import checkpoint
from pmf.data import MemoryImages
from pmf.errors import UserError
from pmf.training import TrainConfig, Trainer, prepare, train
from pmf.training.config import OptimizerSettings
from pmf.training.folders import resume_config
from pmf.training.gradients import clip_gradients
from pmf.training.loop import learning_rate_factor

Tiny = Callable[..., TrainConfig]


def test_clipping_scales_all_gradients_by_one_factor() -> None:
    parameters = [torch.nn.Parameter(torch.zeros(3)), torch.nn.Parameter(torch.zeros(2, 2))]
    grads = torch.tensor([3.0, 0.0, 0.0]), torch.tensor([[0.0, 4.0], [0.0, 0.0]])
    for limit, factor in ((None, 1.0), (10.0, 1.0), (1.0, 0.2)):
        for p, g in zip(parameters, grads, strict=True):
            p.grad = g.clone()
        assert clip_gradients(parameters, limit).item() == pytest.approx(5.0)
        for p, g in zip(parameters, grads, strict=True):
            torch.testing.assert_close(p.grad, g * factor)


@pytest.mark.parametrize("large", [math.inf, 3e19])  # the square of the other overflows
def test_clipping_by_an_infinite_norm_is_not_a_silent_zero(large: float) -> None:
    parameters = [torch.nn.Parameter(torch.zeros(2)), torch.nn.Parameter(torch.zeros(2))]
    parameters[0].grad, parameters[1].grad = torch.tensor([large, 1.0]), torch.ones(2)
    assert clip_gradients(parameters, 1.0).item() == math.inf
    assert all(p.grad is not None and p.grad.isnan().all() for p in parameters)


def test_warm_up_and_schedules() -> None:
    def factors(**settings: object) -> list[float]:
        chosen = OptimizerSettings(**settings)  # type: ignore[arg-type]
        return [learning_rate_factor(chosen, step, step / 8) for step in range(9)]

    assert factors(warmup_steps=4) == pytest.approx([0.25, 0.5, 0.75, 1, 1, 1, 1, 1, 1])
    assert factors(schedule="linear") == pytest.approx([1 - step / 8 for step in range(9)])
    cosine = [(1 + math.cos(math.pi * step / 8)) / 2 for step in range(9)]
    assert factors(schedule="cosine") == pytest.approx(cosine)
    both = [min(1, (step + 1) / 2) * x for step, x in enumerate(cosine)]
    assert factors(schedule="cosine", warmup_steps=2) == pytest.approx(both)


def test_a_schedule_and_a_cooldown_conflict(tiny: Tiny) -> None:
    with pytest.raises(UserError, match="--cooldown ends a constant schedule, but --schedule is cosine"):
        tiny(schedule="cosine", cooldown=0.5)


def test_the_log_records_norms_losses_and_speed(tmp_path: Path, tiny: Tiny) -> None:
    config = tiny(steps=4, log_every=2, cooldown=0.0, schedule="linear", clip_grad_norm=1e-3)
    train(config, tmp_path)
    rows = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert [row["lr"] for row in rows] == pytest.approx([config.optimizer.lr * x for x in (0.75, 0.25)])
    trainer = prepare(config)
    norms = [trainer.train_step(1 - step / 4)[-1].item() for step in range(4)]
    assert min(norms) > 1e-3  # as they were before clipping
    assert [row["grad_norm"] for row in rows] == pytest.approx([sum(norms[:2]) / 2, sum(norms[2:]) / 2])
    for row in rows:
        assert row["loss_perceptual"] == 0 and row["images_per_second"] > 0
        assert 0 <= row["waiting_for_data"] <= 1 and row["memory_mib"] > 50


def test_adams_own_rate_is_the_one_reported(tmp_path: Path, tiny: Tiny) -> None:
    """The log and the advice named Muon's, which does not run."""
    train(tiny(steps=1, log_every=1, cooldown=0.0, optimizer="adam", adam_lr=0.03), tmp_path)
    assert json.loads((tmp_path / "log.jsonl").read_text())["lr"] == 0.03
    with pytest.raises(UserError, match=r"learning rate below --adam-lr 1e\+30"):
        train(tiny(steps=4, log_every=1, cooldown=0.0, optimizer="adam", adam_lr=1e30))


def test_without_clipping_the_norm_is_that_of_the_step_logged(tiny: Tiny) -> None:
    trainer = prepare(tiny(log_every=2))
    first, second = trainer.train_step()[-1], trainer.train_step()[-1]
    assert first.isnan() and second > 0


def test_clipping_and_schedules_resume_bit_for_bit(tmp_path: Path, tiny: Tiny) -> None:
    settings = dict(steps=6, checkpoint_every=3, keep_checkpoints=9, cooldown=0.0, schedule="cosine")
    config = tiny(**settings, warmup_steps=4, clip_grad_norm=0.01)
    whole = train(config, tmp_path / "whole")
    train(config, tmp_path / "cut")
    (last,) = [f for f in checkpoint.checkpoint_folders(tmp_path / "cut") if checkpoint.step_of(f) == 6]
    for file in last.iterdir():
        file.unlink()
    last.rmdir()
    resumed = train(resume_config(tmp_path / "cut", {}), tmp_path / "cut", resume=True)
    for a, b in zip(whole.model.parameters(), resumed.model.parameters(), strict=True):
        assert torch.equal(a, b)


def test_initialises_from_the_weights_that_fit(tmp_path: Path, tiny: Tiny) -> None:
    trained = Trainer(tiny(), prepare(tiny()).dataset).model
    with torch.no_grad():
        for p in trained.parameters():
            p.add_(0.1)
    torch.save(
        {f"module._orig_mod.{k}": v for k, v in trained.state_dict().items()}, tmp_path / "trained.pth"
    )
    config = tiny(init_from=str(tmp_path / "trained.pth"), depth=3, patch_size=4)
    trainer = prepare(config)
    ours, theirs = dict(trainer.model.named_parameters()), dict(trained.named_parameters())
    fresh = dict(prepare(tiny(depth=3, patch_size=4)).model.named_parameters())
    for name, p in ours.items():
        fits = name in theirs and theirs[name].shape == p.shape
        assert torch.equal(p, theirs[name] if fits else fresh[name]), name
    for name, average in trainer.ema.weights(trainer.ema.half_lives[0]).items():
        assert torch.equal(average, ours[name])
    said = "\n".join(trainer.initial)
    assert f"of {len(ours)} weights come from" in said and "initialised randomly: position" in said


@pytest.mark.parametrize(
    ("before", "now", "said"),
    [
        # Named by number, ordered by number: the first run's first class is the second's second.
        (["1", "9", "10"], ["0", "1", "10"], ["1 of 3 classes, not in the file: 0", "not in the data: 9"]),
        (["cat", "dog"], ["cat", "dog", "owl"], ["1 of 3 classes, not in the file: owl"]),
        (
            ["0", "1", "2"],
            ["cat", "dog", "owl"],
            ["3 of 3 classes, not in the file: cat, dog, owl", "data: 0, 1, 2"],
        ),
        (["0"], ["0", "1"], ["2 of 2 classes, not in the file: 0, 1"]),  # trained without classes
        (["cat", "dog"], ["0"], ["2 of the file's classes, not in the data: cat, dog"]),
        (["cat", "dog"], ["cat", "dog"], []),
    ],
)
def test_classes_keep_their_names_in_initial_weights(
    tmp_path: Path, tiny: Tiny, before: list[str], now: list[str], said: list[str]
) -> None:
    """Tables of one shape were copied row by row: a class became another."""

    def trainer(names: list[str], **settings: object) -> Trainer:
        return Trainer(tiny(**settings), MemoryImages(torch.zeros(9, 1, 8, 8), torch.zeros(9), names))

    def table(model: torch.nn.Module) -> torch.Tensor:
        return dict(model.named_parameters())["condition.label_embedder.embedding.weight"].detach()

    old = trainer(before, seed=1).model
    file = tmp_path / "old.safetensors"
    file.write_bytes(checkpoint.weights_bytes(dict(old.named_parameters()), old.config, before))
    started, fresh = trainer(now, init_from=str(file)), table(trainer(now).model)
    expected = fresh.clone()
    expected[-1] = table(old)[-1]
    if now == ["0"]:  # no classes: the row for no label
        expected[0] = table(old)[-1]
    for row, name in enumerate(now):
        if name in before and before != ["0"]:
            expected[row] = table(old)[before.index(name)]
    assert torch.equal(table(started.model), expected)
    lines = "\n".join(started.initial)
    assert all(words in lines for words in said) and len(started.initial) == 1 + len(said)


def test_initialising_from_unusable_weights_is_one_sentence(tmp_path: Path, tiny: Tiny) -> None:
    with pytest.raises(UserError, match="there is no checkpoint file"):
        prepare(tiny(init_from=str(tmp_path / "nothing.pth")))
    other = {name: torch.zeros(7, 7) for name in prepare(tiny()).model.state_dict()}
    torch.save(other, tmp_path / "other.pth")
    with pytest.raises(UserError, match="no weight matches this model's names and shapes"):
        prepare(tiny(init_from=str(tmp_path / "other.pth")))


def test_a_resumed_run_does_not_need_its_initial_weights(tmp_path: Path, tiny: Tiny) -> None:
    torch.save(prepare(tiny()).model.state_dict(), tmp_path / "trained.pth")
    train(tiny(init_from=str(tmp_path / "trained.pth"), steps=2), tmp_path / "run")
    (tmp_path / "trained.pth").unlink()
    train(resume_config(tmp_path / "run", {"steps": 3}), tmp_path / "run", resume=True)
