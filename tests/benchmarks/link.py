"""A web server behind a link of a known rate: so much for all connections, so much for one, a delay before each answer.

    python link.py FOLDER LINK_BYTES_PER_S CONNECTION_BYTES_PER_S DELAY_S

Prints its port, and serves the files of a folder by range until it is ended. It is not a network: nothing is lost, and
a connection begins at its full rate.
"""

from __future__ import annotations

import asyncio
import re
import sys
import time
from contextlib import suppress
from pathlib import Path
from urllib.parse import unquote

CHUNK_BYTES = 128 << 10
LENIENCE_S = 0.005
"""Who was kept waiting by the processor catches up with this much."""


class Link:
    """What all connections share."""

    def __init__(self, root: Path, link: float, connection: float, delay_s: float) -> None:
        self.root, self.link, self.connection, self.delay_s = root, link, connection, delay_s
        self.free_at = 0.0

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """Answer the requests of one connection."""
        with suppress(asyncio.IncompleteReadError, ConnectionError):
            free_at = 0.0
            while True:
                head = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1")
                await asyncio.sleep(self.delay_s)
                path = self.root / unquote(head.split()[1]).lstrip("/")
                if not path.is_file():
                    writer.write(b"HTTP/1.1 404 Not Found\r\nContent-Length: 0\r\n\r\n")
                    continue
                free_at = await self._send(writer, path, head, free_at)
        writer.close()

    async def _send(self, writer: asyncio.StreamWriter, path: Path, head: str, free_at: float) -> float:
        size = path.stat().st_size
        asked = re.search(r"(?i)\r\nrange: bytes=(\d+)-(\d+)", head)
        begin, end = (int(asked[1]), min(int(asked[2]) + 1, size)) if asked else (0, size)
        lines = [f"HTTP/1.1 {206 if asked else 200} OK", f"Content-Length: {end - begin}", 'ETag: "one"']
        lines += [f"Content-Range: bytes {begin}-{end - 1}/{size}"] if asked else []
        writer.write("\r\n".join([*lines, "", ""]).encode())
        with path.open("rb") as file:
            file.seek(begin)
            while begin < end:
                data = file.read(min(CHUNK_BYTES, end - begin))
                begin += len(data)
                now = time.monotonic()
                self.free_at = max(self.free_at, now - LENIENCE_S) + len(data) / self.link
                free_at = max(free_at, now - LENIENCE_S) + len(data) / self.connection
                writer.write(data)
                await writer.drain()
                await asyncio.sleep(max(0.0, max(self.free_at, free_at) - now))
        return free_at


async def main() -> None:
    """Serve."""
    root, *numbers = sys.argv[1:]
    server = await asyncio.start_server(Link(Path(root), *map(float, numbers)).serve, "127.0.0.1", 0)
    sys.stdout.write(f"{server.sockets[0].getsockname()[1]}\n")
    sys.stdout.flush()
    await server.serve_forever()


if __name__ == "__main__":
    asyncio.run(main())
