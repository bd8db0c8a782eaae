"""Lightning's own loggers of CSV files, TensorBoard and MLflow, with tokens as their step."""

from collections.abc import Mapping
from pathlib import Path
from typing import TypeVar

from lightning.pytorch.loggers import CSVLogger, Logger, MLFlowLogger, TensorBoardLogger

L = TypeVar("L", bound=Logger)


def tokens_as_step(logger: type[L]) -> type[L]:
    """A logger's class whose step is `tokens`: the core sends it with every record, and no step."""

    class TokensAsStep(logger):  # type: ignore[valid-type, misc]
        def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
            super().log_metrics(dict(metrics), step=int(metrics["tokens"]) if step is None else step)

    return TokensAsStep


def csv_logger(*, save_dir: Path) -> CSVLogger:
    """Writes csv/version_<n>/metrics.csv, a version for each start of the run: Lightning would write over the last."""
    return tokens_as_step(CSVLogger)(save_dir, name="csv")


def tensorboard_logger(*, save_dir: Path) -> TensorBoardLogger:
    """Writes to tensorboard/; a resumed run adds a file there."""
    return tokens_as_step(TensorBoardLogger)(save_dir, name="tensorboard", version="", default_hp_metric=False)


def mlflow_logger(*, save_dir: Path, experiment: str, name: str, tracking_uri: str | None) -> MLFlowLogger:
    """A run of an MLflow server, whose id is kept in `save_dir`, so that a resumed run stays one run.

    tracking_uri: of the server; None: mlflow.db in the run folder.
    """
    id_file = save_dir / "mlflow_id"
    logger = tokens_as_step(MLFlowLogger)(
        experiment_name=experiment,
        run_name=name,
        tracking_uri=tracking_uri or f"sqlite:///{save_dir.absolute()}/mlflow.db",
        artifact_location=None if tracking_uri else str(save_dir / "mlflow"),
        run_id=id_file.read_text() if id_file.exists() else None,
    )
    id_file.write_text(str(logger.run_id))
    return logger
