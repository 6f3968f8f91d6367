"""The CUDA ops' launch plans, checked against the compiled kernels. No GPU is needed."""

import dataclasses
import itertools
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from helpers.machine_code import MachineCode, absent, tool
from helpers.occupancy import A100, H100, RTX_3090, Gpu, blocks_per_processor

from pmf import _library
from pmf.ops import _flops

GPUS = {"A100": A100, "RTX 3090": RTX_3090, "H100": H100}
DTYPES = ("bfloat16", "float16", "float32")
PMF_B16 = [(768, 768)] * 102 + [(768, 2048)] * 36 + [(2048, 768)] * 36 + [(768, 256)] * 4
"""The matrices of pMF-B/16 that Muon updates."""

Plan = dict[str, Any]


@pytest.fixture(scope="module")
def plans() -> ModuleType:
    module = _library.introspection()
    if module is None:
        absent(_library.missing() or "portable wheel: it has no introspection module")
    if not module.build_facts()["has_cuda"]:
        absent("this build of pmf has no CUDA kernels")
    return module


@pytest.fixture(scope="module")
def code(plans: ModuleType) -> MachineCode:
    if tool("cuobjdump") is None:
        absent("there is no cuobjdump to read machine code with: pip install nvidia-cuda-cuobjdump")
    return MachineCode(Path(_library.LIBRARY))


def device(gpu: Gpu) -> dict[str, Any]:
    return {
        "shared_per_block": gpu.shared_per_block,
        "shared_per_processor": gpu.shared,
        "processors": gpu.processors,
        "compute_capability": gpu.capability,
    }


def attention(
    plans: ModuleType, gpu: Gpu, heads: int, queries: int, keys: int, width: int, **more: Any
) -> Plan:
    sizes = {"batch": 1, "heads": heads, "key_heads": heads, "queries": queries, "keys": keys}
    return plans.attention_launches(**sizes, width=width, value_width=width, **more, **device(gpu))


def patch_embed(plans: ModuleType, gpu: Gpu, **more: Any) -> Plan:
    """pMF-B/16 at 256 x 256, a batch of 64."""
    sizes = {"batch": 64, "channels": 3, "height": 256, "width": 256, "patch": 16, "narrow": 256}
    return plans.patch_embed_launches(**sizes, wide=768, prefix=20, **more, **device(gpu))


def every_plan(plans: ModuleType, gpu: Gpu) -> list[Plan]:
    """The plans of all ops that have them, at many sizes."""
    both = (False, True)
    found = [
        attention(plans, gpu, heads, n, n, width, dtype=dtype, backward=backward, tangent=tangent)
        for heads, n, width in itertools.product((2, 3072), (1, 17, 276, 1024), (32, 64, 72, 80, 128, 256))
        for dtype, backward, tangent in itertools.product(DTYPES, both, both)
    ]
    found += [
        plans.newton_schulz_launches(
            shapes=[(64, 48), (2730, 1024)], dtype=dtype, compute_dtype=compute, muon=muon, **device(gpu)
        )
        for dtype, compute, muon in itertools.product(DTYPES, DTYPES, both)
    ]
    found += [
        patch_embed(plans, gpu, dtype=dtype, tangents=tangents, backward=backward)
        for dtype, tangents, backward in itertools.product(DTYPES, (0, 64), both)
    ]
    return found


@pytest.mark.parametrize("name", GPUS)
def test_plans_fit_the_compiled_kernels(plans: ModuleType, code: MachineCode, name: str) -> None:
    """A launch is within its kernel's limits, and as many blocks fit on a multiprocessor as it assumes."""
    gpu = GPUS[name]
    usage, planned = code.usage(gpu.architecture), set()
    for launch in (each for plan in every_plan(plans, gpu) for each in plan["launches"]):
        kernel = code.hosts[launch["kernel"]]
        threads, shared = launch["threads"], launch["shared_bytes"] + usage[kernel].shared
        assert 1 <= threads <= code.bounds[kernel].threads, kernel
        blocks = blocks_per_processor(gpu, threads, usage[kernel].registers, shared)
        # Registers are allocated for large devices: on a small one, shared memory may fit fewer blocks.
        counted = launch["blocks_per_processor"] if gpu is not RTX_3090 else 1
        assert blocks >= max(1, counted), (kernel, launch)
        planned.add(kernel)
    assert len(planned) > 60


def test_276_tokens_leave_no_warp_idle(plans: ModuleType) -> None:
    """Blocks of 48 or 96 queries make 288 of a head's 276, and several share a multiprocessor."""
    for tangent in (False, True):
        (launch,) = attention(plans, A100, 3072, 276, 276, 64, tangent=tangent)["launches"]
        assert launch["blocks"] * launch["tile"][0] == 3072 * 288, launch
        assert launch["blocks_per_processor"] >= 2


def test_only_an_h100_runs_its_own_kernels(plans: ModuleType, code: MachineCode) -> None:
    """sm_90a's code runs on 9.0 alone, and a B200 has as much shared memory."""
    for gpu, own in ((H100, True), (dataclasses.replace(H100, capability=(10, 0)), False)):
        (launch,) = attention(plans, gpu, 3072, 276, 276, 64, dtype="bfloat16", tangent=True)["launches"]
        assert ("hopper" in code.hosts[launch["kernel"]]) == own


def test_a_step_of_muon_is_twenty_launches(plans: ModuleType) -> None:
    plan = plans.newton_schulz_launches(shapes=PMF_B16, dtype="float32", muon=True)
    assert len(plan["launches"]) == 20
    assert sum(launch["tile"] == (128, 256) for launch in plan["launches"]) == 17


def test_the_patch_embedding_is_one_kernel_where_it_fits(plans: ModuleType) -> None:
    """Apart from the prefix: both products in 112 KB, or one after the other."""
    kernels = [len(patch_embed(plans, gpu)["launches"]) - 1 for gpu in (H100, A100, RTX_3090)]
    assert kernels == [1, 1, 2]


def test_flops_match_the_flop_counter(plans: ModuleType) -> None:
    def meta(*shape: int) -> torch.Tensor:
        return torch.empty(shape, device="meta")

    x, rest = meta(1, 4, 276, 80), (None, False, 1.0)
    attention_flops = {
        (False, False): _flops.FORMULAS["attention_forward"](x, x, x, *rest),
        (False, True): _flops.FORMULAS["attention_jvp_forward"](x, x, x, x, x, x, *rest),
        (True, False): _flops.FORMULAS["attention_backward"](x, x, x, x, x, *rest),
        (True, True): _flops.FORMULAS["attention_jvp_backward"](x, x, x, x, x, x, x, x, x, *rest),
    }
    for (backward, tangent), flops in attention_flops.items():
        plan = attention(plans, H100, 4, 276, 276, 80, backward=backward, tangent=tangent)
        assert plan["flops"] == flops
    images, down, up = meta(64, 3, 256, 256), meta(256, 3, 16, 16), meta(768, 256)
    assert patch_embed(plans, H100)["flops"] == _flops.FORMULAS["patch_embed"](images, down, None, up)
    for method in ("auto", "direct", "gram"):
        plan = plans.newton_schulz_launches(shapes=[(768, 768), (2048, 768)], method=method)
        assert plan["flops"] == sum(
            _flops.orthogonalisation_flops(768, n, method=method) for n in (768, 2048)
        )


@pytest.mark.parametrize(
    ("wrong", "sentence"),
    [
        ({"width": 300}, "widths must be 1 to 256"),
        ({"key_heads": 3}, "heads must be a multiple of key_heads"),
        ({"dtype": "float64"}, "float64 has no CUDA kernels"),
        ({"shared_per_block": 48 * 1024}, "shared_per_block must be at least 101376 bytes"),
    ],
)
def test_impossible_requests_are_rejected(plans: ModuleType, wrong: dict[str, Any], sentence: str) -> None:
    sizes = {"batch": 1, "heads": 4, "key_heads": 4, "queries": 5, "keys": 5, "width": 64, "value_width": 64}
    with pytest.raises(ValueError, match=sentence):
        plans.attention_launches(**{**sizes, **wrong})
