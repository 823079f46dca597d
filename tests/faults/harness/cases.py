"""One case: a command is disturbed, perhaps more than once, then run again on a good disk. What is wrong about it?

What must hold, whatever the fault:
- a command that fails says so in one sentence, with the exit code that fits, and no traceback;
- folders that a command only reads do not change; readers of what is half-made refuse it cleanly;
- the same command then succeeds, and the whole tree is byte for byte that of an undisturbed run, nothing left over;
- after a success a power cut takes nothing away, also when an fsync failed on the way.
"""

from __future__ import annotations

import errno
import re
from dataclasses import dataclass

from harness import child
from harness.child import Ended
from harness.faults import Fail, Fault, parse
from harness.model import Model
from harness.scenarios import Stage
from harness.tree import after_crash, difference, read_tree

from manifests.paths import JOURNAL_NAME, MANIFEST_NAME

KILLED = -9
REFUSED = 1
DISCARD = "discard/"
CODES = {errno.ENOSPC: {15}, errno.EDQUOT: {15}, errno.EMFILE: {1, 15}}
"""Exit codes by what failed; a disk that fails otherwise is 1."""
RESUMABLE, NOT_FOUND, BAD = 3, 10, 12
READERS = (
    ("manifests", "show"),
    ("manifests", "check"),
    ("reshard", "verify", "-q"),
    ("reshard", "restore", "--check", "-q"),
)


@dataclass(frozen=True, slots=True)
class Verdict:
    """What came out of a case.

    Attributes:
        wrong: What does not hold; empty when all does.
        fired: Whether the first fault had its effect: a kill can come too late when threads race.
        codes: How each run ended.
    """

    wrong: str
    fired: bool
    codes: tuple[int, ...]


def judge(stage: Stage, faults: str, *, readers: bool = False) -> Verdict:
    """Do a case: faults, joined by ``+``, each for one run of the command, and then a run without."""
    model = stage.put_up()
    codes: list[int] = []
    fired = True
    for number, text in enumerate(faults.split("+")):
        discards = text.startswith(DISCARD)
        fault = parse(text.removeprefix(DISCARD))
        is_done = not difference(read_tree(stage.root), stage.end)
        ended = stage.run((*stage.scenario.command, *(["--discard"] if discards else [])), model, fault)
        codes.append(ended.code)
        has_fired = _has_fired(fault, ended)
        fired = has_fired if number == 0 else fired
        if is_done and ended.code in stage.scenario.done_codes:
            continue
        if discards and ended.code == REFUSED and "--consume" in stage.scenario.command:
            # A part of the source is only here: starting again would lose it.
            wrong = no_sentence(ended) or _wrong_tree(stage, ended)
        else:
            wrong = _wrong_end(ended, fault, stage.scenario.failed_codes) or _wrong_tree(stage, ended)
        if ended.code == 0 and not wrong:
            wrong = _wrong_success(stage, ended)
        if wrong:
            return Verdict(f"run {number + 1}: {wrong}", fired, tuple(codes))
        assert ended.model is not None
        model = ended.model
        if ended.code == KILLED and fault.crash():
            after_crash(stage.root, stage.graveyard, model, model.crash(fault.crash() or ""))
            model = Model(str(stage.root))
        if wrong := stage.changed():
            return Verdict(f"run {number + 1}: {wrong}", fired, tuple(codes))
        if readers and (wrong := _wrong_readers(stage)):
            return Verdict(f"after run {number + 1}: {wrong}", fired, tuple(codes))
    wrong, code = finish(stage, model)
    return Verdict(wrong, fired, (*codes, code))


def finish(stage: Stage, model: Model) -> tuple[str, int]:
    """Run the command on a good disk; what is wrong with the end, and the exit code."""
    is_done = not difference(read_tree(stage.root), stage.end)
    ended = stage.run(stage.scenario.command, model, Fault())
    if is_done and ended.code in stage.scenario.done_codes[1:]:
        return no_sentence(ended) or _wrong_tree(stage, ended), ended.code
    if ended.code != 0:
        return f"run again: ends with {ended.code}: {ended.err.strip() or ended.out.strip()}", ended.code
    wrong = _wrong_tree(stage, ended) or _wrong_success(stage, ended)
    return wrong and f"run again: {wrong}", 0


def _wrong_success(stage: Stage, ended: Ended) -> str:
    """What is wrong after exit code 0: the tree is complete, and on the disk."""
    if wrong := difference(read_tree(stage.root), stage.end):
        return wrong
    assert ended.model is not None
    lost = difference(ended.model.crash("lost"), ended.model.state())
    return lost and f"ends with 0, and a power cut would change it: {lost}"


def _has_fired(fault: Fault, ended: Ended) -> bool:
    return any(fault.dies(step) or fault.fails(step) or fault.is_short(step) for step in ended.steps)


def _wrong_end(ended: Ended, fault: Fault, failed_codes: tuple[int, ...]) -> str:
    """What is wrong with how a disturbed command ended."""
    if ended.code == KILLED:
        return "" if any(map(fault.dies, ended.steps)) else "killed by nobody"
    if ended.code == 0:
        return ""
    allowed = {*CODES.get(fault.code, {1}), *failed_codes} if isinstance(fault, Fail) else set()
    if ended.code not in allowed:
        wanted = " or ".join(map(str, sorted({0, *allowed})))
        return f"ends with {ended.code}, not {wanted}: {ended.err.strip()}"
    return no_sentence(ended)


def no_sentence(ended: Ended) -> str:
    """What is wrong with what a failed command says."""
    if re.fullmatch(r"(reshard|manifests): [^\n]+\n", ended.err) and "Traceback" not in ended.err:
        return ""
    return f"ends with {ended.code} and says {ended.err!r}"


def _wrong_tree(stage: Stage, ended: Ended) -> str:
    """Whether the disk is what the model thinks: else something goes past the layer."""
    if ended.model is None:
        return "no model came back"
    text = difference(read_tree(stage.root), ended.model.state())
    return f"the model does not know: {text}" if text else ""


def _wrong_readers(stage: Stage) -> str:
    """Readers take a folder with a manifest, and refuse one without, in one sentence."""
    name = stage.scenario.reader
    if name is None:
        return ""
    folder = stage.root / name
    is_whole = (folder / MANIFEST_NAME).exists()
    allowed = {0} if is_whole else {RESUMABLE} if (folder / JOURNAL_NAME).exists() else {RESUMABLE, NOT_FOUND, BAD}
    if not difference(read_tree(stage.root), stage.end):
        allowed = {0, NOT_FOUND, BAD}
    for reader in READERS:
        if "--check" in reader and is_whole and "widen" in stage.scenario.name:
            allowed = {0, RESUMABLE}
        ended = child.look([*reader[:2], str(folder), *reader[2:]])
        if ended.code not in allowed:
            return f"{' '.join(reader[:2])} ends with {ended.code}, not one of {sorted(allowed)}: {ended.err.strip()}"
        if ended.code and (text := no_sentence(ended)):
            return f"{' '.join(reader[:2])} {text}"
    return ""


def steps_of(stage: Stage) -> dict[str, list[str]]:
    """What can be disturbed in an undisturbed run: its calls in order, opens that create under a name of their own."""
    steps = stage.undisturbed.steps
    return {
        "points": [step.call for step in steps if step.point],
        "calls": ["create" if step.call == "open" and step.point else step.call for step in steps],
    }
