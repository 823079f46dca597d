"""Addresses of files that are not on this machine: which texts are one, how a name is put behind it, how it is shown.

An address may hold a password or a signature; what is shown of it never does. Nothing is asked of any server here.
"""

import base64
import re
from dataclasses import dataclass
from urllib.parse import SplitResult, quote, unquote, urlsplit, urlunsplit

from manifests.errors import SourceNotFoundError

HUB_SCHEME = "hf"
_SCHEME = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*://")
_PLAIN = "/%:@!$&'()*+,;=~-._"
_PORTS = {"http": 80, "https": 443}


@dataclass(frozen=True, slots=True, kw_only=True)
class Address:
    """A folder or a file on a web server.

    Attributes:
        url: Without user, password and fragment.
        authorization: The header that stands for user and password; None without them.
    """

    url: str
    authorization: str | None = None


def is_url(text: object) -> bool:
    """Whether a text that names a checkpoint is an address and not a path."""
    return isinstance(text, str) and _SCHEME.match(text) is not None


def is_hub(text: str) -> bool:
    """Whether an address names a repository of the Hugging Face Hub."""
    return text.lower().startswith(f"{HUB_SCHEME}://")


def parse(text: str) -> Address:
    """The address of a web server that a text is.

    Raises:
        SourceNotFoundError: It has another scheme, no host, or a port that is none.
    """
    parts = _split(text)
    host = "" if parts is None else parts.netloc.rpartition("@")[2]
    # Once more without what stands before the host: a bracket there may have closed one behind it.
    if parts is None or parts.scheme not in _PORTS or not parts.hostname or _split(f"http://{host}") is None:
        scheme = text.partition("://")[0].lower()
        advice = "give the path itself" if scheme == "file" else "http, https and hf addresses are read"
        raise SourceNotFoundError(f"{shown(text)}: cannot be read; {advice}")
    authorization = None
    if parts.username is not None:
        authorization = _basic(parts.username, parts.password or "")
    # Spaces and letters beyond ASCII may be typed; what is escaped already stays so.
    path, query = quote(parts.path, safe=_PLAIN), quote(parts.query, safe=_PLAIN + "?[]")
    return Address(url=urlunsplit((parts.scheme, host, path, query, "")), authorization=authorization)


def join(folder: str, name: str) -> str:
    """The address of a file below a folder; a query, such as a signature for all of it, goes with it.

    Args:
        folder: An address as `parse` gives it.
        name: A relative path that was checked (see `manifests.safety.check_relative`).
    """
    parts = urlsplit(folder)
    return urlunsplit(parts._replace(path=f"{parts.path.rstrip('/')}/{quote(name)}"))


def origin(url: str) -> tuple[str, str, int]:
    """Scheme, host and port: who is asked, and so who may be told a password."""
    parts = urlsplit(url)
    return parts.scheme, (parts.hostname or "").lower(), parts.port or _PORTS.get(parts.scheme, 0)


def shown(url: str) -> str:
    """An address for messages, without password, signature or fragment."""
    parts = _split(url)
    if parts is None:
        # Where its secret ends cannot be told.
        scheme = _SCHEME.match(url)
        return f"{scheme[0] if scheme else ''}..." if {"@", "?", "#"} & set(url) else repr(url[:60])
    return urlunsplit((parts.scheme, parts.netloc.rpartition("@")[2], parts.path, "", ""))


def shown_place(text: str) -> str:
    """A path as it was given; an address without what is secret in it."""
    return shown(text) if is_url(text) else text


def proxy_of(text: str) -> Address:
    """The address of a proxy as the environment names it, where many leave out the scheme."""
    scheme, _, rest = (text if is_url(text) else f"http://{text}").partition("://")
    userinfo, at, host = rest.rpartition("@")
    user, _, password = userinfo.partition(":")
    return Address(url=f"{scheme}://{host}", authorization=_basic(user, password) if at else None)


def last_part(url: str) -> str:
    """The name of the file that an address ends in; empty for one that ends in a slash."""
    return unquote(urlsplit(url).path.rpartition("/")[2])


def parent(url: str) -> str:
    """The address of the folder that a file is in."""
    parts = urlsplit(url)
    return urlunsplit(parts._replace(path=parts.path.rpartition("/")[0]))


def _basic(user: str, password: str) -> str:
    """The header for a user and password as they stand in an address."""
    return f"Basic {base64.b64encode(f'{unquote(user)}:{unquote(password)}'.encode()).decode('ascii')}"


def _split(text: str) -> SplitResult | None:
    """The parts of an address; None when it cannot be one."""
    try:
        parts = urlsplit(text)
        _ = parts.port  # refuses one that is no number
    except ValueError:
        return None
    if "@" in parts.fragment or not text.isprintable():  # a # in a password ends the host
        return None
    return parts
