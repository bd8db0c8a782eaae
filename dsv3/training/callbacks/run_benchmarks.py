"""Benchmarks during training: before the first step if requested, at intervals, and after the last step."""

import logging
import time
from pathlib import Path
from typing import Any

import lightning
from lightning.pytorch.loggers import WandbLogger

from dsv3.bounds import PositiveInt
from dsv3.contracts import Step
from dsv3.model.decoder import Decoder
from dsv3.training.callbacks.interruption import interrupted
from dsv3.training.callbacks.intervals import crossed, ends_early
from dsv3.training.callbacks.phases import Phase
from dsv3.training.lightning_module import LanguageModel
from dsv3.training.whole_model import whole_model

log = logging.getLogger(__name__)

SHOWN = 8  # documents of each task in wandb's tables


class Benchmarks(lightning.Callback):
    """Writes `metrics/benchmarks` (tokens, task, metric, value, stderr, n, shots) and `timing/benchmarks` (seconds).

    The live model is evaluated, by the first of several ranks. Nothing that training depends on is touched: load is
    counted in training only, the random number generators are put back, and the data stream is not asked. A task that
    cannot run is named once and left out. Programs run in the sandbox or not at all.
    """

    phase: Phase = "evaluate"

    def __init__(self, *, every_tokens: PositiveInt | None, before: bool) -> None:
        """`every_tokens`: None evaluates after the last step only. `before`: before the first step too."""
        self.every_tokens, self.before = every_tokens, before
        self.run_at: int | None = None  # tokens; so that resuming repeats nothing
        self.failures: dict[str, str] = {}
        self._suite: Any = None

    def setup(self, trainer: Any, pl_module: LanguageModel, stage: str) -> None:
        self.config = pl_module.config
        self.wanted = bool(self.config.benchmarks.tasks)
        if self.wanted and ends_early(self.config):
            self.wanted = False
            steps, every = self.config.trainer.max_steps, self.config.run.checkpoint_every_tokens
            log.info(
                "no benchmarks: trainer.max_steps=%s ends before run.checkpoint_every_tokens=%s", steps, f"{every:,}"
            )
        self.table = pl_module.folder.table("metrics/benchmarks")
        self.timing = pl_module.folder.table("timing/benchmarks")

    def on_train_start(self, trainer: Any, pl_module: LanguageModel) -> None:
        if self.wanted and pl_module.folder.writes:  # a task that there is not stops the run before its first step
            self._suite = self._build(trainer, pl_module.model)
            self._suite.finder.require(self.config.benchmarks.tasks)
        if self.before and pl_module.tokens_seen == 0:
            self.run(trainer, pl_module)

    def on_train_batch_end(
        self, trainer: Any, pl_module: LanguageModel, outputs: Any, batch: Step, batch_idx: int
    ) -> None:
        every = self.every_tokens
        if not pl_module.finished and every and crossed(every, pl_module.record.tokens_before, pl_module.tokens_seen):
            self.run(trainer, pl_module)

    def on_train_end(self, trainer: Any, pl_module: LanguageModel) -> None:
        """After the last step, whose checkpoint is on disk by now; an interrupted run scores nothing."""
        if not interrupted(trainer):
            self.run(trainer, pl_module)

    def state_dict(self) -> dict[str, Any]:
        return {"run_at": self.run_at}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.run_at = state_dict["run_at"]

    def run(self, trainer: Any, pl_module: LanguageModel) -> None:
        if not self.wanted or self.run_at == pl_module.tokens_seen:
            return
        self.run_at = pl_module.tokens_seen
        model = whole_model(pl_module)
        if model is None:  # rank 0 has it
            return
        if model is not pl_module.model:
            self._suite = self._build(trainer, model)
        started = time.perf_counter()
        from dsv3.evaluation.benchmarks.results import scores, write_episodes
        from dsv3.evaluation.benchmarks.suite import entries
        from dsv3.evaluation.benchmarks.tasks import UnavailableError

        suite = self._suite
        tokens = pl_module.tokens_seen
        model.eval()
        for name, entry in entries(self.config.benchmarks).items():
            if name in self.failures:
                continue
            try:
                outcome = suite.run(name, entry)
            except UnavailableError as error:
                self.failures[name] = str(error)
                log.warning("skipping benchmark %s: %s", name, error)
                continue
            write_episodes(pl_module.folder.path, outcome.episodes)
            rows = list(scores(outcome.results, outcome.shots_used))
            for row in rows:
                self.table.append({"tokens": tokens, **row._asdict()})
            self._log(trainer, pl_module.folder.path, tokens, rows, outcome)
        model.train()
        seconds = time.perf_counter() - started
        self.timing.append({"tokens": tokens, "seconds": seconds})
        log.info("benchmarks at %s tokens: %.1f s", f"{tokens:,}", seconds)

    def _build(self, trainer: Any, weights: Decoder) -> Any:
        from dsv3.evaluation.benchmarks.adapter import Adapter
        from dsv3.evaluation.benchmarks.models import NativeModel
        from dsv3.evaluation.benchmarks.suite import Suite
        from dsv3.evaluation.benchmarks.tasks import RunTexts, TaskFinder
        from dsv3.inference.engines import source_of
        from dsv3.sandbox import Sandbox

        settings, data = self.config.benchmarks, trainer.datamodule
        model = NativeModel(
            weights,
            data.tokenizer,
            name=self.config.run.name,
            max_length=self.config.data.sequence_length,
            fim_order=self.config.data.fim.order,
            chat=settings.chat,
            source=lambda: source_of(weights, self.config, self.config.engine),
        )
        adapter = Adapter(model, batch_size=settings.batch_size, seed=self.config.seed)
        finder = TaskFinder(settings.folders, run=RunTexts(lambda: data), datasets_folder=None)
        return Suite(adapter, finder, Sandbox(), seed=self.config.seed)

    def _log(self, trainer: Any, folder: Path, tokens: int, rows: Any, outcome: Any) -> None:
        values: dict[str, Any] = {"tokens": tokens}
        for row in rows:
            values[f"benchmarks/{row.task}/{row.metric}"] = row.value
            values[f"benchmarks/{row.task}/{row.metric}_stderr"] = row.stderr
        for logger in trainer.loggers:
            tables: dict[str, Any] = {}
            if isinstance(logger, WandbLogger):
                import wandb

                from dsv3.reporting.episode_page import write_episode

                for task, of_task in outcome.samples.items():
                    cells = [sample_row(sample) for sample in of_task[:SHOWN]]
                    tables[f"benchmarks/{task}/samples"] = wandb.Table(
                        columns=list(cells[0]), data=[[*c.values()] for c in cells]
                    )
                for task, kept in outcome.episodes.items():
                    for name, result in zip(("best", "worst"), kept):
                        html, gif = write_episode(folder / "episodes", task, result)
                        tables[f"benchmarks/{task}/{name}"] = wandb.Html(html.read_text(), inject=False)
                        tables[f"benchmarks/{task}/{name}_gif"] = wandb.Video(str(gif), format="gif")
            logger.log_metrics(values | tables)


def sample_row(sample: dict[str, Any]) -> dict[str, str]:
    """What a person wants to see of one document: the end of its prompt, the right answer, the model's, the scores."""
    answers = sample["filtered_resps"][0]
    return {
        "prompt": str(sample["arguments"][0][0])[-400:],
        "target": str(sample["target"]),
        "answer": str(answers),
        "scores": ", ".join(f"{name} {sample[name]}" for name in sample["metrics"]),
        "answer bits": f"{sample['answer_bits']:.1f}" if "answer_bits" in sample else "",
    }
