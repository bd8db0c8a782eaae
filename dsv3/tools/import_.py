"""Import a Hugging Face checkpoint (DeepSeek-V3, V2 or LLaMA-like) as a run for generate and evaluate."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dsv3.cli import REQUIRED, option


@dataclass
class Options:
    path: str = option(REQUIRED, "folder with config.json, safetensors (block-wise FP8 too) and a tokenizer")
    out: str = option(REQUIRED, "the run folder to write, new or empty")
    precision: str = option("bf16", "precision of the imported model, an option of conf/precision")


def run(options: Options) -> dict[str, Any]:
    """Write the run folder, print its sizes, and return them.

    Raises:
        ValueError: the model is none that our options build, or its weights do not fit its config.json.
        FileNotFoundError: `path` lacks config.json or weights. FileExistsError: `out` holds something.
    """
    import torch

    from dsv3.build import build_model
    from dsv3.checkpoint.huggingface import import_folder
    from dsv3.model.parameters import count_parameters

    out = Path(options.out)
    config = import_folder(Path(options.path), out, precision=options.precision)
    with torch.device("meta"):
        count = count_parameters(build_model(config, init=False))
    print(f"{out}: {count.total:,} parameters, {count.active:,} active per token, {count.mtp:,} in MTP modules")
    return {"out": str(out), "total": count.total, "active": count.active, "mtp": count.mtp}
