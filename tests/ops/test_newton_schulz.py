"""Newton-Schulz: bitwise properties, and its error against float64."""

import math
import os
import subprocess
import sys

import pytest
import torch
from helpers.levels import CPU_LEVELS, at_level
from hypothesis import given, settings
from hypothesis import strategies as st

from pmf import reference
from pmf.ops import newton_schulz
from pmf.reference.newton_schulz import step_coefficients

METHODS = ("direct", "gram")
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
SHAPES = ((1, 1), (1, 7), (5, 3), (64, 64), (48, 130), (130, 48), (150, 150), (300, 131), (260, 700))


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def error(result: torch.Tensor, exact: torch.Tensor) -> float:
    return ((result.double() - exact).norm() / exact.norm()).item()


def spectrum(kind: str, m: int, n: int) -> torch.Tensor:
    """Matrices that are easy, ill-conditioned, and rank-deficient."""
    if kind == "gaussian":
        return random(m, n)
    if kind == "rank 32":
        return random(m, 32) @ random(32, n, seed=1)
    left, right = torch.linalg.qr(random(m, m))[0], torch.linalg.qr(random(n, m, seed=1))[0]
    return left @ (torch.logspace(0, -3, m)[:, None] * right.T)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("kind", ["gaussian", "singular values 1 to 1e-3", "rank 32"])
def test_error_is_that_of_the_plain_iteration_in_the_same_dtype(kind, method, dtype):
    """Against float64, at most twice the error of the same mathematics written plainly in that dtype.

    oneDNN sums a float32 product in one sweep where MKL sums parts, so its rounding error is 1.6 times
    larger.
    """
    g = spectrum(kind, 160, 320)
    exact = reference.newton_schulz(g.double(), method="direct")
    result = newton_schulz(g, method=method, compute_dtype=dtype)
    plain = reference.newton_schulz(g, method=method, compute_dtype=dtype)
    assert result.dtype == g.dtype
    assert error(result, exact) <= 2 * error(plain, exact) + 2 * torch.finfo(torch.float32).eps


@pytest.mark.parametrize("method", METHODS)
def test_bfloat16_in_float32_products_rounds_what_it_stores(method):
    """On a processor without bfloat16 products: errors like bfloat16's, and no smaller."""
    g = random(160, 320)
    exact = reference.newton_schulz(g.double(), method="direct")
    plain = error(reference.newton_schulz(g, method=method, compute_dtype=torch.bfloat16), exact)
    with at_level(CPU_LEVELS[0]):
        found = error(newton_schulz(g, method=method, compute_dtype=torch.bfloat16), exact)
    assert 0.2 * plain < found < 2 * plain


@pytest.mark.parametrize("shape", SHAPES)
def test_float32_and_float64_match_the_reference(shape):
    g = random(*shape)
    exact = reference.newton_schulz(g.double())
    for method in METHODS:
        assert error(newton_schulz(g, method=method), exact) < 1e-4
    assert error(newton_schulz(g.double()), exact) < 1e-12


@pytest.mark.parametrize("steps", [0, 1, 2, 3, 8])
@pytest.mark.parametrize("method", METHODS)
def test_any_number_of_steps(steps, method):
    g = random(40, 90).double()
    triples = [(3.4 - 0.1 * i, -4.7 + 0.2 * i, 2.0 - 0.05 * i) for i in range(steps)]
    for coefficients in ("quintic", "taylor", (1.5, -0.5, 0.0), triples or "quintic"):
        plain = reference.newton_schulz(g, steps, coefficients, "direct")
        assert error(newton_schulz(g, steps, coefficients, method), plain) < 1e-11


def largest(x: torch.Tensor) -> float:
    return torch.linalg.svdvals(x.double())[..., 0].max().item() if x.isfinite().all() else float("inf")


@pytest.mark.parametrize("coefficients", ["quintic", "taylor", "polar-express"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("method", METHODS)
def test_no_number_of_steps_explodes(method, dtype, coefficients):
    """Rounding errors in R where X is zero grow with every step, and faster once R is negative there."""
    matrices = [random(12, 30), random(1, 9), random(40, 64), random(3, 12)]
    matrices += [random(32, rank, seed=rank) @ random(rank, 96) for rank in (1, 2, 4)]
    for m, n, last in ((2, 9, 0.03), (11, 22, 0.06), (24, 60, 1e-4), (16, 40, 1e-8)):
        left, right = torch.linalg.qr(random(m, m))[0], torch.linalg.qr(random(n, m, seed=1))[0]
        matrices.append(left @ (torch.logspace(0, math.log10(last), m)[:, None] * right.T))
        values = torch.full((m,), last)
        values[0] = 1  # the others repeated
        matrices.append(left @ (values[:, None] * right.T))
    for steps in (1, 2, 3, 4, 5, 6, 7, 8, 12, 19, 30):
        for g, result in zip(
            matrices,
            newton_schulz(matrices, steps, coefficients, method, dtype),
            strict=True,
        ):
            exact = largest(reference.newton_schulz(g.double(), steps, coefficients))
            assert largest(result) <= 1.5 * max(exact, 0.9), (steps, tuple(g.shape))


def test_polar_express_is_a_list_of_triples():
    g = random(20, 60)
    triples = step_coefficients(9, "polar-express")
    assert len(set(triples)) == 8 and triples[7] == (1.875, -1.25, 0.375)
    assert torch.equal(newton_schulz(g, 9, triples), newton_schulz(g, 9, "polar-express"))
    assert (torch.linalg.svdvals(newton_schulz(g, 9, "polar-express")) - 1).abs().max() < 1e-4


def test_where_the_gram_form_restarts():
    def lengths(steps, dtype, coefficients="quintic"):
        numbers = [number for triple in step_coefficients(steps, coefficients) for number in triple]
        return torch.ops.pmf.newton_schulz_segments(64, 128, numbers, "auto", dtype)

    for dtype in (torch.float16, torch.float32, torch.float64):
        assert lengths(5, dtype) == [2, 3] and lengths(8, dtype) == [2, 2, 2, 2]
        assert lengths(7, dtype) == [2, 2, 3] and lengths(1, dtype) == [1] and lengths(0, dtype) == []
    assert lengths(5, torch.bfloat16) == [1, 1, 1, 2]
    assert lengths(5, torch.float16, "polar-express") == [1, 1, 3]
    assert lengths(5, torch.bfloat16, "polar-express") == [1, 1, 1, 2]


def test_taylor_converges_to_the_polar_factor():
    u, _, v = torch.linalg.svd(random(20, 30).double(), full_matrices=False)
    assert error(newton_schulz(random(20, 30).double(), 40, "taylor"), u @ v) < 1e-10


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("shape", [(48, 48), (40, 150), (150, 40), (140, 300)])
def test_odd_and_scale_free_bitwise(shape, method, dtype):
    # Integers: exact at every power of two, subnormal ones included.
    g = torch.randint(-7, 8, shape, generator=torch.Generator().manual_seed(0)).float()

    def f(x: torch.Tensor) -> torch.Tensor:
        return newton_schulz(x, method=method, compute_dtype=dtype)

    expected = f(g)
    assert expected.isfinite().all()
    assert torch.equal(f(-g), -expected)
    for k in (-140, -127, -126, -64, -1, 1, 63, 64, 119, 120):
        scaled = (g.double() * 2.0**k).float()
        assert torch.equal(f(scaled), expected), f"2^{k}"
    if shape[0] != shape[1]:
        assert torch.equal(f(g.mT), expected.mT)
        assert torch.equal(f(g.mT.contiguous()), expected.mT)


@pytest.mark.parametrize("dtype", DTYPES)
def test_same_bits_alone_batched_listed_and_with_any_threads(dtype):
    """A matrix's bits depend only on the matrix; PyTorch's batched GEMM differs from its single one."""
    kinds = [random(*shape, seed=i) for i, shape in enumerate(SHAPES)]
    alone = [newton_schulz(g, compute_dtype=dtype) for g in kinds]
    threads = torch.get_num_threads()
    try:
        for count in (1, 2, 3, 4):
            torch.set_num_threads(count)
            for g, expected in zip(newton_schulz(kinds, compute_dtype=dtype), alone, strict=True):
                assert torch.equal(g, expected)
            reversed_list = newton_schulz(kinds[::-1], compute_dtype=dtype)[::-1]
            assert all(map(torch.equal, reversed_list, alone))
            assert all(
                torch.equal(newton_schulz(g, compute_dtype=dtype), e)
                for g, e in zip(kinds, alone, strict=True)
            )
            for g, expected in zip(kinds, alone, strict=True):
                batch = torch.stack([g * 0, g, g * 4, g]).view(2, 2, *g.shape)
                result = newton_schulz(batch, compute_dtype=dtype)
                assert torch.equal(result[0, 1], expected) and torch.equal(result[1, 1], expected)
    finally:
        torch.set_num_threads(threads)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("method", METHODS)
def test_few_singular_values_stay_in_the_quintics_range(method, dtype):
    """Orbits differ from float64's in 16 bits, but none leaves the range in which the quintic moves."""
    for rank in (1, 2, 4):
        g = random(40, rank, seed=rank) @ random(rank, 64, seed=rank + 1)
        for steps in (5, 8, 9, 13, 20, 30):
            found = newton_schulz(g, steps=steps, method=method, compute_dtype=dtype)
            assert 0.6 < torch.linalg.svdvals(found.double())[0] < 1.25


@pytest.mark.parametrize("setting", ["MKL_ENABLE_INSTRUCTIONS=AVX2", "ONEDNN_MAX_CPU_ISA=AVX512_CORE"])
def test_the_guarantees_hold_with_other_processors_kernels(setting, tmp_path):
    """MKL and oneDNN choose kernels by processor, and each splits its products differently."""
    name, value = setting.split("=")
    test = f"{__file__}::{test_same_bits_alone_batched_listed_and_with_any_threads.__name__}"
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", test],
        env={**os.environ, name: value},
        cwd=tmp_path,  # -m puts the current folder first, which would shadow the installed package
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("method", METHODS)
def test_zero_stays_zero_and_nan_stays_with_its_matrix(method, dtype):
    g = random(5, 30, 64)
    expected = newton_schulz(g, method=method, compute_dtype=dtype)
    g[0] = 0
    g[2, 3, 4] = float("nan")
    g[4, 0, 0] = float("inf")
    result = newton_schulz(g, method=method, compute_dtype=dtype)
    assert torch.equal(result[0], torch.zeros(30, 64))
    assert result[2].isnan().all() and result[4].isnan().all()
    assert torch.equal(result[1], expected[1]) and torch.equal(result[3], expected[3])


def test_huge_and_tiny_matrices_are_not_lost():
    """torch.optim.Muon's iteration turns these into zero or NaN: their squares overflow or vanish."""
    g = random(20, 30)
    expected = newton_schulz(g)
    for scale in (1e-37, 1e-20, 1e18, 1e37):
        assert error(newton_schulz(g * scale), expected.double()) < 1e-5


@settings(max_examples=30, deadline=None)
@given(
    m=st.integers(1, 40),
    n=st.integers(1, 40),
    batch=st.lists(st.integers(0, 3), max_size=2),
    transposed=st.booleans(),
    stride=st.integers(1, 3),
)
def test_any_shape_and_strides(m, n, batch, transposed, stride):
    g = random(*batch, n if transposed else m, (m if transposed else n) * stride)[..., ::stride]
    g = g.mT if transposed else g
    kept = g.clone()
    result = newton_schulz(g)
    assert result.shape == g.shape and torch.equal(g, kept)
    assert torch.equal(result, newton_schulz(g.contiguous()))
    torch.testing.assert_close(result.double(), reference.newton_schulz(g.double()), atol=2e-4, rtol=0)


def test_result_has_the_dtype_of_the_matrix():
    for dtype in DTYPES:
        assert newton_schulz(random(8, 9).to(dtype)).dtype == dtype
    mixed = newton_schulz([random(8, 9).bfloat16(), random(3, 4).double(), random(4, 3)])
    assert [x.dtype for x in mixed] == [torch.bfloat16, torch.float64, torch.float32]
    assert newton_schulz([]) == []


def test_derivatives_are_correct():
    g = random(3, 5).double().requires_grad_()
    assert torch.autograd.gradcheck(newton_schulz, (g,))
    g = g.detach()
    t = random(3, 5, seed=1).double()
    for function in (newton_schulz, reference.newton_schulz):
        _, tangent = torch.func.jvp(function, (g,), (t,))
        step = 1e-6
        slope = (newton_schulz(g + step * t) - newton_schulz(g - step * t)) / (2 * step)
        torch.testing.assert_close(tangent, slope, atol=1e-6, rtol=1e-6)
    torch.testing.assert_close(torch.vmap(newton_schulz)(random(4, 3, 5)), newton_schulz(random(4, 3, 5)))


def test_the_raw_op_is_registered_soundly():
    arguments = ([random(6, 9), random(9, 4)], [3.4445, -4.775, 2.0315], "auto", torch.float32)
    torch.library.opcheck(torch.ops.pmf.newton_schulz.default, arguments)


def test_bad_arguments_are_named():
    g = random(3, 4)
    for arguments, message in (
        ((torch.ones(3),), r"a tensor \[\.\.\., m, n\]"),
        (([torch.ones(2, 3, 4)],), r"a list of \[m, n\]"),
        ((torch.ones(3, 4, dtype=torch.int64),), "got int64"),
        ((g, -1), "steps must be a whole number and not negative"),
        ((g, 2.5), "steps must be a whole number and not negative, got 2.5"),
        ((g, 5, "cubic"), "coefficients must be quintic, taylor or polar-express"),
        ((g, 5, (1.0, float("nan"), 0.0)), "three finite numbers"),
        ((g, 5, [(1.0, 0.0, 0.0)] * 4), "or 5 such triples"),
        ((g, 5, "quintic", "svd"), "method must be auto, direct or gram"),
        ((g, 5, "quintic", "auto", torch.int8), "compute_dtype must be one of"),
    ):
        with pytest.raises(ValueError, match=message):
            newton_schulz(*arguments)
