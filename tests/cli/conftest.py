"""Real processes of the command, on one thread and a network of a few thousand weights."""

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

TINY = (
    "--hidden-size 16 --depth 2 --head-depth 1 --num-heads 2 --bottleneck 4 --condition-tokens 1 1 1 1 1 "
    "--batch-size 8 --precision fp32 --ema-half-lives 0.01 0.02 --sample-ema 0.02"
).split()

RunPmf = Callable[..., "subprocess.CompletedProcess[str]"]


def environment() -> dict[str, str]:
    """Threads only wait for each other on work this small; a built source tree comes first."""
    root = str(Path(__file__).parents[2])
    paths = [root, os.environ.get("PYTHONPATH", "")]
    in_tree = (Path(root) / "pmf" / "libpmf.so").is_file()
    return os.environ | {"OMP_NUM_THREADS": "1"} | ({"PYTHONPATH": os.pathsep.join(paths)} if in_tree else {})


@pytest.fixture
def tiny_flags() -> list[str]:
    """Flags of the smallest network that is still a whole one."""
    return list(TINY)


@pytest.fixture
def run_pmf(tmp_path: Path) -> RunPmf:
    """Run ``python -m pmf WORDS`` in a fresh folder, optionally after a line of Python (``before``)."""

    def run(*words: str, before: str = "", timeout: float = 120) -> "subprocess.CompletedProcess[str]":
        code = f"{before}\nimport sys\nfrom pmf.cli import main\nsys.exit(main())"
        command = [sys.executable, "-c", code, *words]
        return subprocess.run(
            command,
            cwd=tmp_path,
            env=environment(),
            capture_output=True,
            text=True,
            timeout=timeout,
            check=False,
        )

    return run
