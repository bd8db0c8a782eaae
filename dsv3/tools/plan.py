"""Plan a training: parameters, FLOPs, KV cache, memory, communication, pipeline bubbles and GPU hours, by arithmetic.

python -m dsv3 plan model=v3_671b            the report's recipe, compared with its GPU hours
python -m dsv3 plan model=small gpus=8 ep=8  your own model on your own GPUs
"""

from dataclasses import dataclass, fields, replace
from typing import TYPE_CHECKING, Any

from dsv3.bounds import Fraction, PositiveFloat, PositiveInt
from dsv3.cli import option
from dsv3.planning.recipe import FORMATS, REPORT, REPORT_PRESET, ZERO_STAGES, Recipe, single_gpu

if TYPE_CHECKING:
    from omegaconf import DictConfig

    from dsv3.config.compose import Composer
    from dsv3.planning.skeleton import AttentionLayer


@dataclass
class Options:
    """Where an option is null, model=v3_671b takes the report's recipe, any other one GPU and its training config."""

    overrides: list[str] = option([], "")
    tokens: PositiveFloat | None = option(None, "training tokens; null: 14.8e12, or run.tokens")
    seq_len: PositiveInt | None = option(None, "tokens per sequence; null: 4096, or data.sequence_length")
    micro_batch: PositiveInt | None = option(None, "micro-batch size, in sequences; null: 1, or data.micro_batch_size")
    num_microbatches: PositiveInt | None = option(
        None, "micro-batches per pipeline and optimiser step; null: 120, or 1"
    )
    gpus: PositiveInt | None = option(None, "pp times the data-parallel ranks; null: 2048, or 1")
    gpus_per_node: PositiveInt = option(8, "GPUs joined by fast links")
    pp: PositiveInt | None = option(None, "pipeline stages; null: 16, or 1")
    ep: PositiveInt | None = option(None, "data-parallel ranks that share the experts of a layer; null: 64, or 1")
    zero_stage: int = option(
        1,
        "over the data-parallel ranks, 1 shards optimiser states, 3 everything, as parallel=sharded",
        choices=ZERO_STAGES,
    )
    pipeline: str | None = option(None, "null: dualpipe, or 1f1b", choices=("1f1b", "zb1p", "dualpipe"))
    recompute: str | None = option(
        None, "activation recomputation; null: selective, or none", choices=("none", "selective", "full")
    )
    formats: str | None = option(None, "numeric formats; null: fp8 (the report's), or bf16", choices=tuple(FORMATS))
    bytes: dict[str, float] = option(
        {}, "changes to their bytes per element, such as {moment: 4}; an unknown name lists all"
    )
    times: dict[str, float] = option(
        {}, "of chunks F, B, W and F&B; null: {forward: 1, backward: 2, weight: 1, overlapped: 3}"
    )
    peak: PositiveFloat = option(REPORT.peak, "dense BF16 FLOP/s of a GPU, the peak that mfu refers to (H800)")
    peak_fp8: PositiveFloat = option(REPORT.peak_fp8, "the same in FP8")
    mfu: Fraction = option(REPORT.mfu, "assumed model FLOPs utilisation, a fraction of the peak")
    gpu_hours: PositiveFloat | None = option(None, "measured GPU hours; the plan derives the implied MFU")


def run(options: Options) -> dict[str, Any]:
    """Print the plan, and return it.

    Raises:
        ValueError: options that do not fit each other or the model.
    """
    from dsv3.config.compose import choices, hydra_flags, opened
    from dsv3.planning.plan import make_plan
    from dsv3.planning.render import show
    from dsv3.planning.skeleton import read_skeleton

    flags = hydra_flags(options.overrides)
    with opened("train", flags) as composer:
        config = composer.compose(flags.overrides)
        skeleton = read_skeleton(config)
        chosen = choices(config)
        attentions = {chosen["attention"]: skeleton.attention, **other_attentions(composer, flags.overrides, config)}
    recipe = recipe_of(options, config, is_report=chosen["model"] == REPORT_PRESET)
    plan = make_plan(skeleton, recipe, attentions=attentions, known_gpu_hours=options.gpu_hours)
    show(plan, title=f"{chosen['model']}, attention {chosen['attention']}")
    return {"model": chosen["model"], "attention": chosen["attention"], **plan}


def recipe_of(options: Options, config: "DictConfig", *, is_report: bool) -> Recipe:
    """The recipe that the options change. Raises ValueError for names in `bytes` or `times` that there are not."""
    base = (
        REPORT
        if is_report
        else single_gpu(
            tokens=config.run.tokens, seq_len=config.data.sequence_length, micro_batch=config.data.micro_batch_size
        )
    )
    names = {field.name for field in fields(Recipe)} - {"formats", "times"}
    given = {name: value for name in names if (value := getattr(options, name)) is not None}
    formats = FORMATS[options.formats] if options.formats else base.formats
    for name, value in options.times.items():
        if name not in base.times._fields or not value >= 0:
            raise ValueError(f"times.{name}={value}: must be 0 or more, for one of {', '.join(base.times._fields)}")
    return replace(base, **given, formats=formats.with_bytes(options.bytes), times=base.times._replace(**options.times))


def other_attentions(composer: "Composer", overrides: list[str], config: "DictConfig") -> "dict[str, AttentionLayer]":
    """Every other attention in conf/ that this model's shapes allow."""
    from dsv3.config.compose import choices
    from dsv3.planning.skeleton import read_skeleton

    without = [o for o in overrides if o.lstrip("+~").partition("=")[0].partition(".")[0] != "attention"]
    found = {}
    for name in composer.options("attention"):
        if name == choices(config)["attention"]:
            continue
        try:
            found[name] = read_skeleton(composer.compose([*without, f"attention={name}"])).attention
        except (ValueError, TypeError):  # the plugin refuses these shapes
            continue
    return found
