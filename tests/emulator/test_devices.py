"""Tensors on several devices, and devices or drivers that are too old: an error, never a wrong result."""

import dataclasses
import itertools
import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from helpers import emulator
from helpers.levels import at_level
from helpers.ops import CASES, Case

from pmf import ops

pytestmark = pytest.mark.skipif(emulator.why_not() is not None, reason=str(emulator.why_not()))


Call = tuple[Callable[..., Any], tuple[torch.Tensor, ...]]


def of_case(case: Case, form: str) -> Call:
    """The op's form ("plain" or "jvp") and its tensors, a mask last."""
    tensors = tuple(x.float() for x in (*case.args, *(case.directions() if form == "jvp" else ())))
    if "attn_mask" not in case.options:
        return getattr(case, form)(ops), tensors

    def masked(*args: torch.Tensor) -> Any:
        with_mask = dataclasses.replace(case, options={**case.options, "attn_mask": args[-1]})
        return getattr(with_mask, form)(ops)(*args[:-1])

    return masked, (*tensors, case.options["attn_mask"])


def update(average: torch.Tensor, parameter: torch.Tensor) -> None:
    torch.ops.pmf.ema_update([average], [parameter], [0.5])


def calls() -> dict[str, Call]:
    """Every op and its tensors, any of which may be on another device."""
    found = {name: of_case(case, "plain") for name, case in CASES.items()}
    found |= {name + "_jvp": of_case(case, "jvp") for name, case in CASES.items()}
    matrices = tuple(torch.randn(4, 6) for _ in range(3))
    found["newton_schulz"] = lambda *x: ops.newton_schulz(list(x)), matrices
    found["ema_update"] = update, matrices[:2]
    return found


CALLS = calls()


@pytest.mark.parametrize("device", ["cpu", "cuda:1"])
@pytest.mark.parametrize("name", CALLS)
def test_tensors_on_two_devices(name: str, device: str) -> None:
    function, tensors = CALLS[name]
    with at_level("emulated"):
        for x in tensors:
            before = emulator.launches()
            with (
                emulator.elsewhere(x, device=device),
                pytest.raises((ValueError, RuntimeError), match=r"on the same device, got|must be on a GPU"),
            ):
                function(*tensors)
            assert emulator.launches() == before


@pytest.mark.parametrize("name", CALLS)
def test_all_on_another_device(name: str) -> None:
    function, tensors = CALLS[name]
    with at_level("emulated"), emulator.elsewhere(*tensors, device="cuda:1"):
        function(*tensors)


number = itertools.count(2)  # a device is queried only once


@pytest.mark.parametrize(
    ("hardware", "message"),
    [
        ({"capability": (7, 5)}, "is sm_75 and the kernels need sm_80 (A100) or newer: use CPU tensors"),
        ({"capability": (7, 0), "driver": 13010}, "is sm_70 and the kernels need sm_80"),
        (
            {"driver": 12080},
            "driver supports CUDA 12.8 and pmf was compiled with CUDA 13.0: update",
        ),
        ({"driver": 0}, "no NVIDIA driver was found"),
    ],
)
def test_old_devices_and_drivers(hardware: dict[str, Any], message: str) -> None:
    index = next(number)
    with at_level("emulated"), emulator.hardware(index, **hardware):
        for name, (function, tensors) in CALLS.items():
            before = emulator.launches()
            op = name.removesuffix("_jvp")
            with (
                emulator.elsewhere(*tensors, device=f"cuda:{index}"),
                pytest.raises(RuntimeError, match=f"^{op}: .*{re.escape(message)}"),
            ):
                function(*tensors)
            assert emulator.launches() == before


def test_newer_devices_and_drivers_are_accepted() -> None:
    index = next(number)
    function, tensors = CALLS["swiglu"]
    with (
        at_level("emulated"),
        emulator.hardware(index, capability=(12, 0), driver=13020),
        emulator.elsewhere(*tensors, device=f"cuda:{index}"),
    ):
        function(*tensors)


def test_a_missing_device() -> None:
    function, tensors = CALLS["swiglu"]
    for device, message in (("cuda:40", "CUDA device 40 cannot be used"), ("cuda:64", "out of range")):
        with (
            at_level("emulated"),
            emulator.elsewhere(*tensors, device=device),
            pytest.raises(RuntimeError, match=f"swiglu: .*{message}"),
        ):
            function(*tensors)
