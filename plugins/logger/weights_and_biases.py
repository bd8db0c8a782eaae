"""Weights & Biases: online with WANDB_API_KEY, else offline; WANDB_MODE decides where it is set."""

import logging
import os
import socket
from pathlib import Path
from urllib.parse import urlsplit

from lightning.pytorch.loggers import WandbLogger

log = logging.getLogger(__name__)

SECONDS_TO_REACH = 5


def wandb_logger(*, save_dir: Path, project: str, group: str, name: str) -> WandbLogger | list[WandbLogger]:
    """A logger whose run id is kept in `save_dir`, so that a resumed run stays one run; none with WANDB_MODE=disabled.

    Without a network the run is logged offline, where wandb itself would end it after two minutes.
    """
    mode = os.environ.get("WANDB_MODE") or ("online" if os.environ.get("WANDB_API_KEY") else "offline")
    if mode == "disabled":
        return []
    if mode == "online" and not reachable():
        upload = f"wandb sync --id $(cat {save_dir}/wandb_id) {save_dir}/wandb/offline-run-*"
        log.warning("W&B cannot be reached; logging offline. Upload later: %s", upload)
        mode = "offline"
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
        offline=mode != "online",
        settings=wandb.Settings(silent=True, console="off"),
    )


def reachable() -> bool:
    """Whether a connection to the W&B server opens."""
    server = urlsplit(os.environ.get("WANDB_BASE_URL", "https://api.wandb.ai"))
    try:
        address = (server.hostname or "", server.port or (80 if server.scheme == "http" else 443))
        with socket.create_connection(address, timeout=SECONDS_TO_REACH):
            return True
    except OSError:
        return False
