"""How fast `reshard run` is from a web server: beside a plain download and a local run, and as a share of a link.

    python tests/benchmarks/bench_remote.py --dir SCRATCH [--gb 2.1] [--rounds 3]
    python tests/benchmarks/bench_remote.py --dir SCRATCH --link [--gb 0.4]

The first serves a checkpoint of DeepSeek-V3's tensors at their real widths by nginx on this machine, and takes it with
curl, from the folder, and from the address, in turns; every way ends with its bytes fsynced. Server and client share
the processor, so it is the cost of the way over HTTP that is seen. The second puts a server behind a link of 100 MB/s
of which a connection gets 15, and each answer comes after 30 ms, as over some distance.

A table goes to stderr; the last line of stdout is one JSON document. What it made is removed, whatever happens.
"""

from __future__ import annotations

import argparse
import shutil
import socket
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from dense import write_dense
from layouts import deepseek_v3_part
from measure import CommandError, Measured, run
from report import HEADING, finish, say, say_measured
from scratch import remove, workspace

HERE = Path(__file__).resolve().parent
LINK, CONNECTION, DELAY_S = 100e6, 15e6, 0.03
JOBS = (1, 4, 8, 16)

NGINX = """
daemon off; master_process off; pid {folder}/pid; error_log {folder}/error.log; worker_processes 1;
events {{ worker_connections 256; }}
http {{
  access_log off; sendfile on; keepalive_requests 1000000; default_type application/octet-stream;
  client_body_temp_path {folder}/t; proxy_temp_path {folder}/t; fastcgi_temp_path {folder}/t;
  uwsgi_temp_path {folder}/t; scgi_temp_path {folder}/t;
  server {{ listen 127.0.0.1:{port}; root {root}; }}
}}
"""
DOWNLOAD = 'mkdir "$1" && cd "$1" && shift && curl -sS --fail --remote-name-all "$@" && sync *'


def main() -> int:
    """Measure what was asked for."""
    parser = argparse.ArgumentParser(description="Measure reshard from a web server.")
    parser.add_argument("--dir", type=Path, required=True, help="folder on the disk to write to; needs twice the size")
    parser.add_argument("--gb", type=float, help="size of the checkpoint (default 2.1, with --link 0.4)")
    parser.add_argument("--rounds", type=int, default=3, help="how often each way is measured (default 3)")
    parser.add_argument("--link", action="store_true", help="measure shares of a slow link instead")
    options = parser.parse_args()
    layout = deepseek_v3_part(int((options.gb or (0.4 if options.link else 2.1)) * 1e9))
    try:
        with workspace(options.dir, 2 * layout.size + (1 << 30)) as folder:
            say(f"making {layout.size / 1e9:.2f} GB in {len(layout.shards)} shards, {layout.tensor_count:,} tensors")
            source = folder / "source"
            source.mkdir()
            write_dense(source, layout)
            if options.link:
                finish("reshard: link", measure_link(layout.size, source, folder / "out"))
            else:
                finish("reshard: http", measure_http(layout.size, source, folder, rounds=options.rounds))
    except CommandError as error:
        sys.exit(str(error))
    except KeyboardInterrupt:
        say("interrupted; what was made is removed")
        return 130
    return 0


def measure_http(size: int, source: Path, folder: Path, *, rounds: int) -> dict[str, Any]:
    """A download, a local run and one from the address, in turns."""
    out = folder / "out"
    with nginx(source, folder / "nginx") as url:
        urls = [f"{url}/{path.name}" for path in sorted(source.iterdir())]
        ways: dict[str, list[str | Path]] = {
            "curl": ["sh", "-c", DOWNLOAD, "sh", out, *urls],
            "local": [sys.executable, "-m", "reshard", "run", source, out, "--json", "-q"],
            "http": [sys.executable, "-m", "reshard", "run", url, out, "--json", "-q"],
        }
        taken: dict[str, list[Measured]] = {way: [] for way in ways}
        say(HEADING)
        for number in range(rounds):
            for way in list(ways) if number % 2 else reversed(ways):
                remove(out)
                # In memory, so that the server does not wait for the disk that is written to.
                subprocess.run(["cat", *source.iterdir()], stdout=subprocess.DEVNULL, check=True)
                taken[way].append(run(ways[way], folder=folder))
                say_measured(f"round {number + 1}: {way}", taken[way][-1], size)
    remove(out)
    result: dict[str, Any] = {"bytes": size, "rounds": rounds}
    for way, runs in taken.items():
        result[way] = round(statistics.median(size / run.seconds / 1e9 for run in runs), 3)
        result[f"{way}_peak_bytes"] = max(run.peak_bytes for run in runs)
    pairs = zip(taken["local"], taken["http"], strict=True)
    result["http_over_local"] = round(statistics.median(ours.seconds / theirs.seconds for ours, theirs in pairs), 3)
    return result


def measure_link(size: int, source: Path, out: Path) -> dict[str, Any]:
    """What share of the link's rate, or of that of its connections, so many of them reach."""
    command = [sys.executable, HERE / "link.py", source, *map(str, (LINK, CONNECTION, DELAY_S))]
    result: dict[str, Any] = {"bytes": size, "link": LINK, "connection": CONNECTION, "delay_s": DELAY_S}
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as server:
        try:
            assert server.stdout is not None
            url = f"http://127.0.0.1:{int(server.stdout.readline())}"
            say(HEADING)
            for jobs in JOBS:
                remove(out)
                arguments = [sys.executable, "-m", "reshard", "run", url, out, "--json", "-q", "--jobs", str(jobs)]
                measured = run(arguments, folder=out.parent)
                say_measured(f"--jobs {jobs}", measured, size)
                # What the program itself says, without its start and the headers.
                rate = size / measured.last_json["seconds"]
                result[f"jobs_{jobs}"] = {"share": round(rate / min(LINK, jobs * CONNECTION), 3), "bytes_per_s": rate}
        finally:
            server.terminate()
    remove(out)
    return result


@contextmanager
def nginx(root: Path, folder: Path) -> Iterator[str]:
    """Serve a folder; give its address."""
    program = shutil.which("nginx", path="/usr/sbin:/usr/bin:/usr/local/sbin:/usr/local/bin")
    if program is None:
        sys.exit("this benchmark needs nginx")
    folder.mkdir()
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    (folder / "conf").write_text(NGINX.format(folder=folder, port=port, root=root))
    with subprocess.Popen([program, "-c", folder / "conf", "-p", folder], stderr=subprocess.DEVNULL) as server:
        try:
            for _ in range(100):
                with socket.socket() as probe:
                    if probe.connect_ex(("127.0.0.1", port)) == 0:
                        break
                time.sleep(0.05)
            yield f"http://127.0.0.1:{port}"
        finally:
            server.terminate()


if __name__ == "__main__":
    sys.exit(main())
