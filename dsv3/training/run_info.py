"""Run info, written before the first step: `run_info.json`.

Sizes, FLOPs and KV cache per token, which make two runs comparable, and the units of the recorded figures.
"""

from collections.abc import Sequence
from typing import Any

from omegaconf import DictConfig

from dsv3.checkpoint.run_folder import RunFolder, write_text_atomically
from dsv3.contracts import Statistic
from dsv3.model.parameters import count_parameters
from dsv3.planning.flops import training_flops
from dsv3.planning.kv_cache import cache_bytes
from dsv3.planning.skeleton import read_skeleton
from dsv3.strict_json import text_of
from dsv3.training.callbacks.intervals import most_tokens

BYTES_OF_BF16 = 2


def write_run_info(config: DictConfig, model: Any, statistics: Sequence[Statistic], folder: RunFolder) -> None:
    """`statistics`: figures of `metrics/train` with their units. `flops_per_token` is forward and backward, with MTP;
    `cache_bytes_per_token` over all layers, in BF16."""
    skeleton = read_skeleton(config)
    info = {
        "parameters": count_parameters(model)._asdict(),
        "flops_per_token": training_flops(skeleton, config.data.sequence_length)["total"],
        "cache_bytes_per_token": cache_bytes(skeleton.attention, skeleton.layers, BYTES_OF_BF16)["bytes"],
        "experts": skeleton.n_experts,
        "top_k": skeleton.top_k,
        "tokens": most_tokens(config),
        "seed": config.seed,
        "statistics": [{"name": figure.name, "unit": figure.unit} for figure in statistics],
    }
    text = text_of(info) + "\n"
    write_text_atomically(folder.path / "run_info.json", text)
