"""The work of each of two processes in tests/ops/test_sharded.py; all checks share one pair."""

import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor

import pmf.ops

from .ops import CASES, Case

ops: Any = pmf.ops  # called with argument lists, which annotations cannot express

R = Replicate()
# Placements of each argument; tangents have their value's.
SHARDED: dict[str, dict[str, Sequence[Any]]] = {
    "swiglu": {"batch": [Shard(0)] * 2, "width": [Shard(2)] * 2, "tokens": [Shard(1), R], "whole": [R] * 2},
    "rms_norm": {"batch": [Shard(0), R], "tokens": [Shard(1), R]},
    "gated_residual": {
        "batch": [Shard(0), Shard(0), R],
        "cut": [Shard(0), R, R],
        "width": [Shard(2), Shard(2), R],
    },
    "rotary_qk_norm": {
        "batch": [Shard(0), Shard(0), R, R, R, R],
        "whole": [R] * 6,
    },
    "patch_embed": {"batch": [Shard(0), R, R, R, R, R, Shard(0)], "cut": [Shard(0), *[R] * 6]},
    "patch_velocity": {"batch": [Shard(0)] * 3},
    "attention": {"batch": [Shard(0)] * 3, "whole": [R] * 3},
}


def worst(found: Any, expected: Any) -> float:
    pairs: Any = zip(_tuple(found), _tuple(expected), strict=True)
    return max((a.full_tensor() - b).abs().max().item() for a, b in pairs)


def _tuple(x: Any) -> tuple[Tensor, ...]:
    return (x,) if isinstance(x, Tensor) else tuple(x)


def agree(
    op: Callable[..., Any], mesh: DeviceMesh, inputs: Sequence[Tensor], placements: Sequence[Any]
) -> dict[str, float]:
    """Errors of an op's outputs and input gradients on DTensors."""
    plain = [x.clone().requires_grad_() for x in inputs]
    whole = _tuple(op(*plain))
    seeds = [
        torch.randn(y.shape, generator=torch.Generator().manual_seed(i), dtype=y.dtype)
        for i, y in enumerate(whole)
    ]
    torch.autograd.backward(
        [y for y in whole if y.requires_grad],
        [s for s, y in zip(seeds, whole, strict=True) if y.requires_grad],
    )
    sharded = [
        distribute_tensor(x.detach(), mesh, p if isinstance(p, list) else [p]).requires_grad_()
        for x, p in zip(inputs, placements, strict=True)
    ]
    parts = _tuple(op(*sharded))
    spread = [distribute_tensor(s, mesh, [R] * mesh.ndim) for s in seeds]
    torch.autograd.backward(
        [y for y in parts if y.requires_grad],
        [s for s, y in zip(spread, parts, strict=True) if y.requires_grad],
    )
    used: list[Any] = [(a.grad, b.grad) for a, b in zip(sharded, plain, strict=True) if b.grad is not None]
    assert all(isinstance(y, DTensor) for y in parts)
    assert all(not p.is_partial() for a, _ in used for p in a.placements), "a gradient is a partial sum"
    return {"outputs": worst(parts, whole), "gradients": max((worst(a, b) for a, b in used), default=0.0)}


def ops_agree(mesh: DeviceMesh, case: Case) -> dict[str, dict[str, float]]:
    found = {}
    for name, placements in SHARDED[case.name].items():
        both = [*placements, *(placements[i] for i in case.tangents)]
        inputs = [*case.args, *case.directions()]
        found[name] = agree(case.plain(ops), mesh, case.args, placements)
        found[f"{name}, tangent"] = agree(case.jvp(ops), mesh, inputs, both)
        found[f"{name}, detached"] = agree(case.jvp(ops, detach_tangent=True), mesh, inputs, both)
    return found


def heads_agree(mesh: DeviceMesh) -> dict[str, dict[str, float]]:
    g = torch.Generator().manual_seed(0)
    q, k, v, k2, mask = (
        torch.randn(shape, generator=g, dtype=torch.float64)
        for shape in ((3, 4, 5, 8), (3, 4, 7, 8), (3, 4, 7, 8), (3, 2, 7, 8), (1, 4, 5, 7))
    )
    k1, by = k2[:, :1], Shard(1)
    boolean = mask > 0
    found = {
        "heads": agree(lambda *x: ops.attention(*x, is_causal=True), mesh, (q, k, v), [by] * 3),
        "heads cut": agree(ops.attention, mesh, (q, k, v), [by, R, R]),
        "uneven batch": agree(ops.attention, mesh, (q, k, v), [Shard(0)] * 3),
        "grouped": agree(lambda *x: ops.attention(*x, enable_gqa=True), mesh, (q, k2, k2), [by] * 3),
        "one key head": agree(ops.attention, mesh, (q, k1, k1), [by, R, R]),
        "mask": agree(lambda *x: ops.attention(*x, boolean), mesh, (q, k, v), [by] * 3),
        "mask by batch": agree(lambda *x: ops.attention(*x, boolean), mesh, (q, k, v), [Shard(0)] * 3),
        "mask gradient": agree(ops.attention, mesh, (q, k, v, mask), [by] * 4),
        "tangents": agree(ops.attention_jvp, mesh, (q, k, v, q * 2, k * 3, v), [by] * 6),
        "tangents cut": agree(ops.attention_jvp, mesh, (q, k, v, q * 2, k * 3, v), [by] * 3 + [R] * 3),
    }
    qn, kn, w, angle = (
        q[:, :, :4],
        k2[:, :, :4],
        torch.rand(8, generator=g, dtype=torch.float64),
        mask[0, 0, :3, :4],
    )
    found["rotary"] = agree(ops.rotary_qk_norm, mesh, (qn, kn, w, w, angle, angle), [by, by, R, R, R, R])
    found["rotary tangents"] = agree(
        ops.rotary_qk_norm_jvp,
        mesh,
        (qn, kn, w, w, angle, angle, qn + 1, kn * 2),
        [by, by, R, R, R, R, by, by],
    )
    gate = torch.randn(3, 1, 8, generator=g, dtype=torch.float64)
    x = torch.randn(3, 5, 8, generator=g, dtype=torch.float64)
    for name, placement in (("samples", Shard(0)), ("tokens", Shard(1))):
        where = [placement, placement, placement if name == "samples" else R]
        found[f"gates of {name}"] = agree(ops.gated_residual, mesh, (x, x * 2, gate), where)
    plane = init_device_mesh("cpu", (1, 2))
    found["two axes"] = agree(ops.attention, plane, (q, k, v), [[Shard(0), by]] * 3)
    found["two axes, one cut"] = agree(
        ops.attention_jvp, plane, (q, k, v, q, k, v), [[by, by]] * 3 + [[R, R]] * 3
    )
    found["matrices"] = agree(ops.newton_schulz, mesh, (x,), [Shard(0)])
    found["one matrix"] = agree(lambda y: ops.newton_schulz([y])[0], mesh, (x[0],), [R])
    partial = DTensor.from_local(x / 2, mesh, [Partial()])
    whole = distribute_tensor(x, mesh, [R])
    found["partial"] = {"outputs": worst(ops.swiglu(partial, whole), ops.swiglu(x, x))}
    return found


def sentence(action: Callable[[], Any]) -> str:
    try:
        action()
    except (TypeError, ValueError) as error:
        return str(error)
    return "nothing was wrong"


def refused(mesh: DeviceMesh) -> dict[str, str]:
    def d(x: Tensor, placement: Any) -> DTensor:
        return distribute_tensor(x, mesh, [placement])

    x, w = torch.ones(4, 6, 8), torch.ones(8)
    q, k = torch.ones(2, 4, 6, 8), torch.ones(2, 3, 6, 8)
    return {
        "plain": sentence(lambda: ops.rms_norm(d(x, Shard(0)), w)),
        "width": sentence(lambda: ops.rms_norm(d(x, Shard(2)), d(w, R))),
        "sequence": sentence(lambda: ops.attention(*(d(q, Shard(2)) for _ in range(3)))),
        "crossed": sentence(lambda: ops.swiglu(d(x, Shard(0)), d(x, Shard(1)))),
        "fewer tangents": sentence(
            lambda: ops.swiglu_jvp(d(x, Shard(0)), d(x, Shard(0)), d(x[:2], Shard(0)), None)
        ),
        "one tangent": sentence(lambda: ops.swiglu_jvp(d(x, Shard(0)), d(x, Shard(0)), d(x[:1], R), None)),
        "uneven groups": sentence(
            lambda: ops.attention(d(q, Shard(1)), d(k, Shard(1)), d(k, Shard(1)), enable_gqa=True)
        ),
        "no groups": sentence(
            lambda: ops.attention(d(q, Shard(1)), d(q[:, :2], Shard(1)), d(q[:, :2], Shard(1)))
        ),
        "broadcast": sentence(lambda: ops.swiglu(d(x[:2], Shard(0)), d(x[:1], R))),
        "rows": sentence(lambda: ops.newton_schulz(d(x, Shard(1)))),
    }


def check() -> dict[str, Any]:
    mesh = init_device_mesh("cpu", (2,))
    found: dict[str, Any] = {name: ops_agree(mesh, case) for name, case in CASES.items()}
    found["heads and batch"] = heads_agree(mesh)
    found["refused"] = refused(mesh)
    return found


def main(rank: int, port: int, out: Path) -> None:
    """One of the two processes."""
    torch.set_num_threads(1)
    os.environ.update(RANK=str(rank), WORLD_SIZE="2", MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    dist.init_process_group("gloo")
    torch.save(check(), out / f"rank{rank}.pt")
    dist.destroy_process_group()
