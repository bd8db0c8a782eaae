"""The LightningModule: one batch is one optimiser step. Its arithmetic is in `dsv3.training.step`."""

from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any, Protocol

import lightning
import torch
from omegaconf import DictConfig
from torch import Tensor

from dsv3.checkpoint.run_folder import RunFolder
from dsv3.contracts import (
    FollowsSteps,
    Forward,
    KeepsSamples,
    MicroBatch,
    Models,
    Objective,
    OptimizerFactory,
    RemembersMaxima,
    Routing,
    Schedule,
    Step,
    StepsMatrices,
)
from dsv3.distributed.agree import gathered, max_over_ranks, sum_over_ranks
from dsv3.distributed.mesh import Mesh
from dsv3.distributed.pipeline import Pipeline
from dsv3.distributed.shard import evaluating
from dsv3.model.decoder import Decoder
from dsv3.model.layers import joined_weights
from dsv3.training.step import (
    Losses,
    RoutingObserver,
    StepRecord,
    balance,
    clip_gradients,
    evened,
    gradients,
    norm_of,
    read,
    take_gradients,
)
from dsv3.training.trained_parameters import trained_parameters


class UpdateGuard(Protocol):
    """Decides whether a step's gradients are used. A callback puts itself at `LanguageModel.guard`."""

    def allows(self, step: Step, record: StepRecord) -> bool:
        """Called once a step, before the update, with gradients taken and not yet used."""


class LanguageModel(lightning.LightningModule):
    """Trains a Decoder. `training_step` does the whole optimiser step; callbacks find what it was at `record`."""

    record: StepRecord  # of the latest step
    rollouts: Sequence[Mapping[str, Any]] = ()  # what its objective sampled on this rank
    config: DictConfig  # of the run, for callbacks
    folder: RunFolder  # of the run; callbacks write tables there
    mesh: Mesh | None = None  # the ranks that train together; None: one process
    pipeline: Pipeline | None = None  # None: every rank has all layers
    at: str = ""  # where in training this process is, for who looks on from a thread; empty while callbacks work
    moved: Callable[[], None] | None = None  # is called when that has changed

    def __init__(
        self,
        model: Decoder,
        *,
        objective: Objective,
        models: Models | None = None,
        optimizer: OptimizerFactory,
        schedule: Schedule,
        grad_clip: float,
        total_tokens: int,
        max_steps: int = -1,
        recompute: Collection[str] = (),
    ) -> None:
        """`total_tokens`: the length of training. `max_steps`: a cap on its steps, or -1.

        `models`: what the objective may ask before a step; None: it asks none.

        `recompute`: parts whose results are not kept for the backward pass (`dsv3.model.recompute.Part`).

        Raises ValueError where two parts record figures of one name.
        """
        super().__init__()
        self.automatic_optimization = False
        self.model = model
        self.objective = objective
        self.losses = Losses(model, objective)
        self.models = models
        self.mtp_weight, self.width = model.mtp.weight, model.embed_tokens.embedding_dim  # a stage may lack both
        self.optimizer_factory = optimizer
        self.schedule = schedule
        self.grad_clip = grad_clip
        self.total_tokens = total_tokens
        self.max_steps = max_steps
        self.recompute = recompute
        self.tokens_seen = 0
        self.steps = 0  # taken so far, those whose update was skipped included
        self.data_state: dict[str, Any] = {}
        self.observers: list[RoutingObserver] = []
        self.guard: UpdateGuard | None = None
        self.flags: dict[str, Callable[[], bool]] = {}  # of this rank, asked once a step: callbacks add theirs
        self.raised: set[str] = set()  # names of flags that any rank raised in the latest step

    @property
    def finished(self) -> bool:
        """Whether the last step is done, by tokens or by the cap on steps."""
        return self.tokens_seen >= self.total_tokens or 0 <= self.max_steps <= self.steps

    def configure_optimizers(self) -> torch.optim.Optimizer:
        optimizer = self.optimizer_factory(trained_parameters(self.model))
        if isinstance(optimizer, StepsMatrices):
            optimizer.separate(joined_weights(self.model))
        return optimizer

    def on_train_batch_start(self, batch: Step, batch_idx: int) -> int | None:
        """End training where the Trainer, which counts updates, would go on after the last step: -1 tells it so."""
        return -1 if self.finished else None

    def training_step(self, step: Step, batch_idx: int) -> None:
        self._go(f"in step {self.steps + 1}")
        self.record = self.take_step(step)
        self._go("")

    def _go(self, at: str) -> None:
        self.at = at
        if self.moved is not None:
            self.moved()

    def on_train_batch_end(self, outputs: Any, batch: Step, batch_idx: int) -> None:
        self._await_data()  # Lightning calls this after the callbacks

    def take_step(self, step: Step) -> StepRecord:
        """Train on one step of the data.

        Its learning rate is the schedule's value in the middle of its tokens: neither the first step of a warm-up from
        0 nor the last one of a decay to 0 is lost.
        """
        optimizer = self.optimizers()
        assert not isinstance(optimizer, list)
        if step.prompts:
            step = step._replace(tokens_before=self.tokens_seen)
        with torch.no_grad():
            step = evened(self.objective.prepare(step, self.models), step)  # type: ignore[arg-type]
        self.rollouts = step.rollouts
        before = step.tokens_before
        own = take_gradients(
            self.losses,
            step,
            backward=self.manual_backward,
            recompute=self.recompute,
            observers=self.observers,
            mesh=self.mesh,
            pipeline=self.pipeline,
        )
        taken = gradients(self.model)
        own.add({"squares": norm_of(taken).double().square()})
        own.add({name: torch.tensor(float(flag()), device=self.device) for name, flag in self.flags.items()})
        sums = own.over_ranks()
        norm = sums.scalars["squares"].sqrt().float()
        clip_gradients(taken, norm, self.grad_clip)
        balance(self.model, sums.loads, before)
        by_name, figures, loads, biases = read(self.losses.statistics, sums, norm, self._biases())
        self.raised = {name for name in self.flags if by_name[name]}
        tokens = round(by_name["tokens"])
        rate = self.schedule(before + tokens // 2)
        for group in optimizer.param_groups:
            group["lr"] = rate * group.get("lr_scale", 1.0)
        figures |= {"lr": rate, "mtp_weight": self.mtp_weight(before)}
        self.tokens_seen, self.steps = before + tokens, self.steps + 1
        record = StepRecord(self.tokens_seen, figures, loads, biases, self.steps, before)
        if self.guard is None or self.guard.allows(step, record):
            optimizer.step()
        optimizer.zero_grad()
        if self.pipeline is not None:
            self.pipeline.refresh()
        if isinstance(self.model.precision, RemembersMaxima):
            max_over_ranks(self.model.precision.maxima(), self.device)
        if isinstance(self.model.precision, FollowsSteps):
            self.model.precision.end_step()
        self.data_state = step.state_after
        return record

    @property
    def stages(self) -> Sequence[Decoder]:
        """Of the pipeline, those on this rank; empty where there is none."""
        return self.pipeline.stages if self.pipeline is not None else ()

    def evaluating(self) -> AbstractContextManager[None]:
        """Evaluation mode, and training mode after it."""
        return evaluating(self.model, self.stages)

    def forward(self, micro: MicroBatch, *, with_mtp: bool = False) -> tuple[Forward | None, dict[str, Routing]]:  # type: ignore[override]
        """The model's result for a micro-batch, where this rank has its last layer, and the routings of the MoE layers
        that it has. All ranks of a pipeline call this together."""
        if self.pipeline is not None:
            return self.pipeline.forward(micro, with_mtp=with_mtp)
        forward = self.model(micro, with_mtp=with_mtp)
        return forward, forward.routings

    def _biases(self) -> dict[str, Tensor]:
        """The selection bias of every MoE layer, those of other stages too, after this step's update."""
        own = self.model.routing_biases()
        if self.pipeline is None or self.mesh is None:
            return own
        counted = own if self.mesh.data_rank == 0 else {}
        sizes = self.losses.n_experts
        flat = torch.cat([counted.get(name, torch.zeros(size, device=self.device)) for name, size in sizes.items()])
        return dict(zip(sizes, sum_over_ranks(flat).split(list(sizes.values())), strict=True))

    def configure_model(self) -> None:
        """Lightning asks for this where ranks share a model; it is sharded before (`dsv3.training.run`)."""

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        checkpoint["dsv3"] = {
            "tokens_seen": self.tokens_seen,
            "steps": self.steps,
            "data_state": self.data_state,
        }
        if isinstance(self.objective, KeepsSamples):
            states = gathered(self.objective.state())
            checkpoint["dsv3"]["samples"] = {name: value for state in states for name, value in state.items()}

        # A limit of this call, such as limit_train_batches, is not the end of the data, as Lightning takes it to be.
        loop = checkpoint["loops"]["fit_loop"]
        loop["epoch_progress"]["current"] |= {"processed": 0, "completed": 0}
        loop["epoch_loop.batch_progress"]["is_last_batch"] = False

    def on_train_start(self) -> None:
        if self.pipeline is not None:  # weights may have been loaded
            self.pipeline.refresh()
        self._await_data()

    def _await_data(self) -> None:
        self._go(f"waiting for the data of step {self.steps + 1}")

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        self.tokens_seen = checkpoint["dsv3"]["tokens_seen"]
        self.steps = checkpoint["dsv3"].get("steps", checkpoint["global_step"])  # older runs counted updates
        self.data_state = checkpoint["dsv3"]["data_state"]
        if isinstance(self.objective, KeepsSamples):
            self.objective.restore(checkpoint["dsv3"].get("samples", {}))
