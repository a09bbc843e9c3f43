"""How long a request is tried again, and what is never told."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from email.utils import format_datetime

import httpx2
import pytest

from kimi_convert.errors import HubError
from kimi_convert.hub.failures import RetryPolicy, StatusError, call


def answer(status, **headers):
    return StatusError(httpx2.Response(status, headers=headers))


def failing(*errors):
    """A request that fails with these in turn, then answers."""
    waiting = list(errors)

    def request():
        if waiting:
            raise waiting.pop(0)
        return "answer"

    return request


def waits_of(*errors, policy=RetryPolicy(6, 1.0, 5.0)):  # noqa: B008
    waits = []
    call(failing(*errors), what="a/b", policy=policy, sleep=waits.append)
    return waits


def test_waits_double_up_to_the_longest():
    assert waits_of(*[answer(503)] * 5) == [1.0, 2.0, 4.0, 5.0, 5.0]


def test_server_says_how_long():
    assert waits_of(answer(429, **{"Retry-After": "7"})) == [7.0]
    soon = format_datetime(datetime.now(UTC) + timedelta(seconds=30), usegmt=True)
    (wait,) = waits_of(answer(503, **{"Retry-After": soon}))
    assert 25 < wait <= 30


@pytest.mark.parametrize(
    "value", ["", "soon", "-1", "1e9", "²", f"Mon, 01 Jan {10**30} 00:00:00 GMT"]
)
def test_retry_after_that_is_no_time_is_ignored(value):
    headers = {"Retry-After": value.encode("utf-8")}
    assert waits_of(StatusError(httpx2.Response(503, headers=headers))) == [1.0]


@pytest.mark.parametrize("status", [400, 401, 403, 404, 409, 412, 416])
def test_refusal_is_not_tried_again(status):
    with pytest.raises(HubError):
        waits_of(answer(status))


def test_day_is_too_long_to_wait():
    with pytest.raises(HubError, match="fewer requests"):
        waits_of(answer(429, **{"Retry-After": "86400"}))


def test_end_says_how_often():
    with pytest.raises(HubError) as caught:
        waits_of(*[answer(500)] * 9, policy=RetryPolicy(3, 0.0, 0.0))
    assert "tried 3 times" in caught.value.found
