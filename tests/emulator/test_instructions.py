"""The emulated instructions, and nvcc's, against the tables in the PTX ISA and plain numpy."""

import math
from collections.abc import Iterator
from fractions import Fraction

import numpy as np
import pytest
from helpers import instructions
from helpers.emulator import Planted, tensor_cores
from helpers.instructions import KINDS, LANES, c_any, registers
from helpers.levels import EMULATED, NVCC
from helpers.ptx.planted import planted_at


@pytest.fixture(scope="module", params=(*EMULATED, *NVCC))
def planted(request: pytest.FixtureRequest) -> Iterator[Planted]:
    with planted_at(request.param) as found:
        yield found


@pytest.mark.parametrize("kind", KINDS)
def test_mma(planted: Planted, kind: str) -> None:
    instructions.check_mma(planted, kind)


def aligned_sum(a: np.ndarray, b: np.ndarray, c: float, bits: int, blocks: int) -> float:
    """A row times a column plus c, as described by Fasi et al. (2021); normal numbers only."""
    total = Fraction(c)
    for x, y in zip(np.split(a, blocks), np.split(b, blocks), strict=True):
        terms = [total, *(Fraction(float(p)) * Fraction(float(q)) for p, q in zip(x, y, strict=True))]
        exponents = [math.frexp(float(total))[1] - 1] if total else []
        exponents += [math.frexp(p)[1] + math.frexp(q)[1] - 2 for p, q in zip(x, y, strict=True) if p and q]
        if not exponents:
            return 0.0
        unit = Fraction(2) ** (max(exponents) - bits)
        total = cut(sum(int(t / unit) for t in terms) * unit)  # int() cuts toward zero
    return float(total)


def cut(x: Fraction) -> Fraction:
    """To 24 bits, toward zero."""
    if x == 0:
        return x
    unit = Fraction(2) ** (math.frexp(float(abs(x)))[1] - 24)
    if abs(x) < Fraction(2) ** 23 * unit:  # float(x) was rounded up to a power of two
        unit /= 2
    return int(x / unit) * unit


@pytest.mark.parametrize(("bits", "blocks"), [(24, 2), (25, 1), (23, 2)])
@pytest.mark.parametrize("kind", KINDS)
def test_mma_truncates_its_sums(planted: Planted, kind: str, bits: int, blocks: int) -> None:
    """Bit for bit, with terms that differ by up to 2^24, some zero, some cancelling."""
    number, depth, a_place, b_place = KINDS[kind]
    generator = np.random.default_rng(3)

    def numbers(*shape: int) -> np.ndarray:
        x = generator.integers(-255, 256, shape) * 2.0 ** generator.integers(-6, 7, shape)
        return np.where(generator.random(shape) < 0.1, 0.0, x)

    a, b, c = numbers(16, depth), numbers(depth, 8), numbers(16, 8)
    a[:, 1], b[1] = -a[:, 0], b[0]
    c[3] = 0.0
    c[5] *= 2.0**-20
    a_registers, b_registers = registers(a, a_place, 4, kind), registers(b, b_place, 2, kind)
    fragment = np.array([[c[c_any(lane, i)] for i in range(4)] for lane in LANES], np.float32)
    planted.begin(0, inputs=[a_registers, b_registers], outputs=[fragment], written=True)
    with tensor_cores(bits, blocks, planted.path):
        assert planted.mma(number, a_registers, b_registers, fragment) is None
    expected = np.array(
        [[aligned_sum(a[i], b[:, j], c[i, j], bits, blocks) for j in range(8)] for i in range(16)]
    )
    assert (expected != (a @ b + c)).any()
    for lane in LANES:
        for i in range(4):
            assert fragment[lane, i] == expected[c_any(lane, i)], (lane, i)


def test_mma_of_infinities_and_nan(planted: Planted) -> None:
    """Terms stay in their rows and columns; a sum beyond fp32 is infinite."""
    a, b, c = np.ones((16, 16)), np.ones((16, 8)), np.zeros((16, 8))
    a[2, 3], a[4, 5], b[7, 6], c[9, 1] = np.inf, np.nan, -np.inf, np.inf
    a[11], b[:, 3] = 2.0**100, 2.0**27
    with np.errstate(invalid="ignore", over="ignore"):
        expected = (a @ b + c).astype(np.float32)
    expected[11, 3] = np.inf
    number, _, a_place, b_place = KINDS["bf16"]
    a_registers, b_registers = registers(a, a_place, 4, "bf16"), registers(b, b_place, 2, "bf16")
    fragment = np.array([[c[c_any(lane, i)] for i in range(4)] for lane in LANES], np.float32)
    planted.begin(0, inputs=[a_registers, b_registers], outputs=[fragment], written=True)
    assert planted.mma(number, a_registers, b_registers, fragment) is None
    for lane in LANES:
        for i in range(4):
            np.testing.assert_equal(fragment[lane, i], expected[c_any(lane, i)])


def test_tf32_ignores_the_last_13_bits(planted: Planted) -> None:
    one_and_a_bit = np.full((32, 4), 0x3F801FFF, np.uint32)
    ones = np.full((32, 2), 0x3F800000, np.uint32)
    fragment = np.zeros((32, 4), np.float32)
    planted.begin(0, inputs=[one_and_a_bit, ones], outputs=[fragment], written=True)
    assert planted.mma(2, one_and_a_bit, ones, fragment) is None
    assert (fragment == 8).all()


@pytest.mark.parametrize(("count", "transposed"), [(2, False), (4, False), (4, True)])
def test_ldmatrix(planted: Planted, count: int, transposed: bool) -> None:
    instructions.check_ldmatrix(planted, count, transposed)


def test_lanes(planted: Planted) -> None:
    instructions.check_lanes(planted)


def test_copies(planted: Planted) -> None:
    instructions.check_copies(planted)


def test_numbers(planted: Planted) -> None:
    instructions.check_numbers(planted)


@pytest.mark.parametrize(
    ("grid", "block", "shared", "sentence"),
    [
        (1, 32, 163 * 1024 + 1, "a block with 166913 bytes of shared memory; the limit is 166912"),
        (1, 1025, 0, "a block of 1025 x 1 x 1 threads"),
        (1, 0, 0, "a block of 0 x 1 x 1 threads"),
        (0, 32, 0, "a grid of 0 x 1 x 1 blocks"),
    ],
)
def test_impossible_launches(planted: Planted, grid: int, block: int, shared: int, sentence: str) -> None:
    x, result = np.zeros(32, np.float32), np.zeros((32, 4), np.uint32)
    planted.begin(0, inputs=[x], outputs=[result])
    said = planted.launch(grid, block, shared, x, result)
    assert said == f"the emulator cannot launch {sentence}"
