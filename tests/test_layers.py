"""Structural rules: every op has its parts, and imports and includes point down only."""

import ast
import re
from pathlib import Path

import pytest
from helpers.ops import ABSENT, CASES, PARTS, STEMS, VARIANTS
from helpers.two_meshes import SHARDED

import pmf.ops
import pmf.reference
from pmf import bench, kernels
from pmf.check.table import FAMILIES

ROOT = Path(__file__).parents[1]

# The layers, from the bottom: a module or package of pmf imports only those of lower layers.
FLOORS = (
    {"arguments", "atomic", "defaults", "errors", "interrupts", "metrics", "sizes", "version", "wrappers"},
    {"_library", "kernels"},
    {"pictures", "plans", "reference"},
    {"checked"},
    {"data", "devices", "env", "official", "ops", "perceptual", "ranks"},
    {"nn", "optim", "tangents"},
    {"check", "models"},
    {"bench", "checkpoint", "flow"},
    {"sampling", "toy", "training"},
    {"evaluation"},
    {"ablation", "pages"},
    {"cli"},
)
TOP = {"__init__", "__main__"}  # the package itself, which re-exports

# Lists that name every op: the names in each, and the ops that it may omit.
LISTS = {
    "__all__ of pmf/ops/__init__.py": (pmf.ops.__all__, set()),
    "__all__ of pmf/reference/__init__.py": (pmf.reference.__all__, set()),
    "NAMES of pmf/kernels.py": (kernels.NAMES, set()),
    "the cases of pmf/check/table.py": (FAMILIES, set()),
    "BENCHMARKS of pmf/bench/__init__.py": (bench.BENCHMARKS, set()),
    "CASES of tests/helpers/ops.py": (CASES, {"newton_schulz"}),
    "SHARDED of tests/helpers/two_meshes.py": (SHARDED, {"newton_schulz"}),
    **{
        page: (re.findall(r"\w+", (ROOT / page).read_text()), set())
        for page in ("README.md", "CHANGELOG.md", "docs/checking.md", "docs/kernels.md")
    },
}

# A source folder and the includes forbidden in its files.
FORBIDDEN_INCLUDES = {
    "csrc/include": r"<(torch|ATen|c10|cuda|immintrin|vector|string)",
    "csrc/cpu": r"<(torch|ATen|c10|cuda|pybind11)",
    "csrc/cuda": r"<(torch|ATen|c10|pybind11)",
    "csrc/python": r"<(torch|ATen|c10|cuda)",
}


@pytest.mark.parametrize("stem", STEMS)
@pytest.mark.parametrize("part", PARTS)
def test_each_op_has_each_part_or_a_reason(part, stem):
    pattern, reason = part.format(stem), ABSENT.get((part, stem))
    found = list(ROOT.glob(pattern))
    if reason is None:
        remedy = "add the file, or a reason to ABSENT of tests/helpers/ops.py"
        assert len(found) == 1, f"{stem} has {len(found)} files {pattern}, not one: {remedy}"
    else:
        assert not found, f"{found[0].relative_to(ROOT)} is there: take it off the table of absent parts"


def test_header_names_are_unique():
    """So "open file" in an editor finds one; the emulator's stand-ins are named after what they replace."""
    names = [path.name for path in (ROOT / "csrc").rglob("*") if path.suffix in (".h", ".cuh")]
    assert len(names) > 40
    assert sorted(names) == sorted(set(names))


def test_headers_compiled_for_each_cpu_level_say_so():
    """The contents of `-inl.h` headers are in namespace pmf::cpu::PMF_LEVEL, once per level."""
    headers = list((ROOT / "csrc/cpu").rglob("*.h"))
    assert headers
    for path in headers:
        per_level = "\nnamespace pmf::cpu::PMF_LEVEL {" in path.read_text()
        assert per_level == path.name.endswith("-inl.h"), path.relative_to(ROOT)


def test_the_table_lists_every_op():
    public = {name.removesuffix("_jvp") for name in pmf.ops.__all__}
    unlisted = public - {*STEMS, *VARIANTS}
    assert not unlisted, f"add {', '.join(sorted(unlisted))} to STEMS of tests/helpers/ops.py"
    assert {*VARIANTS} <= public
    lacking = {name + "_jvp" for name in public - {"newton_schulz"}} - set(pmf.ops.__all__)
    assert not lacking, f"add {', '.join(sorted(lacking))} to __all__ of pmf/ops/__init__.py"


@pytest.mark.parametrize("place", LISTS)
def test_each_list_names_each_op(place):
    """A new op appears in lists far apart; one run says which of them still lack it."""
    names, exempt = LISTS[place]
    missing = {*STEMS} - {*names} - exempt
    assert not missing, f"add {', '.join(sorted(missing))} to {place}"


def test_no_op_lives_outside_its_stem():
    """Helpers of the ops start with an underscore; every other file there is an op in the table."""
    for folder in ("pmf/ops", "pmf/reference"):
        modules = {path.stem for path in (ROOT / folder).glob("*.py") if not path.stem.startswith("_")}
        assert modules >= set(STEMS)
        if folder == "pmf/ops":
            assert modules == {*STEMS, *VARIANTS}


def test_every_module_belongs_to_a_layer():
    here = {path.stem for path in (ROOT / "pmf").iterdir() if path.suffix == ".py" or _is_package(path)}
    assert here == set.union(TOP, *FLOORS)


def test_contributing_shows_every_package():
    """Its drawing of the layers is by hand: a package may be missing from it."""
    drawing = (ROOT / "CONTRIBUTING.md").read_text().partition("## Layers")[2].split("```")[1]
    packages = {path.name for path in (ROOT / "pmf").iterdir() if _is_package(path)}
    missing = packages - set(re.findall(r"pmf/(\w+)", drawing))
    assert not missing, f"add pmf/{', pmf/'.join(sorted(missing))} to the layers of CONTRIBUTING.md"


@pytest.mark.parametrize("floor", range(len(FLOORS)))
def test_imports_point_down(floor):
    below = set().union(*FLOORS[:floor])
    for name in sorted(FLOORS[floor]):
        folder = ROOT / "pmf" / name
        for path in sorted(folder.rglob("*.py")) if _is_package(folder) else [folder.with_suffix(".py")]:
            other = _imports(path) - below - {name}
            assert not other, f"{path.relative_to(ROOT)} imports pmf.{', pmf.'.join(sorted(other))}"


@pytest.mark.parametrize("folder", FORBIDDEN_INCLUDES)
def test_native_includes_stay_in_their_layer(folder):
    files = [path for path in (ROOT / folder).rglob("*") if path.suffix in (".h", ".cuh", ".cpp", ".cu")]
    assert files
    for path in files:
        found = re.search(r"#include " + FORBIDDEN_INCLUDES[folder], path.read_text())
        assert found is None, f"{path.relative_to(ROOT)} has {found[0]}"


def test_torch_is_included_in_one_file():
    including = {
        path.relative_to(ROOT).as_posix()
        for path in (ROOT / "csrc").rglob("*")
        if path.suffix in (".h", ".cuh", ".cpp", ".cu") and "#include <torch/" in path.read_text()
    }
    assert including == {"csrc/ops/torch_shim.h"}


def _is_package(path: Path) -> bool:
    return (path / "__init__.py").is_file()


def _imports(path: Path) -> set[str]:
    """The names x of all `pmf.x` imports in a file, including those inside functions."""
    package = path.relative_to(ROOT).with_suffix("").parts
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            full = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = ".".join(package[: -node.level]) if node.level else ""
            module = ".".join(filter(None, (base, node.module)))
            full = [f"{module}.{alias.name}" for alias in node.names]
        else:
            continue
        names |= {name.split(".")[1] for name in full if name.startswith("pmf.")}
    return names
