"""The machine that this process may use: processor, cores, memory, as the container allows. No torch, no model.

Read from /proc and from the control groups, so a container's limits count and not the host's size.
"""

from __future__ import annotations

import math
import mmap
import os
import platform
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

# What decides how fast this kind of model can run; everything else in a processor's list is noise here.
_FEATURES = (
    "avx2",
    "fma",
    "f16c",
    "avx512f",
    "avx512bw",
    "avx512vl",
    "avx512_vnni",
    "avx512_bf16",
    "avx512_fp16",
    "amx_tile",
    "amx_bf16",
    "asimd",
    "asimddp",
    "bf16",
    "i8mm",
    "sve",
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Machine:
    """What is here.

    Attributes:
        system: Operating system and architecture.
        cpu: The processor's name; empty when the system does not tell.
        features: Instruction sets that matter, in a fixed order.
        cores: Logical cores that this process may use.
        memory_bytes: Memory that this process may use; None when the system does not tell.
        available_bytes: How much of it is free or can be freed at once; None when the system does not tell.
    """

    system: str
    cpu: str
    features: tuple[str, ...]
    cores: int
    memory_bytes: int | None
    available_bytes: int | None


def examine(root: Path = Path("/")) -> Machine:
    """Look at this machine.

    Args:
        root: Where /proc and /sys are; another folder in tests.
    """
    cpu_info = _pairs(root / "proc/cpuinfo")
    flags = f"{cpu_info.get('flags', '')} {cpu_info.get('Features', '')}".split()
    groups = list(_control_groups(root))
    memory, available = _memory(root, groups)
    return Machine(
        system=f"{platform.system()} {platform.machine()}",
        cpu=cpu_info.get("model name") or platform.processor(),
        features=tuple(feature for feature in _FEATURES if feature in flags),
        cores=_cores(groups),
        memory_bytes=memory,
        available_bytes=available,
    )


def resident_bytes(root: Path = Path("/")) -> int:
    """Memory that this process takes now, shared libraries included; 0 when the system does not tell."""
    words = _read(root / "proc/self/statm").split()
    return int(words[1]) * mmap.PAGESIZE if len(words) > 1 and words[1].isdigit() else 0


def peak_bytes(root: Path = Path("/")) -> int:
    """The most memory that this process took so far, mapped files included; 0 when the system does not tell."""
    words = _pairs(root / "proc/self/status").get("VmHWM", "").split()
    return int(words[0]) * 1024 if words and words[0].isdigit() else 0


def _cores(groups: list[Path]) -> int:
    # Not on every system: macOS has no affinity.
    cores = len(os.sched_getaffinity(0)) if sys.platform == "linux" else os.cpu_count() or 1
    for group in groups:
        # Version 2 has one file; version 1 has two, and says "no limit" as -1.
        quota, _, period = _read(group / "cpu.max").partition(" ")
        quota = quota or _read(group / "cpu.cfs_quota_us").strip()
        period = (period or _read(group / "cpu.cfs_period_us")).strip()
        if quota.isdigit() and period.isdigit() and int(period):
            cores = min(cores, math.ceil(int(quota) / int(period)))
    return max(1, cores)


def _memory(root: Path, groups: list[Path]) -> tuple[int | None, int | None]:
    info = {key: int(value.split()[0]) * 1024 for key, value in _pairs(root / "proc/meminfo").items() if value}
    total, available = info.get("MemTotal"), info.get("MemAvailable")
    for group in groups:
        # Above the first a process is ended, above the second it is slowed until it is no use.
        most = _number(group / "memory.max", group / "memory.limit_in_bytes"), _number(group / "memory.high")
        limit = min((one for one in most if one is not None), default=None)
        if limit is None:
            continue
        used = _number(group / "memory.current", group / "memory.usage_in_bytes") or 0
        # Pages of files that are not in use are given back under pressure; they are not what is taken.
        lines = (line.split() for line in _read(group / "memory.stat").splitlines())
        stat = {words[0]: words[1] for words in lines if len(words) == 2}
        reclaimable = int(stat.get("inactive_file") or stat.get("total_inactive_file") or 0)
        total = limit if total is None else min(total, limit)
        free = max(0, limit - max(0, used - reclaimable))
        available = free if available is None else min(available, free)
    return total, available


def _control_groups(root: Path) -> Iterator[Path]:
    """Folders of the control groups that this process is in, innermost first; each level may set a limit."""
    for line in _read(root / "proc/self/cgroup").splitlines():
        hierarchy, _, rest = line.partition(":")
        controllers, _, path = rest.partition(":")
        top = root / "sys/fs/cgroup"
        wanted = [name for name in ("memory", "cpu") if name in controllers.split(",")]
        for base in [top] if hierarchy == "0" else [top / name for name in wanted]:
            # Inside a container the path may be the host's and not visible: then only the top is looked at.
            folder = base / path.strip("/")
            for level in (folder, *folder.parents):
                if level.is_dir() and level.is_relative_to(base):
                    yield level


def _pairs(path: Path) -> dict[str, str]:
    """``key: value`` lines; of a key that comes again, the first."""
    pairs: dict[str, str] = {}
    for line in _read(path).splitlines():
        key, colon, value = line.partition(":")
        if colon:
            pairs.setdefault(key.strip(), value.strip())
    return pairs


def _number(*paths: Path) -> int | None:
    """The whole number in the first of these files that holds one."""
    for path in paths:
        value = _read(path).strip()
        if value.isdigit():
            return int(value)
    return None


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""
