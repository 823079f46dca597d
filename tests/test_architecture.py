"""What no linter sees: help is instant and useful, and the lower floors run without torch."""

from __future__ import annotations

import importlib
import json
import subprocess
import sys
from collections.abc import Iterator

import click
import pytest

PROGRAMS = ("manifests", "reshard", "runner")
HEAVY = ("torch", "numpy", "safetensors", "tokenizers", "jinja2", "transformers")

HELP = """
import contextlib, importlib, io, json, sys
name = sys.argv[1]
program = getattr(importlib.import_module(f"{name}.cli"), name)
said = {}
for command in ("", *program.commands):
    out = io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.suppress(SystemExit):
        program.main([*([command] if command else []), "--help"], prog_name=name)
    said[command] = out.getvalue()
print(json.dumps({"said": said, "loaded": sorted(sys.modules)}))
"""


@pytest.mark.parametrize("name", PROGRAMS)
def test_the_help_of_every_command_is_instant_and_begins_with_an_example(name: str) -> None:
    result = subprocess.run([sys.executable, "-c", HELP, name], capture_output=True, text=True, check=True)
    document = json.loads(result.stdout)
    assert not set(HEAVY) & set(document["loaded"])
    assert len(document["said"]) > 4
    for command, text in document["said"].items():
        usage = f"Usage: {name} {command}".strip()
        assert text.startswith(usage)
        assert f"  Example:\n    {usage.removeprefix('Usage: ')}" in text, command
        assert "Options:\n" in text


IMPORT = """
import pkgutil, sys
for name in ("manifests", "reshard"):
    package = __import__(name)
    for module in pkgutil.iter_modules(package.__path__):
        if module.name != "__main__":
            __import__(f"{name}.{module.name}")
print(*sorted(sys.modules))
"""


def test_the_lower_floors_run_without_torch() -> None:
    result = subprocess.run([sys.executable, "-c", IMPORT], capture_output=True, text=True, check=True)
    loaded = {name.split(".")[0] for name in result.stdout.split()}
    assert {"manifests", "reshard", "zstandard"} < loaded
    assert not set(HEAVY) & loaded
    assert "runner" not in loaded


def test_the_format_needs_the_standard_library_alone() -> None:
    code = "import manifests, sys; print(*sorted(sys.modules))"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert not {"click", "tqdm", "zstandard", "reshard", "runner", *HEAVY} & set(result.stdout.split())


def commands() -> Iterator[tuple[str, str, click.Command]]:
    for name in PROGRAMS:
        group = getattr(importlib.import_module(f"{name}.cli"), name)
        for command, found in sorted(group.commands.items()):
            yield name, command, found


@pytest.mark.parametrize(("program", "name", "command"), list(commands()), ids=lambda value: str(value)[:20])
def test_every_option_says_what_it_does(program: str, name: str, command: click.Command) -> None:
    for option in command.params:
        if isinstance(option, click.Option):
            assert option.help, f"{program} {name} {option.opts[0]}"
            assert option.help.endswith("."), f"{program} {name} {option.opts[0]}"


def test_the_commands_are_those_of_this_version() -> None:
    """Frozen: whoever adds one adds it here, to the README and to its tests."""
    assert {(program, name) for program, name, _ in commands()} == {
        *(("manifests", name) for name in ("show", "ls", "check", "diff", "schema")),
        *(("reshard", name) for name in ("doctor", "pack", "plan", "repair", "restore", "run", "unpack", "verify")),
        *(
            ("runner", name)
            for name in ("generate", "chat", "logits", "eval", "doctor", "bench", "trace", "replay", "mtp")
        ),
    }
