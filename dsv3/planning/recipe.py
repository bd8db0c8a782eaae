"""Training recipes: cluster, parallelism, numeric formats, length; and the one that DeepSeek-V3's report gives."""

from dataclasses import dataclass, fields, replace
from typing import Any, Literal, NamedTuple

Recomputation = Literal["none", "selective", "full"]
"""Activation recomputation in the backward pass:
    none       nothing
    selective  RMSNorm, the attention's up-projections and the SwiGLU product (report, section 3.2.3)
    full       each layer from its input
"""

PipelineSchedule = Literal["1f1b", "zb1p", "dualpipe"]

ZERO_STAGES = (0, 1, 3)


@dataclass(frozen=True)
class Formats:
    """Bytes per element, by kind of tensor, without the scales of FP8 blocks (one per 128 elements or more)."""

    weight: float  # compute copy of the linear layers that the precision plugin makes
    other_weight: float  # of embedding, head, router and norms
    master: float  # optimiser's own copy of the weights; 0 where the compute copy is it
    gradient: float
    moment: float  # each of the two
    activation: float  # residual stream, latents, queries, keys, values
    linear_input: float  # inputs of linear layers, saved for the weight gradients
    attention_output: float  # input of W_O, which attention's own backward pass reads too
    swiglu_input: float
    dispatch: float  # a token on its way to an expert
    combine: float  # an expert's output on its way back
    cache: float  # KV cache

    def with_bytes(self, given: dict[str, float]) -> "Formats":
        """Replace some of them. Raises ValueError for a name that is not one of them, or a negative number."""
        known = [field.name for field in fields(self)]
        for name, value in given.items():
            if name not in known:
                raise ValueError(f"bytes.{name}={value}: unknown kind; must be one of {', '.join(known)}")
            if not value >= 0:
                raise ValueError(f"bytes.{name}={value}: must be 0 or more")
        return replace(self, **given)


FORMATS = {
    # The report's, section 3.3: E4M3 GEMMs, E5M6 (12 bits) before W_O, BF16 moments, FP32 master and gradients.
    "fp8": Formats(
        weight=1,
        other_weight=2,
        master=4,
        gradient=4,
        moment=2,
        activation=2,
        linear_input=1,
        attention_output=1.5,
        swiglu_input=1,
        dispatch=1,
        combine=2,
        cache=2,
    ),
    "bf16": Formats(
        weight=2,
        other_weight=2,
        master=4,
        gradient=4,
        moment=4,
        activation=2,
        linear_input=2,
        attention_output=2,
        swiglu_input=2,
        dispatch=2,
        combine=2,
        cache=2,
    ),
    "fp32": Formats(
        weight=4,
        other_weight=4,
        master=0,
        gradient=4,
        moment=4,
        activation=4,
        linear_input=4,
        attention_output=4,
        swiglu_input=4,
        dispatch=4,
        combine=4,
        cache=4,
    ),
}


class ChunkTimes(NamedTuple):
    """Durations of one micro-batch on one stage, in any one unit (report, Table 2)."""

    forward: float  # F
    backward: float  # B, weight gradients included
    weight: float  # W, the weight gradients' part of B
    overlapped: float  # F&B, a forward and a backward chunk run into each other


@dataclass(frozen=True)
class Recipe:
    """How a model is trained. GPUs = data parallel x pipeline stages; experts are spread within data parallelism."""

    tokens: float  # of the whole training
    seq_len: int  # tokens per sequence
    micro_batch: int  # micro-batch size, in sequences
    num_microbatches: int  # micro-batches per pipeline and optimiser step
    gpus: int
    gpus_per_node: int
    pp: int
    ep: int
    zero_stage: int  # 0, 1 or 3
    pipeline: PipelineSchedule
    recompute: Recomputation
    formats: Formats
    times: ChunkTimes
    peak: float  # dense BF16 FLOP/s of one GPU
    peak_fp8: float
    mfu: float  # assumed fraction of `peak`

    @property
    def dp(self) -> int:
        return self.gpus // self.pp

    @property
    def tokens_per_step(self) -> int:
        return self.seq_len * self.micro_batch * self.num_microbatches * self.dp

    def check(self) -> None:
        """Raise a ValueError that names every value that does not fit."""
        problems = [f"{name}={value}: {needed}" for name, value, right, needed in self._bounds() if not right]
        if problems:
            raise ValueError("; ".join(problems))

    def _bounds(self) -> list[tuple[str, Any, bool, str]]:
        counts = ("seq_len", "micro_batch", "num_microbatches", "gpus", "gpus_per_node", "pp", "ep")
        amounts = ("tokens", "peak", "peak_fp8", "mfu")
        bounds = [(name, getattr(self, name), getattr(self, name) >= 1, "must be at least 1") for name in counts]
        bounds += [(name, getattr(self, name), getattr(self, name) > 0, "must be above 0") for name in amounts]
        bounds.append(("zero_stage", self.zero_stage, self.zero_stage in ZERO_STAGES, "must be 0, 1 or 3"))
        if all(right for _, _, right, _ in bounds):
            bounds += [
                ("pp", self.pp, self.gpus % self.pp == 0, f"must divide gpus={self.gpus}"),
                ("ep", self.ep, self.dp % self.ep == 0, f"must divide gpus / pp = {self.dp}"),
            ]
        odd = self.pipeline == "dualpipe" and self.pp % 2 == 1
        bounds.append(("pipeline", self.pipeline, not odd, f"needs an even pp, not {self.pp}: it pairs stages"))
        both = self.zero_stage == 3 and self.pipeline == "dualpipe"
        bounds.append(
            ("zero_stage", self.zero_stage, not both, "pipeline=dualpipe holds every stage twice: choose 1f1b")
        )
        return bounds


H800_BF16, H800_FP8 = 989.4e12, 1978.9e12
"""Dense tensor-core peaks of an H800 (the same as an H100's), FLOP/s."""

CHUNK_TIMES = ChunkTimes(forward=1.0, backward=2.0, weight=1.0, overlapped=3.0)
"""Relative: the backward pass takes two forwards, half of it for weight gradients; overlapping costs nothing extra."""

REPORT_PRESET = "v3_671b"
REPORT = Recipe(
    tokens=14.8e12,
    seq_len=4096,
    micro_batch=1,  # not published
    num_microbatches=120,  # 15360 sequences over 128 pipelines
    gpus=2048,
    gpus_per_node=8,
    pp=16,
    ep=64,
    zero_stage=1,
    pipeline="dualpipe",
    recompute="selective",
    formats=FORMATS["fp8"],
    times=CHUNK_TIMES,
    peak=H800_BF16,
    peak_fp8=H800_FP8,
    mfu=0.4,  # not published
)
"""DeepSeek-V3's pre-training (report, sections 3 and 4.2)."""


class Published(NamedTuple):
    """What the report states of the pre-training of the model with this many parameters."""

    parameters: int
    tokens: float
    seq_len: int
    gpus: int
    gpu_hours: float
    gpu_hours_per_trillion_tokens: float


V3_PUBLISHED = Published(
    parameters=671_026_419_200,
    tokens=14.8e12,
    seq_len=4096,
    gpus=2048,
    gpu_hours=2_664_000,
    gpu_hours_per_trillion_tokens=180_000,
)


def single_gpu(*, tokens: float, seq_len: int, micro_batch: int) -> Recipe:
    """The default recipe: one GPU, everything in BF16, nothing recomputed."""
    return replace(
        REPORT,
        tokens=tokens,
        seq_len=seq_len,
        micro_batch=micro_batch,
        num_microbatches=1,
        gpus=1,
        pp=1,
        ep=1,
        pipeline="1f1b",
        recompute="none",
        formats=FORMATS["bf16"],
    )
