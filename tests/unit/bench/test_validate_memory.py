from __future__ import annotations

import pytest

from kimi_convert.bench.validate_memory import measure_validation
from kimi_convert.config.huggingface import config_to_json
from kimi_convert.errors import VerificationError
from tests.tiny import tiny_config

TINY = config_to_json(tiny_config("kimi_linear", dtype="bfloat16"))


def test_measured_validation_is_a_real_one(tmp_path):
    measured = measure_validation(tmp_path, TINY, tokens=16)
    assert measured.estimate.startswith("Estimate: ")
    assert measured.peak_bytes > 100 * 10**6
    assert measured.seconds > 0


def test_validation_that_fails_is_no_measurement(tmp_path):
    with pytest.raises(VerificationError, match="failed"):
        measure_validation(tmp_path, TINY, tokens=0)
