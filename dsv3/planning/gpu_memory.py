"""Memory of the most loaded GPU of a pipeline, in bytes.

    weights      compute copies: linear layers and routed experts in one format, the rest in another
    gradients    of all the parameters that the GPU holds: they add up over micro-batches, and ZeRO-1 leaves them whole
    optimiser    master weights and two moments; ZeRO-1 divides them among the GPUs that hold the same parameters: DP of
                 them, DP / EP for a routed expert, and twice as many with DualPipe, which holds every stage twice
    gathered     with ZeRO-3 (zero3.py), whole weights in a pass; weights, gradients and optimiser are then shards
    whole gradients  with ZeRO-3 and several micro-batches, their sum, which is sharded after the last one
    activations  a stage's, times the micro-batches in flight (bubbles.py), under a balanced load of the experts
    logits       FP32, of one micro-batch, where the head is
    recomputed   with recompute=full, the block that is being computed again

Without ZeRO-3, a memory's tables (`memory=ngram`) are counted as if their gradients and moments were dense, which is
too much. Buffers of kernels and of communication, the allocator's waste and the CUDA context are not counted.
"""

from dsv3.planning.activations import block_activations, logits, mtp_activations
from dsv3.planning.bubbles import pipeline_costs
from dsv3.planning.recipe import Recipe
from dsv3.planning.skeleton import Skeleton
from dsv3.planning.stages import Part, parts_of_pipeline
from dsv3.planning.zero3 import gathered, sharded_states, whole_gradients


def gpu_memory(s: Skeleton, r: Recipe) -> dict[str, float]:
    """Kind -> bytes on the fullest GPU, and their `total`; `mean_total` is the mean over the pipeline's GPUs.

    Raises ValueError where experts or layers cannot be spread as the recipe says.
    """
    if s.n_experts % r.ep:
        raise ValueError(f"ep={r.ep}: must divide the {s.n_experts} experts")
    gpus = [_memory(s, r, part) for part in parts_of_pipeline(s, pp=r.pp, pipeline=r.pipeline)]
    fullest = max(gpus, key=lambda gpu: gpu["total"])
    return {**fullest, "mean_total": sum(gpu["total"] for gpu in gpus) / len(gpus)}


def _memory(s: Skeleton, r: Recipe, part: Part) -> dict[str, float]:
    memory = {
        **(_sharded(s, r, part) if r.zero_stage == 3 else _replicated(s, r, part)),
        "activations": _activations(s, r, part),
        "logits": logits(s) * r.seq_len * r.micro_batch if part.has_head else 0,
        "recomputed": _block_again(s, r, part) if r.recompute == "full" else 0,
    }
    return {**memory, "total": sum(memory.values())}


def _replicated(s: Skeleton, r: Recipe, part: Part) -> dict[str, float]:
    f, linear, other = r.formats, part.weights.linear, part.weights.other
    experts = part.weights.experts // r.ep
    holders = len(part.stages) * r.dp if r.zero_stage else 1
    expert_holders = holders // r.ep if r.zero_stage else 1
    return {
        "weights": (linear + experts) * f.weight + other * f.other_weight,
        "gradients": (linear + other + experts) * f.gradient,
        "optimiser": (f.master + 2 * f.moment) * ((linear + other) / holders + experts / expert_holders),
    }


def _sharded(s: Skeleton, r: Recipe, part: Part) -> dict[str, float]:
    states = sharded_states(s, r, part)
    return {
        "weights": states.parameters,
        "gradients": states.gradients,
        "optimiser": states.optimiser,
        "gathered": gathered(s, r, part),
        "whole gradients": whole_gradients(s, r, part) if r.num_microbatches > 1 else 0,
    }


def _activations(s: Skeleton, r: Recipe, part: Part) -> float:
    per_token = part.dense_blocks * block_activations(s, r.formats, r.recompute, moe=False)
    per_token += part.moe_blocks * block_activations(s, r.formats, r.recompute, moe=True)
    per_token += part.mtp_modules * mtp_activations(s, r.formats, r.recompute)
    costs = pipeline_costs(r.pipeline, pp=r.pp, num_microbatches=r.num_microbatches, times=r.times)
    # Where a GPU has two stages, each holds half of the micro-batches in flight.
    in_flight = min(costs.activations, r.num_microbatches) / len(part.stages)
    return per_token * r.seq_len * r.micro_batch * in_flight


def _block_again(s: Skeleton, r: Recipe, part: Part) -> float:
    kinds = [moe for moe, count in ((False, part.dense_blocks), (True, part.moe_blocks)) if count]
    per_token = max(block_activations(s, r.formats, "none", moe=moe) for moe in kinds)
    return per_token * r.seq_len * r.micro_batch
