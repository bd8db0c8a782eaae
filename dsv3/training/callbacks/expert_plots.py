"""Plots of the experts for W&B, with each checkpoint: layer x expert and layer x domain maps, and tables."""

from typing import Any

import lightning
from lightning.pytorch.loggers import WandbLogger

from dsv3.bounds import PositiveInt
from dsv3.checkpoint.run_folder import RunFolder
from dsv3.contracts import Step
from dsv3.training.callbacks.intervals import crossed
from dsv3.training.callbacks.phases import Phase
from dsv3.training.lightning_module import LanguageModel


class Pictures(lightning.Callback):
    """Comes after the checkpoint, which flushes the tables that the plots are drawn from."""

    phase: Phase = "show"

    def __init__(self, *, every_tokens: PositiveInt) -> None:
        self.every_tokens = every_tokens

    def on_train_batch_end(
        self, trainer: lightning.Trainer, pl_module: LanguageModel, outputs: Any, batch: Step, batch_idx: int
    ) -> None:
        loggers = [logger for logger in trainer.loggers if isinstance(logger, WandbLogger)]
        due = pl_module.finished or crossed(self.every_tokens, pl_module.record.tokens_before, pl_module.tokens_seen)
        if loggers and due:
            plots = draw(pl_module.folder)
            for logger in loggers:
                logger.experiment.log(plots | {"tokens": pl_module.tokens_seen})


def draw(folder: RunFolder) -> dict[str, Any]:
    """wandb's media by name; empty where the model has no experts."""
    import wandb

    from dsv3.reporting import experts
    from dsv3.reporting.history import History

    run = History(folder.path, folder.path.name)
    routing = run.newest("metrics/routing")
    if routing.empty:
        return {}
    figures = {
        "experts/load": experts.load(run),
        "experts/specialisation": experts.specialisation(run),
        "experts/output_norm": experts.output_norms(run),
    }
    scalars = routing[
        [name for name in routing.columns if routing[name].map(lambda v: not hasattr(v, "__len__")).all()]
    ]
    table = wandb.Table(dataframe=scalars.assign(layer=routing.layer))
    return {name: wandb.Plotly(figure) for name, figure in figures.items()} | {"experts/table": table}
