"""Peak memory of one whole step: the growth of the resident set over that of the loaded model.

    python -m training_step.memory pmf fp32 8 SIZES_AS_JSON      (in benchmarks/)

Each side runs in a separate process, which loads the model and the batch, runs one matrix product so that the
BLAS has its buffers, resets the kernel's high-water mark, runs one step (objective, backward, optimizer), and
prints the growth in bytes. The optimizer's state is created in the step and counts. The memory allocator has
its default settings.
"""

import ctypes
import json
import os
import subprocess
import sys
from pathlib import Path

import torch
from plain_port import Sizes

from .sides import draw_batch, make_model, make_side


def growth(side: str, precision: str, sizes: Sizes, batch_size: int) -> int:
    """Bytes, measured in a fresh process."""
    command = [sys.executable, "-m", "training_step.memory"]
    command += [side, precision, str(batch_size), json.dumps(sizes._asdict())]
    folder = Path(__file__).parents[1]
    kept = {name: value for name, value in os.environ.items() if not name.startswith("MALLOC_")}
    search = os.pathsep.join(path for path in sys.path if path)  # so that the child imports the same modules
    done = subprocess.run(
        command,
        cwd=folder,
        env={**kept, "PYTHONPATH": search},
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode != 0:
        raise RuntimeError(f"measuring the memory of {side} in {precision} failed:\n{done.stderr[-2000:]}")
    return int(done.stdout.split()[-1])


def main(name: str, precision: str, batch_size: str, sizes_json: str) -> None:
    fields = json.loads(sizes_json)
    sizes = Sizes(**{**fields, "condition_tokens": tuple(fields["condition_tokens"])})
    model, batch = make_model(sizes), draw_batch(sizes, int(batch_size), seed=0)
    side = make_side(name, model, sizes, precision)
    del model
    torch.ones(256, 256) @ torch.ones(256, 256)
    before = reset_high_water_mark()
    side.backward(batch)
    side.update()
    print(status("VmHWM") - before)


def reset_high_water_mark() -> int:
    """Reset it to the current resident size, and return that; see clear_refs in proc(5).

    Freed memory is first given back to the kernel, or the step could reuse it unseen. The kernel's counts are
    approximate: steps of less than a few megabytes cannot be measured.
    """
    if trim := getattr(ctypes.CDLL(None), "malloc_trim", None):  # glibc's
        trim(0)
    Path("/proc/self/clear_refs").write_text("5")
    return status("VmRSS")


def status(field: str) -> int:
    """A line of /proc/self/status, in bytes."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field + ":"):
            return int(line.split()[1]) * 1024
    raise RuntimeError(f"/proc/self/status has no {field}: this needs Linux")


if __name__ == "__main__":
    main(*sys.argv[1:])
