"""``pmf report``: a run as one HTML file."""

import argparse
import importlib.util
from pathlib import Path

from pmf.atomic import write_file
from pmf.cli.arguments import Commands
from pmf.errors import UserError

_DESCRIPTION = """Write one HTML file about a run: samples over time, curves, speed, machine and settings.

The file contains everything it shows and opens without a network. It is written to the current directory, as
NAME-report.html, unless --out says otherwise; the run is not modified. A run that is still training can be
reported as well.

  pmf report runs/00000-digits
"""


def add_parser(commands: Commands) -> None:
    """Register the command."""
    parser = commands.add_parser("report", help="write a run as one HTML file", description=_DESCRIPTION)
    parser.add_argument("run_folder", metavar="run", type=Path, help="run folder")
    parser.add_argument("--out", type=Path, metavar="FILE", help="file to write (NAME-report.html)")
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    """Write the report, and say where it is."""
    folder: Path = arguments.run_folder
    if importlib.util.find_spec("matplotlib") is None:
        raise UserError("pmf report needs matplotlib, which is not installed: pip install matplotlib")
    if not folder.is_dir():
        raise UserError(f"there is no run folder {folder}")
    out: Path = arguments.out or Path(f"{folder.resolve().name}-report.html")
    if out.resolve().is_relative_to(folder.resolve()):
        raise UserError(f"{out} lies inside the run, which is not modified: give --out outside {folder}")
    from pmf.pages.report import write_report

    content = write_report(folder)
    try:
        write_file(out, content.encode(errors="replace"))
    except OSError as error:
        raise UserError(f"cannot write {out}: {error.strerror or error}") from error
    print(f"report: {out}")
    return 0
