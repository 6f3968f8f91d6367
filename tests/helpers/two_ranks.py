"""The work of each of two processes in tests/training/test_ranks.py; all checks share one pair."""

import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch.distributed.tensor import Shard, distribute_tensor
from torch.nn.parallel import DistributedDataParallel

import pmf
from pmf.data import MemoryImages
from pmf.errors import UserError
from pmf.optim import Muon
from pmf.ranks import Ranks, joined_ranks
from pmf.training import Run, TrainConfig, Trainer, get_preset, prepare, resume_config
from pmf.training.parallel import whole

TINY: dict[str, Any] = {
    "hidden_size": 16,
    "depth": 2,
    "head_depth": 1,
    "num_heads": 2,
    "bottleneck": 4,
    "condition_tokens": (1, 1, 1, 1, 1),
    "batch_size": 8,
    "precision": "fp32",
    "lr": 1e-3,
    "cooldown": 0.0,
    "minutes": None,
    "steps": 10,
    "log_every": 1,
    "ema_half_lives": (0.02,),
    "sample_ema": 0.02,
}
IMAGES = MemoryImages(
    torch.randint(0, 256, (40, 1, 8, 8), dtype=torch.uint8, generator=torch.Generator().manual_seed(0)),
    torch.arange(40) % 10,
    [str(digit) for digit in range(10)],
)
GROUPS: list[tuple[tuple[int, ...], dict[str, Any]]] = [
    ((24, 8), {"split_sizes": [8, 8, 8], "num_heads": 2}),
    ((3, 6, 4), {}),
    ((3, 6, 4), {"split_sizes": [4, 2]}),
    ((5, 3, 2, 2), {"flatten": True}),
]
"""Parameters of several matrices each; no part ends where a rank's rows end."""
SHAPES = [(6, 4), (3, 9), (5, 5), (2, 8), (7, 3), (1, 4), (4,), (2, 3, 2)]


def config(**overrides: Any) -> TrainConfig:
    return get_preset("digits", **(TINY | overrides))


def steps(trainer: Trainer) -> dict[str, Any]:
    """Losses and gradient norms of all steps, and the full final weights and averages."""
    run = trainer.config.run
    told = torch.stack(
        [trainer.ranks.mean(trainer.train_step()) for _ in range(trainer.step, run.steps or 0)]
    )
    losses, norms = told[:, :3], told[:, -1]
    averages = trainer.ema.weights(trainer.config.sampling.sample_ema)
    weights = whole(trainer.weights())
    return {"losses": losses, "norms": norms, "weights": weights, "averages": whole(averages)}


def muon_steps(process_group: Any, rank: int = 0, ranks: int = 1, mesh: Any = None) -> list[torch.Tensor]:
    """Four steps; a rank contributes every ranks-th of two gradients, or with a mesh its rows of the mean."""

    def placed(x: torch.Tensor) -> torch.Tensor:
        return x if mesh is None else distribute_tensor(x, mesh, [Shard(0)])

    generator = torch.Generator().manual_seed(1)
    draws = [torch.randn(shape, generator=generator) for shape in (*SHAPES, *(s for s, _ in GROUPS))]
    params = [torch.nn.Parameter(placed(x)) for x in draws]
    groups = [
        {"params": [p], "algorithm": "muon", **settings}
        for p, (_, settings) in zip(params[len(SHAPES) :], GROUPS, strict=True)
    ]
    optimizer = Muon(
        [{"params": params[: len(SHAPES)]}, *groups], lr=0.1, weight_decay=0.1, process_group=process_group
    )
    for _ in range(4):
        for p in params:
            pair = torch.randn(2, *p.shape, generator=generator)
            p.grad = placed(pair.mean(dim=0)) if mesh is not None else pair[rank::ranks].mean(dim=0)
        optimizer.step()
    return list(whole({str(i): p.detach() for i, p in enumerate(params)}).values())


def fully_sharded(model: Any) -> Any:
    from torch.distributed.fsdp import fully_shard

    for block in (*model.shared_blocks, *model.u_head, *model.v_head):
        fully_shard(block)
    return fully_shard(model)


WRAPPERS: dict[str, Callable[[torch.nn.Module], Any]] = {
    "ddp": DistributedDataParallel,
    "ddp of compiled": lambda model: DistributedDataParallel(torch.compile(model, backend="eager")),
    "compiled ddp": lambda model: torch.compile(DistributedDataParallel(model), backend="eager"),
    "fully_shard": fully_sharded,
}


def wrapped_steps(
    wrap: Callable[[torch.nn.Module], torch.nn.Module], rank: int | None = None
) -> dict[str, Any]:
    """Three steps of a user's own loop; without a rank, of one process with both ranks' images.

    The second rank's samples need no guidance pass, the first's do.
    """
    torch.manual_seed(0)
    sizes = {name: TINY[name] for name in ("hidden_size", "depth", "head_depth", "num_heads", "bottleneck")}
    model = pmf.create_model("digits", **sizes)
    wrapped = wrap(model)
    optimizer, ema = pmf.optim.Muon(wrapped, lr=0.02), pmf.optim.EMA(wrapped, (0.02,))
    objective = pmf.flow.Objective(noise_scale=model.config.noise_scale)
    generator = torch.Generator().manual_seed(1)
    for _ in range(3):
        parts = []
        for i in range(2):
            images = torch.rand(4, 1, 8, 8, generator=generator) * 2 - 1
            labels = torch.randint(10, (4,), generator=generator)
            draws = objective.draw(images, labels, generator)
            if i == 1:
                one, zero = torch.ones(4), torch.zeros(4)
                draws = draws._replace(r=draws.t, omega=one, t_min=zero, t_max=one)
            parts.append((images, labels, draws))
        for part in parts if rank is None else parts[rank : rank + 1]:
            loss = objective(wrapped, *part).loss  # type: ignore[arg-type]
            (loss / 2 if rank is None else loss).backward()
        optimizer.step()
        optimizer.zero_grad()
        ema.update(8)
    noise = torch.randn(3, 1, 8, 8, generator=generator)
    sampler = pmf.flow.Sampler(wrapped)  # type: ignore[arg-type]
    images = sampler([0, 1, 2], noise=noise) if rank in (None, 0) else noise
    weights = whole({name: p.detach() for name, p in model.named_parameters()})
    averages = whole(ema.weights(0.02))
    return {"images": images, "routing": optimizer.routing(), "weights": weights, "averages": averages}


def stop_one(trainer: Trainer) -> None:
    """The second rank receives a stop signal at its third step."""
    step = trainer.train_step

    def told(rate: float = 1.0) -> torch.Tensor:
        if trainer.step == 2 and trainer.ranks.rank == 1:
            os.kill(os.getpid(), signal.SIGTERM)
        return step(rate)

    trainer.train_step = told  # type: ignore[method-assign]


def break_one(trainer: Trainer) -> None:
    """The fourth batch of the second rank cannot be read."""
    fetch = trainer.fetch

    def broken() -> None:
        if trainer.step == 3 and trainer.ranks.rank == 1:
            raise UserError("7.png is damaged")
        fetch()

    trainer.fetch = broken  # type: ignore[method-assign]


def sentence(action: Callable[[], Any]) -> str:
    try:
        action()
    except UserError as error:
        return str(error)
    return "nothing was wrong"


def check(ranks: Ranks, out: Path) -> dict[str, Any]:
    """Everything that takes two processes; `out` holds the run of one process as "one"."""

    def made(**overrides: Any) -> Trainer:
        return prepare(config(**overrides), dataset=IMAGES, ranks=ranks)

    def resumed(name: str, **overrides: Any) -> Trainer:
        return prepare(
            resume_config(out / name, overrides), resume_from=out / name, dataset=IMAGES, ranks=ranks
        )

    found: dict[str, Any] = {}
    for parallel in ("ddp", "fsdp"):
        found[parallel] = steps(made(parallel=parallel))
        found[f"{parallel}, accumulated"] = steps(made(parallel=parallel, accumulate=2))
        found[f"{parallel}, bf16"] = steps(made(parallel=parallel, precision="bf16", steps=4))
        Run(made(parallel=parallel, steps=4), out / parallel, progress=False).run()
    found["fm"] = steps(made(parallel="fsdp", data_proportion=1.0, class_dropout=1.0, batch_size=2, steps=2))
    found["ddp by ddp"] = steps(resumed("ddp", steps=10))
    found["ddp by fsdp"] = steps(resumed("ddp", steps=10, parallel="fsdp"))
    found["fsdp by fsdp"] = steps(resumed("fsdp", steps=10))
    found["one by ddp"] = steps(resumed("one", steps=10))
    found["one by fsdp"] = steps(resumed("one", steps=10, parallel="fsdp"))
    found["muon"] = muon_steps(torch.distributed.group.WORLD, ranks.rank, ranks.size)
    mesh = torch.distributed.device_mesh.init_device_mesh("cpu", (ranks.size,))
    found["muon of shards"] = muon_steps(None, mesh=mesh)

    found["own loop"] = [(name, wrapped_steps(wrap, ranks.rank)) for name, wrap in WRAPPERS.items()]

    trainer = made(steps=9)
    stop_one(trainer)
    result = Run(trainer, out / "stopped", progress=False).run()
    found["stopped"] = (result.step, result.interrupted)
    trainer = made(steps=9)
    break_one(trainer)
    found["damaged"] = sentence(Run(trainer, out / "damaged", progress=False).run), trainer.stream.position
    found["settings"] = sentence(lambda: made(lr=1e-3 * (1 + ranks.rank)))
    found["batch"] = sentence(lambda: made(batch_size=9))
    found["parts"] = sentence(lambda: made(accumulate=3))
    found["compile"] = sentence(lambda: made(parallel="fsdp", compile=True))
    return found


def main(rank: int, port: int, out: Path) -> None:
    """One of the two processes."""
    torch.set_num_threads(1)
    os.environ.update(RANK=str(rank), WORLD_SIZE="2", MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    with joined_ranks() as ranks:
        torch.save(check(ranks, out), out / f"rank{rank}.pt")
