"""``pmf env``: the environment report for bug reports."""

import argparse

from pmf.cli.arguments import Commands


def add_parser(commands: Commands) -> None:
    """Register the command."""
    parser = commands.add_parser(
        "env",
        help="print versions, CPU level, GPU, and why a component is missing",
        description="Print what a bug report needs: versions, CPU level, GPU, why a component is missing.",
    )
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    """Print the report."""
    from pmf import env

    print(env.report())
    return 0
