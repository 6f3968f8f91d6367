"""The Hopper products of Newton-Schulz: results against float64, and the matrices that use other kernels."""

import itertools

import pytest
import torch
from helpers import emulator
from helpers.levels import EMULATED, PTX, at_level
from torch import Tensor

from pmf import _library, reference
from pmf.ops import newton_schulz
from pmf.optim import Muon

pytestmark = pytest.mark.skipif(emulator.why_not() is not None, reason=str(emulator.why_not()))

BFLOAT16, FLOAT16 = DTYPES = (torch.bfloat16, torch.float16)
METHODS = ("direct", "gram")
HOPPER_KB = 227
"""KB of shared memory that make the emulator an sm_90 device."""


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def error(result: Tensor, exact: Tensor) -> float:
    return ((result.double() - exact).norm() / exact.norm()).item()


def check(g: Tensor, method: str, dtype: torch.dtype, processors: int, steps: int = 5) -> Tensor:
    """At most slightly above the error of the plain iteration in the same dtype."""
    options = {"steps": steps, "method": method, "compute_dtype": dtype}
    exact = reference.newton_schulz(g.double(), steps, method="direct")
    plain = error(reference.newton_schulz(g, **options), exact)
    before = emulator.warpgroup_products()
    with emulator.limits(HOPPER_KB, processors):
        result = newton_schulz(g, **options)
    assert emulator.warpgroup_products() > before
    assert error(result, exact) <= 1.5 * plain
    return result


# Short sides: padded to three and four boxes of 64, half a square of 256, one, more.
CASES = [
    (backend, *case)
    for backend in EMULATED
    for case in itertools.product(((192, 200), (250, 500), (300, 310)), METHODS, DTYPES, (1, 132))
]
# nvcc's code runs several times slower.
OF_NVCC = [
    ("ptx", (180, 250), "gram", BFLOAT16, 3),
    ("ptx", (260, 260), "direct", FLOAT16, 132),
]


@pytest.mark.parametrize(
    ("backend", "shape", "method", "dtype", "processors"), [*CASES, *(OF_NVCC if PTX else ())], ids=str
)
def test_shapes(
    backend: str, shape: tuple[int, int], method: str, dtype: torch.dtype, processors: int
) -> None:
    with at_level(backend):
        check(random(*shape), method, dtype, processors, 2)


@pytest.mark.parametrize("seed", range(4))
def test_any_order_of_warps_and_copies_gives_the_same_bits(seed: int) -> None:
    g = random(200, 300)
    with at_level("emulated"), emulator.limits(HOPPER_KB, 1):
        first = newton_schulz(g, 2, compute_dtype=FLOAT16)
        emulator.seed(seed)
        assert torch.equal(newton_schulz(g, 2, compute_dtype=FLOAT16), first)


def test_a_list_gives_the_bits_of_each_matrix_alone() -> None:
    """Also beside a small matrix, whose products are of other kernels and in a launch of their own."""
    matrices = [random(*shape, seed=i) for i, shape in enumerate([(200, 260), (40, 50), (260, 200)])]
    with at_level("emulated"), emulator.limits(HOPPER_KB, 4):
        together = newton_schulz(matrices, 3)
        alone = [newton_schulz(g, 3) for g in matrices]
    for g, a, b in zip(matrices, together, alone, strict=True):
        assert torch.equal(a, b)
        assert error(a, reference.newton_schulz(g.double(), 3)) < 5e-3


@pytest.mark.parametrize("method", METHODS)
def test_odd_scale_free_transposed_and_independent_matrices(method: str) -> None:
    g = torch.randint(-7, 8, (192, 250), generator=torch.Generator().manual_seed(0)).float()
    spoiled = g.clone()
    spoiled[2, 3] = float("nan")
    with at_level("emulated"), emulator.limits(HOPPER_KB, 4):
        expected, negative, turned, zero, nan, scaled = newton_schulz(
            [g, -g, g.mT, g * 0, spoiled, g * 2.0**60], 2, method=method
        )
    assert expected.isfinite().all() and expected.norm() > 1
    assert torch.equal(negative, -expected) and torch.equal(turned, expected.mT)
    assert torch.equal(scaled, expected)
    assert not zero.any() and nan.isnan().all()


def stepped(dtype: torch.dtype, *shapes: tuple[int, int]) -> list[Tensor]:
    """How far a step of Muon moves parameters (those of 16 bits: their masters)."""
    params = [torch.nn.Parameter(random(*shape, seed=i).to(dtype)) for i, shape in enumerate(shapes)]
    start = [p.detach().float().clone() for p in params]
    for i, p in enumerate(params):
        p.grad = random(*p.shape, seed=10 + i).to(dtype)
    optimizer = Muon(params, lr=0.02, ns_steps=2)
    optimizer.step()
    moved = (optimizer.state[p].get("master", p.detach()) for p in params)
    return [after - before for after, before in zip(moved, start, strict=True)]


@pytest.mark.parametrize(
    ("backend", "dtype", "shapes"),
    [
        ("emulated", torch.float32, ((192, 256), (264, 200), (200, 251))),  # wide, tall, odd
        ("emulated", BFLOAT16, ((264, 200), (200, 251))),
        *([("ptx", torch.float32, ((264, 200),))] if PTX else []),
    ],
    ids=str,
)
def test_a_step_of_muon_updates_what_it_has_prefetched(
    backend: str, dtype: torch.dtype, shapes: tuple[tuple[int, int], ...]
) -> None:
    """Every byte once, and of rows that are no whole pieces of 16 bytes, at most two pieces more each."""
    expected = stepped(dtype, *shapes)
    with at_level(backend), emulator.limits(HOPPER_KB, 4):
        before = emulator.prefetched()
        found = stepped(dtype, *shapes)
        prefetched = emulator.prefetched() - before
    for moved, by_cpu in zip(found, expected, strict=True):
        assert error(moved, by_cpu.double()) < 1e-2
    sizes = (4,) if dtype == torch.float32 else (2, 4)  # the parameter's, the master's
    needed = sum(m * n * size for m, n in shapes for size in sizes)
    odd = sum(m for m, n in shapes for size in sizes if n * size % 16)
    assert needed <= prefetched <= needed + odd * 2 * 16


@pytest.mark.parametrize(
    ("shape", "dtype", "shared_kb"),
    [((128, 200), FLOAT16, HOPPER_KB), ((200, 200), torch.float32, HOPPER_KB), ((200, 200), FLOAT16, 163)],
    ids=["small", "fp32", "no sm_90"],
)
def test_other_kernels_serve(shape: tuple[int, int], dtype: torch.dtype, shared_kb: int) -> None:
    g = random(*shape)
    before = emulator.warpgroup_products()
    with at_level("emulated"), emulator.limits(shared_kb, 4):
        result = newton_schulz(g, 2, compute_dtype=dtype)
    assert emulator.warpgroup_products() == before
    assert error(result, reference.newton_schulz(g.double(), 2)) < 5e-3


def test_plans() -> None:
    """One persistent block per multiprocessor, or two per square of 256 x 256 if there is less work."""
    if (plans := _library.introspection()) is None:
        pytest.skip("this build has no introspection module")

    def tiles(**options: object) -> list[tuple[int, ...]]:
        launches = plans.newton_schulz_launches(method="direct", **options)["launches"]
        return [(*each["tile"], each["blocks"]) for each in launches if each["tile"] != (0, 0)]

    for count, symmetric, whole in ((12, 132, 132), (1, 12, 18), (2, 24, 36)):
        found = tiles(shapes=[(768, 768)] * count)
        assert found == 5 * [(128, 256, symmetric), (128, 256, symmetric), (128, 256, whole)]
    assert {tile[:2] for tile in tiles(shapes=[(100, 768)])} == {(128, 128)}
    small_too = tiles(shapes=[(768, 768), (100, 768)])
    assert [tile[:2] for tile in small_too[:2]] == [(128, 256), (128, 128)]
