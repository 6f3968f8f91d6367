"""``pmf bench``: time the kernels against their peers."""

import argparse

from pmf.cli.arguments import Commands, Parser


def add_parser(commands: Commands) -> None:
    """Add the command to the help of ``pmf``; `run` receives its arguments unparsed."""
    parser = commands.add_parser("bench", help="time the kernels against torch", add_help=False)
    parser.set_defaults(run=_run_parsed)


def run(words: list[str]) -> int:
    """Pass the arguments to pmf.bench, which has its own flags and help."""
    from pmf.bench import main

    return main(words, Parser)


def _run_parsed(arguments: argparse.Namespace) -> int:
    return run([])
