"""The 8-bit products of bench_int8.py."""

import bench_int8
import torch


def test_rows_are_rounded_to_the_nearest_of_255_numbers() -> None:
    x = torch.cat((torch.randn(3, 40, generator=torch.Generator().manual_seed(0)), torch.zeros(1, 40)))
    q, scale = bench_int8.quantize(x)
    assert q.dtype == torch.int8 and scale.shape == (4, 1)
    assert q[:3].abs().amax(1).tolist() == [127] * 3
    assert ((q * scale - x).abs() <= scale * 0.5001).all() and not q[3].any()
