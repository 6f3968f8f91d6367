"""Benchmark devices and their timing: a wall clock on the CPU, events on a GPU."""

from __future__ import annotations

import ctypes
import gc
import os
import random
import shutil
import subprocess
import time
from collections.abc import Callable, Mapping
from typing import Any, Protocol

import torch

from pmf import _library, env

Run = Callable[[], Any]

LEAST_ROUNDS = 7
GPU_ROUNDS, LEAST_GPU_ROUNDS = 5, 2
SMI_FIELDS = ("driver_version", "clocks.sm", "clocks.mem", "clocks.max.sm", "clocks.max.mem", "power.limit")
SMI_SECONDS = 10.0
LEFTOVER = 1 << 30
"""If more bytes than this remain in use after a case, it is worth collecting garbage."""
SMALL_BLOCK, LARGE_BLOCK = 1 << 18, 1 << 28
"""Elements in a block: the caching allocator keeps blocks below a megabyte in a separate pool."""


class Device(Protocol):
    """A kind of device to measure on."""

    device: torch.device

    def facts(self) -> dict[str, Any]:
        """The machine facts that a record must state."""
        ...

    def clocks(self) -> dict[str, str] | None:
        """Driver, clocks and power limit now; None if unknown."""
        ...

    def times(
        self, contestants: Mapping[str, Run], seconds: float, least_rounds: int | None = None
    ) -> dict[str, list[float]]:
        """Seconds for every run of each contestant, interleaved in rounds, for `seconds` in total."""
        ...

    def settle(self) -> None:
        """Wait for the device; raises pending errors."""
        ...

    def poison(self) -> None:
        """Fill the memory that the next tensors will get with NaN, so that elements never written show up."""
        ...

    def release(self) -> None:
        """Release unused memory, between cases of different sizes."""
        ...


def keep_freed_memory() -> None:
    """Let this process keep what it frees (glibc only): otherwise whoever allocates next pays for its pages.

    The kernel maps and clears a page when it is first touched, and whether that happens within a run depends
    on what other contestants freed before.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        trim_threshold, mmap_max = -1, -4
        mallopt(trim_threshold, (1 << 31) - 1)
        mallopt(mmap_max, 0)


class Cpu:
    """The processor, timed with a wall clock."""

    device = torch.device("cpu")

    def facts(self) -> dict[str, Any]:
        return {
            "device": env.cpu_name(),
            "threads": torch.get_num_threads(),
            "cpu_level": _library.cpu_level(),
            "settings": {name: os.environ[name] for name in env.CPU_SETTINGS if name in os.environ},
        }

    def clocks(self) -> dict[str, str] | None:
        return None

    def times(
        self, contestants: Mapping[str, Run], seconds: float, least_rounds: int | None = None
    ) -> dict[str, list[float]]:
        least = LEAST_ROUNDS if least_rounds is None else least_rounds
        for run in contestants.values():  # allocate, compile and fill caches before timing
            run()
        times: dict[str, list[float]] = {name: [] for name in contestants}
        end = time.perf_counter() + seconds
        rounds, order = 0, random.Random(0)
        while time.perf_counter() < end or rounds < least:
            # Not always after the same one, which may leave much memory to be mapped again.
            for name, run in order.sample(list(contestants.items()), len(contestants)):
                start = time.perf_counter()
                run()
                times[name].append(time.perf_counter() - start)
            rounds += 1
        return times

    def settle(self) -> None:
        pass

    def poison(self) -> None:
        pass

    def release(self) -> None:
        pass


class Cuda:
    """The current NVIDIA GPU, timed by triton.testing.do_bench: events, L2 cache cleared before each run."""

    def __init__(self, device: torch.device) -> None:
        torch.cuda.set_device(device)
        self.device = torch.device("cuda", torch.cuda.current_device())

    def facts(self) -> dict[str, Any]:
        found = torch.cuda.get_device_properties(self.device)
        return {
            "device": found.name,
            "capability": f"sm_{found.major}{found.minor}",
            "multiprocessors": found.multi_processor_count,
            "memory_bytes": found.total_memory,
            "cuda": torch.version.cuda,
            "nvidia_smi": self.clocks(),
            "float32_matmul_precision": torch.get_float32_matmul_precision(),
        }

    def clocks(self) -> dict[str, str] | None:
        if shutil.which("nvidia-smi") is None:
            return None
        command = ["nvidia-smi", f"--query-gpu={','.join(SMI_FIELDS)}", "--format=csv,noheader"]
        command.append(f"--id=GPU-{torch.cuda.get_device_properties(self.device).uuid}")
        try:
            done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=SMI_SECONDS)
        except (OSError, subprocess.TimeoutExpired):  # missing clocks must not prevent measurements
            return None
        values = [value.strip() for value in done.stdout.strip().split(",")]
        return dict(zip(SMI_FIELDS, values, strict=True)) if len(values) == len(SMI_FIELDS) else None

    def times(
        self, contestants: Mapping[str, Run], seconds: float, least_rounds: int | None = None
    ) -> dict[str, list[float]]:
        from triton.testing import do_bench  # included with torch's CUDA builds

        least = LEAST_GPU_ROUNDS if least_rounds is None else least_rounds
        milliseconds = 1e3 * seconds / GPU_ROUNDS / max(1, len(contestants))
        times: dict[str, list[float]] = {name: [] for name in contestants}
        end = time.perf_counter() + seconds
        rounds = 0
        while rounds < least or (rounds < GPU_ROUNDS and time.perf_counter() < end):
            for name, run in contestants.items():
                found = do_bench(run, warmup=milliseconds / 4, rep=milliseconds / 2, return_mode="all")
                times[name] += [1e-3 * one for one in found]
            rounds += 1
        return times

    def settle(self) -> None:
        torch.cuda.synchronize(self.device)

    def poison(self) -> None:
        for count in (LARGE_BLOCK, *[SMALL_BLOCK // 2] * 8):
            torch.full((count,), torch.nan, device=self.device)

    def release(self) -> None:
        if torch.cuda.memory_allocated(self.device) > LEFTOVER:
            gc.collect()  # modules and optimizers contain reference cycles
        torch.cuda.empty_cache()


def make_device(device: torch.device) -> Device:
    """The CPU or an available CUDA device."""
    return Cuda(device) if device.type == "cuda" else Cpu()
