"""Plot a run as one PNG: loss, held-out bits per byte, load balance and the load of every expert, over tokens."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dsv3.cli import REQUIRED, option
from dsv3.reporting.palette import COLOURS

SMOOTHING = 0.95


@dataclass
class Options:
    run: str = option(REQUIRED, "a run folder")
    out: str | None = option(None, "the PNG to write; null: run.png in the run folder")


def run(options: Options) -> dict[str, Any]:
    """Write the plot.

    Raises:
        FileNotFoundError: the folder holds no metrics.
    """
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    from dsv3.checkpoint.run_folder import RunFolder, write_atomically

    folder = RunFolder(options.run)
    train = folder.read("metrics/train")
    if train.empty:
        raise FileNotFoundError(f"run={options.run}: there are no metrics/train/*.parquet")
    experts = folder.read("metrics/experts")
    figure, axes = plt.subplots(2, 2, figsize=(12, 8), layout="constrained")
    draw_loss(axes[0, 0], train)
    draw_validation(axes[0, 1], folder.read("metrics/validation"))
    draw_max_vio(axes[1, 0], train)
    draw_load(axes[1, 1], experts)
    out = Path(options.out) if options.out else folder.path / "run.png"
    write_atomically(out, lambda path: figure.savefig(path, format="png", dpi=100))
    plt.close(figure)
    print(f"written to {out}")
    return {"out": str(out)}


def draw_loss(axis: Any, train: Any) -> None:
    tokens = train.tokens / 1e6
    for colour, column, name in zip(COLOURS, ("loss", "mtp1_loss"), ("next token", "MTP, one further"), strict=False):
        if column in train:
            axis.plot(tokens, train[column], color=colour, alpha=0.2, linewidth=0.6)
            axis.plot(tokens, train[column].ewm(alpha=1 - SMOOTHING).mean(), color=colour, label=name)
    axis.set(title="Training loss", xlabel="tokens (millions)", ylabel="nats per token")
    axis.legend()


def draw_validation(axis: Any, scores: Any) -> None:
    live = scores[scores.weights == "live"]
    for colour, (domain, rows) in zip(COLOURS, live.groupby("domain", sort=False), strict=False):
        axis.plot(rows.tokens / 1e6, rows.bpb, "o-", color=colour, label=domain, markersize=4)
    axis.set(title="Held-out text", xlabel="tokens (millions)", ylabel="bits per byte")
    axis.legend()


def draw_max_vio(axis: Any, train: Any) -> None:
    columns = [c for c in train.columns if c.startswith("max_violation/")]
    for i, column in enumerate(columns):
        smooth = train[column].ewm(alpha=1 - SMOOTHING).mean()
        axis.plot(train.tokens / 1e6, smooth, color=COLOURS[i % len(COLOURS)], label=column.split("/")[1])
    axis.set(title="Load balance: MaxVio of each step", xlabel="tokens (millions)", ylabel="MaxVio")
    axis.set_ylim(bottom=0)
    if columns:
        axis.legend()


def draw_load(axis: Any, experts: Any) -> None:
    """Mean load of each expert of each layer over the last 10% of the tokens, relative to a balanced load."""
    import numpy as np

    axis.set(title="Relative load over the last 10% of tokens", xlabel="expert", ylabel="MoE layer")
    if experts.empty:
        return
    late = experts[experts.tokens > 0.9 * experts.tokens.iloc[-1]]
    rows = {layer: np.stack(group.load.to_list()).sum(0) for layer, group in late.groupby("layer", sort=False)}
    relative = np.stack([load / load.mean() for load in rows.values()])
    image = axis.imshow(relative, aspect="auto", cmap="cividis", vmin=0, vmax=max(2.0, float(relative.max())))
    axis.set_yticks(range(len(rows)), list(rows))
    axis.figure.colorbar(image, ax=axis, label="relative load (1 = balanced)")
