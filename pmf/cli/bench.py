"""``pmf bench``: time the kernels against their peers."""

import argparse

from pmf.cli.arguments import Commands, Parser


def add_parser(commands: Commands) -> None:
    """List the command in the help of ``pmf``; `run` gets its words unparsed."""
    parser = commands.add_parser("bench", help="time the kernels against torch", add_help=False)
    parser.set_defaults(run=_run_parsed)


def run(words: list[str]) -> int:
    """Hand the words to pmf.bench, which has its own flags and help."""
    from pmf.bench import main

    return main(words, Parser)


def _run_parsed(arguments: argparse.Namespace) -> int:
    return run([])
