"""A generator on another thread gives the same items, holds little, and ends when it is let go."""

from __future__ import annotations

import threading

import pytest

from kimi_convert.checkpoints.ahead import ahead


def numbers(seen, *, count=20, error=None):
    try:
        for number in range(count):
            seen.append(number)
            yield number
        if error is not None:
            raise error
    finally:
        seen.append(threading.current_thread().name)


def test_items_come_in_their_order_from_one_other_thread():
    seen = []
    assert list(ahead(numbers(seen), nbytes=lambda _: 1)) == list(range(20))
    assert seen == [*range(20), "ahead"]


def test_error_comes_after_the_items_before_it():
    taken = ahead(numbers([], count=3, error=ValueError("its own")), nbytes=lambda _: 1)
    assert [next(taken) for _ in range(3)] == [0, 1, 2]
    with pytest.raises(ValueError, match="own"):
        next(taken)


@pytest.mark.parametrize("taken", [0, 1, 5])
def test_closing_ends_the_generator(taken):
    seen = []
    items = ahead(numbers(seen, count=10**9), nbytes=lambda _: 1, held_bytes=3)
    for _ in range(taken):
        next(items)
    items.close()
    assert seen[-1:] == (["ahead"] if taken else [])  # what was never begun has nothing to end
    assert "ahead" not in {thread.name for thread in threading.enumerate()}


def test_no_more_is_made_than_may_be_held():
    seen = []
    items = ahead(numbers(seen), nbytes=lambda _: 10, held_bytes=35)
    for number in items:
        assert len(seen) <= number + 5  # 4 of 10 bytes are held, the one in hand among them
    assert seen[-1] == "ahead"


def test_item_that_is_larger_than_all_may_be_is_done_with_before_the_next_is_begun():
    seen = []
    for number in ahead(numbers(seen), nbytes=lambda _: 100, held_bytes=50):
        assert seen[: number + 1] == seen
