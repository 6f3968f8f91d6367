"""Generate the tables in README.md and docs/ from the committed records; no number is typed by hand.

python benchmarks/readme_table.py            print the tables
python benchmarks/readme_table.py --write    write them between the <!-- table: NAME --> markers
"""

from __future__ import annotations

import argparse
import itertools
import json
import re
import sys
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from pmf.bench import BENCHMARKS

sys.path.insert(0, str(Path(__file__).resolve().parent))  # however this file is loaded
from gpu.targets import targets_of  # noqa: E402

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"
AMD, INTEL = "amd-epyc", "intel-xeon"
GPU_RECORD = RESULTS / "nvidia-h100" / "run_all.json"


def load(name: str, machine: str = AMD) -> dict[str, Any]:
    return json.loads((RESULTS / machine / f"{name}.json").read_text())


def has(machine: str, *names: str) -> bool:
    return all((RESULTS / machine / f"{name}.json").exists() for name in names)


SPEED_RECORDS = ("bench_attention", "bench_training_step", "bench_sampling")


class Compared(NamedTuple):
    ours: str
    peer: str
    ratio: str


def speed_table() -> str:
    """Attention, the training step and sampling against plain PyTorch, for the README."""
    machines = [machine for machine in (AMD, INTEL) if has(machine, *SPEED_RECORDS)]
    main, *others = (_speed(machine) for machine in machines)
    records = [load("bench_attention", machine) for machine in machines]
    versions = {(record["threads"], record["versions"]["torch"]) for record in records}
    same = " and ".join(f"{threads} cores, torch {torch}" for threads, torch in sorted(versions))
    elsewhere = "".join(f" ratio on {record['device']} |" for record in records[1:])
    lines = [
        f"Medians on {records[0]['device']}, {same}; attention shapes are (batch, heads, tokens, width):",
        "",
        f"| | pmf | plain PyTorch | ratio |{elsewhere}",
        f"|---|---|---|---|{'---|' * len(others)}",
    ]
    for label, compared in main.items():
        ratios = [other[label].ratio if label in other else "" for other in others]
        lines.append(f"| {' | '.join((label, *compared, *ratios))} |")
    return "\n".join(lines)


def _speed(machine: str) -> dict[str, Compared]:
    attention, step, sampling = (load(name, machine) for name in SPEED_RECORDS)
    found: dict[str, Compared] = {}
    cases = {ours["case"]: (ours, peers) for ours, *peers in by_case(attention["rows"])}
    for label in SPEED_CASES:
        if label in cases:
            ours, (peer, *_) = cases[label]
            name = "`torch.func.jvp`, math" if "JVP" in label else "flash"
            found[f"attention {label}"] = Compared(
                f"{ours['median_ms']:.1f} ms",
                f"{peer['median_ms']:.1f} ms ({name})",
                f"{peer['time_over_ours']:.1f}",
            )
    size = "hidden {hidden_size}, depth {depth}, {image_size} pixels".format(**step["sizes"]["timed"])
    size += f", batch {step['sizes']['batch_size']}"
    rows = {(row["part"], row.get("precision"), row.get("contestant")): row for row in step["rows"]}
    for precision in ("bf16", "fp32"):
        ours, port = (rows["time", precision, side]["step_ms"] for side in ("pmf", "plain port"))
        found[f"training step, {size}, {precision}"] = Compared(
            f"{ours:.0f} ms", f"{port:.0f} ms", f"{port / ours:.1f}"
        )
        ours, port = (rows["memory", precision, side]["bytes"] / 2**20 for side in ("pmf", "plain port"))
        found[f"peak memory of that step, {precision}"] = Compared(
            f"{ours:.0f} MiB", f"{port:.0f} MiB", f"{port / ours:.1f}"
        )
    ours, *_, plain = (row["images_per_second"] for row in sampling["rows"])
    found["one-step sampling, pMF-B/16"] = Compared(
        f"{ours:.1f} images/s (bf16)", f"{plain:.1f} images/s (fp32)", f"{ours / plain:.1f}"
    )
    return found


def quality_table() -> str:
    """Scores of benchmarks/digits_quality.py: three seeds, the worst, and two halves of the real set."""
    record = load("digits_quality")
    names = ("accuracy", "frechet", "recall", "coverage")
    rows = [(f"seed {score['seed']}", score) for score in record["seeds"]]
    rows += [("worst", record["worst"]), ("two halves of the real digits", record["real_halves"])]
    lines = [
        f"Ten minutes of training on {record['device']}, {record['threads']} cores; 1797 one-step samples:",
        "",
        "| | classified correctly | Frechet distance (pixels) | recall | coverage |",
        "|---|---|---|---|---|",
    ]
    for label, figures in rows:
        cells = [f"{figures[name]:.3f}" if name in figures else "" for name in names]
        lines.append(f"| {label} | {' | '.join(cells)} |")
    return "\n".join(lines)


def training_table() -> str:
    """Time, memory and FLOPs of a training step, compared with the plain port."""
    record = load("bench_training_step")
    rows: dict[str, list[dict[str, Any]]] = {}
    for row in record["rows"]:
        rows.setdefault(row["part"], []).append(row)
    sizes = record["sizes"]["timed"]
    lines = [
        f"A step on {record['device']}, {record['threads']} cores, torch {record['versions']['torch']}; "
        f"hidden {sizes['hidden_size']}, depth {sizes['depth']}, {sizes['image_size']} pixels, "
        f"batch {record['sizes']['batch_size']}; medians:",
        "",
        "| | pmf | plain PyTorch port | pmf / port |",
        "|---|---|---|---|",
    ]

    def line(label: str, both: list[str], ratio: float) -> None:
        lines.append(f"| {label} | {' | '.join(both)} | {ratio:.2f} |")

    for precision in ("fp32", "bf16"):
        times = {row["contestant"]: row for row in rows["time"] if row["precision"] == precision}
        ours, port = times["pmf"], times["plain port"]
        for what, key in (
            ("objective, backward and optimizer", "step"),
            ("without the optimizer", "backward"),
        ):
            milliseconds = [f"{side[f'{key}_ms']:.0f} ms" for side in (ours, port)]
            line(f"{precision}: {what}", milliseconds, port[f"{key}_ratio"])
        peaks = {row["contestant"]: row for row in rows["memory"] if row["precision"] == precision}
        mebibytes = [f"{peaks[side]['bytes'] / 2**20:.0f} MiB" for side in ("pmf", "plain port")]
        line(f"{precision}: peak memory over the loaded model", mebibytes, peaks["plain port"]["ratio"])
    (flops,) = rows["flops"]
    tera = [f"{flops['flops'][side] / 1e12:.1f} TFLOP" for side in ("ours", "port")]
    line(
        f"objective and backward at depth {flops['depth']}, batch {flops['batch_size']}",
        tera,
        flops["ratio"],
    )
    without = flops["flops"]["ours"] / flops["flops"]["port, without products with zero tangents"]
    worst = {
        precision: max(row["error"] for row in rows["agreement"] if row["precision"] == precision)
        for precision in ("fp64", "fp32", "bf16")
    }
    return "\n".join([
        *lines,
        "",
        f"FLOPs are those executed, counted; {without:.2f} without the products with zero tangents that "
        "`torch.func.jvp` makes. Losses and every gradient agree in all cases, at worst to "
        f"{worst['fp64']:.0e} (float64), {worst['fp32']:.0e} (fp32) and {worst['bf16']:.0e} (bf16).",
    ])  # fmt: skip


def sampling_table(machine: str) -> str:
    """Images per second of one-step sampling, and the agreement of the images."""
    record = load("bench_sampling", machine)
    lines = [
        f"pMF-B/16 in one step on {record['device']}, {record['threads']} cores, "
        f"batch {record['batch_size']}; medians:",
        "",
        "| sampler | images per second | PSNR against the plain sampler |",
        "|---|---|---|",
    ]
    for row in record["rows"]:
        near = "" if row["psnr_db"] is None else f"{row['psnr_db']:.1f} dB"
        lines.append(f"| {row['contestant']} | {row['images_per_second']:.2f} | {near} |")
    return "\n".join(lines)


def any_network_table() -> str:
    """A step with a tangent of third-party networks, relative to torch.func.jvp through math attention."""
    record = load("bench_any_network", INTEL)
    rows = {(row["network"], row["contestant"]): row for row in record["rows"]}
    contestants = list(dict.fromkeys(name for _, name in rows))
    math = next(name for name in contestants if "math" in name)
    sizes = {"vit": "ViT-S/16, 197 tokens", "dit": "DiT blocks, 1024 tokens"}
    seconds = ", ".join(f"{rows[key, math]['median_ms'] / 1e3:.2g} s" for key in sizes)
    lines = [
        f"Medians of {rows['vit', math]['rounds']} rounds on {record['device']}, {record['threads']} cores, "
        f"torch {record['versions']['torch']}, relative to {math} ({seconds}):",
        "",
        "| " + "".join(f"| {size}: time | peak memory " for size in sizes.values()) + "|",
        "|---" * (1 + 2 * len(sizes)) + "|",
    ]
    for name in contestants:
        if name != math:
            found = [rows[key, name].get(figure) for key in sizes for figure in FIGURES]
            cells = ["not measured" if x is None else f"{x:.2f}" for x in found]
            lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines)


FIGURES = ("time_over_math", "memory_over_math")
SPEED_CASES = (
    "forward + JVP (4, 12, 276, 64) bfloat16",
    "forward + JVP (1, 12, 1024, 64) bfloat16",
    "forward + JVP (1, 12, 1024, 64) float32",
    "forward (4, 12, 276, 64) bfloat16",
    "backward (4, 12, 276, 64) bfloat16",
)
"""The cases of bench_attention (batch, heads, tokens, width) that the README shows."""

# ---- every kernel on the CPU -------------------------------------------------------------------------------

CEILINGS = {"torch clone": "gbyte_per_s", "torch copy_": "gbyte_per_s", "torch.mm": "gflop_per_s"}
"""Contestants that measure the machine, in cases of their own or in the op's, and the rate they bound."""


def by_case(rows: list[dict[str, Any]]) -> Iterator[list[dict[str, Any]]]:
    """The rows of each case: pmf first, then its peers."""
    for _, group in itertools.groupby(rows, key=lambda row: (row.get("op"), row["case"])):
        yield list(group)


def kernels_table(machine: str) -> str:
    """Every op of a machine's records: time, rate, that as a fraction of torch's, and the peers."""
    lines = [
        "| op | case | pmf | rate | of torch's | speed-up over |",
        "|---|---|---|---|---|---|",
    ]
    seen: dict[tuple[str, int, str], None] = {}
    for name in BENCHMARKS:
        if not has(machine, f"bench_{name}"):
            continue
        record = load(f"bench_{name}", machine)
        seen[record["device"], record["threads"], record["versions"]["torch"]] = None
        ceilings: dict[tuple[str, str], float] = {}
        for ours, *peers in by_case(record["rows"]):
            dtype = ours["case"].split()[-1]
            for row in (ours, *peers):
                rate = CEILINGS.get(row["contestant"])
                if rate in row:
                    ceilings[rate, dtype] = row[rate]
            if ours["contestant"] in CEILINGS:
                continue
            peers = [row for row in peers if row["contestant"] not in CEILINGS]
            peer = ", ".join(f"{row['contestant']}: {row['time_over_ours']:.1f}" for row in peers)
            rate, share = _rate_and_share(ours, ceilings, dtype)
            cells = (name, ours["case"], f"{ours['median_ms']:.2f} ms", rate, share, peer)
            lines.append(f"| {' | '.join(cells)} |")
    machines = "; ".join(f"{device}, {threads} cores, torch {torch}" for device, threads, torch in seen)
    head = (
        f"Medians on {machines}. The fraction is of the rate of torch's copy, of as many bytes in the same "
        "rounds or, in older records, of a large buffer, or of its 2048^3 matrix product, if the same run "
        "measured it."
    )
    if products := _products(load("bench_attention", machine)["rows"]):
        head += f" In the attention run that product ran at {products}."
    return "\n".join([head, "", *lines])


def _products(rows: list[dict[str, Any]]) -> str:
    """The rate of torch's matrix product in each dtype."""
    rates = (
        f"{row['gflop_per_s']:.0f} GFLOP/s in {row['case'].split()[-1]}"
        for row in rows
        if row["contestant"] == "torch.mm"
    )
    return " and ".join(rates)


def _rate_and_share(
    row: dict[str, Any], ceilings: dict[tuple[str, str], float], dtype: str
) -> tuple[str, str]:
    """The rate that the record has a ceiling for, otherwise any rate of the row without a percentage."""
    units = {"gflop_per_s": "GFLOP/s", "gbyte_per_s": "GB/s"}
    known = [rate for rate in units if rate in row]
    for rate in known:
        if (rate, dtype) in ceilings:
            return f"{row[rate]:.0f} {units[rate]}", f"{row[rate] / ceilings[rate, dtype]:.0%}"
    return (f"{row[known[0]]:.0f} {units[known[0]]}", "") if known else ("", "")


# ---- a GPU -------------------------------------------------------------------------------------------------

NOT_MEASURED = "not measured"


def _attention(kind: str, shape: tuple[int, ...]) -> tuple[str, dict[str, Any]]:
    facts = {"op": f"attention {kind}", "shape": list(shape), "dtype": "bfloat16"}
    return f"attention {kind}, bf16, {' x '.join(map(str, shape))}", facts


GPU_ROWS: tuple[tuple[str, dict[str, Any]], ...] = (
    _attention("forward + JVP", (256, 12, 276, 64)),
    _attention("forward + JVP", (256, 16, 276, 80)),
    _attention("forward + JVP", (64, 12, 1024, 64)),
    _attention("forward + JVP", (64, 12, 1024, 128)),
    _attention("forward + JVP", (2, 12, 4096, 64)),
    _attention("forward", (256, 12, 276, 64)),
    _attention("backward", (256, 12, 276, 64)),
    _attention("backward through both", (256, 12, 276, 64)),
    ("pMF-B/16 training step, batch 32, bf16", {"op": "training step", "batch": 32}),
    ("pMF-B/16 one-step sampling, batch 64", {"op": "sampling", "batch": 64}),
    ("Muon step of pMF-B/16", {"op": "muon", "model": "pmf-b/16"}),
    ("Muon step of pMF-H/16", {"op": "muon", "model": "pmf-h/16"}),
)
"""The rows of the GPU table, and how to find them in the record."""


def gpu_table() -> str:
    """The main rows of benchmarks/run_all.py's record, or a statement that there is none."""
    rows: list[dict[str, Any]] = []
    head = "No GPU has run these kernels yet. On an H100:"
    if GPU_RECORD.exists():
        record = json.loads(GPU_RECORD.read_text())
        rows = [row for section in record["sections"] for row in section["rows"]]
        rates = record["rates"]
        driver = (record["nvidia_smi"] or {}).get("driver_version", "unknown")
        products = rates["matrix_gflop_per_s"].get("bfloat16", 0) / 1e3
        head = (
            f"On one {record['device']} (driver {driver}, torch {record['versions']['torch']}); copies ran "
            f"at {(rates['copy_gbyte_per_s'] or 0) / 1e3:.2f} TB/s, bf16 products at {products:.0f} TFLOP/s; "
            "medians:"
        )
    lines = ["| | pmf | best correct peer | times faster | target |", "|---|---|---|---|---|"]
    for label, facts in GPU_ROWS:
        case = next((c for c in by_case(rows) if facts.items() <= c[0].items()), None)
        lines.append(f"| {label} | {' | '.join(_gpu_cells(case, facts))} |")
    return "\n".join([head, "", *lines])


def _gpu_cells(case: list[dict[str, Any]] | None, facts: dict[str, Any]) -> list[str]:
    asked = "; ".join(target.text for target in targets_of(facts))
    if case is None or "median_ms" not in case[0]:
        return [NOT_MEASURED, NOT_MEASURED, NOT_MEASURED, asked]
    ours = case[0]
    others = (row for row in case if not row["contestant"].startswith("pmf"))
    peers = [row for row in others if "median_ms" in row and row.get("right", True)]
    best = min(peers, key=lambda row: row["median_ms"], default=None)
    verdict = {True: "met", False: "missed", None: "not judged"}
    found = "; ".join(f"{t['target']}: {t['found']}, {verdict[t['met']]}" for t in ours.get("targets", []))
    return [
        f"{ours['median_ms']:.3g} ms" + ("" if ours.get("right", True) else " (wrong)"),
        f"{best['median_ms']:.3g} ms ({best['contestant']})" if best else "none",
        f"{best['median_ms'] / ours['median_ms']:.1f}" if best else "",
        found or asked,
    ]


# ---- pages -------------------------------------------------------------------------------------------------


class Table(NamedTuple):
    machine: str
    records: tuple[str, ...]
    """Without all of these there is no table."""
    make: Callable[[], str]


TABLES = {
    "speed": Table(AMD, SPEED_RECORDS, speed_table),
    "quality": Table(AMD, ("digits_quality",), quality_table),
    "training": Table(AMD, ("bench_training_step",), training_table),
    "sampling": Table(AMD, ("bench_sampling",), partial(sampling_table, AMD)),
    "sampling_intel": Table(INTEL, ("bench_sampling",), partial(sampling_table, INTEL)),
    "kernels": Table(AMD, ("bench_attention",), partial(kernels_table, AMD)),
    "kernels_intel": Table(INTEL, ("bench_attention",), partial(kernels_table, INTEL)),
    "any_network": Table(INTEL, ("bench_any_network",), any_network_table),
    "gpu": Table(AMD, (), gpu_table),
}
MARK = re.compile(r"^<!-- table: (?P<name>\w+) -->\n(?P<table>.*?)^<!-- end -->$", re.M | re.S)


def pages() -> list[Path]:
    return [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


def tables() -> dict[str, str]:
    """Every table whose records exist, by name."""
    return {name: table.make() for name, table in TABLES.items() if has(table.machine, *table.records)}


def with_tables(page: str) -> str:
    """The page with its tables regenerated between the markers."""
    made = tables()

    def fill(match: re.Match[str]) -> str:
        if match["name"] not in TABLES:
            raise SystemExit(f"there is no table {match['name']!r}: choose from {', '.join(TABLES)}")
        table = made.get(match["name"])
        return match[0] if table is None else f"<!-- table: {match['name']} -->\n{table}\n<!-- end -->"

    if page.count("<!-- table: ") != len(MARK.findall(page)):
        raise SystemExit("a <!-- table: NAME --> marker needs its own line, and <!-- end --> closes it")
    return MARK.sub(fill, page)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--write", action="store_true", help="update README.md and docs/")
    if parser.parse_args().write:
        for page in pages():
            page.write_text(with_tables(page.read_text()))
    else:
        print("\n\n".join(tables().values()))


if __name__ == "__main__":
    main()
