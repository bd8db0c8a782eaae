"""Export a trained model as a Hugging Face checkpoint."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dsv3.cli import REQUIRED, option


@dataclass
class Options:
    checkpoint: str = option(REQUIRED, "a run folder, or one of its checkpoint files")
    out: str = option(REQUIRED, "the folder to write, new or empty")
    weights: str = option("live", "live (current), or ema (exponential moving average)", choices=("live", "ema"))
    mtp: bool = option(True, "also write the MTP layers, in the published layout")
    dtype: str = option("float32", "dtype of the stored weights", choices=("float32", "bfloat16"))
    max_shard_size: str = option("5GB", "maximum file size, with KB, MB or GB")


def run(options: Options) -> dict[str, Any]:
    """Write the folder, print what it holds, and return its config.json and its files.

    Raises:
        ValueError: Hugging Face's format cannot hold the model, or an option has no such value.
        FileNotFoundError: `checkpoint` is not a run's. FileExistsError: `out` holds something.
    """
    import torch

    from dsv3.checkpoint.huggingface import export_run
    from dsv3.checkpoint.shards import parse_size

    out = Path(options.out)
    config = export_run(
        options.checkpoint,
        out,
        weights="ema" if options.weights == "ema" else "live",
        mtp=options.mtp,
        dtype=getattr(torch, options.dtype),
        max_shard_bytes=parse_size(options.max_shard_size),
    )
    files = {path.name: path.stat().st_size for path in sorted(out.iterdir())}
    print(f"{config['architectures'][0]} in {out}")
    for name, size in files.items():
        print(f"  {name}  {size:,} bytes")
    return {"out": str(out), "config": config, "files": files}
