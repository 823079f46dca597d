"""Replays of traces: counted by hand, the optimum against every choice there is, and the command."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from itertools import combinations
from math import inf
from pathlib import Path
from typing import Any

import pytest
from click.testing import Result
from hypothesis import given
from hypothesis import strategies as st

from manifests.errors import ManifestError, ToolkitError
from runner.policy import Policy
from runner.replay import Keeper, Optimum, Steps, default_windows, policy_names, replay, simulate
from runner.trace import Pass, Trace, save

Call = Callable[..., Result]
Document = Callable[..., dict[str, Any]]


def make_trace(*passes: tuple[int, Sequence[int], Sequence[int]], experts: int = 8) -> Trace:
    """Two layers, two experts per token; usage as a replay does not read it."""
    return Trace(
        model_type="deepseek_v3",
        layers=(3, 4),
        experts=experts,
        experts_per_token=2,
        passes=tuple(Pass(tokens=tokens, experts={3: tuple(a), 4: tuple(b)}) for tokens, a, b in passes),
        usage={3: {}, 4: {}},
    )


def make_steps(*passes: Sequence[Sequence[int]]) -> Steps:
    return [(1, [[(layer, expert) for expert in ids] for layer, ids in enumerate(one)]) for one in passes]


def hits(steps: Steps, keeper: Keeper, window: int) -> int:
    return simulate(steps, keeper, window).decode.hits


def test_hits_counted_by_hand() -> None:
    steps = make_steps([[0, 1]], [[1, 2]], [[1, 2]], [[0, 3]], [[1, 2]])
    # Three fit: 0, 1 and 2 until 3 comes, and 1 leaves, or 2 does.
    assert hits(steps, Policy(0), 3) == 1 + 2 + 1 + 1
    assert hits(steps, Policy(0), 4) == 1 + 2 + 1 + 2
    assert hits(steps, Optimum(steps), 3) == 1 + 2 + 1 + 1
    assert simulate(steps, Policy(0), 3).decode.uses == 10


def test_an_expert_is_never_dropped_for_one_of_its_own_layer() -> None:
    steps = make_steps([[0, 1]], [[2, 3]], [[0, 1]])
    for keeper in (Policy(0), Policy(inf), Optimum(steps)):
        assert hits(steps, keeper, 2) == 0
    steps = make_steps([[0, 1]], [[1, 2]])
    for keeper in (Policy(0), Policy(inf), Optimum(steps)):
        assert hits(steps, keeper, 2) == 1


def test_what_a_layer_uses_stays_for_it_however_rare() -> None:
    steps = make_steps(*[[[2]]] * 10, [[0]], [[0, 5]], [[0, 5]])
    assert hits(steps, Policy(inf), 2) == 9 + 0 + 1 + 2


def test_scores_age_with_passes() -> None:
    steps = make_steps(*[[[0]]] * 4, [[1]], [[1]], [[2]], [[1]])
    assert hits(steps, Policy(0.5), 2) == 3 + 0 + 1 + 0 + 1
    assert hits(steps, Policy(inf), 2) == 3 + 0 + 1 + 0 + 0


def test_a_layer_larger_than_the_window_goes_through_it() -> None:
    steps = make_steps([[0, 1, 2, 3, 4]], [[0, 1, 2, 3, 4]])
    for keeper in (Policy(0), Policy(8), Optimum(steps)):
        assert hits(steps, keeper, 2) == 2
        assert len(keeper) == 2


def best(steps: Steps, window: int) -> int:
    """The most hits that any choice of what to keep after each layer can give, by trying all."""
    reached: dict[frozenset[Any], int] = {frozenset(): 0}
    for keys in (keys for _, layers in steps for keys in layers):
        wanted, following = frozenset(keys), dict[frozenset[Any], int]()
        for held, found in reached.items():
            at_hand, last = held | wanted, max(wanted - held, default=None)
            for kept in map(frozenset, combinations(sorted(at_hand), min(window, len(at_hand)))):
                # Nothing that the layer uses leaves while it is computed; one too large goes through one by one.
                if not wanted <= kept if len(wanted) <= window else last not in kept:
                    continue
                following[kept] = max(following.get(kept, 0), found + len(held & wanted))
        reached = following
    return max(reached.values())


@st.composite
def some_steps(draw: st.DrawFn) -> Steps:
    subset = st.sets(st.integers(0, 4), min_size=1, max_size=3).map(sorted)
    return make_steps(*draw(st.lists(st.lists(subset, min_size=1, max_size=2), min_size=1, max_size=6)))


@given(steps=some_steps(), window=st.integers(1, 5))
def test_no_choice_beats_the_optimum_and_it_is_reached(steps: Steps, window: int) -> None:
    limit = best(steps, window)
    assert hits(steps, Optimum(steps), window) == limit
    for half_life in (0, 1, 8, inf):
        assert hits(steps, Policy(half_life), window) <= limit


def test_prompts_are_counted_apart() -> None:
    trace = make_trace((5, [0, 1, 2], [3, 4]), (1, [0, 1], [3, 4]), (2, [0, 5], [3, 6]), (1, [1, 5], [2, 3]))
    found = replay([trace], [16])
    assert (found.experts, found.decode_passes, found.prefill_passes) == (16, 2, 2)
    for tallies in found.windows[16].values():
        assert (tallies.prefill.uses, tallies.prefill.hits) == (9, 2)
        assert (tallies.decode.uses, tallies.decode.hits) == (8, 7)
        assert tallies.decode.hit_rate == 7 / 8


def test_traces_run_one_after_the_other() -> None:
    one = make_trace((1, [0, 1], [0, 1]))
    found = replay([one, one], [16])
    assert found.windows[16]["lru"].decode.hits == 4
    empty = replay([make_trace()], [1]).windows[1]["lru"]
    assert empty.decode.hit_rate is None


def test_windows_are_shares_of_all_experts() -> None:
    assert default_windows(15_104) == [944, 1888, 3776, 7552]
    assert default_windows(8) == [1, 1, 2, 4]
    found = replay([make_trace((1, [0, 1], [0, 1]), experts=32)])
    assert list(found.windows) == [4, 8, 16, 32]
    assert list(found.windows[4]) == policy_names()


def test_what_cannot_be_replayed_is_refused() -> None:
    one = make_trace((1, [0, 1], [0, 1]))
    with pytest.raises(ManifestError, match="different models"):
        replay([one, make_trace(experts=9)])
    with pytest.raises(ToolkitError, match="no trace"):
        replay([])
    with pytest.raises(ToolkitError, match="at least 1"):
        replay([one], [4, 0])


def test_a_model_of_v3s_size_replays() -> None:
    steps = make_steps(
        *([[(7 * number + layer + k) % 256 for k in range(8)] for layer in range(58)] for number in range(20))
    )
    assert simulate(steps, Policy(), 944).decode.uses == 20 * 58 * 8


# --- the command ---


@pytest.fixture
def trace_file(tmp_path: Path) -> Path:
    passes: list[dict[str, Any]] = [{"tokens": 3, "experts": {"3": [0, 1, 2, 3], "4": [0, 1]}}]
    passes += [{"tokens": 1, "experts": {"3": [i % 8, 8], "4": [0, 1 + i % 3]}} for i in range(8)]
    usage: dict[str, dict[str, int]] = {"3": {}, "4": {}}
    for one in passes:
        for layer, ids in one["experts"].items():
            for expert in ids:
                usage[layer][str(expert)] = usage[layer].get(str(expert), 0) + 1
    usage["3"]["0"] += 2
    usage["4"]["0"] += 4
    document = {
        "format": "expert-trace",
        "version": 1,
        "model_type": "deepseek_v3",
        "layers": [3, 4],
        "experts": 16,
        "experts_per_token": 2,
        "passes": passes,
        "usage": usage,
    }
    path = tmp_path / "trace.json"
    path.write_text(json.dumps(document))
    return path


def test_the_document(trace_file: Path, document: Document) -> None:
    found = document("replay", trace_file, "--experts-in-memory", "4, 32,4")
    assert list(found) == ["traces", "experts", "decode_passes", "prefill_passes", "half_life", "windows"]
    assert (found["traces"], found["experts"]) == ([str(trace_file)], 32)
    assert (found["decode_passes"], found["prefill_passes"], found["half_life"]) == (8, 1, 8.0)
    assert [window["experts_in_memory"] for window in found["windows"]] == [4, 32]
    policies = found["windows"][1]["policies"]
    assert list(policies) == ["lru", "lfu", "lrfu 2", "lrfu 4", "lrfu 8", "lrfu 16", "lrfu 64", "optimum"]
    for policy in policies.values():
        assert policy["prefill"] == {"uses": 6, "hits": 0, "hit_rate": 0.0}
        # Of 32 uses in decode, those of 4, 5, 6, 7 and 8 in one layer and 2 and 3 in the other are first ones.
        assert policy["decode"] == {"uses": 32, "hits": 25, "hit_rate": 25 / 32}


def test_the_table(trace_file: Path, call: Call) -> None:
    result = call("replay", trace_file, "--experts-in-memory", "32", "-q")
    assert result.exit_code == 0
    lines = result.stdout.splitlines()
    assert lines[0] == "decode, hit rate over 8 passes"
    assert " ".join(lines[1].split()) == "experts in memory lru lfu lrfu 2 lrfu 4 lrfu 8 lrfu 16 lrfu 64 optimum"
    assert lines[2].split() == ["32", "(100.0%)", *["78.1%"] * 8]
    more = call("replay", trace_file, "--experts-in-memory", "100000", "-q").stdout.splitlines()
    assert more[2].split()[:2] == ["100,000", "(all)"]
    assert lines[3] == "prefill, hit rate over 1 pass"
    assert lines[5].split()[2:] == ["0.0%"] * 8
    assert len({len(line) for line in (*lines[1:3], *lines[4:6])}) == 1
    assert result.stderr == ""


@pytest.mark.parametrize(
    ("ram", "expert_bytes", "window"),
    [("16G", "44050944", 363), ("100", "10", 10), ("2kb", "1K", 2), ("1.5KiB", "1", 1536), ("1T", "100 parsecs", None)],
)
def test_a_window_in_bytes(trace_file: Path, call: Call, ram: str, expert_bytes: str, window: int | None) -> None:
    result = call("replay", trace_file, "--ram", ram, "--expert-bytes", expert_bytes, "--json")
    if window is None:
        assert result.exit_code == 2
        assert "is not a size; write it like 500M, 16G or 1.5GiB" in result.stderr
    else:
        assert [one["experts_in_memory"] for one in json.loads(result.stdout)["windows"]] == [window]


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--experts-in-memory", "4", "--ram", "1G", "--expert-bytes", "1M"], "either --experts-in-memory or --ram"),
        (["--ram", "1G"], "needed together"),
        (["--expert-bytes", "1G"], "needed together"),
        (["--experts-in-memory", "4,,5"], "whole numbers from 1"),
        (["--experts-in-memory", "0"], "whole numbers from 1"),
        (["--experts-in-memory", "-3"], "whole numbers from 1"),
        (["--experts-in-memory", "9999999999"], "whole numbers from 1"),
        (["--ram", "1M", "--expert-bytes", "1G"], "less than one expert"),
        (["--ram", "0", "--expert-bytes", "1G"], "less than one expert"),
        (["--ram", "1G", "--expert-bytes", "0"], "must be more than 0"),
    ],
)
def test_arguments_that_cannot_be_are_refused(trace_file: Path, call: Call, arguments: list[str], said: str) -> None:
    result = call("replay", trace_file, *arguments)
    assert (result.exit_code, said in result.stderr) == (2, True), result.output


def test_a_file_that_is_no_trace_is_refused(tmp_path: Path, call: Call) -> None:
    (tmp_path / "x.json").write_text("{}")
    result = call("replay", tmp_path / "x.json")
    assert result.exit_code == 12
    assert "is it a routing trace?" in result.stderr
    assert call("replay", tmp_path / "none.json").exit_code == 10


def test_a_trace_of_a_real_run_replays(tiny_checkpoint: Path, tmp_path: Path, call: Call) -> None:
    path = tmp_path / "trace.json"
    assert call("trace", "-m", tiny_checkpoint, "-p", "hello", "-n", "20", "--out", path, "-q").exit_code == 0
    result = call("replay", path, path)
    assert result.exit_code == 0
    assert "decode" in result.stdout
    assert "(50.0%)" in result.stdout


def test_saved_traces_load_for_the_command(tmp_path: Path, call: Call) -> None:
    """A trace whose usage does not fit its passes is one that nobody recorded."""
    save(make_trace((1, [0, 1], [0, 1])), tmp_path / "x.json")
    result = call("replay", tmp_path / "x.json")
    assert result.exit_code == 12
    assert "usage.3 lacks 0" in result.stderr
