"""The error boundary of every program: one sentence, the right exit code, no traceback; what terminals are spared."""

from __future__ import annotations

import errno
import io
import json
import logging
import os
import signal
import subprocess
import sys
from pathlib import Path

import click
import pytest

from manifests import errors
from manifests.console import (
    Group,
    counted,
    format_bytes,
    format_rate,
    format_seconds,
    print_json,
    printable,
    progress,
    quiet_option,
)


@pytest.fixture(autouse=True)
def _restore_sigterm() -> object:
    before = signal.getsignal(signal.SIGTERM)
    yield
    signal.signal(signal.SIGTERM, before)


def run(
    error: BaseException | None, capsys: pytest.CaptureFixture[str], *, debug: bool = False
) -> tuple[int, str, str]:
    @click.group(cls=Group)
    def tool() -> None:
        """A program."""

    @tool.command()
    def go() -> None:
        """Fail or not."""
        click.echo("data")
        if error is not None:
            raise error

    with pytest.raises(SystemExit) as ended:
        tool.main(["go"], prog_name="tool")
    out, err = capsys.readouterr()
    assert isinstance(ended.value.code, int)
    return ended.value.code, out, err


ALL = [value for value in vars(errors).values() if isinstance(value, type) and issubclass(value, errors.ToolkitError)]


def test_exit_codes() -> None:
    assert {cls.__name__: cls.exit_code for cls in ALL} == {
        "ToolkitError": 1,
        "IncompleteError": 3,
        "RemoteError": 1,
        "SourceNotFoundError": 10,
        "ForbiddenError": 10,
        "LockedError": 11,
        "ManifestError": 12,
        "IntegrityError": 13,
        "UnsupportedModelError": 14,
        "ResourceError": 15,
    }


@pytest.mark.parametrize("cls", ALL, ids=lambda cls: cls.__name__)
def test_every_known_failure_is_one_sentence(
    cls: type[errors.ToolkitError], capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(cls("x: is gone; bring it back"), capsys) == (
        cls.exit_code,
        "data\n",
        "tool: x: is gone; bring it back\n",
    )


def test_success_and_interrupts(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(None, capsys) == (0, "data\n", "")
    # The newline ends the terminal's "^C".
    assert run(KeyboardInterrupt(), capsys) == (130, "data\n", "\ntool: interrupted\n")
    assert run(click.Abort(), capsys) == (130, "data\n", "tool: interrupted\n")
    assert run(click.exceptions.Exit(7), capsys) == (7, "data\n", "")


def test_usage_errors_are_clicks_own(capsys: pytest.CaptureFixture[str]) -> None:
    code, _, err = run(click.UsageError("give either A or B"), capsys)
    assert code == 2
    assert "give either A or B" in err


@pytest.mark.parametrize("number", [errno.EIO, errno.EACCES, errno.EMFILE, errno.ENAMETOOLONG, errno.ESTALE])
def test_what_the_system_refuses_is_one_sentence_too(number: int, capsys: pytest.CaptureFixture[str]) -> None:
    code, out, err = run(OSError(number, os.strerror(number), "/data/model\n.safetensors"), capsys)
    assert (code, out) == (1, "data\n")
    assert err == f"tool: /data/model\\n.safetensors: {os.strerror(number)}\n"
    assert run(OSError(number, os.strerror(number)), capsys)[2] == f"tool: {os.strerror(number)}\n"


def test_a_bug_is_not_hidden() -> None:
    @click.group(cls=Group)
    def tool() -> None:
        """A program."""

    @tool.command()
    def go() -> None:
        """Fail."""
        raise AssertionError("ours")

    with pytest.raises(AssertionError, match="ours"):
        tool.main(["go"], prog_name="tool")


def test_debug_shows_the_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    @click.group(cls=Group)
    def tool() -> None:
        """A program."""

    @tool.command()
    def go() -> None:
        """Fail."""
        raise errors.ManifestError("x")

    monkeypatch.setenv("TOOL_DEBUG", "1")
    with pytest.raises(errors.ManifestError):
        tool.main(["go"], prog_name="tool")


def test_a_service_managers_stop_is_an_interrupt(capsys: pytest.CaptureFixture[str]) -> None:
    @click.group(cls=Group)
    def tool() -> None:
        """A program."""

    @tool.command()
    def go() -> None:
        """Stop."""
        os.kill(os.getpid(), signal.SIGTERM)
        signal.pause()

    with pytest.raises(SystemExit) as ended:
        tool.main(["go"], prog_name="tool")
    assert ended.value.code == 130
    assert capsys.readouterr().err == "\ntool: interrupted\n"


def ls(folder: Path) -> list[str]:
    return [sys.executable, "-m", "manifests", "ls", str(folder)]


def test_a_reader_that_goes_away_is_no_failure_to_talk_about(v3_folder: Path) -> None:
    with subprocess.Popen(
        ls(v3_folder), stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=os.environ | {"PYTHONUNBUFFERED": "1"}
    ) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        process.stdout.close()
        assert process.stderr.read() == b""
    assert process.returncode == 1


def test_a_full_disk_behind_stdout_is_one_sentence(v3_folder: Path) -> None:
    with open("/dev/full", "wb") as full:
        result = subprocess.run(ls(v3_folder), stdout=full, stderr=subprocess.PIPE, check=False, text=True)
    assert result.returncode == 15
    assert result.stderr == "manifests: stdout: No space left on device\n"


@pytest.mark.parametrize(
    ("count", "text"),
    [
        (0, "0 B"), (1, "1 B"), (999, "999 B"), (1000, "1.00 kB"), (1234, "1.23 kB"), (9_994, "9.99 kB"),
        (9_996, "10.0 kB"), (99_940, "99.9 kB"), (99_960, "100 kB"), (999_499, "999 kB"), (999_500, "1.00 MB"),
        (44_050_944, "44.1 MB"), (688_574_839_360, "689 GB"), (1.5e12, "1.50 TB"), (1.5e15, "1500 TB"),
    ],
)  # fmt: skip
def test_bytes_for_people(count: float, text: str) -> None:
    assert format_bytes(count) == text


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0, "0.0 s"),
        (12.34, "12.3 s"),
        (60, "1 min 00 s"),
        (245, "4 min 05 s"),
        (3599.7, "1 h 00 min"),
        (7800, "2 h 10 min"),
    ],
)
def test_seconds_for_people(seconds: float, text: str) -> None:
    assert format_seconds(seconds) == text


def test_counts_and_rates_for_people() -> None:
    assert [counted(count, "file") for count in (0, 1, 2, 1653)] == ["0 files", "1 file", "2 files", "1,653 files"]
    rates = (0.5, 71.66, 999.4, 999.6, 1938.4, 1234567)
    assert [format_rate(rate, "tokens").removesuffix(" tokens/s") for rate in rates] == [
        "0.5", "71.7", "999", "1,000", "1,940", "1,230,000",
    ]  # fmt: skip


def test_hostile_names_do_not_drive_the_terminal() -> None:
    hostile = "a\x1b[2J\x07\r\n\x9b31m\u202e\u200b\udcff\U000e0041 b\u00e9\u6a21"
    shown = printable(hostile)
    assert shown.isprintable()
    assert shown.startswith("a\\x1b[2J\\x07\\r\\n\\x9b31m\\u202e")
    assert shown.endswith(" b\u00e9\u6a21")


def test_json_is_ascii(capsys: pytest.CaptureFixture[str]) -> None:
    print_json({"name": "\u6a21\x1b\u202e"})
    out = capsys.readouterr().out
    assert out.isascii()
    assert json.loads(out) == {"name": "\u6a21\x1b\u202e"}


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def say(*arguments: str) -> None:
    """Run a command that says something meanwhile."""

    @click.group(cls=Group)
    def tool() -> None:
        """A program."""

    @tool.command()
    @quiet_option
    def go(quiet: bool) -> None:
        """Say it."""
        logging.getLogger("manifests.http").warning("%s: is asked again in %d s", "host\x1b[2J", 30)

    with pytest.raises(SystemExit) as ended:
        tool.main(["go", *arguments], prog_name="tool")
    assert ended.value.code == 0


def test_what_is_said_meanwhile_is_a_note(capsys: pytest.CaptureFixture[str]) -> None:
    for arguments, err in (((), "note: host\\x1b[2J: is asked again in 30 s\n"), (("--quiet",), "")) * 2:
        say(*arguments)
        assert capsys.readouterr() == ("", err)


def test_a_note_takes_the_line_of_a_bar(monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = Terminal("reshard:  10%")
    terminal.seek(0, io.SEEK_END)
    monkeypatch.setattr("sys.stderr", terminal)
    say()
    assert terminal.getvalue() == "reshard:  10%\r\x1b[Knote: host\\x1b[2J: is asked again in 30 s\n"


def test_a_note_that_cannot_be_written_ends_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    class Full(io.StringIO):
        def write(self, _: str) -> int:
            raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("sys.stderr", Full())
    say()


def test_a_bar_ends_when_all_is_done(monkeypatch: pytest.MonkeyPatch) -> None:
    """What comes behind it may draw one of its own."""
    for quiet in (False, True):
        terminal = Terminal()
        monkeypatch.setattr(sys, "stderr", terminal)
        with progress("headers", quiet=quiet) as watch:
            watch(1, 2)
            watch(2, 2)
            assert terminal.getvalue().endswith("\n") is not quiet
            terminal.write("next\n")
            watch(1, 3)
        lines = terminal.getvalue().splitlines()
        assert [line for line in lines if "next" in line] == ["next"]
        assert sum("100%" in line for line in lines) == (0 if quiet else 1)
