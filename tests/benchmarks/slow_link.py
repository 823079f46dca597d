"""A link to a web server, with a rate and a delay: what `tc netem` does where a kernel has it.

    python tests/benchmarks/slow_link.py PORT --rate 125e6 --delay 0.02 [--each 40e6]

Takes connections on a port of this machine, which it prints, and passes them on to PORT. All answers together come at
`rate` bytes/s at most, those of one connection at `each`, and every byte `delay` seconds late in each direction: a new
connection or a request on an old one waits twice that. It knows bytes; it must not know HTTP.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import subprocess
import sys
from collections.abc import Iterator

PART_BYTES = 1 << 16
HELD_PARTS = 256
"""Of one connection, on their way: 16 MiB, more than a sender's window."""


class Pipe:
    """Something through which bytes pass at a rate, one behind the other."""

    def __init__(self, rate: float) -> None:
        self._rate = rate
        self._free_at = 0.0

    def pass_at(self, now: float, size: int) -> float:
        """When the last of these bytes is through."""
        self._free_at = max(now, self._free_at) + size / self._rate
        return self._free_at


async def carry(reader: asyncio.StreamReader, writer: asyncio.StreamWriter, pipes: list[Pipe], delay_s: float) -> None:
    """Pass bytes on until one side ends."""
    loop = asyncio.get_running_loop()
    held: asyncio.Queue[tuple[float, bytes]] = asyncio.Queue(HELD_PARTS)

    async def send() -> None:
        while True:
            due, data = await held.get()
            await asyncio.sleep(max(0.0, due - loop.time()))
            if not data:
                break
            writer.write(data)
            await writer.drain()

    sending = asyncio.create_task(send())
    with contextlib.suppress(OSError):
        while data := await reader.read(PART_BYTES):
            at = max([loop.time(), *(pipe.pass_at(loop.time(), len(data)) for pipe in pipes)])
            await held.put((at + delay_s, data))
            if sending.done():
                break
    with contextlib.suppress(OSError):
        await held.put((loop.time() + delay_s, b""))
        await sending
    writer.close()


async def relay(port: int, rate: float, each: float, delay_s: float) -> None:
    """Serve until the process ends."""
    link = Pipe(rate)

    async def connect(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await asyncio.sleep(2 * delay_s)  # the handshake
        try:
            there, back = await asyncio.open_connection("127.0.0.1", port, limit=PART_BYTES)
        except OSError:
            writer.close()
            return
        await asyncio.gather(carry(reader, back, [], delay_s), carry(there, writer, [link, Pipe(each)], delay_s))

    server = await asyncio.start_server(connect, "127.0.0.1", 0, limit=PART_BYTES)
    sys.stdout.write(f"{server.sockets[0].getsockname()[1]}\n")
    sys.stdout.flush()
    await server.serve_forever()


@contextlib.contextmanager
def slow_link(port: int, *, rate: float, delay_s: float, each: float | None = None) -> Iterator[int]:
    """A link to a server of this machine, in a process of its own; gives the port that it takes connections on."""
    command = [sys.executable, __file__, str(port), "--rate", str(rate), "--delay", str(delay_s)]
    if each is not None:
        command += ["--each", str(each)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout is not None
            yield int(process.stdout.readline())
        finally:
            process.kill()


def main() -> None:
    """Relay to the port that was named."""
    parser = argparse.ArgumentParser(description="A link with a rate and a delay.")
    parser.add_argument("port", type=int)
    parser.add_argument("--rate", type=float, required=True, help="bytes/s of all connections together")
    parser.add_argument("--each", type=float, default=float("inf"), help="bytes/s of one connection")
    parser.add_argument("--delay", type=float, required=True, help="seconds in each direction")
    options = parser.parse_args()
    with contextlib.suppress(KeyboardInterrupt):
        asyncio.run(relay(options.port, options.rate, options.each, options.delay))


if __name__ == "__main__":
    main()
