"""Find the fastest attention plans on a GPU: which kernel, how many warps, how many slots.

    python benchmarks/tune.py [--out FILE] [--shapes 276x64 1024x128] [--dtypes bfloat16 float16]
    python benchmarks/tune.py --list [--capability 9.0] [--shared-kb 227] [--processors 132]

All competing plans are compiled into the library. Each is checked against float64 and timed with
triton.testing.do_bench in every pass (forward, with tangents, and both backwards); the fastest are written to
a table in the cache folder, which launchers on that GPU model read from the next process on. Plans for other
problems stay in the table. A plan replaces the model's choice only if it is at least 2 % faster. Without a
table the model decides. The Hopper kernels (16-bit calls on sm_90) have no competing plans. --list needs no
GPU: it prints the plans that would compete.

Exit status: 0; 1 if a plan was wrong (it is left out) or memory ran out; 2 if there is no such device or the
table cannot be written.
"""

from __future__ import annotations

import argparse
import functools
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch

from pmf import _library, checked, ops, plans
from pmf.bench.harness import versions, write_record
from pmf.check.cases import Case, prepare
from pmf.plans import Plan

SHAPES = ("276x64", "276x80", "1024x64", "1024x128")
MOST_KERNELS, MOST_WARPS, MOST_SLOTS = 12, 16, 3
"""A bound above the size of any table, block or ring."""
LEAST_SHARED_KB = 99
"""Of any GPU that has the kernels."""
TOKENS = 1 << 20
"""Queries of a timed call, over all heads: enough to fill the GPU."""
GAIN = 1.02
PASSES = {
    "forward": (False, False),
    "forward + JVP": (False, True),
    "backward": (True, False),
    "backward through both": (True, True),
}
"""For each pass, whether it is a backward pass, and whether it has tangents."""


class Problem(NamedTuple):
    """One pass at one length, width and dtype."""

    tokens: int
    width: int
    dtype: str
    backward: bool
    tangent: bool

    @property
    def launches(self) -> tuple[str, ...]:
        return plans.LAUNCHES[1:] if self.backward else plans.LAUNCHES[:1]

    def plan(self, launch: str, kernel: int, warps: int, slots: int) -> Plan:
        sizes = self.tokens, self.tokens, self.width, self.width
        return Plan(launch, self.dtype, False, self.tangent, *sizes, kernel, warps, slots)

    def has(self, plan: Plan) -> bool:
        """Whether a plan is for one of this problem's launches."""
        return plan == self.plan(plan.launch, plan.kernel, plan.warps, plan.slots) and (
            plan.launch in self.launches
        )


class Limits(NamedTuple):
    """The limits of a GPU that plans must respect."""

    shared_per_block: int
    shared_per_processor: int
    processors: int
    compute_capability: tuple[int, int]


def launched(problem: Problem, limits: Limits, chosen: Sequence[Plan]) -> list[dict[str, Any]]:
    """What the library would launch with these plans."""
    module = _library.introspection()
    assert module is not None
    plans.use(-1, chosen)
    try:
        return module.attention_launches(
            batch=1,
            heads=1,
            key_heads=1,
            queries=problem.tokens,
            keys=problem.tokens,
            width=problem.width,
            value_width=problem.width,
            dtype=problem.dtype,
            backward=problem.backward,
            tangent=problem.tangent,
            **limits._asdict(),
        )["launches"]
    finally:
        plans.use(-1, [])


def signature(launch: Mapping[str, Any]) -> tuple[Any, ...]:
    return launch["kernel"], launch["threads"], launch["shared_bytes"]


def competitors(problem: Problem, launch: str, limits: Limits, fixed: Sequence[Plan] = ()) -> Iterator[Plan]:
    """All distinct plans of one launch except the model's; the other launches keep the plans in `fixed`."""
    place = problem.launches.index(launch)
    seen = {signature(launched(problem, limits, fixed)[place])}
    for kernel in range(MOST_KERNELS):
        for warps in range(1, MOST_WARPS + 1):
            for slots in range(1, MOST_SLOTS + 1):
                plan = problem.plan(launch, kernel, warps, slots)
                found = launched(problem, limits, [*fixed, plan])[place]
                if found["threads"] == 32 * warps and signature(found) not in seen:
                    seen.add(signature(found))
                    yield plan


def problems(shapes: Sequence[str], dtypes: Sequence[str]) -> Iterator[Problem]:
    for shape in shapes:
        tokens, _, width = shape.partition("x")
        for dtype in dtypes:
            for backward, tangent in PASSES.values():
                yield Problem(int(tokens), int(width), dtype, backward, tangent)


def check(problem: Problem, device: torch.device) -> Callable[[], float]:
    """The largest error over all directions at this shape, in units of the limit."""
    shape = (1, 2, problem.tokens, problem.width)
    case = Case("attention", (0, 1, 2), "attention gradient", shapes=(shape, shape, shape))
    measure = prepare(case, getattr(torch, problem.dtype), device)
    return lambda: max(measure().values())


def run(problem: Problem, device: torch.device) -> Callable[[], Any]:
    """The timed call, on tensors that fill the GPU."""
    heads = max(1, TOKENS // problem.tokens)
    shape = (1, heads, problem.tokens, problem.width)
    dtype = getattr(torch, problem.dtype)
    inputs = [torch.randn(shape, device=device, dtype=dtype) for _ in range(6)]
    query, key, value, query_t, key_t, value_t = inputs
    if not problem.backward:
        if problem.tangent:
            return lambda: ops.attention_jvp(query, key, value, query_t, key_t, value_t)
        return lambda: ops.attention(query, key, value)
    leaves = [x.requires_grad_() for x in (inputs if problem.tangent else inputs[:3])]
    if problem.tangent:
        outputs = ops.attention_jvp(query, key, value, query_t, key_t, value_t)
    else:
        outputs = (ops.attention(query, key, value),)
    grads = [torch.randn_like(y) for y in outputs]
    return lambda: torch.autograd.grad(outputs, leaves, grads, retain_graph=True)


def tune(
    problem: Problem,
    device: int,
    limits: Limits,
    error: Callable[[], float],
    timed: Callable[[], float],
    say: Callable[[str], None] = print,
) -> tuple[list[Plan], list[dict[str, Any]]]:
    """The plans that beat the model's, launch by launch, and a row for every plan that was tried."""
    best: list[Plan] = []
    rows: list[dict[str, Any]] = []
    plans.use(device, [])
    found, fastest = error(), timed()
    rows.append(
        {**problem._asdict(), "plan": "the model's", "ms": fastest, "error": found, "right": found <= 1}
    )
    for launch in problem.launches:
        winner: Plan | None = None
        for plan in competitors(problem, launch, limits, best):
            plans.use(device, [*best, plan])
            found = error()
            row = {**problem._asdict(), "plan": plan._asdict(), "error": found, "right": found <= 1}
            if row["right"]:
                row["ms"] = timed()
                if row["ms"] * GAIN < fastest:
                    winner, fastest = plan, row["ms"]
            rows.append(row)
        best += [] if winner is None else [winner]
    plans.use(device, best)
    gained = rows[0]["ms"] / fastest
    say(f"{problem}: {len(rows) - 1} plans, {gained:.2f} times as fast as the model's choice")
    return best, rows


def list_plans(shapes: Sequence[str], dtypes: Sequence[str], limits: Limits) -> None:
    for problem in problems(shapes, dtypes):
        for launch in problem.launches:
            found = [
                f"{plan.kernel}:{plan.warps}x{plan.slots}" for plan in competitors(problem, launch, limits)
            ]
            name = next(key for key, value in PASSES.items() if value == (problem.backward, problem.tangent))
            count = f"{len(found)} compete" if found else "the only kernel has one plan"
            print(f"{problem.tokens}x{problem.width} {problem.dtype} {name}, {launch}: {count}")
            if found:
                print(f"    kernel:warps x slots  {' '.join(found)}")


def capability(text: str) -> tuple[int, int]:
    """ "9.0" as (9, 0); raises ValueError."""
    major, minor = text.split(".")
    return int(major), int(minor)


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--out",
        type=Path,
        metavar="FILE",
        help="write a record of everything that was timed to this JSON file",
    )
    parser.add_argument("--shapes", nargs="+", default=SHAPES, metavar="NxD", help="tokens x width")
    parser.add_argument("--dtypes", nargs="+", default=("bfloat16",), choices=plans.DTYPES)
    parser.add_argument("--seconds", type=float, default=0.05, help="time for each plan (default: 0.05)")
    parser.add_argument("--device", type=int, default=0, help="number of the GPU (default: 0)")
    parser.add_argument("--list", action="store_true", help="print the plans that compete, without a GPU")
    parser.add_argument(
        "--capability",
        type=capability,
        default=(9, 0),
        metavar="M.N",
        help="with --list: compute capability of the GPU (default: 9.0)",
    )
    parser.add_argument(
        "--shared-kb", type=int, default=227, help="with --list: KB of shared memory per block (default: 227)"
    )
    parser.add_argument(
        "--processors", type=int, default=132, help="with --list: multiprocessors of the GPU (default: 132)"
    )
    arguments = parser.parse_args(argv)
    for shape in arguments.shapes:
        tokens, _, width = shape.partition("x")
        if not (tokens.isdigit() and width.isdigit() and 1 <= int(width) <= 256 and int(tokens)):
            parser.error(f"--shapes {shape} is not tokens x width, such as 276x64, with a width up to 256")
    if arguments.list and (arguments.shared_kb < LEAST_SHARED_KB or arguments.processors < 1):
        parser.error(f"--list plans for at least {LEAST_SHARED_KB} KB per block and one multiprocessor")
    return arguments


def main(argv: list[str] | None = None) -> int:
    arguments = parse(argv)
    module = _library.introspection()
    if module is None or not module.build_facts()["has_cuda"]:
        print("this build of pmf has no CUDA kernels: install it with PMF_CUDA=on", file=sys.stderr)
        return 2
    if arguments.list:
        kb = 1024 * arguments.shared_kb
        limits = Limits(kb, kb + 1024, arguments.processors, arguments.capability)
        list_plans(arguments.shapes, arguments.dtypes, limits)
        return 0
    if not 0 <= arguments.device < torch.cuda.device_count():
        print("torch finds no such CUDA device, and plans compete on one: --list needs none", file=sys.stderr)
        return 2
    torch.cuda.set_device(arguments.device)
    device = torch.device("cuda", arguments.device)
    checked.forgo_reminder()
    facts: Any = torch.cuda.get_device_properties(device)
    limits = Limits(
        facts.shared_memory_per_block_optin,
        facts.shared_memory_per_multiprocessor,
        facts.multi_processor_count,
        (facts.major, facts.minor),
    )
    path = plans.table_file(facts.name)
    if why := unwritable(path, facts.name):  # now rather than after minutes of measuring
        print(why, file=sys.stderr)
        if arguments.out is None:
            return 2
        path = None
    rows, short = tune_all(arguments, facts.name, device, limits, path)
    wrong = [row for row in rows if not row["right"]]
    for row in wrong:
        print(f"wrong: {row['plan']}, {row['error']:.3g} times its limit", file=sys.stderr)
    for problem in short:
        print(f"not tuned, as memory ran out: {problem}", file=sys.stderr)
    return 1 if wrong or short else 0


def unwritable(path: Path | None, gpu: str) -> str | None:
    """Why the table of a GPU model cannot be written, in one sentence; None if it can."""
    if path is None:
        return "there is no home folder for the table of plans: set XDG_CACHE_HOME"
    try:
        plans.write(path, plans.record(gpu, plans.read(gpu)[0]))
    except OSError as error:
        return f"the table of plans cannot be written: {error}"
    return None


def tune_one(
    problem: Problem, device: torch.device, limits: Limits, seconds: float
) -> tuple[list[Plan], list[dict[str, Any]]]:
    timed = functools.partial(milliseconds, run(problem, device), seconds)
    return tune(problem, device.index, limits, check(problem, device), timed)


def tune_all(
    arguments: argparse.Namespace, gpu: str, device: torch.device, limits: Limits, path: Path | None
) -> tuple[list[dict[str, Any]], list[Problem]]:
    """Tune every problem and write its plans; returns a row per plan, and the problems without memory."""
    started = time.monotonic()
    known = plans.read(gpu)[0]
    rows: list[dict[str, Any]] = []
    short = []
    for problem in problems(arguments.shapes, arguments.dtypes):
        torch.cuda.empty_cache()
        try:
            won, tried = tune_one(problem, device, limits, arguments.seconds)
        except torch.cuda.OutOfMemoryError:
            short.append(problem)
            continue
        known, rows = [plan for plan in known if not problem.has(plan)] + won, rows + tried
        table = plans.record(gpu, known, seconds=time.monotonic() - started, versions=versions())
        if path is not None:  # after every problem, so that an interruption keeps what was found
            plans.write(path, table)
        if arguments.out is not None:
            write_record(arguments.out, {**table, "tried": rows})
    print(f"{len(known)} plans replace the model's, in {path or arguments.out}")
    return rows, short


def milliseconds(call: Callable[[], Any], seconds: float) -> float:
    """The median time of a call."""
    from triton.testing import do_bench  # included in torch's CUDA builds

    return float(do_bench(call, warmup=1e3 * seconds / 4, rep=1e3 * seconds, return_mode="median"))


if __name__ == "__main__":
    sys.exit(main())
