"""The model's own chat template: messages in, one prompt text out.

Knows Jinja and where checkpoints keep a template. It must not know token ids, tensors or the engine.

A template is a program from a downloaded file, so it runs in Jinja's immutable sandbox: no attribute of Python's
own, no change of the messages, no file, no import. The names it finds are those that published templates expect:
``messages``, ``bos_token``, ``eos_token``, ``add_generation_prompt``, ``thinking``, ``raise_exception``,
``strftime_now`` and a ``tojson`` that leaves every letter as it is.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from datetime import datetime
from typing import Any, NoReturn

from jinja2 import TemplateError, nodes
from jinja2.exceptions import SecurityError
from jinja2.sandbox import ImmutableSandboxedEnvironment

from manifests.auxiliary import Auxiliary
from manifests.errors import ManifestError, ToolkitError

Message = Mapping[str, str]
"""``{"role": "system" | "user" | "assistant" | "tool", "content": text}``."""

TEMPLATE_FILE = "chat_template.jinja"
MAX_TEMPLATE_BYTES = 1_000_000


class ChatTemplate:
    """A compiled chat template.

    Attributes:
        source: Where it came from, for messages.
        has_thinking: Whether the template asks for ``thinking``; if not, that switch does nothing.
    """

    def __init__(self, template: str, *, source: str) -> None:
        """Compile a template.

        Raises:
            ManifestError: It is not a valid Jinja template.
        """
        self.source = source
        environment = ImmutableSandboxedEnvironment(
            trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"]
        )
        environment.filters["tojson"] = _to_json
        environment.globals["raise_exception"] = _raise_exception
        environment.globals["strftime_now"] = _strftime_now
        try:
            syntax = environment.parse(template)
            self._template = environment.from_string(template)
        except (TemplateError, RecursionError) as error:
            raise ManifestError(f"{source}: not a valid chat template: {error}") from error
        self.has_thinking = any(name.name == "thinking" for name in syntax.find_all(nodes.Name))

    @classmethod
    def find(cls, auxiliary: Auxiliary, tokenizer_config: Mapping[str, Any]) -> ChatTemplate | None:
        """The template of a checkpoint, or None when it has none.

        A file ``chat_template.jinja`` wins over tokenizer_config.json, as in the library that writes both.

        Raises:
            ManifestError: There is one, but it cannot be used.
        """
        raw = auxiliary.read(TEMPLATE_FILE, max_bytes=MAX_TEMPLATE_BYTES)
        if raw is not None:
            source = auxiliary.where(TEMPLATE_FILE)
            try:
                return cls(raw.decode("utf-8"), source=source)
            except UnicodeDecodeError as error:
                raise ManifestError(f"{source}: not UTF-8 at byte {error.start}; the file is damaged") from error
        source = f"chat_template in {auxiliary.where('tokenizer_config.json')}"
        value = tokenizer_config.get("chat_template")
        if value is None:
            return None
        if isinstance(value, list):
            value = _default_of(value, source)
        if not isinstance(value, str):
            raise ManifestError(f"{source}: must be a text or a list of named templates")
        return cls(value, source=source)

    def render(
        self,
        messages: Sequence[Message],
        *,
        bos_token: str,
        eos_token: str,
        add_generation_prompt: bool = True,
        thinking: bool = False,
    ) -> str:
        """Write the conversation as the model was trained to read it.

        Raises:
            ToolkitError: The template refuses these messages.
            ManifestError: The template itself fails, or tries to leave the sandbox.
        """
        try:
            return self._template.render(
                # Copies: what a template does to them must not reach the caller.
                messages=[dict(message) for message in messages],
                bos_token=bos_token,
                eos_token=eos_token,
                add_generation_prompt=add_generation_prompt,
                thinking=thinking,
            )
        except _RefusedByTemplateError as error:
            raise ToolkitError(f"{self.source} refuses this conversation: {error}") from error
        except SecurityError as error:
            raise ManifestError(f"{self.source} reaches for what a template may not use: {error}") from error
        except Exception as error:
            # Any Python error can come out of a template (a sum of text and None, a division by zero).
            raise ManifestError(f"{self.source} fails: {type(error).__name__}: {error}") from error


class _RefusedByTemplateError(TemplateError):
    """Raised by the template's own ``raise_exception``."""


def _default_of(templates: Sequence[Any], source: str) -> Any:
    """Pick from ``[{"name": ..., "template": ...}, ...]`` the one named default."""
    by_name = {item.get("name"): item.get("template") for item in templates if isinstance(item, dict)}
    if "default" not in by_name:
        names = ", ".join(repr(name) for name in by_name) or "none"
        raise ManifestError(f"{source}: no template is named 'default' (there are: {names})")
    return by_name["default"]


def _raise_exception(message: str) -> NoReturn:
    raise _RefusedByTemplateError(message)


def _strftime_now(pattern: str) -> str:
    return datetime.now().strftime(pattern)


def _to_json(value: Any, indent: int | None = None) -> str:
    # Jinja's own escapes letters beyond ASCII and the signs of HTML; a model was trained on neither.
    return json.dumps(value, ensure_ascii=False, indent=indent)
