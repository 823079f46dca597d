"""A server that answers as the Hub does for one repository: it lists files, sends small ones, and redirects for others.

with serve(folder) as server, fake_hub(folder, server.url, monkeypatch) as hub:
    manifests.open(NAME)
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from tests.file_server import Answer, Asked, FileServer

REPOSITORY = "org/tiny"
COMMIT = "0123456789abcdef0123456789abcdef01234567"
NAME = f"hf://{REPOSITORY}"
LARGE = (".safetensors", ".gguf")
"""What lies elsewhere, and has a published sha256."""

_API = f"/api/models/{REPOSITORY}"
_FILES = f"/{REPOSITORY}/resolve/{COMMIT}/"


class FakeHub(FileServer):
    """The Hub, with a repository of what a folder holds.

    Attributes:
        far: Address of another server that has the folder's large files.
        published: Gives the sha256 that is listed of a large file.
    """

    def __init__(self, folder: Path, far: str) -> None:
        super().__init__(folder)
        self.far = far
        self.published: Callable[[Path], str] = lambda path: hashlib.sha256(path.read_bytes()).hexdigest()

    def right(self, asked: Asked) -> Answer:
        """The Hub's answer to a request."""
        if asked.path in (_API, f"{_API}/revision/main", f"{_API}/revision/v1"):
            return Answer(200, {"Content-Type": "application/json"}, json.dumps(self._model()).encode())
        if asked.path.startswith("/api/"):
            return Answer(404, {"X-Error-Code": "RevisionNotFound" if "/revision/" in asked.path else "RepoNotFound"})
        name = asked.path.removeprefix(_FILES)
        if name.endswith(LARGE):
            return Answer(302, {"Location": f"{self.far}/{name}?Signature=x"})
        return super().right(replace(asked, path=f"/{name}"))

    def _model(self) -> dict[str, Any]:
        assert self.root is not None
        siblings = []
        for file in sorted(self.root.rglob("*")):
            if file.is_file():
                size = file.stat().st_size
                siblings.append({"rfilename": file.relative_to(self.root).as_posix(), "size": size, "blobId": "0" * 40})
                if file.name.endswith(LARGE):
                    siblings[-1]["lfs"] = {"size": size, "sha256": self.published(file), "pointerSize": 130}
        return {"id": REPOSITORY, "sha": COMMIT, "siblings": siblings, "private": False}


@contextmanager
def fake_hub(folder: Path, far: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeHub]:
    """Have the Hub's package, with a token, ask a Hub of our own until the end of the block."""
    hub = FakeHub(folder, far)
    hub.start()
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", hub.url)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    try:
        yield hub
    finally:
        hub.stop()
