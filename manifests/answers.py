"""What a server's answer, or the want of one, means: go on, try again later, or give up with a sentence.

Knows statuses, headers and failures of connections; it must not know what was asked for.
"""

import email.utils
import os
import re
import ssl
import time
from types import ModuleType
from typing import TYPE_CHECKING
from urllib.parse import urlsplit

from manifests import urls
from manifests.errors import ForbiddenError, RemoteError, SourceNotFoundError, ToolkitError

if TYPE_CHECKING:
    import urllib3

CONNECT_S = 15.0
SILENCE_S = 60.0
"""How long a server may send nothing."""

ABSENT = frozenset({404, 410})
FORBIDDEN = frozenset({401, 403})
EXPIRED = ABSENT | FORBIDDEN | {400}
"""What servers say of a signed address whose time is over."""

WEB_PAGE = "the server sends a web page in its place; it may want you to log in"

_BUSY = frozenset({408, 425, 429})
_FINAL = frozenset({501, 505, 511})
_AS_THEY_ARE = frozenset({"", "identity", "aws-chunked"})
"""Encodings of a body that change no byte of it; the last is what clients of S3 leave behind when they store a file."""


class PassingError(Exception):
    """A failure that may pass.

    Attributes:
        pause_s: How long the server asks to wait; 0 where there is nothing to wait for, None when it does not say.
        waited_s: How long it was waited for already.
    """

    def __init__(self, reason: str, pause_s: float | None = None, *, waited_s: float = 0.0) -> None:
        super().__init__(reason)
        self.pause_s = pause_s
        self.waited_s = waited_s


def library() -> ModuleType:
    """The package urllib3, imported when it is first needed.

    Raises:
        ToolkitError: It is not installed.
    """
    try:
        import urllib3
    except ImportError as error:
        raise ToolkitError("web servers are read with urllib3: `pip install 'expert-reshard[http]'`") from error
    return urllib3


def refuse(response: "urllib3.BaseHTTPResponse", url: str) -> None:
    """Raise what a status means that no request goes on with."""
    where = urls.shown(url)
    status = response.status
    if status in _BUSY or (status >= 500 and status not in _FINAL):
        raise PassingError(f"the server answers with status {status}", _pause(response))
    if status in ABSENT:
        raise SourceNotFoundError(f"{where}: the server has no such file")
    if status in FORBIDDEN:
        signed = "the signature in the address may have expired; or " if urlsplit(url).query else ""
        raise ForbiddenError(
            f"{where}: the server does not let you read it (status {status}); {signed}give a user and password "
            "that it knows in the address, or for the Hub a token in HF_TOKEN"
        )
    if status == 407:
        raise RemoteError(f"{where}: the proxy of the environment wants a user and password, in its own address")
    encoding = response.headers.get("Content-Encoding", "")
    if status in (200, 206) and {part.strip().lower() for part in encoding.split(",")} - _AS_THEY_ARE:
        raise RemoteError(f"{where}: the server sends it compressed ({encoding!r:.40}), so its bytes cannot be told")


def _pause(response: "urllib3.BaseHTTPResponse") -> float | None:
    """Seconds that the server asks to wait; None when it does not, or not in a way that can be read."""
    text = response.headers.get("Retry-After", "").strip()
    if re.fullmatch(r"[0-9]{1,9}", text):
        return float(text) or None
    try:
        return max(0.0, email.utils.parsedate_to_datetime(text).timestamp() - time.time()) or None
    except (ValueError, OverflowError):
        return None


def explain(error: Exception, url: str) -> PassingError:
    """What a failed connection was.

    Raises:
        RemoteError: It will not get better by trying again.
    """
    exceptions = library().exceptions
    if isinstance(error, exceptions.SSLError):
        cause = error.args[0] if error.args else None
        if "BAD_RECORD_MAC" in str(getattr(cause, "reason", "")):
            return PassingError("the connection broke")  # a bit of what was sent changed on the way
        advice = ""
        if isinstance(cause, ssl.SSLCertVerificationError):
            named = os.environ.get("SSL_CERT_FILE")
            advice = "; for a certificate of your own name its authority in SSL_CERT_FILE"
            if named and not os.path.isfile(named):
                advice = f"; SSL_CERT_FILE names {named}, and there is no such file"
        elif "WRONG_VERSION_NUMBER" in str(getattr(cause, "reason", "")):
            advice = "; it does not speak https, try http"
        raise RemoteError(f"{urls.shown(url)}: no secure connection: {error}{advice}") from error
    if isinstance(error, exceptions.LocationParseError | exceptions.LocationValueError):
        raise RemoteError(f"{urls.shown(url)}: is no address that can be asked") from error
    reasons = (
        (exceptions.NameResolutionError, "its host name cannot be found", 0.0),
        (exceptions.NewConnectionError, "its server cannot be reached", 0.0),
        (exceptions.ConnectTimeoutError, f"its server did not answer within {CONNECT_S:.0f} s", CONNECT_S),
        (exceptions.ReadTimeoutError, f"its server sent nothing for {SILENCE_S:.0f} s", SILENCE_S),
        (exceptions.ProxyError, "the proxy of the environment does not lead there", 0.0),
    )
    for kind, reason, waited_s in reasons:
        if isinstance(error, kind):
            return PassingError(reason, waited_s=waited_s)
    return PassingError("the connection broke")
