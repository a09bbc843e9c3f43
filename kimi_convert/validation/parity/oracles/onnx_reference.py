"""An exported graph in ONNX's own reference evaluator: numpy, one operator after another.

It is far slower than a runtime, so it sees the first tokens of one sequence. Where the file brings
functions for operators that are not the standard's, their bodies run.
"""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import onnx
import torch
from onnx.reference import ReferenceEvaluator

from kimi_convert.config.huggingface import read_config
from kimi_convert.exporters.onnx.reference_operators import REFERENCE_OPERATORS
from kimi_convert.validation.parity.oracles.onnx_runtime import (
    MODEL_FILE,
    coarsest_dtype,
    named_values,
    shaped,
)
from kimi_convert.validation.parity.oracles.process import (
    PREFILL,
    OracleRequest,
    answer_request,
    decline,
)
from kimi_convert.validation.parity.stages import LOGITS_PROBE, Probe
from kimi_convert.validation.parity.trace import Trace

TOKENS = 16
_STANDARD = ("", "ai.onnx", "ai.kimi")


def trace_with_evaluator(request: OracleRequest) -> dict[str, Trace]:
    """Run the first tokens of a request's first sequence."""
    path = Path(request.artifact) / MODEL_FILE
    dtype = coarsest_dtype(request)
    model = onnx.load(str(path))
    _require_bodies(model)
    config = read_config(Path(request.folder))
    tokens = request.token_ids[:1, :TOKENS].numpy()
    probes = named_values(model)
    for name in probes:
        model.graph.output.append(onnx.ValueInfoProto(name=name))
    evaluator = ReferenceEvaluator(model, new_ops=list(REFERENCE_OPERATORS))
    feeds = {"input_ids": tokens, "attention_mask": np.ones_like(tokens), **_empty_states(model)}
    names = [LOGITS_PROBE.stage, *probes]
    given_out = map(np.asarray, evaluator.run(names, feeds))
    results = dict(zip(names, given_out, strict=True))
    logits = results.pop(LOGITS_PROBE.stage)
    if logits.shape[1] != tokens.shape[1]:
        decline("the graph gives the last logits alone")
    values: dict[Probe, torch.Tensor] = {
        probe: shaped(results[name][None], probe, config)
        if results[name].ndim == 2
        else shaped(results[name], probe, config)
        for name, probe in probes.items()
    }
    values[LOGITS_PROBE] = torch.from_numpy(logits).float()
    return {PREFILL: Trace(values, dtype=dtype)}


def _require_bodies(model: onnx.ModelProto) -> None:
    """Decline a graph with operators that only a runtime has."""
    functions = {(function.domain, function.name) for function in model.functions}
    for node in model.graph.node:
        if node.domain not in _STANDARD and (node.domain, node.op_type) not in functions:
            decline(f"{node.domain}::{node.op_type} is a runtime's alone")


def _empty_states(model: onnx.ModelProto) -> dict[str, np.ndarray]:
    """Return the states before the first token of one sequence: zeros, and no keys."""
    states: dict[str, np.ndarray] = {}
    for value in model.graph.input:
        if value.name.startswith("past_key_values."):
            dims = value.type.tensor_type.shape.dim
            sizes = [1, *(d.dim_value if d.HasField("dim_value") else 0 for d in dims[1:])]
            dtype = onnx.helper.tensor_dtype_to_np_dtype(value.type.tensor_type.elem_type)
            states[value.name] = np.zeros(sizes, dtype=dtype)
    return states


if __name__ == "__main__":
    answer_request(trace_with_evaluator, sys.argv[1:])
