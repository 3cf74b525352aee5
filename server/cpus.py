"""How many CPUs this process may really use: affinity mask and cgroup quota, not the number in the machine.

A container limited to 2 of 64 CPUs would otherwise start 64 threads per engine and spend its quota on waiting.
"""

from __future__ import annotations

import math
import os
from pathlib import Path

_CGROUP_V2 = Path("/sys/fs/cgroup/cpu.max")
_CGROUP_V1 = Path("/sys/fs/cgroup/cpu")


def available_cpus() -> int:
    """CPUs by affinity, cut by the cgroup's quota rounded up; at least 1."""
    count = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    quota = cgroup_quota(_CGROUP_V2, _CGROUP_V1)
    return max(1, count if quota is None else min(count, math.ceil(quota)))


def cgroup_quota(v2: Path, v1: Path) -> float | None:
    """CPUs that the quota files allow, or None where there is no quota. `v2` is cpu.max, `v1` the cpu controller."""
    try:
        if v2.is_file():
            quota, period = v2.read_text().split()[:2]
        else:
            quota = (v1 / "cpu.cfs_quota_us").read_text().strip()
            period = (v1 / "cpu.cfs_period_us").read_text().strip()
        if quota in ("max", "-1"):
            return None
        return int(quota) / int(period)
    except (OSError, ValueError, ZeroDivisionError):
        return None
