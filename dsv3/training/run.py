"""Builds a run from a composed config: data, module, callbacks, Trainer and run folder."""

import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import lightning
import torch
from omegaconf import DictConfig

from dsv3.build import build_data, build_model, token_bytes
from dsv3.checkpoint.loading import fit_of, init_from, load_run
from dsv3.checkpoint.parts import tokens_of
from dsv3.checkpoint.run_folder import RunFolder, load_checkpoint
from dsv3.config.known_parts import allowed
from dsv3.config.micro_batches import Dealt, rows_of_steps
from dsv3.config.part import part
from dsv3.contracts import ChecksPrompts, Data, HasPrompts, KeepsHeldOut, SharesSteps
from dsv3.distributed.agree import first, of_rank_zero, rank
from dsv3.distributed.mesh import Mesh
from dsv3.distributed.pipeline import Pipeline
from dsv3.distributed.rank_bytes import held_by, layout_line
from dsv3.distributed.shard import shard
from dsv3.model.compile import compile_parts
from dsv3.runtime import set_up_process
from dsv3.training.callbacks.ema import EMA
from dsv3.training.callbacks.interruption import Interruption
from dsv3.training.callbacks.phases import ChecksModel, find, in_order
from dsv3.training.callbacks.save import DirectIO
from dsv3.training.callbacks.validate import held_out_prompts, with_quick_validation
from dsv3.training.launch import environment, is_first_of_node, join
from dsv3.training.lightning_module import LanguageModel
from dsv3.training.provenance import write_provenance
from dsv3.training.resume import prepare, refuse_unusable
from dsv3.training.run_info import write_run_info
from dsv3.training.run_models import RunModels
from dsv3.training.settle import settled
from dsv3.training.strategy import Numbering, SeveralRanks
from dsv3.training.trained_parameters import freeze

log = logging.getLogger(__name__)


@dataclass
class Run:
    """All that training needs, ready to fit."""

    config: DictConfig
    folder: RunFolder
    data: Data
    module: LanguageModel
    trainer: lightning.Trainer
    resume_from: Path | None

    @property
    def exit_status(self) -> int:
        """0 unless training was interrupted: 75 where the time is up, else 128 + the signal's number."""
        return self.interruption.exit_status if self.interruption is not None else 0

    @property
    def interruption(self) -> Interruption | None:
        return find(self.trainer, Interruption)


def build_run(config: DictConfig) -> Run:
    """Prepare the run folder (see `dsv3.training.resume`) and assemble data, model, callbacks and Trainer."""
    set_up_process()
    mesh = join(config)
    is_writer = rank() == 0
    folder = RunFolder(config.run.dir, writes=is_writer)
    config = of_rank_zero(settled(config, folder) if is_writer else config)
    problems = part(config.precision).check(torch.device(config.trainer.accelerator))
    if problems:
        raise ValueError("; ".join(problems))
    with torch.device("meta"):  # a part that cannot be built says so before anything is read or written
        shapes_only = build_model(config, init=False)
    callbacks = build_callbacks(config)
    for callback in callbacks:
        if isinstance(callback, ChecksModel):
            callback.check_model(shapes_only)
    checkpoint = of_rank_zero(refuse_unusable(config, folder, shapes_only) if is_writer else None)
    start = load_run(config.run.init_from, allow=allowed(config)) if config.run.init_from else None
    if start:
        fit_of(shapes_only, start, partly=config.run.init_partly)
    freeze(shapes_only, config.run.freeze)
    with first(is_first_of_node()):
        data = build_data(with_quick_validation(config), tokenizer=start.tokenizer() if start else None)
    if mesh is not None:
        share_data(data, mesh, config)
    if checkpoint is not None:
        data.restore(load_checkpoint(checkpoint, mmap=True)["dsv3"]["data_state"])
    objective = part(config.objective)(token_bytes_V=token_bytes(data.tokenizer, config.model.vocab_size))
    if isinstance(objective, ChecksPrompts) and isinstance(data, HasPrompts):
        objective.check_prompts([*data.prompts(), *held_out_prompts(objective, data)])
    resume_from = of_rank_zero(prepare(config, folder) if is_writer else None)
    if resume_from != checkpoint:
        raise ValueError(f"run.dir={folder.path}: another process changed it while this one was starting; start again")
    if is_writer:
        tokens = tokens_of(resume_from) if resume_from else 0
        write_provenance(folder, config, tokens=tokens)
    model = build_model(config)
    if config.compile:
        compile_parts(model)
    if start:
        init_from(model, start)
    freeze(model, config.run.freeze)
    module = LanguageModel(
        model,
        objective=objective,
        models=RunModels(config, model, data.tokenizer, mesh),
        optimizer=part(config.optimizer),
        schedule=part(config.schedule),
        grad_clip=config.grad_clip,
        total_tokens=config.run.tokens,
        max_steps=config.trainer.max_steps,
        recompute=config.recompute,
    )
    module.config, module.folder, module.mesh = config, folder, mesh
    strategy = share_model(module, mesh) if mesh is not None else None
    if mesh is not None and is_writer:
        averaged = any(isinstance(callback, EMA) for callback in callbacks)
        log.info(layout_line(mesh.sizes, held_by(module.model, module.optimizer_factory, averaged=averaged)))
    if is_writer:
        data.tokenizer.save(str(folder.tokenizer_path))
        write_run_info(config, shapes_only, module.losses.statistics, folder)
        if isinstance(data, KeepsHeldOut):
            data.keep_held_out(folder.held_out_path)
    trainer = lightning.Trainer(
        # The module counts steps, skipped updates included; Lightning would not even begin a run that has made them.
        # `max_time` is Interruption's: Lightning's would end a run as if it were finished.
        **part(config.trainer) | {"max_steps": -1, "max_time": None},
        max_epochs=1,
        default_root_dir=folder.path,
        callbacks=callbacks,
        logger=build_loggers(config, folder) if is_writer else False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        limit_val_batches=0,
        plugins=[DirectIO(), *([environment()] if mesh is not None else [])],
        strategy=strategy or "auto",
        use_distributed_sampler=False,
    )
    return Run(config, folder, data, module, trainer, resume_from)


def share_model(module: LanguageModel, mesh: Mesh) -> SeveralRanks:
    """Leave this rank its stage of the model and its parts of the weights there.

    Raises:
        ValueError: the model cannot be divided so.
    """
    strategy = SeveralRanks(mesh, Numbering(module.optimizer_factory(module.model.named_parameters()), module.model))
    if mesh.sizes.stages > 1:
        schedule = part(module.config.parallel).schedule
        module.pipeline = Pipeline(module.model, group=mesh.stages.get_group(), schedule=schedule)
    shard(module.model, mesh, module.stages)
    return strategy


def share_data(data: Data, mesh: Mesh, config: DictConfig) -> None:
    """Give this rank its share of every step, and say where much of it is padding.

    Raises:
        ValueError: the datamodule does not share its steps.
    """
    if not isinstance(data, SharesSteps):
        raise ValueError(
            f"data._target_: {type(data).__name__} gives every rank the same rows; with several, a datamodule needs "
            "`share` (dsv3.contracts.SharesSteps)"
        )
    data.share(mesh.data_rank, mesh.sizes.data)
    rows = rows_of_steps(config.data.get("global_batch_size"))
    dealt = Dealt(rows, mesh.sizes.data, mesh.sizes.stages, config.parallel.get("schedule"))
    if padding := dealt.padding(config.data.get("micro_batch_size")):
        log.warning(padding)


def build_loggers(config: DictConfig, folder: RunFolder) -> list[Any]:
    """Those of `config.logger`, each of which may make several, or none."""
    loggers: list[Any] = []
    for node in config.logger.values():
        made = part(node)(save_dir=folder.path) if node is not None else []
        loggers += made if isinstance(made, list) else [made]
    return [logger for logger in loggers if logger is not False]


def build_callbacks(config: DictConfig) -> list[lightning.Callback]:
    """The callbacks of `config.callbacks`, in the order in which they act.

    Raises:
        ValueError: one of them is no Lightning callback, or declares an unknown phase.
    """
    callbacks = {name: part(node) for name, node in config.callbacks.items() if node is not None}
    for name, callback in callbacks.items():
        if not isinstance(callback, lightning.Callback):
            kind = type(callback).__name__
            raise ValueError(f"callbacks.{name}._target_: must give a lightning.Callback, and gives a {kind}")
    return in_order(callbacks.values())
