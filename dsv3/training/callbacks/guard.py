"""Loss spikes and non-finite losses: found before the update, recorded, and acted on by policy.

A loss is a spike where it lies above the median of the last `window` finite ones by more than

    max(min_rise, threshold_sigmas * sigma),    sigma = 1.4826 / sqrt(2) * median |d - median d|,

d being the differences of successive losses: what varies from step to step, not the trend of the window. (For
independent normal losses sigma is their standard deviation.) One spike moves neither median; a rise that lasts is the
new level after half a window. The policies:

    record      log the batch and go on
    skip        log the batch and skip this update of the weights; the data moves on
    roll_back   roll back to the newest checkpoint and train again, skipping the update at which the loss rose

Training ends with an error after `max_nonfinite` losses or gradients in a row that are not finite: weights that give
such losses are not mended by further batches.

The batch is logged to `spikes/tokens-<n>.json`, n the tokens before the step: its documents with their own losses,
worst first, its domains, and the load of every expert. The newest BATCHES_KEPT stay.
"""

import itertools
import json
import logging
import math
from collections import deque
from itertools import pairwise
from pathlib import Path
from statistics import median
from typing import Any, Literal, get_args

import lightning
import torch

from dsv3.bounds import NonNegativeInt, PositiveFloat, PositiveInt
from dsv3.checkpoint.older_runs import file_to_read
from dsv3.checkpoint.run_folder import write_text_atomically
from dsv3.contracts import MicroBatch, Step
from dsv3.distributed.agree import gathered, of_rank_zero, sum_over_ranks
from dsv3.model.losses import token_losses
from dsv3.monitoring.alerts import Alert
from dsv3.strict_json import finite, read_json
from dsv3.training.callbacks.phases import Phase
from dsv3.training.lightning_module import LanguageModel
from dsv3.training.step import StepRecord

log = logging.getLogger(__name__)

OnSpike = Literal["record", "skip", "roll_back"]
OnNonfinite = Literal["skip", "roll_back"]
DOCUMENTS_KEPT = 8
CHARACTERS_KEPT = 400
FEWEST_LOSSES = 8  # before a spike can be told from ordinary noise
BATCHES_KEPT = 50
NONFINITE = "non-finite loss"


class RollBack(Exception):  # noqa: N818  (a request to `dsv3.training.fit`, not an error)
    """Training rolls back to the newest checkpoint."""


class Guard(lightning.Callback):
    """Decides on every update (`dsv3.training.lightning_module.UpdateGuard`). See the module."""

    phase: Phase = "guard"

    def __init__(
        self,
        *,
        on_spike: OnSpike,
        on_nonfinite: OnNonfinite,
        window: PositiveInt,
        threshold_sigmas: PositiveFloat,
        min_rise: PositiveFloat,
        max_rollbacks: NonNegativeInt,
        max_nonfinite: PositiveInt,
    ) -> None:
        """Raises ValueError for an unknown policy, or a `window` too small to tell a spike from noise."""
        for name, policy, allowed in (("spike", on_spike, OnSpike), ("nonfinite", on_nonfinite, OnNonfinite)):
            if policy not in get_args(allowed):
                raise ValueError(f"callbacks.guard.on_{name}={policy}: must be one of {', '.join(get_args(allowed))}")
        if window < FEWEST_LOSSES:
            raise ValueError(f"callbacks.guard.window={window}: must be at least {FEWEST_LOSSES}")
        if max_nonfinite < 1:
            raise ValueError(f"callbacks.guard.max_nonfinite={max_nonfinite}: must be at least 1")
        self.policies = {"loss spike": on_spike, NONFINITE: on_nonfinite}
        self.threshold_sigmas, self.min_rise = threshold_sigmas, min_rise
        self.max_rollbacks, self.max_nonfinite = max_rollbacks, max_nonfinite
        self.losses: deque[float] = deque(maxlen=window)
        self.nonfinite = 0  # in a row
        self.skipped: list[int] = []  # tokens before each step whose update a rollback skips

    def on_fit_start(self, trainer: Any, pl_module: LanguageModel) -> None:
        self.module, self.data = pl_module, trainer.datamodule
        self.folder, self.writes = pl_module.folder.path, pl_module.folder.writes
        self.alerts = pl_module.folder.table("metrics/alerts")
        mesh = pl_module.mesh
        self.number_of_first, self.ranks = (mesh.data_rank, mesh.sizes.data) if mesh is not None else (0, 1)
        self.skipped = of_rank_zero(skipped_updates(self.folder))
        pl_module.guard = self

    def allows(self, step: Step, record: StepRecord) -> bool:
        """Whether the weights are updated by this step. Called once a step, with gradients taken and not yet used."""
        loss = record.loss
        if step.tokens_before in self.skipped:
            self._alert(step, "skipped update", loss, f"skipped the update at {step.tokens_before:,} tokens")
            allowed = False
        else:
            kind = self._judge(loss, record.figures["grad_norm"])
            self.nonfinite = self.nonfinite + 1 if kind == NONFINITE else 0
            allowed = kind is None or self._act(step, kind, record)
        if math.isfinite(loss):
            self.losses.append(loss)
        return allowed

    def _act(self, step: Step, kind: str, record: StepRecord) -> bool:
        """Log the step and follow the policy; whether its update is made."""
        policy, norm = self.policies[kind], record.figures["grad_norm"]
        text = f"{kind} {record.loss:.3f} (gradient norm {norm:.3g}) at {step.tokens_before:,} tokens: {policy}"
        self._alert(step, kind, record.loss, text)
        self._log_batch(step, kind, policy, record)
        if policy == "roll_back":
            if len(self.skipped) >= self.max_rollbacks:
                raise ValueError(f"{text}; limit of callbacks.guard.max_rollbacks={self.max_rollbacks} reached")
            if self.writes:
                write_skipped_updates(self.folder, [*self.skipped, step.tokens_before])
            raise RollBack(text)
        if self.nonfinite >= self.max_nonfinite:
            raise ValueError(
                f"callbacks.guard.max_nonfinite={self.max_nonfinite}: {self.nonfinite} steps in a row had a loss or "
                f"gradient that is not finite, the last one at {step.tokens_before:,} tokens (loss {record.loss:.3f}, "
                f"gradient norm {norm:.3g}); lower schedule.peak, or resume=CHECKPOINT from before it. Their batches "
                f"are in {self.folder / 'spikes'}"
            )
        return policy == "record"

    def _judge(self, loss: float, grad_norm: float) -> str | None:
        if not (math.isfinite(loss) and math.isfinite(grad_norm)):
            return NONFINITE
        if len(self.losses) >= FEWEST_LOSSES and loss > self.threshold():
            return "loss spike"
        return None

    def threshold(self) -> float:
        """The largest loss that is no spike."""
        differences = [after - before for before, after in pairwise(self.losses)]
        middle = median(differences)
        sigma = 1.4826 / math.sqrt(2) * median(abs(d - middle) for d in differences)
        return median(self.losses) + max(self.min_rise, self.threshold_sigmas * sigma)

    def _alert(self, step: Step, kind: str, loss: float, text: str) -> None:
        log.warning(text)
        self.alerts.append(Alert(step.tokens_before, "", kind, -1, loss, text)._asdict())

    def _log_batch(self, step: Step, kind: str, policy: str, record: StepRecord) -> None:
        domains_N = torch.cat([micro.domains_BT[micro.document_ids_BT > 0] for micro in step.micro_batches])
        group = self.module.mesh.data.get_group() if self.module.mesh is not None else None
        counts_X = sum_over_ranks(torch.bincount(domains_N, minlength=len(self.data.domains)), group).tolist()
        content = {
            "kind": kind,
            "policy": policy,
            "tokens_before": step.tokens_before,
            "loss": record.loss,
            "grad_norm": record.figures["grad_norm"],
            "losses_before": list(self.losses),
            "domains": dict(zip(self.data.domains, counts_X, strict=True)),
            "documents": self._documents(step),
            "routing": {
                layer: {"max_violation": record.figures[f"max_violation/{layer}"], "load": load_E.tolist()}
                for layer, load_E in record.loads.items()
            },
        }
        if not self.writes:
            return
        text = json.dumps(finite(content, instead=str), indent=1, allow_nan=False) + "\n"
        out = self.folder / "spikes" / f"tokens-{step.tokens_before:015d}.json"
        write_text_atomically(out, text)
        for old in sorted(out.parent.glob("tokens-*.json"))[:-BATCHES_KEPT]:
            old.unlink()

    @torch.no_grad()
    def _documents(self, step: Step) -> list[dict[str, Any]]:
        """The documents of the step, of all ranks, with the highest mean losses, those without a finite loss first."""
        numbers = itertools.count(self.number_of_first, self.ranks)
        with self.module.evaluating():
            own = [document for i, micro in zip(numbers, step.micro_batches) for document in self._scored(i, micro)]
        found = [document for of_rank in gathered(own) for document in of_rank]
        found.sort(key=lambda document: -document["loss"] if math.isfinite(document["loss"]) else -math.inf)
        return found[:DOCUMENTS_KEPT]

    def _scored(self, number: int, micro: MicroBatch) -> list[dict[str, Any]]:
        forward, _ = self.module.forward(micro)
        if forward is None:  # another rank has the last layer
            return []
        hidden_ND = forward.hidden_BTD.flatten(0, 1)
        losses_N = token_losses(hidden_ND, self.module.model.cast_head(), micro.targets_BT.flatten())
        losses_BT = losses_N.view_as(micro.tokens_BT).cpu()
        documents = []
        for row, ids_T in enumerate(micro.document_ids_BT.cpu()):
            for document in ids_T[ids_T > 0].unique().tolist():
                here_T = ids_T == document
                tokens = micro.tokens_BT[row].cpu()[here_T].tolist()
                documents.append(
                    {
                        "micro_batch": number,
                        "row": row,
                        "document": document,
                        "domain": self.data.domains[int(micro.domains_BT[row].cpu()[here_T][0])],
                        "tokens": len(tokens),
                        "loss": losses_BT[row][here_T].mean().item(),
                        "text": self.data.tokenizer.decode(tokens)[:CHARACTERS_KEPT],
                    }
                )
        return documents

    def state_dict(self) -> dict[str, Any]:
        return {"losses": list(self.losses), "nonfinite": self.nonfinite}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.losses.extend(state_dict["losses"])
        self.nonfinite = state_dict.get("nonfinite", 0)  # older runs have none


SKIPPED_UPDATES = "spikes/skipped_updates.json"


def skipped_updates(run: Path) -> list[int]:
    """Tokens before each step whose update a rollback skips."""
    path = file_to_read(run, SKIPPED_UPDATES)
    return read_json(path) if path.exists() else []


def write_skipped_updates(run: Path, tokens_before: list[int]) -> None:
    write_text_atomically(run / SKIPPED_UPDATES, json.dumps(tokens_before))
