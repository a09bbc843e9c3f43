"""genai_config.json: what onnxruntime-genai needs to know of a graph.

The runtime finds the states of KDA layers by their names. It keeps keys and values itself, so layers
without them are no matter, but both must have one width: the graph pads values to it.
"""

from __future__ import annotations

from kimi_convert.config.architecture import ModelConfig
from kimi_convert.exporters.onnx.mla import kept_width
from kimi_convert.exporters.onnx.model_builder import past_name, present_name
from kimi_convert.exporters.onnx.options import MlaForm, OnnxOptions

GENAI_CONFIG_FILE = "genai_config.json"

_LAYER = "%d"


def genai_runs(options: OnnxOptions) -> bool:
    """Tell whether onnxruntime-genai can keep the states: it knows keys and values alone."""
    return options.mla is MlaForm.MATERIALISED


def genai_config(config: ModelConfig, *, model_file: str) -> dict[str, object]:
    """Return the document; greedy, since no sampling suits every model."""
    return {
        "model": {
            "type": "decoder",
            **_special_tokens(config),
            "vocab_size": config.vocab_size,
            "context_length": config.max_positions,
            "decoder": {
                "session_options": {"log_id": "onnxruntime-genai", "provider_options": []},
                "filename": model_file,
                "head_size": kept_width(config.mla),
                "hidden_size": config.hidden_size,
                "num_attention_heads": config.mla.num_heads,
                "num_hidden_layers": config.num_layers,
                "num_key_value_heads": config.mla.num_heads,
                "inputs": {
                    "input_ids": "input_ids",
                    "attention_mask": "attention_mask",
                    "past_key_names": past_name(_LAYER, "key"),
                    "past_value_names": past_name(_LAYER, "value"),
                },
                "outputs": {
                    "logits": "logits",
                    "present_key_names": present_name(_LAYER, "key"),
                    "present_value_names": present_name(_LAYER, "value"),
                },
            },
        },
        "search": {
            "max_length": config.max_positions,
            "do_sample": False,
            "num_beams": 1,
            "past_present_share_buffer": False,
        },
    }


def _special_tokens(config: ModelConfig) -> dict[str, object]:
    """Return the ids that config.json states; padding falls back on what ends a text."""
    ends = list(config.eos_token_ids)
    padding = config.pad_token_id if config.pad_token_id is not None else next(iter(ends), None)
    stated = {
        "bos_token_id": config.bos_token_id,
        "eos_token_id": ends[0] if len(ends) == 1 else ends or None,
        "pad_token_id": padding,
    }
    return {name: value for name, value in stated.items() if value is not None}
