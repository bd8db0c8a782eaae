"""An ONNX graph of the decoding step (`dsv3.checkpoint.onnx.step_graph`) over the caches of many rows.

onnxruntime is imported where a session is made: it takes a third of a second.
"""

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from dsv3.inference.slots import SlotCaches

Array = NDArray[Any]

ERRORS_ONLY = 3  # of onnxruntime's levels of logging


def session_of(graph: bytes | Path, weights: Mapping[str, Array] | None = None) -> Any:
    """onnxruntime's session on the CPU, with torch's number of threads. weights: those that are not in the graph."""
    os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")  # read when it is imported
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.inter_op_num_threads = torch.get_num_threads(), 1
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")  # it takes a core from others
    options.log_severity_level = ERRORS_ONLY
    if weights is not None:
        values = [onnxruntime.OrtValue.ortvalue_from_numpy(array) for array in weights.values()]
        options.add_external_initializers(list(weights), values)
    given = str(graph) if isinstance(graph, Path) else graph
    return onnxruntime.InferenceSession(given, options, providers=["CPUExecutionProvider"])


class OnnxStep:
    """Reads tokens of rows, and keeps what their caches hold."""

    def __init__(self, session: Any) -> None:
        self.session = session
        inputs = {one.name: one.shape for one in session.get_inputs()}
        self.widths = {one.name: one.shape[-1] for one in session.get_outputs()}
        self.state_width = inputs["states_in"][1] if "states_in" in inputs else None
        self.outputs = [name for name in self.widths if not name.startswith("present_")]
        self.caches = SlotCaches(
            {name.removeprefix("cache_"): shape[-1] for name, shape in inputs.items() if name.startswith("cache_")}
        )
        self._bound: tuple[Any, ...] = ()
        self._buffers: dict[str, Array] = {}
        self._binding: Any = None

    def run(
        self,
        rows: Sequence[int],
        tokens: Sequence[Sequence[int]],
        picked: Sequence[Sequence[int]],
        states: Sequence[Array] | None = None,
    ) -> "Outputs":
        """Append each row's tokens. picked: of each row, the places among its tokens whose logits are wanted.

        states: of each row [tokens, D], what an MTP module takes.
        """
        longest = max(map(len, tokens))
        first = self.caches.together(rows, longest)
        order = self.caches.order[first : first + len(rows)]
        at = [order.index(row) for row in rows]  # each row's place in the batch
        buffers = self._bind(first, len(rows), longest, sum(map(len, picked)))
        buffers["length"][:] = [self.caches.lengths[row] for row in order]
        buffers["tokens"][:] = 0
        for b, ids in zip(at, tokens, strict=True):
            buffers["tokens"][b, : len(ids)] = ids
        buffers["picked"][:] = [b * longest + t for b, places in zip(at, picked, strict=True) for t in places]
        if states is not None:
            buffers["states_in"][:] = 0
            for b, h_TD in zip(at, states, strict=True):
                buffers["states_in"][b * longest : b * longest + len(h_TD)] = h_TD
        self.session.run_with_iobinding(self._binding)
        for row, ids in zip(rows, tokens, strict=True):
            self.caches.lengths[row] += len(ids)
        return Outputs(buffers, at, longest)

    def _bind(self, first: int, rows: int, tokens: int, picked: int) -> dict[str, Array]:
        """Buffers of a call of these sizes; those of the latest call where the sizes are the same."""
        place = next(iter(self.caches.held.values())).ctypes.data
        bound = (first, rows, tokens, picked, place)
        if bound == self._bound:
            return self._buffers
        given: dict[str, Array] = {
            "tokens": np.zeros((rows, tokens), np.int64),
            "length": np.zeros(rows, np.int64),
            "picked": np.zeros(picked, np.int64),
        }
        if self.state_width is not None:
            given["states_in"] = np.zeros((rows * tokens, self.state_width), np.float32)
        made: dict[str, Array] = {}
        for name in self.outputs:
            count = picked if name in ("logits", "hidden") else rows * tokens
            made[name] = np.zeros((count, self.widths[name]), np.int64 if name.startswith("experts_") else np.float32)
        slots = {name: array[first : first + rows] for name, array in self.caches.held.items()}
        self._binding = binding = self.session.io_binding()
        for name, array in [*given.items(), *((f"cache_{name}", array) for name, array in slots.items())]:
            binding.bind_input(name, "cpu", 0, array.dtype.type, array.shape, array.ctypes.data)
        for name, array in [*made.items(), *((f"present_{name}", array) for name, array in slots.items())]:
            binding.bind_output(name, "cpu", 0, array.dtype.type, array.shape, array.ctypes.data)
        self._bound, self._buffers = bound, given | made
        return self._buffers


class Outputs:
    """What a call of the graph gave; the next one overwrites it."""

    def __init__(self, buffers: Mapping[str, Array], at: Sequence[int], longest: int) -> None:
        self.buffers, self.at, self.longest = buffers, at, longest

    def picked(self, name: str) -> torch.Tensor:
        """A copy of `logits` or `hidden`, [P, ...], in the order in which they were asked for."""
        return torch.from_numpy(self.buffers[name].copy())

    def of_row(self, name: str, row: int, count: int) -> Array:
        """The first `count` positions of the row-th of the rows read."""
        start = self.at[row] * self.longest
        return self.buffers[name][start : start + count]

    def of_all(self, name: str, counts: Sequence[int]) -> Array:
        """The first positions of each row, as many as `counts` says, flat and without padding."""
        if min(counts) == self.longest:
            return self.buffers[name].reshape(-1)
        return np.concatenate([self.of_row(name, i, count) for i, count in enumerate(counts)]).reshape(-1)
