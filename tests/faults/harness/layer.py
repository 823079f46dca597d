"""The disk that does as ordered: every call of `os` on a path below one folder passes here, is counted, and can fail.

`install` puts wrappers into the module `os` and a Python twin of `open` into `io`, for good: it is for a forked child
that ends with the command it runs. The program under test is not touched. Changes of the disk are done one at a time
under a lock, and the model is told of each, so that a kill finds model and disk in step. O_DIRECT is played: offsets,
lengths and memory must be in whole pages, as on the strictest disk, whatever lies below; or it is refused at open.
"""

from __future__ import annotations

import builtins
import errno
import io
import os
import signal
import threading
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

from harness.buffers import File, front, half, require_pages
from harness.faults import Fault, Step
from harness.model import Model, Node

UNKNOWN = ("copy_file_range", "sendfile", "splice", "mkfifo", "mknod", "pwritev2", "symlink", "chown")
"""Calls that would change the disk behind the model's back: whoever starts to use one teaches it to the layer."""


class Layer:
    """See the module. Every method that is named like a function of `os` stands in for it."""

    def __init__(
        self, root: Path, graveyard: Path, model: Model, fault: Fault, *, direct: bool, last_will: Callable[[], None]
    ) -> None:
        """Prepare; nothing is changed before `install`.

        Args:
            root: The folder that is watched. Neither it nor its parents are symlinks.
            graveyard: A folder beside it for files that were unlinked and may be wanted again.
            model: What is below root.
            fault: What to do, and when.
            direct: Whether O_DIRECT can be had.
            last_will: Called before the process kills itself.
        """
        self.root, self.graveyard, self.model, self.fault = str(root), graveyard, model, fault
        self.steps: list[Step] = []
        self._direct = direct
        self._last_will = last_will
        self._lock = threading.RLock()
        self._counts: Counter[str] = Counter()
        self._points = 0
        self._files: dict[int, tuple[str, Node, int]] = {}  # descriptor -> path, node, flags
        self._real = {name: getattr(os, name) for name in dir(os)}
        self._real_open = io.open

    def install(self) -> None:
        """Put the wrappers in place."""
        for name in vars(type(self)):
            if name in self._real:
                setattr(os, name, getattr(self, name))
        for name in ("pread", "preadv", "read", "readv"):
            setattr(os, name, self._reading(name))
        for name in ("pwrite", "pwritev", "write", "writev"):
            setattr(os, name, self._writing(name))
        for name in ("stat", "lstat", "listdir", "scandir", "statvfs", "fstat", "lseek"):
            setattr(os, name, self._asking(name))
        for name in set(UNKNOWN) & self._real.keys():
            setattr(os, name, self._refusing(name))
        os.fdatasync, os.remove, os.replace = self.fsync, self.unlink, self.rename
        io.open = builtins.open = self._open_file  # type: ignore[assignment]

    # Where a call goes, and what is to happen to it.

    def _relative(self, path: Any, dir_fd: int | None = None) -> str | None:
        """The path below root; None when it is elsewhere."""
        if isinstance(path, int):
            return self._files[path][0] if path in self._files else None
        path = os.fsdecode(path)
        if dir_fd is not None:
            if dir_fd not in self._files:
                return None
            path = os.path.join(self.root, self._files[dir_fd][0], path)
        path = os.path.abspath(path)
        if path == self.root:
            return ""
        return path[len(self.root) + 1 :] if path.startswith(self.root + "/") else None

    def _step(self, call: str, path: str, *, changes: bool = False, size: int = 0) -> Step:
        """Count a call, and let it fail or kill if that was ordered. Called under the lock."""
        self._counts[call] += 1
        self._points += changes
        step = Step(call, path, self._counts[call], self._points if changes else 0, size)
        self.steps.append(step)
        if self.fault.dies(step) == "before":
            self._die()
        code = self.fault.fails(step)
        if code is not None:
            raise OSError(code, os.strerror(code), os.path.join(self.root, path).rstrip("/"))
        return step

    def _done(self, step: Step) -> None:
        if self.fault.dies(step):
            self._die()

    def _die(self) -> NoReturn:
        self._last_will()
        os.kill(os.getpid(), signal.SIGKILL)
        raise AssertionError("a killed process goes on")

    def _about_to_change(self, node: Node, target: Any) -> None:
        """From now on the model holds the file's bytes, not the disk alone."""
        if node.found:
            path = f"/proc/self/fd/{target}" if isinstance(target, int) else target
            with self._real_open(path, "rb") as file:
                self.model.load(node, file.read())

    # Opening and closing.

    def open(self, path: Any, flags: int, mode: int = 0o777, *, dir_fd: int | None = None) -> int:
        relative = self._relative(path, dir_fd)
        if relative is None:
            return self._real["open"](path, flags, mode, dir_fd=dir_fd)
        with self._lock:
            node = self.model.find(relative)
            creates = node is None and bool(flags & os.O_CREAT)
            empties = node is not None and bool(flags & os.O_TRUNC)
            step = self._step("open", relative, changes=creates or empties)
            if flags & os.O_DIRECT and not self._direct:
                raise OSError(errno.EINVAL, os.strerror(errno.EINVAL), path)
            if empties:
                self._about_to_change(node, path)
            descriptor = self._real["open"](path, flags & ~os.O_DIRECT, mode, dir_fd=dir_fd)
            if creates:
                node = self.model.create(relative)
            elif empties:
                self.model.resize(node, 0)
            assert node is not None, relative
            self._files[descriptor] = relative, node, flags
            self._done(step)
        return descriptor

    def close(self, descriptor: int) -> None:
        if descriptor not in self._files:
            return self._real["close"](descriptor)
        with self._lock:
            try:
                self._step("close", self._files[descriptor][0])
            finally:
                # Linux closes it whatever it answers.
                del self._files[descriptor]
                self._real["close"](descriptor)

    def _open_file(self, file: Any, mode: str = "r", buffering: int = -1, *rest: Any, **options: Any) -> Any:
        """`open`, with the same calls of `os` that its C twin would make."""
        if self._relative(file) is None:
            return self._real_open(file, mode, buffering, *rest, **options)
        access = os.O_RDWR if "+" in mode else os.O_RDONLY if "r" in mode else os.O_WRONLY
        create = {"w": os.O_CREAT | os.O_TRUNC, "x": os.O_CREAT | os.O_EXCL, "a": os.O_CREAT | os.O_APPEND}
        flags = access | next((bits for letter, bits in create.items() if letter in mode), 0)
        raw = File(file if isinstance(file, int) else os.open(file, flags, 0o666), access)
        if buffering == 0:
            return raw
        kind = {os.O_RDONLY: io.BufferedReader, os.O_WRONLY: io.BufferedWriter, os.O_RDWR: io.BufferedRandom}[access]
        buffered = kind(raw)
        return buffered if "b" in mode else io.TextIOWrapper(buffered, *rest, **options)

    # Reading and asking.

    def _asking(self, name: str) -> Callable[..., Any]:
        real = self._real[name]

        def call(*arguments: Any, **options: Any) -> Any:
            path = arguments[0] if arguments else options.get("path", ".")
            relative = self._relative(path, options.get("dir_fd"))
            if relative is not None:
                with self._lock:
                    self._step(name, relative)
            return real(*arguments, **options)

        return call

    def _reading(self, name: str) -> Callable[..., Any]:
        real = self._real[name]

        def call(descriptor: int, target: Any, *offset: int) -> Any:
            if descriptor not in self._files:
                return real(descriptor, target, *offset)
            path, _, flags = self._files[descriptor]
            buffers = [memoryview(b).cast("B") for b in target] if name in ("preadv", "readv") else []
            size = sum(map(len, buffers)) if buffers else target
            with self._lock:
                step = self._step(name, path, size=size)
            if flags & os.O_DIRECT:
                require_pages(buffers, *offset[:1])
            if self.fault.is_short(step):
                size = half(size, flags)
                target = front(buffers, size) if buffers else size
            return real(descriptor, target, *offset)

        return call

    # Changing.

    def _writing(self, name: str) -> Callable[..., Any]:
        real = self._real["pwrite"]
        has_offset, is_vector = name.startswith("p"), name.endswith("v")

        def call(descriptor: int, source: Any, *offset: int) -> int:
            if descriptor not in self._files:
                return self._real[name](descriptor, source, *offset)
            path, node, flags = self._files[descriptor]
            data = b"".join(source) if is_vector else bytes(source)
            if flags & os.O_DIRECT:
                require_pages(source if is_vector else [source], *offset[:1])
            with self._lock:
                self._about_to_change(node, descriptor)
                step = self._step(name, path, changes=True, size=len(data))
                at = offset[0] if has_offset else self._position(descriptor, node, flags)
                if self.fault.is_short(step) or self.fault.dies(step) == "half":
                    data = data[: half(len(data), flags)]
                written = 0
                while written < len(data):
                    written += real(descriptor, data[written:], at + written)
                self.model.write(node, at, data)
                if not has_offset:
                    self._real["lseek"](descriptor, at + len(data), os.SEEK_SET)
                if flags & (os.O_DSYNC | os.O_SYNC):
                    self.model.sync(node)
                self._done(step)
            return len(data)

        return call

    def _position(self, descriptor: int, node: Node, flags: int) -> int:
        return len(node.now) if flags & os.O_APPEND else self._real["lseek"](descriptor, 0, os.SEEK_CUR)

    def fsync(self, descriptor: int) -> None:
        # Never done in truth: what a kill leaves is in the page cache, and a power cut is played.
        if descriptor in self._files:
            path, node, _ = self._files[descriptor]
            with self._lock:
                try:
                    step = self._step("fsync", path, changes=True)
                except OSError:
                    self.model.sync_failed(node)
                    raise
                self.model.sync(node)
                self._done(step)

    def _changing(
        self,
        call: str,
        relative: str | None,
        do: Callable[[], Any],
        note: Callable[[str], None],
        plain: Callable[[], Any],
    ) -> Any:
        if relative is None:
            return plain()
        with self._lock:
            step = self._step(call, relative, changes=True)
            try:
                result = do()
                note(relative)
            finally:
                # Also when there is nothing to remove, or a folder that is to be made is there already.
                self._done(step)
        return result

    def ftruncate(self, descriptor: int, size: int) -> None:
        self._resize("ftruncate", descriptor, size)

    def truncate(self, path: Any, size: int) -> None:
        self._resize("truncate", path, size)

    def posix_fallocate(self, descriptor: int, offset: int, size: int) -> None:
        if descriptor in self._files:
            size = max(offset + size, self._real["fstat"](descriptor).st_size)
            self._resize("posix_fallocate", descriptor, size)
        else:
            self._real["posix_fallocate"](descriptor, offset, size)

    def _resize(self, call: str, target: Any, size: int) -> None:
        def do() -> None:
            self._about_to_change(self._node(target), target)
            self._real["truncate"](target, size)

        self._changing(
            call,
            self._relative(target),
            do,
            lambda _: self.model.resize(self._node(target), size),
            lambda: self._real["truncate"](target, size),
        )

    def _node(self, target: Any) -> Node:
        node = self._files[target][1] if isinstance(target, int) else self.model.find(self._relative(target) or "")
        assert node is not None, target
        return node

    def mkdir(self, path: Any, mode: int = 0o777, *, dir_fd: int | None = None) -> None:
        def do() -> None:
            self._real["mkdir"](path, mode, dir_fd=dir_fd)

        relative = self._relative(path, dir_fd)
        self._changing("mkdir", relative, do, lambda at: void(self.model.create(at, folder=True)), do)

    def rmdir(self, path: Any, *, dir_fd: int | None = None) -> None:
        def do() -> None:
            self._real["rmdir"](path, dir_fd=dir_fd)

        self._changing("rmdir", self._relative(path, dir_fd), do, self.model.remove, do)

    def unlink(self, path: Any, *, dir_fd: int | None = None) -> None:
        relative = self._relative(path, dir_fd)

        def plain() -> None:
            self._real["unlink"](path, dir_fd=dir_fd)

        self._changing(
            "unlink", relative, lambda: None if self._bury(relative or "") else plain(), self.model.remove, plain
        )

    def rename(self, path: Any, target: Any, *, src_dir_fd: int | None = None, dst_dir_fd: int | None = None) -> None:
        origin = self._relative(path, src_dir_fd)
        relative = self._relative(target, dst_dir_fd)
        assert (origin is None) == (relative is None), f"rename across the root: {path} to {target}"

        def do() -> None:
            if relative is not None and self.model.find(origin or "") is not None:
                self._bury(relative)
            self._real["rename"](path, target, src_dir_fd=src_dir_fd, dst_dir_fd=dst_dir_fd)

        self._changing("rename", relative, do, lambda at: self.model.rename(origin or "", at), do)

    def link(self, path: Any, target: Any, **options: Any) -> None:
        relative = self._relative(target)

        def do() -> None:
            if relative is not None:
                self._about_to_change(self._node(path), path)
            self._real["link"](path, target, **options)

        self._changing("link", relative, do, lambda at: self.model.link(at, self._node(path)), do)

    def _bury(self, relative: str) -> bool:
        """Keep an untouched file that loses its name: a power cut may bring it back, the same file with its times."""
        node = self.model.find(relative)
        if node is None or not node.found:
            return False
        number = len(self.model.removed)
        self._real["rename"](os.path.join(self.root, relative), self.graveyard / str(number))
        self.model.removed[number] = node
        return True

    def _refusing(self, name: str) -> Callable[..., Any]:
        def call(*_: Any, **__: Any) -> NoReturn:
            raise NotImplementedError(f"the fault layer does not know os.{name} yet")

        return call


def void(_: object) -> None:
    """Drop a value."""
