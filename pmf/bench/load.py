"""The fraction of the machine used by other programs during a measurement."""

from __future__ import annotations

import os
import time
from pathlib import Path
from types import TracebackType

STAT = Path("/proc/stat")
LOUD = 0.05
"""Above this fraction, times say more about other programs than about the code."""


class OtherLoad:
    """Context manager; afterwards `share` in [0, 1] is what other processes and the hypervisor used.

    None if the system does not provide it (Linux's /proc/stat).
    """

    share: float | None = None

    def __enter__(self) -> OtherLoad:
        self._start = _clocks()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._start is None or (end := _clocks()) is None:
            return
        wall, busy, own = (after - before for before, after in zip(self._start, end, strict=True))
        self.share = max(0.0, busy - own) / (wall * (os.cpu_count() or 1))

    def sentence(self) -> str:
        """The text printed below the times."""
        if self.share is None:
            return "The load from other programs is unknown on this system."
        taken = f"Other programs used {self.share:.1%} of the processor during this run"
        return f"{taken}: do not trust these times." if self.share > LOUD else f"{taken}."


def _clocks() -> tuple[float, float, float] | None:
    """Seconds: now; all processors' non-idle time; this process's own, including its children."""
    try:
        fields = [int(x) for x in STAT.read_text().split("\n", 1)[0].split()[1:9]]
    except (OSError, ValueError):
        return None
    user, nice, system, _idle, _wait, interrupts, soft_interrupts, stolen = fields
    ticks = user + nice + system + interrupts + soft_interrupts + stolen
    return time.perf_counter(), ticks / os.sysconf("SC_CLK_TCK"), sum(os.times()[:4])
