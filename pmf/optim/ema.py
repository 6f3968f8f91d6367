"""Exponential moving averages of the weights, with half-lives in images."""

import weakref
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from pmf import _library, checked, kernels
from pmf.arguments import are_numbers, as_plain, require_number
from pmf.ops._dispatch import register_fake
from pmf.ops._subclasses import require_trainable
from pmf.wrappers import by_plain_names, others

from ._cohort import local
from ._sharing import fill

__all__ = ["EMA"]

RAMP_UP = 0.05
"""Half-lives are at most this fraction of the images seen, so that averages forget the initial weights."""


class EMA:
    """Moving averages of a model's parameters, one per half-life.

        w <- d w + (1 - d) p,    d = 0.5^(B / min(H, 0.05 k B))

    at update k = 1, 2, ..., for a batch of B images and a half-life of H images.

    Args:
        model: a module, or (name, parameter) pairs. Buffers are not averaged. Names are those of the model
            inside DistributedDataParallel and torch.compile (`pmf.wrappers`).
        half_lives: in thousands of images, distinct, in any order.

    `updates` counts the updates. `copies[i]` maps each parameter's name to its average, in float32 (float64
    or complex if the parameter is), sharded like it. On a GPU one kernel updates all averages and reads each
    parameter once.

    Raises ValueError if a half-life is not positive or repeated, if a name is, or if there are no parameters;
    update and swapped_in raise RuntimeError if the module's parameters are no longer these.

    Source: Karras et al., "Analyzing and Improving the Training Dynamics of Diffusion Models" (2024).
    """

    def __init__(
        self,
        model: nn.Module | Iterable[tuple[str, Tensor]],
        half_lives: Sequence[float] = (500.0, 1000.0, 2000.0),
    ) -> None:
        named = model.named_parameters() if isinstance(model, nn.Module) else model
        pairs = list(named)
        if not all(isinstance(pair, (tuple, list)) and len(pair) == 2 for pair in pairs):
            raise TypeError("EMA: give the module, or its named_parameters(): averages are kept by name")
        for name, times in Counter(name for name, _ in pairs).items():
            if times > 1:
                raise ValueError(
                    f"EMA: two parameters are called {name}, and averages are kept by name: give names that "
                    "differ"
                )
        self._parameters = by_plain_names(dict(pairs))
        self._module = weakref.ref(model) if isinstance(model, nn.Module) else None
        self._swapped_in = False
        if not self._parameters:
            raise ValueError("EMA: there are no parameters to average")
        for name, p in self._parameters.items():
            require_trainable("EMA", name, p)
            if not (p.is_floating_point() or p.is_complex()):
                raise ValueError(f"EMA: {name} is {p.dtype}, which has no average: leave it out")
        half_lives = as_plain(half_lives)
        if not are_numbers(half_lives) or len(set(half_lives)) < len(half_lives):
            raise ValueError(f"EMA: half-lives must be a list of distinct numbers, got {half_lives!r}")
        for half_life in half_lives:
            require_number("EMA: a half-life", half_life, above=0)
        self.half_lives = tuple(map(float, half_lives))
        self.updates = 0
        self.copies = [{n: _precise(p).clone() for n, p in self._parameters.items()} for _ in self.half_lives]

    def decay(self, half_life: float, batch_size: int) -> float:
        """The decay d of the last update for a batch of `batch_size` images."""
        return 0.5 ** (batch_size / min(1000 * half_life, RAMP_UP * self.updates * batch_size))

    @torch._disable_dynamo  # a graph would bake in the decay of its first update
    @torch.no_grad()
    def update(self, batch_size: int) -> None:
        """Update the averages with the current parameters, after a step on `batch_size` images."""
        batch_size = as_plain(batch_size)
        require_number("EMA: batch_size", batch_size, above=0)
        if self._swapped_in:
            raise RuntimeError(
                "EMA: inside swapped_in, update would average the averages: call it afterwards"
            )
        self._require_the_same()
        self.updates += 1
        if not self.copies:
            return
        weights = [1 - self.decay(half_life, batch_size) for half_life in self.half_lives]
        parameters = [local(p.detach()) for p in self._parameters.values()]
        averages = [[local(average) for average in copy.values()] for copy in self.copies]
        if _kernel_takes(parameters, averages[0]):
            checked.remind(parameters[0])
            torch.ops.pmf.ema_update([a for copy in averages for a in copy], parameters, weights)
            return
        current = [p.to(average.dtype) for p, average in zip(parameters, averages[0], strict=True)]
        for copy, weight in zip(averages, weights, strict=True):
            torch._foreach_lerp_(copy, current, weight)

    def weights(self, half_life: float) -> dict[str, Tensor]:
        """The averages for one half-life by parameter name: the live tensors, not copies."""
        if half_life not in self.half_lives:
            raise ValueError(f"EMA: no average has half-life {half_life}; there are {list(self.half_lives)}")
        return self.copies[self.half_lives.index(half_life)]

    @contextmanager
    def swapped_in(self, half_life: float) -> Iterator[None]:
        """Temporarily replace the model's parameters with the averages, for sampling."""
        averages, before = self.weights(half_life), self._swapped_in
        self._require_the_same()
        with torch.no_grad():
            own = {n: p.clone() for n, p in self._parameters.items()}
            for n, p in self._parameters.items():
                p.copy_(averages[n])
        self._swapped_in = True
        try:
            yield
        finally:
            self._swapped_in = before
            with torch.no_grad():
                for n, p in self._parameters.items():
                    p.copy_(own[n])

    def _require_the_same(self) -> None:
        """Raise RuntimeError if the module has a parameter that is not averaged."""
        module = None if self._module is None else self._module()
        if module is None:
            return
        for name, _ in others(module, self._parameters.values()):
            raise RuntimeError(
                f"EMA: {name} was added or replaced after the EMA was created (loading with assign=True, "
                "sharding and parametrizations replace parameters): create it afterwards"
            )

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_module": None}

    def state_dict(self) -> dict[str, Any]:
        """Everything needed to continue exactly, in tensors, numbers, lists and dicts."""
        return {
            "updates": self.updates,
            "half_lives": list(self.half_lives),
            "copies": [dict(c) for c in self.copies],
        }

    @torch.no_grad()
    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from `state_dict()`. Raises ValueError if half-lives, names or shapes differ."""
        if missing := {"half_lives", "copies", "updates"} - set(state):
            raise ValueError(f"EMA: the saved state has no {min(missing)}: give what state_dict() returned")
        if tuple(state["half_lives"]) != self.half_lives:
            raise ValueError(
                f"EMA: the saved half-lives are {state['half_lives']}, not {list(self.half_lives)}"
            )
        for half_life, saved in zip(self.half_lives, state["copies"], strict=True):
            self._require_fit(half_life, by_plain_names(saved))  # before any is overwritten
        for half_life, saved in zip(self.half_lives, state["copies"], strict=True):
            self.load_weights(half_life, saved)
        self.updates = int(state["updates"])

    @torch.no_grad()
    def load_weights(self, half_life: float, weights: Mapping[str, Tensor]) -> None:
        """Overwrite the averages for one half-life. Raises ValueError if names or shapes differ."""
        weights = by_plain_names(weights)
        self._require_fit(half_life, weights)
        for name, average in self.weights(half_life).items():
            fill(average, weights[name])

    def _require_fit(self, half_life: float, weights: Mapping[str, Tensor]) -> None:
        averages = self.weights(half_life)
        for name in sorted(averages.keys() | weights.keys()):
            if _shape(averages, name) != _shape(weights, name):
                raise ValueError(
                    f"EMA: the saved averages belong to another model: {name} has shape "
                    f"{_shape(weights, name)}, not {_shape(averages, name)}"
                )


def _kernel_takes(parameters: Sequence[Tensor], averages: Sequence[Tensor]) -> bool:
    """Whether the CUDA kernel updates the averages: float32 ones on one GPU."""
    if any(average.dtype != torch.float32 for average in averages):
        return False
    if kernels.uses_reference("ema"):
        return False
    return len({p.device for p in parameters}) == 1 and all(
        _library.takes_cuda_kernel(p) and p.is_contiguous() and p.dtype != torch.float64 for p in parameters
    )


def _precise(parameter: Tensor) -> Tensor:
    parameter = parameter.detach()
    return parameter if parameter.dtype == torch.float64 or parameter.is_complex() else parameter.float()


def _shape(averages: Mapping[str, Tensor], name: str) -> list[int] | None:
    return list(averages[name].shape) if name in averages else None


register_fake("ema_update", lambda *_: None)
