"""The cycle model's parts, on machine code of a few lines."""

import json
import re

import pytest
from gpu.model import paths
from gpu.model.machine import Multiprocessor, Trace
from gpu.model.sass import Kernel, parse
from gpu_model import PROBLEMS, RATES, main

STALL = 41
"""The bit of an instruction's upper half where its schedule begins."""


def listing(*lines: tuple[str, int] | str) -> Kernel:
    """A kernel as nvdisasm prints it: instructions with their stalls, and labels."""
    text, address = ".text._Z1kv:\n", 0
    for line in lines:
        if isinstance(line, str):
            text += f"{line}:\n"
            continue
        upper = (line[1] | 7 << 5 | 7 << 8) << STALL
        text += f"        /*{address:04x}*/    {line[0]} ;  /* 0x{0:016x} */\n"
        text += f"                 /* 0x{upper:016x} */\n"
        address += 16
    return parse(text)["_Z1kv"]


LOOP = listing(
    ("S2R R0, SR_TID.X", 1),
    ".L_x_1",
    ("DEPBAR.LE SB0, 0x1", 1),
    ("@P0 BRA `(.L_x_2)", 5),
    ("LDG.E.U16 R4, [R2.64]", 1),
    ".L_x_2",
    ("HMMA.16816.F32.BF16 R4, R8, R12, R4", 1),
    ("HMMA.16816.F32.BF16 R16, R8, R14, R16", 1),
    ("@P1 BRA `(.L_x_1)", 5),
    ("EXIT", 5),
)
RATES_HERE = {name: x for name, x in json.loads(RATES.read_text()).items() if not isinstance(x, str)}


def cycles(kernel: Kernel, warps: int, **rates: float) -> float:
    (head,) = paths.product_loops(kernel)
    path = paths.hottest(kernel, head, {head}, kernel.loops[head], False)
    traces = [[Trace(paths.expand(kernel, path))] * 50] * warps
    machine = Multiprocessor(traces, 1, 1, {**RATES_HERE, **rates}, 16.0)
    return machine.ends()[-1] - RATES_HERE["launch_cycles"]


def test_loops_and_the_hot_path_through_them():
    """The path around a loop has its products, and no access element by element that a branch avoids."""
    (head,) = paths.product_loops(LOOP)
    path = paths.hottest(LOOP, head, {head}, LOOP.loops[head], False)
    names = [each.name for block in path for each in LOOP.blocks[block]]
    assert names == ["DEPBAR", "BRA", "HMMA", "HMMA", "BRA"]
    assert LOOP.blocks[0][0].stall == 1


@pytest.mark.parametrize(("warps", "sharing", "over"), [(4, 1, 2.0), (8, 2, 1.1), (16, 4, 1.1)])
def test_warps_of_a_scheduler_share_its_tensor_core(warps, sharing, over):
    """100 products each: bound by the pipe where there are enough warps, by the stalls of one where not."""
    bound = 100 * sharing * RATES_HERE["hmma_cycles"]
    assert bound * 0.95 <= cycles(LOOP, warps) <= bound * over + 100
    assert cycles(LOOP, warps, hmma_cycles=64.0) >= 9 * bound


def test_what_is_asked_for_in_vain_is_one_sentence(capsys, tmp_path):
    with pytest.raises(SystemExit, match="2"):
        main(["jvp_1x1"])
    assert "there is no problem 'jvp_1x1': choose from forward_276x64" in capsys.readouterr().err


def test_limits_are_those_of_the_kernels_page():
    """Microseconds on an H100, by bytes at 276 tokens and by products at 1024."""
    limits = {problem.name: problem.limit_seconds(RATES_HERE) * 1e6 for problem in PROBLEMS}
    rounded = [limits[n] for n in ("forward_276x64", "jvp_276x80", "jvp_1024x64", "both_276x64")]
    assert rounded == pytest.approx([145, 482, 3092, 579], abs=1)


def test_the_documentation_shows_the_recorded_predictions():
    root = RATES.parents[3]
    rows = json.loads((root / "benchmarks/results/predictions/gpu_model_h100.json").read_text())["rows"]
    recorded = {row["problem"]: row["predicted_over_limit"] for row in rows}
    shown = re.findall(
        r"^\| (forward|forward \+ JVP|backward|backward through both) (\d+x\d+) \| [^|]+ \| ([\d.]+) \|$",
        (root / "docs/kernels.md").read_text(),
        re.MULTILINE,
    )
    names = {"forward": "forward", "forward + JVP": "jvp", "backward": "backward"}
    found = {f"{names.get(kind, 'both')}_{size}": float(value) for kind, size, value in shown}
    assert found == {name: round(value, 2) for name, value in recorded.items()}
