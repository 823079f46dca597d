"""A checkpoint's small files beside its tensors, by name: tokenizer, its settings, defaults of generation.

They are files of the checkpoint's folder. What a GGUF file has inside counts as if it were such a file, where the
folder has none of that name. This file knows names and bytes; what they mean is known to whoever asks for them.
"""

from collections.abc import Callable, Mapping
from pathlib import Path

from manifests.errors import ManifestError
from manifests.readable import open_regular
from manifests.safety import resolve_inside


class Auxiliary:
    """The small files of one checkpoint.

    Args:
        root: Its folder.
        derived: By name, what gives the bytes of a file that the folder need not have; None where it cannot be given.
        derived_from: Bytes of what they are made from, all of which is read for each of them.

    Attributes:
        root: As given.
        derived_from: As given.
    """

    def __init__(
        self, root: Path, derived: Mapping[str, Callable[[], bytes | None]] | None = None, derived_from: int = 0
    ) -> None:
        self.root = root
        self.derived_from = derived_from
        self._derived = derived or {}

    def size(self, name: str) -> int | None:
        """Bytes of the folder's own file; None when it has none."""
        path = self.root / name
        return path.stat().st_size if path.is_file() else None

    def where(self, name: str) -> str:
        """Where its bytes come from, for messages."""
        path = self.root / name
        return str(path) if path.is_file() or name not in self._derived else f"{name} of the GGUF file in {self.root}"

    def read(self, name: str, *, max_bytes: int) -> bytes | None:
        """All bytes of one file; None when there is none.

        Raises:
            ManifestError: It is larger than max_bytes, or a link that leaves the folder; or what it is made from has a
                wrong value.
            ToolkitError: It cannot be read; see `open_regular`.
            UnsupportedModelError: What it is made from asks for something that is not known here.
        """
        if (self.root / name).is_file():
            path = resolve_inside(self.root, name)
            with open_regular(path) as file:
                raw = file.read(0, max_bytes + 1)
            if len(raw) > max_bytes:
                raise ManifestError(f"{path}: larger than {max_bytes} bytes, which no such file needs")
            return raw
        derive = self._derived.get(name)
        return None if derive is None else derive()
