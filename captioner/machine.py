"""The machine: how many of its processors this process may use."""

from __future__ import annotations

import contextlib
import math
import os
from pathlib import Path


def processors() -> int:
    """Processors that this process may keep busy: those it is bound to, and no more than its container's share.

    A container on a host of 64 processors may have a share of 2; with a thread for each processor of the host, it would
    wait for most of them most of the time.
    """
    bound = _bound()
    share = _container_share(Path("/proc/self/cgroup"), Path("/sys/fs/cgroup"))
    return bound if share is None else max(1, min(bound, math.ceil(share)))


def _bound() -> int:
    """Processors that the operating system lets this process run on."""
    if hasattr(os, "process_cpu_count"):  # Python 3.13
        return os.process_cpu_count() or 1
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _container_share(groups: Path, root: Path) -> float | None:
    """Processors' worth of time that Linux grants the control groups of this process; None where it is unlimited.

    Args:
        groups: file with a line for each hierarchy of control groups, "number:controllers:path".
        root: folder in which they are mounted.
    """
    shares: list[float] = []
    with contextlib.suppress(OSError, ValueError):
        for line in groups.read_text().splitlines():
            _, controllers, path = line.split(":", 2)
            if controllers and "cpu" not in controllers.split(","):
                continue
            mounted = root / "cpu" if controllers else root  # a hierarchy for each controller, or one (version 2)
            # Inside a container, the path may be that of the host: then its last existing parent is the mount itself.
            place = Path(path.lstrip("/"))
            for folder in (place, *place.parents):
                share = _share(mounted / folder)
                if share is not None:
                    shares.append(share)
    return min(shares, default=None)


def _share(folder: Path) -> float | None:
    """Processors' worth of time of one control group."""
    with contextlib.suppress(OSError, ValueError, ZeroDivisionError):
        if (folder / "cpu.max").exists():  # version 2: "max 100000" or "quota period", in microseconds
            quota, period = (folder / "cpu.max").read_text().split()
            return None if quota == "max" else int(quota) / int(period)
        granted = int((folder / "cpu.cfs_quota_us").read_text())  # version 1: -1 where it is unlimited
        return granted / int((folder / "cpu.cfs_period_us").read_text()) if granted > 0 else None
    return None
