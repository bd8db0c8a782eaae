"""Export a trained model as a Hugging Face checkpoint with a model card, or with format=onnx as ONNX graphs.

`push=user/name` uploads the checkpoint too, with the login of `hf auth login` or HF_TOKEN; a new repository is private.
`format=onnx` writes one graph that reads prompts and decodes over caches, one for each MTP module, their weights, a
manifest, the tokenizer and its chat template: see docs/onnx.md. dtype, max_shard_size, license and push are of Hugging
Face's format.
"""

from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from dsv3.cli import REQUIRED, option

FORMATS = ("onnx",)


@dataclass
class Options:
    checkpoint: str = option(REQUIRED, "a run folder, or one of its checkpoint files")
    out: str = option(REQUIRED, "the folder to write, new or empty")
    weights: str = option("live", "live (current), or ema (exponential moving average)", choices=("live", "ema"))
    mtp: bool = option(True, "also write the MTP layers")
    dtype: str = option("float32", "dtype of the stored weights", choices=("float32", "bfloat16"))
    max_shard_size: str = option("5GB", "maximum file size, with KB, MB, GB or TB")
    quantise: str = option("none", "with format=onnx: int8 stores linear layers in INT8", choices=("none", "int8"))
    allow: list[str] = option([], "with format=onnx: classes outside conf/ that the run may name: [package.Class]")
    license: str | None = option(None, "licence of the weights for the model card, as the Hub names it: apache-2.0")
    push: str | None = option(None, "user/name on the Hugging Face Hub to upload to; null: nothing leaves this machine")


def run(options: Options) -> dict[str, Any]:
    """Write the folder, print what it holds, and return its config.json and its files.

    Raises:
        ValueError: the format cannot hold the model, an option has no such value, or the Hub refuses.
        FileNotFoundError: `checkpoint` is not a run's. FileExistsError: `out` holds something.
    """
    if getattr(options, "format", "") == "onnx":
        if options.push is not None:
            raise ValueError(f"push={options.push}: is for Hugging Face's format, without format=onnx")
        return run_onnx(options)
    if options.quantise != "none":
        raise ValueError(f"quantise={options.quantise}: is for format=onnx")
    import torch

    from dsv3.checkpoint.huggingface import export_run
    from dsv3.checkpoint.shards import parse_size
    from dsv3.checkpoint.upload import check_name, push
    from dsv3.reporting.model_card import model_card

    if options.push is not None:
        check_name(options.push)
    out = Path(options.out)
    config = export_run(
        options.checkpoint,
        out,
        weights="ema" if options.weights == "ema" else "live",
        mtp=options.mtp,
        dtype=getattr(torch, options.dtype),
        max_shard_bytes=parse_size(options.max_shard_size),
        card=partial(model_card, license=options.license, repository=options.push),
    )
    files = told(f"{config['architectures'][0]} in {out}", out)
    uploaded = push(out, options.push) if options.push is not None else None
    if uploaded:
        print(f"uploaded: {uploaded}")
    return {"out": str(out), "config": config, "files": files, "uploaded": uploaded}


def run_onnx(options: Options) -> dict[str, Any]:
    from dsv3.checkpoint.huggingface import check_free
    from dsv3.checkpoint.loading import load_run
    from dsv3.checkpoint.onnx.exported import export_onnx

    out = Path(options.out)
    check_free(out)
    loaded = load_run(options.checkpoint, allow=options.allow)
    loaded.use(options.weights)
    quantise: Any = options.quantise
    manifest = export_onnx(loaded, out, mtp=options.mtp, quantise=quantise, weights=options.weights)
    return {"out": str(out), "manifest": manifest, "files": told(f"ONNX graphs in {out}", out)}


def told(title: str, out: Path) -> dict[str, int]:
    """Print the files of a folder; their sizes."""
    files = {path.name: path.stat().st_size for path in sorted(out.iterdir())}
    print(title)
    for name, size in files.items():
        print(f"  {name}  {size:,} bytes")
    return files
