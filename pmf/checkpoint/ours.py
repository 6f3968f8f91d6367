"""Weights on disk: this project's safetensors files and the authors' PyTorch state dicts.

A run writes its checkpoints to ``<run>/checkpoints/step-<number>/``::

    weights.safetensors     the trained weights, fp32
    ema-<H>.safetensors     a weight average with half-life H in thousands of images
    state.safetensors       what resuming needs: optimizer, random generator, position in the data
    config.json             every setting of the run

A sharded run writes shards instead of the first three (`pmf.checkpoint.sharded`), and complete weights files
at the end of the run.

The header of each weights file contains the model configuration, so that the file can be moved and loaded on
its own. A checkpoint becomes visible when a complete, synced and verified folder is renamed: a crash, a kill
or a full disk leaves a folder ``.step-<number>.partial`` and all earlier checkpoints intact.
"""

import dataclasses
import json
import os
import pickle
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
import torch

from pmf import models
from pmf.checkpoint import sharded
from pmf.errors import UserError
from pmf.optim import fill
from pmf.wrappers import by_plain_names, plain_names

_FORMAT = "pixelmeanflow-1"
_STEP_PREFIX = "step-"
BUILT_IN = {path.stem: path for path in sorted((Path(__file__).parent / "built_in").glob("*.safetensors"))}
"""Trained checkpoints that are installed with the package, by name; a JSON file beside each is its record."""
_V_HEAD = ("v_head", "v_final")  # prefixes of its weights' names, in our files and the authors'

PathLike = str | os.PathLike[str]
Tensors = Mapping[str, torch.Tensor]


@dataclass(frozen=True)
class LoadedModel:
    """A model with its weights, its class names, and the file they came from."""

    model: models.PixelMeanFlow
    class_names: list[str]
    path: Path
    part: str | None = None
    """Which weights of a sharded checkpoint, whose path is its header: "weights" or "ema-<H>"."""


def load_checkpoint(
    path: PathLike, ema: str | None = None, *, noise_scale: float | None = None, v_head: bool = True
) -> models.PixelMeanFlow:
    """Build the model in ``path`` and load its weights, ready to sample (eval mode, fp32, CPU).

    path: a run folder (its newest checkpoint is used), a checkpoint folder, a ``.safetensors`` file of this
    project, or the authors' ``.pth`` / ``.pt`` state dict, read with ``weights_only=True``. If there is no
    such path, the name of a built-in checkpoint: "digits".
    ema: for a folder, the weights to load: a half-life in thousands of images ("500"), or "none" for the
    trained weights; by default the average that the run samples from.
    noise_scale: for the authors' files whose shape matches no preset, since the weights do not determine it.
    v_head: False omits the head that only training needs, a third of pMF-B's weights.

    Raises UserError if the file is missing, truncated, contains more than tensors, or does not fit its model.
    """
    return load_model(path, ema, noise_scale=noise_scale, v_head=v_head).model


def load_model(
    path: PathLike, ema: str | None = None, *, noise_scale: float | None = None, v_head: bool = True
) -> LoadedModel:
    """Like `load_checkpoint`, but also returns the class names."""
    path = Path(path)
    if not path.exists():  # the user's folder or file takes precedence
        path = BUILT_IN.get(str(path), path)
    file = _choose_file(path, ema)
    if file.parent.name == sharded.SHARDS:
        loaded = _load_sharded(file.parent.parent, file.name, v_head)
        _check_noise_scale(noise_scale, loaded.model.config, loaded.path)
        return loaded
    if file.suffix == ".safetensors":
        tensors, header = read_tensors(file, skip=() if v_head else _V_HEAD)
        config, class_names = described_model(header, file)
        _check_noise_scale(noise_scale, config, file)
    else:
        tensors = official_weights(file, v_head)
        unseen = {} if noise_scale is None else {"noise_scale": noise_scale}
        try:
            config = models.config_from_state_dict(tensors, **unseen)
        except (ValueError, KeyError, IndexError) as error:
            raise UserError(f"{file} does not hold a pixel MeanFlow model: {error}") from error
        class_names = [str(index) for index in range(config.num_classes)]
    if not v_head:
        config = dataclasses.replace(config, v_head=False)
    model = _empty_model(config)
    assign_weights(model, tensors, file)
    return LoadedModel(model.eval(), class_names, file)


def described_model(header: Mapping[str, Any], source: Path) -> tuple[models.ModelConfig, list[str]]:
    """The model configuration and class names in a checkpoint's header; UserError if they are invalid."""
    try:
        return models.ModelConfig(**header["model"]), list(map(str, header["class_names"]))
    except (TypeError, KeyError, ValueError) as error:
        raise UserError(
            f"{source} has no valid model configuration ({error}): use another checkpoint"
        ) from error


def _check_noise_scale(given: float | None, config: models.ModelConfig, file: Path) -> None:
    if given not in (None, config.noise_scale):
        raise UserError(
            f"--noise-scale is {given:g}, but {file} records {config.noise_scale:g}: leave it out"
        )


def _empty_model(config: models.ModelConfig) -> models.PixelMeanFlow:
    with torch.device("meta"):  # drawing random weights would take longer than reading the real ones
        model = models.PixelMeanFlow(config)
    return model.to_empty(device="cpu")


def _load_sharded(folder: Path, part: str, v_head: bool) -> LoadedModel:
    """Load one set of weights from a sharded checkpoint."""
    config, class_names = described_model(sharded.read_header(folder), folder)
    if not v_head:
        config = dataclasses.replace(config, v_head=False)
    model = _empty_model(config)
    weights = {f"{part}/{name}": parameter.detach() for name, parameter in model.named_parameters()}
    sharded.load_into(folder, weights, alone=True)
    return LoadedModel(model.eval(), class_names, folder / sharded.HEADER, part)


def assign_weights(model: torch.nn.Module, tensors: Tensors, source: Path) -> None:
    """Copy tensors into the parameters of the same names; UserError for the first that does not fit.

    Wrapper prefixes (`pmf.wrappers`) in the names of either side are ignored.
    """
    parameters, tensors = by_plain_names(dict(model.named_parameters())), by_plain_names(tensors)
    missing, extra = sorted(parameters.keys() - tensors.keys()), sorted(tensors.keys() - parameters.keys())
    if missing or extra:
        problem = f"lacks {missing[0]!r}" if missing else f"contains {extra[0]!r}, which the model lacks"
        raise UserError(f"{source} belongs to another model: it {problem}")
    for name, parameter in parameters.items():
        if tensors[name].shape != parameter.shape:
            raise UserError(
                f"{source} belongs to another model: {name!r} has shape {tuple(tensors[name].shape)} there "
                f"and {tuple(parameter.shape)} here"
            )
    with torch.no_grad():
        for name, parameter in parameters.items():
            fill(parameter, tensors[name])


def weights_bytes(weights: Tensors, config: models.ModelConfig, class_names: list[str]) -> bytes:
    """A weights file: the tensors, with a header from which `load_checkpoint` can build the model."""
    return tensors_bytes(weights, {"model": dataclasses.asdict(config), "class_names": class_names})


def tensors_bytes(tensors: Tensors, header: Mapping[str, Any]) -> bytes:
    """Tensors and a JSON header as a safetensors file."""
    plain = {name: tensor.detach().contiguous() for name, tensor in tensors.items()}
    return safetensors.torch.save(plain, {"format": _FORMAT, "header": json.dumps(header)})


def read_tensors(path: Path, skip: tuple[str, ...] = ()) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """Read the tensors and header written by `tensors_bytes`; UserError for a damaged or foreign file.

    Tensors whose names start with an entry of ``skip`` are not read.
    """
    _require_file(path)
    try:
        with safetensors.safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            names = list(file.keys())
            plain = zip(names, plain_names(names), strict=True)
            tensors = {name: file.get_tensor(name) for name, x in plain if not x.startswith(skip)}
    except (safetensors.SafetensorError, OSError) as error:
        raise UserError(
            f"{path} is truncated or not a safetensors file ({error}): copy it again, or use another"
        ) from error
    if metadata.get("format") != _FORMAT or "header" not in metadata:
        raise UserError(
            f"{path} was not written by pixelmeanflow, whose files say {_FORMAT!r} in their headers: give "
            "weights alone as a .pth file, written by torch.save(model.state_dict(), ...)"
        )
    try:
        header = json.loads(metadata["header"])
    except ValueError as error:
        raise UserError(f"{path} is damaged: its header is not JSON ({error})") from error
    return tensors, header


def read_official(path: Path) -> dict[str, torch.Tensor]:
    """Read the authors' state dict without running code in it; UserError if it contains more than tensors."""
    _require_file(path)
    try:
        # Memory-mapped, so unused tensors are not read; PyTorch's legacy format cannot be mapped.
        mapped = zipfile.is_zipfile(path)
        content = torch.load(path, map_location="cpu", weights_only=True, mmap=mapped)
    except pickle.UnpicklingError as error:
        raise UserError(
            f"{path} contains more than tensors, and loading it could run code: save model.state_dict() alone"
        ) from error
    except Exception as error:  # damaged bytes are read as any instruction
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise UserError(f"{path} is truncated or not a PyTorch file ({reason}): copy it again") from error
    if not isinstance(content, dict):
        raise UserError(f"{path} contains a {type(content).__name__}, not a state dict of tensors")
    for name, value in content.items():
        if not isinstance(name, str) or not isinstance(value, torch.Tensor):
            raise UserError(
                f"{path} contains {name!r} of type {type(value).__name__}: it must contain named tensors only"
            )
    return content


def official_weights(path: Path, v_head: bool = True) -> dict[str, torch.Tensor]:
    """The weights in the authors' state dict under our names, without the v head if it is not wanted.

    Raises UserError for another model's weights, and for weights that are not finite: every image would be
    black, and get a Frechet distance as if it were a sample.
    """
    given = by_plain_names(read_official(path))
    if not v_head:
        given = {key: x for key, x in given.items() if not key.removeprefix("net.").startswith(_V_HEAD)}
    try:
        weights = models.from_official(given)
    except ValueError as error:
        raise UserError(f"{path} does not hold a pixel MeanFlow model: {error}") from error
    for name, weight in weights.items():
        if not weight.float().isfinite().all():
            raise UserError(f"{path} has weights {name} that are not finite: use another checkpoint")
    return weights


def _require_file(path: Path) -> None:
    if not path.is_file():
        raise UserError(f"there is no checkpoint file {path}")


# Run folders


def checkpoint_folders(run: Path) -> list[Path]:
    """The complete checkpoints of a run, oldest first."""
    steps = {}
    for path in (run / "checkpoints").glob(f"{_STEP_PREFIX}*"):
        number = path.name.removeprefix(_STEP_PREFIX)
        if number.isdecimal() and path.is_dir():  # users keep copies with names such as step-00001000-good
            steps[int(number)] = path
    return [steps[number] for number in sorted(steps)]


def newest_checkpoint(run: Path) -> Path:
    """The newest complete checkpoint of a run folder, or ``run`` itself if it is a checkpoint folder."""
    if not run.is_dir():
        raise UserError(f"there is no run folder {run}")
    if (run / "weights.safetensors").is_file() or sharded.is_sharded(run):
        return run
    folders = checkpoint_folders(run)
    if not folders:
        is_run = (run / "config.json").is_file()
        what = (
            "wait for its first, or start it again with --out"
            if is_run
            else "give a folder written by pmf train"
        )
        raise UserError(f"{run} contains no complete checkpoint: {what}")
    return folders[-1]


def step_folder(run: Path, step: int) -> Path:
    """The folder of a step's checkpoint."""
    return run / "checkpoints" / f"{_STEP_PREFIX}{step:08d}"


def step_of(folder: Path) -> int:
    """The inverse of `step_folder`."""
    return int(folder.name.removeprefix(_STEP_PREFIX))


def ema_file(half_life: float) -> str:
    """The file name of the weight average with this half-life in thousands of images."""
    return f"ema-{half_life:g}.safetensors"


def _choose_file(path: Path, ema: str | None) -> Path:
    if not path.exists():
        raise UserError(f"there is no checkpoint {path}; built in: {', '.join(BUILT_IN)}")
    if path.is_file():
        if ema is not None:
            raise UserError(f"--ema selects weights in a checkpoint folder, but {path} is a file")
        return path
    folder = newest_checkpoint(path)
    if ema is None:
        try:
            settings = read_json(folder / "config.json")
            averaged = settings.get("optimizer", {}).get("ema", True)
            chosen = ema_file(settings["sampling"]["sample_ema"]) if averaged else "weights.safetensors"
        except (KeyError, TypeError, ValueError) as error:
            raise UserError(
                f"{folder / 'config.json'} lacks sampling.sample_ema: select weights with --ema"
            ) from error
    elif ema == "none":
        chosen = "weights.safetensors"
    else:
        chosen = f"ema-{ema}.safetensors"
    if not (folder / chosen).is_file() and sharded.is_sharded(folder):
        part, parts = chosen.removesuffix(".safetensors"), list(sharded.parts(folder))
        if part in parts:
            return folder / sharded.SHARDS / part
        known = sorted(part.removeprefix("ema-") for part in parts[1:])
        raise UserError(f"{folder} has no {part}: --ema can be none, {', '.join(known)}")
    if not (folder / chosen).is_file():
        known = sorted(file.stem.removeprefix("ema-") for file in folder.glob("ema-*.safetensors"))
        raise UserError(f"{folder} has no {chosen}: --ema can be none, {', '.join(known)}")
    return folder / chosen


def trained_settings(file: Path) -> dict[str, Any]:
    """The settings that the weights in a file were trained with, as in config.json; empty if unknown."""
    if file in BUILT_IN.values():
        settings: dict[str, Any] = read_json(file.with_suffix(".json"))["settings"]
        return settings
    path = file.with_name("config.json")
    return read_json(path) if path.is_file() else {}


def without_repeats(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """A JSON object, as `json.loads` calls it; ValueError for a key that occurs twice: the last would win."""
    content = dict(pairs)
    if len(content) < len(pairs):
        keys = [key for key, _ in pairs]
        raise ValueError(f"{next(key for key in keys if keys.count(key) > 1)!r} occurs twice")
    return content


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON object; UserError if the file is missing or damaged. Windows begins UTF-8 with a mark."""
    try:
        content = json.loads(path.read_text(encoding="utf-8-sig"), object_pairs_hook=without_repeats)
    except (OSError, ValueError) as error:
        raise UserError(f"{path} cannot be read ({error}): repair it, or use another") from error
    if not isinstance(content, dict):
        raise UserError(f"{path} must contain a JSON object")
    return content
