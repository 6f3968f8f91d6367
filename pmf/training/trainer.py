"""A training step of a pixel MeanFlow model, and all state that persists between steps."""

import contextlib
import copy
import dataclasses
import logging
import os
from pathlib import Path
from typing import Any

import torch

from pmf import checkpoint, flow, models, optim
from pmf.checkpoint import sharded
from pmf.data import ImageDataset, ShuffledStream, to_float
from pmf.data.labels import UNLABELLED
from pmf.devices import find_device, has_bf16_products
from pmf.errors import UserError
from pmf.ranks import Ranks
from pmf.training.building import build_objective, build_optimizer, model_config
from pmf.training.compiling import compiled, compiling
from pmf.training.config import TrainConfig
from pmf.training.gradients import average_gradients, clip_gradients
from pmf.training.initial import initialise
from pmf.training.packing import pack, unpack
from pmf.training.parallel import check_parts, shard_model, slice_draws, whole

_log = logging.getLogger(__name__)

COLUMNS = ("loss", "loss_u", "loss_v", "loss_perceptual", "grad_norm")
"""The numbers that a step returns."""


class Trainer:
    """Model, objective, optimizer, weight averages, data order and random state of one run.

    The weights are float32. With precision bf16, forward and backward run on a bfloat16 copy; its gradients
    go to the float32 master weights, the only ones the optimizer and the averages see. With compile,
    torch.compile wraps the copy, or the model itself; sample grids are drawn without it.

    Every rank makes the random draws of the whole batch and takes every size-th image of it, so losses and
    mean gradients equal those of a single process up to the order of summation. The same holds for the
    micro-batches of gradient accumulation (accumulate).
    """

    def __init__(
        self, config: TrainConfig, dataset: ImageDataset, ranks: Ranks | None = None, *, fresh: bool = True
    ) -> None:
        """fresh: start from scratch; a trainer that will `load` a checkpoint skips --init-from."""
        self.ranks = ranks or Ranks()
        self.device = find_device(self.ranks.device(config.run.device))
        if config.run.precision == "auto":  # resolved here, so that the saved settings state what was used
            config = config.with_settings(precision="bf16" if has_bf16_products(self.device) else "fp32")
        if len(dataset.class_names) == 1:
            config = _without_guidance(config, dataset.class_names[0])
        self.config, self.dataset = config, dataset
        self.sharded = self.ranks.size > 1 and config.run.parallel == "fsdp"
        check_parts(config, self.ranks.size)
        self.step, self.seconds = 0, 0.0
        try:
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(config.run.seed)
                network = model_config(config, len(dataset.class_names))
                self.model = models.PixelMeanFlow(network).to(self.device)
            self.initial: list[str] = []
            if config.run.init_from is not None and fresh:
                self.initial = initialise(
                    self.model, Path(os.path.expanduser(config.run.init_from)), dataset.class_names
                )
            self.model.checkpointing = config.run.checkpointing
            if self.sharded:
                shard_model(self.model, config.run.precision)
            self.objective = build_objective(config, self.model.config.noise_scale)
            if self.sharded:
                self.objective = dataclasses.replace(self.objective, even_passes=True)
            self.optimizer = build_optimizer(config, self.model, self.ranks.size > 1 and not self.sharded)
        except ValueError as error:
            raise UserError(str(error)) from error
        self.full_rates = [group["lr"] for group in self.optimizer.param_groups]
        self.ema = optim.EMA(self.model, config.optimizer.ema_half_lives if config.optimizer.ema else ())
        self.computing = self.model
        if config.run.precision == "bf16" and not self.sharded:
            self.computing = copy.deepcopy(self.model).to(torch.bfloat16)
        self.network = compiled(self.computing) if config.run.compile else self.computing
        self.generator = torch.Generator("cpu").manual_seed(config.run.seed)
        self.stream = ShuffledStream(
            dataset, config.data.batch_size, config.run.seed, rank=self.ranks.rank, ranks=self.ranks.size
        )
        self._fetched: tuple[torch.Tensor, torch.Tensor] | None = None

    def fetch(self) -> None:
        """Read this rank's images for the next step, unless already read; UserError if one is damaged."""
        if self._fetched is None:
            self._fetched = self.stream.next_batch()

    def put_back(self) -> None:
        """Discard images that no step has used, so that a checkpoint starts with them."""
        if self._fetched is not None:
            self.stream.position -= self.config.data.batch_size
            self._fetched = None

    def train_step(self, rate: float = 1.0) -> torch.Tensor:
        """Run one step at ``rate`` times the learning rates; returns the numbers in `COLUMNS` without a sync.

        The losses are means over this rank's images. grad_norm is the norm of the gradient averaged over all
        ranks, before clipping; without clipping it is computed only on steps that are logged, and NaN
        otherwise.
        """
        self.fetch()
        assert self._fetched is not None
        (images, labels), self._fetched = self._fetched, None
        draws = self._draw(images)
        self._refresh_computing_weights()
        parts = self.config.data.accumulate
        losses = torch.zeros(len(COLUMNS) - 1, dtype=torch.float32, device=self.device)
        for part in range(parts):
            if self.sharded:
                self.model.set_requires_gradient_sync(part == parts - 1)  # type: ignore[operator]
            rows = slice(part, None, parts)
            losses += self._backward(images[rows], labels[rows], slice_draws(draws, rows)) / parts
        for group, full_rate in zip(self.optimizer.param_groups, self.full_rates, strict=True):
            group["lr"] = full_rate * rate
        norm = self._clip_gradients()
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.ema.update(self.config.data.batch_size)
        self.step += 1
        return torch.cat((losses, norm.reshape(1)))

    def _clip_gradients(self) -> torch.Tensor:
        largest = self.config.optimizer.clip_grad_norm
        if largest is None and (self.step + 1) % self.config.run.log_every:
            return torch.full((), torch.nan, dtype=torch.float32, device=self.device)
        parameters = list(self.model.parameters())
        if self.ranks.size > 1:
            average_gradients(parameters, self.ranks.size)
        return clip_gradients(parameters, largest)

    def _draw(self, images: torch.Tensor) -> flow.Draws:
        """This rank's slice of the draws of the whole batch."""
        whole = torch.empty((), dtype=torch.float32, device="cpu")  # only its shape is used
        whole = whole.expand(self.config.data.batch_size, *images.shape[1:])
        draws = self.objective.draw(whole, whole, self.generator)
        return slice_draws(draws, slice(self.ranks.rank, None, self.ranks.size))

    def _backward(self, images: torch.Tensor, labels: torch.Tensor, draws: flow.Draws) -> torch.Tensor:
        """Accumulate the gradients of one micro-batch; returns its losses in the order of `COLUMNS`."""
        images, labels = images.to(self.device, non_blocking=True), labels.to(self.device, non_blocking=True)
        images = to_float(images)
        draws = draws._replace(noise=draws.noise.to(self.device, non_blocking=True))
        with compiling() if self.config.run.compile else contextlib.nullcontext():
            terms = self.objective(self.network, images, labels, draws)
            (terms.loss / self.config.data.accumulate).backward()
        self._gather_gradients()
        return torch.stack([getattr(terms, name).detach().float() for name in COLUMNS[:-1]])

    def averaged_model(self, half_life: float) -> models.PixelMeanFlow:
        """A copy of the model with the weight average of one half-life, in eval mode.

        Without averages, with the current weights.
        """
        weights = self.ema.weights(half_life) if self.config.optimizer.ema else self.weights()
        with torch.device("meta"):
            averaged = models.PixelMeanFlow(self.model.config)
        averaged = averaged.to_empty(device=self.device)
        checkpoint.assign_weights(averaged, whole(weights), Path("ema"))
        return averaged.eval().requires_grad_(False)

    def _refresh_computing_weights(self) -> None:
        if self.computing is not self.model:
            with torch.no_grad():
                torch._foreach_copy_(list(self.computing.parameters()), list(self.model.parameters()))

    def _gather_gradients(self) -> None:
        if self.computing is not self.model:
            for master, low in zip(self.model.parameters(), self.computing.parameters(), strict=True):
                if low.grad is not None:  # accumulated in float32
                    grad = low.grad.to(master.dtype)
                    master.grad = grad if master.grad is None else master.grad.add_(grad)
                low.grad = None

    def weights(self) -> dict[str, torch.Tensor]:
        """The float32 weights by name."""
        return {name: parameter.detach() for name, parameter in self.model.named_parameters()}

    def state(self) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
        """Everything that resuming needs besides the weights: tensors and a JSON-able header."""
        tensors = {"generator": self.generator.get_state()}
        header = {
            "step": self.step,
            "seconds": self.seconds,
            "position": self.stream.position,
            "optimizer": pack(self.optimizer.state_dict(), "optimizer", tensors),
            "ema_updates": self.ema.updates,
            "images": self.images(),
        }
        return tensors, header

    def shared_state(self) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
        """Everything that resuming needs, for a sharded checkpoint: live tensors and a JSON-able header."""
        tensors = {f"weights/{name}": weight for name, weight in self.weights().items()}
        for half_life in self.ema.half_lives:
            averages = self.ema.weights(half_life).items()
            tensors |= {f"ema-{half_life:g}/{name}": average for name, average in averages}
        tensors |= {f"optimizer/{name}": x for name, x in self.optimizer.named_state().items()}
        tensors["generator"] = self.generator.get_state()
        header = {
            "step": self.step,
            "seconds": self.seconds,
            "position": self.stream.position,
            "ema_updates": self.ema.updates,
            "model": dataclasses.asdict(self.model.config),
            "class_names": self.dataset.class_names,
            "images": self.images(),
            "half_lives": self.ema.half_lives,
        }
        return tensors, header

    def load(self, folder: Path) -> None:
        """Continue from a checkpoint folder; UserError if it is damaged or belongs to another model."""
        if sharded.is_sharded(folder):
            self._load_shared(folder)
            return
        weights, about = checkpoint.read_tensors(folder / "weights.safetensors")
        self._require_classes(about.get("class_names"), folder)
        checkpoint.assign_weights(self.model, weights, folder / "weights.safetensors")
        state = folder / "state.safetensors"
        tensors, header = checkpoint.read_tensors(state)
        try:
            for half_life in self.ema.half_lives:
                file = folder / checkpoint.ema_file(half_life)
                self.ema.load_weights(half_life, checkpoint.read_tensors(file)[0])
            self.optimizer.load_state_dict(unpack(header["optimizer"], tensors))
            for group in self.optimizer.param_groups:  # the saved state has its own; --precision may differ
                group["compute_dtype"] = self.optimizer.defaults["compute_dtype"]
            self.ema.updates = header["ema_updates"]
            self.generator.set_state(tensors["generator"])
            self.stream.position = header["position"]
            self.step, self.seconds = header["step"], header["seconds"]
            self._compare_images(header.get("images"))
        except (KeyError, TypeError, ValueError, RuntimeError) as error:
            raise UserError(f"{state} does not belong to this run ({error}): remove {folder}") from error

    def _load_shared(self, folder: Path) -> None:
        header = sharded.read_header(folder)
        self._require_classes(header.get("class_names"), folder)
        tensors, _ = self.shared_state()
        sharded.load_into(folder, tensors, alone=self.ranks.size == 1)
        self.generator.set_state(tensors["generator"])
        try:
            self.step, self.seconds = header["step"], header["seconds"]
            self.stream.position, self.ema.updates = header["position"], header["ema_updates"]
        except KeyError as error:
            raise UserError(f"{folder / sharded.HEADER} lacks {error}: use another checkpoint") from error
        self.optimizer.set_steps(self.step)
        self._compare_images(header.get("images"))

    def images(self) -> dict[str, Any]:
        """What determines the order of the images besides the seed."""
        fingerprint = getattr(self.dataset, "fingerprint", None)
        return {"number": len(self.dataset), "fingerprint": fingerprint}

    def _compare_images(self, before: dict[str, Any] | None) -> None:
        """Warn if the images of a checkpoint were others; those of earlier versions do not say."""
        now = self.images()
        if before is None or before == now:
            return
        what = "other images or labels than"
        if before["number"] != now["number"]:
            what = f"{now['number']} images, not {before['number']} as"
        _log.warning(
            "%s has %s before: from here on the run sees them in a new order, not in that of a run that "
            "never stopped",
            *(self.config.data.data, what),
        )

    def _require_classes(self, trained: object, folder: Path) -> None:
        if trained != self.dataset.class_names:
            raise UserError(
                f"{folder} was trained on other classes than {self.config.data.data} has now: "
                "restore the original images"
            )


def _without_guidance(config: TrainConfig, name: str) -> TrainConfig:
    """The settings for single-class data: there is nothing to guide towards, so omega is always 1."""
    found = "no classes" if name == UNLABELLED else f"one class, {name!r}"
    _log.warning("the images have %s: training is unconditional, guidance off", found)
    return config.with_settings(guidance=False, sample_omega=None, sample_interval=None)
