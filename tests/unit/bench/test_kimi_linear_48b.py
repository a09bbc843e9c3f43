from __future__ import annotations

import json
import math
from pathlib import Path

from kimi_convert.bench.kimi_linear_48b import RELEASED_LAYERS, kimi_linear_document
from kimi_convert.config.huggingface import parse_config
from kimi_convert.model.names.layout import expected_entries

RELEASED = Path(__file__).parents[2] / "golden" / "configs" / "kimi-linear-48b-a3b.json"


def test_config_is_the_released_one():
    released = json.loads(RELEASED.read_text(encoding="utf-8"))
    measured = kimi_linear_document(RELEASED_LAYERS)
    assert {name: released[name] for name in measured} == measured


def test_model_has_the_released_size():
    config = parse_config(kimi_linear_document(RELEASED_LAYERS))
    assert config.mla_layers == (3, 7, 11, 15, 19, 23, 26)
    total = sum(math.prod(entry.shape) for entry in expected_entries(config))
    assert round(total / 1e9, 1) == 49.1
