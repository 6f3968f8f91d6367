"""Whole runs: bitwise resuming, diverging losses, and the contents of a run folder."""

import fcntl
import json
import math
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from PIL import Image

from pmf import checkpoint
from pmf.data import MemoryImages
from pmf.errors import UserError
from pmf.training import TrainConfig, Trainer, prepare, train
from pmf.training.folders import resume_config
from pmf.training.trainer import COLUMNS

Tiny = Callable[..., TrainConfig]


def saved_tensors(run: Path) -> dict[str, torch.Tensor]:
    folder = checkpoint.newest_checkpoint(run)
    return {
        f"{file.name}:{name}": tensor
        for file in sorted(folder.glob("*.safetensors"))
        for name, tensor in checkpoint.read_tensors(file)[0].items()
    }


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_resumed_run_has_the_bits_of_one_that_never_stopped(
    tmp_path: Path, tiny: Tiny, precision: str
) -> None:
    whole, halves = tmp_path / "whole", tmp_path / "halves"
    config = tiny(steps=7, precision=precision, checkpoint_every=3, keep_checkpoints=9, cooldown=0.5)
    train(config, whole)
    middle = checkpoint.step_folder(whole, 3)
    shutil.copytree(middle, checkpoint.step_folder(halves, 3))
    train(resume_config(halves, {}), halves, resume=True)
    expected, found = saved_tensors(whole), saved_tensors(halves)
    assert expected.keys() == found.keys()
    assert [name for name in expected if not torch.equal(expected[name], found[name])] == []
    assert (whole / "samples.png").read_bytes() == (halves / "samples.png").read_bytes()


def test_seeds_determine_the_run(tiny: Tiny) -> None:
    positions = [train(tiny(seed=seed)).model.position for seed in (0, 0, 1)]
    assert torch.equal(positions[0], positions[1]) and not torch.equal(positions[0], positions[2])


def test_training_leaves_the_global_generator_alone(tiny: Tiny) -> None:
    before = torch.get_rng_state()
    train(tiny(steps=1))
    assert torch.equal(torch.get_rng_state(), before)


def test_a_run_folder_holds_config_log_pictures_and_the_newest_checkpoints(
    tmp_path: Path, tiny: Tiny
) -> None:
    config = tiny(steps=6, checkpoint_every=2, keep_checkpoints=2, sample_every=3, sample_omega=2.5)
    result = train(config, tmp_path)
    assert (result.step, result.interrupted, result.picture) == (6, False, tmp_path / "samples.png")
    assert TrainConfig.from_json(json.loads((tmp_path / "config.json").read_text())) == config
    rows = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert [(row["step"], row["images"]) for row in rows] == [(2, 16), (4, 32), (6, 48)]
    assert all(math.isfinite(row["loss_u"]) and row["loss_v"] > 0 for row in rows)
    assert [path.name for path in checkpoint.checkpoint_folders(tmp_path)] == [
        "step-00000004",
        "step-00000006",
    ]
    assert [path.name for path in sorted((tmp_path / "samples").iterdir())] == [
        "00000003.png",
        "00000006.png",
    ]
    assert (tmp_path / "loss.png").is_file()
    loaded = checkpoint.load_model(tmp_path)
    assert loaded.model.config.sample_omega == 2.5 and loaded.class_names[9] == "9"
    assert torch.equal(loaded.model.position, result.model.position)


def test_logged_losses_are_the_means_of_the_steps(tmp_path: Path, tiny: Tiny) -> None:
    config = tiny(steps=4, log_every=2, cooldown=0.0)
    train(config, tmp_path)
    rows = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    trainer = Trainer(config, MemoryImages(*_digits(), [str(digit) for digit in range(10)]))
    losses = torch.stack([trainer.train_step() for _ in range(4)])
    for row, pair in zip(rows, losses.reshape(2, 2, len(COLUMNS)).mean(dim=1), strict=True):
        assert (row["loss_u"], row["loss_v"]) == pytest.approx((pair[1].item(), pair[2].item()), rel=1e-6)


def _digits() -> tuple[torch.Tensor, torch.Tensor]:
    from pmf.data import load_digits

    dataset = load_digits()
    return dataset.pixels, dataset.labels


def test_a_loss_that_is_not_finite_names_its_step_and_keeps_the_last_checkpoint(
    tmp_path: Path, tiny: Tiny
) -> None:
    pixels = torch.zeros(16, 1, 8, 8)
    pixels[5] = math.nan  # seen once in every two steps of 8 images
    broken = MemoryImages(pixels, torch.arange(16) % 2, ["even", "odd"])
    order = Trainer(tiny(), broken).stream.indices(0, 16)
    bad_step = 1 if 5 in order[:8] else 2
    sentence = rf"the loss became nan at step {bad_step} \(term loss_u\)"
    with pytest.raises(UserError, match=f"{sentence}; no checkpoint had been saved; .*below --lr"):
        train(tiny(log_every=50), tmp_path / "first", dataset=broken)
    assert checkpoint.checkpoint_folders(tmp_path / "first") == []

    good = MemoryImages(pixels.nan_to_num(), torch.arange(16) % 2, ["even", "odd"])
    train(tiny(steps=2), tmp_path / "second run", dataset=good)
    config = resume_config(tmp_path / "second run", {"steps": 50, "checkpoint_every": 1})
    said = "last good checkpoint is .*step-0000000[23]; continue with .*--resume '/.*/second run' --lr"
    with pytest.raises(UserError, match=said):
        train(config, tmp_path / "second run", resume=True, dataset=broken)
    assert checkpoint.load_checkpoint(tmp_path / "second run").position.isfinite().all()


def test_weights_that_are_not_finite_are_never_saved(
    tmp_path: Path, tiny: Tiny, monkeypatch: pytest.MonkeyPatch
) -> None:
    honest_step = Trainer.train_step

    def overflowing_step(self: Trainer, rate: float = 1.0) -> torch.Tensor:
        losses = honest_step(self, rate)  # finite: the overflow comes with the update, after the loss
        if self.step == 2:
            self.model.position.data.fill_(math.inf)
        return losses

    monkeypatch.setattr(Trainer, "train_step", overflowing_step)
    with pytest.raises(
        UserError, match=r"weights position are no longer finite at step 2; .*step-00000001; .*--lr"
    ):
        train(tiny(steps=3, checkpoint_every=1), tmp_path)
    assert [path.name for path in checkpoint.checkpoint_folders(tmp_path)] == ["step-00000001"]


@pytest.mark.parametrize("last", [b'{"step": 8, "ima', b"\xff\xfe\x00", b"8", b'{"step": 8}'])
def test_a_killed_run_drops_log_entries_after_its_checkpoint(tmp_path: Path, tiny: Tiny, last: bytes) -> None:
    train(tiny(steps=4), tmp_path)
    with (tmp_path / "log.jsonl").open("ab") as log:
        log.write(b'{"step": 6, "images": 48, "seconds": 1, "loss_u": 9, "loss_v": 9}\n' + last)
    train(resume_config(tmp_path, {"steps": 6}), tmp_path, resume=True)
    rows = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == [2, 4, 6] and rows[-1]["loss_u"] < 9


def test_a_damaged_checkpoint_is_named_when_resuming(tmp_path: Path, tiny: Tiny) -> None:
    train(tiny(steps=2), tmp_path)
    state = checkpoint.newest_checkpoint(tmp_path) / "state.safetensors"
    state.write_bytes(state.read_bytes()[:-10])
    with pytest.raises(UserError, match=r"state\.safetensors is truncated"):
        train(resume_config(tmp_path, {"steps": 4}), tmp_path, resume=True)


def test_shape_settings_cannot_change_when_resuming(tmp_path: Path, tiny: Tiny) -> None:
    train(tiny(steps=1), tmp_path)
    with pytest.raises(UserError, match="--hidden-size 16, which cannot change when resuming"):
        resume_config(tmp_path, {"hidden_size": 32})
    with pytest.raises(UserError, match="--seed 0, which cannot change"):  # it would change the order only
        resume_config(tmp_path, {"seed": 1})
    assert resume_config(tmp_path, {"lr": 5e-4}).optimizer.lr == 5e-4


@pytest.mark.parametrize(
    ("changed", "trained"),
    [
        ({"noise_scale": 2.0}, "its preset's --noise-scale"),
        ({"prediction": "u"}, "its preset's --prediction"),
        ({"seed": 1}, "--seed 0"),
        ({"ema": False}, "--ema"),
        ({"optimizer": "adam"}, "--optimizer muon"),
    ],
)
def test_a_resumed_run_in_python_keeps_what_its_state_is_made_of(
    tmp_path_factory: pytest.TempPathFactory, tiny: Tiny, changed: dict[str, object], trained: str
) -> None:
    """The weights loaded and meant something else, the order was another, or the averages were dropped."""
    run = tmp_path_factory.getbasetemp() / "kept"
    if not run.is_dir():
        train(tiny(steps=1), run)
    with pytest.raises(UserError, match=f"was trained with {trained}, which cannot change when resuming"):
        train(tiny(steps=2, **changed), run, resume=True)


def test_a_changed_precision_reaches_the_optimizer_when_resuming(tmp_path: Path, tiny: Tiny) -> None:
    train(tiny(steps=1, precision="bf16"), tmp_path)
    trainer = prepare(resume_config(tmp_path, {"precision": "fp32"}), resume_from=tmp_path)
    assert [group["compute_dtype"] for group in trainer.optimizer.param_groups] == [None, None]


def test_a_folder_in_which_another_process_trains(tmp_path: Path, tiny: Tiny) -> None:
    """Their checkpoints would take turns."""
    handle = os.open(tmp_path, os.O_RDONLY)
    fcntl.flock(handle, fcntl.LOCK_EX)
    with pytest.raises(
        UserError, match=f"another process trains in {tmp_path}: wait for it, or give another"
    ):
        train(tiny(steps=1), tmp_path)
    assert not any(tmp_path.iterdir())
    os.close(handle)
    train(tiny(steps=1), tmp_path)


def test_a_checkpoint_is_not_a_run_to_resume(tmp_path: Path, tiny: Tiny) -> None:
    """It would have been written to, creating a run inside a checkpoint with another run's config.json."""
    train(tiny(steps=1), tmp_path)
    with pytest.raises(UserError, match="step-00000001 is a checkpoint, not a run"):
        resume_config(checkpoint.newest_checkpoint(tmp_path), {})


def test_other_classes_and_another_runs_state_are_rejected_when_resuming(tmp_path: Path, tiny: Tiny) -> None:
    images, labels = torch.zeros(8, 1, 8, 8), torch.arange(8) % 2
    train(tiny(steps=1), tmp_path / "run", dataset=MemoryImages(images, labels, ["cat", "dog"]))
    config = resume_config(tmp_path / "run", {"steps": 2})
    renamed = MemoryImages(images, labels, ["cat", "wolf"])  # the same number, so that every shape fits
    with pytest.raises(UserError, match="trained on other classes"):
        train(config, tmp_path / "run", resume=True, dataset=renamed)
    newest = checkpoint.newest_checkpoint(tmp_path / "run")
    shutil.copy(newest / "weights.safetensors", newest / "state.safetensors")
    with pytest.raises(UserError, match=r"state\.safetensors does not belong to this run"):
        train(config, tmp_path / "run", resume=True, dataset=MemoryImages(images, labels, ["cat", "dog"]))


def test_resuming_with_other_images_says_that_their_order_is_new(
    tmp_path: Path, tiny: Tiny, caplog: pytest.LogCaptureFixture
) -> None:
    """More images of the same classes were read in another order, without a word."""
    for name in ("cat/1", "cat/2", "dog/3", "dog/4"):
        path = tmp_path / "photos" / f"{name}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("L", (8, 8)).save(path)
    run, photos = tmp_path / "run", tmp_path / "photos"
    train(tiny(steps=1, data=str(photos)), run)

    def resumed(steps: int) -> str:
        caplog.clear()
        train(resume_config(run, {"steps": steps}), run, resume=True)
        return caplog.text

    assert resumed(2) == ""
    (photos / "cat" / "1.png").rename(photos / "cat" / "5.png")
    assert f"{photos} has other images or labels than before: from here on the run sees them" in resumed(3)
    Image.new("L", (8, 8)).save(photos / "cat" / "6.png")
    assert f"{photos} has 5 images, not 4 as before: from here on" in resumed(4)
    assert resumed(5) == ""


def test_resuming_a_finished_run_says_that_nothing_is_trained(
    tmp_path: Path, tiny: Tiny, caplog: pytest.LogCaptureFixture
) -> None:
    """Settings given with --resume seemed to be accepted, and pmf sample used the old ones."""
    train(tiny(steps=1), tmp_path)
    assert not caplog.text
    assert train(resume_config(tmp_path, {"sample_omega": 1.5}), tmp_path, resume=True).step == 1
    assert f"{tmp_path} has reached its --steps or --minutes: nothing is trained" in caplog.text


def test_user_made_folders_beside_the_checkpoints_are_ignored(tmp_path: Path) -> None:
    for name in ("step-00000002", "step-00000010", "step-00000010-good"):
        (tmp_path / "checkpoints" / name).mkdir(parents=True)
    found = checkpoint.checkpoint_folders(tmp_path)
    assert [path.name for path in found] == ["step-00000002", "step-00000010"]


def test_a_setting_of_the_wrong_type_in_config_json_is_a_user_error(tiny: Tiny) -> None:
    content = tiny().to_json()
    content["data"]["batch_size"] = "many"
    with pytest.raises(UserError, match="--batch-size must be a whole number, got 'many'"):
        TrainConfig.from_json(content)


def test_an_image_found_damaged_while_training_costs_no_step(
    tmp_path: Path, tiny: Tiny, monkeypatch: pytest.MonkeyPatch
) -> None:
    for index in range(40):
        path = tmp_path / "images" / str(index % 2) / f"{index}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.effect_noise((16, 16), 80).save(path)
    monkeypatch.setattr("pmf.data.datasets._CACHE_BYTES", 0)  # read from files, as a large folder is
    config = tiny(data=str(tmp_path / "images"), steps=50, cooldown=0.0)
    expected = train(config.with_settings(steps=10)).model.position
    damaged = tmp_path / "images" / "1" / "7.png"
    whole = damaged.read_bytes()
    damaged.write_bytes(whole[:-60])
    with pytest.raises(UserError, match=r"7\.png is truncated or damaged"):
        train(config, tmp_path / "run")
    assert 0 <= int(checkpoint.newest_checkpoint(tmp_path / "run").name[5:]) <= 5
    damaged.write_bytes(whole)
    result = train(resume_config(tmp_path / "run", {"steps": 10}), tmp_path / "run", resume=True)
    assert torch.equal(result.model.position, expected)


class Board:
    """Stands in for TensorBoard's SummaryWriter and records its calls."""

    def __init__(self) -> None:
        self.scalars: dict[str, list[int]] = {}
        self.pictures: list[tuple[int, ...]] = []

    def add_scalar(self, name: str, value: float, step: int) -> None:
        assert math.isfinite(value)
        self.scalars.setdefault(name, []).append(step)

    def add_image(self, name: str, picture: torch.Tensor, step: int) -> None:
        self.pictures.append((step, *picture.shape[:1]))

    def close(self) -> None:
        self.scalars["closed"] = []


def test_tensorboard_gets_losses_and_pictures_where_it_is_installed(
    tmp_path: Path, tiny: Tiny, monkeypatch: pytest.MonkeyPatch
) -> None:
    board = Board()
    monkeypatch.setattr("pmf.training.log._tensorboard", lambda folder, step: board)
    train(tiny(steps=4, sample_every=2), tmp_path)
    losses = ("loss/u", "loss/v", "loss/perceptual", "grad_norm")
    speed = ("lr", "images_per_second", "waiting_for_data", "memory_mib")
    assert board.scalars == {**dict.fromkeys((*losses, *speed), [2, 4]), "closed": []}
    assert board.pictures == [(2, 1), (4, 1), (4, 1)]


def test_minutes_end_a_run(tiny: Tiny) -> None:
    result = train(tiny(steps=None, minutes=0.01))
    assert result.step >= 1 and 0.6 <= result.seconds < 10


def test_a_run_without_an_end_is_rejected(tiny: Tiny) -> None:
    with pytest.raises(UserError, match="--steps or --minutes"):
        train(tiny(steps=None))


def test_checkpointing_and_padded_rows_change_no_loss(tmp_path: Path, tiny: Tiny) -> None:
    rows = []
    for name, settings in {"plain": {}, "saving": {"checkpointing": "blocks", "row_multiple": 3}}.items():
        train(tiny(steps=4, log_every=1, **settings), tmp_path / name)
        lines = (tmp_path / name / "log.jsonl").read_text().splitlines()
        rows.append([(json.loads(line)["loss_u"], json.loads(line)["loss_v"]) for line in lines])
    for plain, saving in zip(*rows, strict=True):
        assert saving == pytest.approx(plain, rel=1e-4)
    assert prepare(tiny(checkpointing="blocks", precision="bf16")).computing.checkpointing == "blocks"


def test_a_run_that_would_not_evaluate_is_refused(tiny: Tiny) -> None:
    """Only the command has a judge: the settings had no effect in Python."""
    with pytest.raises(UserError, match=r"train\(\) does not evaluate: leave out evaluate_every"):
        train(tiny(evaluate_every=1, evaluate_reference="digits", evaluate_features="pixels"))
