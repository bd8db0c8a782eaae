"""Out of memory: one message that names the keys that help, with the plan's figure for each."""

from collections.abc import Iterator
from dataclasses import replace
from typing import get_args

import torch
from omegaconf import DictConfig

from dsv3.config.part import part
from dsv3.distributed.rank_bytes import text_of_bytes
from dsv3.model.recompute import Part
from dsv3.planning.gpu_memory import gpu_memory
from dsv3.planning.recipe import FORMATS, Recipe, single_gpu
from dsv3.planning.skeleton import read_skeleton


class OutOfMemoryError(ValueError):
    """The configuration asks for more memory than there is."""


def is_out_of_memory(error: BaseException) -> bool:
    """torch has a type of its own for it where its allocator on the GPU fails, and nowhere else."""
    text = str(error)
    untyped = "DefaultCPUAllocator" in text or "CUDA error: out of memory" in text
    return isinstance(error, torch.OutOfMemoryError | MemoryError) or (isinstance(error, RuntimeError) and untyped)


def explained(error: BaseException, config: DictConfig) -> OutOfMemoryError:
    """The error as a user needs it."""
    first = next(iter(str(error).splitlines()), "") or type(error).__name__
    lines = [f"out of memory: {first[:200]}"]
    try:
        lines += _figures(config)
    except (ValueError, TypeError, AttributeError) as reason:  # a stranger's part, of which the plan knows nothing
        lines.append(f"These keys help; there are no figures ({reason}): {', '.join(key for key, _ in _helps(config))}")
    return OutOfMemoryError("\n".join(lines))


def _figures(config: DictConfig) -> Iterator[str]:
    recipe, skeleton = _recipe(config), read_skeleton(config)
    needed = gpu_memory(skeleton, recipe)["total"]
    yield (
        f"By the plan's arithmetic this run needs at least {text_of_bytes(needed)} on its fullest device; allocator "
        "and kernels come on top. It would need, with"
    )
    for key, changed in _helps(config):
        if (then := gpu_memory(skeleton, changed)["total"]) < needed:
            yield f"  {key:<44} {text_of_bytes(then)}"


def _recipe(config: DictConfig) -> Recipe:
    """This run's: of one process, or of ranks that shard the model as in ZeRO-3."""
    data, sizes = config.data, part(config.parallel).sizes(config.trainer.devices, config.trainer.num_nodes)
    alone = single_gpu(tokens=config.run.tokens, seq_len=data.sequence_length, micro_batch=data.micro_batch_size)
    plain = part(config.precision).activation_dtype == torch.float32
    return replace(
        alone,
        gpus=sizes.world,
        pp=sizes.stages,
        ep=sizes.experts,
        zero_stage=3 if sizes.world > 1 else alone.zero_stage,
        recompute="selective" if len(config.recompute) == len(get_args(Part)) else "none",
        formats=FORMATS["fp32" if plain else "bf16"],
    )


def _helps(config: DictConfig) -> Iterator[tuple[str, Recipe]]:
    """Keys with a smaller value, and the run's recipe with it."""
    recipe = _recipe(config)
    if recipe.micro_batch > 1:
        half = recipe.micro_batch // 2
        yield f"data.micro_batch_size={half}", replace(recipe, micro_batch=half)
    if recipe.recompute == "none":
        yield f"recompute=[{','.join(get_args(Part))}]", replace(recipe, recompute="selective")
    if recipe.formats == FORMATS["fp32"]:
        yield "precision=bf16", replace(recipe, formats=FORMATS["bf16"])
    if recipe.seq_len > 1:
        half = recipe.seq_len // 2
        yield f"data.sequence_length={half}", replace(recipe, seq_len=half)
    if recipe.pp == recipe.ep == 1:
        doubled = 2 * recipe.gpus
        key = f"trainer.devices={2 * config.trainer.devices} parallel=sharded"
        yield key, replace(recipe, gpus=doubled, zero_stage=3)
