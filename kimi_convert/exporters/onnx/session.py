"""Run an exported graph with ONNX Runtime, its states kept between calls.

model = OnnxSession(folder)
states = model.new_states(batch_size=1)
logits = model.run(prompt, states)
logits = model.run(next_token, states)
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import onnxruntime as ort

from kimi_convert.errors import CheckpointError, UsageError

_PAST, _PRESENT = "past_key_values.", "present."
_DTYPES = {"tensor(float)": np.float32, "tensor(float16)": np.float16}
_ERRORS_ONLY = 3


@dataclass(slots=True)
class States:
    """What a graph continues from; a run replaces every value."""

    values: dict[str, ort.OrtValue]
    mask: np.ndarray = field(repr=False)  # [B, S] int64, of the tokens seen


class OnnxSession:
    """One loaded graph."""

    def __init__(
        self,
        model: str | Path,
        *,
        threads: int | None = None,
        session_config: Mapping[str, str] | None = None,
        libraries: Sequence[str] = (),
    ) -> None:
        """Load a file, or `model.onnx` in a folder.

        Args:
            model: the file or folder.
            threads: of an operator; None leaves it to ONNX Runtime.
            session_config: entries such as `session.disable_prepacking`.
            libraries: of custom operators, to be registered.

        Raises:
            CheckpointError: ONNX Runtime does not load it.
        """
        path = Path(model)
        path = path / "model.onnx" if path.is_dir() else path
        options = ort.SessionOptions()
        options.log_severity_level = _ERRORS_ONLY
        if threads is not None:
            options.intra_op_num_threads = threads
        for key, value in (session_config or {}).items():
            options.add_session_config_entry(key, value)
        for library in libraries:
            options.register_custom_ops_library(library)
        try:
            self._session = ort.InferenceSession(
                str(path), options, providers=["CPUExecutionProvider"]
            )
        except Exception as error:
            raise CheckpointError(
                f"ONNX Runtime {ort.__version__} does not load the graph",
                where=path,
                found=str(error).splitlines()[0],
            ) from error
        self._inputs = {
            value.name: value for value in self._session.get_inputs() if _PAST in value.name
        }
        self.vocab_size: int = self._session.get_outputs()[0].shape[-1]  # logits come first
        self._outputs = [value.name for value in self._session.get_outputs()]

    def new_states(self, batch_size: int) -> States:
        """Return the states before the first token: zeros, and no keys."""
        values = {}
        for name, value in self._inputs.items():
            sizes = [batch_size, *(0 if isinstance(n, str) else n for n in value.shape[1:])]
            zeros = np.zeros(sizes, dtype=_DTYPES[value.type])
            values[name] = ort.OrtValue.ortvalue_from_numpy(zeros)
        return States(values, np.zeros((batch_size, 0), dtype=np.int64))

    def run(
        self, tokens: np.ndarray, states: States, mask: np.ndarray | None = None
    ) -> np.ndarray:
        """Return logits, and put the states after the tokens in place of those before.

        Args:
            tokens: [B, T] int64.
            states: continued from.
            mask: [B, T], 0 for padding, which comes before the first token; None for no padding.

        Returns:
            [B, T, vocab] fp32, or [B, 1, vocab] if the graph gives the last logits alone.

        Raises:
            UsageError: there are no tokens, or one that the model does not know.
        """
        if not tokens.size or tokens.min() < 0 or tokens.max() >= self.vocab_size:
            raise UsageError(
                "tokens cannot be run",
                expected=f"at least one, each 0 to {self.vocab_size - 1}",
                found=f"{tokens.min()} to {tokens.max()}" if tokens.size else "none",
            )
        new = np.ones(tokens.shape, dtype=np.int64) if mask is None else mask.astype(np.int64)
        states.mask = np.concatenate((states.mask, new), axis=1)
        feeds = {
            "input_ids": ort.OrtValue.ortvalue_from_numpy(np.ascontiguousarray(tokens, np.int64)),
            "attention_mask": ort.OrtValue.ortvalue_from_numpy(states.mask),
            **states.values,
        }
        results = dict(
            zip(
                self._outputs,
                self._session.run_with_ort_values(self._outputs, feeds),
                strict=True,
            )
        )
        states.values = {
            _PAST + name.removeprefix(_PRESENT): value
            for name, value in results.items()
            if name.startswith(_PRESENT)
        }
        return results["logits"].numpy()
