"""Weights & Biases workspace: the dashboard's panels, for runs that are logged there.

Runs log offline where there is no API key, and `wandb sync <run folder>/wandb/offline-run-*` sends them later. A
workspace is made on the server, so that building one needs a key; `out` writes what would be sent.
"""

import json
import os
from pathlib import Path
from typing import Any

from dsv3.checkpoint.run_folder import write_text_atomically
from dsv3.reporting.experts import PANELS

NAME = "DeepSeek-V3 in miniature: experts, balance, loss, FP8, benchmarks"


def build_workspace(*, project: str, entity: str | None, out: str | None) -> dict[str, Any]:
    """Save the workspace on the server, or write it to `out`.

    Raises:
        ValueError: `out` is not given, and there is no API key, or the server cannot be asked or refuses.
    """
    if out is None and "WANDB_API_KEY" not in os.environ:
        raise ValueError(
            "WANDB_API_KEY is not set: a workspace is made on the server. out=FILE writes it as JSON instead"
        )
    if out is None:
        workspace = saved(project=project, entity=entity)
        print(f"saved at {workspace.url}")
        return {"url": workspace.url}
    content = described(project=project, entity=entity or "")._to_model().model_dump(mode="json", by_alias=True)
    text = json.dumps(content, indent=1) + "\n"
    write_text_atomically(Path(out), text)
    print(f"written to {out}")
    return {"out": out}


def saved(*, project: str, entity: str | None) -> Any:
    """The workspace, on the server."""
    import wandb

    try:
        workspace = described(project=project, entity=entity or wandb.Api().default_entity or "")
        workspace.save()
    except (wandb.Error, OSError) as error:
        raise ValueError(f"W&B: {str(error).rstrip('.')}. out=FILE writes the workspace as JSON instead") from None
    return workspace


def described(*, project: str, entity: str) -> Any:
    """The workspace, not yet saved. Tokens are every x-axis."""
    import wandb_workspaces.reports.v2 as wr
    import wandb_workspaces.workspaces as ws

    def lines(title: str, unit: str, *y: str, pattern: str | None = None) -> Any:
        chosen = {"metric_regex": pattern} if pattern else {"y": list(y)}
        return wr.LinePlot(title=title, x="tokens", title_x="training tokens", title_y=unit, **chosen)

    scalars = [wr.ScalarChart(title=title, metric=wr.SummaryMetric(f"summary/{key}")) for key, title in SUMMARY.items()]
    sections = {
        "Summary": [*scalars, wr.RunComparer(diff_only="split")],
        "Loss": [
            lines("Training loss", "nats per token", "train/loss"),
            lines("All losses", "nats per token", pattern="train/.*loss"),
            lines("Held-out text", "bits per byte", pattern="validation_live/bpb/.*"),
            lines("Learning rate", "per update", "train/lr"),
            lines("Gradient norm before clipping", "L2", "train/grad_norm"),
            lines("Speed", "tokens/s", "train/tokens_per_second"),
        ],
        "Balance": [
            lines("MaxVio of a step", "MaxVio", pattern="max_violation/.*"),
            *(lines(panel.title, panel.unit, pattern=f".*/{name}") for name, panel in PANELS.items()),
        ],
        "Load of the experts": [
            wr.MediaBrowser(title=title, media_keys=[f"experts/{name}"], num_columns=1) for name, title in MAPS.items()
        ],
        "Quantisation error (FP8)": [
            lines(f"Quantisation: {unit}", unit, pattern=f"quantisation/.*{unit}.*") for unit in FP8
        ],
        "Benchmarks": [lines("Benchmarks", "score", pattern="benchmarks/[^/]+/[^.]+$")],
    }
    made = [ws.Section(name=name, panels=panels, is_open=True) for name, panels in sections.items()]
    settings = ws.WorkspaceSettings(x_axis="tokens")
    return ws.Workspace(entity=entity, project=project, name=NAME, sections=made, settings=settings)


SUMMARY = {
    "held_out_bpb": "held-out bits per byte",
    "max_vio": "MaxVio, worst layer",
    "experts_well": "experts are well",
    "active_parameters": "active parameters",
}
MAPS = {
    "load_over_tokens": "Load over tokens, worst layer",
    "load": "Load, layer x expert",
    "specialisation": "By domain",
    "output_norm": "Output norms",
    "stability": "Stability of the routing",
}
"""Media of `dsv3.training.callbacks.expert_plots`."""
FP8 = ("snr_db", "underflow", "saturation", "amax")
"""Figures of `metrics/quantisation`."""
