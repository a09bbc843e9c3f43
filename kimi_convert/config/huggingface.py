"""config.json to `ModelConfig` and back, for every model type that kimi-convert knows.

This and the modules it dispatches to are the only place with Hugging Face field names and with
layer lists that count from 1. Both spellings of renamed fields are read, one is written, and
fields that do not bear on the maths are carried.
"""

from __future__ import annotations

import json
import math
import stat
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import cast

from kimi_convert.config.architecture import ModelConfig
from kimi_convert.config.bailing_hybrid import (
    BAILING_TYPE,
    bailing_hybrid_to_json,
    parse_bailing_hybrid,
)
from kimi_convert.config.deepseek import SOURCE_TYPES, deepseek_to_json, parse_deepseek
from kimi_convert.config.descendants import refuse_descendant
from kimi_convert.config.fields import Fields
from kimi_convert.config.kimi_linear import TARGET_TYPE, kimi_linear_to_json, parse_kimi_linear
from kimi_convert.config.limits import shown
from kimi_convert.errors import ConfigError

CONFIG_FILE = "config.json"
TEXT_CONFIG = "text_config"  # of a multimodal config.json: the fields of its text model
# Multimodal models whose text model is a supported one: Kimi-VL, and Kimi-K2.5 and later.
MULTIMODAL_TYPES = ("kimi_vl", "kimi_k25")
# What a multimodal config.json may state beside its text model, for all of it.
_BESIDE = (
    "bos_token_id",
    "dtype",
    "eos_token_id",
    "pad_token_id",
    "quantization_config",
    "tie_word_embeddings",
    "torch_dtype",
)
_MAX_JSON_BYTES = 16 * 1024 * 1024
_MAX_DIGITS = 1000  # of a whole number; Python reads no more than 4300

_PARSERS: Mapping[str, Callable[[Fields, str], ModelConfig]] = {
    **dict.fromkeys(SOURCE_TYPES, parse_deepseek),
    TARGET_TYPE: parse_kimi_linear,
    BAILING_TYPE: parse_bailing_hybrid,
}
_SPELLERS: Mapping[str, Callable[[ModelConfig], dict[str, object]]] = {
    **dict.fromkeys(SOURCE_TYPES, deepseek_to_json),
    TARGET_TYPE: kimi_linear_to_json,
    BAILING_TYPE: bailing_hybrid_to_json,
}


def read_config(folder: Path) -> ModelConfig:
    """Read and check the config.json of a checkpoint folder.

    Raises:
        ConfigError: the file is missing, is not a JSON object, names an unknown architecture,
            lacks a field or contradicts itself; the message names the field.
    """
    path = folder / CONFIG_FILE
    return parse_config(read_json_object(path), where=path)


def parse_config(document: Mapping[str, object], *, where: object = CONFIG_FILE) -> ModelConfig:
    """Turn the fields of a config.json into a checked `ModelConfig`.

    Args:
        document: the parsed JSON object.
        where: what error messages call it.

    Raises:
        ConfigError: see `read_config`.
    """
    refuse_descendant(document, where=where)
    fields = Fields(_text_model(document, where), where=where)
    model_type = fields.text("model_type", default="")
    parse = _PARSERS.get(model_type)
    if parse is None:
        raise ConfigError(
            "config field 'model_type' names an architecture that is not supported",
            where=where,
            expected=", ".join(sorted((*_PARSERS, *MULTIMODAL_TYPES))),
            found=shown(model_type),
            hint="kimi-convert reads DeepSeek-V2/V3, Moonlight, Kimi-K2, Kimi-Linear and its own bailing_hybrid.",
        )
    try:
        return parse(fields, model_type)
    except ConfigError as error:
        error.where = error.where or str(where)
        raise


def _text_model(document: Mapping[str, object], where: object) -> Mapping[str, object]:
    """Return the text model's fields of a multimodal config, with what stands beside them."""
    outer = Fields(document, where=where)
    model_type = outer.text("model_type", default="")
    inner = outer.mapping(TEXT_CONFIG) if model_type in MULTIMODAL_TYPES else None
    if inner is None:
        return document
    beside = {name: document[name] for name in _BESIDE if name in document}
    return {**beside, **inner}


def config_to_json(config: ModelConfig) -> dict[str, object]:
    """Spell a `ModelConfig` as the fields of a config.json, in alphabetic order."""
    return dict(sorted(_SPELLERS[config.model_type](config).items()))


def read_json_object(path: Path) -> dict[str, object]:
    """Read a file that must hold one JSON object in UTF-8, of at most 16 MiB.

    Raises:
        ConfigError: it is missing, not a plain file, too large, not JSON, not an object, gives a
            field twice, or gives one a number that no computer number can hold.
    """
    try:
        document: object = json.loads(
            _read_plain_file(path).decode("utf-8"),
            object_pairs_hook=_checked_object,
            parse_int=_parse_integer,
            parse_constant=_refuse_constant,
        )
    except FileNotFoundError as error:
        raise ConfigError(
            f"{path.name} is missing",
            where=path.parent,
            hint="Give the folder of a checkpoint in Hugging Face format.",
        ) from error
    except ConfigError as error:
        error.where = str(path)
        raise
    except (OSError, ValueError, RecursionError) as error:
        raise ConfigError(f"{path.name} is not readable JSON", where=path, found=error) from error
    if not isinstance(document, dict):
        raise ConfigError(
            f"{path.name} must hold a JSON object", where=path, found=type(document).__name__
        )
    return cast("dict[str, object]", document)


def _read_plain_file(path: Path) -> bytes:
    status = path.stat()
    if not stat.S_ISREG(status.st_mode):  # reading a pipe would wait for ever
        raise ConfigError(f"{path.name} is not a plain file")
    if status.st_size > _MAX_JSON_BYTES:
        raise ConfigError(
            f"{path.name} is too large",
            expected=f"at most {_MAX_JSON_BYTES} bytes",
            found=f"{status.st_size} bytes",
        )
    return path.read_bytes()


def _checked_object(pairs: list[tuple[str, object]]) -> dict[str, object]:
    """Build a JSON object; here, and not in `_parse_integer`, the field is known."""
    found: dict[str, object] = {}
    for name, value in pairs:
        if name in found:
            raise ConfigError(
                f"config field {shown(name)} is given twice",
                found=f"{shown(found[name])} and {shown(value)}",
            )
        if _holds_infinity(value):
            raise ConfigError(
                f"config field {shown(name)} is not valid",
                expected="numbers that fit in 64 bits",
                found="a number that is far too large",
            )
        found[name] = value
    return found


def _holds_infinity(value: object) -> bool:
    """Tell whether a value, or a list at any depth, holds a number that did not fit."""
    if isinstance(value, list):
        return any(map(_holds_infinity, cast("list[object]", value)))
    return isinstance(value, float) and math.isinf(value)


def _parse_integer(digits: str) -> float:
    return int(digits) if len(digits) <= _MAX_DIGITS else math.inf


def _refuse_constant(name: str) -> object:
    raise ValueError(f"{name} is not JSON")
