"""A checkpoint's small files beside its tensors, by name: tokenizer, its settings, defaults of generation.

They are files of the checkpoint's folder. What a GGUF file has inside counts as if it were such a file, where the
folder has none of that name. This file knows names and bytes; what they mean is known to whoever asks for them.
"""

from collections.abc import Callable, Mapping

from manifests.folder import Folder


class Auxiliary:
    """The small files of one checkpoint.

    Args:
        folder: Where it is.
        derived: By name, what gives the bytes of a file that the folder need not have; None where it cannot be given.
        derived_from: Bytes of what they are made from, all of which is read for each of them.

    Attributes:
        folder: As given.
        derived_from: As given.
    """

    def __init__(
        self, folder: Folder, derived: Mapping[str, Callable[[], bytes | None]] | None = None, derived_from: int = 0
    ) -> None:
        self.folder = folder
        self.derived_from = derived_from
        self._derived = derived or {}

    def size(self, name: str) -> int | None:
        """Bytes of the folder's own file; None when it has none."""
        return self.folder.size(name)

    def where(self, name: str) -> str:
        """Where its bytes come from, for messages."""
        if name not in self._derived or self.folder.size(name) is not None:
            return self.folder.where(name)
        return f"{name} of the GGUF file in {self.folder}"

    def read(self, name: str, *, max_bytes: int) -> bytes | None:
        """All bytes of one file; None when there is none.

        Raises:
            ManifestError: It is larger than max_bytes, or a link that leaves the folder; or what it is made from has a
                wrong value.
            ToolkitError: It cannot be read; see `open_regular`.
            UnsupportedModelError: What it is made from asks for something that is not known here.
        """
        raw = self.folder.read(name, max_bytes=max_bytes)
        if raw is not None or (derive := self._derived.get(name)) is None:
            return raw
        return derive()
