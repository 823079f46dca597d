"""Where the commands meet a system that does not cooperate: closed streams, full disks, hostile text, wrong paths."""

from __future__ import annotations

import errno
import os
import shlex
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from click.testing import Result

from manifests.errors import ToolkitError
from runner import cli_options
from runner.doctor import _Findings
from runner.loaded import Generation

Call = Callable[..., Result]


def test_a_closed_stdout_is_no_traceback() -> None:
    """The caller of `runner doctor >&-` wants its exit code alone."""
    done = subprocess.run(
        ["sh", "-c", f"{sys.executable} -m manifests schema >&-"], capture_output=True, text=True, check=False
    )
    assert "Traceback" not in done.stderr
    assert done.returncode == 0


COMMANDS = {
    "generate": ["generate", "-p", "hello", "-n", "2"],
    "generate --json": ["generate", "-p", "hello", "-n", "2", "--json"],
    "generate from stdin": ["generate", "-p", "-", "-n", "2"],
    "chat": ["chat", "-n", "2"],
    "logits": ["logits", "-p", "hello"],
    "eval": ["eval", "-f", __file__],
}
CLOSED = {
    "stdout": (
        ">&-",
        {"generate", "generate --json", "generate from stdin", "chat"},
        "runner: stdout: is closed, and the text goes there; give /dev/null if nobody is to read it\n",
    ),
    "stdin": (
        "<&-", {"generate from stdin", "chat"}, "runner: stdin: is closed; give it a text, or name a file\n",
    ),
    "stderr": ("2>&-", set[str](), ""),
}  # fmt: skip


@pytest.mark.parametrize("stream", CLOSED)
@pytest.mark.parametrize("name", COMMANDS)
def test_closed_streams(name: str, stream: str, tiny_checkpoint: Path) -> None:
    """Who made a text that nobody can get would have waited for nothing; all else goes on as it can."""
    closing, refused, says = CLOSED[stream]
    command = shlex.join([sys.executable, "-m", "runner", *COMMANDS[name], "-m", str(tiny_checkpoint)])
    done = subprocess.run(
        ["sh", "-c", f"{command} {closing}"], input="hello\n", capture_output=True, text=True, check=False
    )
    assert done.returncode == (1 if name in refused else 0), done.stderr
    assert "Traceback" not in done.stderr
    if name in refused:
        assert done.stderr == says


@pytest.mark.parametrize(("command", "stdin"), [(["generate", "-p", "hello"], None), (["chat"], "hello\n")])
def test_an_error_in_the_answer_begins_its_own_line(
    command: list[str], stdin: str | None, tiny_checkpoint: Path, monkeypatch: pytest.MonkeyPatch, call: Call
) -> None:
    whole = Generation.__iter__

    def failing(self: Generation) -> Iterator[str]:
        yield next(piece for piece in whole(self) if piece.strip())
        raise ToolkitError("x: is gone")

    monkeypatch.setattr(Generation, "__iter__", failing)
    result = call(*command, "-q", "-m", tiny_checkpoint, stdin=stdin)
    assert result.exit_code == 1
    assert result.stdout
    assert result.stderr == "\nrunner: x: is gone\n"


def test_a_missing_expert_says_what_to_do(
    call: Call, tmp_path: Path, reshard_folder: Callable[..., Path], tiny_checkpoint: Path
) -> None:
    out = reshard_folder(tiny_checkpoint, tmp_path / "out")
    for path in out.glob("layers/*/experts/*"):
        path.unlink()
    result = call("generate", "-m", out, "-p", "hello")
    assert (result.exit_code, result.stdout) == (10, "\n" if result.stdout else "")
    assert result.stderr.endswith(": no such file; `reshard verify` tells more, `reshard repair` brings it back\n")


def test_more_threads_than_any_library_starts_are_refused(call: Call, tiny_checkpoint: Path) -> None:
    result = call("generate", "-m", tiny_checkpoint, "-p", "x", "--threads", "5000")
    assert result.exit_code == 2


def test_one_shard_is_not_a_model(call: Call, tiny_checkpoint: Path) -> None:
    shard = tiny_checkpoint / "model-00001-of-000002.safetensors"
    result = call("generate", "-m", shard, "-p", "x")
    assert result.exit_code == 10
    assert result.stderr == f"runner: {shard}: is one file; give the folder of the whole checkpoint\n"


@pytest.mark.parametrize(
    ("failure", "code", "says"),
    [
        (OSError(errno.ENOSPC, "No space left on device"), 15, "no space left"),
        (OSError(errno.EACCES, "Permission denied"), 1, "cannot be written: Permission denied"),
    ],
)
def test_logits_that_cannot_be_written(
    call: Call,
    tiny_checkpoint: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    failure: Exception,
    code: int,
    says: str,
) -> None:
    def fail(*_: object, **__: object) -> None:
        raise failure

    monkeypatch.setattr("os.replace", fail)
    out = tmp_path / "logits.safetensors"
    result = call("logits", "-m", tiny_checkpoint, "-p", "hello", "--out", out)
    assert result.exit_code == code
    assert f"{out}: " in result.stderr
    assert says in result.stderr
    assert result.stderr.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


def test_logits_do_not_go_into_a_folder(call: Call, tiny_checkpoint: Path, tmp_path: Path) -> None:
    result = call("logits", "-m", tiny_checkpoint, "-p", "hello", "--out", tmp_path)
    assert result.exit_code == 2
    assert f"'--out': {tmp_path} is a folder; give the name of a file\n" in result.stderr


WRONG = {
    "temp nan": (["generate", "-p", "a", "--temp", "nan"], "'--temp' / '--temperature': nan is not a finite number"),
    "temp inf": (["generate", "-p", "a", "--temp", "inf"], "'--temp' / '--temperature': inf is not a finite number"),
    "top-p nan": (["chat", "--top-p", "nan"], "'--top-p': nan is not a finite number"),
    "min-p nan": (["generate", "-p", "a", "--min-p", "nan"], "'--min-p': nan is not a finite number"),
    "out": (["logits", "-p", "a", "--out", ""], "'--out': is empty; give the name of a file"),
    "out of trace": (["trace", "-p", "a", "--out", ""], "'--out': is empty; give the name of a file"),
    "pin": (["generate", "-p", "a", "--pin", "."], "'--pin': . is a folder; give the name of a file"),
    "file": (["generate", "-f", "."], "'-f' / '--file': . is a folder; give the name of a file"),
    "text": (["eval", "-f", "."], "'-f' / '--file': . is a folder; give the name of a file"),
    "ids": (["bench", "--ids", "."], "'--ids': . is a folder; give the name of a file"),
}


@pytest.mark.parametrize(("arguments", "says"), WRONG.values(), ids=WRONG.keys())
def test_arguments_that_are_wrong_by_themselves(arguments: list[str], says: str, call: Call) -> None:
    """There is no such model, which would be told first if they were looked at later."""
    result = call(*arguments, "-m", "absent")
    assert (result.exit_code, result.stdout) == (2, "")
    assert says in result.stderr


def test_a_list_of_ids_that_is_too_short_is_named(call: Call, tmp_path: Path) -> None:
    path = tmp_path / "ids.json"
    path.write_text("[1, 2, 3]")
    result = call("bench", "--ids", path, "--prompt-tokens", "2", "-n", "2", "-m", "absent")
    assert (result.exit_code, result.stdout) == (2, "")
    assert (
        f"{path}: has 3 ids, and --prompt-tokens 2 and -n 2 take 4; give a longer list, or smaller numbers"
        in result.stderr
    )


def test_the_last_logits_are_the_same_with_and_without_a_file(
    call: Call, tiny_checkpoint: Path, tmp_path: Path
) -> None:
    arguments = ["logits", "-m", tiny_checkpoint, "-p", "hello"]
    assert call(*arguments).stdout == call(*arguments, "--out", tmp_path / "all.safetensors").stdout


@pytest.mark.parametrize(
    ("is_terminal", "shown"), [(True, "a\\x1b[2J\n\tb\\x9b\u00e9\u4f60"), (False, "a\x1b[2J\n\tb\x9b\u00e9\u4f60")]
)
def test_a_model_cannot_drive_the_terminal(
    is_terminal: bool, shown: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys.stdout, "isatty", lambda: is_terminal)
    cli_options.echo_generated("a\x1b[2J\n\tb\x9b\u00e9\u4f60")
    assert capsys.readouterr().out == shown


def test_a_file_that_may_not_be_read_is_a_finding() -> None:
    """Tests may run as root, who may read everything: so the failure itself is given."""

    def refuse() -> None:
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), "model-00001.safetensors")

    found = _Findings()
    assert found.attempt("checkpoint", refuse) is None
    (problem,) = found.problems
    assert (problem.topic, problem.exit_code) == ("checkpoint", ToolkitError.exit_code)
    assert problem.message == "model-00001.safetensors: Permission denied"
