"""``pmf check``: test every op on this machine."""

import argparse
import os
from pathlib import Path

from pmf.cli.arguments import Commands
from pmf.errors import UserError

_DESCRIPTION = """Test every op against float64, in every dtype and direction (value, tangent, gradients), on
every CPU level of this processor and on every GPU: about a minute.

Each line shows the largest error of a family as a multiple of its tolerance. Exit status 1 if anything is
wrong or could not be checked, with one sentence each. A GPU that passes is recorded; on other GPUs the first
op warns.
"""


def add_parser(commands: Commands) -> None:
    """Register the command."""
    parser = commands.add_parser(
        "check", help="test every op against float64 on this machine", description=_DESCRIPTION
    )
    parser.add_argument("families", nargs="*", metavar="OP", help="only these ops (default: all)")
    parser.add_argument("--device", help="only cpu, cuda or cuda:1 (default: the CPU and every GPU)")
    parser.add_argument("--out", type=Path, metavar="FILE", help="JSON file for the errors of every case")
    parser.add_argument("--quick", action="store_true", help="tiny cases: a few seconds")
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    """Check, print and record."""
    from pmf.check import report
    from pmf.check.table import FAMILIES

    for name in arguments.families:
        if name not in FAMILIES:
            raise UserError(f"there is no op {name!r} to check: choose from {', '.join(FAMILIES)}")
    if arguments.out is not None:
        _check_writable(arguments.out)
    places = report.find_places(arguments.device)
    size = "tiny" if arguments.quick else ""
    return report.run(places, tuple(arguments.families), size, arguments.out)


def _check_writable(out: Path) -> None:
    """Raise UserError now rather than after the check."""
    if out.is_dir():
        raise UserError(f"--out {out} is a folder: name a file")
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        if not os.access(out.parent, os.W_OK):
            raise PermissionError(f"{out.parent} is read-only")
    except OSError as error:
        raise UserError(f"--out {out} cannot be written: {error}") from error
