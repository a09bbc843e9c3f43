"""The default progress callback."""

from __future__ import annotations

from kimi_convert.config.progress import ProgressEvent, ignore_progress


def test_events_may_be_ignored():
    assert ignore_progress(ProgressEvent("writing", 1, 2, "bytes")) is None
