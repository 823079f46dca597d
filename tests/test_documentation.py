"""The README against the tree and the programs: what it lists exists, and what exists is listed."""

import re
from pathlib import Path

import click
import pytest

from manifests.cli import manifests
from manifests.errors import ToolkitError
from reshard.cli import reshard
from runner.cli import runner

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
GROUPS = {"manifests": manifests, "reshard": reshard, "runner": runner}


def listed_files() -> set[str]:
    """The paths of the README's tree."""
    tree = README.split("## The tree")[1].split("```")[1]
    found, folder = set(), ""
    for line in tree.strip().splitlines():
        name = line.split()[0]
        if not line.startswith(" "):
            folder = name
        elif not name.endswith("/"):
            found.add(folder + name)
    return found


def test_the_tree_is_the_one_that_is_there() -> None:
    present = {
        f"{package}/{path.name}"
        for package in GROUPS
        for path in (ROOT / package).iterdir()
        if path.suffix in (".py", ".md") and not path.name.startswith("__")
    }
    assert listed_files() == present


@pytest.mark.parametrize("name", GROUPS)
def test_every_command_is_in_the_table(name: str) -> None:
    for command in GROUPS[name].commands:
        assert re.search(rf"^\| `{name} {command}[ `]", README, re.MULTILINE), f"{name} {command} is not in the README"


@pytest.mark.parametrize("name", GROUPS)
def test_options_in_the_table_exist(name: str) -> None:
    for line in README.splitlines():
        match = re.match(rf"\| `{name} (\w+)", line)
        if match is None:
            continue
        command = GROUPS[name].commands[match[1]]
        known = {option for parameter in command.params for option in parameter.opts}
        for option in re.findall(r"--?[a-z][a-z-]*", " ".join(re.findall(r"`([^`]*)`", line))):
            assert option in known, f"the README gives {name} {match[1]} the option {option}"


@pytest.mark.parametrize("name", GROUPS)
def test_every_command_has_help_with_an_example(name: str) -> None:
    group = GROUPS[name]
    above = click.Context(group, info_name=name, **group.context_settings)
    for command in [group, *group.commands.values()]:
        # Below its group, as it is called: click keeps what it finds here for whoever asks next.
        text = command.get_help(above if command is group else click.Context(command, parent=above))
        assert "Example:" in text, f"{name} {command.name} has no example"


def test_exit_codes_are_listed() -> None:
    classes = [ToolkitError, *ToolkitError.__subclasses__()]
    codes = README.split("Exit codes:")[1].split("`RESHARD_DEBUG")[0]
    for error in classes:
        assert re.search(rf"\b{error.exit_code}\b", codes), f"{error.__name__} ends with {error.exit_code}"
