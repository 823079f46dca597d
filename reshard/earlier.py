"""What an earlier command left in a destination: a run to continue, a checkpoint to widen, or nothing.

Looks and decides; writes nothing.
"""

import os
import shlex
from collections.abc import Collection, Mapping
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from manifests import gguf_files
from manifests.checkpoint import Checkpoint
from manifests.digest import TensorHasher, sha256_hex
from manifests.errors import IntegrityError, ManifestError, SourceNotFoundError, ToolkitError
from manifests.folder import LocalFolder
from manifests.header import Header
from manifests.paths import ASIDE_NAME, INDEX_NAME, JOURNAL_NAME, MANIFEST_NAME
from manifests.safety import relative_fault, resolve_inside
from manifests.schema import Manifest, Selection, Shard
from manifests.storage import decode
from reshard.archive import unpack
from reshard.destination import block_for, hash_readable
from reshard.documents import header_paths
from reshard.journal import CONSUMES, JournalContents, is_consuming, is_digest, read_journal
from reshard.openable import read_blocks
from reshard.places import Place
from reshard.plan import Plan, PlannedTensor, SelectionError
from reshard.progress import Progress
from reshard.saved import parse_saved, read_saved_headers
from reshard.source import SourceCheckpoint
from reshard.transfer import Durable, pending_shards

SAMPLE_BYTES = 64 << 20
"""Compared of a source before it is taken for the one that a checkpoint was made from."""

FAR_SAMPLES = 64
"""So many tensors at the most where each is a request to a server."""


@dataclass(slots=True, kw_only=True)
class Earlier:
    """What was found.

    Attributes:
        journal: Of a run that did not end.
        manifest: Of a complete checkpoint, of whatever selection.
        manifest_sha256: Of its file, so that a journal can name it.
        durable: Tensors and shards that either of them vouches for.
        freed: Headers of source shards that are gone because the earlier run used them up.
    """

    journal: JournalContents | None = None
    manifest: Manifest | None = None
    manifest_sha256: str | None = None
    durable: Durable = field(default_factory=Durable)
    freed: Mapping[str, Header] = field(default_factory=dict)

    @property
    def consumes(self) -> bool:
        """Whether the journal's run may have freed a part of its source."""
        return self.journal is not None and is_consuming(self.journal)

    @property
    def is_finished(self) -> bool:
        """Whether the journal's run ended and only the journal was not removed."""
        return (
            self.journal is not None
            and self.manifest is not None
            and self.journal.begin.get("widens") != self.manifest_sha256
        )

    def widen(self, selection: Selection) -> Selection:
        """What the destination holds when this selection is added to it.

        Raises:
            SelectionError: The two together are not layers times experts.
        """
        if self.manifest is None:
            return selection
        return _union(self.manifest.selection, selection)


def find_earlier(source: Path | None, destination: Path, known: Earlier | None = None) -> Earlier:
    """Look at a destination.

    Args:
        source: The folder that is to be resharded; None when it is on a server, where nothing is used up.
        destination: The folder to look at.
        known: What was found there a moment ago: the same manifest is not read twice, which in a large checkpoint
            takes more memory than all else.

    Raises:
        IntegrityError: Its journal is damaged.
        ManifestError: Its manifest is, or the journal is another command's.
    """
    earlier = Earlier()
    if not destination.is_dir():
        return earlier
    earlier.journal = read_journal(destination)
    _read_manifest(earlier, destination, known or earlier)
    if earlier.journal is not None:
        if earlier.journal.begin.get("task") != "run":
            raise ManifestError(
                f"{destination}: `reshard {earlier.journal.begin.get('task')}` was interrupted here; finish that "
                "first, or choose another folder"
            )
        check_begin(earlier.journal.begin, destination)
        _read_records(earlier, destination)
        if not earlier.is_finished:
            earlier.freed = _freed_headers(source, destination, earlier.journal, earlier.durable)
    if earlier.manifest is not None and (earlier.journal is None or earlier.is_finished):
        earlier.freed = _used_up_headers(source, Checkpoint(LocalFolder(destination), earlier.manifest))
    return earlier


def describe_source(source: SourceCheckpoint) -> list[dict[str, Any]]:
    """The shards as a journal records them, so that a changed one is recognised."""
    return [
        {
            "name": name,
            "size": header.file_bytes,
            "header_size": len(header.rest),
            "header_sha256": sha256_hex(header.rest),
            **source.place.state(name),
        }
        for name, header in source.shards.items()
    ]


def require_same_task(earlier: Earlier, source: SourceCheckpoint, plan: Plan, destination: Path) -> None:
    """Refuse to continue a run with another source or selection than it began with.

    A file that has only another time stamp is left to `require_taken_bytes`, which reads it.

    Raises:
        ManifestError: With the name of what differs.
    """
    assert earlier.journal is not None
    begin = earlier.journal.begin
    if begin["selection"] != describe_selection(plan.selection):
        raise ManifestError(
            f"{destination}: a run with {_options(begin['selection'])} was interrupted here; "
            "give the same to continue it, or --discard to start again"
        )
    again = _how_to_begin_again(earlier)
    known = {shard["name"]: shard for shard in begin["shards"]}
    if any(("state" in shard) != source.place.is_far for shard in known.values()):
        where = "a folder of this machine" if source.place.is_far else "a server"
        raise ManifestError(f"{destination}: the run that was interrupted here read from {where}; give the same{again}")
    now = {shard["name"]: shard for shard in describe_source(source)}
    for name, shard in now.items():
        before = known.get(name)
        if before is None or any(shard[key] != before[key] for key in before if key != "mtime_ns"):
            raise _changed(source.place.where(name), destination, again)
    if missing := known.keys() - now.keys():
        raise ManifestError(
            f"{source.place}: has no {min(missing)}, which the interrupted run into {destination} read; "
            f"give the same source{again}"
        )
    times = {name: shard["mtime_ns"] for name, shard in now.items() if shard.get("mtime_ns") is not None}
    new = [name for name, time_ns in times.items() if time_ns != known[name]["mtime_ns"]]
    unread = [name for name in pending_shards(source.shards, plan, earlier.durable) if name in new]
    # All of them new: a copy of the whole folder, which is known by what was taken from it.
    if unread and (len(new) < len(times) or len(unread) == len(new)):
        seconds, nanoseconds = divmod(known[unread[0]]["mtime_ns"] or 0, 10**9)
        more = f" (and {len(unread) - 1} more)" if len(unread) > 1 else ""
        raise ManifestError(
            f"{source.root / unread[0]}{more}: was written anew since the interrupted run into {destination} began, "
            "and has not been read; if it is the same file, give it its time back, as with `touch -d "
            f"@{seconds}.{nanoseconds:09} {shlex.quote(str(source.root / unread[0]))}`{again}"
        )


def require_taken_bytes(
    earlier: Earlier, source: SourceCheckpoint, plan: Plan, destination: Path, progress: Progress
) -> None:
    """Refuse to continue when a shard with another time stamp has other bytes than were taken from it.

    Raises:
        ManifestError: With the name of the shard.
        IntegrityError: It ends early.
    """
    assert earlier.journal is not None
    begun = {shard["name"]: shard.get("mtime_ns") for shard in earlier.journal.begin["shards"]}
    times = {shard["name"]: shard.get("mtime_ns") for shard in describe_source(source)}
    for tensor in sorted(
        (
            tensor
            for file in plan.files
            for tensor in file.tensors
            if times[tensor.shard] not in (None, begun[tensor.shard]) and tensor.name in earlier.durable.tensors
        ),
        key=lambda tensor: (tensor.shard, tensor.source_offset),
    ):
        progress.at(f"compare {tensor.shard}")
        if _digests(source.place, tensor, progress) != earlier.durable.tensors[tensor.name]:
            raise _changed(source.place.where(tensor.shard), destination, _how_to_begin_again(earlier))


def _changed(path: str, destination: Path, again: str) -> ManifestError:
    return ManifestError(
        f"{path}: is not the file that the interrupted run into {destination} read; give the same source{again}"
    )


def _how_to_begin_again(earlier: Earlier) -> str:
    """Not when a part of the source may be here alone."""
    return "" if earlier.consumes else ", or --discard to start again"


def require_same_source(earlier: Earlier, source: SourceCheckpoint, plan: Plan, destination: Path) -> None:
    """Refuse to widen a checkpoint with tensors of another model. Headers alone do not tell V3 from R1.

    Raises:
        ManifestError: The source has other shards, or other bytes.
        IntegrityError: A shard ends early.
    """
    assert earlier.manifest is not None
    known = earlier.manifest.source
    headers = {document.path: document.content_sha256 for document in earlier.manifest.documents}
    shards = [(name, header.file_bytes, sha256_hex(header.rest)) for name, header in source.shards.items()]
    held = [] if known is None else [(shard.name, shard.size, headers[shard.header]) for shard in known.shards]
    if held != shards:
        other = next((now[0] for before, now in zip(held, shards, strict=False) if before != now), None)
        why = "" if other is None else f": {other} is another file"
        raise ToolkitError(
            f"{destination}: holds another checkpoint than {source.place}{why}; choose a new or empty folder"
        )
    if known is not None and all(_is_published(shard, source.place) for shard in known.shards):
        return
    tensors = [tensor for file in plan.files for tensor in file.tensors if tensor.name in earlier.durable.tensors]
    taken = count = 0
    # The smallest first: norms and routers differ between any two models, and many of them are few bytes.
    for tensor in sorted(tensors, key=lambda tensor: tensor.size):
        taken, count = taken + tensor.size, count + 1
        if taken > SAMPLE_BYTES or not source.place.has(tensor.shard):
            break
        if source.place.is_far and count > FAR_SAMPLES:
            break
        if _digests(source.place, tensor) != earlier.durable.tensors[tensor.name]:
            raise ToolkitError(
                f"{destination}: holds another model than {source.place}: {tensor.shard} differs in tensor "
                f"{tensor.name!r}; choose a new or empty folder"
            )


def _is_published(shard: Shard, place: Place) -> bool:
    """Whether the place itself says that it has the very bytes that a shard had."""
    return shard.sha256 is not None and shard.sha256 == place.sha256(shard.name)


def require_plain(manifest: Manifest, destination: Path) -> None:
    """Refuse to add to a checkpoint whose experts are packed.

    Raises:
        ToolkitError: They are.
    """
    if any(file.codec != "none" for file in manifest.files):
        raise ToolkitError(f"{destination}: is packed; `reshard unpack` it before adding to it")


def _digests(place: Place, tensor: PlannedTensor, progress: Progress | None = None) -> tuple[str, ...]:
    """Of a tensor as it is in the source."""
    hasher = TensorHasher()
    buffer = block_for(tensor.size)
    with closing(place.file(tensor.shard).open()) as reader:
        for block in read_blocks(reader, buffer, tensor.source_offset, tensor.size):
            hasher.update(block)
            if progress is not None:
                progress.advance(len(block))
    return hasher.chunks()


def require_same_documents(earlier: Earlier, source: SourceCheckpoint, destination: Path) -> None:
    """Refuse when a small file was changed: its copy belongs to what is there, and must not be replaced.

    Raises:
        ToolkitError: With the name of the file.
    """
    assert earlier.manifest is not None
    known = {
        document.source_name: document.content_sha256
        for document in earlier.manifest.documents
        if document.role in ("auxiliary", "source_index")
    }
    place = source.place
    found = {file.path: hash_readable(place.file(file.path), place.size(file.path)) for file in source.auxiliary}
    if source.index is not None:
        found[INDEX_NAME] = sha256_hex(source.index)
    for name, sha256 in found.items():
        if known.get(name, sha256) != sha256:
            raise ToolkitError(
                f"{place.where(name)}: differs from what {destination} was made with; put the file back as it was, or "
                "choose a new or empty folder"
            )


def describe_selection(selection: Selection) -> dict[str, list[int] | None]:
    """A selection as a journal records it."""
    return {
        "layers": None if selection.layers is None else list(selection.layers),
        "experts": None if selection.experts is None else list(selection.experts),
    }


def _read_manifest(earlier: Earlier, destination: Path, known: Earlier) -> None:
    """The manifest, also one that was set aside when an interrupted run was about to replace it."""
    path = destination / MANIFEST_NAME
    if not path.exists() and earlier.journal is not None:
        path = destination / ASIDE_NAME
    if not path.exists():
        return
    raw = path.read_bytes()
    earlier.manifest_sha256 = sha256_hex(raw)
    manifest = known.manifest if known.manifest_sha256 == earlier.manifest_sha256 else None
    if manifest is None:
        manifest = decode(raw, what=str(path))
    earlier.manifest = manifest
    for file in manifest.files:
        for tensor in file.tensors:
            if tensor.digest is not None:
                earlier.durable.tensors[tensor.name] = tensor.chunks or (tensor.digest,)
    if manifest.source is not None:
        for shard in manifest.source.shards:
            if shard.sha256 is not None:
                earlier.durable.shards[shard.name] = shard.sha256


def check_begin(begin: Mapping[str, Any], destination: Path) -> None:
    """The first record must have the form that `run` writes: the rest of the program takes it at its word."""
    shard_form = {"name": str, "size": int, "header_size": int, "header_sha256": str}
    shards, selection = begin.get("shards"), begin.get("selection")
    is_right = (
        isinstance(begin.get("consume"), bool)
        and isinstance(begin.get("widens"), str | None)
        and isinstance(selection, dict)
        and selection.keys() == {"layers", "experts"}
        and all(
            numbers is None or (isinstance(numbers, list) and all(type(number) is int for number in numbers))
            for numbers in selection.values()
        )
        and isinstance(shards, list)
        and all(
            isinstance(shard, dict)
            and all(type(shard.get(key)) is kind for key, kind in shard_form.items())
            and _has_state(shard.keys() - shard_form.keys(), shard)
            and relative_fault(shard["name"]) is None
            for shard in shards
        )
    )
    if not is_right:
        raise _not_ours(destination)


def _has_state(keys: Collection[str], shard: Mapping[str, Any]) -> bool:
    """Whether what tells a shard's state has its form: that of a file of this machine, or of a server."""
    if keys == {"mtime_ns"}:
        return shard["mtime_ns"] is None or type(shard["mtime_ns"]) is int
    return keys == {"state"} and isinstance(shard["state"], str | None)


def _not_ours(destination: Path) -> ManifestError:
    return ManifestError(
        f"{destination / JOURNAL_NAME}: a record has not the form of a run's; it was not written by this program"
    )


def _read_records(earlier: Earlier, destination: Path) -> None:
    assert earlier.journal is not None
    for record in earlier.journal.records:
        if record == CONSUMES:
            continue
        if record.keys() == {"wrong", "tensors"} and isinstance(record["tensors"], list):
            # They were recorded, now or by a run of a part, before all of the shard was seen to be another than its
            # source publishes.
            for name in map(str, record["tensors"]):
                earlier.durable.tensors.pop(name, None)
                earlier.durable.begun.pop(name, None)
            continue
        shard, sha256, tensors = record.get("shard"), record.get("sha256"), record.get("tensors")
        begun = record.get("begun", {})
        if not (isinstance(shard, str) and (sha256 is None or is_digest(sha256)) and isinstance(begun, dict)):
            raise _not_ours(destination)
        if not isinstance(tensors, dict):
            raise _not_ours(destination)
        for name, chunks in (*tensors.items(), *begun.items()):
            if not (isinstance(chunks, list) and chunks and all(is_digest(chunk) for chunk in chunks)):
                raise _not_ours(destination)
            (earlier.durable.tensors if name in tensors else earlier.durable.begun)[name] = tuple(chunks)
        if sha256 is not None:
            earlier.durable.shards[shard] = sha256
    for name in earlier.durable.begun.keys() & earlier.durable.tensors.keys():
        del earlier.durable.begun[name]


def _freed_headers(
    source: Path | None, destination: Path, journal: JournalContents, durable: Durable
) -> dict[str, Header]:
    """Headers of shards that are recorded and no longer there, from where the run kept them."""
    if source is None or not is_consuming(journal):
        return {}
    shards = {shard["name"]: shard for shard in journal.begin["shards"]}
    paths = header_paths(shards)
    freed = [name for name in shards if not os.path.lexists(source / name)]
    for name in freed:
        if name not in durable.shards:
            raise SourceNotFoundError(
                f"{source / name}: is gone, and {destination / JOURNAL_NAME} does not say that it was taken; "
                "if the journal was damaged, put back a copy of it"
            )
    if not freed:
        return {}
    saved = {}
    for name, shard in shards.items():
        # What the others' headers are is seen from the source; but what a GGUF set is, its first file alone says.
        if name not in freed and not name.endswith(gguf_files.SUFFIX):
            continue
        path = resolve_inside(destination, paths[name])
        rest = unpack(path.read_bytes(), size=shard["header_size"], what=str(path))
        if sha256_hex(rest) != shard["header_sha256"]:
            raise IntegrityError(f"{path}: is not the header of {name} that was saved; it is damaged")
        saved[name] = rest, shard["size"]
    headers = parse_saved(saved)
    return {name: headers[name] for name in freed}


def _used_up_headers(source: Path | None, checkpoint: Checkpoint) -> Mapping[str, Header]:
    """Headers of shards that are no longer there, of a source of which all is here: nothing of them is needed."""
    known = checkpoint.manifest.source
    if source is None or known is None or not checkpoint.manifest.selection.is_everything or not source.is_dir():
        return {}
    gone = [shard.name for shard in known.shards if not os.path.lexists(source / shard.name)]
    if not gone:
        return {}
    headers = read_saved_headers(checkpoint)
    return {name: headers[name] for name in gone}


def _union(held: Selection, more: Selection) -> Selection:
    """Both selections as one, where that is again layers times experts."""

    def both(a: tuple[int, ...] | None, b: tuple[int, ...] | None) -> tuple[int, ...] | None:
        return None if a is None or b is None else tuple(sorted({*a, *b}))

    union = Selection(layers=both(held.layers, more.layers), experts=both(held.experts, more.experts))
    if union in (held, more) or held.layers == more.layers or held.experts == more.experts:
        return union
    raise SelectionError(
        f"the destination holds {_options(describe_selection(held))}; together with "
        f"{_options(describe_selection(more))} that is not layers times experts: give a selection that covers both, "
        "or another destination"
    )


def _options(selection: Mapping[str, Any]) -> str:
    """A selection as it is typed."""
    parts = [f"--{what} {','.join(map(str, numbers))}" for what, numbers in selection.items() if numbers is not None]
    return " ".join(parts) or "everything"
