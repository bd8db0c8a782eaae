"""Expert monitoring: routing tables over training tokens, `metrics/routing`, `metrics/coactivation`,
`metrics/stability` and `metrics/alerts`.

In a step, sums are added up for each MoE layer (`dsv3.monitoring.routing_statistics`); figures are made of them once an
interval. Expert outputs are measured in one step an interval. What has been added up is part of a checkpoint, so that
the tables of a continued run equal those of an uninterrupted one. What monitoring itself takes is in `timing/monitor`.

With several ranks, each adds up its own rows, of the layers that it has; at an interval's end the ranks that read
different rows add up their sums, and the stages of a pipeline send theirs to rank 0.
"""

import logging
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import lightning
import torch
from torch import Tensor, nn

from dsv3.bounds import PositiveInt
from dsv3.checkpoint.run_folder import Table
from dsv3.contracts import MicroBatch, Routing, Step
from dsv3.distributed.agree import gathered, of_rank_zero
from dsv3.model.load import count_experts, real_tokens
from dsv3.monitoring.alerts import Alert, changes, condition
from dsv3.monitoring.routing_statistics import RoutingStatistics
from dsv3.planning.recipe import FORMATS
from dsv3.training.callbacks.intervals import crossed
from dsv3.training.callbacks.phases import Phase
from dsv3.training.lightning_module import LanguageModel

log = logging.getLogger(__name__)

SENT_AS = FORMATS["fp8"]
"""Formats in which a token would travel to its experts and back: the report's, whatever this run computes in."""


class Monitor(lightning.Callback):
    """Observes the routing of every MoE layer, MTP's included.

    every_tokens: length of an interval. long_tokens: length of the stretches over which co-activation is added up,
    and after which the routing of one fixed micro-batch (the first that was trained on) is compared with before.
    n_groups: nodes that the experts stand on.
    """

    phase: Phase = "observe"

    def __init__(self, *, every_tokens: PositiveInt, long_tokens: PositiveInt, n_groups: PositiveInt) -> None:
        self.every_tokens = every_tokens
        self.long_tokens = long_tokens
        self.n_groups = n_groups
        self.seconds = 0.0
        self.statistics: dict[str, RoutingStatistics] = {}
        self.pairs: dict[str, Tensor] = {}
        self.wrong: dict[str, list[tuple[str, int]]] = {}
        self.ended = 0  # tokens at the end of the last interval
        self.probe: MicroBatch | None = None
        self.chosen: dict[str, Tensor] = {}  # what the probe's tokens chose last time, by layer
        self.sampling = True  # whether this step's expert outputs are measured
        self.norms: dict[str, tuple[Tensor, Tensor]] = {}
        self.restored: dict[str, Any] = {}

    @contextmanager
    def _timed(self) -> Iterator[None]:
        started = time.perf_counter()
        yield
        self.seconds += time.perf_counter() - started

    def setup(self, trainer: Any, pl_module: LanguageModel, stage: str) -> None:
        table = pl_module.folder.table
        self.routing, self.coactivation = table("metrics/routing"), table("metrics/coactivation")
        self.stability, self.alerts = table("metrics/stability"), table("metrics/alerts")
        self.timing = table("timing/monitor")

    def on_train_start(self, trainer: Any, pl_module: LanguageModel) -> None:
        self.dispatch_bytes = pl_module.width * (
            SENT_AS.dispatch + SENT_AS.combine
        )  # of a token, for each node that it reaches
        self.moes, self.mesh, self.module = dict(pl_module.model.moe_layers()), pl_module.mesh, pl_module
        self.is_first = self.mesh is None or self.mesh.data_rank == 0  # of the ranks with these layers
        self.domains = list(trainer.datamodule.domains)
        for layer, moe in self.moes.items():
            statistics = RoutingStatistics(
                n_experts=moe.balancing.bias.numel(),
                top_k=moe.router.top_k,
                n_groups=self.n_groups,
                n_domains=len(self.domains),
                process_group=self.mesh.data.get_group() if self.mesh is not None else None,
            )
            if layer in self.restored and self.is_first:  # sums over all ranks
                statistics.load_state_dict(self.restored[layer])  # where the checkpoint's tensors are: the CPU
            self.statistics[layer] = statistics.to(pl_module.device)
            self._measure_outputs(layer, moe.experts)
        pl_module.observers.append(self)

    def _measure_outputs(self, layer: str, experts: Any) -> None:
        """Keep sums of output norms by expert."""

        def note(module: nn.Module, arguments: Any, y_MD: Tensor) -> None:
            if self.sampling and module.training:
                _, rows_E, gates_M = arguments
                with self._timed():
                    norms_E, numbers_E = output_norms(rows_E, gates_M, y_MD.detach())
                    own = self._among_all(layer, norms_E), self._among_all(layer, numbers_E)
                    before = self.norms.get(layer)
                    self.norms[layer] = own if before is None else (before[0] + own[0], before[1] + own[1])

        experts.register_forward_hook(note)

    def _among_all(self, layer: str, values_E: Tensor) -> Tensor:
        """Values of the experts that this rank holds, in their places among all of the layer; 0 for the others."""
        all_E = values_E.new_zeros(self.moes[layer].balancing.bias.numel())
        first = len(values_E) * (self.mesh.expert_rank if self.mesh is not None else 0)
        all_E[first : first + len(values_E)] = values_E
        return all_E

    def observe(self, micro: MicroBatch, routings: dict[str, Routing]) -> None:
        with self._timed():
            if self.probe is None:
                self.probe = micro._replace(extra={}, replay={}).map(torch.clone)
            for layer, routing in routings.items():
                real_BS = real_tokens(micro, routing)
                domains_BS = micro.domains_BT[:, -real_BS.shape[1] :]
                bias_E = self.moes[layer].balancing.bias
                self.statistics[layer].update(routing, bias_E, domains_BS.flatten(), real_BS.flatten())
            self._take_norms()

    def _take_norms(self) -> None:
        for layer in list(self.norms):
            self.statistics[layer].add_norms(*self.norms.pop(layer))

    def on_train_batch_end(
        self, trainer: Any, pl_module: LanguageModel, outputs: Any, batch: Step, batch_idx: int
    ) -> None:
        before, tokens = pl_module.record.tokens_before, pl_module.tokens_seen
        long = pl_module.finished or crossed(self.long_tokens, before, tokens)
        with self._timed():
            self._take_norms()  # of other ranks' tokens, where this one had padding
            for layer, statistics in self.statistics.items():
                if self.is_first:  # what is equal on all ranks counts once in the sums over ranks
                    statistics.add_step(pl_module.record.figures[f"max_violation/{layer}"])
            self.sampling = long or crossed(self.every_tokens, before, tokens)
            if self.sampling:
                self._end_interval(trainer, tokens)
            if long:
                self._end_stretch(tokens)
        if self.sampling:
            self.timing.append({"tokens": tokens, "seconds": self.seconds})
            self.seconds = 0.0

    def _end_interval(self, trainer: Any, tokens: int) -> None:
        rows, alerts = [], []
        for layer, statistics in self.statistics.items():
            with statistics.sync_context():
                pairs_EE, figures = statistics.pairs_EE.cpu(), statistics.compute()  # which ends the context
            bias_E = self.moes[layer].balancing.bias
            row = {"tokens": tokens, "layer": layer} | figures | {"bias": bias_E.tolist(), "domains": self.domains}
            row["dispatch_bytes"] = figures["nodes"] * self.dispatch_bytes
            rows.append(row)
            if tokens - self.ended >= self.every_tokens / 2:  # else cut short: too few tokens to judge experts by
                alerts += [alert._asdict() for alert in self._alerts_of(tokens, layer, figures)]
            self.pairs[layer] = self.pairs.get(layer, 0) + pairs_EE
            statistics.reset()
        self.ended = tokens
        scalars: dict[str, float] = {"tokens": tokens}
        for row in self._add(self.routing, rows):
            scalars |= {f"{row['layer']}/{name}": value for name, value in row.items() if isinstance(value, float)}
        for alert in self._add(self.alerts, alerts):
            log.warning("after %s tokens: %s", f"{tokens:,}", alert["text"])
        for logger in trainer.loggers:
            logger.log_metrics(scalars)

    def _add(self, table: Table, rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
        """Add the rows of all layers to a table, in the order of layers, and return them. All ranks call this together,
        each with the rows of its own layers."""
        every = [row for of_rank in gathered(rows if self.is_first else []) for row in of_rank]
        every.sort(key=lambda row: list(self.module.losses.n_experts).index(row["layer"]))
        for row in every:
            table.append(row)
        return every

    def _alerts_of(self, tokens: int, layer: str, figures: dict[str, Any]) -> list[Alert]:
        now = condition(figures, top_k=self.moes[layer].router.top_k)
        before = set(self.wrong.get(layer, []))
        self.wrong[layer] = sorted(now)
        return list(changes(tokens, layer, len(figures["load"]), before, now))

    def _end_stretch(self, tokens: int) -> None:
        rows = [
            {"tokens": tokens, "layer": layer, "pairs": pairs.flatten().tolist()} for layer, pairs in self.pairs.items()
        ]
        self._add(self.coactivation, rows)
        self.pairs = {}
        probe = of_rank_zero(self.probe)  # every rank has its own first micro-batch, or none
        if probe is not None:
            self._compare_routing(tokens, probe)

    @torch.no_grad()
    def _compare_routing(self, tokens: int, probe: MicroBatch) -> None:
        """The share of the probe's choices of experts that are the same as after the last stretch."""
        rows, device = [], self.module.model.device
        with self.module.evaluating():
            _, routings = self.module.forward(probe.map(lambda tensor: tensor.to(device)), with_mtp=True)
        for layer, routing in routings.items():
            now_NK = routing.experts_NK.to("cpu", torch.int16)
            if layer in self.chosen:
                same = (now_NK.unsqueeze(2) == self.chosen[layer].unsqueeze(1)).any(2).float().mean().item()
                rows.append({"tokens": tokens, "layer": layer, "unchanged_fraction": same})
            self.chosen[layer] = now_NK
        self._add(self.stability, rows)

    def state_dict(self) -> dict[str, Any]:
        states = {} if self.statistics else self.restored  # before training begins
        for layer, statistics in self.statistics.items():
            with statistics.sync_context():
                states[layer] = {name: tensor.clone() for name, tensor in statistics.state_dict().items()}
        return {
            "statistics": states,
            "pairs": self.pairs,
            "wrong": self.wrong,
            "ended": self.ended,
            "probe": list(self.probe[:-1]) if self.probe else [],
            "chosen": self.chosen,
            "sampling": self.sampling,
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.restored = state_dict["statistics"]
        self.pairs = state_dict["pairs"]
        self.wrong = {layer: [tuple(item) for item in items] for layer, items in state_dict["wrong"].items()}
        self.ended = state_dict.get("ended", 0)  # checkpoints of before have none
        self.probe = MicroBatch(*state_dict["probe"]) if state_dict["probe"] else None
        self.chosen = state_dict["chosen"]
        self.sampling = state_dict["sampling"]


def output_norms(rows_E: Tensor, gates_M: Tensor, y_MD: Tensor) -> tuple[Tensor, Tensor]:
    """Sums over the tokens of each expert of its output's L2 norm, the gate divided out, and their numbers, both [E].

    `y_MD` are outputs times gates, sorted by expert, rows_E of each; rows of gate 0 only fill a GEMM up.
    """
    rows_E = rows_E.to(y_MD.device)
    expert_M = torch.arange(len(rows_E), device=y_MD.device).repeat_interleave(rows_E, output_size=len(y_MD))
    real_M = gates_M > 0
    norms_M = torch.linalg.vector_norm(y_MD, dim=1, dtype=torch.float32) / gates_M.detach().where(real_M, 1.0)
    sums_E = torch.zeros(len(rows_E), dtype=torch.float64, device=y_MD.device)
    sums_E.index_add_(0, expert_M, norms_M.double() * real_M)
    return sums_E, count_experts(expert_M.unsqueeze(1), real_M, len(rows_E))
