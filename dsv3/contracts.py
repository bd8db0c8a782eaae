"""The contracts: one Protocol per kind of plugin, and the records that cross between them.

A plugin is a class with keyword-only, typed arguments that satisfies one of these Protocols. Nothing is
registered: a YAML file under `conf/` (or any user's file) names the class in `_target_`.

Parts of the model are built on torch's meta device first, so that mistakes are found before any work: a constructor
reads no values of tensors. The core then draws every parameter with two or more dimensions from normal(0,
model.init_std) and leaves vectors as their modules set them. `dsv3.testing` has a check for every kind.

Shape legend, used in the names of tensors everywhere:

    B rows of a micro-batch      T positions of a row        N = B*T tokens
    D model width                V vocabulary                H attention heads
    E routed experts             K experts per token         M = N*K rows handed to experts
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple, Protocol, runtime_checkable

import torch
from torch import Tensor, nn

IGNORE = -100
"""Target of a position that predicts nothing (padding, or masked by a boundary policy)."""

Role = Literal[
    "attention_down",  # W_DQ, W_DKV together with W_KR
    "attention_up",  # W_UQ, W_QR, W_UKV; also the plain query, key and value projections
    "attention_out",  # W_O
    "ffn_gate_up",  # dense FFN and shared experts: gate and up projections
    "ffn_down",
    "expert_gate_up",  # routed experts
    "expert_down",
    "mtp_projection",  # M_k
    "head",
]
"""What a linear layer is for. A precision plugin decides by role which layers run in which format."""

Schedule = Callable[[int], float]
"""A value as a pure function of the number of tokens trained on so far: finite, at least 0, without state."""


class MicroBatch(NamedTuple):
    """Packed rows of tokens that fit through the model at once. All tensors but `extra`'s are int64."""

    tokens_BT: Tensor
    targets_BT: Tensor  # the next token of each position, or IGNORE
    positions_BT: Tensor  # for RoPE; restart in each document only where documents are isolated
    document_ids_BT: Tensor  # documents of a row are numbered from 1; 0 is padding
    domains_BT: Tensor  # index into the datamodule's `domains`
    extra: Mapping[str, Tensor] = {}  # [B, T] each: what an objective's `prepare` added, by name
    replay: Mapping[str, Tensor] = {}  # [B, T, K] by MoE layer: experts in place of its router's choice; -1: its choice

    @property
    def packed(self) -> tuple[Tensor, ...]:
        """The tensors that every micro-batch has, in the order of its fields."""
        return self[:5]

    def map(self, change: Callable[[Tensor], Tensor]) -> "MicroBatch":
        """The micro-batch with every tensor changed."""
        extra, replay = ({name: change(tensor) for name, tensor in each.items()} for each in (self.extra, self.replay))
        tokens, targets, positions, documents, domains = map(change, self.packed)
        return MicroBatch(tokens, targets, positions, documents, domains, extra, replay)

    def padding(self) -> "MicroBatch":
        """One of this shape that has no tokens. Integers in `extra` are targets that only the objective reads."""
        empty = self.map(torch.zeros_like)
        extra = {name: value if value.is_floating_point() else value + IGNORE for name, value in empty.extra.items()}
        replay = {name: value - 1 for name, value in empty.replay.items()}
        return empty._replace(targets_BT=empty.targets_BT + IGNORE, extra=extra, replay=replay)


class Prompt(NamedTuple):
    """What a policy is asked, and how its answer is judged."""

    ids: list[int]  # of the prompt in the chat template, to be continued by the answer
    text: str  # the user's message
    item: Mapping[str, Any]  # the row of the data: `answer`, `verifier` and whatever else it has
    number: int  # counts the prompts of the run: random numbers follow from it

    def unanswered(self) -> "Answer":
        """An answer of no words, which earns 0: a reward that cannot use the prompt's row says so when it is asked."""
        return Answer(self.text, "", [], False, self.item)

    def answered(self, rollout: "Rollout") -> "Answer":
        turns = [turn.text for turn in rollout.turns]
        return Answer(self.text, rollout.text, rollout.ids, rollout.ended, self.item, turns)


class Step(NamedTuple):
    """One optimiser step: what one Lightning batch is."""

    micro_batches: list[MicroBatch]  # this rank's; none where an objective makes them of `prompts`
    tokens_before: int  # tokens trained on before this step; padding is none
    state_after: dict[str, Any]  # data state once this step is done; JSON-serialisable
    filled: int = 0  # micro-batches at the end that are padding, so that every rank has as many
    prompts: Sequence[Prompt] = ()  # this rank's. The tokens of such a step, and those before it, the core counts
    rollouts: Sequence[Mapping[str, Any]] = ()  # what an objective sampled for them: rows of the table of rollouts


class Question(NamedTuple):
    """A held-out question with one short right answer."""

    family: str
    prompt: str
    answer: str
    majority_answer: str  # most frequent answer of this family in training: the majority baseline
    chat: bool = False  # the prompt is a user's message, and the answer the assistant's reply


class Sample(NamedTuple):
    """A held-out text to be completed, for a person to look at."""

    name: str  # such as "completion" or "infilling"
    prefix: str
    suffix: str | None  # given, the gap before it is filled in; None: the prefix is continued
    real: str  # what stands there
    chat: bool = False  # the prefix is a user's message


class Routing(NamedTuple):
    """What a router decides for N tokens."""

    experts_NK: Tensor  # int64, distinct within a row
    gates_NK: Tensor  # float32, weights of the chosen experts' outputs
    affinities_NE: Tensor  # float32, the raw scores s_i >= 0 before any bias (eq. 15)


class Cache(Protocol):
    """What one part keeps of the positions decoded so far: a layer's keys and values or latents, a memory's tokens.

    Rows are known by numbers that their owner gives them, and each has a length of its own. The order of the rows is
    that of the batch which the part is called with: the T positions of batch row b continue the b-th row. A row grows
    with its text: at most one block of `dsv3.model.layers.CACHE_BLOCK` positions is allocated beyond its length.
    """

    @property
    def lengths(self) -> dict[int, int]:
        """Positions held by each row, in the order of the batch."""

    def add(self, row: int) -> None:
        """Append an empty row."""

    def copy(self, source: int, row: int, length: int) -> None:
        """Append a row that holds a copy of the first `length` positions of `source`."""

    def drop(self, row: int) -> None:
        """Forget a row and give its memory back."""

    def rewind(self, row: int, length: int) -> None:
        """Forget every position of a row at or after `length`."""

    def select(self, rows: Sequence[int]) -> "Cache":
        """These rows, in this order: the same ones, not copies."""


class Attention(Protocol):
    """Causal self-attention over packed rows."""

    def __call__(
        self,
        x_BTD: Tensor,
        positions_BT: Tensor,
        document_ids_BT: Tensor | None = None,
        cache: Cache | None = None,
    ) -> Tensor:
        """Return the attended x_BTD, after the output projection.

        `document_ids_BT`: given, a position sees only positions of its own document.
        `cache`: given, the T positions continue those that its rows hold, as many in each row of the batch or not, and
        are added to them. A row's output does not depend on the rows beside it.
        """

    def new_cache(self, rows: Iterable[int] = ()) -> Cache:
        """With these rows, all empty."""

    def kv_cache_elements_per_token(self) -> int:
        """Numbers that decoding keeps for each token in this layer."""

    def flops_per_token(self, context: int) -> int:
        """Multiply-adds times two, forward, of one token that sees `context` positions; projections included."""


@runtime_checkable
class HasStaticCache(Protocol):
    """What an Attention may offer beside its contract: decoding over rows of fixed places, for CUDA graphs."""

    def new_static_cache(self, lengths_B: Tensor, positions: int) -> Any:
        """A `dsv3.model.layers.StaticCache`, which is given as `cache` with one token of each row; None where this
        attention's settings leave it no way to read one. What it computes must not need numbers on the host."""


class Head(NamedTuple):
    """The output head as losses use it: logits = states copy_VD^T, the gradient arrives at weight_VD."""

    weight_VD: Tensor  # the FP32 parameter
    copy_VD: Tensor  # the same without a gradient, in the dtype that it is multiplied in


class Statistic(NamedTuple):
    """A figure of a training step: column `name` of `metrics/train`, shown by progress bar, reports and W&B.

    value = factor * sums[total] / sums[over], where both are added up over the step's micro-batches and over ranks in
    FP64; `over` may name a denominator of the objective too, and None divides by nothing. NaN where `over` sums to 0.
    """

    name: str
    unit: str
    total: str
    over: str | None = None
    factor: float = 1.0
    shown: bool = False  # in the progress bar


class LossTerm(NamedTuple):
    """One term of a micro-batch's loss, divided by what it is divided by already, and sums for `Statistic`s."""

    loss: Tensor  # scalar with a gradient
    sums: Mapping[str, Tensor]  # scalars on the device, without one


Denominators = Mapping[str, Tensor]
"""What a step divides by, by name: scalars on the device, of the whole global batch. Padding counts in none of them.

Every objective gives `mtp`, what each MTP depth's summed loss is divided by. One whose own loss is divided by more than
that gives `mtp_divisor` too, which divides what MTP learns from instead; what is recorded is divided by `mtp`. The core
adds `tokens`, their number: the balance losses of micro-batches are averaged by it."""


class Forward(NamedTuple):
    """What the model gives for one micro-batch in training."""

    hidden_BTD: Tensor  # after the final norm; the head gives next-token logits from it
    predictions: "list[MTPPrediction]"  # one per MTP depth; empty where they were not asked for
    routings: "dict[str, Routing]"  # by the name of the MoE layer; MTP's included


class Turn(NamedTuple):
    """What a policy read, and how it went on."""

    prompt: list[int]
    ids: list[int]  # what was sampled, EOS included where it ended by itself
    text: str  # of it, without special tokens
    ended: bool  # by itself; False: cut at the limit of tokens
    log_probs: list[float]  # of each id, under the distribution that it was drawn from
    experts: Mapping[str, list[list[int]]] = {}  # by MoE layer the K of each token but the last one; -1: not recorded


class Rollout(NamedTuple):
    """A sampled answer of one turn, or an episode of several: between them an environment tells what came of each."""

    turns: list[Turn]

    @property
    def ids(self) -> list[int]:
        """What was sampled in all turns."""
        return [token for turn in self.turns for token in turn.ids]

    @property
    def log_probs(self) -> list[float]:
        return [value for turn in self.turns for value in turn.log_probs]

    @property
    def text(self) -> str:
        """A line for each turn."""
        return "\n".join(turn.text for turn in self.turns)

    @property
    def ended(self) -> bool:
        """Whether the last turn did by itself."""
        return self.turns[-1].ended


class Models(Protocol):
    """The models that an objective may ask before a step, under `torch.no_grad`."""

    @property
    def policy(self) -> nn.Module:
        """The model that is trained."""

    def reference(self) -> nn.Module:
        """The policy as training began, with the weights of `run.init_from`: frozen, and in no checkpoint.

        Raises ValueError where the run began with random weights.
        """

    def teacher(self, run: str) -> nn.Module:
        """Another trained model with the same tokenizer, frozen.

        Raises ValueError where its tokenizer is another one.
        """

    def sample(
        self, prompts: Sequence[Prompt], seeds: Sequence[int], *, max_tokens: int, temperature: float, experts: bool
    ) -> list[Rollout]:
        """A rollout of each prompt by the policy as it is now, drawn with random numbers of its own seed, so that it
        depends neither on the prompts beside it nor on the number of ranks. A prompt whose row says so opens an episode
        of several turns (`dsv3.rollout.turns`). `max_tokens`: of a turn. `experts`: record those of every token.

        Raises ValueError where experts are to be recorded and a router cannot use them (`ReplaysRouting`).
        """

    def log_probs(self, model: nn.Module, micro: "MicroBatch", *, temperature: float = 1.0) -> Tensor:
        """ln p of each target under softmax(logits / temperature), float32 [B, T], 0 where there is none."""


class Objective(Protocol):
    """What training minimises: an nn.Module without parameters, whose buffers move with the model.

    Made with `token_bytes_V=`: bytes that each token stands for, int64 [V], 0 for special tokens.
    Router bias, balance losses, guard, averaged weights, monitoring and resume are the same under every objective.
    """

    statistics: Sequence[Statistic]  # the first is called `loss`: the guard judges it, studies compare it

    def prepare(self, step: "Step", models: Models) -> "Step":
        """Return the step to train on: `step` itself, or one that was made of it (sampled answers, reference
        log-probabilities). Called without gradients, before the first micro-batch. Where it makes other micro-batches,
        the core adds padding on ranks that have fewer."""

    def denominators(self, step: "Step") -> Denominators:
        """Return this rank's share of each denominator; the core sums them over ranks before the first micro-batch."""

    def loss(self, forward: Forward, head: Head, micro: "MicroBatch", denominators: Denominators) -> LossTerm:
        """Return a micro-batch's share of the step's loss: shares add up to the loss of the global batch."""


@runtime_checkable
class ChecksPrompts(Protocol):
    """What an objective may offer beside its contract: a look at all prompts before training."""

    def check_prompts(self, prompts: Sequence[Prompt]) -> None:
        """Raise ValueError where the row of one cannot be used."""


@runtime_checkable
class KeepsSamples(Protocol):
    """What an objective may offer that trains more than once on what it sampled: checkpoints hold that too."""

    def state(self) -> dict[str, Any]:
        """What this rank needs to go on after this step, JSON-serialisable. No two ranks use a name for unlike things:
        a checkpoint holds those of all ranks together."""

    def restore(self, state: Mapping[str, Any]) -> None:
        """Go on with what all ranks had when the checkpoint was written."""


@runtime_checkable
class HasPrompts(Protocol):
    """What a datamodule may offer beside its contract."""

    def prompts(self) -> Sequence[Prompt]:
        """All prompts that training may ask; those of a step are among them, but for their numbers."""


class Answer(NamedTuple):
    """What a policy wrote for a prompt, as a reward sees it."""

    prompt: str  # the user's message
    text: str  # what was written, without special tokens
    ids: Sequence[int]
    ended: bool  # by itself, with EOS; False: cut at the limit of tokens
    item: Mapping[str, Any]  # the row of the data: `answer`, `verifier`, and whatever else it has
    turns: Sequence[str] = ()  # of an episode: what was written in each


class Reward(Protocol):
    """Judges answers, each by itself: its reward does not depend on the other answers or on their order.

    Before training it is asked about `Prompt.unanswered` of all prompts, so that a row at fault is found then."""

    def __call__(self, answers: Sequence[Answer]) -> list[float]:
        """A number for each, finite; 0: nothing is right. An answer that has not ended earns 0, and a blank one too.

        Raises:
            ValueError: a row of the data lacks what the reward reads, or has a value that it cannot use.
        """


@runtime_checkable
class JudgesHeldOut(Protocol):
    """What an objective may offer beside its contract: figures that are also taken on held-out rows, which the data
    must have (`HasHeldOutRows`)."""

    held_out_figures: Sequence[str]
    """Names among its `statistics`; they become columns of `metrics/held_out`."""


@runtime_checkable
class HasHeldOutRows(Protocol):
    """What a datamodule may offer beside its contract."""

    def held_out_rows(self) -> "Iterable[MicroBatch]":
        """Held-out rows as training reads them, the same at every call."""


@runtime_checkable
class JudgesHeldOutPrompts(Protocol):
    """What an objective may offer beside its contract: figures of what the policy writes to held-out prompts, which the
    data must have (`HasHeldOutPrompts`)."""

    def judge(self, prompts: Sequence[Prompt], models: "Models") -> Mapping[str, float]:
        """Columns of `metrics/held_out`, at least one prompt given. Equal random numbers at every call, so that what
        differs is the policy; changes nothing that training goes on with."""


@runtime_checkable
class HasHeldOutPrompts(Protocol):
    """What a datamodule may offer beside its contract."""

    def held_out_prompts(self) -> Sequence[Prompt]:
        """Prompts that are not trained on, the same at every call, with numbers from 0 on."""


@runtime_checkable
class HasAuxiliaryLoss(Protocol):
    """What a part of the model (an nn.Module: MTP, attention, memory, router, experts) may offer beside its contract:
    a loss of its own and figures of it. Parts of one class share their statistics: their sums are added."""

    statistics: Sequence[Statistic]

    def auxiliary_loss(
        self, forward: Forward, head: Head, micro: "MicroBatch", denominators: Denominators, tokens_seen: int
    ) -> LossTerm:
        """Called once per micro-batch after its forward pass, in training only; added to the objective's loss."""


@runtime_checkable
class JoinsMatrices(Protocol):
    """What a part of the model may offer beside its contract: which of its weights hold several matrices.

    They are joined along the outputs, so that one GEMM serves them all. An optimiser that steps matrices as wholes
    (`StepsMatrices`) steps each of them by itself.
    """

    joined: Mapping[str, Sequence[int]]
    """Parameter, by its name within the part -> rows of each matrix, in order. The pattern repeats until the rows end:
    (d_h, d_R) where every head has d_h rows of one matrix and then d_R of another."""


class Memory(Protocol):
    """Adds to the embeddings what it keeps for the latest tokens: an nn.Module. It may read no later ones.

    A table with sparse gradients is an `nn.Embedding`, or an `nn.EmbeddingBag` of mode `sum` that is given [N, M] ids:
    over several ranks, each holds some of its rows.
    """

    active_parameters: int  # parameters that one token reads, at least 0

    def __call__(
        self,
        x_BTD: Tensor,
        tokens_BT: Tensor,
        document_ids_BT: Tensor | None = None,
        cache: Cache | None = None,
    ) -> Tensor:
        """Return the embeddings x_BTD of the tokens with its own part added.

        The other arguments are as in `Attention`, but documents and a cache are not given together.
        """

    def new_cache(self, rows: Iterable[int] = ()) -> Cache | None:
        """With these rows, all empty; None where earlier tokens are not read."""


class Router(Protocol):
    """Chooses K of E experts for each token, in FP32: an nn.Module."""

    top_k: int  # K; parameter counts, the plan and the monitor read it

    def __call__(self, x_ND: Tensor, bias_E: Tensor, tokens_N: Tensor) -> Routing:
        """`bias_E` moves the selection only, never a gate value. `tokens_N` are the token ids (hash routing)."""


@runtime_checkable
class ReplaysRouting(Protocol):
    """What a router may offer beside its contract: to go on with experts that were chosen before, elsewhere."""

    def gates(self, affinities_NE: Tensor, experts_NK: Tensor) -> Tensor:
        """Gates float32 [N, K] of these experts, with a gradient, as if the router had chosen them."""


class Balancing(Protocol):
    """Keeps the experts of one MoE layer evenly loaded, by a selection bias, by a loss, or by both.

    An `nn.Module`; its state (FP32 bias, int64 counts) lives in buffers that are never cast, averaged or decayed.
    """

    bias: Tensor  # float32 [E], added to the affinities for selection; its length is the number of experts

    def loss(self, routing: Routing, batch_shape: tuple[int, int], mask_BT: Tensor, tokens_seen: int) -> Tensor:
        """Return the weighted auxiliary loss of a micro-batch (a scalar; zero where there is none)."""

    def observe(self, counts_E: Tensor) -> None:
        """Add one micro-batch's load (int64, summed over ranks). Called in training only, once per micro-batch."""

    def update(self, tokens_seen: int) -> None:
        """Move the bias by what was observed since the last update. Called once per optimiser step."""


class Dispatch(Protocol):
    """Takes tokens to their experts and their outputs back. No token is dropped.

    It calls `experts` by position, as `experts(x_MD, counts_E, gates_M)`: the monitor looks on by a forward hook.
    """

    def __call__(self, x_ND: Tensor, routing: Routing, experts: "Experts") -> Tensor:
        """Return sum_k gates_NK * expert_k(x_ND), shape [N, D]."""


class Experts(Protocol):
    """E SwiGLU experts: down(silu(gate(x)) * up(x)). An nn.Module; every expert has an equal part of its parameters."""

    def __call__(self, x_MD: Tensor, counts_E: Tensor, gates_M: Tensor) -> Tensor:
        """Each row's expert applied to it, times the row's gate (float32).

        `x_MD` is sorted by expert; the first counts_E[0] rows are expert 0's, and so on (int64). A gate that is
        applied before the down-projection, which is linear, is cheaper than one on its output, and leaves nothing of
        width D to keep for the gate's gradient.
        """


class MTPPrediction(NamedTuple):
    """What one depth of multi-token prediction gives for S = T - k positions."""

    hidden_BSD: Tensor  # after the module's own final norm; logits come from the shared head
    targets_BS: Tensor  # t_{i+k+1}, or IGNORE
    routing: Routing | None  # of the depth's MoE layer


class MTP(Protocol):
    """Multi-token prediction (eq. 21-25): an nn.Module that predicts further tokens from the hidden states.

    Its loss is an auxiliary loss (`HasAuxiliaryLoss`), which MTP of depth 1 or more has. Made with `block=`, which
    makes a block of the model's own kind (`dsv3.model.decoder.Block`) at each call, and `precision=`. The modules of
    the depths are in one nn.ModuleList: its index k - 1 names the MoE layer of depth k, `mtp.<k-1>`.
    """

    depth: int  # D, the number of further tokens; 0: none
    weight: Schedule  # lambda
    after_final_norm: bool  # whether it takes the main model's states after the final norm, or before it

    def __call__(
        self, h_BTD: Tensor, batch: MicroBatch, embed: Callable[[Tensor], Tensor], isolate: bool
    ) -> list[MTPPrediction]:
        """Return one prediction for each depth k = 1..D, of the positions that have a token t_(i+k) in the row.

        `h_BTD` are the main model's states after its final norm if `after_final_norm`, else before it. `isolate`:
        attention stays within documents. Position i may read tokens up to t_(i+k) and predicts t_(i+k+1).
        """

    def new_caches(self, rows: Iterable[int] = ()) -> list[Cache]:
        """One for each depth, with these rows, all empty."""

    def extend(
        self, depth: int, h_BTD: Tensor, tokens_BT: Tensor, embed: Callable[[Tensor], Tensor], cache: Cache
    ) -> tuple[Tensor, Tensor]:
        """Return h^k (what the next depth takes) and the states for the shared head, [B, T, D] each, for T positions i
        of each row that continue what the depth's cache holds of it.

        `depth` is k, from 1; `h_BTD` are h^(k-1)_i, for k = 1 the main model's as above; `tokens_BT` are t_(i+k), so
        that the head's likeliest token is the draft of t_(i+k+1).
        """


GroupedMM = Callable[[Tensor, Tensor, Tensor], Tensor]
"""(x_MK sorted by group, weight_ENK, counts_E) -> y_MN: each row times the transpose of its group's weight."""


def is_precision_state(name: str) -> bool:
    """Whether a tensor of a state_dict is what a precision remembers, such as a history of amax.

    It is saved with the model, and is no part of it that another precision could take over. A precision names its
    buffers `precision_<what>`; `_extra_state` is torch's name for what a module saves beside tensors.
    """
    return name.rpartition(".")[2].startswith(("precision_", "_extra_state"))


class Precision(Protocol):
    """Chooses the numeric format of each role of layer. Master weights are FP32 in every format.

    A layer may have `hold_weights(hold: bool) -> bool`: between True and False its weight does not change, so that a
    cast of it may be cached; returns whether this changed anything (`dsv3.model.layers.cached_weight_casts`).
    Generation and the micro-batches of a training step run like this: in training, the cached cast must bear several
    backward passes. A layer that torch.compile cannot trace has `compilable = False`; `compile=true` leaves its module
    eager.
    """

    activation_dtype: torch.dtype  # of the residual stream

    def linear(self, in_features: int, out_features: int, *, role: Role) -> nn.Module:
        """A linear layer without bias; its `weight` is an FP32 parameter [out, in].

        The loss multiplies by the head's weight itself, a chunk of positions at a time: in the head layer's `dtype` if
        it has that attribute, or else in `activation_dtype`.
        """

    def grouped_linear(
        self, n_groups: int, in_features: int, out_features: int, *, role: Role, grouped_mm: GroupedMM
    ) -> nn.Module:
        """A linear layer per expert: `(x_MK, counts_E) -> y_MN`; its `weight` is FP32 [E, out, in]."""

    def swiglu(self, gate_up: Tensor, row_weights: Tensor | None = None) -> Tensor:
        """silu(gate) * up, where `gate_up` [..., 2 * I] holds the gates first, times `row_weights` [...] if given.

        What is kept of it for the backward pass, and in which format, is the precision's choice.
        """

    def check(self, device: torch.device) -> list[str]:
        """What stands against running on `device`, each as a sentence that says what to do; empty if nothing."""


class QuantisationLoss(NamedTuple):
    """What is lost where a tensor is rounded to a small format."""

    snr_db: float  # 10 log10(sum x^2 / sum (x - x')^2); infinite where nothing is lost
    underflow: float  # share of the numbers other than zero that become zero
    saturation: float  # share of all numbers other than zero that lie beyond the format's range
    amax: float  # the largest magnitude


@runtime_checkable
class MeasuresQuantisation(Protocol):
    """What a Precision may offer beside its contract: to measure what its formats lose while a step runs."""

    def start_measuring(self) -> None: ...

    def stop_measuring(self) -> Mapping[tuple[str, str], QuantisationLoss]:
        """By role of layer and use of a tensor, over all layers of the role since the start."""


@runtime_checkable
class FollowsSteps(Protocol):
    """What a Precision may offer beside its contract: something that it does once after every optimiser step."""

    def end_step(self) -> None: ...


@runtime_checkable
class RemembersMaxima(Protocol):
    """What a Precision that follows steps may offer too: maxima of a step, which are to be those of all ranks."""

    def maxima(self) -> Sequence[Tensor]:
        """As many, of the same shapes, on every rank, of one dtype. The core puts the largest values of all ranks into
        them before `end_step`."""


@runtime_checkable
class Settles(Protocol):
    """What a part may offer beside its contract: a choice that is made once, when training begins."""

    def settle(self, device: torch.device) -> tuple[Mapping[str, Any], str]:
        """Values for keys of its YAML that are null, and why they are so, in words.

        They are written into the run's config.yaml, which a resumed run keeps, and into every job of a study.
        """


OptimizerFactory = Callable[[Iterable[tuple[str, nn.Parameter]]], torch.optim.Optimizer]
"""Named trainable parameters -> one optimiser, in whose groups every parameter is exactly once.

Before each step the core sets every group's `lr` to the schedule's value, times the group's `lr_scale` if it has one;
a step with `lr` 0 changes no parameter. `state_dict` and `load_state_dict` continue a run bit for bit; what is saved
are tensors and plain containers. Parameters without a gradient are left alone. Gradients are FP32, and sparse for the
tables of a memory. Over several ranks, a parameter is a DTensor. A table's sparse gradient has this rank's rows, by
their numbers in the whole table; `dsv3.model.layers` has `local` and `first_row`.
"""


@runtime_checkable
class StepsMatrices(Protocol):
    """What an optimiser may offer: steps of whole matrices, for which it must know the weights that join several."""

    def separate(self, joined: Mapping[nn.Parameter, Sequence[int]]) -> None:
        """Take over the rows of each matrix, as `JoinsMatrices` declares them. Called once, before anything else."""


class Tokenizer(Protocol):
    """Text to token ids and back, without loss on any string of bytes. Ids lie in 0..vocab_size - 1."""

    vocab_size: int
    bos: int  # the special tokens have different ids, which `encode` never gives
    eos: int
    pad: int
    fim_begin: int
    fim_hole: int
    fim_end: int

    def encode(self, text: str) -> list[int]:
        """Ids of `text`, without special tokens; text that looks like a special token is not one."""

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """`encode` of each text."""

    def encode_bytes(self, data: bytes) -> list[int]:
        """Ids of any bytes, UTF-8 or not: `decode_bytes` gives them back. Where they are UTF-8, as `encode`."""

    def decode(self, ids: Sequence[int]) -> str:
        """Text of `ids`; special tokens are left out; bytes that are not UTF-8 become U+FFFD."""

    def decode_bytes(self, ids: Sequence[int]) -> bytes:
        """Exactly the bytes that the ids stand for; none for special tokens."""

    def token_bytes(self) -> list[bytes]:
        """The bytes of every token of the vocabulary, in the order of ids; none for special tokens."""

    def identity(self) -> str:
        """Equal for tokenizers that encode alike, in every process: caches of token ids are named by it."""

    def save(self, directory: str) -> None:
        """Write `tokenizer.json` and `tokenizer_config.json` that transformers' AutoTokenizer reads.

        A run's tokenizer is read back from these by what conf/saved_tokenizer.yaml names (byte-level BPE with
        DeepSeek's special tokens), so that a run of any tokenizer can be evaluated and exported.
        """


@runtime_checkable
class HasChatTokens(Protocol):
    """A tokenizer with special tokens that open the turns of a conversation."""

    user: int
    assistant: int


TokenizerFactory = Callable[..., Tokenizer]
"""(texts=, cache_dir=) -> tokenizer. `texts`: training texts of each domain, an iterable in a fixed order; of a large
corpus a sample. A run's tokenizer is made with none."""


class Data(Protocol):
    """The datamodule as the core sees it: a LightningDataModule.

    A datamodule may also have `held_out_documents(domain) -> list[str]`: all held-out texts of a domain, which some
    benchmarks are made of.
    """

    domains: Sequence[str]  # names; `MicroBatch.domains_BT` are indices into it
    tokenizer: Tokenizer  # from `setup` on

    def setup(self, stage: str) -> None:
        """Load what is needed. Called with "fit" before anything else is read; a second call changes nothing."""

    def train_dataloader(self) -> Iterable[Step]:
        """Steps from the restored state (or the beginning) until the token budget is spent."""

    def validation_batches(self) -> Iterable[MicroBatch]:
        """The fixed held-out set, the same at every call; every token of it is a target once."""

    def validation_bytes(self) -> Mapping[str, int]:
        """UTF-8 bytes of each domain's held-out text, what bits per byte are counted over."""

    def questions(self) -> list[Question]:
        """Held-out questions, the same at every call; may be empty."""

    def samples(self) -> "list[Sample]":
        """Prompts whose continuations the summary of a run shows; may be empty."""

    def restore(self, state: Mapping[str, Any]) -> None:
        """Continue after the step whose `state_after` this is."""


@runtime_checkable
class SharesSteps(Protocol):
    """What a datamodule may offer beside its contract, and must where a run has several ranks: a share of every step.

    The global batch is the same for any number of ranks. Micro-batch i of a step goes to rank i mod `of`; ranks that
    are left without one get padding (`Step.filled`). `tokens_before` and `state_after` are the whole step's.
    """

    def share(self, rank: int, of: int) -> None:
        """Give rank `rank` of `of` its micro-batches from now on. Called before the first step is asked for."""


@runtime_checkable
class KeepsHeldOut(Protocol):
    """What a datamodule may offer beside its contract: its held-out texts in a folder of the run, so that the run can
    be scored on what it held out, whatever has become of the training texts."""

    def keep_held_out(self, folder: Path) -> None:
        """Write them, whole or not at all. Called when training begins, after `setup`."""

    def use_held_out(self, folder: Path) -> str | None:
        """Take them from there, instead of `setup`; return what the user is to be told, if anything."""


LoggerFactory = Callable[..., Any]
"""(save_dir=<run folder>) -> what lightning.Trainer takes as `logger`: a Lightning Logger, a list of them, or False.

Several may be chosen, so the arguments of each stand under a name of its own, such as `logger.csv`.
A logger is sent `log_metrics({name: number})` with `tokens` among the names, and no `step`. What it writes lies in
`save_dir` or on a server. Called again for a resumed run, it continues the same one.
"""


class Callback(Protocol):
    """A `lightning.Callback`, added under a name of its own in `conf/callbacks/`. Its hooks are Lightning's.

    `training_step` is a whole optimiser step: at `on_train_batch_end` the weights are updated, `pl_module.record` is
    the step's `StepRecord`, `pl_module.folder.table("metrics/<name>")` takes rows, and `trainer.datamodule` is the
    data. What a callback does leaves weights, routing state and random numbers as they are. It may have

        phase           when it acts within a step (`dsv3.training.callbacks.phases`); else it observes
        check_model     a check before the run folder is touched (`dsv3.training.callbacks.phases.ChecksModel`)
    """

    state_key: str  # names the state in a checkpoint; Lightning's is the class's name

    def state_dict(self) -> dict[str, Any]:
        """What a resumed run needs: tensors and plain containers."""

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take over what `state_dict` gave."""
