"""How fast checkpoints come from a web server: beside a plain download and a local run, and as a share of a link.

    python tests/benchmarks/bench_remote.py --dir SCRATCH [--gb 2.1] [--rounds 3]
    python tests/benchmarks/bench_remote.py --dir SCRATCH --link [--gb 0.4]
    python tests/benchmarks/bench_remote.py --dir SCRATCH --first-token FOLDER [--rounds 3]

The first serves a checkpoint of DeepSeek-V3's tensors at their real widths by nginx on this machine, and takes it with
curl, from the folder, and from the address, in turns; every way ends with its bytes fsynced. Server and client share
the processor, so it is the cost of the way over HTTP that is seen. The second puts a server behind a link of 100 MB/s
of which a connection gets 15, and each answer comes after 30 ms, as over some distance. The third runs a resharded
checkpoint from behind a link of 80 MB/s with a round trip of 100 ms, all of which one connection may have: the first
token by 16 connections and by one, each into an empty cache and once more from the full one.

A table goes to stderr; the last line of stdout is one JSON document. What it made is removed, whatever happens.
"""

from __future__ import annotations

import argparse
import json
import os
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
from slow_link import slow_link

HERE = Path(__file__).resolve().parent
LINK, CONNECTION, DELAY_S = 100e6, 15e6, 0.03
JOBS = (1, 4, 8, 16)
FIRST_LINK, FIRST_JOBS = {"rate": 80e6, "delay_s": 0.05}, (16, 1)
FIRST = """
import sys
from runner import remote_files
remote_files.CONNECTIONS = remote_files.RemoteFiles.loads_at_once = int(sys.argv[1])
from runner.cli import runner
runner.main(["bench", "-m", sys.argv[2], "--prompt-tokens", "1", "--tokens", "1", "-q"])
"""

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
    parser.add_argument("--first-token", type=Path, metavar="FOLDER", help="run this resharded checkpoint instead")
    options = parser.parse_args()
    if options.first_token is not None:
        with workspace(options.dir, 4 << 30) as folder:
            finish("runner: first token", measure_first(options.first_token.resolve(), folder, rounds=options.rounds))
        return 0
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


def measure_first(source: Path, folder: Path, *, rounds: int) -> dict[str, Any]:
    """The first token by so many connections, in turns; and from the cache that is full then."""
    taken: dict[str, list[dict[str, Any]]] = {f"{way}_{jobs}": [] for jobs in FIRST_JOBS for way in ("cold", "warm")}
    with nginx(source, folder / "nginx") as url, slow_link(int(url.rpartition(":")[2]), **FIRST_LINK) as port:
        for number in range(rounds):
            for jobs in FIRST_JOBS if number % 2 else reversed(FIRST_JOBS):
                environment = {**os.environ, "EXPERT_RESHARD_CACHE": str(folder / "cache")}
                command = [sys.executable, "-c", FIRST, str(jobs), f"http://127.0.0.1:{port}"]
                for way in ("cold", "warm"):
                    out = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True, check=True).stdout
                    document = json.loads(out.splitlines()[-1])
                    first = document["first"] | {"open_s": document["open_s"]}
                    taken[f"{way}_{jobs}"].append(first)
                    rate = first["fetched_bytes"] / first["seconds"]
                    say(
                        f"{jobs:>2} connections, {way}: opened in {first['open_s']:.1f} s, first token in "
                        f"{first['seconds']:.1f} s, {first['fetched_bytes'] / 1e9:.2f} GB at {rate / 1e6:.0f} MB/s, "
                        f"{rate / FIRST_LINK['rate']:.2f} of the link"
                    )
                remove(folder / "cache")
    result: dict[str, Any] = {"rounds": rounds, **FIRST_LINK}
    for way, firsts in taken.items():
        for name in ("open_s", "seconds", "fetched_bytes"):
            result[f"{way}_{name}"] = statistics.median(one[name] for one in firsts)
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
