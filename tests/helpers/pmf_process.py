"""Run the command ``pmf`` in a real process, with one thread and a network of a few thousand weights."""

import os
import subprocess
import sys
from pathlib import Path

import pmf

TINY = (
    "--hidden-size 16 --depth 2 --head-depth 1 --num-heads 2 --bottleneck 4 --condition-tokens 1 1 1 1 1 "
    "--batch-size 8 --precision fp32 --ema-half-lives 0.01 0.02 --sample-ema 0.02"
).split()
"""Flags of the smallest complete network."""


def environment() -> dict[str, str]:
    """The tested pmf for the child process, on one thread: on work this small, two only wait."""
    paths = [str(Path(pmf.__file__).parents[1]), os.environ.get("PYTHONPATH", "")]
    return os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(filter(None, paths))}


def run_in(folder: Path, *words: str, before: str = "") -> "subprocess.CompletedProcess[str]":
    """Run ``pmf WORDS`` in a folder, after some lines of Python (``before``)."""
    code = f"{before}\nimport sys\nfrom pmf.cli import main\nsys.exit(main())"
    command = [sys.executable, "-c", code, *words]
    return subprocess.run(
        command, cwd=folder, env=environment(), capture_output=True, text=True, timeout=120, check=False
    )
