"""The benchmarks of `python evaluate.py`: model, results folder, finished tasks, comparison."""

import hashlib
import re
from collections.abc import Callable, Iterator
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

from omegaconf import DictConfig
from rich.console import Console

from dsv3.checkpoint.loading import Loaded, is_hf_checkpoint, is_url, load_run
from dsv3.checkpoint.onnx.onnx_manifest import is_onnx_export
from dsv3.checkpoint.parts import is_run
from dsv3.config.known_parts import allowed
from dsv3.contracts import Data
from dsv3.evaluation.agents.journal import Journal
from dsv3.evaluation.benchmarks import chance
from dsv3.evaluation.benchmarks.adapter import Adapter
from dsv3.evaluation.benchmarks.compare import comparison, comparison_table
from dsv3.evaluation.benchmarks.models import HFModel, NativeModel, OnnxModel
from dsv3.evaluation.benchmarks.remote import RemoteAdapter
from dsv3.evaluation.benchmarks.results import ResultsFolder, score_table, scores, settings_key
from dsv3.evaluation.benchmarks.suite import Entry, Suite, entries
from dsv3.evaluation.benchmarks.tasks import RunTexts, TaskFinder, UnavailableError
from dsv3.evaluation.held_out import held_out_data
from dsv3.inference.engines import chosen_engine, source_of
from dsv3.inference.scored_model import ScoredModel
from dsv3.runtime import device_named
from dsv3.sandbox import Sandbox


class Session:
    """Runs the benchmarks of one call of evaluate.py. Raises ValueError where there is no task of some name."""

    def __init__(self, config: DictConfig, console: Console) -> None:
        self.config, self.console = config, console
        self.device = device_named(config.device)
        self.sandbox = Sandbox(unsafe=config.confirm_run_unsafe_code)
        chosen = entries(config.benchmarks) | {name: Entry() for name in config.tasks}
        changes = {key: config[key] for key in ("limit", "num_fewshot", "num_samples", "actions", "history", "steps")}
        self.entries = {name: entry.changed(**changes) for name, entry in chosen.items()}
        self.finished: dict[str, list[str]] = {}  # tasks with results, by checkpoint
        self._finder(RunTexts(None)).require(self.entries)

    def run(self, checkpoint: str, loaded: Loaded | None, data: Callable[[], Data] | None) -> dict[str, Any]:
        """Run every task that has no results yet; lm-eval's results of all, without samples.

        `loaded` and `data`: of a run; `data` is called only for a task that is made of the run's texts.
        """
        adapter = self._adapter(checkpoint, loaded)
        if isinstance(adapter, RemoteAdapter):
            identity = adapter.name
        else:
            identity = identity_of(Path(checkpoint) if loaded is None else loaded.file)
        folder = ResultsFolder(self.folder(checkpoint))
        suite = Suite(adapter, self._finder(RunTexts(data)), self.sandbox, seed=self.config.seed)
        about = {"checkpoint": identity, "weights": self.config.weights, "seed": self.config.seed}
        about |= {"chat": True} if self.config.chat else {}
        done, failures = [], {}
        for name, entry in self.entries.items():
            key = settings_key(about, asdict(entry), self.config.benchmarks.batch_size, self.sandbox.jailed)
            try:
                if not folder.finished(name, key):
                    adapter.journal = Journal(folder.journal_path(name, key))
                    folder.write(name, key, suite.run(name, entry))
                done.append(name)
            except UnavailableError as error:
                failures[name] = str(error)
        self.finished[checkpoint] = done
        combined = folder.combine(done, about=about, failures=failures)
        self.show(adapter.model, folder, combined, failures)
        return combined

    def _adapter(self, checkpoint: str, loaded: Loaded | None) -> Adapter | RemoteAdapter:
        at_once, seed, chat = self.config.benchmarks.batch_size, self.config.seed, self.config.chat
        if is_url(checkpoint):
            served = self.config.served_model
            return RemoteAdapter(checkpoint, served_model=served, at_once=at_once, seed=seed, chat=chat)
        if loaded is not None:
            model: ScoredModel = native_model(loaded, self.config.weights, engine=self.config.engine, chat=chat)
        elif is_onnx_export(checkpoint):
            model = OnnxModel(checkpoint, chat=chat)
        else:
            model = HFModel(checkpoint, device=self.device, chat=chat)
        return Adapter(model, batch_size=at_once, seed=seed)

    def _finder(self, texts: RunTexts) -> TaskFinder:
        return TaskFinder(self.config.benchmarks.folders, run=texts, datasets_folder=self.config.datasets_folder)

    def show(
        self,
        model: ScoredModel | RemoteAdapter,
        folder: ResultsFolder,
        combined: dict[str, Any],
        failures: dict[str, str],
    ) -> None:
        rows = list(scores(combined, combined["dsv3"]["shots_used"]))
        self.console.print(score_table(rows, f"Benchmarks of {model.name}"))
        for task in combined["dsv3"]["shots_used"]:
            if said := chance.line(task, folder.samples(task)):
                self.console.print(said, soft_wrap=True)
        for name, reason in failures.items():
            self.console.print(f"skipped {name}: {reason}", soft_wrap=True)
        if not self.sandbox.jailed and self.sandbox.unsafe:
            self.console.print(f"programs ran without a sandbox: {self.sandbox.refusal}", soft_wrap=True)
        self.console.print(f"results and generations in {folder.path}", soft_wrap=True)

    def compare(self, checkpoint: str, other: str) -> list[dict[str, Any]]:
        """Run the same tasks on the other checkpoint; every metric's paired difference, other minus this one."""
        if has_no_run(other):
            self.run(other, None, None)
        else:
            loaded = load_run(other, device=self.device, allow=allowed(self.config))
            self.run(other, loaded, partial(held_out_data, loaded))
        both = [name for name in self.finished[checkpoint] if name in self.finished[other]]
        first, second = (ResultsFolder(self.folder(name)) for name in (checkpoint, other))
        rows = list(comparison(first, second, both))
        self.console.print(comparison_table(rows, checkpoint, other))
        return [row._asdict() for row in rows]

    def folder(self, checkpoint: str) -> Path:
        """The results folder of a checkpoint."""
        name = Path(checkpoint).absolute()
        if self.config.output_path:
            return Path(self.config.output_path) / "-".join(name.parts[-2:])
        if is_url(checkpoint):
            return Path("runs", "benchmarks", re.sub(r"\W+", "-", checkpoint.partition("://")[2]).strip("-")).absolute()
        if has_no_run(checkpoint):
            return Path("runs", "benchmarks", name.name).absolute()
        run = name if is_run(name) else name.parent.parent
        stem = "newest" if is_run(name) else name.stem
        return run / "benchmarks" / f"{stem}-{self.config.weights}"


def native_model(loaded: Loaded, weights: str, *, engine: str, chat: bool = False) -> NativeModel:
    """The run's model with its current or its EMA weights, asked in its chat template or not.

    Raises ValueError as `chosen_engine`.
    """
    loaded.use(weights)
    chosen = chosen_engine(engine, loaded.config, loaded.model.device)
    data = loaded.config.data
    return NativeModel(
        loaded.model,
        loaded.tokenizer(),
        name=str(loaded.file),
        max_length=data.sequence_length,
        fim_order=data.fim.order,
        chat=chat,
        source=lambda: source_of(loaded.model, loaded.config, chosen),
    )


def has_no_run(checkpoint: str) -> bool:
    """Whether this is a model without the data of a run: a Hugging Face checkpoint, ONNX graphs, or one at a URL."""
    return is_url(checkpoint) or is_hf_checkpoint(checkpoint) or is_onnx_export(checkpoint)


def identity_of(checkpoint: Path) -> str:
    """Equal for the same file or folder with the same content, as far as sizes and times of change tell."""
    files = sorted(checkpoint.rglob("*")) if checkpoint.is_dir() else [checkpoint]
    digest = hashlib.sha256("".join(_stamps(files)).encode()).hexdigest()[:16]
    return f"{checkpoint.absolute()} {digest}"


def _stamps(files: list[Path]) -> Iterator[str]:
    for file in files:
        if file.is_file():
            stat = file.stat()
            yield f"{file.name} {stat.st_size} {stat.st_mtime_ns}\n"
