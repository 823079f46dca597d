"""What a process may use, read from copies of /proc and of the control groups."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from runner.machine import Machine, examine

GB = 1_000_000_000
MEMINFO = "MemTotal:       64000000 kB\nMemFree:         1000000 kB\nMemAvailable:   32000000 kB\n"
TOTAL, AVAILABLE = 64_000_000 * 1024, 32_000_000 * 1024
CPUINFO = (
    "processor\t: 0\nmodel name\t: Some Processor 9000\nflags\t\t: fpu sse2 avx2 fma f16c avx512f amx_tile\n\n"
    "processor\t: 1\nmodel name\t: Some Processor 9000\nflags\t\t: fpu\n"
)


def look(tmp_path: Path, **files: str) -> Machine:
    """Write these files below a root of their own and examine it."""
    for name, content in {"proc/cpuinfo": CPUINFO, "proc/meminfo": MEMINFO, **files}.items():
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(content, encoding="ascii")
    return examine(tmp_path)


@pytest.fixture(autouse=True)
def _eight_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(8)), raising=False)


def test_without_limits(tmp_path: Path) -> None:
    here = look(tmp_path)
    assert (here.cpu, here.features) == ("Some Processor 9000", ("avx2", "fma", "f16c", "avx512f", "amx_tile"))
    assert (here.cores, here.memory_bytes, here.available_bytes) == (8, TOTAL, AVAILABLE)


def test_limits_of_version_2_count_on_every_level(tmp_path: Path) -> None:
    here = look(
        tmp_path,
        **{
            "proc/self/cgroup": "0::/outer/inner\n",
            "sys/fs/cgroup/outer/inner/memory.max": "max\n",
            "sys/fs/cgroup/outer/inner/cpu.max": "150000 100000\n",
            "sys/fs/cgroup/outer/memory.max": f"{16 * GB}\n",
            "sys/fs/cgroup/outer/memory.current": f"{10 * GB}\n",
            "sys/fs/cgroup/outer/memory.stat": f"anon {6 * GB}\ninactive_file {4 * GB}\n",
            "sys/fs/cgroup/outer/cpu.max": "max 100000\n",
        },
    )
    assert (here.cores, here.memory_bytes, here.available_bytes) == (2, 16 * GB, 10 * GB)


def test_a_limit_that_slows_instead_of_ending_counts(tmp_path: Path) -> None:
    """Above memory.high the system takes pages back at every step; systemd's MemoryHigh= is that."""
    here = look(
        tmp_path,
        **{
            "proc/self/cgroup": "0::/box\n",
            "sys/fs/cgroup/box/memory.max": f"{16 * GB}\n",
            "sys/fs/cgroup/box/memory.high": f"{8 * GB}\n",
            "sys/fs/cgroup/box/memory.current": f"{3 * GB}\n",
        },
    )
    assert (here.memory_bytes, here.available_bytes) == (8 * GB, 5 * GB)


def test_inside_a_container_the_top_is_looked_at(tmp_path: Path) -> None:
    here = look(
        tmp_path,
        **{"proc/self/cgroup": "0::/not/visible/here\n", "sys/fs/cgroup/memory.max": f"{8 * GB}\n"},
    )
    assert (here.memory_bytes, here.available_bytes) == (8 * GB, 8 * GB)


def test_limits_of_version_1(tmp_path: Path) -> None:
    here = look(
        tmp_path,
        **{
            "proc/self/cgroup": "4:memory:/box\n2:cpu,cpuacct:/box\n1:name=systemd:/\n",
            "sys/fs/cgroup/memory/box/memory.limit_in_bytes": f"{4 * GB}\n",
            "sys/fs/cgroup/memory/box/memory.usage_in_bytes": f"{3 * GB}\n",
            "sys/fs/cgroup/memory/box/memory.stat": f"total_inactive_file {GB}\n",
            "sys/fs/cgroup/memory/memory.limit_in_bytes": "9223372036854771712\n",
            "sys/fs/cgroup/cpu/box/cpu.cfs_quota_us": "300000\n",
            "sys/fs/cgroup/cpu/box/cpu.cfs_period_us": "100000\n",
            "sys/fs/cgroup/cpu/cpu.cfs_quota_us": "-1\n",
            "sys/fs/cgroup/cpu/cpu.cfs_period_us": "100000\n",
        },
    )
    assert (here.cores, here.memory_bytes, here.available_bytes) == (3, 4 * GB, 2 * GB)


def test_a_limit_above_the_machine_changes_nothing(tmp_path: Path) -> None:
    here = look(tmp_path, **{"proc/self/cgroup": "0::/\n", "sys/fs/cgroup/memory.max": f"{1000 * GB}\n"})
    assert (here.memory_bytes, here.available_bytes) == (TOTAL, AVAILABLE)


def test_a_system_without_proc(tmp_path: Path) -> None:
    here = examine(tmp_path)
    assert (here.features, here.cores, here.memory_bytes, here.available_bytes) == ((), 8, None, None)


def test_this_machine() -> None:
    assert examine().cores >= 1
