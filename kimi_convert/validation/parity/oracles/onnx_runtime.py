"""An exported graph in ONNX Runtime, on the CPU.

Logits and states are those of the graph as it is. What is inside comes from a second session, whose
graph gives named values out: that changes what the runtime may fuse, so it only serves to find where
a difference starts.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import onnx
import onnxruntime as ort
import torch

from kimi_convert.config.architecture import ModelConfig
from kimi_convert.config.huggingface import read_config
from kimi_convert.exporters.onnx.session import OnnxSession, States
from kimi_convert.validation.parity.oracles.process import (
    DECODE,
    PREFILL,
    OracleRequest,
    answer_request,
)
from kimi_convert.validation.parity.stages import (
    EMBED_PROBE,
    HIDDEN,
    LOGITS_PROBE,
    ROUTER,
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
_PER_HEAD = ("kda.decay", "kda.recurrence")
_CHOSEN, _WEIGHTS = "router.indices", "router.weights"


def trace_with_onnx_runtime(request: OracleRequest) -> dict[str, Trace]:
    """Run a request; a graph that gives the last logits alone has no prefill to compare."""
    session = OnnxSession(request.artifact, threads=1)
    tokens = request.token_ids.numpy()
    traces: dict[str, Trace] = {}
    logits, states = _run(session, tokens, pieces=1)
    greedy = _continue(session, request)
    if logits.shape[1] == tokens.shape[1]:
        inside = _inside(request, tokens)
        traces[PREFILL] = Trace({**inside, **_kept(states), LOGITS_PROBE: logits}, greedy)
    logits, states = _run(session, tokens, pieces=tokens.shape[1])
    traces[DECODE] = Trace({**_kept(states), LOGITS_PROBE: logits}, greedy)
    return traces


def named_values(model: onnx.ModelProto) -> dict[str, Probe]:
    """Return the values of a graph that are stages, by their names."""
    found: dict[str, Probe] = {}
    for node in model.graph.node:
        for name in node.output:
            scope, _, rest = name.partition(".")
            layer, _, inner = rest.partition(".")
            if scope == "layers" and inner in STAGES:
                found[name] = Probe(int(layer), STAGES[inner])
            elif name == "embedded":
                found[name] = EMBED_PROBE
    return found


def shaped(
    values: np.ndarray, probe: Probe, config: ModelConfig, *, batch_size: int
) -> torch.Tensor:
    """Bring rows [N, ...] to [B, T, ...], and heads apart where stages have them apart."""
    found = torch.from_numpy(np.array(values, dtype=np.float32))
    found = found.reshape(batch_size, -1, found.shape[-1])
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


def _inside(request: OracleRequest, tokens: np.ndarray) -> dict[Probe, torch.Tensor]:
    """Run a graph that also gives its named values out."""
    path = Path(request.artifact) / MODEL_FILE
    model = onnx.load(str(path), load_external_data=False)
    config = read_config(Path(request.folder))
    probes = named_values(model)
    routed = [
        n for node in model.graph.node for n in node.output if n.endswith((_CHOSEN, _WEIGHTS))
    ]
    given = {value.name for value in model.graph.output}
    for name in {*probes, *routed} - given:
        model.graph.output.append(onnx.ValueInfoProto(name=name))
    options = ort.SessionOptions()
    options.log_severity_level = 3
    options.intra_op_num_threads = 1
    folder = "session.model_external_initializers_file_folder_path"
    options.add_session_config_entry(folder, str(path.parent))
    session = ort.InferenceSession(
        model.SerializeToString(), options, providers=["CPUExecutionProvider"]
    )
    empty = OnnxSession(request.artifact, threads=1).new_states(len(tokens))
    feeds = {name: value.numpy() for name, value in empty.values.items()}
    feeds |= {"input_ids": tokens, "attention_mask": np.ones_like(tokens)}
    names = [*probes, *routed]
    given_out = map(np.asarray, session.run(names, feeds))
    results = dict(zip(names, given_out, strict=True))
    found = {
        probe: shaped(results[name], probe, config, batch_size=len(tokens))
        for name, probe in probes.items()
    }
    return found | routing(results, config, batch_size=len(tokens))


def routing(
    results: Mapping[str, np.ndarray], config: ModelConfig, *, batch_size: int
) -> dict[Probe, torch.Tensor]:
    """Return the factor on every expert's output [B, T, E] from what each token chose."""
    found: dict[Probe, torch.Tensor] = {}
    for layer_idx in config.moe_layers:
        chosen = results.get(f"layers.{layer_idx}.{_CHOSEN}")
        weights = results.get(f"layers.{layer_idx}.{_WEIGHTS}")
        if chosen is not None and weights is not None and config.moe is not None:
            dense = torch.zeros(len(chosen), config.moe.num_experts)
            dense.scatter_(1, torch.from_numpy(chosen).long(), torch.from_numpy(weights).float())
            found[Probe(layer_idx, ROUTER)] = dense.reshape(batch_size, -1, dense.shape[-1])
    return found


def _continue(session: OnnxSession, request: OracleRequest) -> Greedy | None:
    if not request.new_tokens:
        return None
    states = session.new_states(1)
    pending = np.array([request.prompt])
    rows: list[torch.Tensor] = []
    for _ in range(request.new_tokens):
        rows.append(torch.from_numpy(session.run(pending, states)[0, -1].copy()))
        pending = np.array([[int(rows[-1].argmax())]])
    logits = torch.stack(rows)
    return Greedy(logits.argmax(-1), logits)


if __name__ == "__main__":
    answer_request(trace_with_onnx_runtime, sys.argv[1:])
