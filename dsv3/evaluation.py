"""Scores of a checkpoint: loss and bits per byte by domain, exact answers; live weights and their average."""

import json
from pathlib import Path
from typing import Any

from omegaconf import DictConfig
from rich.console import Console
from rich.table import Table

from dsv3.build import Loaded, build_data, load_run
from dsv3.callbacks.ema import set_weights
from dsv3.run_folder import write_atomically
from dsv3.validation import answer_questions, domain_scores


def evaluate(config: DictConfig) -> None:
    """Score `config.checkpoint`, print the scores and write them as JSON.

    Raises:
        FileNotFoundError: the checkpoint is not a run's.
    """
    loaded = load_run(config.checkpoint)
    result = score(loaded)
    out = Path(config.out) if config.out else loaded.folder.path / "evaluation.json"
    text = json.dumps(result, indent=2)
    write_atomically(out, lambda path: path.write_text(text + "\n"))
    if config.format == "json":
        print(text)
    else:
        show(result, out)


def score(loaded: Loaded) -> dict[str, Any]:
    """Held-out scores by weights, "live" and "ema". JSON-serialisable."""
    data = build_data(loaded.config, tokenizer=loaded.tokenizer())
    result: dict[str, Any] = {"checkpoint": str(loaded.file), "tokens": loaded.tokens, "weights": {}}
    for weights in ("live", "ema"):
        if weights == "ema":
            set_weights(loaded.model, loaded.ema_weights)
        domains = domain_scores(loaded.model, data.validation_batches(), data.domains, data.validation_bytes())
        questions = answer_questions(loaded.model, data.questions(), data.tokenizer)
        result["weights"][weights] = {
            "domains": {name: value._asdict() for name, value in domains.items()},
            "questions": {family: value._asdict() for family, value in questions.items()},
        }
    return result


def show(result: dict[str, Any], out: Path) -> None:
    live, ema = result["weights"]["live"], result["weights"]["ema"]
    table = Table(title=f"{result['checkpoint']} after {result['tokens']:,} tokens", title_justify="left")
    for column in ("held out", "loss", "loss, EMA", "bits per byte", "bits per byte, EMA"):
        table.add_column(column, justify="left" if column == "held out" else "right")
    for domain, value in live["domains"].items():
        other = ema["domains"][domain]
        table.add_row(domain, *(f"{v:.4f}" for v in (value["loss"], other["loss"], value["bpb"], other["bpb"])))
    answers = Table(title="exact answers", title_justify="left")
    for column in ("family", "questions", "right", "right, EMA", "commonest answer"):
        answers.add_column(column, justify="left" if column == "family" else "right")
    for family, value in live["questions"].items():
        other, n = ema["questions"][family], value["questions"]
        shares = (value["correct"] / n, other["correct"] / n, value["baseline"] / n)
        answers.add_row(family, str(n), *(f"{share:.1%}" for share in shares))
    console = Console(highlight=False)
    console.print(table, answers, f"written to {out}", sep="\n", soft_wrap=True)
