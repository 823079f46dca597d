"""`runner chat`: turns from a pipe and from a terminal, its commands, and Ctrl-C."""

from __future__ import annotations

import os
import pty
import re
import signal
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from click.testing import Result

from runner import cli_chat
from runner.loaded import Generation, LoadedModel

Call = Callable[..., Result]
Change = Callable[..., None]
Spawn = Callable[..., subprocess.Popen[bytes]]


@pytest.fixture
def tiny(tiny_checkpoint: Path) -> Path:
    """The tiny checkpoint, by a short name."""
    return tiny_checkpoint


def test_every_line_of_a_pipe_is_a_turn(tiny: Path, call: Call) -> None:
    result = call("chat", "-m", tiny, "-n", "6", stdin="hello\n\n  \nhell\n")
    assert result.exit_code == 0
    loaded = LoadedModel(tiny)
    first = loaded.start(loaded.text.encode_chat([{"role": "user", "content": "hello"}]), max_tokens=6)
    answer = "".join(first)
    assert result.stdout.startswith(answer + "\n")
    idle, *stats = result.stderr.splitlines()
    assert idle == "note: speculation is off: this model has no MTP layer"
    assert len(stats) == 2
    assert "kept from before" not in stats[0]
    # All of the first turn but its last token, which was written and never read.
    assert f"{len(loaded.text.encode_chat([{'role': 'user', 'content': 'hello'}])) + 5} of them kept" in stats[1]


def test_commands_of_the_chat(tiny: Path, call: Call) -> None:
    once = call("chat", "-m", tiny, "-n", "6", "-q", stdin="hello\n").stdout
    again = call("chat", "-m", tiny, "-n", "6", "-q", stdin="hello\n/reset\nhello\n/exit\nhello\n")
    assert (again.exit_code, again.stdout) == (0, once * 2)
    helped = call("chat", "-m", tiny, "-q", stdin="/help\n")
    assert (helped.stdout, [line.split()[0] for line in helped.stderr.splitlines()]) == (
        "",
        ["/help", "/reset", "/exit", "Ctrl-C"],
    )


def test_the_system_message_is_read(tiny: Path, call: Call) -> None:
    plain = call("chat", "-m", tiny, "-n", "6", stdin="hello\n")
    told = call("chat", "-m", tiny, "-n", "6", "--system", "hello", stdin="hello\n")
    assert [result.stderr.splitlines()[1].split()[0] for result in (plain, told)] == ["5", "7"]


def test_a_model_without_template_is_refused_at_once(tiny_copy: Path, call: Call, change: Change) -> None:
    change(tiny_copy, "tokenizer_config.json", chat_template=None)
    result = call("chat", "-m", tiny_copy, stdin="")
    assert (result.exit_code, result.stdout) == (1, "")
    assert "runner generate" in result.stderr


def test_a_thinking_switch_that_does_nothing_says_so(tiny_copy: Path, call: Call, change: Change) -> None:
    result = call("chat", "-m", tiny_copy, "--thinking", "-n", "1", stdin="hello\n")
    assert "so --thinking does nothing" in result.stderr
    change(tiny_copy, "tokenizer_config.json", chat_template="{{ 'hell' if thinking else 'o' }}")
    result = call("chat", "-m", tiny_copy, "--thinking", "-n", "1", stdin="hello\n")
    assert "nothing" not in result.stderr
    assert "\n2 prompt tokens" in result.stderr  # BOS and "hell"


def test_a_script_is_told_that_the_context_is_full(tiny: Path, call: Call) -> None:
    result = call("chat", "-m", tiny, "--ctx", "12", "-n", "50", stdin="hello\nhello\n")
    assert result.exit_code == 15
    assert "note: the context of 12 tokens is full; /reset" in result.stderr
    assert "runner: the prompt has" in result.stderr


def test_a_pipe_that_is_not_utf8(tiny: Path, call: Call) -> None:
    result = call("chat", "-m", tiny, stdin=b"\xff\n")
    assert (result.exit_code, result.stdout) == (1, "")
    assert "stdin: not UTF-8" in result.stderr


def test_ctrl_c_stops_the_answer_and_not_the_chat(tiny: Path, monkeypatch: pytest.MonkeyPatch, call: Call) -> None:
    whole = Generation.__iter__
    interrupt = [0, 2]  # the first answer before its first token, the second one after two pieces

    def interrupted(self: Generation) -> Iterator[str]:
        pieces = interrupt.pop(0) if interrupt else 1000
        if pieces == 0:
            raise KeyboardInterrupt
        for number, piece in enumerate(whole(self), start=1):
            yield piece
            if number == pieces:
                raise KeyboardInterrupt

    class Interactive(cli_chat._Terminal):
        def __init__(self) -> None:
            super().__init__()
            self.interactive = True

    monkeypatch.setattr(Generation, "__iter__", interrupted)
    monkeypatch.setattr(cli_chat, "_Terminal", Interactive)
    result = call("chat", "-m", tiny, "-n", "8", stdin="hello\nhell\nhello\n")
    assert result.exit_code == 0
    stats = [line.removeprefix("> ") for line in result.stderr.splitlines() if "prompt tokens" in line]
    prompts = [int(line.split()[0]) for line in stats]
    loaded = LoadedModel(tiny)
    alone = len(loaded.text.encode_chat([{"role": "user", "content": "hell"}]))
    # The question without an answer is forgotten; the answer that was begun is kept.
    assert prompts[:2] == [alone + 1, alone]
    said = int(re.findall(r"(\d+) generated", stats[1])[0])
    assert prompts[2] == alone + said + 1 + alone  # the answer, its end, and BOS less but one letter more
    assert len(result.stdout.splitlines()[-1]) > 2


def test_ctrl_c_ends_a_chat_that_is_read_from_a_pipe(tiny: Path, monkeypatch: pytest.MonkeyPatch, call: Call) -> None:
    def interrupted(self: Generation) -> Iterator[str]:
        raise KeyboardInterrupt

    monkeypatch.setattr(Generation, "__iter__", interrupted)
    result = call("chat", "-m", tiny, stdin="hello\nhell\n")
    assert result.exit_code == 130
    assert "interrupted" in result.stderr


def test_on_a_terminal_mistakes_and_ctrl_c_do_not_end_the_chat(tiny: Path, spawn: Spawn) -> None:
    ours, theirs = pty.openpty()
    process = spawn("chat", "-m", tiny, "--ctx", "100", stdin=theirs, stdout=theirs)
    os.close(theirs)
    seen = b""

    def read_until(wanted: bytes) -> None:
        nonlocal seen
        deadline = time.monotonic() + 60
        while wanted not in seen:
            assert time.monotonic() < deadline, seen
            seen += os.read(ours, 1000)
        seen = seen.partition(wanted)[2]

    try:
        read_until(b"> ")
        os.write(ours, b"hello " * 100 + b"\n")  # beyond the context: refused, and said on stderr
        read_until(b"> ")
        os.write(ours, b"hello\n")
        read_until(b"\n")
        os.read(ours, 1)
        process.send_signal(signal.SIGINT)  # in the answer, or at the next prompt if that was quick
        read_until(b"> ")
        os.write(ours, b"/exit\n")
        assert process.stderr is not None
        with process.stderr as errors:
            said = errors.read().decode()
        assert process.wait(timeout=60) == 0
    finally:
        process.kill()
        os.close(ours)
    assert "/help lists commands" in said
    assert "runner: the prompt has" in said


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP], ids=["sigterm", "sighup"])
@pytest.mark.parametrize("when", ["at the prompt", "in the answer"])
@pytest.mark.parametrize("is_edited", [True, False], ids=["edited", "plain"])
def test_a_stop_ends_a_chat_on_a_terminal(number: int, when: str, is_edited: bool, tiny: Path, spawn: Spawn) -> None:
    """Only Ctrl-C is meant for the answer alone."""
    ours, theirs = pty.openpty()
    streams = {"stdout": theirs} if is_edited else {"stdout": subprocess.PIPE}
    process = spawn("chat", "-m", tiny, "-n", "500", stdin=theirs, **streams)
    os.close(theirs)
    assert process.stderr is not None
    deadline = threading.Timer(60, process.kill)  # nothing here may wait for ever
    deadline.start()
    try:
        with process.stderr as errors:
            while not errors.readline().endswith(b"/help lists commands\n"):
                assert process.poll() is None
            if is_edited:
                seen = b""
                while b"> " not in seen:
                    seen += os.read(ours, 1000)
            else:
                assert errors.read(2) == b"> "
            if when == "in the answer":
                os.write(ours, b"hello\n")
            time.sleep(0.1)  # until it waits, or writes
            process.send_signal(number)
            assert process.wait(timeout=10) == 130
            assert errors.read().endswith(b"\nrunner: interrupted\n")
    finally:
        deadline.cancel()
        process.kill()
        os.close(ours)
        if process.stdout is not None:
            process.stdout.close()
