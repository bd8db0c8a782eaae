"""Validation before the first step, at intervals and after the last step."""

import logging
from collections.abc import Sequence
from contextlib import nullcontext
from typing import Any, Literal

import lightning
from omegaconf import DictConfig, OmegaConf

from dsv3.bounds import PositiveInt
from dsv3.build import token_bytes
from dsv3.contracts import HasHeldOutPrompts, HasHeldOutRows, JudgesHeldOut, JudgesHeldOutPrompts, Prompt, Step
from dsv3.evaluation.document_bits import DocumentNats
from dsv3.evaluation.held_out import dealt, domain_scores
from dsv3.model.layers import cached_weight_casts
from dsv3.training.callbacks.ema import EMA
from dsv3.training.callbacks.interruption import interrupted
from dsv3.training.callbacks.intervals import crossed, ends_early
from dsv3.training.callbacks.phases import Phase, find
from dsv3.training.lightning_module import LanguageModel
from dsv3.training.settle import with_choices
from dsv3.training.step import held_out_figures

log = logging.getLogger(__name__)

QUICK_TOKENS = 8192
"""Per domain, in a quick try: an eighth of those of conf/data/default.yaml."""


def with_quick_validation(config: DictConfig) -> DictConfig:
    """The settings with a shorter validation set, where the run is a quick try (`ends_early`)."""
    tokens = OmegaConf.select(config, "data.validation_tokens")
    if tokens is None or tokens <= QUICK_TOKENS or not ends_early(config):
        return config
    log.info("validation on %s tokens per domain, not %s: a quick try", f"{QUICK_TOKENS:,}", f"{tokens:,}")
    return with_choices(config, {"data.validation_tokens": QUICK_TOKENS})


class Validate(lightning.Callback):
    """Writes `metrics/validation`: tokens, weights (live or ema), domain, loss, bpb. Touches no training state.

    After the last step also `metrics/documents`, the same by document: of one process, where all documents are.
    """

    phase: Phase = "evaluate"

    def __init__(self, *, every_tokens: PositiveInt) -> None:
        self.every_tokens = every_tokens
        self.validated_at: dict[str, int] = {}  # tokens, by which weights; so that resuming repeats nothing
        self.latest_bpb: dict[str, float] = {}

    def on_train_start(self, trainer: lightning.Trainer, pl_module: LanguageModel) -> None:
        if pl_module.tokens_seen == 0:
            self.validate(trainer, pl_module, "live")

    def on_train_batch_end(
        self, trainer: lightning.Trainer, pl_module: LanguageModel, outputs: Any, batch: Step, batch_idx: int
    ) -> None:
        if not pl_module.finished and crossed(self.every_tokens, pl_module.record.tokens_before, pl_module.tokens_seen):
            self.validate(trainer, pl_module, "live")

    def on_train_end(self, trainer: lightning.Trainer, pl_module: LanguageModel) -> None:
        """After the last step, whose checkpoint is on disk by now; an interrupted run scores nothing."""
        if not interrupted(trainer):
            self.validate(trainer, pl_module, "live", by_document=True)
            if find(trainer, EMA) is not None:
                self.validate(trainer, pl_module, "ema", by_document=True)

    def state_dict(self) -> dict[str, Any]:
        return {"validated_at": self.validated_at, "latest_bpb": self.latest_bpb}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.validated_at = state_dict["validated_at"]
        self.latest_bpb = state_dict["latest_bpb"]

    def validate(
        self, trainer: Any, pl_module: LanguageModel, weights: Literal["live", "ema"], *, by_document: bool = False
    ) -> None:
        tokens = pl_module.tokens_seen
        if self.validated_at.get(weights) == tokens:
            return
        self.validated_at[weights] = tokens
        data, ema, mesh = trainer.datamodule, find(trainer, EMA), pl_module.mesh
        batches = data.validation_batches()
        documents = documents_of(data, pl_module) if by_document and mesh is None else None
        if mesh is not None:
            batches = dealt(batches, mesh.data_rank, mesh.sizes.data)
        averaged = ema.applied(pl_module.model) if weights == "ema" and ema is not None else nullcontext()
        with averaged, pl_module.evaluating():
            scores = domain_scores(
                pl_module.model,
                batches,
                data.domains,
                data.validation_bytes(),
                run=lambda micro: pl_module.forward(micro)[0],
                documents=documents,
            )
        table = pl_module.folder.table("metrics/validation")
        for domain, score in scores.items():
            table.append({"tokens": tokens, "weights": weights, "domain": domain, **score._asdict()})
        for row in documents.rows() if documents is not None else ():
            pl_module.folder.table("metrics/documents").append({"tokens": tokens, "weights": weights, **row})
        if weights == "live":
            self._judge(trainer.datamodule, pl_module)
            self.latest_bpb = {domain: score.bpb for domain, score in scores.items()}
        for logger in trainer.loggers:
            values = {f"validation_{weights}/{k}/{d}": v for d, s in scores.items() for k, v in s._asdict().items()}
            logger.log_metrics(values | {"tokens": tokens})

    def _judge(self, data: Any, pl_module: LanguageModel) -> None:
        """`metrics/held_out`: the objective's own figures on held-out rows, or of what the policy writes to held-out
        prompts; of one process, where all weights are."""
        objective: Any = pl_module.objective
        models = pl_module.models
        by_rows = isinstance(objective, JudgesHeldOut) and isinstance(data, HasHeldOutRows)
        prompts = held_out_prompts(objective, data)
        if pl_module.mesh or models is None or not (by_rows or prompts):
            return
        found: dict[str, float] = {}
        with pl_module.evaluating(), cached_weight_casts(pl_module.model):
            if by_rows:
                names, rows = objective.held_out_figures, data.held_out_rows()
                found |= held_out_figures(pl_module.losses, models, rows, names, pl_module.tokens_seen)
            if prompts:
                found |= objective.judge(prompts, models)
        pl_module.folder.table("metrics/held_out").append({"tokens": pl_module.tokens_seen, **found})
        log.info("held out: %s", "  ".join(f"{name} {value:.3f}" for name, value in found.items()))


def held_out_prompts(objective: Any, data: Any) -> Sequence[Prompt]:
    """Those that the objective judges the policy's answers to; none where it judges none, or the data has none."""
    both = isinstance(objective, JudgesHeldOutPrompts) and isinstance(data, HasHeldOutPrompts)
    return data.held_out_prompts() if both else ()


def documents_of(data: Any, pl_module: LanguageModel) -> DocumentNats:
    bytes_V = token_bytes(data.tokenizer, pl_module.model.embed_tokens.num_embeddings)
    return DocumentNats(bos=data.tokenizer.bos, bytes_V=bytes_V, domains=data.domains)
