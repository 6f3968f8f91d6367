"""Each planted bug is found, whatever the order of warps, and its correct twin passes."""

import re
from collections.abc import Iterator

import numpy as np
import pytest
from helpers.emulator import Planted
from helpers.levels import EMULATED, NVCC
from helpers.ptx.planted import planted_at

BACKENDS = (*EMULATED, *NVCC)
SEEDS = range(5)
ELEMENTS = 4 * 3 * 128

# The emulator's report for each; any of these if the order of warps decides what fails first.
UNORDERED = r"read after thread \d+ wrote it, with no barrier between"
OUTSIDE = "memory (beyond a tensor's end|that belongs to no tensor of this call)"
FOUND = {
    "missing_barrier": rf"shared memory at \d+ is ({UNORDERED}|read but was never written)",
    "missing_second_barrier": rf"({UNORDERED}|written after warp \d+ read it, with no barrier between)",
    "missing_warp_barrier": rf"({UNORDERED}|read but was never written)",
    "ldmatrix_before_barrier": rf"({UNORDERED}|read but was never written)",
    "copy_not_waited_for": r"read while an asynchronous copy to it by thread \d+ has not been waited for",
    "copy_without_barrier": rf"({UNORDERED}|never written|has not been waited for)",
    "copy_over_readers": rf"(written after warp \d+ read it|{UNORDERED}|has not been waited for)",
    "read_past_the_end": rf"4 bytes of {OUTSIDE} are read",
    "write_past_the_end": rf"4 bytes of {OUTSIDE} are written",
    "write_to_an_input": "4 bytes of an input are written",
    "shared_never_written": r"shared memory at 508 is read but was never written",
    "global_never_written": "4 bytes of uninitialised global memory are read",
    "more_shared_than_asked_for": "written at 4096, but the launch requested 4096 bytes",
    "divergent_barrier": "a barrier that not all threads reach: warp 0 waits at barrier 0, .*3 has ended",
    "early_return": "lanes of a warp are missing at a block barrier: 1 of 32 have ended",
    "shuffle_without_all_lanes": "lanes of a warp are missing at a shuffle: 8 of 32 have ended",
    "different_collectives": "lanes of one warp diverge",
    "wrong_shuffle_distance": r"a shuffle reads lane \d+ of a warp of 32",
    "named_barrier_too_small": rf"({UNORDERED}|read but was never written)",
    "misaligned_load": "a load needs an address that is a multiple of 8, got one 4 bytes past it",
    "misaligned_store": "a store needs an address that is a multiple of 4, got one 2 bytes past it",
    "misaligned_vector": "a (vector|load) needs an address that is a multiple of 16, got one 8 bytes past it",
    "misaligned_copy": r"cp.async needs an address that is a multiple of 16, got one \d+ bytes past it",
    "misaligned_ldmatrix": "ldmatrix needs row addresses that are multiples of 16",
    "blocks_write_one_place": "written after another block wrote it, and nothing orders the blocks",
    "blocks_read_what_others_write": "after another block (read|wrote) it|uninitialised global memory",
    "missing_barrier_for_global": rf"({UNORDERED}|uninitialised global memory are read)",
}


@pytest.fixture(scope="module", params=BACKENDS)
def planted(request: pytest.FixtureRequest) -> Iterator[Planted]:
    with planted_at(request.param) as found:
        yield found


def test_every_planted_bug_has_an_expected_report(planted: Planted) -> None:
    assert set(planted.names) == set(FOUND)


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("name", FOUND)
def test_bug_is_found(planted: Planted, name: str, seed: int) -> None:
    said = run(planted, name, True, seed)
    assert said is not None and re.search(FOUND[name], said), said


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("name", FOUND)
def test_correct_twin_passes(planted: Planted, name: str, seed: int) -> None:
    assert run(planted, name, False, seed) is None


def test_message_names_the_line(planted: Planted) -> None:
    said = run(planted, "write_to_an_input", True, 0)
    assert said is not None and re.search(
        r"block \d, 0, 0; thread \d+, 0, 0; at (planted.cu:\d+|offset|ptx.h:\d+ < \w+\.ptx:\d+)", said
    )


def test_a_twin_after_a_bug_is_not_blamed_for_it(planted: Planted) -> None:
    """The remains of an aborted launch (copies in flight, waiting lanes) are cleared."""
    for bug in FOUND:
        assert run(planted, bug, True, 1) is not None
        assert run(planted, "copy_over_readers", False, 1) is None


def run(planted: Planted, name: str, bug: bool, seed: int) -> str | None:
    generator = np.random.default_rng(seed)
    given, result = generator.standard_normal(ELEMENTS, dtype=np.float32), np.zeros(ELEMENTS, np.float32)
    planted.begin(seed, inputs=[given], outputs=[result])
    return planted.run(name, bug, given, result)
