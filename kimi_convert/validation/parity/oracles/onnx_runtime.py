"""An exported graph in ONNX Runtime, on the CPU.

Logits and states are those of the graph as it is. What is inside comes from a second session, whose
graph gives named values out: that changes what the runtime may fuse, so it only serves to find where
a difference starts.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import onnx
import onnxruntime as ort
import torch

from kimi_convert.config.architecture import ModelConfig
from kimi_convert.config.huggingface import read_config
from kimi_convert.exporters.onnx.session import OnnxSession, States
from kimi_convert.validation.bounds import coarsest
from kimi_convert.validation.parity.oracles.process import (
    DECODE,
    PREFILL,
    OracleRequest,
    answer_request,
    decline,
)
from kimi_convert.validation.parity.stages import (
    EMBED_PROBE,
    HIDDEN,
    LOGITS_PROBE,
    ROUTER,
    SCORES,
    STATE,
    Probe,
)
from kimi_convert.validation.parity.trace import Greedy, Trace

MODEL_FILE = "model.onnx"
_STATE_NAME = re.compile(r"past_key_values\.(\d+)\.recurrent_state")
# Name of a value in a layer's scope -> stage.
STAGES: Mapping[str, str] = {
    "normed": "input_norm",
    "kda.q": "kda.q",
    "kda.k": "kda.k",
    "kda.v": "kda.v",
    "kda.g_raw": "kda.f",
    "kda.g": "kda.decay",
    "kda.beta_logits": "kda.b",
    "kda.mixed": "kda.recurrence",
    "kda.output_gate": "kda.g",
    "kda.kda_output": "kda.o",
    "mla.q": "mla.q",
    "mla.kv_a": "mla.kv_a",
    "mla.normed": "mla.kv_a_norm",
    "mla.mla_output": "mla.o",
    "normed_2": "mlp_norm",
    "hidden": HIDDEN,
}
_INTEGERS = {
    onnx.TensorProto.UINT8,
    onnx.TensorProto.INT8,
    onnx.TensorProto.UINT4,
    onnx.TensorProto.INT4,
}
_NARROW: Mapping[int, str] = {
    onnx.TensorProto.FLOAT16: "float16",
    onnx.TensorProto.BFLOAT16: "bfloat16",
}
_PER_HEAD = ("kda.decay", "kda.recurrence")
_CHOSEN, _WEIGHTS = "router.indices", "router.weights"
_SCORED = "router.Add"  # the scores with their bias


def trace_with_onnx_runtime(request: OracleRequest) -> dict[str, Trace]:
    """Run a request; a graph that gives the last logits alone has no prefill to compare."""
    dtype = coarsest_dtype(request)
    session = OnnxSession(request.artifact, threads=1)
    tokens = request.token_ids.numpy()
    traces: dict[str, Trace] = {}
    logits, states = _run(session, tokens, pieces=1)
    greedy = _continue(session, request)
    if logits.shape[1] == tokens.shape[1]:
        inside = _inside(request, tokens, pieces=1)
        values = {**inside, **_kept(states), LOGITS_PROBE: logits}
        traces[PREFILL] = Trace(values, greedy, dtype)
    logits, states = _run(session, tokens, pieces=tokens.shape[1])
    inside = _inside(request, tokens, pieces=tokens.shape[1])
    traces[DECODE] = Trace({**inside, **_kept(states), LOGITS_PROBE: logits}, greedy, dtype)
    return traces


def coarsest_dtype(request: OracleRequest) -> torch.dtype:
    """Return what a graph's weights were rounded to, fp32 if they were not.

    A graph of integers is declined: what they lose is no rounding that a bound could be derived for.
    """
    path = Path(request.artifact) / MODEL_FILE
    model = onnx.load(str(path), load_external_data=False)
    stored = {tensor.data_type for tensor in model.graph.initializer if len(tensor.dims) > 1}
    if stored & _INTEGERS:
        decline("its weights are integers, and there is no bound for what they lose")
    kept = read_config(Path(request.folder)).dtype
    rounded = [dtype for dtype in stored & _NARROW.keys() if _NARROW[dtype] != kept]
    return coarsest([torch.float32, *(getattr(torch, _NARROW[dtype]) for dtype in rounded)])


def named_values(model: onnx.ModelProto) -> dict[str, Probe]:
    """Return the values of a graph that are stages, by their names."""
    found: dict[str, Probe] = {}
    # numpy has no bf16, in which the embedding is looked up.
    narrow = any(t.data_type == onnx.TensorProto.BFLOAT16 for t in model.graph.initializer)
    for node in model.graph.node:
        for name in node.output:
            scope, _, rest = name.partition(".")
            layer, _, inner = rest.partition(".")
            if scope == "layers" and inner in STAGES:
                found[name] = Probe(int(layer), STAGES[inner])
            elif name == "embedded" and not narrow:
                found[name] = EMBED_PROBE
    return found


def shaped(values: np.ndarray, probe: Probe, config: ModelConfig) -> torch.Tensor:
    """Return values [B, T, ...], heads apart where stages have them apart."""
    found = torch.from_numpy(np.array(values, dtype=np.float32))
    if probe.stage in _PER_HEAD and config.kda is not None:
        found = found.unflatten(-1, (config.kda.num_heads, -1))
    return found


def _run(session: OnnxSession, tokens: np.ndarray, *, pieces: int) -> tuple[torch.Tensor, States]:
    states = session.new_states(tokens.shape[0])
    parts = [session.run(part, states) for part in np.array_split(tokens, pieces, axis=1)]
    return torch.from_numpy(np.concatenate(parts, axis=1)), states


def _kept(states: States) -> dict[Probe, torch.Tensor]:
    found: dict[Probe, torch.Tensor] = {}
    for name, value in states.values.items():
        matched = _STATE_NAME.fullmatch(name)
        if matched:
            found[Probe(int(matched[1]), STATE)] = torch.from_numpy(value.numpy().copy()).float()
    return found


def _inside(
    request: OracleRequest, tokens: np.ndarray, *, pieces: int
) -> dict[Probe, torch.Tensor]:
    """Run a graph that also gives its named values out."""
    path = Path(request.artifact) / MODEL_FILE
    model = onnx.load(str(path), load_external_data=False)
    config = read_config(Path(request.folder))
    probes = named_values(model)
    routed = [
        name
        for node in model.graph.node
        for name in node.output
        if name.endswith((_CHOSEN, _WEIGHTS, _SCORED))
    ]
    given = [value.name for value in model.graph.output]
    for name in {*probes, *routed} - set(given):
        model.graph.output.append(onnx.ValueInfoProto(name=name))
    session = _session(model, path.parent)
    wanted = [*probes, *routed]
    empty = OnnxSession(request.artifact, threads=1).new_states(len(tokens))
    # Copied: the arrays are views of what `empty` owns.
    states = {name: value.numpy().copy() for name, value in empty.values.items()}
    parts: list[dict[str, np.ndarray]] = []
    seen = 0
    for part in np.array_split(tokens, pieces, axis=1):
        seen += part.shape[1]
        mask = np.ones((len(tokens), seen), dtype=np.int64)
        names = [*wanted, *(name for name in given if name.startswith("present."))]
        found = session.run(names, {"input_ids": part, "attention_mask": mask, **states})
        results = dict(zip(names, map(np.asarray, found), strict=True))
        states = {
            f"past_key_values.{n.removeprefix('present.')}": results[n]
            for n in names[len(wanted) :]
        }
        parts.append({name: results[name] for name in wanted})
    joined = {name: _joined([part[name] for part in parts], len(tokens)) for name in wanted}
    values = {probe: shaped(joined[name], probe, config) for name, probe in probes.items()}
    return values | routing(joined, config)


def _session(model: onnx.ModelProto, folder: Path) -> ort.InferenceSession:
    options = ort.SessionOptions()
    options.log_severity_level = 3
    options.intra_op_num_threads = 1
    place = "session.model_external_initializers_file_folder_path"
    options.add_session_config_entry(place, str(folder))
    return ort.InferenceSession(
        model.SerializeToString(), options, providers=["CPUExecutionProvider"]
    )


def _joined(parts: Sequence[np.ndarray], batch_size: int) -> np.ndarray:
    """Bring rows [N, ...], or pieces of them, to [B, T, ...]."""
    shaped_parts = [part.reshape(batch_size, -1, part.shape[-1]) for part in parts]
    return np.concatenate(shaped_parts, axis=1)


def routing(results: Mapping[str, np.ndarray], config: ModelConfig) -> dict[Probe, torch.Tensor]:
    """Return what experts were chosen by and their factors, [B, T, E], from what tokens chose."""
    found: dict[Probe, torch.Tensor] = {}
    for layer_idx in config.moe_layers:
        chosen, weights, scores = (
            results.get(f"layers.{layer_idx}.{name}") for name in (_CHOSEN, _WEIGHTS, _SCORED)
        )
        if chosen is None or weights is None or config.moe is None:
            continue
        dense = torch.zeros(*chosen.shape[:2], config.moe.num_experts)
        at = torch.from_numpy(chosen).long()
        found[Probe(layer_idx, ROUTER)] = dense.scatter(-1, at, torch.from_numpy(weights).float())
        if scores is not None and scores.shape[-1] == config.moe.num_experts:
            found[Probe(layer_idx, SCORES)] = torch.from_numpy(scores).float()
    return found


def _continue(session: OnnxSession, request: OracleRequest) -> Greedy | None:
    states = session.new_states(1)
    return request.continued(
        # Copied: the array is a view of what the session owns.
        lambda ids: torch.from_numpy(session.run(np.array([ids]), states)[0, -1].copy())
    )


if __name__ == "__main__":
    answer_request(trace_with_onnx_runtime, sys.argv[1:])
