"""The most disk that `reshard run --consume` takes beyond its source, and `restore --consume` on the way back.

Counted in two ways. What the files of both folders take is exact, but blind to a file that is removed and still open.
The free space of the disk sees that too, and whatever else is written to the disk meanwhile.
"""

from __future__ import annotations

import hashlib
import shutil
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from layouts import Layout
from measure import Measured, run
from report import HEADING, say, say_measured
from sparse import allocated_bytes

from manifests.names import Role, parse_name

POLL_SECONDS = 0.05


class Peak:
    """Watches what a few folders take together.

    Attributes:
        extra: The most that their files took, beyond what they took at the start.
        used: The most that the free space of their disk shrank by.
        looks: How often both were asked for.
    """

    def __init__(self, folders: list[Path]) -> None:
        self._folders = folders
        # The disk is asked about above them: a restore removes what it has used up, folder and all.
        self._disk = folders[0].parent
        self._start = allocated_bytes(*folders)
        self._free = shutil.disk_usage(self._disk).free
        self._stop = threading.Event()
        self.extra = 0
        self.used = 0
        self.looks = 0

    @contextmanager
    def watch(self) -> Iterator[None]:
        """Ask until the body ends."""
        thread = threading.Thread(target=self._poll)
        thread.start()
        try:
            yield
        finally:
            self._stop.set()
            thread.join()

    def _poll(self) -> None:
        while not self._stop.wait(POLL_SECONDS):
            self.used = max(self.used, self._free - shutil.disk_usage(self._disk).free)
            self.extra = max(self.extra, allocated_bytes(*self._folders) - self._start)
            self.looks += 1

    def over(self) -> dict[str, int]:
        """The figures for a benchmark's JSON line."""
        return {"extra_bytes": self.extra, "free_space_shrank_by": self.used, "looks": self.looks}


def measure_consume(layout: Layout, source: Path, out: Path, back: Path) -> dict[str, Any]:
    """There and back; the shards that come back must be those that went.

    Raises:
        SystemExit: They are not, or something of the folder that was consumed is left.
    """
    before = _digests(source)
    planned = _reshard("plan", source, out, "--consume", "--json").last_json["consume_peak_bytes"]
    say(HEADING)
    there, run_peak = _watched("run --consume", layout.size, "run", source, out)
    again, restore_peak = _watched("restore --consume", layout.size, "restore", out, back)
    if _digests(back) != before:
        sys.exit(f"{back}: its shards are not the ones that went into {out}")
    left = [*source.glob("*.safetensors"), *out.rglob("*.safetensors")]
    if left:
        sys.exit(f"{left[0]}: is still there, and {len(left) - 1} more; --consume was to free it")
    bound = _bound(layout)
    say(f"{'extra disk at the peak, bytes':<34}{'by files':>18}{'by free space':>18}{'looks':>8}")
    for label, peak in (("run --consume", run_peak), ("restore --consume", restore_peak)):
        say(f"{label:<34}{peak.extra:>18,}{peak.used:>18,}{peak.looks:>8}")
    say(f"{'plan said':<34}{planned:>18,}")
    say(f"{'a shard, an expert, dense parts':<34}{bound:>18,}")
    return {
        "bytes": layout.size,
        "run": there.over(layout.size) | run_peak.over(),
        "restore": again.over(layout.size) | restore_peak.over(),
        "plan_extra_bytes": planned,
        "extra_bytes_target": bound,
        "shards_came_back": True,
    }


def _watched(label: str, size: int, command: str, source: Path, out: Path) -> tuple[Measured, Peak]:
    peak = Peak([source, out])
    with peak.watch():
        measured = _reshard(command, source, out, "--consume", "--yes", "--json", "-q")
    say_measured(label, measured, size)
    return measured, peak


def _reshard(*arguments: str | Path) -> Measured:
    (folder,) = {Path(path).parent for path in arguments[1:3]}
    return run([sys.executable, "-m", "reshard", *arguments], folder=folder)


def _digests(folder: Path) -> dict[str, str]:
    digests = {}
    for path in folder.glob("*.safetensors"):
        with path.open("rb") as file:
            digests[path.name] = hashlib.file_digest(file, "sha256").hexdigest()
    return digests


def _bound(layout: Layout) -> int:
    """What issue and plan allow: the largest shard, an expert, and all files that are not experts'."""
    experts: dict[tuple[int | None, int | None], int] = {}
    dense = 0
    for shard in layout.shards:
        for tensor in shard.tensors:
            name = parse_name(tensor.name)
            if name.role is Role.ROUTED_EXPERT:
                key = name.layer, name.expert
                experts[key] = experts.get(key, 0) + tensor.end - tensor.begin
            else:
                dense += tensor.end - tensor.begin
    return max(shard.size for shard in layout.shards) + max(experts.values(), default=0) + dense
