"""Bounds on values and relations between them: one small function each, and the table of them.

A relation holds where its keys exist and are numbers; a stranger's plugin without them is not concerned. Router
shapes are read from `router`, so that a router without groups has no group bound; they are reported at the key that
holds the value, mostly in `model`.
"""

import os
from collections.abc import Callable, Collection, Iterator
from pathlib import Path
from typing import Any, NamedTuple

from dsv3.config.problems import Problem, one_of
from dsv3.config.view import View


class Number(NamedTuple):
    key: str  # the key that holds it
    value: float


class Facts:
    """Looks up what relations need. Keys in `skip` count as absent: something was already reported about them."""

    def __init__(self, view: View, skip: Collection[str]) -> None:
        self.view = view
        self.skip = skip

    def value(self, key: str) -> Any:
        if self.view.origin(key) in self.skip or key in self.skip:
            return None
        return self.view.leaves.get(key)

    def number(self, *keys: str) -> Number | None:
        """The first of `keys` that exists and is a number."""
        for key in keys:
            value = self.value(key)
            if isinstance(value, int | float) and not isinstance(value, bool):
                return Number(self.view.origin(key), value)
        return None

    def numbers(self, pattern: str) -> list[Number]:
        """Numbers under a key in which `*` stands for any name, e.g. `data.sources.*.weight`."""
        head, star, tail = pattern.partition("*")
        if not star:
            found = self.number(pattern)
            return [found] if found else []
        names = self.view.mappings.get(head.rstrip("."), [])
        return [number for name in names for number in self.numbers(f"{head}{name}{tail}")]


MODEL_EXPERTS = "model.n_routed_experts"

Relation = Callable[[Facts], Iterator[Problem]]

ABOVE_ZERO = (
    *(f"model.{name}" for name in ("vocab_size", "dim", "n_layers", "inter_dim", "init_std", "norm_eps", "rope_theta")),
    *(f"model.{name}" for name in ("n_heads", "n_kv_heads", "head_dim", "q_lora_rank", "kv_lora_rank")),
    *(f"model.{name}" for name in ("qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim")),
    *(f"callbacks.guard.{name}" for name in ("window", "threshold_sigmas", "min_rise", "max_nonfinite")),
    *("callbacks.monitor.every_tokens", "callbacks.save.flush_tokens"),
    *(f"run.{name}" for name in ("tokens", "checkpoint_every_tokens", "keep_checkpoints", "validate_every_tokens")),
    *(f"data.{name}" for name in ("micro_batch_size", "sequence_length", "validation_tokens")),
    *("memory.rows", "precision.tile"),
    *("benchmarks.every_tokens", "benchmarks.batch_size", "limit", "num_samples"),
    *("data.sources.*.weight", "data.global_batch_size.peak", "tokenizer.vocab_size", "grad_clip"),
)
ABOVE_ZERO_IF_EXPERTS = tuple(f"model.{name}" for name in ("moe_inter_dim", "top_k", "n_groups", "topk_groups"))
NOT_NEGATIVE = (
    "seed",
    "num_fewshot",
    "callbacks.guard.max_rollbacks",
    "model.n_dense_layers",
    "model.n_routed_experts",
    "model.n_shared_experts",
    "data.questions",
    "callbacks.quantisation.every_tokens",
    "precision.amax_floor",
    "precision.amax_history",
)
CHOICES = {  # of a value, or of each of a list
    "trainer.accelerator": ("auto", "cpu", "cuda"),
    "device": ("auto", "cpu", "cuda"),
    "data.fim.order": ("psm", "spm"),
    "format": ("text", "json"),
    "weights": ("live", "ema"),
    "recompute": ("norm", "attention_up", "swiglu"),  # dsv3.model.recompute.Part, without importing torch
}
FRACTIONS = ("data.fim.rate", "data.split_punctuation_newline", "data.held_out_fraction", "callbacks.ema.decay")


def above_zero(facts: Facts) -> Iterator[Problem]:
    experts = facts.number(MODEL_EXPERTS)
    keys = ABOVE_ZERO if experts and experts.value == 0 else ABOVE_ZERO + ABOVE_ZERO_IF_EXPERTS
    for key in keys:
        for number in facts.numbers(key):
            if not number.value > 0:
                yield Problem(*number, "must be above 0")


def not_negative(facts: Facts) -> Iterator[Problem]:
    for key in NOT_NEGATIVE:
        if (number := facts.number(key)) and number.value < 0:
            yield Problem(*number, "must be 0 or more")


def fractions(facts: Facts) -> Iterator[Problem]:
    for key in FRACTIONS:
        if (number := facts.number(key)) and not 0 <= number.value <= 1:
            yield Problem(*number, "must be between 0 and 1")


def choices(facts: Facts) -> Iterator[Problem]:
    for key, allowed in CHOICES.items():
        value = facts.value(key)
        for chosen in value if isinstance(value, list) else [value]:
            if isinstance(chosen, str) and chosen not in allowed:
                yield Problem(facts.view.origin(key), value, one_of(allowed, chosen))


def compiled_or_recomputed(facts: Facts) -> Iterator[Problem]:
    if facts.value("compile") is True and facts.value("recompute"):
        yield Problem("compile", True, "cannot be combined with recomputation: set recompute=[]")


def one_device(facts: Facts) -> Iterator[Problem]:
    if (devices := facts.number("trainer.devices")) and devices.value != 1:
        yield Problem(*devices, "must be 1: a run uses one device")


def max_steps(facts: Facts) -> Iterator[Problem]:
    if (steps := facts.number("trainer.max_steps")) and steps.value < 1 and steps.value != -1:
        yield Problem(*steps, "must be 1 or more, or -1 for no cap")


def groups_divide_experts(facts: Facts) -> Iterator[Problem]:
    experts, groups = facts.number("router.n_experts"), facts.number("router.n_groups")
    if experts and groups and groups.value > 0 and experts.value % groups.value:
        message = f"must divide {experts.key}={experts.value} into groups of one size"
        yield Problem(*groups, message)


def groups_kept(facts: Facts) -> Iterator[Problem]:
    kept, groups = facts.number("router.topk_groups"), facts.number("router.n_groups")
    if kept and groups and 0 < groups.value < kept.value:
        yield Problem(*kept, f"must be between 1 and {groups.key}={groups.value}")


def top_k_within_kept(facts: Facts) -> Iterator[Problem]:
    """top-k <= experts in the kept groups: n_experts / n_groups * topk_groups; without groups, n_experts."""
    top_k, experts = facts.number("router.top_k", "model.top_k"), facts.number("router.n_experts", MODEL_EXPERTS)
    if not top_k or not experts or experts.value <= 0 or top_k.value <= 0:
        return
    groups, kept = facts.number("router.n_groups"), facts.number("router.topk_groups")
    bound, why = experts.value, f"{experts.key}={experts.value}"
    if groups and kept and 1 <= kept.value <= groups.value <= experts.value:
        bound = experts.value // groups.value * kept.value
        why = f"the experts in the groups kept: {why} / {groups.key}={groups.value} * {kept.key}={kept.value}"
    if top_k.value > bound:
        yield Problem(*top_k, f"must be between 1 and {bound}, {why}")


def dense_layers(facts: Facts) -> Iterator[Problem]:
    dense, layers = facts.number("model.n_dense_layers"), facts.number("model.n_layers")
    if dense and layers and dense.value > layers.value:
        yield Problem(*dense, f"must be between 0 and {layers.key}={layers.value}")


def experts_where_needed(facts: Facts) -> Iterator[Problem]:
    experts, dense = facts.number(MODEL_EXPERTS), facts.number("model.n_dense_layers")
    layers = facts.number("model.n_layers")
    if experts and dense and layers and experts.value == 0 and dense.value < layers.value:
        message = f"{layers.value - dense.value} layers have experts; none at all needs {dense.key}={layers.value}"
        yield Problem(*experts, message)


def rope_is_even(facts: Facts) -> Iterator[Problem]:
    """RoPE turns pairs of channels; an attention without a separate RoPE part turns all of `head_dim`."""
    dims = facts.number("attention.qk_rope_head_dim", "attention.head_dim")
    if dims and dims.value % 2:
        yield Problem(*dims, "must be even: RoPE rotates pairs of channels")


def heads_share_keys(facts: Facts) -> Iterator[Problem]:
    heads, shared = facts.number("attention.n_heads"), facts.number("attention.n_kv_heads")
    if heads and shared and shared.value > 0 and heads.value % shared.value:
        yield Problem(*shared, f"must divide {heads.key}={heads.value}")


def vocabulary_fits(facts: Facts) -> Iterator[Problem]:
    model, tokenizer = facts.number("model.vocab_size"), facts.number("tokenizer.vocab_size")
    if model and tokenizer and model.value < tokenizer.value:
        yield Problem(*model, f"must be at least {tokenizer.key}={tokenizer.value}")


def prediction_depth(facts: Facts) -> Iterator[Problem]:
    depth, length = facts.number("mtp.depth"), facts.number("data.sequence_length")
    if depth and length and length.value > 0 and not 1 <= depth.value < length.value:
        yield Problem(*depth, f"must be between 1 and {length.value - 1} ({length.key} - 1)")


def schedules_end(facts: Facts) -> Iterator[Problem]:
    """Each `until` is a fraction of the run, none before the one above it, and the last is 1."""
    for key, segments in facts.view.leaves.items():
        if key.rpartition(".")[2] != "segments" or not isinstance(segments, list):
            continue
        if not segments:
            yield Problem(key, "[]", "must have at least one segment: {until: 1.0, to: 1.0, shape: linear} is constant")
        last = 0.0
        for i in range(len(segments)):
            until = facts.number(f"{key}.{i}.until")
            if until is None:
                continue
            if not last <= until.value <= 1:
                yield Problem(*until, f"must be between {last} (where the segment before ends) and 1")
            elif i == len(segments) - 1 and until.value != 1:
                yield Problem(*until, "the last segment must end at 1.0")
            last = max(last, min(until.value, 1.0))


def resume_exists(facts: Facts) -> Iterator[Problem]:
    resume = facts.value("resume")
    if isinstance(resume, str) and resume not in ("auto", "never") and not Path(resume).exists():
        yield Problem("resume", resume, "must be auto, never or the path of a checkpoint; there is no such file")


def weights_exist(facts: Facts) -> Iterator[Problem]:
    path = facts.value("run.init_from")
    if isinstance(path, str) and not Path(path).exists():
        yield Problem("run.init_from", path, "must be a run folder or one of its checkpoints; there is none")


def run_folder_is_writable(facts: Facts) -> Iterator[Problem]:
    folder = facts.value("run.dir")
    if not isinstance(folder, str):
        return
    there = Path(folder).absolute()
    while not there.exists():
        there = there.parent
    if not there.is_dir() or not os.access(there, os.W_OK):
        yield Problem("run.dir", folder, f"{there} is not a folder that can be written to")


RELATIONS: tuple[Relation, ...] = (
    above_zero,
    not_negative,
    fractions,
    choices,
    compiled_or_recomputed,
    one_device,
    max_steps,
    groups_divide_experts,
    groups_kept,
    top_k_within_kept,
    dense_layers,
    experts_where_needed,
    rope_is_even,
    heads_share_keys,
    vocabulary_fits,
    prediction_depth,
    schedules_end,
    resume_exists,
    weights_exist,
    run_folder_is_writable,
)


def check_relations(view: View, *, skip: Collection[str]) -> list[Problem]:
    """Every relation that does not hold. Keys in `skip` are passed over."""
    facts = Facts(view, skip)
    return [problem for relation in RELATIONS for problem in relation(facts)]
