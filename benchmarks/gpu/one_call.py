"""A few calls of attention with tangents in bfloat16, for use under a profiler or sanitizer.

python benchmarks/gpu/one_call.py 256x12x276x64 [--backward]
"""

from __future__ import annotations

import argparse

import torch

from pmf import checked, ops

CALLS = 3


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("shape", help="batch x heads x tokens x width")
    parser.add_argument("--backward", action="store_true", help="also backward through both outputs")
    parser.add_argument("--device", default="cuda")
    arguments = parser.parse_args()
    shape = tuple(map(int, arguments.shape.split("x")))
    checked.forgo_reminder()
    inputs = [
        torch.randn(shape, device=arguments.device, dtype=torch.bfloat16, requires_grad=arguments.backward)
        for _ in range(6)
    ]
    query, key, value, query_t, key_t, value_t = inputs
    for _ in range(CALLS):
        out, out_t = ops.attention_jvp(query, key, value, query_t, key_t, value_t)
        if arguments.backward:
            torch.autograd.grad((out, out_t), inputs, (out.detach(), out_t.detach()))
    if arguments.device == "cuda":
        torch.cuda.synchronize()
    print(f"attention_jvp of {arguments.shape}: {CALLS} calls")


if __name__ == "__main__":
    main()
