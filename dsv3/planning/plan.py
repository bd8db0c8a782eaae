"""The whole plan of a model and a recipe as one dictionary of plain numbers, ready for JSON."""

from dataclasses import asdict
from typing import Any

from dsv3.planning.bubbles import PIPELINES, pipeline_costs
from dsv3.planning.communication import all_to_all
from dsv3.planning.duration import days, gpu_hours, implied_mfu
from dsv3.planning.flops import forward_flops, recomputed_flops, training_flops
from dsv3.planning.gpu_memory import gpu_memory
from dsv3.planning.kv_cache import cache_bytes
from dsv3.planning.recipe import V3_PUBLISHED, Recipe
from dsv3.planning.sizes import parameters
from dsv3.planning.skeleton import AttentionLayer, Skeleton


def make_plan(
    s: Skeleton, r: Recipe, *, attentions: dict[str, AttentionLayer], known_gpu_hours: float | None
) -> dict[str, Any]:
    """Everything that planning knows.

    attentions: name -> attention to compare the cache of. known_gpu_hours: of a training, to derive its MFU from.
    Raises ValueError where the recipe does not fit the model.
    """
    r.check()
    counts, flops = parameters(s), training_flops(s, r.seq_len)
    plan = {
        "recipe": {**asdict(r), "times": r.times._asdict(), "dp": r.dp, "tokens_per_step": r.tokens_per_step},
        "parameters": {name: count._asdict() for name, count in counts.items()},
        "flops_per_token": {
            "forward": forward_flops(s, r.seq_len // 2),
            "training": flops,
            "recomputed": recomputed_flops(s, r.seq_len, r.recompute),
        },
        "cache_per_token": {name: cache_bytes(a, s.layers, r.formats.cache) for name, a in attentions.items()},
        "memory_per_gpu": gpu_memory(s, r),
        "pipeline": _pipelines(r),
        "duration": _duration(s, r, known_gpu_hours),
    }
    if s.n_experts:
        plan["all_to_all"] = _traffic(s, r)
    if counts["model"].total == V3_PUBLISHED.parameters:
        plan["published"] = _beside_published(s, r)
    return plan


def _pipelines(r: Recipe) -> dict[str, Any]:
    fitting = [name for name in PIPELINES if name != "dualpipe" or r.pp % 2 == 0]
    return {
        name: pipeline_costs(name, pp=r.pp, num_microbatches=r.num_microbatches, times=r.times)._asdict()
        for name in fitting
    }


def _traffic(s: Skeleton, r: Recipe) -> dict[str, Any]:
    """Of one MoE layer forward, and of all of them forward and backward (MTP's included)."""
    layers = s.moe_layers + s.mtp.moe_blocks
    traffic: dict[str, Any] = {"moe_layers": layers}
    for name, limited in (("limited", True), ("unlimited", False)):
        layer = all_to_all(s, r, limited=limited)
        traffic[name] = {
            **layer._asdict(),
            "training_bytes_at_most": 2 * layers * layer.bytes_at_most,
            "training_bytes_expected": 2 * layers * layer.bytes_expected,
        }
    return traffic


def _duration(s: Skeleton, r: Recipe, known_gpu_hours: float | None) -> dict[str, Any]:
    """Hours at the recipe's MFU; with known hours, the MFU that they imply."""
    flops = training_flops(s, r.seq_len)
    hours = gpu_hours(flops_per_token=flops["total"], tokens=r.tokens, peak=r.peak, mfu=r.mfu)
    duration: dict[str, Any] = {
        "flops": flops["total"] * r.tokens,
        "gpu_hours": hours,
        "days": days(hours, r.gpus),
        "gpu_hours_per_trillion_tokens": hours / r.tokens * 1e12,
        "seconds_per_step": hours / r.gpus * 3600 * r.tokens_per_step / r.tokens,
    }
    if known_gpu_hours is not None:
        duration["known_gpu_hours"] = known_gpu_hours
        duration["implied_mfu"] = _implied_mfu(flops, r, tokens=r.tokens, hours=known_gpu_hours)
    return duration


def _implied_mfu(flops: dict[str, int], r: Recipe, *, tokens: float, hours: float) -> dict[str, dict[str, float]]:
    """Against each peak, with MTP's operations and without."""
    return {
        peak: {
            part: implied_mfu(flops_per_token=flops[part], tokens=tokens, peak=speed, hours=hours)
            for part in ("total", "model")
        }
        for peak, speed in (("peak", r.peak), ("peak_fp8", r.peak_fp8))
    }


def _beside_published(s: Skeleton, r: Recipe) -> dict[str, Any]:
    """Our hours for the published training, at the recipe's MFU, and the MFU that the published hours imply."""
    p = V3_PUBLISHED
    flops = training_flops(s, p.seq_len)
    ours = gpu_hours(flops_per_token=flops["total"], tokens=p.tokens, peak=r.peak, mfu=r.mfu)
    return {
        **p._asdict(),
        "days": days(p.gpu_hours, p.gpus),
        "our_gpu_hours": ours,
        "our_gpu_hours_per_trillion_tokens": ours / p.tokens * 1e12,
        "our_days": days(ours, p.gpus),
        "implied_mfu": _implied_mfu(flops, r, tokens=p.tokens, hours=p.gpu_hours),
    }
