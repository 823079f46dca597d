"""Files that a command was told to write: what is no regular file stays what it is, links stay, failures come early."""

from __future__ import annotations

import os
import stat
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path

import pytest
from click.testing import Result

from manifests.errors import SourceNotFoundError, ToolkitError
from runner import trace
from runner.output import check_output, open_output

Call = Callable[..., Result]
Spawn = Callable[..., subprocess.Popen[bytes]]

WRITERS = {"trace": ["trace", "-p", "hello", "-n", "3"], "logits": ["logits", "-p", "hello"]}


def written_to(path: Path, name: str, call: Call, model: Path) -> bytes:
    """What somebody reads from a FIFO meanwhile."""
    found: list[bytes] = []
    # Without a writer, opening it to read would wait; with both ends open nobody waits if it is replaced.
    descriptor = os.open(path, os.O_RDWR)
    reader = threading.Thread(target=lambda: found.append(path.read_bytes()), daemon=True)
    reader.start()
    try:
        result = call(*WRITERS[name], "-m", model, "--out", path)
    finally:
        os.close(descriptor)
    reader.join(timeout=60)
    assert result.exit_code == 0, result.stderr
    assert found
    return found[0]


@pytest.mark.parametrize("name", WRITERS)
@pytest.mark.parametrize("through", ["itself", "a link"])
def test_a_fifo_is_written_to_and_stays_one(
    name: str, through: str, tiny_checkpoint: Path, tmp_path: Path, call: Call
) -> None:
    fifo, link, plain = tmp_path / "fifo", tmp_path / "link", tmp_path / "plain"
    os.mkfifo(fifo)
    link.symlink_to(fifo)
    seen = written_to(fifo if through == "itself" else link, name, call, tiny_checkpoint)
    assert call(*WRITERS[name], "-m", tiny_checkpoint, "--out", plain).exit_code == 0
    assert seen == plain.read_bytes()
    assert stat.S_ISFIFO(fifo.lstat().st_mode)
    assert link.is_symlink()
    assert {path.name for path in tmp_path.iterdir()} == {"fifo", "link", "plain"}


@pytest.mark.parametrize("name", WRITERS)
@pytest.mark.parametrize("is_there", [True, False])
def test_a_link_stays_and_its_file_is_replaced(
    name: str, is_there: bool, tiny_checkpoint: Path, tmp_path: Path, call: Call
) -> None:
    (tmp_path / "elsewhere").mkdir()
    file, link = tmp_path / "elsewhere" / "file", tmp_path / "link"
    link.symlink_to(file)
    if is_there:
        file.write_bytes(b"old")
    result = call(*WRITERS[name], "-m", tiny_checkpoint, "--out", link)
    assert result.exit_code == 0, result.stderr
    assert link.is_symlink()
    assert len(file.read_bytes()) > 100
    assert list(file.parent.iterdir()) == [file]


def test_stdout_under_another_name_is_not_replaced(tiny_checkpoint: Path, tmp_path: Path, spawn: Spawn) -> None:
    """Also where it goes to a regular file: what replaced that nobody would find in it."""
    link, file = tmp_path / "link", tmp_path / "file"
    link.symlink_to("/proc/self/fd/1")
    with file.open("wb") as stdout:
        process = spawn(*WRITERS["trace"], "-m", tiny_checkpoint, "--out", link, stdout=stdout)
        _, errors = process.communicate(timeout=60)
    assert process.returncode == 0, errors
    assert trace.load(file).experts
    assert link.is_symlink()


def test_a_failure_leaves_what_was_there(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(b"old")
    with pytest.raises(RuntimeError), open_output(path) as file:  # noqa: PT012
        file.write(b"half")
        raise RuntimeError
    assert path.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [path]


def test_a_name_as_long_as_names_can_be(tmp_path: Path) -> None:
    path = tmp_path / ("x" * 255)
    check_output(path)
    with open_output(path) as file:
        file.write(b"all")
    assert path.read_bytes() == b"all"
    with pytest.raises(ToolkitError, match=r"x: cannot be written: File name too long"):
        check_output(tmp_path / ("x" * 256))


@pytest.mark.parametrize("name", WRITERS)
def test_what_cannot_be_written_is_said_before_the_work(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: Call
) -> None:
    """Tests may run as root, who may write everywhere: so the answer is given."""
    out, access = tmp_path / "out", os.access
    monkeypatch.setattr(os, "access", lambda path, mode: access(path, mode) and not (mode & os.W_OK))
    # There is no such model, which would be told first if the file were looked at later.
    result = call(*WRITERS[name], "-m", tmp_path / "absent", "--out", out)
    assert result.exit_code == 1
    assert result.stderr == (
        f"runner: {out}: its folder {tmp_path} may not be written to; choose another one, or change its permissions\n"
    )
    out.write_bytes(b"")
    result = call(*WRITERS[name], "-m", tmp_path / "absent", "--out", out)
    assert result.stderr == f"runner: {out}: may not be written to; choose another file, or change its permissions\n"


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can become somebody else")
def test_somebody_who_may_not_write_there(tmp_path: Path) -> None:
    """The same with the system's own answer, and nothing that is half there."""
    for folder in (tmp_path, *tmp_path.parents[:2]):
        folder.chmod(0o755)
    code = f"""
import os, sys
sys.path[:] = {sys.path!r}
from pathlib import Path
import manifests.errors, runner.output
os.setuid(65534)
for attempt in (runner.output.check_output, lambda path: runner.output.open_output(path).__enter__()):
    try:
        attempt(Path({str(tmp_path / "out")!r}))
    except manifests.errors.ToolkitError as error:
        print(error)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    early, late = done.stdout.splitlines()
    assert "may not be written to" in early
    assert late == f"{tmp_path / 'out'}: cannot be written: Permission denied; choose another file"


def test_a_folder_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(SourceNotFoundError, match=r"no such folder .*absent to write it to; make it first"):
        check_output(tmp_path / "absent" / "out")
    (tmp_path / "link").symlink_to(tmp_path / "gone" / "out")
    with pytest.raises(SourceNotFoundError, match=r"link: no such folder .*gone"):
        check_output(tmp_path / "link")
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    with pytest.raises(ToolkitError, match="loop: cannot be written: Too many levels"):
        check_output(tmp_path / "loop")
