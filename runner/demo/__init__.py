"""The embedded demo model: a small, trained checkpoint in DeepSeek-V3's published form, and the code that made it.

`path()` is all that the rest of the runner needs. The training code is imported by nobody else.
"""

from __future__ import annotations

from pathlib import Path


def path() -> Path:
    """Folder of the embedded checkpoint (163 shards, index, config, tokenizer)."""
    return Path(__file__).parent / "model"
