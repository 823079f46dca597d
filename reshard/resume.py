"""What an earlier run left in a destination, and how much of it is to be believed.

A journal's record vouches for tensors. A file is believed when it is there with its size; its digests are computed as
well where there is doubt: in files that were unfinished, before a source is freed on the strength of an earlier run,
and everywhere when asked to. What is not believed is done again, what nobody vouches for is removed.
"""

import os
from collections.abc import Collection
from contextlib import closing
from pathlib import Path

from manifests.digest import CHUNK_BYTES, TensorHasher
from manifests.errors import IntegrityError, ToolkitError
from reshard.blocks import Reader, Writer, temporary_path
from reshard.plan import Plan, PlannedFile, PlannedTensor
from reshard.progress import Progress
from reshard.transfer import Durable


def check_claims(
    plan: Plan,
    destination: Path,
    durable: Durable,
    *,
    doubted_shards: Collection[str],
    gone_shards: Collection[str],
    paranoid: bool,
    progress: Progress,
) -> None:
    """Strike from `durable` what is not on disk, and remove the files that it does not vouch for.

    Args:
        plan: All files of the run.
        destination: Their folder.
        durable: The claims; changed in place.
        doubted_shards: Shards whose tensors are hashed again in any case.
        gone_shards: Shards that were freed, so that nothing of theirs can be done again.
        paranoid: Whether all tensors are hashed again.
        progress: Counts bytes that are hashed.

    Raises:
        IntegrityError: What a freed shard gave is not here as it should be; then its file is left as it is.
    """
    for file in plan.files:
        claimed = [tensor for tensor in file.tensors if tensor.name in durable.tensors]
        path = destination / file.path
        partial = temporary_path(path)
        if claimed and len(claimed) < len(file.tensors) and path.exists():
            # It got its name, and then the record that says so was lost.
            os.rename(path, partial)
        is_named = path.exists()
        doubted = [tensor for tensor in claimed if paranoid or not is_named or tensor.shard in doubted_shards]
        where = path if is_named else partial
        has_size = _has_size(where, file.size)
        wrong = _wrong_tensors(where, doubted, durable, progress) if has_size else claimed
        begun = [tensor for tensor in file.tensors if tensor.name in durable.begun]
        for tensor in _wrongly_begun(where, begun, durable, progress) if has_size else list(begun):
            del durable.begun[tensor.name]
            begun.remove(tensor)
        for tensor in wrong:
            durable.lost[tensor.name] = durable.tensors.pop(tensor.name)
        require_sources(where, file, durable.tensors, gone_shards)
        right = len(claimed) - len(wrong)
        if not right and not begun:
            path.unlink(missing_ok=True)
            partial.unlink(missing_ok=True)
        elif right < len(file.tensors):
            if is_named:
                os.rename(path, partial)
        elif not is_named or (doubted and not _has_header(path, file)):
            if is_named:
                os.rename(path, partial)
            _finish(path, file)
        else:
            partial.unlink(missing_ok=True)


def require_sources(where: Path, file: PlannedFile, durable: Collection[str], gone_shards: Collection[str]) -> None:
    """Refuse to go on when a tensor of a file is neither durable nor to be had from its shard.

    Raises:
        IntegrityError: With what to do.
    """
    for tensor in file.tensors:
        if tensor.shard in gone_shards and tensor.name not in durable:
            raise IntegrityError(
                f"{where}: tensor {tensor.name!r} is damaged, and {tensor.shard}, which it came from, was freed; "
                f"put a good copy of {file.path} there and run again"
            )


def _has_size(path: Path, size: int) -> bool:
    try:
        return path.stat().st_size == size
    except OSError:
        return False


def _wrong_tensors(
    path: Path, doubted: list[PlannedTensor], durable: Durable, progress: Progress
) -> list[PlannedTensor]:
    """Those whose bytes are not what the journal says."""
    if not doubted:
        return []
    progress.at(f"check {path.name}")
    with closing(Reader(path)) as reader:
        return [tensor for tensor in doubted if _chunks(reader, tensor, progress) != durable.tensors[tensor.name]]


def _wrongly_begun(path: Path, begun: list[PlannedTensor], durable: Durable, progress: Progress) -> list[PlannedTensor]:
    """Those whose first chunks are not what the journal says."""
    if not begun:
        return []
    progress.at(f"check {path.name}")
    wrong = []
    with closing(Reader(path)) as reader:
        for tensor in begun:
            chunks = durable.begun[tensor.name]
            size = len(chunks) * CHUNK_BYTES
            if size >= tensor.size or _chunks(reader, tensor, progress, size) != chunks:
                wrong.append(tensor)
    return wrong


def _chunks(reader: Reader, tensor: PlannedTensor, progress: Progress, size: int | None = None) -> tuple[str, ...]:
    """Digests of a tensor, or of its first bytes, as it is here; none when it cannot be read."""
    hasher = TensorHasher()
    try:
        for block in reader.blocks(tensor.output_offset, tensor.size if size is None else size):
            hasher.update(block)
            progress.advance(len(block))
    except ToolkitError:
        return ()
    return hasher.chunks()


def _has_header(path: Path, file: PlannedFile) -> bool:
    with closing(Reader(path)) as reader:
        try:
            return b"".join(bytes(block) for block in reader.blocks(0, len(file.header))) == file.header
        except ToolkitError:
            return False


def _finish(path: Path, file: PlannedFile) -> None:
    """Give a file with its temporary name, whose tensors are all right, its header and its name."""
    writer = Writer(path, adopt=True)
    try:
        writer.write(file.header, 0)
        writer.finish()
    finally:
        writer.close()
