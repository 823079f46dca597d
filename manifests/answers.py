"""What a server's answer, or the want of one, means: go on, try again later, or give up with a sentence.

Knows statuses, headers and failures of connections; it must not know what was asked for.
"""

from types import ModuleType
from typing import TYPE_CHECKING

from manifests import urls
from manifests.errors import RemoteError, SourceNotFoundError, ToolkitError

if TYPE_CHECKING:
    import urllib3

CONNECT_S = 15.0
SILENCE_S = 60.0
"""How long a server may send nothing."""

_PASSING = frozenset({408, 425, 429, 500, 502, 503, 504})
ABSENT = frozenset({404, 410})
FORBIDDEN = frozenset({401, 403})


class PassingError(Exception):
    """A failure that may pass: what it was, and how long the server asks to wait."""

    def __init__(self, reason: str, pause_s: float | None = None) -> None:
        super().__init__(reason)
        self.pause_s = pause_s


def library() -> ModuleType:
    """The package urllib3, imported when it is first needed.

    Raises:
        ToolkitError: It is not installed.
    """
    try:
        import urllib3
    except ImportError as error:
        raise ToolkitError("web servers are read with urllib3: `pip install expert-reshard[http]`") from error
    return urllib3


def refuse(response: "urllib3.BaseHTTPResponse", url: str) -> None:
    """Raise what a status means that no request goes on with."""
    where = urls.shown(url)
    status = response.status
    if status in _PASSING:
        raise PassingError(f"the server answers with status {status}", _pause(response))
    if status in ABSENT:
        raise SourceNotFoundError(f"{where}: the server has no such file")
    if status in FORBIDDEN:
        raise SourceNotFoundError(
            f"{where}: the server does not let you read it (status {status}); give user and password in the address, "
            "or for the Hub a token in HF_TOKEN"
        )
    encoding = response.headers.get("Content-Encoding", "identity")
    if status in (200, 206) and encoding.lower() != "identity":
        raise RemoteError(f"{where}: the server sends it compressed ({encoding!r:.40}), so its bytes cannot be told")


def _pause(response: "urllib3.BaseHTTPResponse") -> float | None:
    """Seconds that the server asks to wait; None when it does not, or not in a way that can be read."""
    package = library()
    try:
        found: float | None = package.Retry().get_retry_after(response)
    except (package.exceptions.HTTPError, ValueError, OverflowError):
        return None
    return found


def explain(error: Exception, url: str) -> PassingError:
    """What a failed connection was.

    Raises:
        RemoteError: It will not get better by trying again.
    """
    exceptions = library().exceptions
    if isinstance(error, exceptions.SSLError):
        raise RemoteError(
            f"{urls.shown(url)}: no secure connection: {error}; for a certificate of your own name its authority in "
            "SSL_CERT_FILE"
        ) from error
    if isinstance(error, exceptions.LocationParseError | exceptions.LocationValueError):
        raise RemoteError(f"{urls.shown(url)}: is no address that can be asked") from error
    if isinstance(error, exceptions.NameResolutionError):
        return PassingError("its host name cannot be found")
    if isinstance(error, exceptions.NewConnectionError):
        return PassingError("its server cannot be reached")
    if isinstance(error, exceptions.ConnectTimeoutError):
        return PassingError(f"its server did not answer within {CONNECT_S:.0f} s")
    if isinstance(error, exceptions.ReadTimeoutError):
        return PassingError(f"its server sent nothing for {SILENCE_S:.0f} s")
    return PassingError("the connection broke")
