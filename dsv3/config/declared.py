"""Keys that belong to the core and not to a plugin: types and ranges. The preflight reads this file as a signature.

What each key does stands in conf/train.yaml and conf/evaluate.yaml, next to its default.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Literal

from dsv3.bounds import Between, NonNegativeInt, PositiveFloat, PositiveInt, Seed

CheckpointFormat = Literal["file", "folder"]
Engine = Literal["auto", "eager", "onnx"]


@dataclass
class Train:
    """The top level of conf/train.yaml."""

    seed: Seed
    resume: str
    allow: Sequence[str]
    grad_clip: PositiveFloat
    engine: Engine
    profile: bool
    compile: bool
    recompute: Sequence[Literal["norm", "attention_up", "swiglu"]]


@dataclass
class Run:
    experiment: str
    name: str
    dir: str
    init_from: str | None
    init_partly: bool
    freeze: Sequence[str]
    tokens: PositiveInt
    checkpoint_every_tokens: PositiveInt
    checkpoint_format: CheckpointFormat
    keep_checkpoints: PositiveInt
    validate_every_tokens: PositiveInt
    on_end: Sequence[str]


@dataclass
class Until:
    """`study.until`: seeds are added until each arm differs from the baseline or the difference is bounded."""

    half_width: PositiveFloat  # of the 95% interval, in the unit of the verdict's metric
    most_seeds: Annotated[int, Between(2, 12)] = 12
    most_hours: PositiveFloat | None = None  # of training, all runs of the study together


@dataclass
class Match:
    """`study.match`: a size of each arm is solved so that the arm equals the baseline in a quantity."""

    quantity: Literal["parameters", "active_parameters", "flops_per_token", "cache_bytes", "step_seconds"]
    by: str  # the key of the size
    tolerance: PositiveFloat = 0.005  # relative
    unreachable: Literal["refuse", "nearest"] = "refuse"


@dataclass
class Study:
    arm: str | None
    tuned: Literal["trial", "best"] | None
    stage: PositiveInt | None
    arms: dict[str, Any] | None
    grid: dict[str, Any] | None
    only: Sequence[str] | None
    seeds: Sequence[Seed]
    baseline: str | None
    metric: str | None
    question: str | None
    finding: str | None
    match: dict[str, Any] | None
    until: dict[str, Any] | None
    tune: dict[str, Any] | None


@dataclass
class Model:
    """Sizes of a model preset; a preset may hold more, for plugins that read them."""

    vocab_size: PositiveInt
    dim: PositiveInt
    n_layers: PositiveInt
    n_dense_layers: NonNegativeInt
    inter_dim: PositiveInt
    n_heads: PositiveInt
    n_routed_experts: NonNegativeInt
    n_shared_experts: NonNegativeInt
    norm_eps: PositiveFloat
    rope_theta: PositiveFloat
    init_std: PositiveFloat
    tie_embeddings: bool


@dataclass
class Evaluate:
    """The top level of conf/evaluate.yaml."""

    checkpoint: str
    served_model: str | None
    allow: Sequence[str]
    device: Literal["auto", "cpu", "cuda"]
    engine: Engine
    format: Literal["text", "json"]
    out: str | None
    held_out: bool
    chat: bool
    tasks: Sequence[str]
    compare: str | None
    weights: Literal["live", "ema"]
    limit: PositiveInt | None
    num_fewshot: NonNegativeInt | None
    num_samples: PositiveInt | None
    actions: Literal["likelihood", "text"] | None
    history: NonNegativeInt | None
    steps: PositiveInt | None
    seed: Seed
    confirm_run_unsafe_code: bool
    datasets_folder: str | None
    output_path: str | None


@dataclass
class Benchmarks:
    folders: Sequence[str]
    every_tokens: PositiveInt | None
    chat: bool
    before: bool
    batch_size: PositiveInt
    tasks: dict[str, Any]


PRIMARY = {"train": "Train", "evaluate": "Evaluate"}
NODES = {
    "run": "Run",
    "study": "Study",
    "study.match": "dsv3.config.declared.Match",
    "study.until": "dsv3.config.declared.Until",
    "model": "Model",
    "benchmarks": "Benchmarks",
    "benchmarks.tasks.*": "dsv3.evaluation.benchmarks.suite.Entry",
}
"""Which class declares the keys under a node; `*` stands for any name."""


def is_entry(key: str) -> bool:
    """Whether the key's last name is free: its node ends in `*`."""
    return f"{key.rpartition('.')[0]}.*" in NODES


def class_of(key: str) -> str | None:
    """Which class declares the keys under `key`."""
    return NODES.get(key) or NODES.get(f"{key.rpartition('.')[0]}.*")


TRAINER = "lightning.pytorch.trainer.trainer.Trainer"
"""What the keys under `trainer` are passed to."""

_IS_GIVEN = "the core gives this to the Trainer itself"
TRAINER_IS_GIVEN = {
    "accumulate_grad_batches": "set data.micro_batch_size and data.global_batch_size: a step loops over micro-batches",
    "gradient_clip_val": "set grad_clip, the maximum global gradient norm",
    "gradient_clip_algorithm": "set grad_clip, the maximum global gradient norm",
    "precision": "set precision=bf16, fp32, fp8_blockwise, ...",
    "callbacks": "set +callbacks@callbacks.<name>=<option>",
    "logger": "set logger=wandb, logger=none, logger=[csv,tensorboard], ...",
    "default_root_dir": "set run.dir",
    "max_epochs": "set run.tokens, the length of training",
    **dict.fromkeys(
        (
            "enable_checkpointing",
            "enable_progress_bar",
            "enable_model_summary",
            "limit_val_batches",
            "use_distributed_sampler",
            "plugins",
        ),
        _IS_GIVEN,
    ),
}
"""Arguments of the Trainer that are not the configuration's -> what to set in their place."""

GIVEN_BY_THE_CORE = {
    "attention": ("precision",),
    "router": (),
    "balancing": (),
    "experts": ("precision",),
    "mtp": ("block", "precision"),
    "tokenizer": ("texts", "cache_dir"),
    "data": ("tokenizer",),
    "objective": ("token_bytes_V",),
    "optimizer": ("named_parameters",),
    "logger": ("save_dir",),
}
"""Kind of part with `_partial_: true` -> arguments that the core adds; a kind that is not listed is not checked."""

SEVERAL = "logger"
"""Kind of part of which several may be chosen, each under a name of its own."""
