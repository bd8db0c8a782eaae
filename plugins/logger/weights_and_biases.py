"""Weights & Biases, offline unless WANDB_API_KEY is set."""

import os
from pathlib import Path

from lightning.pytorch.loggers import WandbLogger


def wandb_logger(*, save_dir: Path, project: str, group: str, name: str) -> WandbLogger:
    """A logger whose run id is kept in `save_dir`, so that a continued run stays one run."""
    import wandb
    from wandb.sdk.lib.runid import generate_id

    id_file = save_dir / "wandb_id"
    if not id_file.exists():
        id_file.write_text(generate_id())
    return WandbLogger(
        project=project,
        group=group,
        name=name,
        save_dir=save_dir,
        id=id_file.read_text(),
        resume="allow",
        offline="WANDB_API_KEY" not in os.environ,
        settings=wandb.Settings(silent=True, console="off"),
    )
