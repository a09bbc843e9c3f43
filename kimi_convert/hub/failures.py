"""What can go wrong between here and the Hub: as one error with the next step, or tried again.

No message repeats a token: what a server says is cut to a line and searched for secrets.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from typing import TypeVar

import httpx2
from huggingface_hub import get_token
from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    OfflineModeIsEnabled,
    RemoteEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

from kimi_convert.checkpoints.messages import quoted
from kimi_convert.config.secrets import without_secrets
from kimi_convert.errors import HubError

T = TypeVar("T")

_RETRIED = frozenset({408, 425, 429, 500, 502, 503, 504})
_LONGEST_RETRY_AFTER_S = 600.0  # the Hub's own window is 300 s
_LOG_IN = "Log in with `hf auth login`, or set HF_TOKEN to a token that may read it."
_LATER = "Try again later; what was fetched is kept."


@dataclass(frozen=True, slots=True)
class RetryPolicy:
    """How often and how patiently a request is tried again."""

    attempts: int = 6  # without a step forward
    first_wait_s: float = 1.0  # doubled each time
    longest_wait_s: float = 30.0

    def wait_s(self, failures: int, retry_after_s: float | None) -> float:
        """Return how long to wait after so many failures in a row (>= 1)."""
        if retry_after_s is not None:
            return retry_after_s
        return min(self.longest_wait_s, self.first_wait_s * 2 ** (failures - 1))


class StatusError(Exception):
    """An answer that is not the file: its status, and what the server says of it."""

    def __init__(self, response: httpx2.Response) -> None:
        super().__init__(response.status_code)
        self.status = response.status_code
        self.code = response.headers.get("X-Error-Code", "")
        self.said = response.headers.get("X-Error-Message", "")
        self.retry_after_s = _retry_after_s(response)


NETWORK_ERRORS = (StatusError, HfHubHTTPError, httpx2.HTTPError, OfflineModeIsEnabled)


def call(
    request: Callable[[], T],
    *,
    what: str,
    policy: RetryPolicy,
    sleep: Callable[[float], None] = time.sleep,
) -> T:
    """Make a request, again where that may help.

    Args:
        request: what to do.
        what: what it is about, for messages: "org/name at main".
        policy: how often.
        sleep: how to wait.

    Raises:
        HubError: it failed for good.
    """
    failures = 0
    while True:
        try:
            return request()
        except NETWORK_ERRORS as error:
            failures += 1
            if failures >= policy.attempts or not may_pass(error):
                raise hub_error(error, what=what, failures=failures) from error
            sleep(policy.wait_s(failures, retry_after_s(error)))


def may_pass(error: Exception) -> bool:
    """Tell whether the same request may succeed a little later."""
    if isinstance(error, OfflineModeIsEnabled):
        return False
    status = _status(error)
    if status is None:
        return isinstance(error, httpx2.TransportError)
    return status in _RETRIED and (retry_after_s(error) or 0.0) <= _LONGEST_RETRY_AFTER_S


def retry_after_s(error: Exception) -> float | None:
    """Return how long the server asks to wait, if it does."""
    if isinstance(error, StatusError):
        return error.retry_after_s
    return _retry_after_s(error.response) if isinstance(error, HfHubHTTPError) else None


def hub_error(error: Exception, *, what: str, failures: int = 1) -> HubError:
    """Return the error to show for a failure of the network or the Hub."""
    message, hint = _explanation(error)
    times = f" (tried {failures} times)" if failures > 1 else ""
    return HubError(message, where=what, found=_said(error) + times, hint=hint)


def _explanation(error: Exception) -> tuple[str, str]:
    """Return what happened and what to do about it."""
    if isinstance(error, OfflineModeIsEnabled):
        return "the Hub is switched off by HF_HUB_OFFLINE", "Unset HF_HUB_OFFLINE to use the Hub."
    status, code = _status(error), _code(error)
    if status is None:
        broken = isinstance(error, _BROKEN_OFF)
        return _BROKEN_STREAM if broken else _UNREACHABLE
    known = _BY_CODE.get(code) or _BY_STATUS.get(status)
    if status == 401 and code != "GatedRepo":
        known = _NO_ACCESS if get_token() is None else _BAD_TOKEN
        if code == "RepoNotFound" and get_token() is not None:
            known = _BY_CODE[code]
    if known is None:
        known = _SERVER if status >= 500 else _REFUSED
    return known


_BROKEN_OFF = (httpx2.ReadError, httpx2.ReadTimeout, httpx2.RemoteProtocolError)
_CHECK_NETWORK = "Check the network, the proxy (HTTPS_PROXY) and HF_ENDPOINT. " + _LATER
_UNREACHABLE = ("the Hub cannot be reached", _CHECK_NETWORK)
_BROKEN_STREAM = ("the connection to the Hub breaks off", _CHECK_NETWORK)
_NO_ACCESS = ("repository does not exist, or needs a login", _LOG_IN)
_BAD_TOKEN = (
    "the Hub does not accept the token",
    "It may have expired: make a new one and log in with `hf auth login`, or set HF_TOKEN.",
)
_SERVER = ("the Hub has a problem", _LATER)
_REFUSED = ("the Hub refuses the request", "Check the name and the rights of your token.")
_BY_CODE = {
    "GatedRepo": (
        "repository is gated: its owner decides who may read it",
        "Ask for access on its page, then log in with `hf auth login`.",
    ),
    "RepoNotFound": (
        "there is no such repository, or your token may not see it",
        "Check the spelling. " + _LOG_IN,
    ),
    "RevisionNotFound": (
        "repository has no such revision",
        "Look up its branches and tags; --revision or name@revision takes one of them.",
    ),
    "EntryNotFound": (
        "repository has no such file",
        "The repository may have changed: run again.",
    ),
}
_BY_STATUS = {
    403: (
        "the token does not give the right to do this",
        "Use a token with that right: `hf auth login`, or HF_TOKEN.",
    ),
    404: ("the Hub does not know this", "Check the spelling and HF_ENDPOINT."),
    409: ("the Hub sees a conflict", "Somebody else may have changed it: run again."),
    412: (
        "repository has changed since it was looked at",
        "Somebody else has committed to it: run again.",
    ),
    429: ("the Hub asks for fewer requests", _LATER + " Fewer --max-workers may help."),
}
_CODES: tuple[tuple[type[Exception], str], ...] = (
    (GatedRepoError, "GatedRepo"),  # before its base class, the next
    (RepositoryNotFoundError, "RepoNotFound"),
    (RevisionNotFoundError, "RevisionNotFound"),
    (RemoteEntryNotFoundError, "EntryNotFound"),
)


def _status(error: Exception) -> int | None:
    if isinstance(error, StatusError):
        return error.status
    return error.response.status_code if isinstance(error, HfHubHTTPError) else None


def _code(error: Exception) -> str:
    if isinstance(error, StatusError):
        return error.code
    return next((code for kind, code in _CODES if isinstance(error, kind)), "")


def _said(error: Exception) -> str:
    """Return what the server or the system says, in one safe line."""
    status = _status(error)
    if isinstance(error, StatusError):
        said = error.said
    elif isinstance(error, HfHubHTTPError):
        said = error.response.headers.get("X-Error-Message") or error.server_message or ""
    else:
        said = str(error).partition("\n")[0] or type(error).__name__
    said = quoted(without_secrets(said, also=get_token())) if said else ""
    return f"status {status}{': ' if said else ''}{said}" if status else said


def _retry_after_s(response: httpx2.Response) -> float | None:
    """Return the seconds of a Retry-After header, which is a number or a date."""
    value = response.headers.get("Retry-After", "").strip()
    if value.isascii() and value.isdecimal():
        return float(value)
    try:
        when = parsedate_to_datetime(value)
    except (ValueError, OverflowError):
        return None
    when = when if when.tzinfo else when.replace(tzinfo=UTC)
    return max(0.0, (when - datetime.now(UTC)).total_seconds())
