"""Sample images from noise in one step or a few."""

import dataclasses
import itertools
from collections.abc import Sequence
from operator import attrgetter

import torch
from torch import Tensor, nn
from torch.nn.utils.parametrize import is_parametrized

from pmf.arguments import are_numbers, as_plain, is_number, is_whole
from pmf.defaults import home
from pmf.devices import has_bf16_products
from pmf.models import PixelMeanFlow, network_in
from pmf.nn import Block, Condition
from pmf.wrappers import by_plain_names, exchanges, unwrap, without_ddp

from .guidance import check_interval
from .path import over_pixels
from .preconditioner import Preconditioner
from .prediction import Prediction
from .read_out import ReadOut

__all__ = ["PRECISIONS", "Sampler", "sample", "sampling_times"]

PRECISIONS = ("auto", "bf16", "fp32")
_WIDE = 256  # narrower networks take only milliseconds per image in float32, and keep its precision


def sample(
    model: PixelMeanFlow,
    labels: Tensor | Sequence[int],
    steps: int = 1,
    omega: float | Sequence[float] | Tensor | None = None,
    interval: tuple[float, float] | None = None,
    noise: Tensor | None = None,
    generator: torch.Generator | None = None,
    *,
    times: Sequence[float] | None = None,
    precision: str = "auto",
    prediction: Prediction | str | None = None,
    preconditioner: Preconditioner | str | None = None,
) -> Tensor:
    """Images [B, C, H, W] for labels [B], around [-1, 1], not clipped; float32 (float64 for float64 models).

        z <- z - (t - r) u(z, t, r, omega, interval, label), t from 1 to 0 in `steps` equal parts

    times: explicit times instead of equal parts, from 1 down to 0: [1.0, 0.6, 0.0] are two steps. labels may
    contain num_classes, the null label. omega (a number or [B]) and interval default to the model's own.
    noise [B, C, H, W] is e itself, already multiplied by noise_scale; by default it is drawn from generator,
    on the generator's device or the CPU. prediction and preconditioner, objects or names as in `ModelConfig`,
    default to the model's own. precision is as for `Sampler`, whose weight conversion this function repeats
    on every call: for many batches create one Sampler.

    Raises ValueError or TypeError if an argument does not fit the model. Source: Lu et al., "One-step
    Latent-free Image Generation with Pixel Mean Flows" (2026).
    """
    sampler = Sampler(model, precision, prediction=prediction, preconditioner=preconditioner)
    return sampler(labels, steps, omega, interval, noise, generator, times=times)


class Sampler:
    """Samples batch after batch from one model, prepared once.

        sampler = Sampler(model)
        images = sampler(labels, generator=generator)      # arguments as for `sample`

    precision: "bf16" multiplies matrices in bfloat16 but keeps the residual stream in float32, since a
    bfloat16 stream alone would cost 4 to 6 dB; "fp32" computes in float32; "auto" uses the model's dtype, but
    bf16 for a float32 model at least 256 wide on a device with bfloat16 products (AVX512-BF16, AMX, a GPU
    from sm_80).

    model may be wrapped in DistributedDataParallel, `fully_shard` and torch.compile, nested in any order. For
    a sharded model, construction is collective and gathers a full copy; calls are then independent on each
    rank.

    Only the path to u is evaluated, in "bf16" and "fp32" from a copy of the weights that does not follow
    later changes of the model. A model is evaluated itself if "auto" finds a dtype other than float32, and in
    float32 if it is compiled, a subclass, or has hooks or parametrizations. Everything runs under
    torch.inference_mode, but the returned images are ordinary tensors.

    Raises ValueError for another precision.
    """

    network: PixelMeanFlow
    """The module that is evaluated. Can be replaced by a wrapped one, e.g. torch.compile(sampler.network)."""
    precision: str
    """What "auto" resolved to: "bf16", "fp32", or the model's own dtype."""

    def __init__(
        self,
        model: PixelMeanFlow,
        precision: str = "auto",
        *,
        prediction: Prediction | str | None = None,
        preconditioner: Preconditioner | str | None = None,
    ) -> None:
        if precision not in PRECISIONS:
            raise ValueError(f"sample: precision must be one of {', '.join(PRECISIONS)}, got {precision!r}")
        alone = without_ddp(model)
        model = network_in(model, "sample")
        own, device = model.position.dtype, model.position.device
        if precision == "auto" and own == torch.float32:
            is_wide = model.config.hidden_size >= _WIDE
            precision = "bf16" if is_wide and has_bf16_products(device) else "fp32"
        # Ranks sample independently: nothing that waits for other ranks is evaluated.
        self.network, self.precision = (model if exchanges(alone) else alone), precision
        if precision == "auto":
            self.precision = str(own).removeprefix("torch.")
            if exchanges(model):
                self.network = _copy_u_path(model, own)
        elif precision == "bf16":
            self.network = _copy_u_path(model, torch.bfloat16)
        elif (
            exchanges(model)
            or any(parameter.dtype != torch.float32 for parameter in model.parameters())
            or (self.network is model and _is_plain(model))
        ):
            self.network = _copy_u_path(model, torch.float32)
        self.read_out = ReadOut.of(model.config, prediction, preconditioner)

    def __call__(
        self,
        labels: Tensor | Sequence[int],
        steps: int = 1,
        omega: float | Sequence[float] | Tensor | None = None,
        interval: tuple[float, float] | None = None,
        noise: Tensor | None = None,
        generator: torch.Generator | None = None,
        *,
        times: Sequence[float] | None = None,
    ) -> Tensor:
        """Images [B, C, H, W]; arguments and result as for `sample`."""
        network = unwrap(self.network)
        config, device = network.config, network.position.device
        dtype = torch.float64 if network.position.dtype == torch.float64 else torch.float32
        labels = _check_labels(labels, config.num_classes).to(device)
        times = sampling_times(steps, times)
        interval = config.sample_interval if interval is None else as_plain(interval)
        check_interval("sample", interval)
        omega = _check_omega(config.sample_omega if omega is None else omega, len(labels)).to(dtype)
        shape = (len(labels), *config.image_shape)
        if noise is None:
            noise = torch.randn(shape, generator=generator, dtype=torch.float32, device=home(generator))
            noise = config.noise_scale * noise
        elif not isinstance(noise, Tensor):
            raise TypeError(f"sample: noise must be a tensor {list(shape)}, got {type(noise).__name__}")
        elif tuple(noise.shape) != shape:
            raise ValueError(f"sample: noise must be {list(shape)}, got {list(noise.shape)}")

        with torch.inference_mode():
            guidance = (
                torch.as_tensor(value, dtype=dtype, device=device).expand(len(labels))
                for value in (omega, *interval)
            )
            images = self._steps(noise.to(device, dtype), labels, times, *guidance)
        return images.clone()  # outside inference mode, because autograd rejects its tensors

    def _steps(
        self, z: Tensor, labels: Tensor, times: list[float], omega: Tensor, t_min: Tensor, t_max: Tensor
    ) -> Tensor:
        for start, end in itertools.pairwise(times):
            t = z.new_full((len(z),), start)
            h = z.new_full((len(z),), start - end)
            tokens = self._predict(
                self.read_out.network_input(z, t), Condition(h, omega, t_min, t_max, labels)
            )
            u = self.read_out.velocity(z, tokens, t)
            z = z - over_pixels(h) * u
        return z

    def _predict(self, images: Tensor, condition: Condition) -> Tensor:
        """The network's path to u: all the device work, with one shape for batches of one size."""
        with torch.autocast(images.device.type, torch.bfloat16, enabled=self.precision == "bf16"):
            return self.network(images, condition, heads="u", as_tokens=True).u


def sampling_times(steps: int, times: Sequence[float] | None = None) -> list[float]:
    """The times of a sampler's network evaluations, from 1 down to 0: `steps` equal parts, or those given.

    Raises ValueError if they do not descend from 1 to 0 or contradict steps.
    """
    if times is None:
        if not is_whole(steps) or steps < 1:
            raise ValueError(f"sample: steps must be a whole number of at least 1, got {steps!r}")
        return [i / steps for i in range(steps, -1, -1)]
    times = as_plain(times)
    if not are_numbers(times):
        raise ValueError(f"sample: times must be a list of numbers from 1 to 0, got {times!r}")
    chosen = [float(t) for t in times]
    if len(chosen) < 2 or chosen[0] != 1 or chosen[-1] != 0:
        raise ValueError(f"sample: times must begin with 1 and end with 0, got {chosen}")
    if not all(t > r for t, r in itertools.pairwise(chosen)):
        raise ValueError(f"sample: times must descend, got {chosen}")
    if steps not in (1, len(chosen) - 1):
        raise ValueError(
            f"sample: times describe {len(chosen) - 1} steps, not {steps}: give either times or steps"
        )
    return chosen


def _check_labels(labels: Tensor | Sequence[int], num_classes: int) -> Tensor:
    if not isinstance(labels, Tensor):
        try:
            plain = as_plain(labels)
            labels = torch.tensor(plain, device="cpu", dtype=None if len(plain) else torch.int64)
        except (TypeError, ValueError, RuntimeError):
            raise ValueError(f"sample: labels must be a list of integers [B], got {labels!r}") from None
    if labels.ndim != 1 or labels.dtype.is_floating_point or labels.dtype == torch.bool:
        raise ValueError(
            f"sample: labels must be a list of integers [B], got {labels.dtype} {list(labels.shape)}"
        )
    labels = labels.long()
    if len(labels) and not (0 <= int(labels.min()) and int(labels.max()) <= num_classes):
        raise ValueError(f"sample: labels must lie in 0..{num_classes} ({num_classes} is the null label)")
    return labels


def _check_omega(omega: float | Sequence[float] | Tensor, count: int) -> Tensor:
    if not isinstance(omega, Tensor):
        omega = as_plain(omega)
        if not (is_number(omega) or are_numbers(omega)):
            raise ValueError(f"sample: omega must be a finite number, or a list of them, got {omega!r}")
        omega = torch.tensor(omega, dtype=torch.float64, device="cpu")
    if omega.shape not in ((), (count,)):
        raise ValueError(
            f"sample: omega must be one number or one for each of the {count} labels, got {list(omega.shape)}"
        )
    # Reading numbers on another device would make the host wait.
    if omega.device.type == "cpu" and not ((omega >= 1) & omega.isfinite()).all():
        raise ValueError(
            f"sample: omega must be finite and at least 1 (1 is no guidance), got {omega.tolist()}"
        )
    return omega


def _is_plain(model: PixelMeanFlow) -> bool:
    """Whether a copy of the weights computes what the model does."""
    if type(model) is not PixelMeanFlow or model._compiled_call_impl is not None:
        return False
    modules = list(model.modules())
    hooked = any(module._forward_hooks or module._forward_pre_hooks for module in modules)
    return not hooked and not any(is_parametrized(module) for module in modules)


def _copy_u_path(model: PixelMeanFlow, matrices: torch.dtype) -> PixelMeanFlow:
    """The model without its v head: Linear layers in the dtype `matrices`, everything else in float32.

    The gates of the blocks' branches are multiplied into the matrices before rounding.
    """
    rest = torch.float64 if matrices == torch.float64 else torch.float32
    with torch.device("meta"):
        copy = PixelMeanFlow(dataclasses.replace(model.config, v_head=False)).to(rest)
    for module in copy.modules():
        if isinstance(module, nn.Linear):
            module.to(matrices)
        elif isinstance(module, Block):
            module.attn_scale = module.mlp_scale = None
    copy = copy.to_empty(device=model.position.device)
    weights = by_plain_names(dict(model.named_parameters()))
    with torch.no_grad():
        for name, parameter in copy.named_parameters():
            # Tied and parametrized weights are not listed by this name.
            value = _whole(weights[name] if name in weights else attrgetter(name)(model))
            for matrix, scale in Block.scaled.items():
                gate = weights.get(name.removesuffix(matrix) + scale) if name.endswith(matrix) else None
                if gate is not None:  # None in a network that was already folded
                    value = _whole(gate)[:, None] * value
            parameter.copy_(value)
    return copy.requires_grad_(False).eval()


def _whole(x: Tensor) -> Tensor:
    """Gather a sharded tensor (a collective call); return any other unchanged."""
    return x.full_tensor() if hasattr(x, "full_tensor") else x
