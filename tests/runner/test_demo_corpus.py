"""The corpus rule: what is trained on, what never is, and that the rule can be asked without torch."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from runner.demo import corpus


@pytest.fixture
def library(tmp_path: Path) -> Path:
    """A small library folder with everything that the rule has an opinion on."""
    files = {
        "functools.py": "held out by its hash\n",
        "os.py": "training text\n",
        "json/__init__.py": "training text too\n",
        "empty.py": " \n",
        "test/test_os.py": "a test\n",
        "json/tests/inner.py": "a test\n",
        "site-packages/other.py": "not the library\n",
        "config-3.11-x86_64/makefile.py": "not text\n",
        "notes.txt": "not Python\n",
    }
    for name, text in files.items():
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
    (tmp_path / "latin.py").write_bytes(b"# caf\xe9\n")
    return tmp_path


def _names(root: Path, *, held_out: bool) -> list[str]:
    return [path.relative_to(root).as_posix() for path in corpus.files(root, held_out=held_out)]


def test_the_hash_of_the_path_decides() -> None:
    # Fixed for ever: another rule would put text that the embedded model has seen among the held-out text. The hashes
    # of html/__init__.py and xmlrpc/client.py are 4 and 5 of a hundred.
    assert all(map(corpus.is_held_out, ("argparse.py", "html/__init__.py", "json/decoder.py")))
    assert not any(map(corpus.is_held_out, ("os.py", "xmlrpc/client.py", "decoder.py")))


def test_tests_foreign_packages_and_blank_or_odd_files_are_no_text(library: Path) -> None:
    everything = _names(library, held_out=False) + _names(library, held_out=True)
    assert sorted(everything) == ["functools.py", "json/__init__.py", "os.py"]


def test_each_side_gets_its_own(library: Path) -> None:
    assert _names(library, held_out=True) == ["functools.py"]
    assert _names(library, held_out=False) == ["json/__init__.py", "os.py"]
    assert list(corpus.texts(library, held_out=False)) == ["training text too\n", "training text\n"]


def test_the_sides_do_not_meet_and_about_a_twentieth_is_held_out() -> None:
    training, held_out = set(corpus.files(held_out=False)), set(corpus.files(held_out=True))
    assert not training & held_out
    assert 0.02 < len(held_out) / len(training | held_out) < 0.09


def test_the_command_prints_the_held_out_files_without_torch() -> None:
    code = (
        "import sys; from runner.demo import corpus; corpus.main(['--held-out'], standalone_mode=False);"
        "assert 'torch' not in sys.modules"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines() == [str(path) for path in corpus.files(held_out=True)]
