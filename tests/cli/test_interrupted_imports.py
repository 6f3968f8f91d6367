"""Ctrl-C while the command ``pmf`` imports its modules, before ``main`` could catch it."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from helpers.pmf_process import environment

CTRL_C = """
import importlib.abc, os, signal, sys

signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs ignore it


class AtImport(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name == {module!r}:
            os.kill(os.getpid(), signal.SIGINT)


sys.meta_path.insert(0, AtImport())
"""
AS_SCRIPT = "import sys; sys.argv[0] = '/usr/bin/pmf'; from pmf.cli import main; sys.exit(main())"


def interrupted(folder: Path, module: str, *words: str) -> "subprocess.CompletedProcess[str]":
    """A Python process that receives Ctrl-C when it begins to import the module."""
    (folder / "sitecustomize.py").write_text(CTRL_C.format(module=module))
    variables = environment()
    variables["PYTHONPATH"] = os.pathsep.join((str(folder), variables["PYTHONPATH"]))
    return subprocess.run(
        [sys.executable, *words], env=variables, capture_output=True, text=True, timeout=120, check=False
    )


@pytest.mark.parametrize(
    ("module", "words"),
    [
        ("pmf.env", ["-m", "pmf", "env"]),  # before torch
        ("pmf.env", ["-c", AS_SCRIPT, "env"]),
        ("pmf.cli.evaluate", ["-m", "pmf", "env"]),
    ],
)
def test_the_command_ends_quietly(tmp_path: Path, module: str, words: list[str]) -> None:
    done = interrupted(tmp_path, module, *words)
    assert (done.returncode, done.stdout, done.stderr) == (130, "", "")


def test_other_programs_are_interrupted_as_usual(tmp_path: Path) -> None:
    done = interrupted(tmp_path, "pmf.env", "-c", "import pmf")
    assert done.returncode not in (0, 130) and "KeyboardInterrupt" in done.stderr
