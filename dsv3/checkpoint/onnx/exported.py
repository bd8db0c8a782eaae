"""Export of a run to ONNX graphs, and what an exported folder says of itself.

    model.onnx                      reads prompts and decodes; mtp_1.onnx, ...: MTP's modules
    weights.bin                     of all graphs, each weight once
    manifest.json                   inputs, outputs, operators, hashes, and what a caller must know
    tokenizer.json, ...             with the chat template

The folder is written beside its place and renamed into it, so that a folder of that name is whole.
"""

import hashlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import onnx

from dsv3.checkpoint.families import Parts
from dsv3.checkpoint.huggingface import check_free, copy_tokenizer, special_ids, write_folder, write_json
from dsv3.checkpoint.loading import Loaded
from dsv3.checkpoint.onnx.expressible import inexpressible
from dsv3.checkpoint.onnx.nodes import BLOCKS, OPSETS, WEIGHTS_FILE, Array, Nodes
from dsv3.checkpoint.onnx.onnx_manifest import FORMAT, MANIFEST, read_manifest
from dsv3.checkpoint.onnx.step_graph import StepGraph
from dsv3.planning.draft_costs import ONNX, draft_costs

ALIGNMENT = 64  # bytes; of every weight in the file

Quantise = Literal["none", "int8"]


def export_onnx(loaded: Loaded, out: Path, *, mtp: bool, quantise: Quantise, weights: str) -> dict[str, Any]:
    """Write the model of a run to `out`, which must be new or empty; return its manifest.

    mtp: with MTP's modules. weights: which ones the model has, for the manifest.

    Raises:
        ValueError: the graph cannot express the model; every reason is in the message.
        FileExistsError: `out` holds something.
    """
    check_free(out)
    parts = Parts.of(loaded.config)
    depth = parts.mtp_layers if mtp else 0
    settings = {"bits": 8, "block": block_of(parts)} if quantise == "int8" else {}
    if problems := inexpressible(loaded.config):
        raise ValueError(f"an ONNX graph cannot express this model: {'; '.join(problems)}")
    main = StepGraph(loaded.model, parts, **settings)
    graphs = {"model": main.main(states=depth > 0)}
    graphs |= {f"mtp_{k}": StepGraph(loaded.model, parts, **settings).mtp(k) for k in range(1, depth + 1)}
    tokenizer, costs = loaded.folder.tokenizer_path, draft_costs(loaded.model, ONNX)
    manifest = {
        "format": FORMAT,
        "opsets": OPSETS,
        "custom_operators": sorted({n.op_type for g in graphs.values() for n in g.nodes if n.domain}),
        "quantise": quantise,
        "tokens_seen": loaded.tokens,
        "weights": weights,
        "vocab_size": parts.model["vocab_size"],
        "sequence_length": loaded.config.data.sequence_length,
        "fim_order": loaded.config.data.fim.order,
        **special_ids(tokenizer),
        "moe_layers": main.routed,
        "n_routed_experts": parts.router["n_experts"] if main.routed else 0,
        "draft_costs": costs.written() if costs is not None and depth else None,
        "mtp_takes_normed_states": bool(loaded.model.mtp.after_final_norm) if depth else None,
        "graphs": {name: signature(graph) for name, graph in graphs.items()},
    }

    def write(folder: Path) -> None:
        places = write_weights(folder / WEIGHTS_FILE, list(graphs.values()))
        for name, graph in graphs.items():
            onnx.save(graph.model(name, places), folder / f"{name}.onnx")
            onnx.checker.check_model(folder / f"{name}.onnx")
        copy_tokenizer(tokenizer, folder)
        hashes = {path.name: sha256_of(path) for path in sorted(folder.iterdir())}
        write_json(folder / MANIFEST, manifest | {"sha256": hashes})

    write_folder(out, write)
    return read_manifest(out)


def block_of(parts: Parts) -> int:
    """Weights that share a scale: the largest size that divides what experts read.

    Raises ValueError where none does.
    """
    sizes = {"model.dim": parts.model["dim"]}
    if parts.has_experts or parts.mtp_layers:
        sizes["model.moe_inter_dim"] = parts.model["moe_inter_dim"]
    for block in BLOCKS:
        if all(size % block == 0 for size in sizes.values()):
            return block
    name, size = next((name, size) for name, size in sizes.items() if size % BLOCKS[-1])
    raise ValueError(f"quantise=int8: {name}={size} must be a multiple of {BLOCKS[-1]}; quantise=none exports in FP32")


def write_weights(file: Path, graphs: Sequence[Nodes]) -> dict[str, tuple[int, int]]:
    """Write each weight once; (offset, length) by name."""
    arrays: Mapping[str, Array] = {name: array for graph in graphs for name, array in graph.weights.items()}
    places = {}
    with file.open("wb") as stream:
        for name, array in arrays.items():
            stream.write(bytes(-stream.tell() % ALIGNMENT))
            places[name] = (stream.tell(), array.nbytes)
            stream.write(array.tobytes())
    return places


def signature(graph: Nodes) -> dict[str, Any]:
    """Names, types and shapes of inputs and outputs; sizes that a call chooses have names."""
    return {"inputs": list(map(described, graph.inputs)), "outputs": list(map(described, graph.outputs))}


def described(value: onnx.ValueInfoProto) -> dict[str, Any]:
    tensor = value.type.tensor_type
    shape = [size.dim_param or size.dim_value for size in tensor.shape.dim]
    return {"name": value.name, "type": str(onnx.helper.tensor_dtype_to_np_dtype(tensor.elem_type)), "shape": shape}


def sha256_of(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
