"""Run summary: builds and prints `summary.json`."""

import platform
import sys
from collections.abc import Mapping
from importlib.metadata import version
from typing import Any

import pandas as pd
from rich.console import Console
from rich.table import Table
from rich.text import Text

from dsv3.checkpoint.run_folder import RunFolder
from dsv3.contracts import Sample, Tokenizer
from dsv3.distributed.agree import wait_for_all
from dsv3.distributed.rank_bytes import text_of_bytes
from dsv3.evaluation.benchmarks.statistics import share_text, uncertainty
from dsv3.evaluation.held_out import answer_questions
from dsv3.inference.engines import source_of
from dsv3.inference.generation import generate
from dsv3.inference.sampling import Settings
from dsv3.model.decoder import Decoder
from dsv3.model.parameters import count_parameters
from dsv3.prompts.chat import prompt_ids
from dsv3.prompts.infilling import infilling_prompt
from dsv3.reporting.amounts import text_of_seconds
from dsv3.reporting.page import write_run_report
from dsv3.runtime import OUT_OF_TIME
from dsv3.strict_json import finite
from dsv3.training.provenance import git_commit
from dsv3.training.run import Run
from dsv3.training.whole_model import whole_model

SAMPLE_TOKENS = 48
PACKAGES = ("torch", "lightning", "transformers", "tokenizers", "datasets", "grain")


def conclude(run: Run) -> None:
    """Summary and report of a run that is finished, or only the report of one that was interrupted, which is said.

    Of several ranks the first does it, and the others wait.
    """
    model = whole_model(run.module) if not run.exit_status else None
    if run.folder.writes:
        if model is not None:
            run.folder.write_summary(summarise(run, model.eval()))
        write_run_report(run.folder.path)
        if run.exit_status:
            newest = run.folder.newest_valid_checkpoint()
            what = "Out of time" if run.exit_status == OUT_OF_TIME else "Interrupted"
            print(f"{what}. Rerun the same command to resume from {newest}", file=sys.stderr)
    wait_for_all()


def summarise(run: Run, model: Decoder) -> dict[str, Any]:
    """Score the finished run, whose weights `model` has, and describe it. JSON-serialisable."""
    tokenizer = run.data.tokenizer
    train, timing = run.folder.read("metrics/train"), run.folder.read("timing/train")
    if train.empty:
        raise ValueError(
            f"{run.folder.path}: no training step was taken; see the limits under trainer (limit_train_batches, ...)"
        )
    scores = run.folder.read("metrics/validation")
    questions = answer_questions(model, run.data.questions(), tokenizer)
    return {
        "run": str(run.folder.path),
        "seed": run.config.seed,
        "tokens": run.module.tokens_seen,
        "steps": len(train),
        "tokens_per_second": round(tokens_per_second(train["tokens"], timing["seconds"]), 1),
        "seconds": round(float(timing["seconds"].sum()), 1),
        "peak_memory_bytes": peak_memory(timing),
        "parameters": count_parameters(model)._asdict(),
        "validation": {
            "before": by_domain(scores[(scores.tokens == 0) & (scores.weights == "live")]),
            "after": by_domain(scores[(scores.tokens == run.module.tokens_seen) & (scores.weights == "live")]),
            "ema": by_domain(scores[scores.weights == "ema"]),
        },
        "max_violation": last_tenth(train, "max_violation/"),
        "mtp_accuracy": last_tenth(train, "mtp"),
        "questions": {
            family: score._asdict() | {"z_score": round(score.z_score, 2)} for family, score in questions.items()
        },
        "benchmarks": benchmark_scores(run.folder),
        "samples": [completed(run, model, tokenizer, sample) for sample in run.data.samples()],
        "git_commit": git_commit(),
        "versions": {name: version(name) for name in PACKAGES} | {"python": platform.python_version()},
    }


def tokens_per_second(tokens: pd.Series, seconds: pd.Series) -> float:
    """Of all steps in the tables but the first, which also warms up; a branch's tables begin at its checkpoint."""
    if len(tokens) == 1:
        return float(tokens.iloc[0] / seconds.iloc[0])
    return float((tokens.iloc[-1] - tokens.iloc[0]) / seconds.iloc[1:].sum())


def by_domain(scores: Any) -> dict[str, dict[str, float]]:
    return {row.domain: {"loss": row.loss, "bpb": row.bpb} for row in scores.itertuples()}


def benchmark_scores(folder: RunFolder) -> list[dict[str, Any]]:
    """Every metric of every benchmark at the end of the run, and what it was before the first step."""
    table = folder.read("metrics/benchmarks")
    if table.empty:
        return []
    keys = ["task", "metric"]
    last = table[table.tokens == table.tokens.max()].set_index(keys)
    first = table[table.tokens == 0].set_index(keys)
    rows = []
    for (task, metric), after in last.iterrows():
        before = first.loc[(task, metric)] if (task, metric) in first.index else None
        rows.append(
            {
                "task": task,
                "metric": metric,
                "n": int(after.n),
                "shots": float(after.shots),
                "before": None if before is None else finite(float(before.value)),
                "before_stderr": None if before is None else finite(float(before.stderr)),
                "after": finite(float(after.value)),
                "after_stderr": finite(float(after.stderr)),
            }
        )
    return rows


def last_tenth(train: Any, prefix: str) -> dict[str, float]:
    """Means over the steps of the last 10% of the tokens, by column."""
    late = train[train["tokens"] > 0.9 * train["tokens"].iloc[-1]]
    columns = [c for c in train.columns if c.startswith(prefix) and not c.endswith(("_loss", "_weight"))]
    return {column.removeprefix("max_violation/"): float(late[column].mean()) for column in columns}


def completed(run: Run, model: Decoder, tokenizer: Tokenizer, sample: Sample) -> dict[str, str]:
    """Greedy text after the sample's prefix, or for the gap before its suffix."""
    if sample.suffix is not None:
        prompt = infilling_prompt(tokenizer, sample.prefix, sample.suffix, run.config.data.fim.order)
    else:
        prompt = prompt_ids(tokenizer, sample.prefix, chat=sample.chat)
    source = source_of(model, run.config, run.config.engine)
    ids = generate(source, prompt, Settings(max_tokens=SAMPLE_TOKENS, eos=(tokenizer.eos,)))
    return {**sample._asdict(), "suffix": sample.suffix or "", "generated": tokenizer.decode(list(ids))}


def peak_memory(timing: pd.DataFrame) -> dict[str, int]:
    """Bytes by kind of memory; nothing of runs of older versions, which did not measure it."""
    peaks = [column for column in timing.columns if column.startswith("peak_")]
    return {column.removeprefix("peak_").removesuffix("_bytes"): int(timing[column].max()) for column in peaks}


def balance_text(max_violation: Mapping[str, float | None]) -> str:
    """Of the layers with experts; a layer that no token came to, as where nothing was learnt, has no violation."""
    known = [value for value in max_violation.values() if value is not None]
    if not known:
        return "no tokens came to the experts" if max_violation else "no experts"
    return f"MaxVio, mean over the last 10% of tokens: {sum(known) / len(known):.2f} (worst layer {max(known):.2f})"


def accuracy_text(accuracy: Mapping[str, float | None]) -> str:
    """Of the MTP modules; one that no token came to, as where nothing was learnt, has none."""
    return ", ".join(f"{name} {value:.3f}" for name, value in accuracy.items() if value is not None) or "none"


def show(folder: RunFolder) -> None:
    """Print `summary.json` for a person, and write the report where an interruption came before it."""
    summary = folder.summary()
    assert summary is not None
    if not (folder.path / "report.html").exists():
        write_run_report(folder.path)
    console = Console(highlight=False)
    console.print(validation_table(summary))
    if summary["questions"]:
        console.print(questions_table(summary))
    if summary["benchmarks"]:
        console.print(benchmarks_table(summary))
    counts = summary["parameters"]
    lines = {
        "model": f"{counts['total']:,} parameters, {counts['active']:,} active per token, {counts['mtp']:,} in MTP",
        "training": f"{summary['tokens']:,} tokens in {summary['steps']:,} steps, "
        f"{summary['tokens_per_second']:,.0f} tokens/s{used(summary)}",
        "load balance": balance_text(summary["max_violation"]),
        "MTP": accuracy_text(summary["mtp_accuracy"]),
        "run folder": summary["run"],
    }
    for name, text in lines.items():
        console.print(f"[bold]{name:<14}[/bold] {text}", soft_wrap=True)
    for sample in summary["samples"]:
        console.rule(f"{sample['name']} (generated text in green)", align="left")
        console.print(Text.assemble(sample["prefix"], (sample["generated"], "bold green"), sample["suffix"]))


def used(summary: dict[str, Any]) -> str:
    """Time of all steps and peak memory; older summaries have neither."""
    seconds, peaks = summary.get("seconds"), summary.get("peak_memory_bytes", {})
    time = "" if seconds is None else f", {text_of_seconds(seconds)}"
    return time + "".join(f", peak memory {text_of_bytes(count)} ({kind})" for kind, count in peaks.items())


def validation_table(summary: dict[str, Any]) -> Table:
    table = Table(title="Held-out text, bits per byte", title_justify="left")
    for column in ("domain", "before", "after", "after, EMA"):
        table.add_column(column, justify="left" if column == "domain" else "right")
    scores = summary["validation"]
    for domain in scores["after"]:
        row = (scores[when].get(domain, {}).get("bpb") for when in ("before", "after", "ema"))
        table.add_row(domain, *("" if value is None else f"{value:.3f}" for value in row))
    return table


def questions_table(summary: dict[str, Any]) -> Table:
    table = Table(title="Held-out questions, exact match [95% interval]", title_justify="left")
    for column in ("family", "questions", "accuracy", "majority baseline", "z-score"):
        table.add_column(column, justify="left" if column == "family" else "right")
    for family, score in summary["questions"].items():
        n = score["questions"]
        baseline = f"{score['majority_correct'] / n:.0%}"
        table.add_row(family, str(n), share_text(score["correct"], n), baseline, f"{score['z_score']:+.1f}")
    return table


def benchmarks_table(summary: dict[str, Any]) -> Table:
    table = Table(title="Benchmarks, with 95% intervals or standard errors", title_justify="left")
    for column in ("task", "n", "metric", "before", "after"):
        table.add_column(column, justify="left" if column in ("task", "metric") else "right")
    last = None
    for row in summary["benchmarks"]:
        head = (row["task"], str(row["n"])) if row["task"] != last else ("", "")
        figures = (with_error(row[when], row[f"{when}_stderr"], row["n"]) for when in ("before", "after"))
        table.add_row(*head, row["metric"], *figures)
        last = row["task"]
    return table


def with_error(value: float | None, stderr: float | None, n: int) -> str:
    return "" if value is None else f"{value:.3f} {uncertainty(value, stderr, n)}".rstrip()
