"""Pictures of the experts for wandb, with each checkpoint: layer x expert and layer x domain maps, and tables."""

from typing import Any

import lightning
from lightning.pytorch.loggers import WandbLogger

from dsv3.checkpoint.run_folder import RunFolder
from dsv3.training.callbacks.intervals import crossed


class Pictures(lightning.Callback):
    """Comes after the checkpoint, which flushes the tables that the pictures are drawn from."""

    def __init__(self, *, every_tokens: int, folder: RunFolder) -> None:
        self.every_tokens = every_tokens
        self.folder = folder

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        loggers = [logger for logger in trainer.loggers if isinstance(logger, WandbLogger)]
        due = pl_module.finished or crossed(self.every_tokens, batch.tokens_before, pl_module.tokens_seen)
        if loggers and due:
            pictures = self.draw()
            for logger in loggers:
                logger.experiment.log(pictures | {"tokens": pl_module.tokens_seen})

    def draw(self) -> dict[str, Any]:
        """wandb's media by name; empty where the model has no experts."""
        import wandb

        from dsv3.reporting import experts
        from dsv3.reporting.history import History

        run = History(self.folder.path, self.folder.path.name)
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
