"""``pmf``: train, sample, demo, report, evaluate, ablate, convert, flops, toy, bench, check and env."""

import sys
from collections.abc import Sequence

from pmf.interrupts import INTERRUPTED, quiet_imports

with quiet_imports():
    from pmf import _library, kernels
    from pmf.cli import ablate, bench, check, convert, demo, env, evaluate, flops, report, sample, toy, train
    from pmf.cli.arguments import Parser
    from pmf.cli.notes import notes_on_stderr
    from pmf.devices import is_out_of_memory
    from pmf.errors import UserError
    from pmf.version import VERSION

_NEED_KERNELS = ("train", "sample", "demo", "evaluate", "ablate", "flops", "toy", "bench", "check")
_DESCRIPTION = """Train Pixel MeanFlow models and sample images from them in one step.

  pmf sample digits                sample from the checkpoint that comes with pmf
  pmf train                        train on handwritten digits and save a grid of samples
  pmf sample runs/00000-digits     sample images and a grid from that run
  pmf COMMAND --help               all options of a command
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; 0 on success, 2 after ``error: <sentence>`` on stderr, 130 after an interruption."""
    words = list(sys.argv[1:] if argv is None else argv)
    try:
        asks_help = not {"-h", "--help"}.isdisjoint(words)
        if words and words[0] in _NEED_KERNELS and not asks_help:
            if why := _library.missing() or kernels.problem():
                raise UserError(why)
        if words[:1] == ["bench"]:  # pmf.bench parses its own options
            return bench.run(words[1:])
        parser = Parser(prog="pmf", description=_DESCRIPTION)
        parser.add_argument("--version", action="version", version=f"pmf {VERSION}")
        commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
        for module in (train, sample, demo, report, evaluate, ablate, convert, flops, toy, bench, check, env):
            module.add_parser(commands)
        arguments = parser.parse_args(words)
        with notes_on_stderr():
            return int(arguments.run(arguments))
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except OSError as error:  # from a file no command guards itself
        place = f"{error.filename}: " if error.filename else ""
        print(f"error: {place}{error.strerror or error}", file=sys.stderr)
        return 2
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        reason = str(error).partition("\n")[0] or type(error).__name__
        print(
            f"error: memory ran out ({reason}): give a smaller --batch-size, or pmf train --accumulate 2 or "
            "more, or --checkpointing blocks",
            file=sys.stderr,
        )
        return 2
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return INTERRUPTED
