"""Whether an undisturbed end is right at all, by other means than comparing it with itself."""

from __future__ import annotations

from harness import child
from harness.scenarios import Stage
from harness.source import LEFT_OUT
from harness.tree import Tree, below, difference, read_tree

from manifests.paths import MANIFEST_NAME


def prove(stage: Stage) -> str:
    """What is wrong with the end of a scenario, as seen by verify, by restore, and beside the source."""
    scenario = stage.scenario
    consumes = "--consume" in scenario.command
    source = {path: what for path, what in stage.source.items() if not _is_left_out(path)}
    stage.put_up_as(stage.end)
    if "out" in scenario.command:
        if consumes and any(path.endswith(".safetensors") for path in below(stage.end, "dst")):
            return "payload is left in dst"
        return difference(below(stage.end, "out"), source)
    if MANIFEST_NAME not in below(stage.end, "dst"):
        return "no manifest"
    if consumes and (text := difference(below(stage.end, "src"), _without_shards(stage.source))):
        return text
    for command in (("reshard", "verify", "dst", "-q"), ("reshard", "restore", "dst", "out", "-q")):
        ended = child.look(stage.resolve(command))
        if ended.code:
            return f"{' '.join(command)} ends with {ended.code}: {ended.out}{ended.err}"
    return difference(read_tree(stage.root / "out"), source)


def _is_left_out(path: str) -> bool:
    return any(name == path or name.startswith(f"{path}/") for name in LEFT_OUT)


def _without_shards(tree: Tree) -> Tree:
    return {path: what for path, what in tree.items() if not path.endswith((".safetensors", ".gguf"))}
