"""Nodes, constants, weights, inputs and outputs of an ONNX graph, as they are written one after another."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import onnx
import torch
from numpy.typing import NDArray
from onnx import TensorProto, helper
from torch import Tensor

Array = NDArray[Any]

MICROSOFT = "com.microsoft"
OPSETS = {"": 24, MICROSOFT: 1}
"""Versions of the operator sets that graphs are written in. onnxruntime has the custom operators of the second one."""
IR_VERSION = 11

WEIGHTS_FILE = "weights.bin"
"""Next to the graphs of an export; a session in memory is given the arrays instead."""

BLOCKS = (64, 32, 16)
"""Weights of a row that may share an INT8 scale; onnxruntime has kernels for these sizes."""


class Nodes:
    """A graph in the making. Every method that writes a node returns the names of its outputs.

    bits: 32, or 8 for linear layers with INT8 weights. block: weights that share a scale there.
    """

    def __init__(self, *, bits: int = 32, block: int = 64) -> None:
        self.bits, self.block = bits, block
        self.nodes: list[onnx.NodeProto] = []
        self.inputs: list[onnx.ValueInfoProto] = []
        self.outputs: list[onnx.ValueInfoProto] = []
        self.weights: dict[str, Array] = {}
        self._constants: dict[tuple[bytes, tuple[int, ...], str], onnx.TensorProto] = {}

    def op(self, kind: str, *inputs: str, domain: str = "", out: str | None = None, **attributes: Any) -> str:
        """One node with one output, called `out` or after the node."""
        return self.ops(kind, *inputs, outs=[out or f"{kind}_{len(self.nodes)}"], domain=domain, **attributes)[0]

    def ops(
        self, kind: str, *inputs: str, outs: int | Sequence[str], domain: str = "", **attributes: Any
    ) -> Sequence[str]:
        """One node with several outputs: so many, or of these names (empty: not computed)."""
        number = len(self.nodes)
        names = [f"{kind}_{number}_{i}" for i in range(outs)] if isinstance(outs, int) else outs
        node = helper.make_node(kind, list(inputs), list(names), name=f"{kind}_{number}", domain=domain, **attributes)
        self.nodes.append(node)
        return names

    def const(self, value: Any, dtype: Any = np.int64) -> str:
        array = np.asarray(value, dtype)
        key = (array.tobytes(), array.shape, array.dtype.str)
        if key not in self._constants:
            self._constants[key] = onnx.numpy_helper.from_array(array, f"constant_{len(self._constants)}")
        return str(self._constants[key].name)

    def input(self, name: str, *shape: int | str, kind: int = TensorProto.FLOAT) -> str:
        self.inputs.append(helper.make_tensor_value_info(name, kind, shape))
        return name

    def output(self, name: str, *shape: int | str, kind: int = TensorProto.FLOAT) -> str:
        self.outputs.append(helper.make_tensor_value_info(name, kind, shape))
        return name

    def weight(self, name: str, tensor: Tensor) -> str:
        """A weight as it stands, in FP32; UINT8 stays."""
        kept = tensor if tensor.dtype == torch.uint8 else tensor.float()
        self.weights[name] = kept.detach().contiguous().cpu().numpy()
        return name

    def linear(self, x: str, name: str, weight_NK: Tensor) -> str:
        """x W^T; the weight is [out, in], as torch has it."""
        if self.bits == 32:
            return self.op("MatMul", x, self.weight(name, weight_NK.T))
        out, width = weight_NK.shape
        codes, scales = quantised(weight_NK, self.block)
        given = self.weight(f"{name}.codes", codes.view(out, -1, self.block)), self.weight(f"{name}.scales", scales)
        sizes: dict[str, Any] = {"K": width, "N": out, "bits": 8, "block_size": self.block, "accuracy_level": 4}
        return self.op("MatMulNBits", x, *given, domain=MICROSOFT, **sizes)

    def norm(self, x: str, name: str, weight_D: Tensor, eps: float) -> str:
        """RMSNorm."""
        return self.op("RMSNormalization", x, self.weight(name, weight_D), axis=-1, epsilon=eps)

    def add_norm(
        self, x: str, y: str, name: str, weight_D: Tensor, eps: float, *, total: bool = True
    ) -> tuple[str, str]:
        """RMSNorm of x + y, and x + y (where `total`, else no name)."""
        kind = "SkipSimplifiedLayerNormalization"
        normed, added = f"{kind}_{len(self.nodes)}", f"added_{len(self.nodes)}" if total else ""
        outs = [normed, "", "", added] if total else [normed]
        self.ops(kind, x, y, self.weight(name, weight_D), outs=outs, domain=MICROSOFT, epsilon=eps)
        return normed, added

    def swiglu(self, x: str, name: str, gate_up: Tensor, down: Tensor) -> str:
        """W_down (silu(W_gate x) * W_up x)."""
        gate, up = self.ops("Split", self.linear(x, f"{name}.gate_up", gate_up), outs=2, axis=-1, num_outputs=2)
        silu = self.op("QuickGelu", gate, domain=MICROSOFT, alpha=1.0)
        return self.linear(self.op("Mul", silu, up), f"{name}.down", down)

    def model(self, name: str, places: Mapping[str, tuple[int, int]] | None = None) -> onnx.ModelProto:
        """The graph, weights outside it: in `WEIGHTS_FILE`, each at its (offset, length) where `places` are given."""
        held = [external(name, array, None if places is None else places[name]) for name, array in self.weights.items()]
        graph = helper.make_graph(self.nodes, name, self.inputs, self.outputs, [*self._constants.values(), *held])
        opsets = [helper.make_opsetid(domain, version) for domain, version in OPSETS.items()]
        return helper.make_model(graph, opset_imports=opsets, ir_version=IR_VERSION, producer_name="dsv3")


def external(name: str, array: Array, place: tuple[int, int] | None) -> onnx.TensorProto:
    """A weight that lies outside its graph."""
    kind = helper.np_dtype_to_tensor_dtype(array.dtype)
    tensor = TensorProto(name=name, dims=array.shape, data_type=kind, data_location=TensorProto.EXTERNAL)
    tensor.external_data.add(key="location", value=WEIGHTS_FILE)
    if place is not None:
        for key, number in zip(("offset", "length"), place, strict=True):
            tensor.external_data.add(key=key, value=str(number))
    return tensor


def quantised(weight_NK: Tensor, block: int) -> tuple[Tensor, Tensor]:
    """INT8 weights around 128 as uint8 [N, K padded to whole blocks], and a float32 scale a block [N, K / block]."""
    rows, width = weight_NK.shape
    padded = torch.nn.functional.pad(weight_NK.detach().float(), (0, -width % block))
    blocks = padded.view(rows, -1, block)
    scales = blocks.abs().amax(-1, keepdim=True).clamp_min(1e-12) / 127
    codes = (blocks / scales).round_().add_(128).to(torch.uint8)
    return codes.view(rows, -1), scales.squeeze(-1)
