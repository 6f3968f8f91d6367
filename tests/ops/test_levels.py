"""Which tests of repeated code are dropped: only those that run elsewhere too."""

import importlib.util
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

HERE = Path(__file__)


def collected(*tests: tuple[str, str, torch.dtype]) -> list[Any]:
    """Tests of (op, level, dtype)."""
    return [
        SimpleNamespace(
            nodeid=f"tests/ops/test_{op}.py::test[{level}-{dtype}]",
            path=HERE,
            callspec=SimpleNamespace(params={"level": level, "dtype": dtype}),
        )
        for op, level, dtype in tests
    ]


def dropped(items: list[Any]) -> list[str]:
    spec = importlib.util.spec_from_file_location("conftest_of_ops", HERE.with_name("conftest.py"))
    assert spec is not None and spec.loader is not None
    conftest = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(conftest)
    gone: list[Any] = []
    hook = SimpleNamespace(pytest_deselected=lambda items: gone.extend(items))
    conftest.pytest_collection_modifyitems(SimpleNamespace(hook=hook), items)
    return [item.callspec.params["level"] for item in gone]


@pytest.mark.parametrize(
    ("op", "dtype", "repeated"),
    [
        ("rms_norm", torch.float32, ["avx512_bf16", "amx_bf16"]),
        ("rms_norm", torch.bfloat16, ["amx_bf16"]),
        ("attention", torch.float16, ["avx512_bf16", "amx_bf16"]),
        ("attention", torch.bfloat16, []),
        ("newton_schulz", torch.bfloat16, []),
    ],
)
def test_a_level_is_dropped_beside_the_one_that_runs_its_code(op, dtype, repeated) -> None:
    levels = ("portable", "avx2", "avx512", "avx512_bf16", "amx_bf16")
    assert dropped(collected(*[(op, level, dtype) for level in levels])) == repeated


@pytest.mark.parametrize("level", ["avx512_bf16", "amx_bf16"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_only_level_is_kept(level: str, dtype: torch.dtype) -> None:
    """patch_embed's tests take one CPU level, the highest: on some processors all of them were dropped."""
    assert dropped(collected(("patch_embed", level, dtype), ("patch_embed", "emulated", dtype))) == []
