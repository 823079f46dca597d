"""The one exception tree of all three packages.

Every class carries the exit code its command ends with. A message is one sentence: what happened, where,
and what to do about it. This file knows nothing else; it imports nothing from the project.
"""

from collections.abc import Sequence
from dataclasses import dataclass


class ToolkitError(Exception):
    """Any failure that the tools know and can explain."""

    exit_code = 1


class IncompleteError(ToolkitError):
    """Something is missing or unfinished; the same command, or a fuller source, can complete it."""

    exit_code = 3


class SourceNotFoundError(ToolkitError, FileNotFoundError):
    """There is no checkpoint, manifest or file at the given place."""

    exit_code = 10

    def __str__(self) -> str:
        # OSError formats itself from errno and file name; ours is a plain sentence.
        return str(self.args[0]) if self.args else ""


class ForbiddenError(SourceNotFoundError):
    """A server does not let a file be read; some say so of files that are not there."""


class RemoteError(ToolkitError):
    """A server cannot be reached, or does not do what is asked; what was read of it is kept."""


class LockedError(ToolkitError):
    """Another process writes this destination."""

    exit_code = 11


@dataclass(frozen=True, slots=True, kw_only=True)
class Problem:
    """One fault of a document.

    Attributes:
        loc: Where, as a path such as ``files[3].tensors[0].shape``; empty for the whole document.
        kind: Machine-readable class: ``invalid_json``, ``missing_key``, ``unknown_key``, ``invalid_type``,
            ``invalid_value``, ``inconsistent``, ``missing_file`` or ``invalid_file``.
        message: One sentence for people.
    """

    loc: str
    kind: str
    message: str


class ManifestError(ToolkitError):
    """A manifest, index, header or config is invalid; carries every problem that was found."""

    exit_code = 12

    def __init__(self, message: str, problems: Sequence[Problem] = ()) -> None:
        super().__init__(message)
        self.problems = tuple(problems)


class IntegrityError(ToolkitError):
    """Bytes, sizes or digests are not what the manifest or the header promised."""

    exit_code = 13


class UnsupportedModelError(ToolkitError):
    """The checkpoint asks for something that is not implemented; it is refused, never guessed."""

    exit_code = 14


class ResourceError(ToolkitError):
    """Too little disk space, memory or context for what was asked."""

    exit_code = 15
