"""config.json to `ModelConfig` and back, for every model type that kimi-convert knows.

This and the modules it dispatches to are the only place with Hugging Face field names and with
layer lists that count from 1. Both spellings of renamed fields are read, one is written, and
fields that do not bear on the maths are carried.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import cast

from kimi_convert.config.architecture import ModelConfig
from kimi_convert.config.deepseek import SOURCE_TYPES, deepseek_to_json, parse_deepseek
from kimi_convert.config.fields import Fields
from kimi_convert.config.kimi_linear import TARGET_TYPE, kimi_linear_to_json, parse_kimi_linear
from kimi_convert.errors import ConfigError

CONFIG_FILE = "config.json"
_MAX_JSON_BYTES = 16 * 1024 * 1024

_PARSERS: Mapping[str, Callable[[Fields, str], ModelConfig]] = {
    **dict.fromkeys(SOURCE_TYPES, parse_deepseek),
    TARGET_TYPE: parse_kimi_linear,
}
_SPELLERS: Mapping[str, Callable[[ModelConfig], dict[str, object]]] = {
    **dict.fromkeys(SOURCE_TYPES, deepseek_to_json),
    TARGET_TYPE: kimi_linear_to_json,
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
    fields = Fields(document, where=where)
    model_type = fields.text("model_type", default="")
    parse = _PARSERS.get(model_type)
    if parse is None:
        raise ConfigError(
            "config field 'model_type' names an architecture that is not supported",
            where=where,
            expected=", ".join(sorted(_PARSERS)),
            found=repr(model_type),
            hint="kimi-convert reads DeepSeek-V2/V3, Moonlight, Kimi-K2 and Kimi-Linear.",
        )
    try:
        return parse(fields, model_type)
    except ConfigError as error:
        error.where = error.where or str(where)
        raise


def config_to_json(config: ModelConfig) -> dict[str, object]:
    """Spell a `ModelConfig` as the fields of a config.json, in alphabetic order."""
    return dict(sorted(_SPELLERS[config.model_type](config).items()))


def read_json_object(path: Path) -> dict[str, object]:
    """Read a file that must hold one JSON object of at most 16 MiB.

    Raises:
        ConfigError: it is missing, too large, not JSON or not an object.
    """
    try:
        size = path.stat().st_size
        if size > _MAX_JSON_BYTES:
            raise ConfigError(f"{path.name} is too large", where=path, found=f"{size} bytes")
        document: object = json.loads(path.read_bytes(), parse_constant=_refuse_constant)
    except FileNotFoundError as error:
        raise ConfigError(
            f"{path.name} is missing",
            where=path.parent,
            hint="Give the folder of a checkpoint in Hugging Face format.",
        ) from error
    except (OSError, ValueError, RecursionError) as error:
        raise ConfigError(f"{path.name} is not readable JSON", where=path, found=error) from error
    if not isinstance(document, dict):
        raise ConfigError(
            f"{path.name} must hold a JSON object", where=path, found=type(document).__name__
        )
    return cast("dict[str, object]", document)


def _refuse_constant(name: str) -> object:
    raise ValueError(f"{name} is not JSON")
