"""Monitor runs on a live local page; `dashboard wandb` builds a Weights & Biases workspace instead."""

import logging
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

from dsv3.bounds import Between
from dsv3.cli import option

FIRST = "runs"  # may be given without its name


@dataclass
class Options:
    runs: str = option("runs", "a folder of runs or one run; or `wandb`")
    port: Annotated[int, Between(0, 65535)] = option(8050, "port of the page on loopback (127.0.0.1); 0: any free port")
    project: str = option("dsv3", "wandb only: the project")
    entity: str | None = option(None, "wandb only: user or team; null: the logged-in user")
    out: str | None = option(None, "wandb only: write the workspace as JSON to this file instead of sending it")


def run(options: Options) -> dict[str, Any]:
    """Serve the page until Ctrl-C, or build the workspace.

    Raises:
        FileNotFoundError: there is no such folder.
        ValueError: wandb has no API key and `out` is not given.
    """
    if options.runs == "wandb":
        from dsv3.reporting.workspace import build_workspace

        return build_workspace(project=options.project, entity=options.entity, out=options.out)
    from werkzeug.serving import make_server

    from dsv3.reporting.dashboard.application import build_app
    from dsv3.reporting.history import find_runs

    find_runs(Path(options.runs))
    logging.getLogger("werkzeug").setLevel(logging.WARNING)
    app = build_app(Path(options.runs))
    server = make_server("127.0.0.1", options.port, app.server, threaded=True)
    url = f"http://127.0.0.1:{server.server_port}"
    print(f"{options.runs} at {url}   (Ctrl-C to quit)", file=sys.stderr, flush=True)
    server.serve_forever()
    return {"url": url}
