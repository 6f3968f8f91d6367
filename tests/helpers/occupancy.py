"""How many blocks a multiprocessor runs at once: the rules of NVIDIA's occupancy calculator."""

from dataclasses import dataclass

WARP = 32
SCHEDULERS = 4
"""Per multiprocessor; each owns a quarter of the registers."""
REGISTER_UNIT = 256
"""Registers are allocated to a warp in units of this size."""
SHARED_UNIT = 128
RESERVED_SHARED = 1024
"""Bytes of each block's shared memory that the driver reserves."""
KB = 1024


@dataclass(frozen=True)
class Gpu:
    """Resources of a multiprocessor: CUDA C++ Programming Guide, table "Technical Specifications per Compute
    Capability"."""

    architecture: str
    """The architecture of the machine code that it runs."""
    capability: tuple[int, int]
    shared_per_block: int
    """Bytes that a block may request."""
    shared: int
    processors: int
    registers: int = 64 * KB
    threads: int = 2048
    blocks: int = 32


A100 = Gpu("sm_80", (8, 0), 163 * KB, 164 * KB, processors=108)
RTX_3090 = Gpu("sm_80", (8, 6), 99 * KB, 100 * KB, processors=82, threads=1536, blocks=16)
H100 = Gpu("sm_90a", (9, 0), 227 * KB, 228 * KB, processors=132)


def blocks_per_processor(gpu: Gpu, threads: int, registers: int, shared: int) -> int:
    """Blocks of `threads` threads with `registers` each and `shared` bytes in total; 0 if not launchable.

    Like cudaOccMaxActiveBlocksPerMultiprocessor in the toolkit's cuda_occupancy.h: whole warps, registers in
    per-scheduler allocations, shared memory including the driver's share.
    """
    warps = -(-threads // WARP)
    of_warp = _round_up(registers * WARP, REGISTER_UNIT)
    # The launch check assumes a block's warps to be spread evenly over the schedulers.
    if of_warp * _round_up(warps, SCHEDULERS) > gpu.registers or shared > gpu.shared_per_block:
        return 0
    warps_by_registers = gpu.registers // SCHEDULERS // of_warp * SCHEDULERS
    return min(
        gpu.blocks,
        gpu.threads // (warps * WARP),
        warps_by_registers // warps,
        gpu.shared // _round_up(shared + RESERVED_SHARED, SHARED_UNIT),
    )


def _round_up(value: int, unit: int) -> int:
    return -(-value // unit) * unit
