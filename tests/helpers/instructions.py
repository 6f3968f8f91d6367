"""What single instructions must do: tables from the PTX ISA, written down here, and plain numpy.

Each check runs a kernel in tests/emulator/probes.cu on operands given lane by lane.
"""

from collections.abc import Callable

import numpy as np
from helpers.emulator import Planted

LANES = range(32)
Place = Callable[[int, int], tuple[int, int]]

# PTX ISA, "Matrix Fragments for mma.m16n8k16 with floating point type" and "... mma.m16n8k8": the row and
# column of element i of a lane's fragment; group = lane >> 2, member = lane % 4. 16-bit elements: two in a
# register, the first in the lower half.


def a_16bit(lane: int, i: int) -> tuple[int, int]:
    group, member = lane >> 2, lane % 4
    row = group if 0 <= i < 2 or 4 <= i < 6 else group + 8
    return row, member * 2 + (i & 1) + (0 if i < 4 else 8)


def b_16bit(lane: int, i: int) -> tuple[int, int]:
    group, member = lane >> 2, lane % 4
    return member * 2 + (i & 1) + (0 if i < 2 else 8), group


def a_tf32(lane: int, i: int) -> tuple[int, int]:
    group, member = lane >> 2, lane % 4
    return (group if i in (0, 2) else group + 8), (member if i in (0, 1) else member + 4)


def b_tf32(lane: int, i: int) -> tuple[int, int]:
    group, member = lane >> 2, lane % 4
    return (member if i == 0 else member + 4), group


def c_any(lane: int, i: int) -> tuple[int, int]:
    group, member = lane >> 2, lane % 4
    return (group if i < 2 else group + 8), member * 2 + (i & 1)


KINDS = {"bf16": (0, 16, a_16bit, b_16bit), "f16": (1, 16, a_16bit, b_16bit), "tf32": (2, 8, a_tf32, b_tf32)}


def check_mma(planted: Planted, kind: str) -> None:
    """Small whole numbers: every product and sum is exact."""
    number, depth, a_place, b_place = KINDS[kind]
    generator = np.random.default_rng(0)
    a, b, c = (generator.integers(-8, 9, shape) for shape in ((16, depth), (depth, 8), (16, 8)))
    a_registers, b_registers = registers(a, a_place, 4, kind), registers(b, b_place, 2, kind)
    fragment = np.array([[c[c_any(lane, i)] for i in range(4)] for lane in LANES], np.float32)
    planted.begin(0, inputs=[a_registers, b_registers], outputs=[fragment], written=True)
    said = planted.mma(number, a_registers, b_registers, fragment)
    assert said is None, said
    expected = a @ b + c
    for lane in LANES:
        for i in range(4):
            assert fragment[lane, i] == expected[c_any(lane, i)], (lane, i)


def check_ldmatrix(planted: Planted, count: int, transposed: bool) -> None:
    """PTX ISA, ldmatrix: lanes 8 m to 8 m + 7 give matrix m's rows; a lane gets a pair of row lane / 4."""
    generator = np.random.default_rng(1)
    elements = np.arange(32 * 8, dtype=np.uint16).reshape(32, 8)
    of_lane = generator.permutation(32).astype(np.int32)
    result = np.zeros((32, 4), np.uint32)
    planted.begin(1, inputs=[elements, of_lane], outputs=[result])
    said = planted.ldmatrix(count, transposed, elements, of_lane, result)
    assert said is None, said
    for m in range(count):
        matrix = elements[of_lane[8 * m : 8 * m + 8]]
        matrix = matrix.T if transposed else matrix
        for lane in LANES:
            first, second = matrix[lane // 4, lane % 4 * 2], matrix[lane // 4, lane % 4 * 2 + 1]
            assert result[lane, m] == int(second) << 16 | int(first), (m, lane)


def check_lanes(planted: Planted) -> None:
    x = np.random.default_rng(2).standard_normal(32, dtype=np.float32)
    result = np.zeros((32, 4), np.uint32)
    planted.begin(2, inputs=[x], outputs=[result])
    said = planted.lanes(x, result)
    assert said is None, said
    floats = result.view(np.float32)
    assert (floats[:, 0] == x[[lane ^ 5 for lane in LANES]]).all()
    assert (floats[:, 1] == x[[(lane + 3) % 32 for lane in LANES]]).all()
    assert (result[:, 2] == (x[5] > 0)).all()
    # To the nearest number with 10 bits of mantissa; there are no ties here.
    mantissa, exponent = np.frexp(x.astype(np.float64))
    assert (floats[:, 3] == np.ldexp(np.round(mantissa * 2**11) / 2**11, exponent)).all()


def check_copies(planted: Planted) -> None:
    given, result = (
        np.random.default_rng(4).standard_normal((2, 32, 4), dtype=np.float32),
        np.zeros((2, 32, 4), np.float32),
    )
    planted.begin(4, inputs=[given], outputs=[result])
    said = planted.copies(given, result)
    assert said is None, said
    assert (result[0, ::2] == given[0, ::2]).all() and (result[0, 1::2] == 0).all()
    assert (result[1] == given[1]).all()


def check_numbers(planted: Planted) -> None:
    x = np.abs(np.random.default_rng(5).standard_normal(32, dtype=np.float32)) + 0.01
    result = np.zeros((32, 5), np.uint32)
    planted.begin(5, inputs=[x], outputs=[result])
    said = planted.numbers(x, result)
    assert said is None, said
    exact = np.stack(
        [np.exp2(x.astype(np.float64)), np.log2(x.astype(np.float64)), 1 / x.astype(np.float64)], 1
    )
    np.testing.assert_allclose(result.view(np.float32)[:, :3], exact, rtol=2.0**-22)
    halves = x.astype(np.float16).view(np.uint16).astype(np.uint32)
    assert (result[:, 4] == (0x4000 << 16 | halves)).all()
    words = x.view(np.uint32)
    assert (result[:, 3] == (0x4000 << 16 | (words + 0x7FFF + (words >> 16 & 1)) >> 16)).all()


def registers(matrix: np.ndarray, place: Place, count: int, kind: str) -> np.ndarray:
    """The fragments of all lanes, [32, count] words."""
    if kind == "tf32":
        values = [[np.float32(matrix[place(lane, i)]) for i in range(count)] for lane in LANES]
        return np.array(values, np.float32).view(np.uint32)
    halves = np.array([[matrix[place(lane, i)] for i in range(2 * count)] for lane in LANES], np.float32)
    bits = halves.view(np.uint32) >> 16 if kind == "bf16" else halves.astype(np.float16).view(np.uint16)
    return np.ascontiguousarray(bits.astype(np.uint16)).view(np.uint32)
