"""Build the wheels once and test them with other versions of Python and PyTorch.

    python benchmarks/wheel_matrix.py                       # the default matrix, python3.X taken from PATH
    python benchmarks/wheel_matrix.py --case 3.12=2.12.1    # one environment
    python benchmarks/wheel_matrix.py --python ~/py/3.10/bin/python --python ~/py/3.13/bin/python ...

Both wheels are built here, with this interpreter and its PyTorch: the default one (with the pybind11 module,
for this Python version) and the portable one (py3-none), with CUDA kernels if nvcc is found. The record has
their sizes and build times: the portable one compiles everything, the default one after it only the pybind11
module. For each case a new environment installs that PyTorch from the package index, then the wheel with its
dependencies, which must not replace that PyTorch; CHECK runs in it: values, tangents and gradients of the
compiled ops against plain float64 PyTorch. The record lists what was installed and the results, including
failures. An environment with a CUDA build of PyTorch takes several GB; it is deleted before the next one.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
# Every supported Python and every PyTorch minor version from 2.11 to 2.15, in few environments.
DEFAULT_CASES = (
    "3.10=2.11.0",
    "3.11=2.13.0",
    "3.12=2.12.1",
    "3.13=2.15.0",
    "3.11=2.11.0",
    "3.11=2.14.1",
)

# Runs inside each environment, on the installed wheel only. Prints one line of JSON.
CHECK = r"""
import json, sys
import torch
from pmf import _library

if _library.missing():
    print(json.dumps({"ok": False, "error": _library.missing()}))
    sys.exit()

raw = torch.ops.pmf
torch.manual_seed(0)
BOUND = {torch.float32: 1e-5, torch.bfloat16: 2.6e-3}  # relative Frobenius error after the store
GRADIENT_BOUND = {torch.float32: 1e-5, torch.bfloat16: 3.2e-3}
errors = {}


def check(name, bound, results, expected):
    for index, (got, want) in enumerate(zip(results, (x.detach() for x in expected))):
        error = float((got.double() - want).norm() / want.norm())
        errors[f"{name}[{index}]"] = {"error": error, "bound": bound, "ok": error <= bound}


def attention(q, k, v, qt, kt, vt):
    s = 0.2 * q @ k.mT
    p = s.softmax(-1)
    h = p * (0.2 * (qt @ k.mT + q @ kt.mT))
    return p @ v, h @ v - h.sum(-1, keepdim=True) * (p @ v) + p @ vt


for dtype in (torch.float32, torch.bfloat16):
    tag = str(dtype).removeprefix("torch.")
    inputs = [torch.randn(2, 3, 37, 20).to(dtype) for _ in range(6)]
    exact = [x.double().requires_grad_() for x in inputs]
    out, out_t = attention(*exact)
    g, gt = torch.randn(out.shape).to(dtype), torch.randn(out.shape).to(dtype)

    plain, lse = raw.attention_forward(*inputs[:3], None, False, 0.2)
    check(f"attention_forward {tag}", BOUND[dtype], [plain], [out])
    got, lse, got_t, _ = raw.attention_jvp_forward(*inputs, None, False, 0.2)
    check(f"attention_jvp_forward {tag}", BOUND[dtype], [got, got_t], [out, out_t])
    grads = torch.autograd.grad(out, exact[:3], g.double(), retain_graph=True)
    check(f"attention_backward {tag}", GRADIENT_BOUND[dtype],
          raw.attention_backward(g, *inputs[:3], lse, None, False, 0.2), grads)
    grads = torch.autograd.grad([out, out_t], exact, [g.double(), gt.double()])
    check(f"attention_jvp_backward {tag}", GRADIENT_BOUND[dtype],
          raw.attention_jvp_backward(g, gt, *inputs, lse, None, False, 0.2), grads)

    x, b, xt, bt = (torch.randn(2, 5, 24).to(dtype) for _ in range(4))
    w = torch.randn(24).to(dtype)
    xd, bd, xtd, btd, wd = (t.double() for t in (x, b, xt, bt, w))
    check(f"gated_residual_jvp {tag}", BOUND[dtype], raw.gated_residual_jvp(x, b, w, xt, bt, None),
          [xd + wd * bd, xtd + wd * btd])
    silu = lambda z: z * z.sigmoid()
    check(f"swiglu {tag}", BOUND[dtype], [raw.swiglu(x, b)], [silu(xd) * bd])
    rms = lambda z: z * (z.square().mean(-1, keepdim=True) + 1e-6).rsqrt() * wd
    check(f"rms_norm {tag}", BOUND[dtype], [raw.rms_norm(x, w, 1e-6)], [rms(xd)])

introspection = _library.introspection()
sections = open(_library.LIBRARY, "rb").read()
print(json.dumps({
    "ok": all(entry["ok"] for entry in errors.values()),
    "python": sys.version.split()[0],
    "torch": torch.__version__,
    "cpu_level": _library.cpu_level(),
    "introspection": introspection is not None,
    "cuda_kernels": b".nv_fatbin" in sections,
    "checks": len(errors),
    "worst": max(errors.items(), key=lambda item: item[1]["error"] / item[1]["bound"])[0],
    "worst_error_over_bound": max(entry["error"] / entry["bound"] for entry in errors.values()),
    "failed": {name: entry for name, entry in errors.items() if not entry["ok"]},
}))
"""


def run(*command: object, **options: object) -> subprocess.CompletedProcess[str]:
    """Run a command in a clean environment, so that this checkout is never imported; output as text."""
    environment = {
        k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "VIRTUAL_ENV", "PMF_CPU_LEVEL")
    }
    environment.update(options.pop("env", {}))  # type: ignore[call-overload]
    return subprocess.run(
        [str(part) for part in command], text=True, capture_output=True, env=environment, **options
    )  # type: ignore[call-overload]


def build_wheels(folder: Path) -> tuple[dict[str, Path], dict[str, object]]:
    """Build the portable and the default wheel from a copy of this checkout; also returns build times.

    Both use one copy, so that the kernels compile once; the portable wheel comes first, because it must not
    contain the other's pybind11 module.
    """
    source = folder / "source"
    listed = run("git", "ls-files", "-co", "--exclude-standard", "-z", cwd=ROOT).stdout
    for entry in filter(None, listed.split("\0")):
        if (ROOT / entry).is_file():
            (source / entry).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / entry, source / entry)
    wheels: dict[str, Path] = {}
    took: dict[str, object] = {
        "processors": len(os.sched_getaffinity(0)),
        "nvcc": shutil.which("nvcc") is not None,
        "load_before": round(os.getloadavg()[0], 1),
    }
    cuda = "on" if took["nvcc"] else "off"
    for name, portable in (("portable", "1"), ("default", "0")):
        out = folder / name
        pip_wheel = (sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "--no-build-isolation")
        begin, before = time.perf_counter(), resource.getrusage(resource.RUSAGE_CHILDREN)
        done = run(*pip_wheel, "-w", out, source, env={"PMF_PORTABLE": portable, "PMF_CUDA": cuda})
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        if done.returncode != 0:
            sys.exit(f"building the {name} wheel failed:\n{done.stdout}{done.stderr}")
        wheels[name] = next(out.glob("*.whl"))
        processor = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
        took[name] = {
            "seconds": round(time.perf_counter() - begin),
            "processor_seconds": round(processor),
        }
        print(f"built {wheels[name].name} in {took[name]}", flush=True)
    return wheels, took


def find_pythons(extra: list[str]) -> dict[str, str]:
    """Version ("3.12") to interpreter: those given, then python3.X on PATH and pyenv's."""
    candidates = list(extra) + [shutil.which(f"python3.{minor}") or "" for minor in range(10, 14)]
    candidates += sorted(str(path) for path in Path.home().glob(".pyenv/versions/3.*/bin/python"))
    found: dict[str, str] = {}
    for candidate in filter(None, candidates):
        version = run(candidate, "-c", "import sys; print('%d.%d' % sys.version_info[:2])")
        if version.returncode == 0:  # pyenv has failing shims for versions that are not selected
            found.setdefault(version.stdout.strip(), candidate)
    return found


def try_case(
    python: str, torch_version: str, wheels: dict[str, Path], folder: Path
) -> list[dict[str, object]]:
    """Test one environment: install PyTorch, then each wheel that fits this Python, and check it."""
    environment = folder / "environment"
    shutil.rmtree(environment, ignore_errors=True)
    records: list[dict[str, object]] = []
    try:
        run(python, "-m", "venv", environment)
        interpreter = environment / "bin" / "python"
        installed = run(interpreter, "-m", "pip", "install", "-q", f"torch=={torch_version}", "numpy")
        if installed.returncode != 0:
            return [{"ok": False, "error": "installing torch failed: " + installed.stderr.strip()[-500:]}]
        for name, wheel in wheels.items():
            # As a user would: with its dependencies; PyTorch must not change.
            run(interpreter, "-m", "pip", "uninstall", "-q", "-y", "pixelmeanflow")
            done = run(interpreter, "-m", "pip", "install", "-q", wheel)
            if done.returncode != 0:
                if name == "default" and "is not a supported wheel" in done.stdout + done.stderr:
                    continue  # built for another Python, as its name says
                records.append({"wheel": name, "ok": False, "error": done.stderr.strip()[-500:]})
                continue
            checked = run(interpreter, "-c", CHECK, cwd=folder)
            lines = checked.stdout.strip().splitlines()
            result = json.loads(lines[-1]) if checked.returncode == 0 and lines else {
                "ok": False, "error": checked.stderr.strip()[-500:]}  # fmt: skip
            if str(result.get("torch", torch_version)).split("+")[0] != torch_version:
                result.update(ok=False, error="installing the wheel replaced torch")
            records.append({"wheel": name, **result})
    finally:
        shutil.rmtree(environment, ignore_errors=True)
    return records


def main() -> int:
    parser = argparse.ArgumentParser(description="Test the wheels with other versions of Python and PyTorch.")
    parser.add_argument(
        "--case", action="append", metavar="PYTHON=TORCH", help="e.g. 3.12=2.12.1; may be repeated"
    )
    parser.add_argument(
        "--python",
        action="append",
        default=[],
        metavar="PATH",
        help="Python interpreter to use; may be repeated",
    )
    parser.add_argument(
        "--wheels",
        type=Path,
        metavar="FOLDER",
        help="test the wheels in this folder instead of building them",
    )
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks/results/wheel_matrix.json")
    arguments = parser.parse_args()

    pythons = find_pythons(arguments.python)
    import torch

    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        took: dict[str, object] | None = None
        if arguments.wheels:
            files = sorted(arguments.wheels.glob("pixelmeanflow-*.whl"))
            wheels = {
                "portable" if "-py3-none-" in path.name else "default": path.resolve() for path in files
            }
        else:
            wheels, took = build_wheels(folder)
        cases: list[dict[str, object]] = []
        record = {
            "command": " ".join(["python benchmarks/wheel_matrix.py", *sys.argv[1:]]),
            "date": time.strftime("%Y-%m-%d"),
            "commit": run("git", "rev-parse", "--short", "HEAD", cwd=ROOT).stdout.strip(),
            "machine": platform.machine(),
            "built_with": {"python": platform.python_version(), "torch": torch.__version__},
            "wheels": {
                name: {"file": path.name, "bytes": path.stat().st_size} for name, path in wheels.items()
            },
            "building": took,
            "cases": cases,
        }
        for pair in arguments.case or DEFAULT_CASES:
            version, _, torch_version = pair.partition("=")
            base = {"python": version, "torch": torch_version}
            if version not in pythons:
                results: list[dict[str, object]] = [{"ok": False, "error": f"no python{version} was found"}]
            else:
                results = try_case(pythons[version], torch_version, wheels, folder)
            for result in results:
                cases.append({**base, **result})
                print(json.dumps(cases[-1]), flush=True)
            arguments.out.parent.mkdir(parents=True, exist_ok=True)
            arguments.out.write_text(json.dumps(record, indent=1) + "\n")
    failed = [case for case in cases if not case["ok"]]
    agreed = len(cases) - len(failed)
    print(f"{agreed} of {len(cases)} loaded and agreed; record in {arguments.out}")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
