"""The training run: budget, log, sample grids, checkpoints, resuming and clean stops."""

import contextlib
import fcntl
import json
import logging
import math
import os
import resource
import shlex
import shutil
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from tqdm import tqdm

from pmf import checkpoint, optim
from pmf.atomic import write_file, write_folder
from pmf.checkpoint import sharded
from pmf.data import ImageDataset, load_dataset
from pmf.errors import UserError
from pmf.interrupts import catch_stop_signals
from pmf.models import PixelMeanFlow
from pmf.ranks import Ranks
from pmf.training.building import model_config
from pmf.training.config import OptimizerSettings, TrainConfig, flag, settings
from pmf.training.folders import refuse_changes
from pmf.training.log import BEST, RunLog, add_environment, read_best
from pmf.training.parallel import whole
from pmf.training.pictures import draw_samples
from pmf.training.trainer import COLUMNS, Trainer

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class TrainResult:
    """The result of a finished or interrupted run."""

    model: PixelMeanFlow  # with the weight average that the run samples from, in eval mode
    step: int
    seconds: float
    interrupted: bool
    picture: Path | None  # grid of one-step samples, if the run has a folder


def train(
    config: TrainConfig,
    out: Path | None = None,
    *,
    resume: bool = False,
    progress: bool = False,
    dataset: ImageDataset | None = None,
) -> TrainResult:
    """Train until ``config.run.steps`` or ``config.run.minutes`` is reached, whichever comes first.

    out: run folder for config, log, grids and checkpoints; without it nothing is written.
    resume: continue from the newest checkpoint in ``out``; on a CPU, with as many threads as
        before, bit-identical to a run without the stop.
    dataset: used instead of the one named by ``config.data``.

    Nothing is evaluated: give `Run` a judge (`pmf.evaluation.Judge`) for that, as ``pmf train`` does.

    Raises UserError for unusable settings or data, a non-finite loss, or a full disk.
    """
    if config.evaluation.evaluate_every is not None:
        raise UserError("train() does not evaluate: leave out evaluate_every, or use the command pmf train")
    trainer = prepare(config, resume_from=out if resume else None, dataset=dataset)
    return Run(trainer, out, progress).run()


def prepare(
    config: TrainConfig,
    *,
    resume_from: Path | None = None,
    dataset: ImageDataset | None = None,
    ranks: Ranks | None = None,
) -> Trainer:
    """Open the data, build the model and, when resuming, load the run's newest checkpoint; writes nothing.

    ranks: the ranks of the run (`pmf.ranks`); all of them must call this.
    """
    ranks = ranks or Ranks()
    ranks.require_same(
        "their settings", {flag(s.name): getattr(getattr(config, g), s.name) for g, s in settings()}
    )
    if resume_from is not None:
        ranks.together(lambda: refuse_changes(resume_from, config))
    trainer = ranks.together(lambda: _prepare(config, dataset, ranks, resume_from is None))
    ranks.require_same("their images", {"classes": trainer.dataset.class_names, **trainer.images()})
    if resume_from is not None:
        newest = ranks.together(lambda: checkpoint.newest_checkpoint(resume_from))
        ranks.require_same("what to resume", {"newest checkpoint": newest.name})
        ranks.together(lambda: trainer.load(newest))
    return trainer


def _prepare(config: TrainConfig, dataset: ImageDataset | None, ranks: Ranks, fresh: bool) -> Trainer:
    if config.run.steps is None and config.run.minutes is None:
        raise UserError("the run has no end: give --steps or --minutes")
    if dataset is None:
        model = model_config(config, num_classes=1)  # image size and channels; the classes come from the data
        dataset = load_dataset(config.data.data, model.image_size, model.channels)
    return Trainer(config, dataset, ranks, fresh=fresh)


class Run:
    """Drives a `Trainer` to the end of its budget, one per rank; the first rank writes the files."""

    def __init__(
        self,
        trainer: Trainer,
        out: Path | None,
        progress: bool,
        evaluate: Callable[[PixelMeanFlow, int], float] | None = None,
    ) -> None:
        """evaluate: the distance of a model's samples at a step, lower is better; called by all ranks."""
        self.trainer, self.config, self.out, self.progress = trainer, trainer.config, out, progress
        self.ranks = trainer.ranks
        self.log: RunLog | None = None
        self.first_step, self.first_second = trainer.step, trainer.seconds
        shape = (self.config.run.log_every, len(COLUMNS))
        self.losses = torch.zeros(shape, dtype=torch.float32, device=trainer.device)
        self.waited = 0.0  # seconds spent waiting for data since the losses were last read
        self.logged_second = trainer.seconds
        self.rate = 0.0
        self.unread = 0  # rows of losses not yet read
        self.shown = ""  # losses shown in the progress bar
        self.evaluate = evaluate if out is not None else None
        self.score = ""  # newest distance shown in the progress bar
        self.best = None if out is None else read_best(out, trainer.step, self.config.evaluation)

    def run(self) -> TrainResult:
        trainer, config = self.trainer, self.config
        if self.out is not None and self._spent() >= 1:
            _log.warning(
                "%s has reached its --steps or --minutes: nothing is trained, and its checkpoints keep their "
                "settings; give more to continue",
                self.out,
            )
        try:
            with (
                self._files(),
                self._alone(),
                self._progress_bar() as bar,
                catch_stop_signals(twice=self.ranks.size == 1) as stop,
            ):
                if self.out is not None and self.ranks.first:
                    write_file(self.out / "config.json", _json_bytes(config))
                    add_environment(self.out, trainer.step, str(trainer.device), self.ranks.size)
                    self.log = RunLog(self.out, trainer.step)
                started = time.monotonic() - trainer.seconds
                while not self._stops(stop) and self._spent() < 1:
                    self.rate = learning_rate_factor(config.optimizer, trainer.step, self._spent())
                    self.losses[self.unread] = self._train_step(self.rate)
                    self.unread += 1
                    trainer.seconds = time.monotonic() - started
                    if self.unread == config.run.log_every:
                        self._read_losses()
                    self._advance(bar)
                    if self.out is not None and trainer.step % config.run.checkpoint_every == 0:
                        self.save()
                    if self.out is not None and trainer.step % config.sampling.sample_every == 0:
                        self._draw(self.out / "samples" / f"{trainer.step:08d}.png")
                    if trainer.step % (config.evaluation.evaluate_every or trainer.step + 1) == 0:
                        self._evaluate()
                self._read_losses()
                interrupted = self._stops(stop)
                picture = self._finish()
        finally:
            if self.log is not None:
                self.log.close()
        model = trainer.averaged_model(config.sampling.sample_ema)
        return TrainResult(model, trainer.step, trainer.seconds, interrupted, picture)

    def _train_step(self, rate: float) -> torch.Tensor:
        """Run one step; if an image turns out to be unreadable, no earlier step is lost."""
        began = time.monotonic()
        try:
            self.ranks.together(self.trainer.fetch)
            self.waited += time.monotonic() - began
        except UserError:
            self.trainer.put_back()
            if self.out is not None:
                self.save()
            raise
        return self.trainer.train_step(rate)

    def _stops(self, stop: threading.Event) -> bool:
        """Whether any rank was told to stop; also synchronises elapsed time over the ranks."""
        told, self.trainer.seconds = self.ranks.maximum(float(stop.is_set()), self.trainer.seconds)
        return told > 0

    def save(self) -> Path:
        """Write a checkpoint of the current step and drop the oldest; UserError if writing fails."""
        assert self.out is not None
        trainer, folder = self.trainer, checkpoint.step_folder(self.out, self.trainer.step)
        if self.ranks.from_first(folder.is_dir()):
            return folder
        self._read_losses()
        self.ranks.together(self._refuse_broken_weights)
        try:
            if self.ranks.size > 1:
                sharded.save(folder, *trainer.shared_state(), _json_bytes(self.config))
            else:
                write_folder(folder, self._checkpoint_files())
        except OSError as error:
            raise UserError(
                f"cannot save the checkpoint of step {trainer.step} to {folder}: {error.strerror or error}; "
                f"{self._last_checkpoint()}; make room and continue with {_resume(self.out)}"
            ) from error
        self._drop_old_checkpoints()
        return folder

    def _drop_old_checkpoints(self) -> None:
        if self.ranks.first and self.out is not None:
            for old in checkpoint.checkpoint_folders(self.out)[: -self.config.run.keep_checkpoints]:
                if self.best is None or checkpoint.step_of(old) != self.best["step"]:
                    shutil.rmtree(old, ignore_errors=True)

    def _evaluate(self) -> None:
        """Evaluate samples of the weight average; save and keep the best checkpoint so far."""
        if self.evaluate is None:
            return
        trainer = self.trainer
        distance = self.evaluate(trainer.averaged_model(self.config.sampling.sample_ema), trainer.step)
        if self.log is not None:
            self.log.add_score(trainer.step, trainer.stream.position, trainer.seconds, distance)
        if self.best is None or distance < self.best["frechet_distance"]:
            self.best = {"step": trainer.step, "frechet_distance": distance}
            self.save()
            if self.ranks.first and self.out is not None:
                write_file(self.out / BEST, (json.dumps(self.best) + "\n").encode())
            self._drop_old_checkpoints()
        self.score = f", distance {distance:.4g}, best {self.best['frechet_distance']:.4g}"

    def _checkpoint_files(self) -> Iterator[tuple[str, bytes]]:
        """The files one at a time, so that at most one copy of the weights is in memory."""
        trainer = self.trainer
        yield from self._weights_files()
        yield "state.safetensors", checkpoint.tensors_bytes(*trainer.state())
        yield "config.json", _json_bytes(self.config)

    def _weights_files(self) -> Iterator[tuple[str, bytes]]:
        """The full weights and averages; all ranks gather them, the first receives the bytes."""
        trainer, names = self.trainer, self.trainer.dataset.class_names
        files = {"weights.safetensors": trainer.weights()}
        for half_life in trainer.ema.half_lives:
            files[checkpoint.ema_file(half_life)] = trainer.ema.weights(half_life)
        for name, weights in files.items():
            gathered = whole(weights)
            if self.ranks.first:
                yield name, checkpoint.weights_bytes(gathered, trainer.model.config, names)

    def _finish(self) -> Path | None:
        if self.out is None:
            return None
        folder = self.save()
        if self.ranks.size > 1:
            for name, content in self._weights_files():
                write_file(folder / name, content)
        return self._draw(self.out / "samples.png")

    def _draw(self, path: Path) -> Path:
        model = self.trainer.averaged_model(self.config.sampling.sample_ema)
        if self.log is not None:
            self.log.add_picture(self.trainer.step, draw_samples(model, self.config.run.seed, path))
            self.log.draw_plot()
        return path

    def _read_losses(self) -> None:
        """Fetch the losses since the last read: one device synchronisation per log_every steps."""
        if self.unread == 0:
            return
        rows, self.unread = self.ranks.mean(self.losses[: self.unread].cpu()), 0
        losses, trainer = rows[:, :-1], self.trainer
        finite = losses.isfinite()
        if not finite.all():
            first = int(finite.all(dim=1).int().argmin())
            step = trainer.step - len(rows) + first + 1
            term = next(i for i in (1, 2, 3, 0) if not finite[first, i])
            found = losses[first, term].item()
            raise self._diverged(f"the loss became {found} at step {step} (term {COLUMNS[term]})")
        means = dict(zip(COLUMNS, losses.mean(dim=0).tolist(), strict=False))
        del means["loss"]
        norms = rows[:, -1]
        if not norms.isnan().all():
            means["grad_norm"] = norms.nanmean().item()
        seconds, self.logged_second = trainer.seconds - self.logged_second, trainer.seconds
        if self.log is not None:
            images = len(rows) * self.config.data.batch_size
            self.log.add(
                trainer.step,
                trainer.stream.position,
                trainer.seconds,
                losses=means,
                lr=self._full_rate * self.rate,
                images_per_second=images / seconds if seconds > 0 else 0.0,
                waiting_for_data=min(1.0, self.waited / seconds) if seconds > 0 else 0.0,
                memory_mib=peak_memory(trainer.device) / 2**20,
            )
        self.waited = 0.0
        self.shown = f", loss_u {means['loss_u']:.4f}, loss_v {means['loss_v']:.4f}"

    @property
    def _full_rate(self) -> float:
        """The learning rate of the matrices before warm-up and decay."""
        rate: float = getattr(self.config.optimizer, self.config.optimizer.main_rate)
        return rate

    def _refuse_broken_weights(self) -> None:
        for name, weight in self.trainer.weights().items():
            if not optim.local(weight).isfinite().all():
                raise self._diverged(f"the weights {name} are no longer finite at step {self.trainer.step}")

    def _diverged(self, what: str) -> UserError:
        rate, name = self._full_rate, flag(self.config.optimizer.main_rate)
        clip = "" if self.config.optimizer.clip_grad_norm else " or --clip-grad-norm 1"
        advice = f"train again with a learning rate below {name} {rate:g}{clip}"
        if self.out is not None and checkpoint.checkpoint_folders(self.out):
            advice = f"continue with {_resume(self.out)} {name} {rate / 2:g}{clip}"
        return UserError(f"{what}; {self._last_checkpoint()}; {advice}")

    def _last_checkpoint(self) -> str:
        folders = [] if self.out is None else checkpoint.checkpoint_folders(self.out)
        return f"the last good checkpoint is {folders[-1]}" if folders else "no checkpoint had been saved"

    def _spent(self) -> float:
        """The fraction of the budget used so far."""
        run, trainer = self.config.run, self.trainer
        by_steps = trainer.step / run.steps if run.steps else 0.0
        by_time = trainer.seconds / (60 * run.minutes) if run.minutes else 0.0
        return max(by_steps, by_time)

    @contextlib.contextmanager
    def _files(self) -> Iterator[None]:
        """Turn a failed write into a UserError that names the file and the last checkpoint."""
        try:
            yield
        except OSError as error:
            name = error.filename or self.out
            raise UserError(
                f"cannot write {name}: {error.strerror or error}; {self._last_checkpoint()}"
            ) from error

    @contextlib.contextmanager
    def _alone(self) -> Iterator[None]:
        """Keep other processes from writing to the run folder; UserError on every rank if one does."""
        folder = None if self.out is None or not self.ranks.first else self.out

        def lock() -> int | None:
            if folder is None:
                return None
            with self._files():  # on every rank
                folder.mkdir(parents=True, exist_ok=True)
                handle = os.open(folder, os.O_RDONLY)
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError as error:
                os.close(handle)
                raise UserError(
                    f"another process trains in {folder}: wait for it, or give another --out"
                ) from error
            except OSError:  # a file system without locks
                pass
            return handle

        handle = self.ranks.together(lock)
        try:
            yield
        finally:
            if handle is not None:
                os.close(handle)

    def _progress_bar(self) -> "tqdm[None]":
        return tqdm(
            total=100.0,
            initial=min(100.0, 100 * self._spent()),
            disable=not (self.progress and self.ranks.first),
            bar_format="{percentage:3.0f}%|{bar}| {elapsed} elapsed, {remaining} left{postfix}",
            mininterval=0.5,
        )

    def _advance(self, bar: "tqdm[None]") -> None:
        steps, seconds = self.trainer.step - self.first_step, self.trainer.seconds - self.first_second
        speed = f"step {self.trainer.step}, {steps / seconds:.1f} steps/s"
        bar.set_postfix_str(speed + self.shown + self.score, refresh=False)
        bar.update(min(100.0, 100 * self._spent()) - bar.n)


def learning_rate_factor(settings: OptimizerSettings, step: int, spent: float) -> float:
    """The factor on the learning rates before step `step` (from 0).

    spent: fraction of the run's budget used so far. The warm-up min(1, (step + 1) / warmup_steps) multiplies
    constant:  1, decaying linearly to 0 over the last `cooldown` fraction
    cosine:    (1 + cos(pi spent)) / 2
    linear:    1 - spent
    """
    left = max(0.0, 1 - spent)
    warmup = min(1.0, (step + 1) / settings.warmup_steps) if settings.warmup_steps else 1.0
    if settings.schedule == "cosine":
        return warmup * (1 - math.cos(math.pi * left)) / 2
    if settings.schedule == "linear":
        return warmup * left
    return warmup * (1.0 if settings.cooldown == 0 else min(1.0, left / settings.cooldown))


def peak_memory(device: torch.device) -> int:
    """Peak memory in bytes: of the GPU as torch reports it, otherwise of the process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def _resume(run: Path) -> str:
    """The command that resumes a run, for a shell: paths may contain spaces."""
    return f"pmf train --resume {shlex.quote(str(run))}"


def _json_bytes(config: TrainConfig) -> bytes:
    return (json.dumps(config.to_json(), indent=2) + "\n").encode()
