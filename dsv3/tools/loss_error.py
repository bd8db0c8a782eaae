"""Compare the training losses of runs in pairs, such as FP8 and BF16: relative error on smoothed curves.

Both losses are smoothed, s_t = 0.9 s_(t-1) + 0.1 loss_t from s_1 = loss_1; the error at t is s_t / s_t(baseline) - 1.
A run and its baseline have the same seed, and differ in nothing that is computed but the precision.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dsv3.cli import REQUIRED, option

SMOOTHING = 0.9
LAST = 0.1  # of the steps, over which means are taken
PUBLISHED = 0.0025  # the report stays below it (appendix B.1)
MAY_DIFFER = ("precision", "callbacks.quantisation")  # beside what has no say in what is computed


@dataclass
class Options:
    runs: list[str] = option(REQUIRED, "run folders, such as [runs/fp8/seed1,runs/fp8/seed2]")
    baselines: list[str] = option(REQUIRED, "a run folder for each of them, in the same order")
    out: str | None = option(None, "a PNG of the errors over tokens to write; null: none")


def run(options: Options) -> dict[str, Any]:
    """Print a row for each pair.

    Raises:
        ValueError: the numbers of folders differ, or a pair differs in more than its precision.
        FileNotFoundError: a folder holds no metrics.
    """
    if len(options.runs) != len(options.baselines) or not options.runs:
        raise ValueError(f"runs and baselines: must be as many, not {len(options.runs)} and {len(options.baselines)}")
    pairs = list(zip(options.runs, options.baselines, strict=True))
    curves = {f"{one} / {other}": relative_error(one, other) for one, other in pairs}
    rows = [{"pair": pair, **describe(curve)} for pair, curve in curves.items()]
    mean = sum(row["mean_absolute"] for row in rows) / len(rows)
    width = max(len(pair) for pair in curves)
    print(f"{'':{width}}  last 10%: mean |error|   mean error   steps")
    for row in rows:
        print(f"{row['pair']:{width}}  {row['mean_absolute']:22.3%}  {row['mean']:+11.3%}  {row['steps']:6,}")
    print(f"mean |error| {mean:.3%}; the report stays below {PUBLISHED:.2%}")
    if options.out:
        draw(curves, Path(options.out))
        print(f"written to {options.out}")
    return {"mean_absolute": mean, "pairs": rows, "out": options.out}


def relative_error(one: str, other: str) -> Any:
    """The error of `one` against `other` as a pandas Series over tokens."""
    differ = [f"{key}: {values[0]} and {values[1]}" for key, values in config_differences(one, other).items()]
    if differ:
        raise ValueError(f"{one} and {other} differ in {'; '.join(differ)}")
    if None not in (streams := [stream(folder) for folder in (one, other)]) and streams[0] != streams[1]:
        raise ValueError(f"{one} and {other} read other texts, or in another order: their differences are not paired")
    smooth = [losses(folder).ewm(alpha=1 - SMOOTHING, adjust=False).mean() for folder in (one, other)]
    if not smooth[0].index.equals(smooth[1].index):
        raise ValueError(
            f"runs={one} has {len(smooth[0])} steps, baselines={other} has {len(smooth[1])}: pairs have as many"
        )
    return smooth[0] / smooth[1] - 1


def stream(folder: str) -> str | None:
    """What identifies the rows that a run was trained on; None where it has no checkpoint to tell."""
    from dsv3.checkpoint.run_folder import RunFolder, load_checkpoint

    file = RunFolder(folder).newest_valid_checkpoint()
    return load_checkpoint(file)["dsv3"]["data_state"].get("stream") if file else None


def losses(folder: str) -> Any:
    from dsv3.checkpoint.run_folder import RunFolder

    train = RunFolder(folder).read("metrics/train")
    if train.empty:
        raise FileNotFoundError(f"{folder}: there are no metrics/train/*.parquet")
    return train.set_index("tokens").loss


def config_differences(one: str, other: str) -> dict[str, tuple[Any, Any]]:
    """Keys of the two configs that should be equal and are not, with both values."""
    from dsv3.checkpoint.run_folder import RunFolder
    from dsv3.training.resume import FREE, differences

    folders = [RunFolder(folder) for folder in (one, other)]
    for folder in folders:
        if not folder.config_path.exists():
            raise FileNotFoundError(f"runs and baselines: {folder.path} is not a run folder, it has no config.yaml")
    return differences(*(folder.config() for folder in folders), free=(*FREE, *MAY_DIFFER))


def describe(curve: Any) -> dict[str, Any]:
    last = curve.iloc[-max(1, round(LAST * len(curve))) :]
    return {"mean_absolute": float(last.abs().mean()), "mean": float(last.mean()), "steps": len(curve)}


def draw(curves: dict[str, Any], out: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    from dsv3.checkpoint.run_folder import write_atomically

    figure, axis = plt.subplots(figsize=(9, 4), layout="constrained")
    axis.axhspan(-100 * PUBLISHED, 100 * PUBLISHED, color="0.9", label=f"±{PUBLISHED:.2%}")
    for pair, curve in curves.items():
        axis.plot(curve.index / 1e6, 100 * curve, linewidth=0.8, label=pair)
    axis.set(title="Training loss against the baseline, smoothed", xlabel="tokens (millions)", ylabel="error, %")
    axis.legend(fontsize="small")
    write_atomically(out, lambda path: figure.savefig(path, format="png", dpi=100))
    plt.close(figure)
