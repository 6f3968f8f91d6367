"""The cycle model's parts, on machine code of a few lines."""

import json
import re
from pathlib import Path

import pytest
from gpu.model import paths, products
from gpu.model.hopper import Work, sides
from gpu.model.machine import Multiprocessor, Signal, Trace
from gpu.model.problems import Launch, Problem
from gpu.model.sass import Kernel, parse
from gpu_model import PROBLEMS, RATES, main, multiplier
from helpers.machine_code import absent, tool

from pmf import _library

STALL = 41
"""The bit of an instruction's upper half where its schedule begins."""
NO_SCOREBOARDS = 7 << 5 | 7 << 8


def listing(*lines: tuple[str, int] | tuple[str, int, int] | str) -> Kernel:
    """A kernel as nvdisasm prints it: instructions with their stalls and scoreboards (none), and labels."""
    text, address = ".text._Z1kv:\n", 0
    for line in lines:
        if isinstance(line, str):
            text += f"{line}:\n"
            continue
        upper = (line[1] | (line[2] if len(line) > 2 else NO_SCOREBOARDS)) << STALL
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
    """The path around a loop has its products, and no element-by-element accesses that a branch avoids."""
    (head,) = paths.product_loops(LOOP)
    path = paths.hottest(LOOP, head, {head}, LOOP.loops[head], False)
    names = [each.name for block in path for each in LOOP.blocks[block]]
    assert names == ["DEPBAR", "BRA", "HMMA", "HMMA", "BRA"]
    assert LOOP.blocks[0][0].stall == 1


@pytest.mark.parametrize(("warps", "sharing", "over"), [(4, 1, 2.0), (8, 2, 1.1), (16, 4, 1.1)])
def test_warps_of_a_scheduler_share_its_tensor_core(warps, sharing, over):
    """100 products each: bound by the pipe with enough warps, otherwise by the stalls of one."""
    bound = 100 * sharing * RATES_HERE["hmma_cycles"]
    assert bound * 0.95 <= cycles(LOOP, warps) <= bound * over + 100
    assert cycles(LOOP, warps, hmma_cycles=64.0) >= 9 * bound


@pytest.mark.parametrize(("scoreboards", "until"), [(7 << 5, 0.02), (7 << 8, 1)])
def test_a_load_has_its_operands_long_before_its_result(scoreboards, until):
    """The next instruction waits for the scoreboard that the load frees, or for the one that it sets."""
    kernel = listing(
        ("LDG.E R4, [R2.64]", 1, scoreboards), ("IADD3 R2, R2, R4, RZ", 1, NO_SCOREBOARDS | 1 << 11)
    )
    ended = Multiprocessor([[Trace(kernel.blocks[0])]], 1, 1, RATES_HERE, 16.0).ends()[-1]
    waited = ended - RATES_HERE["launch_cycles"]
    assert waited == pytest.approx(until * RATES_HERE["global_latency"], abs=45)


GROUPS_OF_PRODUCTS = listing(
    ("HGMMA.64x96x16.F32.BF16 R72, gdesc[UR16], R72", 1),
    ("HGMMA.64x64x16.F32.BF16 R120, R184, gdesc[UR12].tnspB, R120, gsb0", 1),
    ("WARPGROUP.DEPBAR.LE gsb0, 0x0", 1),
)


@pytest.mark.parametrize("groups", [1, 2])
def test_warpgroups_share_the_tensor_cores(groups):
    """96 and 64 columns take 48 and 32 cycles; a single group waits, two fill each other's gaps."""
    trace = Trace(GROUPS_OF_PRODUCTS.blocks[0])
    ended = Multiprocessor([[trace] * 50] * 4 * groups, 1, 1, RATES_HERE, 16.0).ends()[-1]
    each = (ended - RATES_HERE["launch_cycles"]) / 50
    waits = RATES_HERE["wgmma_latency"] if groups == 1 else 0
    assert each == pytest.approx(groups * 80 + waits, rel=0.06)


def test_narrow_products_wait_for_shared_memory():
    """48 columns, A in shared memory: reading 28 rows of 128 bytes outlasts 24 cycles of computing."""
    kernel = listing(("HGMMA.64x48x16.F32.BF16 R72, gdesc[UR16], R72, gsb0", 1))
    ended = Multiprocessor([[Trace(kernel.blocks[0])] * 200] * 8, 1, 1, RATES_HERE, 16.0).ends()[-1]
    assert (ended - RATES_HERE["launch_cycles"]) / 400 == pytest.approx(28, rel=0.05)


def test_what_was_prefetched_is_read_at_the_rate_of_l2():
    """64 loads of a line each take longer than the latency of one: the multiprocessor's share of the rate."""
    kernel = listing(("LDG.E R4, [R2.64]", 1, 7 << 8), ("IADD3 R2, R2, R4, RZ", 1, NO_SCOREBOARDS | 1 << 11))
    trace = Trace([kernel.blocks[0][0]] * 64 + [kernel.blocks[0][1]]).prefetched()
    ended = Multiprocessor([[trace]], 1, 1, RATES_HERE, 16.0).ends()[-1]
    a_line = 128 * RATES_HERE["clock_hz"] * RATES_HERE["processors"] / RATES_HERE["l2_bytes"]
    assert ended - RATES_HERE["launch_cycles"] == pytest.approx(64 * a_line, abs=45)


def test_copies_and_their_readers_wait_for_each_other():
    """A ring of two slots: a box arrives after its latency, and the third waits until the first is read."""
    copy = Trace(
        listing(("SYNCS.PHASECHK.TRANS64.TRYWAIT P0, [UR11], R0", 1), ("UTMALDG.4D [UR8], [UR6]", 1)).blocks[
            0
        ]
    )
    read = Trace(
        listing(
            ("SYNCS.PHASECHK.TRANS64.TRYWAIT P0, [UR11], R0", 1),
            ("SYNCS.ARRIVE.TRANS64.A1T0 RZ, [UR11], RZ", 1),
        ).blocks[0]
    )
    copies = [
        copy.signalling([Signal(("empty", i - 2)) if i > 1 else None, Signal(("full", i), 10, 10)])
        for i in range(20)
    ]
    reads = [read.signalling([Signal(("full", i)), Signal(("empty", i))]) for i in range(20)]
    machine = Multiprocessor([copies, reads], 1, 1, RATES_HERE, 16.0, {"full": 1, "empty": 1})
    machine.ends()
    rounds = machine.gates.opens["full", 19] - machine.gates.opens["full", 1]
    assert rounds / 9 == pytest.approx(
        RATES_HERE["box_latency"] + 2 * RATES_HERE["mbarrier_latency"], rel=0.1
    )


def test_work_is_divided_as_by_the_launcher():
    """276 tokens: five row blocks per head, alternately three and two per consumer. 1024: two per item."""
    launch = Launch("hopper_forward_kernel<HopperSizes<bf16, 64, 96, 4, true> >", 132, 384, (128, 96), 1)
    work = Work.of(launch, Problem("", 3072, 276, 64), 132)
    assert (work.tiles, work.parts, work.statistics) == (3, 1, False)
    assert [list(map(len, work.shares(item))) for item in (0, 1)] == [[3, 2], [2, 3]]
    long = Work.of(launch, Problem("", 3072, 1024, 64), 132)
    assert (long.tiles, long.parts, list(map(list, long.shares(5)))) == (11, 8, [[11], [10]])


def test_only_the_backward_of_keys_has_statistics_with_its_tiles():
    problem = Problem("", 3072, 276, 64, backward=True)
    for by_keys in (False, True):
        sizes = f"HopperBackwardSizes<bf16, 64, 96, 7, {str(by_keys).lower()}>"
        launch = Launch(f"hopper_backward_kernel<{sizes} >", 132, 384, (128, 96), 1)
        work = Work.of(launch, problem, 132)
        assert (work.consumers, work.columns, work.slots, work.statistics) == (2, 96, 7, by_keys)


def test_tangents_of_the_backward_stream_four_tensors():
    """A ring of nine tiles holds a head of 276; only that of the queries, for keys, has statistics."""
    problem = Problem("", 3072, 276, 64, tangent=True, backward=True)
    for by_keys in (False, True):
        sizes = f"HopperTangentSizes<bf16, 64, 32, 9, {str(by_keys).lower()}, false>"
        launch = Launch(f"hopper_backward_tangents_kernel<{sizes} >", 132, 384, (128, 32), 1)
        work = Work.of(launch, problem, 132)
        assert (work.tiles, work.parts, work.statistics, sides(problem)) == (9, 1, by_keys, 4)


def test_heads_in_shared_memory_are_divided_evenly():
    """Three row blocks of queries and two of keys for one consumer, two and three for the other."""
    problem = Problem("", 3072, 276, 64, backward=True)
    launch = Launch("hopper_backward_heads_kernel<HopperHeadSizes<bf16, 64, 96, 3> >", 132, 384, (128, 96), 1)
    work = Work.of(launch, problem, 132)
    assert (work.columns, work.slots, work.tiles, work.parts, work.hidden(problem)) == (96, 3, 3, 1, 2)
    assert [[list(each) for each in work.shares(by_keys)] for by_keys in (False, True)] == [
        [[0, 2, 4], [1, 3]],
        [[1, 3], [0, 2, 4]],
    ]


def test_single_elements_are_stored_where_that_is_usual():
    """Hopper's kernels store row statistics beside whole vectors: a number by each fourth lane."""
    kernel = listing(
        ("@P0 BRA `(.L_x_1)", 5),
        ("STG.E desc[UR4][R2.64], R4", 1),
        ".L_x_1",
        ("STG.E.128 desc[UR4][R2.64], R4", 1),
        ("EXIT", 5),
    )
    assert paths.hottest(kernel, 0, set(), range(3), False) == [0, 2]
    path = paths.hottest(kernel, 0, set(), range(3), False, elements=True)
    assert path == [0, 1, 2]
    weights = [weight for kind, *_, weight, _ in Trace(paths.expand(kernel, path)).code if kind == "store"]
    assert weights == [0.25, 4]


@pytest.mark.parametrize(
    ("problem", "kernel"),
    [
        ("forward_276x64", "hopper_forward_kernel"),
        ("backward_276x64", "hopper_backward_heads_kernel"),
        ("both_276x64", "hopper_backward_tangents_kernel"),
    ],
)
def test_the_model_recognises_the_hopper_kernels(capsys, problem, kernel):
    """On the built library: its loops, barriers and copies match the model's tables."""
    plans = _library.introspection()
    if plans is None or not plans.build_facts()["has_cuda"]:
        absent("this build of pmf has no CUDA kernels to read")
    if tool("nvdisasm") is None or tool("cuobjdump") is None:
        absent("there is no nvdisasm or no cuobjdump to read machine code with")
    assert main([problem]) == 0
    assert all(kernel in line for line in capsys.readouterr().out.splitlines() if "blocks" in line)


def test_products_of_a_muon_step_are_assigned_to_its_launches():
    """In a wave, those of the Hopper kernels come first; a launch without a tile computes none."""

    def product(wave, m, warpgroups):
        flags = {"symmetric": True, "right_transposed": True, "adds_left": False, "squared": True}
        return {"wave": wave, "m": m, "n": m, "k": m, "matrices": 1, "warpgroups": warpgroups, **flags}

    launches = [{"tile": tile} for tile in ((0, 0), (128, 256), (128, 128), (128, 256))]
    given = [product(0, 64, False), product(0, 768, True), product(1, 768, True)]
    waves = list(products.waves({"products": given, "launches": launches}))
    assert [launch["tile"] for launch, _ in waves] == [(128, 256), (128, 128), (128, 256)]
    assert [[each.m for each in own] for _, own in waves] == [[768], [64], [768]]
    of_mma = [{"tile": (128, 128)}] * 2
    waves = list(products.waves({"products": given, "launches": of_mma}))
    assert [[each.m for each in own] for _, own in waves] == [[64, 768], [768]]


def test_tiles_of_symmetric_products():
    """Squares on and below the diagonal; on it, one factor's rows are among the other's columns."""
    gram = products.Product(1280, 1280, 3456, 7, True, True, False, True, True)
    tiles = {(tile.mirrored, tile.shares_rows): n for tile, n in gram.tiles(updates=False).items()}
    assert tiles == {(True, False): 10, (False, True): 5}
    assert gram.flops() == 2 * 7 * 55 * 128**2 * 3456
    (tile,) = products.Product(1280, 3456, 1280, 1, False, False, False, False, True).tiles(updates=True)
    # 90 squares would read their 512 rows or columns each; there are 1280 rows and 3456 columns.
    assert tile.from_memory == pytest.approx((1280 + 3456) / (5 * 14 * 512))


def test_the_model_recognises_the_hopper_products():
    """On the built library, for every kind of product: its loops, barriers and copies."""
    plans = _library.introspection()
    if plans is None or not plans.build_facts()["has_cuda"]:
        absent("this build of pmf has no CUDA kernels to read")
    if tool("nvdisasm") is None or tool("cuobjdump") is None:
        absent("there is no nvdisasm or no cuobjdump to read machine code with")
    multiply = multiplier(Path(_library.LIBRARY), RATES_HERE)
    plan = plans.newton_schulz_launches(shapes=[(256, 256), (256, 512)], muon=True)
    rows = multiply.rows(plan)
    assert {row.kernel for row in rows} == {"hopper_product_kernel", "hopper_update_kernel"}
    assert all(
        row.seconds > row.product.limit_seconds(RATES_HERE, updates="update" in row.kernel) for row in rows
    )


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("queue=4", "no rate 'queue'"),
        ("wgmma=4", "no rate 'wgmma'"),
        ("wgmma_queue=x", "'x' is no number"),
    ],
)
def test_a_rate_that_does_not_exist_is_one_sentence(capsys, change, message):
    with pytest.raises(SystemExit, match="2"):
        main(["--rate", change])
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "Expecting property name"),
        ("[1]", "it must be a JSON object"),
        ('{"hmma_cycles": 6.4}', "it has no number 'processors'"),
        (json.dumps({**RATES_HERE, "clock_hz": "fast"}), "it has no number 'clock_hz'"),
    ],
)
def test_a_damaged_table_of_rates_is_one_sentence(capsys, tmp_path, content, message):
    path = tmp_path / "rates.json"
    path.write_text(content)
    with pytest.raises(SystemExit, match="2"):
        main(["--rates", str(path)])
    assert f"{path} is not a table of rates: {message}" in capsys.readouterr().err


def test_an_unknown_problem_is_one_sentence(capsys, tmp_path):
    with pytest.raises(SystemExit, match="2"):
        main(["jvp_1x1"])
    assert "there is no problem 'jvp_1x1': choose from forward_276x64" in capsys.readouterr().err


def test_limits_match_the_kernels_page():
    """Microseconds on an H100, by bytes at 276 tokens and by products at 1024."""
    limits = {problem.name: problem.limit_seconds(RATES_HERE) * 1e6 for problem in PROBLEMS}
    rounded = [limits[n] for n in ("forward_276x64", "jvp_276x80", "jvp_1024x64", "both_276x64")]
    assert rounded == pytest.approx([145, 482, 3092, 579], abs=1)


PREDICTIONS = RATES.parents[2] / "results" / "predictions"
PAGE = RATES.parents[3] / "docs" / "kernels.md"


def test_the_documentation_shows_the_recorded_shares_of_a_step():
    rows = json.loads((PREDICTIONS / "gpu_step_h100.json").read_text())["rows"]
    shown = re.findall(r"^\| ([\w' ]+) \| ([\d.]+) % \| ([\d.]+) % \|$", PAGE.read_text(), re.MULTILINE)
    assert len(shown) == 10
    for name, *shares in shown:
        of_name = [row for row in rows if row["kernel"].replace("_", " ").startswith(name)]
        for network, share in zip(("pmf-b/16", "pmf-h/16"), shares, strict=True):
            recorded = sum(row["share"] for row in of_name if row["network"] == network)
            assert f"{recorded:.1%}" == f"{share}%", name


def test_the_documentation_shows_the_recorded_muon_step():
    record = json.loads((PREDICTIONS / "gpu_muon_h100.json").read_text())
    assert record["rates"] == json.loads(RATES.read_text())
    shown = re.findall(r"^\| `([^`]+)` \| ([\d.]+) \| (\d+) \| ([\d.]+) \|$", PAGE.read_text(), re.MULTILINE)
    rows = [row for row in record["rows"] if row["network"] == "pmf-h/16" and "product" in row]
    found = [
        (
            row["product"] + (", last wave" if "update" in row["kernel"] else ""),
            f"{row['predicted_seconds'] * 1e3:.2f}",
            f"{row['flops'] / row['predicted_seconds'] / 1e12:.0f}",
            f"{row['predicted_seconds'] / row['limit_seconds']:.2f}",
        )
        for row in rows
        if row["predicted_seconds"] > 1e-3
    ]
    assert shown == found


def test_the_documentation_shows_the_recorded_predictions():
    """The columns of its table are records, some of which have another rate."""
    columns = {
        "gpu_model_h100_mma": {},
        "gpu_model_h100": {},
        "gpu_model_h100_queue_64": {"wgmma_queue": 64},
        "gpu_model_h100_ahead_0": {"ahead_bytes": 0},
    }
    shown = re.findall(
        r"^\| (forward|forward \+ JVP|backward|backward through both) (\d+x\d+) \|" + r" ([\d.]+) \|" * 4,
        PAGE.read_text(),
        re.MULTILINE,
    )
    names = {"forward": "forward", "forward + JVP": "jvp", "backward": "backward"}
    for column, (record, changed) in enumerate(columns.items(), 2):
        recorded = json.loads((PREDICTIONS / f"{record}.json").read_text())
        assert recorded["rates"] == json.loads(RATES.read_text()) | changed
        expected = {row["problem"]: row["predicted_over_limit"] for row in recorded["rows"]}
        found = {f"{names.get(row[0], 'both')}_{row[1]}": float(row[column]) for row in shown}
        assert found == {name: round(value, 2) for name, value in expected.items()}


def test_the_documentation_shows_what_tiles_of_48_keys_change():
    text = " ".join(PAGE.read_text().split())
    before, after = (
        {row["problem"]: row["predicted_over_limit"] for row in json.loads(path.read_text())["rows"]}
        for path in (PREDICTIONS / f"gpu_model_h100_mma{of}.json" for of in ("_tiles_of_32", ""))
    )
    for problem in ("forward_276x64", "jvp_276x64", "jvp_1024x64"):
        assert f"from {before[problem]:.2f} to {after[problem]:.2f}" in text
    assert sum(before[problem] != after[problem] for problem in before) == 3
