"""The matrix products that layers use in their own derivatives."""

import time

import pytest
import torch
import torch.nn.functional as F
from helpers.levels import CPU_LEVELS, at_level
from helpers.tolerance import error, tolerance
from torch import Tensor

from pmf.devices import has_bf16_products
from pmf.ops._products import add_product, linear, product

LAYOUTS = {
    "rows": lambda x: x.contiguous(),
    "columns": lambda x: x.t().contiguous().t(),
    "inside a wider matrix": lambda x: torch.cat((x, torch.full_like(x, 7.0)), 1)[:, : x.shape[1]],
    "every other column": lambda x: torch.stack((x, torch.full_like(x, 7.0)), 2)[:, :, 0],
}


@pytest.mark.parametrize("right", LAYOUTS)
@pytest.mark.parametrize("left", LAYOUTS)
@pytest.mark.parametrize("size", [(1, 1, 1), (3, 5, 2), (64, 48, 80)])
def test_products_of_any_layout(size, left, right):
    m, k, n = size
    generator = torch.Generator().manual_seed(0)
    a, b, c = (torch.randn(s, generator=generator) for s in ((m, k), (k, n), (m, n)))
    given = LAYOUTS[left](a), LAYOUTS[right](b)
    exact = a.double() @ b.double()
    limit = tolerance("gemm", torch.float32)
    assert error(product(*given), exact) < limit
    assert error(add_product(LAYOUTS[left](c), *given), c.double() + exact) < limit


@pytest.mark.parametrize("size", [(0, 3, 2), (3, 0, 2), (3, 2, 0)])
def test_empty_matrices(size):
    m, k, n = size
    a, b, c = torch.ones(m, k), torch.ones(k, n), torch.ones(m, n)
    assert torch.equal(product(a, b), a @ b)
    assert torch.equal(add_product(c, a, b), c + a @ b)


def test_a_matrix_inside_a_wider_one_costs_a_copy():
    """oneDNN has only reference loops for such a matrix: a thousand times slower than copying it first."""
    a, wide = torch.ones(256, 256), torch.ones(256, 300)

    def seconds(right):
        times = []
        for _ in range(5):
            start = time.perf_counter()
            product(a, right)
            times.append(time.perf_counter() - start)
        return min(times)

    assert seconds(wide[:, :256]) < 50 * seconds(a)


LEVELS_WITHOUT = [level for level in CPU_LEVELS if not level.endswith("bf16")][-1:]
"""The best level that has no bfloat16 products."""


@pytest.mark.parametrize("level", LEVELS_WITHOUT)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_16_bits_without_instructions_for_them_are_float32_rounded_once(dtype, level):
    """Bit for bit, in 65,536 sums: a processor's own 16-bit products add up in another order."""
    generator = torch.Generator().manual_seed(0)
    a, b, c = (torch.randn(256, n, generator=generator).to(dtype) for n in (1024, 1024, 256))
    bias = c[0].clone()
    with at_level(level):
        assert not has_bf16_products(torch.device("cpu"))  # which trainer and sampler ask
        assert torch.equal(product(a, b.t()), product(a.float(), b.float().t()).to(dtype))
        assert torch.equal(product(a, b.t(), out=torch.empty_like(c)), product(a, b.t()))
        wide = add_product(c.float(), a.float(), b.float().t())
        assert torch.equal(add_product(c, a, b.t()), wide.to(dtype))
        assert torch.equal(linear(a, b, bias), F.linear(a.float(), b.float(), bias.float()).to(dtype))

        def gradients(*inputs: Tensor) -> tuple[Tensor, ...]:
            leaves = [x.detach().requires_grad_() for x in inputs]
            return torch.autograd.grad(linear(*leaves).float().square().sum(), leaves)

        exact = gradients(a.double(), b.double(), bias.double())
        for found, expected in zip(gradients(a, b, bias), exact, strict=True):
            assert found.dtype == dtype and error(found, expected) < 2 * tolerance("gemm", dtype)
        with torch.autocast("cpu", dtype=dtype):
            assert torch.equal(linear(a.float(), b.float()), linear(a, b))
        compiled = torch.compile(linear, backend="aot_eager", fullgraph=True)
        assert torch.equal(compiled(a[:8], b), linear(a[:8], b))
