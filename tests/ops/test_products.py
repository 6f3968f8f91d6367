"""The matrix products that layers use in their own derivatives."""

import time

import pytest
import torch
from helpers.tolerance import error, tolerance

from pmf.ops._products import add_product, product

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
