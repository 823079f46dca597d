"""The fuzzer finds what it looks for, its inputs are what they claim to be, and a small run is clean.

The run of a million inputs is started by hand; see run.py.
"""

from __future__ import annotations

import hashlib
import importlib
import json
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

HERE = Path(__file__).parent
NAMES = ("documents", "hostile", "mutate", "gguf_bytes", "gguf_inputs", "inputs", "promises", "targets", "run")


@pytest.fixture(scope="module")
def tools() -> Iterator[SimpleNamespace]:
    """The modules by name; they stand beside a script and find each other by bare names."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(HERE)
        yield SimpleNamespace(**{name: importlib.import_module(name) for name in NAMES})
        for name in NAMES:
            patch.delitem(sys.modules, name)


def run(*arguments: object, before: str = "", folder: Path) -> subprocess.CompletedProcess[str]:
    """Run the script in a process of its own, some code before it."""
    code = f"import sys; sys.path.insert(0, {str(HERE)!r}); import run; {before}\nsys.exit(run.main())"
    command = [sys.executable, "-c", code, *map(str, arguments)]
    return subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=60, check=False)


def test_a_small_run_is_clean(tools: SimpleNamespace, tmp_path: Path) -> None:
    result = run("--inputs", 2000, folder=tmp_path)
    assert result.returncode == 0, result.stdout + result.stderr
    line = json.loads(result.stdout.splitlines()[-1])
    assert line["inputs"] == 2000
    assert line["findings"] == 0
    assert line["valid_json_share"] >= 1 / 3
    assert line["accepted"] + sum(line["refused"].values()) == 2000
    assert line["targets"].keys() == tools.inputs.WEIGHTS.keys()
    for target, row in line["targets"].items():
        # Every parser was given what it takes and, but for the one that takes everything, what it does not.
        assert row["accepted"], target
        assert row["accepted"] < row["inputs"] or target == "name"
    assert not any(tmp_path.iterdir())


def test_an_input_follows_from_seed_and_number(tools: SimpleNamespace, tmp_path: Path) -> None:
    numbers = range(0, 900, 3)
    made = {number: tools.inputs.make(1, number) for number in numbers}
    assert {number: tools.inputs.make(1, number) for number in reversed(numbers)} == made
    assert tools.inputs.make(2, 0) != made[0]
    assert len({given.data for given in made.values()}) > 290
    text = repr([made[number] for number in numbers])
    code = "import inputs; sys.stdout.write(repr([inputs.make(1, n) for n in range(0, 900, 3)])); sys.exit()"
    other = run(before=code, folder=tmp_path)
    assert hashlib.sha256(other.stdout.encode()).hexdigest() == hashlib.sha256(text.encode()).hexdigest()


def test_inputs_reach_behind_the_outer_checks(tools: SimpleNamespace) -> None:
    made = [tools.inputs.make(1, number) for number in range(1500)]
    documents = [given for given in made if given.json is not None]
    assert sum(tools.hostile.is_json(given.json) for given in documents) > len(made) * 0.6
    headers = [given.data for given in made if given.target == "header"]
    fitting = sum(int.from_bytes(raw[:8], "little") == len(raw) - 8 for raw in headers)
    assert len(headers) * 0.8 < fitting < len(headers)
    manifests = [given.data for given in made if given.target == "manifest"]
    sealed = sum(tools.documents.seal(raw) == raw and b'"manifest_sha256":"' in raw for raw in manifests)
    assert len(manifests) * 0.75 < sealed < len(manifests)
    assert {step for given in made for step in given.trail} > {"replace", "delete", "repeat_key", "swap", "flip", "cut"}


@pytest.mark.parametrize(
    ("text", "is_json"),
    [
        (b'{"a":[1,-0,1e5,true,null,"\\ud800"]}', True),
        (b'{"a":1,"a":2}', True),
        (b" [1e999, " + b"9" * 5000 + b"]\n", True),
        ("\u6a21".join('""').encode(), True),
        (b'{"a":1,}', False),
        (b"[NaN]", False),
        (b"[" + b"9" * 5000 + b", -Infinity]", False),
        (b"[01]", False),
        (b'"\xff"', False),
        (b'\xef\xbb\xbf""', False),
        (b'"\x00"', False),
        (b"", False),
        (b"[1]x", False),
        (b"[" * 90_000 + b"]" * 90_000, False),
    ],
)
def test_what_counts_as_json(tools: SimpleNamespace, text: bytes, is_json: bool) -> None:
    assert tools.hostile.is_json(text) is is_json


def test_raw_values_and_repeated_keys_are_written(tools: SimpleNamespace) -> None:
    tree = {"a": "<<raw:1E400>>", f"a{tools.hostile.SAME}1": 2, f"a{tools.hostile.SAME}2": "\x00"}
    assert tools.hostile.dump(tree) == b'{"a":1E400,"a":2,"a":"\\u0000"}'


def key_error(*_: object) -> Any:
    raise KeyError("planted")


def without_the_last_tensor(make_plan: Callable[..., Any]) -> Callable[..., Any]:
    """A planner that forgets a tensor of the last file."""

    def forget(*arguments: Any) -> Any:
        plan = make_plan(*arguments)
        object.__setattr__(plan.files[-1], "tensors", plan.files[-1].tensors[:-1])
        return plan

    return forget


def any_keys(_: object, value: Any, *__: object) -> Any:
    """A reader that takes objects with unknown keys."""
    return value if isinstance(value, dict) else {}


@pytest.mark.parametrize(
    ("place", "bug", "kind"),
    [
        ("manifests.header._parse_entry", key_error, "header KeyError"),
        ("manifests.validate.relative_fault", lambda _: None, "manifest AssertionError promises"),
        ("manifests.validate._Reader._check_unique", lambda *_: None, "manifest AssertionError promises"),
        ("targets.make_plan", without_the_last_tensor, "folder AssertionError promises"),
        ("manifests.validate._Reader._mapping", any_keys, "manifest AssertionError targets"),
    ],
)
def test_a_planted_bug_is_found(
    tools: SimpleNamespace, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, place: str, bug: Any, kind: str
) -> None:
    if place.startswith("targets."):
        bug = bug(getattr(tools.targets, place.removeprefix("targets.")))
    monkeypatch.setattr(place, bug)
    monkeypatch.setattr(tools.inputs, "WEIGHTS", {kind.split(maxsplit=1)[0]: 1})
    tally = tools.run.fuzz(tools.targets.Targets(tmp_path), 1, range(400))
    assert tally.found
    assert any(found.startswith(kind) for found in tally.findings), tally.findings


@pytest.mark.parametrize(
    ("before", "said"),
    [
        (
            "import inputs; inputs.WEIGHTS = {'folder': 1}; import manifests.folder as f, manifests.shards as s; "
            "s.check_relative = lambda p, what: p; f.resolve_inside = lambda root, p: root / p",
            "outside.safetensors, outside of",
        ),
        ("import manifests.header as m; m._parse_entry = lambda *_: bytes(2 << 30)", "MemoryError"),
        ("import manifests.header as m, os; m._parse_entry = lambda *_: os._exit(7)", "exit code 7"),
        (
            "import manifests.header as m, time; m._parse_entry = lambda *_: time.sleep(99); run.STUCK_SECONDS = 0.3",
            "FINDING stuck",
        ),
        ("import targets; targets.read_source = lambda folder: (folder / 'new').write_bytes(b'')", "for writing"),
        ("run.CPU_SECONDS = 0", "s of CPU time\n"),
    ],
    ids=["outside", "memory", "exit", "stuck", "writing", "slow"],
)
def test_what_a_process_must_not_do_is_found_and_saved(tmp_path: Path, before: str, said: str) -> None:
    result = run("--inputs", 90, before=before, folder=tmp_path)
    assert result.returncode == 1, result.stderr
    assert said in result.stdout
    saved = list((tmp_path / "build" / "fuzz").glob("*.bin"))
    assert saved
    assert all(path.with_suffix(".txt").read_text(encoding="utf-8") for path in saved)


def test_one_input_is_run_again_by_its_number(tools: SimpleNamespace, tmp_path: Path) -> None:
    number = next(number for number in range(99) if tools.inputs.make(1, number).target == "header")
    before = "import manifests.header as m; m._json_length = lambda *_: 1 / 0"
    result = run("--only", number, before=before, folder=tmp_path)
    assert result.returncode == 1
    assert f"FINDING header ZeroDivisionError <string>:1: input {number}\n" in result.stdout
    saved = tmp_path / "build" / "fuzz" / f"1-{number}-header.bin"
    assert saved.read_bytes() == tools.inputs.make(1, number).data
