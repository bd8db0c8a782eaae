"""From a composed config to a run that is ready to fit: data, module, callbacks, Trainer and run folder."""

from dataclasses import dataclass
from pathlib import Path

import lightning
import torch
from omegaconf import DictConfig

from dsv3.build import build_data, build_model, part, token_bytes
from dsv3.checkpoint.loading import begin_with, load_run
from dsv3.checkpoint.run_folder import RunFolder, load_checkpoint
from dsv3.contracts import Data, MeasuresQuantisation
from dsv3.model.compile import compile_parts
from dsv3.model.decoder import Decoder
from dsv3.planning.recipe import FORMATS
from dsv3.process import set_up_process
from dsv3.training.callbacks import (
    EMA,
    Benchmarks,
    Guard,
    Interruption,
    MeasureQuantisation,
    Monitor,
    Pictures,
    Progress,
    Record,
    SaveCheckpoints,
    Validate,
)
from dsv3.training.facts import write_facts
from dsv3.training.lightning_module import LanguageModel
from dsv3.training.resume import prepare

SENT_AS = FORMATS["fp8"]
"""Formats in which a token would travel to its experts and back: the report's, whatever this run computes in."""


@dataclass
class Run:
    """All that training needs, ready to fit."""

    config: DictConfig
    folder: RunFolder
    data: Data
    module: LanguageModel
    trainer: lightning.Trainer
    interruption: Interruption
    resume_from: Path | None


def build_run(config: DictConfig) -> Run:
    """Prepare the run folder (see `dsv3.training.resume`) and assemble data, model, callbacks and Trainer."""
    set_up_process()
    if config.trainer.accelerator == "cuda" and not torch.cuda.is_available():
        raise ValueError("trainer.accelerator=cuda: torch sees no GPU here; trainer.accelerator=cpu trains without one")
    problems = part(config.precision).check(torch.device(config.trainer.accelerator))
    if problems:
        raise ValueError("; ".join(problems))
    with torch.device("meta"):  # a part that cannot be built says so before anything is read or written
        build_model(config, init=False)
    folder = RunFolder(config.run.dir)
    resume_from = prepare(config, folder)
    start = load_run(config.run.weights_from) if config.run.weights_from else None
    data = build_data(config, tokenizer=start.tokenizer() if start else None)
    data.tokenizer.save(str(folder.tokenizer_path))
    model = build_model(config)
    write_facts(config, model, folder)
    if config.compile:
        compile_parts(model)
    if start:
        begin_with(model, start)
    module = LanguageModel(
        model,
        optimizer=part(config.optimizer),
        schedule=part(config.schedule),
        grad_clip=config.grad_clip,
        total_tokens=config.run.tokens,
        token_bytes_V=token_bytes(data.tokenizer, config.model.vocab_size),
        recompute=config.recompute,
    )
    if resume_from is not None:
        data.restore(load_checkpoint(resume_from)["dsv3"]["data_state"])
    interruption = Interruption()
    trainer = lightning.Trainer(
        **part(config.trainer),
        max_epochs=1,
        default_root_dir=folder.path,
        callbacks=build_callbacks(config, model, folder, interruption),
        logger=part(config.logger)(save_dir=folder.path),
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        limit_val_batches=0,
        use_distributed_sampler=False,
    )
    return Run(config, folder, data, module, trainer, interruption, resume_from)


def build_callbacks(
    config: DictConfig, model: Decoder, folder: RunFolder, interruption: Interruption
) -> list[lightning.Callback]:
    """In the order in which they act."""
    ema, record = EMA(decay=config.ema.decay), Record(folder=folder)
    validate = Validate(every_tokens=config.run.validation_tokens, folder=folder, ema=ema)
    monitor = Monitor(
        every_tokens=config.monitor.every_tokens,
        long_tokens=config.run.checkpoint_tokens,
        n_groups=config.model.n_groups,
        dispatch_bytes=config.model.dim * (SENT_AS.dispatch + SENT_AS.combine),
        folder=folder,
    )
    save = SaveCheckpoints(
        every_tokens=config.run.checkpoint_tokens,
        flush_tokens=config.monitor.every_tokens,
        keep=config.run.keep_checkpoints,
        folder=folder,
        interruption=interruption,
    )
    return [
        interruption,
        Guard(**config.guard, folder=folder),
        ema,
        record,
        monitor,
        *quantisation(config, model, folder),
        validate,
        Benchmarks(config=config, folder=folder),
        save,
        Pictures(every_tokens=config.run.checkpoint_tokens, folder=folder),
        Progress(total_tokens=config.run.tokens, record=record, validate=validate),
    ]


def quantisation(config: DictConfig, model: Decoder, folder: RunFolder) -> list[MeasureQuantisation]:
    """The callback that measures what number formats lose, where it is asked for.

    Raises:
        ValueError: the precision has nothing to measure.
    """
    every = config.diagnostics.quantisation_tokens
    if not every:
        return []
    if not isinstance(model.precision, MeasuresQuantisation):
        raise ValueError(
            f"diagnostics.quantisation_tokens={every}: {config.precision._target_} does not measure what it quantises"
        )
    return [MeasureQuantisation(every_tokens=every, folder=folder, precision=model.precision)]
