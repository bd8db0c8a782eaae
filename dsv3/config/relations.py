"""Relations between values: one small function each, and the table of them. Ranges stand where values are declared.

A relation holds where its keys exist and are numbers; a stranger's plugin without them is not concerned. Router
shapes are read from `router`, so that a router without groups has no group bound; they are reported at the key that
holds the value, mostly in `model`.
"""

import importlib.util
import math
import os
import shutil
from collections.abc import Collection, Iterator
from pathlib import Path

from dsv3.bounds import seconds_of
from dsv3.config.facts import MODEL_EXPERTS, Facts, Relation
from dsv3.config.objective_relations import OF_OBJECTIVES
from dsv3.config.problems import NO_VALUE, Problem, one_of
from dsv3.config.ranks import micro_batches_run, ranks_divide, several_devices
from dsv3.config.view import View

KINDS = (
    *("memory", "attention", "router", "balancing", "experts", "dispatch", "parallel", "mtp", "model", "precision"),
    *("tokenizer", "data", "reward", "objective", "optimizer", "schedule", "benchmarks"),
    *("callbacks", "logger", "trainer"),
)
ACCELERATORS = ("auto", "cpu", "cuda")


def finite(facts: Facts) -> Iterator[Problem]:
    """No setting means anything at infinity, and NaN passes every comparison with a bound."""
    for key, value in facts.view.leaves.items():
        if isinstance(value, float) and not math.isfinite(value) and key not in facts.view.raw:
            yield Problem(key, value, "must be a finite number")


def every_kind_is_chosen(facts: Facts) -> Iterator[Problem]:
    """A part may be swapped, and most kinds have an option `none`; taken away, there is nothing to build."""
    for kind in KINDS if "run" in facts.view.mappings else ():
        if kind not in facts.view.mappings and kind not in facts.skip:
            yield Problem(kind, NO_VALUE, f"every run needs one: write {kind}=OPTION; --help lists the options")


def accelerator(facts: Facts) -> Iterator[Problem]:
    chosen = facts.value("trainer.accelerator")
    if isinstance(chosen, str) and chosen not in ACCELERATORS:
        yield Problem(facts.view.origin("trainer.accelerator"), chosen, one_of(ACCELERATORS, chosen))


def precision_of_other_machines(facts: Facts) -> Iterator[Problem]:
    """A study settles `precision=auto` once, on the machine that it is started on."""
    is_open = facts.view.choices.get("precision") == "auto" and facts.value("precision.choice") is None
    if facts.view.launcher == "submitit_slurm" and is_open:
        message = "is chosen on this machine, and hydra/launcher=submitit_slurm trains on others: name one"
        yield Problem("precision", "auto", message)


def compiled_or_recomputed(facts: Facts) -> Iterator[Problem]:
    if facts.value("compile") is True and facts.value("recompute"):
        yield Problem("compile", True, "cannot be combined with recomputation: set recompute=[]")


def max_steps(facts: Facts) -> Iterator[Problem]:
    if (steps := facts.number("trainer.max_steps")) and steps.value < 1 and steps.value != -1:
        yield Problem(*steps, "must be 1 or more, or -1 for no cap")


def max_time(facts: Facts) -> Iterator[Problem]:
    limit = facts.value("trainer.max_time")
    if limit is None:
        return
    try:
        seconds_of(str(limit))
    except ValueError as error:
        yield Problem("trainer.max_time", limit, str(error))
    if "callbacks.interruption" not in facts.view.mappings:
        yield Problem("trainer.max_time", limit, "needs callbacks.interruption, which stops the run then")


def profiled_by_its_callback(facts: Facts) -> Iterator[Problem]:
    if facts.value("profile") is True and "callbacks.profiling" not in facts.view.mappings:
        yield Problem("profile", True, "needs callbacks.profiling, which writes the trace")


def program_at_the_end_exists(facts: Facts) -> Iterator[Problem]:
    words = facts.value("run.on_end")
    if isinstance(words, list) and words and shutil.which(str(words[0])) is None:
        yield Problem("run.on_end", words, f"{words[0]} is no program that can be found on PATH")


TRACKERS = ("tensorboard", "mlflow")
"""Loggers that need the package of their name, which not every installation has."""


def loggers_can_be_used(facts: Facts) -> Iterator[Problem]:
    names = facts.view.mappings.get("logger", [])
    if "_target_" in names:
        message = "each logger stands under a name of its own: begin its YAML with # @package logger.mine"
        yield Problem("logger._target_", facts.view.leaves.get("logger._target_"), message)
    for name in TRACKERS:
        if name in names and importlib.util.find_spec(name) is None:
            yield Problem("logger", name, f"needs the package {name}: pip install {name}")


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


def mtp_has_experts(facts: Facts) -> Iterator[Problem]:
    depth, experts = facts.number("mtp.depth"), facts.number(MODEL_EXPERTS)
    dense, layers = facts.number("model.n_dense_layers"), facts.number("model.n_layers")
    if depth and experts and experts.value == 0 and dense and layers and dense.value == layers.value:
        message = f"an MTP module has a layer with experts, and {experts.key}=0: write mtp=none"
        yield Problem("mtp", facts.view.choices.get("mtp"), message)


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
    if not isinstance(resume, str) or resume in ("auto", "never"):
        return
    if not Path(resume).is_file() and not Path(resume, "manifest.json").is_file():
        checkpoints = sorted([*Path(resume).glob("tokens-*.ckpt"), *Path(resume).glob("checkpoints/tokens-*.ckpt")])
        near = f", such as {checkpoints[-1]}" if checkpoints else "; there is none"
        yield Problem("resume", resume, f"must be auto, never or the path of a checkpoint file or folder{near}")


def weights_exist(facts: Facts) -> Iterator[Problem]:
    path, stage = facts.value("run.init_from"), facts.value("study.stage")
    is_later_stage = isinstance(stage, int) and stage > 1  # begins with a run of the same study
    if isinstance(path, str) and not is_later_stage and not Path(path).exists():
        yield Problem("run.init_from", path, "must be a run folder or one of its checkpoints; there is none")


def frozen_on_one_device(facts: Facts) -> Iterator[Problem]:
    patterns = facts.value("run.freeze")
    if patterns and facts.view.choices.get("parallel") != "none":
        yield Problem("run.freeze", patterns, "needs parallel=none: weights that ranks share are all trained")


def run_folder_is_a_runs(facts: Facts) -> Iterator[Problem]:
    """A run writes and deletes in its folder: not in one that holds something else."""
    for key in ("run.name", "run.experiment"):
        name = facts.value(key)
        if isinstance(name, str) and (name in ("", ".") or Path(name).is_absolute() or ".." in Path(name).parts):
            yield Problem(key, name, "must name a folder below runs/; run.dir takes any path")
    folder = facts.value("run.dir")
    if folder == "":
        yield Problem("run.dir", folder, "must be a folder of the run's own, such as runs/default/seed1")
    elif isinstance(folder, str) and (place := Path(folder)).is_dir() and not (place / "config.yaml").exists():
        foreign = sorted(path.name for path in place.iterdir() if not path.name.startswith("."))
        if foreign:
            yield Problem("run.dir", folder, f"holds {foreign[0]} and is no run folder; name a new or an empty one")


def cache_is_a_folder(facts: Facts) -> Iterator[Problem]:
    cache = facts.value("data.cache_dir")
    if isinstance(cache, str) and not all(place.is_dir() for place in Path(cache).parents if place.exists()):
        yield Problem("data.cache_dir", cache, "must be a folder; a part of this path is a file")
    elif isinstance(cache, str) and Path(cache).is_file():
        yield Problem("data.cache_dir", cache, "must be a folder; this is a file")


def evaluation_paths(facts: Facts) -> Iterator[Problem]:
    """Of evaluate.py: found before anything is scored."""
    if "output_path" not in facts.view.leaves:
        return
    for key in ("checkpoint", "compare"):
        path = facts.value(key)
        if isinstance(path, str) and not path.startswith(("http://", "https://")) and not Path(path).exists():
            yield Problem(key, path, "must be a run folder, a checkpoint file, a Hugging Face checkpoint or a URL")
    out, results = facts.value("out"), facts.value("output_path")
    if isinstance(out, str) and Path(out).is_dir():
        yield Problem("out", out, "must be a file to write; this is a folder")
    if isinstance(results, str) and Path(results).is_file():
        yield Problem("output_path", results, "must be a folder; this is a file")


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
    finite,
    every_kind_is_chosen,
    accelerator,
    precision_of_other_machines,
    compiled_or_recomputed,
    several_devices,
    frozen_on_one_device,
    ranks_divide,
    micro_batches_run,
    max_steps,
    max_time,
    profiled_by_its_callback,
    program_at_the_end_exists,
    loggers_can_be_used,
    groups_divide_experts,
    groups_kept,
    top_k_within_kept,
    dense_layers,
    experts_where_needed,
    rope_is_even,
    heads_share_keys,
    vocabulary_fits,
    mtp_has_experts,
    prediction_depth,
    schedules_end,
    resume_exists,
    weights_exist,
    *OF_OBJECTIVES,
    run_folder_is_a_runs,
    run_folder_is_writable,
    cache_is_a_folder,
    evaluation_paths,
)


def check_relations(view: View, *, skip: Collection[str]) -> list[Problem]:
    """Every relation that does not hold. Keys in `skip` are passed over."""
    facts = Facts(view, skip)
    return [problem for relation in RELATIONS for problem in relation(facts)]
