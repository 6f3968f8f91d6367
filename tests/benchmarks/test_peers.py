"""The Triton baseline is correct at every length and width; Triton's interpreter runs it without a GPU."""

import os
import subprocess
import sys

import pytest
from helpers.pmf_process import environment

CHECK = """
import sys, torch
sys.path.insert(0, {folder!r})
from peers.attention_jvp import attention_jvp
from pmf.check.tolerance import relative_error
from pmf.reference import attention_jvp as exactly

torch.manual_seed(0)
for length in (1, 17, 64, 276):
    for width in (32, 64, 80):
        inputs = [torch.randn(1, 1 if length > 64 else 2, length, width) for _ in range(6)]
        found = attention_jvp(*inputs)
        error = relative_error(found, exactly(*[x.double() for x in inputs]))
        assert error < 1e-5, (length, width, error)
inputs = [torch.randn(1, 1, 33, 16).half() for _ in range(6)]
error = relative_error(attention_jvp(*inputs), exactly(*[x.double() for x in inputs]))
assert error < 1e-3, ("float16", error)
print("right")
"""


def test_triton_baseline():
    pytest.importorskip("triton", reason="triton is not installed")
    import plain_port

    script = CHECK.format(folder=os.path.dirname(plain_port.__file__))
    done = subprocess.run(
        [sys.executable, "-c", script],
        env={**environment(), "TRITON_INTERPRET": "1"},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0 and done.stdout.strip() == "right", done.stderr
