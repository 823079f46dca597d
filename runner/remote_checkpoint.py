"""Opens a checkpoint on a server for running: asks for its state, or takes the last one where nobody answers.

A resharded checkpoint's state is its manifest. That of original shards is made from their headers once; then the server
is asked only whether each is still what it was. This file knows manifests and addresses; it must not know tensors.
"""

import json
from collections.abc import Mapping
from contextlib import closing
from dataclasses import dataclass, field, replace

import manifests
from manifests import gguf_files, hub, remote, urls
from manifests.checkpoint import Checkpoint
from manifests.config import model_facts, read_config
from manifests.digest import sha256_hex
from manifests.errors import ManifestError, RemoteError, SourceNotFoundError
from manifests.gguf_files import GgufModel
from manifests.header import Header
from manifests.http import Facts, RemoteFile
from manifests.in_place import describe_in_place
from manifests.paths import INDEX_NAME, MANIFEST_NAME
from manifests.questions import Watch, each
from manifests.remote import RemoteFolder
from manifests.schema import Manifest
from manifests.storage import MAX_MANIFEST_BYTES, decode, encode
from runner import notes
from runner.cache_folder import CacheFolder, find_root
from runner.remote_folder import CachedFolder, keep_header

_FACTS_NAME = "facts.json"
_TRIES_WITH_CACHE = 2
"""Failures that are borne where the cache can stand in."""


@dataclass(frozen=True, slots=True, kw_only=True)
class _State:
    """One state of a checkpoint, as the cache has it.

    Attributes:
        key: Its name there.
        manifest: What it holds.
        etag: What the server calls its manifest; None when it does not say, or there is none.
        base: Stands for the address of the folder, which says the commit on the Hub, and may hold a signature.
        facts: Of original shards and their index, by name.
    """

    key: str
    manifest: Manifest
    etag: str | None
    base: str
    facts: Mapping[str, Facts] = field(default_factory=dict)


def open_cached(text: str, cache_bytes: int | None = None, watch: Watch | None = None) -> Checkpoint:
    """Open a checkpoint on a web server or on the Hugging Face Hub; what is read of it is kept in the cache.

    Args:
        text: Its address; of a GGUF model that of a file of it, or of a folder on the Hub.
        cache_bytes: The most that the cache may take of its disk; any number when None.
        watch: Is told how far the headers of original shards are.

    Raises:
        SourceNotFoundError, ManifestError, IntegrityError, RemoteError: See `manifests.remote.open_remote`.
        ToolkitError: The cache cannot be written to.
    """
    if urls.is_hub(text) and hub.is_offline(text):
        try:
            return manifests.open(text)
        except SourceNotFoundError:
            pass  # not downloaded as a whole; what was needed of it may be in the cache
    cache = CacheFolder(find_root(), cache_bytes)
    name = urls.same(text)
    place = sha256_hex(name.encode())[:32]
    last = _last(cache, place)
    origin: RemoteFolder | None = None
    offline: str | None = None
    try:
        if urls.is_hub(text) and hub.is_offline(text):
            raise RemoteError(f"{text}: HF_HUB_OFFLINE is set")
        origin, file = remote.find(text)
        if file is not None and not file.endswith(gguf_files.SUFFIX):
            raise SourceNotFoundError(f"{origin.where(file)}: is one file; give the folder of the whole checkpoint")
        state = _ask(cache, origin, file, last, watch)
        if state != last:
            note = {"state": state.key, "etag": state.etag, "base": state.base}
            cache.put(cache.place(place), notes.encode(note))
    except RemoteError as error:
        if last is None:
            raise
        state, offline = last, str(error)
    files = [file.path for file in state.manifest.files]
    shown = text.rstrip("/") if urls.is_hub(text) else urls.shown(name)
    folder = CachedFolder(
        cache,
        state.key,
        state.manifest,
        name=shown.rpartition("/")[0] if urls.last_part(name) in files else shown,
        origin=origin,
        offline=offline,
        facts=state.facts,
    )
    if _is_gguf(state.manifest):
        model = gguf_files.read_folder(folder, files)
        for file, header in model.shards.items():
            # Again where one was damaged, and came from the server now.
            keep_header(cache, state.key, file, header.raw)
        return gguf_files.open_gguf(folder, model)
    return Checkpoint(folder, state.manifest)


def _last(cache: CacheFolder, place: str) -> _State | None:
    """The state that an address had last; None when it was never asked, or that is no longer in the cache."""
    note = notes.read(cache.place(place))
    if note.keys() != {"state", "etag", "base"}:
        return None
    key = note["state"]
    path = cache.state(key) / MANIFEST_NAME
    try:
        raw = path.read_bytes()
        manifest, noted = decode(raw, what=str(path)), b""
        if manifest.layout != "resharded":
            noted = (cache.state(key) / _FACTS_NAME).read_bytes()
    except (OSError, ManifestError):
        return None
    if _key(raw, noted) != key:
        return None
    facts = {
        name: Facts(size=size, etag=etag, modified=at) for name, (size, etag, at) in json.loads(noted or "{}").items()
    }
    return _State(key=key, manifest=manifest, etag=note["etag"], base=note["base"], facts=facts)


def _key(raw: bytes, noted: bytes = b"") -> str:
    """The name of a state: the digest of its manifest, and of what is noted of original shards."""
    return sha256_hex(raw + noted)


def _base(origin: RemoteFolder) -> str:
    return sha256_hex(origin.url.encode())


def _is_gguf(manifest: Manifest) -> bool:
    return any(file.path.endswith(gguf_files.SUFFIX) for file in manifest.files)


def _ask(
    cache: CacheFolder, origin: RemoteFolder, file: str | None, last: _State | None, watch: Watch | None
) -> _State:
    """The state that a folder, or the model of a file in it, has now; `last` when that is still it."""
    base = _base(origin)
    if last is not None and origin.files is not None and last.base == base:
        return last  # the same commit
    is_resharded = last is not None and last.manifest.layout == "resharded"
    tries = None if last is None else _TRIES_WITH_CACHE
    if file is None and (origin.files is None or MANIFEST_NAME in origin.files):
        etag = last.etag if last is not None and is_resharded else None
        found = origin.document(MANIFEST_NAME, max_bytes=MAX_MANIFEST_BYTES, etag=etag, tries=tries)
        if found is None and last is not None and etag is not None:
            return replace(last, base=base)
        if found is not None:
            key = _key(found.content)
            if last is not None and key == last.key:
                return replace(last, etag=found.etag, base=base)
            manifest = decode(found.content, what=origin.where(MANIFEST_NAME))
            cache.put(cache.state(key) / MANIFEST_NAME, found.content)
            return _State(key=key, manifest=manifest, etag=found.etag, base=base)
    if last is not None and not is_resharded and _is_same(origin, last):
        return replace(last, base=base)
    return _read_headers(cache, origin, file, watch)


def _read_headers(cache: CacheFolder, origin: RemoteFolder, file: str | None, watch: Watch | None) -> _State:
    """The state of original shards or of a GGUF model, from their headers."""
    headers: Mapping[str, Header]
    model = _find_gguf(origin, file, watch)
    if model is not None:
        headers, index = model.shards, []
        manifest = gguf_files.open_gguf(origin, model).manifest
    else:
        headers = remote.read_shards(origin, watch)
        index = [INDEX_NAME] if origin.size(INDEX_NAME) is not None else []
        manifest = describe_in_place(headers, model_facts(read_config(origin)))
    facts = {name: origin.file(name).facts for name in [*headers, *index]}
    note = {name: [one.size, one.etag, one.modified] for name, one in facts.items()}
    raw, noted = encode(manifest), json.dumps(note, sort_keys=True).encode("ascii")
    key = _key(raw, noted)
    for name, header in model.shards.items() if model is not None else ():
        keep_header(cache, key, name, header.raw)
    cache.put(cache.state(key) / _FACTS_NAME, noted)
    cache.put(cache.state(key) / MANIFEST_NAME, raw)
    return _State(key=key, manifest=manifest, etag=None, base=_base(origin), facts=facts)


def _find_gguf(origin: RemoteFolder, file: str | None, watch: Watch | None) -> GgufModel | None:
    if file is not None:
        return gguf_files.read_set(origin, file, watch)
    names = remote.find_gguf(origin)
    return gguf_files.read_folder(origin, names, watch=watch) if names else None


def _is_same(origin: RemoteFolder, last: _State) -> bool:
    """Whether index and shards on the server are still those of a state; a byte of each is asked for, no header."""
    if INDEX_NAME not in last.facts and not _is_gguf(last.manifest) and origin.size(INDEX_NAME) is not None:
        return False
    # Not the files that the folder keeps: these are asked again if one is another.
    files = [(RemoteFile(origin.web, urls.join(origin.url, name)), facts) for name, facts in last.facts.items()]
    asked = each(lambda one: one[0].facts.differs(one[1]), files, at_once=remote.REQUESTS_AT_ONCE)
    with closing(asked) as differing:
        try:
            return not any(differing)
        except SourceNotFoundError:
            return False
