"""Plots of the experts for W&B, with each checkpoint: maps of load, tables, and figures of the run's summary."""

from typing import TYPE_CHECKING, Any

import lightning
from lightning.pytorch.loggers import WandbLogger

from dsv3.bounds import PositiveInt
from dsv3.contracts import Step
from dsv3.training.callbacks.intervals import crossed
from dsv3.training.callbacks.phases import Phase
from dsv3.training.lightning_module import LanguageModel

if TYPE_CHECKING:
    from dsv3.reporting.history import History


class Pictures(lightning.Callback):
    """Comes after the checkpoint, which flushes the tables that the plots are drawn from."""

    phase: Phase = "show"

    def __init__(self, *, every_tokens: PositiveInt) -> None:
        self.every_tokens = every_tokens
        self.run: History | None = None  # reads only what is new

    def on_train_batch_end(
        self, trainer: lightning.Trainer, pl_module: LanguageModel, outputs: Any, batch: Step, batch_idx: int
    ) -> None:
        loggers = [logger for logger in trainer.loggers if isinstance(logger, WandbLogger)]
        due = pl_module.finished or crossed(self.every_tokens, pl_module.record.tokens_before, pl_module.tokens_seen)
        if loggers and due:
            from dsv3.reporting.history import History

            self.run = self.run or History(pl_module.folder.path, pl_module.folder.path.name)
            plots, figures = draw(self.run), summary(self.run)
            for logger in loggers:
                logger.experiment.log(plots | {"tokens": pl_module.tokens_seen})
                logger.experiment.summary.update(figures)


def summary(run: "History") -> dict[str, Any]:
    """Figures of a run as it is now, by which a table of runs can be sorted, and a sentence on its experts."""
    from dsv3.reporting.health import verdict
    from dsv3.reporting.overview import overview

    row, counts = overview(run), run.info.get("parameters", {})
    is_well, health = verdict(run)
    figures = {
        "held_out_bpb": row["bpb"],
        "max_vio": row["max_violation"],
        "worst_layer": row["worst_layer"],
        "experts_well": is_well,
        "health": health,
        "parameters": counts.get("total"),
        "active_parameters": counts.get("active"),
    }
    return {f"summary/{name}": value for name, value in figures.items() if value is not None}


def draw(run: "History") -> dict[str, Any]:
    """wandb's media by name; empty where the model has no experts."""
    import wandb

    from dsv3.reporting import experts, health, health_plots

    routing = run.newest("metrics/routing")
    if routing.empty:
        return {}
    worst = health.chosen_layer(run, None)
    figures = {
        "experts/load": experts.load(run),
        "experts/load_over_tokens": health_plots.load_over_tokens(run, worst),
        "experts/specialisation": experts.specialisation(run),
        "experts/output_norm": experts.output_norms(run),
        "experts/stability": experts.stability(run),
    }
    scalars = routing[
        [name for name in routing.columns if routing[name].map(lambda v: not hasattr(v, "__len__")).all()]
    ]
    table = wandb.Table(dataframe=scalars.assign(layer=routing.layer))
    return {name: wandb.Plotly(figure) for name, figure in figures.items()} | {"experts/table": table}
