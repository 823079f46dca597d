"""The commands: what goes to stdout and what to stderr, exit codes, and the documents that `--json` promises."""

from __future__ import annotations

import json
import re
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click
import pytest
import torch
from click.testing import Result

from runner import demo
from runner.cli import runner
from runner.loaded import LoadedModel

STATS = re.compile(r"\d+ prompt tokens in .*; \d+ generated in .*; read .*B.*; .*B in memory\n")

Call = Callable[..., Result]
Document = Callable[..., dict[str, Any]]
Change = Callable[..., None]
Spawn = Callable[..., subprocess.Popen[bytes]]


@pytest.fixture
def tiny(tiny_checkpoint: Path) -> Path:
    """The tiny checkpoint, by a short name."""
    return tiny_checkpoint


# --- the surface ---

OPTIONS = {
    "generate": "--model --prompt --file --system --max-tokens --temp --top-k --top-p --min-p --seed --stop "
    "--speculate --draft-tokens --mtp-input --ctx --ram --io --cache-size --pin --dtype --threads --json --quiet",
    "chat": "--model --system --thinking --max-tokens --temp --top-k --top-p --min-p --seed --speculate "
    "--draft-tokens --mtp-input --ctx --ram --io --cache-size --pin --dtype --threads --quiet",
    "logits": "--model --prompt --ids --out --ram --io --cache-size --pin --dtype --threads --json --quiet",
    "eval": "--model --file --ctx --ram --io --cache-size --pin --dtype --threads --json --quiet",
    "trace": "--model --prompt --file --max-tokens --out --ctx --ram --io --cache-size --pin "
    "--dtype --threads --json --quiet",
    "replay": "--experts-in-memory --ram --expert-bytes --json --quiet",
    "doctor": "--model --json",
    "mtp": "--model --file --tokens --draft-tokens --mtp-input --ram --io --cache-size --pin "
    "--dtype --threads --json --quiet",
    "bench": "--model --ids --prompt-tokens --tokens --ram --io --cache-size --pin --dtype --threads --json --quiet",
}


def test_commands_and_options_are_these() -> None:
    """An option is a promise: whoever adds one writes it here."""
    found = {
        name: " ".join(
            next(opt for opt in parameter.opts if opt.startswith("--"))
            for parameter in command.params
            if isinstance(parameter, click.Option)
        )
        for name, command in runner.commands.items()
    }
    assert found == OPTIONS


@pytest.mark.parametrize("command", OPTIONS)
@pytest.mark.parametrize("flag", ["-h", "--help"])
def test_every_command_has_help_with_an_example(command: str, flag: str, call: Call) -> None:
    result = call(command, flag)
    assert result.exit_code == 0
    assert re.search(rf"Example:\n +runner {command}", result.stdout)


def test_help_runs_without_torch() -> None:
    code = (
        "import sys\n"
        "from click.testing import CliRunner\n"
        "from runner.cli import runner\n"
        "for arguments in ([], *([name] for name in runner.commands)):\n"
        "    assert CliRunner().invoke(runner, [*arguments, '--help']).exit_code == 0\n"
        "heavy = {'torch', 'tokenizers', 'jinja2', 'numpy', 'safetensors'} & sys.modules.keys()\n"
        "sys.exit(f'imported {heavy}' if heavy else 0)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")


def test_version(call: Call) -> None:
    result = call("--version")
    assert (result.exit_code, result.stdout.split()[0]) == (0, "runner,")


# --- generate ---


def test_text_on_stdout_and_figures_on_stderr(tiny: Path, call: Call) -> None:
    result = call("generate", "-m", tiny, "-p", "hello", "-n", "12")
    text = LoadedModel(tiny).generate("hello", max_tokens=12)
    assert (result.exit_code, result.stdout) == (0, text + "\n")
    stats, idle = result.stderr.splitlines(keepends=True)
    assert idle == "note: speculation is off: this model has no MTP layer\n"
    assert STATS.fullmatch(stats)


def test_quiet_is_quiet(tiny: Path, call: Call) -> None:
    result = call("generate", "-m", tiny, "-p", "hello", "-n", "4", "--seed", "3", "-q")
    assert (result.exit_code, result.stderr) == (0, "")


def test_text_comes_in_pieces(tiny: Path, monkeypatch: pytest.MonkeyPatch, call: Call) -> None:
    written: list[str] = []
    echo = click.echo

    def spy(message: Any = None, **keywords: Any) -> None:
        if keywords.get("nl") is False:
            written.append(message)
        echo(message, **keywords)  # click's echo flushes

    monkeypatch.setattr(click, "echo", spy)
    result = call("generate", "-m", tiny, "-p", "hello", "-n", "12", "-q")
    assert len(written) > 3
    assert "".join(written) == result.stdout.removesuffix("\n")


def test_generate_document(tiny: Path, document: Document) -> None:
    found = document("generate", "-m", tiny, "-p", "hello", "-n", "6", "--temp", "0.8", "--top-k", "9", "--seed", "5")
    assert list(found) == ["text", "ids", "finish_reason", "sampling", "stats", "speculation"]
    assert list(found["stats"]) == [
        "prompt_tokens",
        "prefill_tokens",
        "generated_tokens",
        "prefill_s",
        "decode_s",
        "prefill_tokens_per_s",
        "decode_tokens_per_s",
        "experts_used",
        "expert_hits",
        "expert_misses",
        "read_bytes",
        "wait_s",
        "resident_bytes",
        "fetched_bytes",
        "fetched_bytes_per_token",
        "fetch_wait_s",
    ]
    assert found["sampling"] == {"temperature": 0.8, "top_k": 9, "top_p": 1.0, "min_p": 0.0, "seed": 5}
    assert (len(found["ids"]), found["finish_reason"]) == (6, "length")
    expected = LoadedModel(tiny).generate("hello", max_tokens=6, temperature=0.8, top_k=9, seed=5)
    assert found["text"] == expected


def test_the_prompt_from_everywhere(tiny: Path, tmp_path: Path, document: Document) -> None:
    prompt = "hell\u00f6 <think>\r\n"
    (tmp_path / "prompt.txt").write_bytes(prompt.encode("utf-8"))
    common = ("generate", "-m", tiny, "-n", "4")
    expected = document(*common, "-p", prompt)
    for place in (("-f", tmp_path / "prompt.txt"), ("-f", "-"), ("-p", "-"), ("-",)):
        found = document(*common, *place, stdin=prompt)
        assert (found["ids"], found["stats"]["prompt_tokens"]) == (expected["ids"], expected["stats"]["prompt_tokens"])


@pytest.mark.parametrize("places", [[], ["-p", "a", "-f", "b"], ["-p", "a", "-"], ["-f", "b", "-"]])
def test_the_prompt_is_given_once(tiny: Path, places: list[str], call: Call) -> None:
    result = call("generate", "-m", tiny, *places)
    assert (result.exit_code, result.stdout) == (2, "")
    assert "give the prompt once" in result.stderr


@pytest.mark.parametrize(
    ("content", "exit_code", "message"), [(None, 10, "no such file"), (b"ab\xff", 1, "not UTF-8 at byte 2")]
)
def test_a_prompt_that_cannot_be_read(
    tiny: Path, tmp_path: Path, content: bytes | None, exit_code: int, message: str, call: Call
) -> None:
    path = tmp_path / "prompt.txt"
    if content is not None:
        path.write_bytes(content)
    result = call("generate", "-m", tiny, "-f", path)
    assert (result.exit_code, result.stdout) == (exit_code, "")
    assert message in result.stderr


def test_an_empty_prompt_continues_bos(tiny: Path, document: Document) -> None:
    assert document("generate", "-m", tiny, "-p", "", "-n", "2")["stats"]["prompt_tokens"] == 1


def test_stop(tiny: Path, call: Call, document: Document) -> None:
    whole = document("generate", "-m", tiny, "-p", "hello", "-n", "24")["text"]
    stop = next(letter for letter in whole[3:] if letter.isprintable() and letter != "\ufffd")
    result = call("generate", "-m", tiny, "-p", "hello", "-n", "24", "--stop", "never seen", "--stop", stop)
    assert result.stdout == whole[: whole.index(stop)] + "\n"
    assert call("generate", "-m", tiny, "-p", "hello", "--stop", "").exit_code == 2


def test_system_asks_through_the_template(tiny: Path, document: Document) -> None:
    text = LoadedModel(tiny).text
    question = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "hello"}]
    found = document("generate", "-m", tiny, "-p", "hello", "--system", "Be brief.", "-n", "3")
    assert found["stats"]["prompt_tokens"] == len(text.encode_chat(question))
    assert found["ids"] == document("generate", "-m", tiny, "-p", text.render_chat(question), "-n", "3")["ids"]


def test_a_full_context_is_said(tiny: Path, call: Call) -> None:
    result = call("generate", "-m", tiny, "-p", "hello", "-n", "50", "--ctx", "8")
    assert result.exit_code == 0
    assert "context of 8 tokens is full" in result.stderr
    result = call("generate", "-m", tiny, "-p", "hello", "--ctx", "2")
    assert (result.exit_code, result.stdout) == (15, "")
    assert result.stderr.startswith("runner: the prompt has 3 tokens")


def test_the_models_own_sampling_is_the_default(tiny_copy: Path, document: Document, change: Change) -> None:
    change(tiny_copy, "generation_config.json", do_sample=True, temperature=0.6, top_p=0.95)
    common = ("generate", "-m", tiny_copy, "-p", "hello", "-n", "1")
    assert document(*common)["sampling"] == {
        "temperature": 0.6,
        "top_k": 0,
        "top_p": 0.95,
        "min_p": 0.0,
        "seed": 0,
    }
    found = document(*common, "--temperature", "0", "--top-p", "0.5")
    assert (found["sampling"]["temperature"], found["sampling"]["top_p"]) == (0.0, 0.5)


def test_options_that_do_nothing_say_so(tiny: Path, call: Call) -> None:
    common = ("generate", "-m", tiny, "-p", "hello", "-n", "1")
    one = call(*common, "--top-p", "0.5")
    assert "note: the temperature is 0, so --top-p does nothing" in one.stderr
    two = call(*common, "--top-k", "5", "--seed", "1")
    assert "--top-k and --seed do nothing" in two.stderr
    assert "nothing" not in call(*common, "--top-p", "0.5", "--temp", "1").stderr


@pytest.mark.parametrize(
    "option", [["--temp", "-1"], ["--top-p", "0"], ["--min-p", "2"], ["--top-k", "-1"], ["-n", "0"], ["--threads", "0"]]
)
def test_values_out_of_range_are_usage_errors(tiny: Path, option: list[str], call: Call) -> None:
    assert call("generate", "-m", tiny, "-p", "a", *option).exit_code == 2


def test_threads_are_set(tiny: Path, call: Call) -> None:
    assert call("generate", "-m", tiny, "-p", "a", "-n", "1", "--threads", "2").exit_code == 0
    assert torch.get_num_threads() == 2


def test_without_a_model_the_demo_runs(tiny: Path, monkeypatch: pytest.MonkeyPatch, document: Document) -> None:
    monkeypatch.setattr(demo, "path", lambda: tiny)
    assert (
        document("generate", "-p", "hello", "-n", "3")["ids"]
        == document("generate", "-m", tiny, "-p", "hello", "-n", "3")["ids"]
    )


# --- doctor ---


def test_doctor(tiny: Path, tiny_copy: Path, call: Call, document: Document, change: Change) -> None:
    assert document("doctor", "-m", tiny)["can_run"] is True
    change(tiny_copy, "config.json", model_type="deepseek_v32")
    result = call("doctor", "-m", tiny_copy, "--json")
    found = json.loads(result.stdout)
    assert (result.exit_code, found["exit_code"], found["can_run"]) == (14, 14, False)
    result = call("doctor", "-m", tiny_copy)
    assert (result.exit_code, result.stdout.splitlines()[-1]) == (14, "can run    no")


# --- failures ---


@pytest.mark.parametrize("command", [["generate", "-p", "a"], ["chat"], ["logits", "-p", "a"], ["doctor"]])
@pytest.mark.parametrize(
    ("damage", "exit_code"),
    [
        ({"model-00001-of-000002.safetensors": None}, 10),
        ({"config.json": {"scoring_func": "softplus"}}, 14),
        ({"config.json": {"kv_lora_rank": "many"}}, 12),
        ({"model-00001-of-000002.safetensors": b"cut short"}, 12),
    ],
)
def test_known_failures_are_one_sentence_and_an_exit_code(
    tiny_copy: Path, command: list[str], damage: dict[str, Any], exit_code: int, call: Call, change: Change
) -> None:
    for name, how in damage.items():
        if how is None:
            (tiny_copy / name).unlink()
        elif isinstance(how, bytes):
            (tiny_copy / name).write_bytes(how)
        else:
            change(tiny_copy, name, **how)
    result = call(*command, "-m", tiny_copy)
    assert result.exit_code == exit_code
    if command != ["doctor"]:
        assert result.stdout == ""
        assert result.stderr.startswith("runner: ")
        assert result.stderr.count("\n") == 1


def test_the_traceback_is_for_debugging(tmp_path: Path, call: Call) -> None:
    result = call("generate", "-m", tmp_path / "absent", "-p", "a", RUNNER_DEBUG="1")
    assert type(result.exception).__name__ == "SourceNotFoundError"


# The embedded model takes seconds for this; a tiny one is through before a busy machine lets us do anything.
LONG = ("generate", "-p", "import ", "-n", "1500", "--temp", "0")


def test_ctrl_c_ends_generate_with_130(spawn: Spawn) -> None:
    process = spawn(*LONG, stdout=subprocess.PIPE)
    assert process.stdout is not None
    assert process.stdout.read(1)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=60)
    assert (process.returncode, errors.strip()) == (130, b"runner: interrupted")


def test_a_closed_pipe_is_quiet(spawn: Spawn) -> None:
    process = spawn(*LONG, "-q", stdout=subprocess.PIPE)
    assert process.stdout is not None
    assert process.stdout.read(1)
    process.stdout.close()
    assert process.stderr is not None
    with process.stderr as errors:
        assert errors.read() == b""
    assert process.wait(timeout=60) == 1
