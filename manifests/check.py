"""Whether the files of a resharded checkpoint are there and have the form that the manifest says.

Sizes and headers are looked at, payloads are not: that takes seconds where `reshard verify` reads every byte.
"""

from collections.abc import Callable
from contextlib import closing
from functools import partial

from manifests.checkpoint import Checkpoint
from manifests.digest import sha256_hex
from manifests.errors import Problem, RemoteError, ToolkitError
from manifests.folder import Folder
from manifests.questions import each


def check_files(checkpoint: Checkpoint, watch: Callable[[int, int], None] | None = None) -> list[Problem]:
    """All problems of the files that the manifest names; empty when they are as described.

    Args:
        checkpoint: What to look at.
        watch: Is told how many of how many files were looked at.

    Raises:
        RemoteError: A server cannot be reached, or does not do what is asked.
    """
    files = [
        # A compressed file has no header that could be looked at.
        (file.path, file.size, file.header_size, file.header_sha256 if file.codec == "none" else None)
        for file in checkpoint.manifest.files
    ] + [(document.path, document.size, 0, None) for document in checkpoint.manifest.documents]
    problems: list[Problem] = []
    with closing(each(partial(_check, checkpoint.folder), files, at_once=checkpoint.folder.at_once)) as answers:
        for number, found in enumerate(answers, start=1):
            problems += found
            if watch is not None:
                watch(number, len(files))
    return problems


def _check(folder: Folder, described: tuple[str, int, int, str | None]) -> list[Problem]:
    path, size, header_size, header_sha256 = described
    try:
        wanted = header_size if header_sha256 is not None else 1
        with folder.open(path, first=wanted) as file:
            raw, found = file.read(0, wanted), file.size
    except RemoteError:
        raise  # nothing is known of the file
    except ToolkitError as error:
        message = str(error).removeprefix(f"{folder.where(path)}: ")
        return [Problem(loc=path, kind="missing_file", message=message)]
    if found != size:
        return [Problem(loc=path, kind="invalid_file", message=f"has {found} bytes, the manifest says {size}")]
    # The header's bytes are compared by digest: a header of other form, order or padding is another header.
    if header_sha256 is not None and sha256_hex(raw) != header_sha256:
        return [Problem(loc=path, kind="invalid_file", message="its header is not the one the manifest describes")]
    return []
