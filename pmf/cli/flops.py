"""``pmf flops``: the computational cost of the presets, compared with other models."""

import argparse
import dataclasses
import json

from pmf import models
from pmf.cli.arguments import Commands
from pmf.sizes import Size
from pmf.training import get_preset
from pmf.training.building import model_config
from pmf.training.flops import PEERS, Cost, count_cost

_DESCRIPTION = """Print parameters and multiply-adds of the presets, counted from the networks in seconds.

  pmf flops
  pmf flops pmf-h/16 --json

  sampling, M       millions of parameters that sampling needs; training, M: all
  sample, paper, G  billions of multiply-adds of a one-step sample as the paper counts it: half of all
                    floating-point operations, every block computed in full; the last rows are the paper's
                    figures for other models
  sample, G         the same in matrix products that this library executes
  training, G       objective and backward per image, averaged over random times and guidance scales, without
                    perceptual networks
  Muon, G           the optimizer's products per step, whatever the batch size
"""
_GIGA, _MEGA = 1e9, 1e6
_COLUMNS = (
    "",
    "pixels",
    "sampling, M",
    "training, M",
    "sample, paper, G",
    "sample, G",
    "training, G",
    "Muon, G",
)


def add_parser(commands: Commands) -> None:
    """Register the command."""
    parser = commands.add_parser("flops", help="parameters and multiply-adds", description=_DESCRIPTION)
    parser.add_argument(
        "presets", nargs="*", metavar="PRESET", help="presets such as pmf-h/16 (all pmf-* presets)"
    )
    parser.add_argument("--json", action="store_true", help="print exact numbers as JSON")
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    """Count and print the costs."""
    names = arguments.presets or [name for name in models.CONFIGS if name.startswith("pmf-")]
    configs = {name: get_preset(name) for name in names}
    networks = {
        name: model_config(config, _num_classes(config.model.model)) for name, config in configs.items()
    }
    costs = {name: count_cost(networks[name], config) for name, config in configs.items()}
    if arguments.json:
        record = {
            name: {"image_size": networks[name].image_size, **dataclasses.asdict(cost)}
            for name, cost in costs.items()
        }
        print(json.dumps({"presets": record, "peers": PEERS}, indent=2))
        return 0
    print(_table({name: networks[name].image_size for name in names}, costs))
    return 0


def _num_classes(model: str | None) -> int:
    return (models.CONFIGS[model] if model else models.ModelConfig()).num_classes


def _table(sizes: dict[str, Size], costs: dict[str, Cost]) -> str:
    rows: list[tuple[str, ...]] = [_COLUMNS]
    for name, cost in costs.items():
        parameters = (cost.parameters_sampling / _MEGA, cost.parameters_training / _MEGA)
        work = (cost.sampling_paper, cost.sampling, cost.training, cost.optimizer)
        rows.append((name, str(sizes[name]), *(f"{x:.1f}" for x in parameters), *map(_giga, work)))
    for peer, by_size in PEERS.items():
        rows += [(peer, str(size), "", "", _giga(work), "", "", "") for size, work in by_size.items()]
    widths = [max(len(row[i]) for row in rows) for i in range(len(_COLUMNS))]
    lines = [
        [
            row[0].ljust(widths[0]),
            *(cell.rjust(width) for cell, width in zip(row[1:], widths[1:], strict=True)),
        ]
        for row in rows
    ]
    return "\n".join("  ".join(line).rstrip() for line in lines)


def _giga(multiply_adds: float) -> str:
    giga = multiply_adds / _GIGA
    return f"{giga:.3g}" if giga < 100 else f"{giga:.0f}"
