"""Newton-Schulz with the CUDA kernels, on a GPU or emulated: properties, and the error against float64."""

from collections.abc import Iterator

import pytest
import torch
from helpers.kernels import PLACES, at_place
from torch import Tensor

from pmf import reference
from pmf.ops import newton_schulz

METHODS = ("direct", "gram")
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
# Within a tile and across several; across several strips of the prologue; odd; square, wide and tall.
SHAPES = ((1, 1), (5, 3), (20, 70), (66, 66), (130, 48), (7, 1100), (260, 270))


@pytest.fixture(params=PLACES)
def kernels(request: pytest.FixtureRequest) -> Iterator[torch.device]:
    """The device whose tensors go to the CUDA kernels."""
    with at_place(request.param) as device:
        yield device


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def error(result: Tensor, exact: Tensor) -> float:
    return ((result.double().cpu() - exact.cpu()).norm() / exact.norm()).item()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("kind", ["gaussian", "singular values 1 to 1e-3", "rank 5"])
def test_error_is_that_of_the_plain_iteration_in_the_same_dtype(kernels, kind, method, dtype):
    """At most slightly above it. float32 is three TF32 products, so it rounds three sums instead of one."""
    m, n = 60, 150
    g = random(m, n)
    if kind == "rank 5":
        g = random(m, 5) @ random(5, n, seed=1)
    elif kind != "gaussian":
        left, right = torch.linalg.qr(random(m, m))[0], torch.linalg.qr(random(n, m, seed=1))[0]
        g = left @ (torch.logspace(0, -3, m)[:, None] * right.T)
    exact = reference.newton_schulz(g.double(), method="direct")
    plain = error(reference.newton_schulz(g, method=method, compute_dtype=dtype), exact)
    result = newton_schulz(g.to(kernels), method=method, compute_dtype=dtype)
    assert error(result, exact) <= (4 if dtype == torch.float32 else 1.5) * plain


@pytest.mark.parametrize("shape", SHAPES[:-1])
def test_full_float32_and_tf32(kernels, shape):
    g = random(*shape)
    exact = reference.newton_schulz(g.double())
    before = torch.get_float32_matmul_precision()
    try:
        for precision, limit in (("highest", 2e-5), ("high", 2e-2)):
            torch.set_float32_matmul_precision(precision)
            for method in METHODS:
                result = newton_schulz(g.to(kernels), method=method, compute_dtype=torch.float32)
                assert error(result, exact) < limit, (precision, method)
    finally:
        torch.set_float32_matmul_precision(before)


def test_a_list_gives_the_bits_of_each_matrix_alone(kernels):
    matrices = [random(*shape, seed=i).to(kernels) for i, shape in enumerate(SHAPES)]
    matrices += [matrices[2] * 0, -matrices[2], matrices[2].mT, random(0, 4).to(kernels)]
    together = newton_schulz(matrices)
    for matrix, result in zip(matrices, together, strict=True):
        assert result.shape == matrix.shape
        assert torch.equal(result, newton_schulz(matrix))
    batch = newton_schulz(torch.stack([matrices[2], matrices[2] * 4]))
    assert torch.equal(batch[0], together[2]) and torch.equal(batch[1], together[2])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("shape", [(48, 48), (20, 70), (70, 20)])
def test_odd_scale_free_transposed_and_independent_matrices(kernels, shape, method, dtype):
    """In one call: f(-G) = -f(G), f(2^k G) = f(G), f(G^T) = f(G)^T, 0 stays 0, NaN stays in its matrix."""
    g = torch.randint(-7, 8, shape, generator=torch.Generator().manual_seed(0)).float()
    spoiled, infinite = g.clone(), g.clone()
    spoiled[2, 3], infinite[0, 0] = float("nan"), float("inf")
    exponents = (-140, -127, -64, -1, 63, 120)
    scaled = [(g.double() * 2.0**k).float() for k in exponents]
    given = [x.to(kernels) for x in (g, -g, g.mT, g * 0, spoiled, infinite, *scaled)]
    kept = [x.clone() for x in given]
    expected, negative, turned, zero, nan, inf, *rest = newton_schulz(
        given, method=method, compute_dtype=dtype
    )
    torch.testing.assert_close(given, kept, rtol=0, atol=0, equal_nan=True)
    assert expected.isfinite().all() and expected.norm() > 1
    assert torch.equal(negative, -expected)
    assert shape[0] == shape[1] or torch.equal(turned, expected.mT)
    assert not zero.any() and nan.isnan().all() and inf.isnan().all()
    for k, result in zip(exponents, rest, strict=True):
        assert torch.equal(result, expected), f"2^{k}"


@pytest.mark.parametrize("factor", [0, 2.0**-20, 2.0**20])
def test_a_sample_that_tells_nothing_about_the_matrix(kernels, factor):
    """X is scaled by a sample of 16 rows and columns; here its entries are zero, far smaller, far larger."""
    g = random(40, 70)
    rows, columns = (torch.arange(16) * n // 16 for n in g.shape)
    g[rows[:, None], columns] *= factor
    exact = reference.newton_schulz(g.double(), method="direct")
    plain = error(reference.newton_schulz(g, compute_dtype=torch.float16), exact)
    found, turned, scaled = newton_schulz([x.to(kernels) for x in (g, g.mT, g * 2.0**-60)])
    assert error(found, exact) <= 1.5 * plain
    assert torch.equal(turned, found.mT) and torch.equal(scaled, found)


@pytest.mark.parametrize("steps", [0, 1, 2, 3, 6])
@pytest.mark.parametrize("method", METHODS)
def test_any_number_of_steps(kernels, steps, method):
    g = random(20, 40)
    triples = [(3.4 - 0.1 * i, -4.7 + 0.2 * i, 2.0 - 0.05 * i) for i in range(steps)]
    for coefficients in ("taylor", (1.5, -0.5, 0.0), (0.5, 0.0, 0.0), triples or "quintic"):
        exact = reference.newton_schulz(g.double(), steps, coefficients, "direct")
        result = newton_schulz(g.to(kernels), steps, coefficients, method, torch.float32)
        assert error(result, exact) < 1e-4, coefficients


@pytest.mark.parametrize("coefficients", ["quintic", "polar-express"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("method", METHODS)
def test_no_number_of_steps_explodes(kernels, method, dtype, coefficients):
    """Of matrices without full rank, and of singular values that the Gram matrix does not resolve."""
    matrices = [random(20, rank, seed=rank) @ random(rank, 48) for rank in (1, 4)]
    left, right = torch.linalg.qr(random(11, 11))[0], torch.linalg.qr(random(22, 11, seed=1))[0]
    matrices += [left @ (torch.logspace(0, -power, 11)[:, None] * right.T) for power in (1.2, 8)]
    given = [g.to(kernels) for g in matrices]
    for steps in (5, 6, 8, 12, 30) if kernels.type == "cuda" else (8, 30):
        for g, result in zip(matrices, newton_schulz(given, steps, coefficients, method, dtype), strict=True):
            assert result.isfinite().all()
            exact = torch.linalg.svdvals(reference.newton_schulz(g.double(), steps, coefficients))[0]
            largest = torch.linalg.svdvals(result.double().cpu())[0]
            assert largest <= 1.5 * max(exact.item(), 0.9), (steps, tuple(g.shape))


def test_results_have_the_matrices_dtypes(kernels):
    matrices = [random(9, 20).to(kernels, dtype) for dtype in (*DTYPES, torch.float64)]
    for matrix, result in zip(matrices, newton_schulz(matrices), strict=True):
        assert result.dtype == matrix.dtype
        assert error(result, reference.newton_schulz(matrix.double())) < 1e-2


def test_more_shapes_than_a_launch_has_room_for(kernels):
    matrices = [random(1 + i, 3).to(kernels) for i in range(35)]
    for matrix, result in zip(matrices, newton_schulz(matrices, 1), strict=True):
        assert error(result, reference.newton_schulz(matrix.double(), 1)) < 5e-3
