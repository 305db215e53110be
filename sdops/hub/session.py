"""Requests to the Hub through huggingface_hub: patient, and with every failure in our own words.

No message contains a token, the address that a token was sent to with credentials in it, or what a server wrote.
"""

from __future__ import annotations

import re
import socket
import ssl
import time
from collections.abc import Callable
from functools import cache
from importlib import import_module
from types import ModuleType
from typing import TYPE_CHECKING, Any, TypeVar
from urllib.parse import urlsplit

from sdops import settings
from sdops.errors import HubError, SdopsError
from sdops.hub.reference import Reference

if TYPE_CHECKING:
    from huggingface_hub import HfApi

Made = TypeVar("Made")
LONGEST_WAIT = 60.0  # seconds that a busy Hub may ask for
SILENCE = 300.0  # seconds without a byte; commits of many files take their time
_BUSY = (408, 429, 500, 502, 503, 504)


@cache
def library() -> ModuleType:
    """huggingface_hub: it writes nothing to the terminal, for it is we who tell."""
    import huggingface_hub

    utilities().logging.set_verbosity_error()
    if huggingface_hub.constants.HF_HUB_DISABLE_PROGRESS_BARS is None:
        utilities().disable_progress_bars()
    return huggingface_hub


def utilities() -> Any:
    """`huggingface_hub.utils`: the HTTP client, the headers with the token, typed errors."""
    return import_module("huggingface_hub.utils")


def api() -> HfApi:
    """The client, with HF_TOKEN or the token of `hf auth login`, for HF_ENDPOINT."""
    from sdops import __version__

    made: HfApi = library().HfApi(library_name="sdops", library_version=__version__)
    client()
    return made


def client() -> Any:
    """The HTTP client. huggingface_hub's own would wait for a silent server for ever."""
    found = utilities().get_session()
    if found.timeout.read is None:
        found.timeout = SILENCE
    return found


def has_token() -> bool:
    """Whether requests carry a token."""
    return bool(library().get_token())


def is_offline() -> bool:
    """Whether HF_HUB_OFFLINE forbids requests."""
    return bool(library().constants.HF_HUB_OFFLINE)


def endpoint() -> str:
    """The Hub's address, for people: without user and password."""
    parts = urlsplit(str(library().constants.ENDPOINT))
    host = parts.hostname or ""
    return f"{parts.scheme}://{host}" + (f":{parts.port}" if parts.port else "") + parts.path.rstrip("/")


def transport_errors() -> tuple[type[Exception], ...]:
    """What the client raises when a connection fails or breaks."""
    kind = type(utilities().get_session())
    module = import_module(kind.__module__.partition(".")[0])  # httpx, or httpx2 since huggingface_hub 2.0
    found: type[Exception] = module.TransportError
    return (found, ConnectionError, TimeoutError)


def patiently(what: Reference, ask: Callable[[], Made]) -> Made:
    """Ask the Hub; again, a few times, while it is busy or the connection breaks.

    Raises:
        HubError: it refuses, has no such thing, or does not become well.
    """
    attempt = 0
    while True:
        try:
            return ask()
        except SdopsError:
            raise
        except Exception as error:  # all that a foreign library raises becomes a HubError
            if is_local(error):
                raise
            wait = _pause(error, attempt)
            failure = explained(what, error)
        if wait is None:
            raise failure
        time.sleep(wait)
        attempt += 1


def _pause(error: Exception, attempt: int) -> float | None:
    """Seconds until the next attempt; None to give up."""
    status = _status(error)
    if attempt >= settings.hub_retries() or (status not in _BUSY if status else not is_transport(error)):
        return None
    asked = _retry_after(error)
    if asked is not None:
        return asked if asked <= LONGEST_WAIT else None
    if type(error).__name__ in ("ConnectError", "UnsupportedProtocol") and attempt:
        return None  # nobody there: the second look is enough
    return min(0.25 * 2.0**attempt, 8.0)


def is_transport(error: BaseException) -> bool:
    """Whether a connection failed or broke."""
    return isinstance(error, transport_errors()) and type(error).__name__ != "OfflineModeIsEnabled"


def is_local(error: BaseException) -> bool:
    """Whether this disk is what failed. The client's errors are OSErrors as well, but of kinds of its own."""
    return type(error).__module__ == "builtins" and isinstance(error, OSError) and not is_transport(error)


def _status(error: BaseException) -> int | None:
    response = getattr(error, "response", None)
    return getattr(response, "status_code", None)


def _retry_after(error: BaseException) -> float | None:
    """Seconds that a busy Hub asks for."""
    headers: Any = getattr(getattr(error, "response", None), "headers", {})
    text = str(headers.get("Retry-After") or "")
    limit = re.search(r"\bt\s*=\s*(\d+)", str(headers.get("RateLimit") or ""))  # how the Hub says it: "api";r=0;t=55
    return float(text) if text.isdigit() else float(limit[1]) if limit else None


def explained(what: Reference, error: BaseException) -> HubError:
    """A failure of huggingface_hub, or of the connection, in our words. Told by status and code, not by its text."""
    kind, status = type(error).__name__, _status(error)
    headers: Any = getattr(getattr(error, "response", None), "headers", {})
    if kind in ("OfflineModeIsEnabled", "LocalEntryNotFoundError") and is_offline():
        return _offline(what)
    if "Invalid credentials" in str(headers.get("X-Error-Message")):
        return _bad_token(what)
    for name, tell in _BY_KIND.items():
        if kind == name:
            return tell(what)
    if status is not None:
        return _refused(what, error, status)
    if kind == "JSONDecodeError":
        return strange()
    if is_transport(error):
        return _unreachable(error)
    return HubError(f"the request for `{what}` failed ({kind})", hint=_look(what), reason="refused")


def _refused(what: Reference, error: BaseException, status: int) -> HubError:
    """What an answer other than success says."""
    if status in _BY_STATUS:
        return _BY_STATUS[status](what) if status != 429 else _busy(what, _retry_after(error))
    if status >= 500:
        return HubError(
            f"the Hub is unavailable ({status}): `{what}` cannot be had now",
            hint="try again later; https://status.huggingface.co tells of disturbances",
            reason="unavailable",
            status=status,
        )
    return HubError(f"the Hub refuses the request for `{what}` ({status})", hint=_look(what), reason="refused")


def _unreachable(error: BaseException) -> HubError:
    """What a connection did, by the name of the client's error and what is behind it."""
    kind, reasons = type(error).__name__, causes(error)
    if any(isinstance(cause, ssl.SSLError) for cause in reasons):
        return HubError(
            f"no secure connection to `{endpoint()}` can be made: its certificate is not trusted, or it speaks no TLS",
            hint="check HF_ENDPOINT and the clock; SSL_CERT_FILE names the certificates of a company's proxy",
            reason="unreachable",
        )
    if any(isinstance(cause, socket.gaierror) for cause in reasons):
        return HubError(
            f"there is no host `{urlsplit(endpoint()).hostname}`, or no network to ask for it",
            hint="check the network and HF_ENDPOINT; what was downloaded before is found with HF_HUB_OFFLINE=1",
            reason="unreachable",
        )
    if kind in ("ReadTimeout", "WriteTimeout"):
        return HubError(
            f"`{endpoint()}` does not answer ({kind})",
            hint="try again later; HF_HUB_ETAG_TIMEOUT and HF_HUB_DOWNLOAD_TIMEOUT say how many seconds to wait",
            reason="unreachable",
        )
    if kind in ("ConnectError", "ConnectTimeout", "UnsupportedProtocol", "ProxyError"):
        return HubError(
            f"`{endpoint()}` cannot be reached ({kind})",
            hint="check the network and HF_ENDPOINT; what was downloaded before is found with HF_HUB_OFFLINE=1",
            reason="unreachable",
        )
    return HubError(
        f"the connection to `{endpoint()}` breaks again and again ({kind})",
        hint="run the command again: a download goes on where it stopped",
        reason="unreachable",
    )


def causes(error: BaseException | None) -> list[BaseException]:
    """An error and what led to it."""
    found: list[BaseException] = []
    while error is not None and error not in found:
        found.append(error)
        error = error.__cause__ or error.__context__
    return found


def strange() -> HubError:
    """What answers is not the Hub, but perhaps the login page of a network."""
    return HubError(
        f"`{endpoint()}` does not answer as the Hub does",
        hint="check HF_ENDPOINT, and in a browser whether the network asks for a login",
        reason="refused",
    )


def _look(what: Reference) -> str:
    return f"look at {endpoint()}/{what.repo}"


def _offline(what: Reference) -> HubError:
    return HubError(
        f"`{what}` was not downloaded before, and HF_HUB_OFFLINE forbids to do it now",
        hint=f"`HF_HUB_OFFLINE=0 sdops pull {what}` downloads it",
        reason="offline",
    )


def _gated(what: Reference) -> HubError:
    ask = f"ask for access at {endpoint()}/{what.repo}"
    if has_token():
        return HubError(f"`{what.repo}` is gated, and your token has no access to it", hint=ask, reason="gated")
    return HubError(
        f"`{what.repo}` is gated, and no token is set",
        hint=f"{ask}, then `hf auth login`, or set HF_TOKEN",
        reason="gated",
    )


def _missing_repository(what: Reference) -> HubError:
    reading = "your token may not read it" if has_token() else "it is private and no token is set"
    login = "`hf auth whoami` shows whose token it is" if has_token() else "for a private one `hf auth login` first"
    return HubError(
        f"there is no repository `{what.repo}` on the Hub, or {reading}",
        hint=f"check the name at {endpoint()}/{what.repo}; {login}",
        reason="missing-repository",
    )


def _missing_revision(what: Reference) -> HubError:
    return HubError(
        f"`{what.repo}` has no revision `{what.revision or 'main'}`",
        hint=f"{endpoint()}/{what.repo}/commits/main lists commits; without `@...` it is the main branch",
        reason="missing-revision",
    )


def _missing_file(what: Reference) -> HubError:
    return HubError(f"there is no file `{what}`", hint=_look(what), reason="missing-file")


def _no_content(what: Reference) -> HubError:
    return HubError(
        f"the Hub lists `{what}`, but does not give its content (404)",
        hint=f"try again later; {_look(what)} whether it can be downloaded there",
        reason="missing-file",
    )


def _bad_token(what: Reference) -> HubError:
    del what
    return HubError(
        f"`{endpoint()}` does not accept your token",
        hint="`hf auth login` stores another; HF_TOKEN, if it is set, goes before it",
        reason="token",
    )


def _forbidden(what: Reference) -> HubError:
    if not has_token():
        return HubError(f"`{what}` may not be read without a token", hint="`hf auth login`", reason="access")
    return HubError(
        f"your token is not allowed to do this with `{what.repo}`",
        hint="https://huggingface.co/settings/tokens shows what it may; uploads need the right to write",
        reason="access",
    )


def _busy(what: Reference, seconds: float | None) -> HubError:
    when = f"in {seconds:.0f} seconds" if seconds else "in some minutes"
    more = "" if has_token() else "; after `hf auth login` more requests are allowed"
    return HubError(
        f"the Hub asks to slow down (429) before it gives `{what}`",
        hint=f"run the command again {when}{more}",
        reason="busy",
        seconds=seconds,
    )


def _malformed(what: Reference) -> HubError:
    return HubError(f"`{what.repo}` is no name of a repository", hint="names are `owner/repo`", reason="refused")


_BY_KIND: dict[str, Callable[[Reference], HubError]] = {
    "GatedRepoError": _gated,
    "RepositoryNotFoundError": _missing_repository,
    "RevisionNotFoundError": _missing_revision,
    "RemoteEntryNotFoundError": _missing_file,
    "EntryNotFoundError": _missing_file,
    "HFValidationError": _malformed,
    "DisabledRepoError": _forbidden,
}
_BY_STATUS: dict[int, Callable[[Reference], HubError]] = {
    401: _missing_repository,
    403: _forbidden,
    404: lambda what: _no_content(what) if what.path else _missing_repository(what),
    429: lambda what: _busy(what, None),
}
