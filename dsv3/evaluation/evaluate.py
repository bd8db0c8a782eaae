"""Evaluation of a checkpoint: held-out text, questions and expert load of a run; benchmarks of any causal model."""

from functools import cache, partial
from pathlib import Path
from typing import Any

from omegaconf import DictConfig
from rich.console import Console
from rich.table import Table

from dsv3.checkpoint.loading import Loaded, is_hf_checkpoint, is_url, load_run, set_weights
from dsv3.checkpoint.onnx.onnx_manifest import is_onnx_export
from dsv3.checkpoint.run_folder import write_text_atomically
from dsv3.config.known_parts import allowed
from dsv3.contracts import Data
from dsv3.evaluation.held_out import answer_questions, domain_scores, held_out_data
from dsv3.monitoring.expert_load import ExpertLoad
from dsv3.runtime import device_named, quieten_libraries
from dsv3.strict_json import text_of


def evaluate(config: DictConfig) -> None:
    """Score `config.checkpoint`, print the scores and write them as JSON.

    Raises:
        FileNotFoundError: the checkpoint is neither a run's nor a Hugging Face folder.
        ValueError: a setting does not fit the checkpoint.
    """
    quieten_libraries()
    wanted = bool(config.benchmarks.tasks or config.tasks)
    console = Console(highlight=False, stderr=config.format == "json")
    result: dict[str, Any] = {}
    session = None
    if wanted:  # first, since it checks the names of tasks
        from dsv3.evaluation.benchmarks.session import Session

        session = Session(config, console)
    if is_url(config.checkpoint) or is_hf_checkpoint(config.checkpoint) or is_onnx_export(config.checkpoint):
        if session is None:
            kind = "a model at a URL" if is_url(config.checkpoint) else "an exported checkpoint"
            raise ValueError(f"{kind} has no held-out set: pass benchmarks=SUITE or tasks=[...]")
        loaded, data, out = None, None, None
    else:
        loaded = load_run(config.checkpoint, device=device_named(config.device), allow=allowed(config))
        data = cache(partial(held_out_data, loaded))
        out = loaded.folder.path / "evaluation.json"
        if config.held_out:
            result = score(loaded, data())
            show(result, console)
    if session is not None:
        result["benchmarks"] = session.run(config.checkpoint, loaded, data)
        if config.compare:
            result["compare"] = session.compare(config.checkpoint, config.compare)
        out = out or session.folder(config.checkpoint) / "evaluation.json"
    assert out is not None
    out = Path(config.out) if config.out else out
    text = text_of(result)
    write_text_atomically(out, text + "\n")
    if config.format == "json":
        print(text)
    console.print(f"written to {out}", soft_wrap=True)


def score(loaded: Loaded, data: Data) -> dict[str, Any]:
    """Held-out scores by weights, "live" and "ema", and the live model's expert load by domain. JSON-serialisable.

    The model is left with its live weights.
    """
    result: dict[str, Any] = {"checkpoint": str(loaded.file), "tokens": loaded.tokens, "weights": {}}
    live = {name: parameter.detach().clone() for name, parameter in loaded.model.named_parameters()}
    for weights, values in (("ema", loaded.ema_weights), ("live", live)):
        if values is None:
            continue
        set_weights(loaded.model, values)
        load = ExpertLoad(data.domains)
        domains = domain_scores(loaded.model, data.validation_batches(), data.domains, data.validation_bytes(), load)
        questions = answer_questions(loaded.model, data.questions(), data.tokenizer)
        result["weights"][weights] = {
            "domains": {name: value._asdict() for name, value in domains.items()},
            "questions": {family: value._asdict() for family, value in questions.items()},
        }
        result["expert_load"] = load.relative()
    return result


def show(result: dict[str, Any], console: Console) -> None:
    live = result["weights"]["live"]
    ema = result["weights"].get("ema", live)  # a run without EMA weights
    table = Table(title=f"{result['checkpoint']} after {result['tokens']:,} tokens", title_justify="left")
    for column in ("domain", "loss", "loss, EMA", "bits per byte", "bits per byte, EMA"):
        table.add_column(column, justify="left" if column == "domain" else "right")
    for domain, value in live["domains"].items():
        other = ema["domains"][domain]
        table.add_row(domain, *(f"{v:.4f}" for v in (value["loss"], other["loss"], value["bpb"], other["bpb"])))
    answers = Table(title="Held-out questions, exact match", title_justify="left")
    for column in ("family", "questions", "accuracy", "accuracy, EMA", "majority baseline"):
        answers.add_column(column, justify="left" if column == "family" else "right")
    for family, value in live["questions"].items():
        other, n = ema["questions"][family], value["questions"]
        shares = (value["correct"] / n, other["correct"] / n, value["majority_correct"] / n)
        answers.add_row(family, str(n), *(f"{share:.1%}" for share in shares))
    tables = (table, *([answers] if live["questions"] else []), specialisation(result["expert_load"]))
    console.print(*tables, sep="\n", soft_wrap=True)


def specialisation(load: dict[str, dict[str, list[float]]]) -> Table:
    """Peak relative load of each MoE layer, by domain."""
    domains = list(next(iter(load.values()), {}))
    table = Table(title="Peak relative expert load, by domain", title_justify="left")
    for column in ("layer", *domains):
        table.add_column(column, justify="left" if column == "layer" else "right")
    for layer, of_domains in load.items():
        cells = []
        for loads in of_domains.values():
            peak = max(loads)
            cells.append(f"{peak:.2f} (expert {loads.index(peak)})")
        table.add_row(layer, *cells)
    return table
