"""How many CPUs this process may really use: affinity mask and cgroup quotas, not the number in the machine.

A container limited to 2 of 64 CPUs would otherwise start 64 threads per engine and spend its quota on waiting.
"""

from __future__ import annotations

import math
import os
from pathlib import Path

from server import cgroups


def available_cpus() -> int:
    """CPUs by affinity, cut by the cgroups' quota rounded up; at least 1."""
    count = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    quota = cgroup_quota()
    return max(1, count if quota is None else min(count, math.ceil(quota)))


def cgroup_quota(root: Path = cgroups.ROOT, own: Path = cgroups.OWN) -> float | None:
    """CPUs that the control groups of this process allow, the least of them; None where there is no quota."""
    quotas = [_quota(group) for group in cgroups.own_groups("cpu", root, own)]
    return min((quota for quota in quotas if quota is not None), default=None)


def _quota(group: cgroups.Group) -> float | None:
    try:
        if group.version == 2:
            quota, period = (group.path / "cpu.max").read_text().split()[:2]
        else:
            quota = (group.path / "cpu.cfs_quota_us").read_text().strip()
            period = (group.path / "cpu.cfs_period_us").read_text().strip()
        if quota in ("max", "-1"):
            return None
        return int(quota) / int(period)
    except (OSError, ValueError, ZeroDivisionError):
        return None
