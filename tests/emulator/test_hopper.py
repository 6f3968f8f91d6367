"""The Hopper instructions against tables of the PTX ISA, reproduced here, and one fault of each kind."""

import re
from collections.abc import Callable, Iterator

import numpy as np
import pytest
from helpers.emulator import ROOT, SOURCE, Planted
from helpers.levels import EMULATED, NVCC
from helpers.ptx.modules import Module, of_source
from helpers.ptx.planted import CSRC, planted_at

THREADS = range(128)

# PTX ISA, 5.5.7 "Swizzling Modes": the 16-byte chunks of eight rows, by their place in the row.
SWIZZLES = {
    128: ("01234567", "10325476", "23016745", "32107654", "45670123", "54761032", "67452301", "76543210"),
    64: ("0123", "0123", "1032", "1032", "2301", "2301", "3210", "3210"),
    32: ("01", "01", "01", "01", "10", "10", "10", "10"),
}
# PTX ISA, 9.7.15.5.1.2.2 "Matrix Descriptor Format": the swizzling mode in bits 62 to 63.
MODES = {128: 1, 64: 2, 32: 3}


def place_of(row: int, column: int, width: int) -> int:
    """Where an element of 16 bits is in a swizzled tile of rows of `width` bytes."""
    chunk = SWIZZLES[width][row % 8].index(str(column // 8))
    return row * width // 2 + chunk * 8 + column % 8


def tile(matrix: np.ndarray, width: int) -> np.ndarray:
    """The rows of a matrix as wide as the swizzle, as they lie in shared memory."""
    image = np.zeros(matrix.size, np.uint16)
    for row in range(matrix.shape[0]):
        for column in range(matrix.shape[1]):
            image[place_of(row, column, width)] = matrix[row, column]
    return image


def descriptor(start: int, leading: int, stride: int, width: int) -> int:
    """Bits 0 to 13, 16 to 29, 32 to 45: the address and two byte offsets, without their last four bits."""
    return start >> 4 | leading >> 4 << 16 | stride >> 4 << 32 | MODES[width] << 62


def sum_at(thread: int, i: int) -> tuple[int, int]:
    """PTX ISA, "Register Fragments" of wgmma.m64nNk16, matrix D: row and column of a thread's element i."""
    warp, lane = thread // 32, thread % 32
    return 16 * warp + lane // 4 + 8 * (i % 4 // 2), 8 * (i // 4) + lane % 4 * 2 + i % 2


def factor_at(thread: int, i: int) -> tuple[int, int]:
    """The same of matrix A: elements 2 r and 2 r + 1 are in register r."""
    warp, lane = thread // 32, thread % 32
    return 16 * warp + lane // 4 + 8 * (i % 4 // 2), lane % 4 * 2 + i % 2 + 8 * (i // 4)


def bits(x: np.ndarray, half: bool) -> np.ndarray:
    if half:
        return x.astype(np.float16).view(np.uint16)
    return (x.astype(np.float32).view(np.uint32) >> 16).astype(np.uint16)


@pytest.fixture(scope="module", params=(*EMULATED, *NVCC))
def planted(request: pytest.FixtureRequest) -> Iterator[Planted]:
    modules = (of_nvcc(),) if request.param == "ptx" else None
    with planted_at(request.param, modules) as found:
        yield found


def of_nvcc() -> Module:
    return of_source(SOURCE / "hopper.cu", CSRC, "compute_90a")


@pytest.mark.parametrize("adds", [False, True])
@pytest.mark.parametrize("half", [False, True])
@pytest.mark.parametrize("step", range(4))
@pytest.mark.parametrize("keys", [32, 48, 96, 256])
def test_product_of_two_tiles(planted: Planted, keys: int, step: int, half: bool, adds: bool) -> None:
    """A[m][k] and B[n][k], 64 columns of K with the 128-byte swizzle: eight rows are 1024 bytes."""
    generator = np.random.default_rng(step)
    a, b = generator.integers(-8, 9, (64, 64)), generator.integers(-8, 9, (keys, 64))
    image = np.concatenate([tile(bits(x, half), 128) for x in (a, b)])
    here = slice(16 * step, 16 * step + 16)
    check(
        planted, half, adds, image, a[:, here] @ b[:, here].T, None, False,
        descriptor(32 * step, 16, 1024, 128), descriptor(64 * 128 + 32 * step, 16, 1024, 128),
    )  # fmt: skip


@pytest.mark.parametrize("adds", [False, True])
@pytest.mark.parametrize("half", [False, True])
@pytest.mark.parametrize("step", range(4))
def test_product_with_a_transposed_tile(planted: Planted, step: int, half: bool, adds: bool) -> None:
    """A[m][k] as above, B[k][n] in pieces of 64 rows and 64 columns, 16 rows of them for each step."""
    generator = np.random.default_rng(step)
    a, b = generator.integers(-8, 9, (64, 64)), generator.integers(-8, 9, (64, 256))
    image = np.concatenate([tile(bits(x, half), 128) for x in (a, *np.split(b, 4, 1))])
    here = slice(16 * step, 16 * step + 16)
    check(
        planted, half, adds, image, a[:, here] @ b[here], None, True,
        descriptor(32 * step, 16, 1024, 128), descriptor((64 + 16 * step) * 128, 64 * 128, 1024, 128),
    )  # fmt: skip


@pytest.mark.parametrize("adds", [False, True])
@pytest.mark.parametrize("half", [False, True])
@pytest.mark.parametrize(("columns", "width"), [(64, 128), (128, 128), (32, 64), (16, 32), (80, 32)])
def test_product_of_registers(planted: Planted, columns: int, width: int, half: bool, adds: bool) -> None:
    """B[k][n] in pieces of 64, 32 or 16 columns, 48 rows each: K runs across rows."""
    generator = np.random.default_rng(columns)
    a, b = generator.integers(-8, 9, (64, 16)), generator.integers(-8, 9, (48, columns))
    pieces = np.split(b, columns // (width // 2), 1)
    image = np.concatenate([tile(bits(piece, half), width) for piece in pieces])
    start, leading, stride = 32 * width, 48 * width, 8 * width  # rows 32 to 47
    check(planted, half, adds, image, a @ b[32:], a, True, 0, descriptor(start, leading, stride, width))


@pytest.mark.parametrize("adds", [False, True])
@pytest.mark.parametrize("half", [False, True])
@pytest.mark.parametrize("step", range(4))
def test_product_of_registers_and_a_tile(planted: Planted, step: int, half: bool, adds: bool) -> None:
    """B[n][k] of 48 rows, as in test_product_of_two_tiles()."""
    generator = np.random.default_rng(step)
    a, b = generator.integers(-8, 9, (64, 16)), generator.integers(-8, 9, (48, 64))
    image = tile(bits(b, half), 128)
    product = a @ b[:, 16 * step : 16 * step + 16].T
    check(planted, half, adds, image, product, a, False, 0, descriptor(32 * step, 16, 1024, 128))


def check(
    planted: Planted, half: bool, adds: bool, image: np.ndarray, product: np.ndarray,
    a: np.ndarray | None, transposed: bool, a_descriptor: int, b_descriptor: int,
) -> None:  # fmt: skip
    columns = product.shape[1]
    rows = np.zeros((128, 4), np.uint32)
    if a is not None:
        elements = np.array([[a[factor_at(t, i)] for i in range(8)] for t in THREADS])
        rows = np.ascontiguousarray(bits(elements, half)).view(np.uint32)
    before = np.random.default_rng(5).integers(-8, 9, (64, columns))
    sums = np.array([[before[sum_at(t, i)] for i in range(columns // 2)] for t in THREADS], dtype=np.float32)
    planted.begin(0, inputs=[image, rows], outputs=[sums], written=True)
    descriptors = a_descriptor, b_descriptor
    said = planted.product(half, columns // 8, transposed, image, *descriptors, rows, sums, adds)
    assert said is None, said
    expected = product + before if adds else product
    for thread in THREADS:
        for i in range(columns // 2):
            assert sums[thread, i] == expected[sum_at(thread, i)], (thread, i)


@pytest.mark.parametrize("width", SWIZZLES)
@pytest.mark.parametrize(
    "place", [(0, 0, 0, 0), (16, 61, 2, 1), (64, -5, 0, 1), (0, 200, 1, 1), (0, 3, 3, 0)]
)
def test_copy_of_a_box(planted: Planted, place: tuple[int, int, int, int], width: int) -> None:
    """24 rows of a tensor [2][3][70][80] whose rows and heads are interchanged, zeros outside of it."""
    tensor = np.arange(1, 2 * 70 * 3 * 88 + 1).astype(np.uint16).reshape(2, 70, 3, 88)
    sizes = np.array([80, 70, 3, 2], np.uint64)
    strides = np.array([3 * 88 * 2, 88 * 2, 70 * 3 * 88 * 2], np.uint64)
    image, elected = np.zeros(24 * width // 2, np.uint16), np.zeros(4, np.int32)
    planted.begin(3, inputs=[tensor], outputs=[image, elected])
    said = planted.box(tensor, sizes, strides, 24, width, np.array(place, np.int32), image, elected)
    assert said is None, said
    column, row, head, batch = place
    expected = np.zeros((24, width // 2), np.uint16)
    for r in range(24):
        for c in range(width // 2):
            if 0 <= row + r < 70 and 0 <= column + c < 80 and head < 3:
                expected[r, c] = tensor[batch, row + r, head, column + c]
    assert (image == tile(expected, width)).all()
    assert (elected == 1).all()


@pytest.mark.parametrize(
    ("offset", "row_bytes"), [(8, 176), (0, 168)], ids=["address off 16 bytes", "rows off 16 bytes"]
)
def test_tensors_that_a_map_cannot_describe(planted: Planted, offset: int, row_bytes: int) -> None:
    tensor = np.zeros(10000, np.uint16)[offset // 2 :]
    image, elected, place = np.zeros(8 * 64, np.uint16), np.zeros(4, np.int32), np.zeros(4, np.int32)
    sizes, strides = np.array([80, 8, 1, 1], np.uint64), np.array([row_bytes, 1600, 1600], np.uint64)
    planted.begin(3, inputs=[tensor], outputs=[image, elected])
    assert planted.box(tensor, sizes, strides, 8, 128, place, image, elected) == "no such tensor map"


@pytest.mark.parametrize(
    ("offset", "size", "finding"),
    [
        (16, 48, None),
        (64, 16, None),  # the last four bytes, and twelve that follow the tensor
        (8, 16, "needs an address that is a multiple of 16, got one 8 bytes past it"),
        (0, 24, "24 bytes, which are no whole pieces of 16"),
        (16, 80, "belongs to no tensor"),
    ],
)
def test_prefetch(planted: Planted, offset: int, size: int, finding: str | None) -> None:
    """Of a tensor of 68 bytes."""
    storage = np.zeros(256, np.uint8)
    tensor = storage[-storage.ctypes.data % 16 :][:68]
    planted.begin(0, inputs=[tensor], outputs=[])
    said = planted.prefetch(tensor, offset, size)
    assert said is None if finding is None else said is not None and finding in said


STUCK = "(threads that wait forever|a barrier that not all threads reach): .*"
OVERWRITTEN = (
    r"written while a product reads it|written after warp \d read it|read while an asynchronous copy"
)
FOUND = {
    "sums_read_before_the_wait": "sums of a product are (read|used) before they have been waited for",
    "sums_written_before_the_wait": "sums of a product are (read|written|used) before they have been waited",
    "factor_written_before_the_wait": "the registers of A are written while a product reads them",
    "slot_released_before_the_wait": OVERWRITTEN,
    "wrong_parity": STUCK + r"the mbarrier at \d+ \(phase 2, 1 of 1 arrivals and 0 bytes .* parity 0",
    "parity_of_the_phase_before": STUCK + r"|read but was never written|read while an asynchronous copy|"
    + r"after (a box copy|thread \d+) wrote it, with no barrier between|" + OVERWRITTEN,
    "bytes_that_never_come": STUCK + r"waits at the mbarrier at \d+ \(phase 0, 0 of 1 arrivals and 16 bytes",
    "arrival_missing": STUCK + r"waits at the mbarrier at \d+ \(phase 0, 1 of 9 arrivals and 0 bytes missing",
    "arrival_too_many": "one arrival too many at the mbarrier|" + STUCK,
    "barrier_not_initialised": "is used as an mbarrier but was never initialised",
    "no_fence_of_barriers": "is used by a copy with no fence.mbarrier_init after its initialisation",
    "no_fence_between_proxies": r"read by a product after thread \d+ wrote it, with no fence.proxy.async",
    "no_fence_before_products": "a product uses registers with no wgmma.fence after they were written",
    "descriptor_off_its_alignment": "the descriptor of B starts 128 bytes past a multiple of 1024",
    "products_never_waited_for": r"warp \d ended without waiting for its products|" + OVERWRITTEN,
    "copy_never_waited_for": "a block ended (while a box copy|without waiting for the copies)",
    "too_many_registers": STUCK + "waits for 240 registers per thread, but 0 of the block's are free",
}  # fmt: skip
# nvcc's registers have no address to watch.
UNSEEN = {"ptx": {"factor_written_before_the_wait"}}


def run(planted: Planted, fault: str, seed: int) -> tuple[str | None, np.ndarray, np.ndarray]:
    """The emulator's report, and the actual and expected sums."""
    generator = np.random.default_rng(seed)
    a, b = generator.integers(-8, 9, (4, 64, 64)), generator.integers(-8, 9, (4, 48, 64))
    tensors = [bits(x, half=False) for x in (a, b)]
    sums = np.zeros((2, 128, 24), np.float32)
    planted.begin(seed, inputs=tensors, outputs=[sums])
    said = planted.hopper(fault, *tensors, sums)
    expected = np.einsum("rmk,rnk->mn", a, b)
    return said, sums, np.array([[expected[sum_at(t, i)] for i in range(24)] for t in THREADS])


def unguarded(text: str) -> list[str]:
    """Assembly that accesses memory or waits for it, but lets the compiler move accesses past it."""
    found = re.findall(r"asm( volatile)?\((.*?)\);", text, re.DOTALL)
    kinds = r"mbarrier\.|fence\.|cp\.async|commit_group|wait_group"
    return [
        body for volatile, body in found if re.search(kinds, body) and not (volatile and '"memory"' in body)
    ]


def test_missing_clobbers_are_caught() -> None:
    """Checked in the text: this nvcc moves nothing even without them."""
    text = (ROOT / "csrc" / "cuda" / "common" / "hopper.cuh").read_text()
    text = text[: text.index("#define PMF_SUM(")] + text[text.index("#undef PMF_WGMMA") :]
    assert unguarded(text) == []
    guards = [match.span() for match in re.finditer(r':+ ?"memory"|\s*: "memory"', text)]
    assert len(guards) >= 11
    assert sum(len(unguarded(text[:start] + text[end:])) for start, end in guards) >= 11


def test_every_fault_has_an_expected_report(planted: Planted) -> None:
    assert set(planted.hopper_faults) == {"none", *FOUND}


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("fault", FOUND)
def test_fault_is_found(planted: Planted, request: pytest.FixtureRequest, fault: str, seed: int) -> None:
    said, sums, _ = run(planted, fault, seed)
    backend = "ptx" if "ptx" in request.node.name else "emulated"
    if fault in UNSEEN.get(backend, ()):
        return
    if backend == "ptx" and fault == "sums_read_before_the_wait" and said is None:
        assert np.isnan(sums).any()  # the value read there is not a number
        return
    assert said is not None and re.search(FOUND[fault], said), said


UNPREPARED = r"never initialised|with no fence.mbarrier_init after its initialisation"
FOUND_IN_CLUSTERS = {
    "slot_filled_before_the_peer_has_read_it": OVERWRITTEN
    + "|written while an asynchronous copy|with no barrier between|one arrival too many|"
    + STUCK,
    "copy_that_the_peer_does_not_get": STUCK + r"phase \d, 0 of 1 arrivals and 8192 bytes missing",
    "no_barrier_before_the_peers_are_used": UNPREPARED,
    "block_that_ends_too_soon": "of a block that has ended|to a block that has ended",
    "no_arrival_at_the_barrier_of_the_cluster": STUCK
    + "waits at barrier 16|with no barrier between|"
    + UNPREPARED,
}


def run_cluster(planted: Planted, fault: str, seed: int) -> tuple[str | None, np.ndarray, int]:
    """The emulator's report, each block's sums by lane, and what they add up to."""
    a = np.random.default_rng(seed).integers(-8, 9, (4, 64, 64))
    tensor, sums = bits(a, half=False), np.zeros((2, 32), np.float32)
    planted.begin(seed, inputs=[tensor], outputs=[sums])
    return planted.cluster(fault, tensor, sums), sums, 2 * int(a.sum())


@pytest.mark.parametrize("seed", range(10))
def test_cluster_without_a_fault(planted: Planted, seed: int) -> None:
    assert set(planted.cluster_faults) == {"none", *FOUND_IN_CLUSTERS}
    said, sums, expected = run_cluster(planted, "none", seed)
    assert said is None, said
    assert (sums.sum(1) == expected).all()


@pytest.mark.parametrize("fault", FOUND_IN_CLUSTERS)
def test_fault_in_a_cluster_is_found(planted: Planted, fault: str) -> None:
    """It takes an order in which the blocks do not happen to wait for each other."""
    said = [run_cluster(planted, fault, seed)[0] for seed in range(20)]
    found = [x for x in said if x is not None]
    assert len(found) >= 5
    for x in found:
        assert re.search(FOUND_IN_CLUSTERS[fault], x), x


@pytest.mark.parametrize("seed", range(10))
def test_without_a_fault(planted: Planted, seed: int) -> None:
    said, sums, expected = run(planted, "none", seed)
    assert said is None, said
    assert (sums == expected).all()


# ---- the assembly itself


def check_products(planted: Planted) -> None:
    test_product_of_two_tiles(planted, 48, 1, False, True)
    test_product_of_registers_and_a_tile(planted, 1, False, True)
    test_product_of_registers(planted, 32, 64, False, True)


def check_copy(planted: Planted) -> None:
    test_copy_of_a_box(planted, (16, 61, 2, 1), 128)


def check_pipeline(planted: Planted) -> None:
    test_without_a_fault(planted, 0)


def check_cluster(planted: Planted) -> None:
    for seed in range(4):
        test_cluster_without_a_fault(planted, seed)


Check = Callable[[Planted], None]
WAIT, ARRIVAL = r"wgmma\.wait_group\.sync\.aligned ", r"mbarrier\.arrive\.shared::cta\.b64 _, \[%\w+\];"
EXPECT = r"mbarrier\.arrive\.expect_tx(\.shared::cta\.b64 _, \[%\w+\]), %\w+"
# What hopper.cuh's assembly is taken for, what is wrong instead, and who sees it.
ASSEMBLY: dict[str, tuple[str, str, Check]] = {
    "registers of A exchanged": (r"(m64n48k16[^;]*\}, \{%\w+, )(%\w+), (%\w+)", r"\1\3, \2", check_products),
    "sums exchanged": (r"(m64n48k16\S+ \{%\w+, )(%\w+), (%\w+)", r"\1\3, \2", check_products),
    "sums that are not added to": (r"setp\.ne\.b32 adds", "setp.eq.b32 adds", check_products),
    "not transposed": (r"(m64n32k16[^;]*adds, 1, 1, )1", r"\g<1>0", check_products),
    "the other type": (r"f32\.bf16\.bf16", "f32.f16.f16", check_products),
    "A and B exchanged": (r"(m64n48k16[^;]*\}, )(%rd\d+), (%rd\d+)", r"\1\3, \2", check_products),
    "no group": (r"wgmma\.commit_group\.sync\.aligned;", "", check_products),
    "one group too few waited for": (WAIT + "0", "wgmma.wait_group.sync.aligned 1", check_products),
    "no fence of registers": (r"wgmma\.fence\.sync\.aligned;", "", check_products),
    "no fence between proxies": (r"fence\.proxy\.async\.shared::cta;", "", check_products),
    "no fence of barriers": (r"fence\.mbarrier_init\.release\.cluster;", "", check_copy),
    "head and batch exchanged": (r"(\{%\w+, %\w+, )(%\w+), (%\w+)\}\], \[", r"\1\3, \2}], [", check_copy),
    "bytes not announced": (EXPECT, r"mbarrier.arrive\1", check_copy),
    "a wait that is always over": (r"1, 0, over", "1, 1, over", check_copy),
    "every lane elected": (r"1, 0, elected", "1, 1, elected", check_copy),
    "a parity ignored": (r"(try_wait\S+ over, \[%\w+\], )%\w+", r"\g<1>0", check_pipeline),
    "no arrival": (ARRIVAL, "", check_pipeline),
    "registers not released": (r"setmaxnreg\.dec", "setmaxnreg.inc", check_pipeline),
    "a copy to one block only": (r"\.multicast::cluster( \[[^;]*), %\w+;", r"\1;", check_cluster),
    "its own barrier for the peer's": (r"mapa\S+ (%\w+), (%\w+), %\w+", r"mov.b32 \1, \2", check_cluster),
    "no wait for the cluster": (r"barrier\.cluster\.wait\.acquire\.aligned;", "", check_cluster),
}  # fmt: skip


@pytest.mark.skipif(not NVCC, reason="needs nvcc")
@pytest.mark.parametrize("name", ASSEMBLY)
def test_fault_in_the_assembly_is_caught(name: str) -> None:
    """Planted in the PTX, where nvcc leaves assembly as it is written."""
    pattern, wrong, check = ASSEMBLY[name]
    text, count = re.subn(pattern, wrong, of_nvcc().text)
    assert count > 0, f"plant the fault '{name}' anew: hopper.cuh has changed"
    with planted_at("ptx", (Module(text),)) as planted, pytest.raises(AssertionError) as caught:
        check(planted)
    assert "the ptx backend" not in str(caught.value)  # it has run


@pytest.mark.skipif(not NVCC, reason="needs nvcc")
def test_the_assembly_without_a_fault_passes() -> None:
    with planted_at("ptx", (of_nvcc(),)) as planted:
        for check in (check_products, check_copy, check_pipeline, check_cluster):
            check(planted)
