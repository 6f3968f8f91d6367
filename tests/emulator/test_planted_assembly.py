"""Faults planted in the inline assembly of csrc/cuda/common/ptx.cuh, compiled by nvcc: each is caught.

The checks are those of test_instructions.py, which pass on the unmodified file; only the ptx backend sees the
assembly.
"""

import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
from helpers import instructions
from helpers.emulator import ROOT, SOURCE, Planted
from helpers.levels import NVCC
from helpers.ptx.planted import FILES, of_nvcc, planted_at

pytestmark = pytest.mark.skipif(not NVCC, reason="needs nvcc and a build with CUDA kernels")


@dataclass(frozen=True)
class Fault:
    function: str
    """The place in ptx.cuh: a text that its definition contains."""
    right: str
    wrong: str
    check: Callable[[Planted], None]


def mma(kind: str) -> Callable[[Planted], None]:
    return lambda planted: instructions.check_mma(planted, kind)


def ldmatrix(count: int, transposed: bool) -> Callable[[Planted], None]:
    return lambda planted: instructions.check_ldmatrix(planted, count, transposed)


FAULTS = {
    "fragments of A exchanged, bf16": Fault(
        "mma_m16n8k16<__nv_bfloat16>", '"r"(a[1]), "r"(a[2])', '"r"(a[2]), "r"(a[1])', mma("bf16")
    ),
    "fragments of B exchanged, fp16": Fault(
        "mma_m16n8k16<__half>", '"r"(b[0]), "r"(b[1])', '"r"(b[1]), "r"(b[0])', mma("f16")
    ),
    "fragments of A exchanged, tf32": Fault(
        "mma_m16n8k8_tf32", '"r"(a[1]), "r"(a[2])', '"r"(a[2]), "r"(a[1])', mma("tf32")
    ),
    "the other type": Fault("mma_m16n8k16<__half>", "f32.f16.f16.f32", "f32.bf16.bf16.f32", mma("f16")),
    "sums that are not read": Fault("mma_m16n8k8_tf32", '"+f"(c[1])', '"=f"(c[1])', mma("tf32")),
    "rows not transposed": Fault("ldmatrix_x4_trans", "x4.trans.", "x4.", ldmatrix(4, True)),
    "matrices exchanged": Fault("ldmatrix_x2(", "{%0, %1}", "{%1, %0}", ldmatrix(2, False)),
    "rounded down": Fault(
        "round_tf32(float", "cvt.rna.tf32.f32 %0, %1;", "and.b32 %0, %1, -8192;", instructions.check_lanes
    ),
    "a copy that is always made": Fault("cp_async_16(", "16, %2;", "16, 16;", instructions.check_copies),
    "a copy's predicate negated": Fault(
        "cp_async_16(", "valid ? 16 : 0", "valid ? 0 : 16", instructions.check_copies
    ),
    "one group too few waited for": Fault(
        "cp_async_wait()", '"n"(kPending)', '"n"(kPending + 1)', instructions.check_copies
    ),
    "groups never closed": Fault(
        "cp_async_commit()", "cp.async.commit_group;", "", instructions.check_copies
    ),
    "halves exchanged": Fault(
        "pack2<__half>", "half2_rn(first, second)", "half2_rn(second, first)", instructions.check_numbers
    ),
    "another function": Fault("log2_approx", "lg2.approx.ftz", "ex2.approx.ftz", instructions.check_numbers),
}  # fmt: skip


def patched(folder: Path, text: str) -> Path:
    """A folder whose cuda/common/ptx.cuh is `text`."""
    path = folder / "cuda" / "common" / "ptx.cuh"
    path.parent.mkdir(parents=True)
    path.write_text(text)
    return folder


def source() -> str:
    return (ROOT / "csrc" / "cuda" / "common" / "ptx.cuh").read_text()


@pytest.mark.parametrize("name", FAULTS)
def test_ptx_fault_is_caught(tmp_path: Path, name: str) -> None:
    fault = FAULTS[name]
    before, start, rest = source().partition(fault.function)
    body, end, after = rest.partition("\n}\n")
    assert start and fault.right in body, f"plant the fault '{name}' anew: ptx.cuh has changed"
    text = before + start + body.replace(fault.right, fault.wrong) + end + after
    modules = of_nvcc(SOURCE / "probes.cu", first=(patched(tmp_path, text),))
    with planted_at("ptx", modules) as planted, pytest.raises(AssertionError) as caught:
        fault.check(planted)
    assert "the ptx backend" not in str(caught.value)  # it has run


def unguarded(text: str) -> list[str]:
    """Assembly that accesses memory or waits for it, but lets the compiler move accesses past it."""
    found = re.findall(r"asm( volatile)?\((.*?)\);", text, re.DOTALL)
    return [
        body.strip()
        for volatile, body in found
        if re.search(r"ldmatrix|cp\.async|bar\.sync", body) and not (volatile and '"memory"' in body)
    ]


def test_ptx_missing_clobbers_are_caught() -> None:
    """Checked in the text: only the side effects of `volatile` keep this nvcc from moving anything."""
    text = source()
    assert unguarded(text) == []
    clobbers = [match.span() for match in re.finditer(r':(?:::)? "memory"', text)]
    assert len(clobbers) >= 7
    for start, end in clobbers:
        assert len(unguarded(text[:start] + text[end:])) == 1


def test_ptx_aligned_instruction_in_divergent_lanes(tmp_path: Path) -> None:
    """An instruction marked .aligned must be executed by the whole warp at once."""
    text = (SOURCE / "probes.cu").read_text()
    once = "if constexpr (kKind == kBf16) mma_m16n8k16<__nv_bfloat16>(c, a, b);"
    assert once in text
    twice = f"{{ if (lane % 2) {{ {once} c[0] += 1.0f; }} else {{ {once} c[0] -= 1.0f; }} }}"
    probes = tmp_path / "probes.cu"
    probes.write_text(text.replace(once, twice))
    with (
        planted_at("ptx", of_nvcc(probes)) as planted,
        pytest.raises(AssertionError, match="at mma on lines"),
    ):
        instructions.check_mma(planted, "bf16")


def test_ptx_parameters_with_another_layout(tmp_path: Path) -> None:
    text = (SOURCE / "probes.cu").read_text()
    last = "uint32_t* result;  // [32][4]\n};\n\n// What each lane gets"
    assert last in text
    probes = tmp_path / "probes.cu"
    probes.write_text(text.replace(last, last.replace("\n}", "\n  int more = 0;\n}")))
    with planted_at("ptx", of_nvcc(probes)) as planted:
        with pytest.raises(AssertionError, match=r"have \[16\] bytes on the host and \[24\] in the PTX"):
            instructions.check_lanes(planted)


def test_unmodified_ptx_passes() -> None:
    """The checks on the unmodified file; all instructions of test_instructions.py have run on it."""
    with planted_at("ptx", of_nvcc(FILES[1])) as planted:
        for fault in FAULTS.values():
            fault.check(planted)
