from __future__ import annotations

from kimi_convert.model.cache_size import cache_size
from kimi_convert.validation.page.memory import memory_by_context
from tests.tiny import tiny_config

CONFIG = tiny_config("kimi_linear")


def test_bytes_are_those_of_the_cache():
    for point in memory_by_context(CONFIG):
        assert point.states + point.cache == cache_size(CONFIG).at(point.tokens)


def test_states_do_not_grow():
    points = memory_by_context(CONFIG)
    assert {point.states for point in points} == {points[0].states}
    assert points[-1].all_mla == 4 * points[-1].cache
