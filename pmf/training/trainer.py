"""One training step of a pixel MeanFlow model, and everything a run has to remember between two steps."""

import contextlib
import copy
from pathlib import Path
from typing import Any

import torch

from pmf import checkpoint, models, optim
from pmf.data import ImageDataset, ShuffledStream
from pmf.devices import find_device, has_bf16_products
from pmf.errors import UserError
from pmf.training.building import build_objective, build_optimizer, model_config
from pmf.training.compiling import compiled, compiling
from pmf.training.config import TrainConfig
from pmf.training.packing import pack, unpack


class Trainer:
    """Model, objective, optimizer, averaged weights, data order and random state of one run.

    The weights are float32. With precision bf16 a bfloat16 copy computes, its gradients go to the float32
    master weights, and the optimizer and the averages see those alone. With compile the copy, or the model
    itself, computes through torch.compile; pictures are drawn without it.
    """

    def __init__(self, config: TrainConfig, dataset: ImageDataset) -> None:
        self.device = find_device(config.run.device)
        if config.run.precision == "auto":  # settled here, so that the saved settings say what was computed
            config = config.with_settings(precision="bf16" if has_bf16_products(self.device) else "fp32")
        self.config, self.dataset = config, dataset
        self.step, self.seconds = 0, 0.0
        try:
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(config.run.seed)
                network = model_config(config, len(dataset.class_names))
                self.model = models.PixelMeanFlow(network).to(self.device)
            self.model.checkpointing = config.run.checkpointing
            self.objective = build_objective(config, self.model.config.noise_scale)
            self.optimizer = build_optimizer(config, self.model)
        except ValueError as error:
            raise UserError(str(error)) from error
        self.full_rates = [group["lr"] for group in self.optimizer.param_groups]
        self.ema = optim.EMA(self.model, config.optimizer.ema_half_lives if config.optimizer.ema else ())
        self.computing = self.model
        if config.run.precision == "bf16":
            self.computing = copy.deepcopy(self.model).to(torch.bfloat16)
        self.network = compiled(self.computing) if config.run.compile else self.computing
        self.generator = torch.Generator().manual_seed(config.run.seed)
        self.stream = ShuffledStream(dataset, config.data.batch_size, config.run.seed)

    def train_step(self, rate: float = 1.0) -> torch.Tensor:
        """One step at ``rate`` times the learning rates; returns loss, loss_u, loss_v as [3], not synced."""
        images, labels = self.stream.next_batch()
        images, labels = images.to(self.device), labels.to(self.device)
        draws = self.objective.draw(images, labels, self.generator)
        self._refresh_computing_weights()
        with compiling() if self.config.run.compile else contextlib.nullcontext():
            terms = self.objective(self.network, images, labels, draws)
            terms.loss.backward()
        self._gather_gradients()
        for group, full_rate in zip(self.optimizer.param_groups, self.full_rates, strict=True):
            group["lr"] = full_rate * rate
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.ema.update(len(labels))
        self.step += 1
        return torch.stack([terms.loss.detach(), terms.loss_u.detach(), terms.loss_v.detach()])

    def averaged_model(self, half_life: float) -> models.PixelMeanFlow:
        """A copy of the model with the averaged weights of one half-life, in eval mode.

        Where no averages are kept, with the weights themselves.
        """
        averaged = copy.deepcopy(self.model)
        if self.config.optimizer.ema:
            checkpoint.assign_weights(averaged, self.ema.weights(half_life), Path("ema"))
        return averaged.eval().requires_grad_(False)

    def _refresh_computing_weights(self) -> None:
        if self.computing is not self.model:
            with torch.no_grad():
                torch._foreach_copy_(list(self.computing.parameters()), list(self.model.parameters()))

    def _gather_gradients(self) -> None:
        if self.computing is not self.model:
            for master, low in zip(self.model.parameters(), self.computing.parameters(), strict=True):
                master.grad = None if low.grad is None else low.grad.to(master.dtype)
                low.grad = None

    def weights(self) -> dict[str, torch.Tensor]:
        """The float32 weights by name."""
        return {name: parameter.detach() for name, parameter in self.model.named_parameters()}

    def state(self) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
        """All that resuming needs besides the weights: tensors, and a JSON-able header."""
        tensors = {"generator": self.generator.get_state()}
        header = {
            "step": self.step,
            "seconds": self.seconds,
            "position": self.stream.position,
            "optimizer": pack(self.optimizer.state_dict(), "optimizer", tensors),
            "ema_updates": self.ema.updates,
        }
        return tensors, header

    def load(self, folder: Path) -> None:
        """Continue from a checkpoint folder; UserError where it is damaged or of another model."""
        weights, about = checkpoint.read_tensors(folder / "weights.safetensors")
        if about.get("class_names") != self.dataset.class_names:
            raise UserError(
                f"{folder} was trained on other classes than those of {self.config.data.data} now: "
                "put the images back as they were"
            )
        checkpoint.assign_weights(self.model, weights, folder / "weights.safetensors")
        state = folder / "state.safetensors"
        tensors, header = checkpoint.read_tensors(state)
        try:
            for half_life in self.ema.half_lives:
                file = folder / checkpoint.ema_file(half_life)
                self.ema.load_weights(half_life, checkpoint.read_tensors(file)[0])
            self.optimizer.load_state_dict(unpack(header["optimizer"], tensors))
            for group in self.optimizer.param_groups:  # the state brings its own, and --precision may change
                group["compute_dtype"] = self.optimizer.defaults["compute_dtype"]
            self.ema.updates = header["ema_updates"]
            self.generator.set_state(tensors["generator"])
            self.stream.position = header["position"]
            self.step, self.seconds = header["step"], header["seconds"]
        except (KeyError, TypeError, ValueError, RuntimeError) as error:
            raise UserError(f"{state} does not belong to this run ({error}): remove {folder}") from error
