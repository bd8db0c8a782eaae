"""A prepared corpus from a composed configuration, and its figures."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from omegaconf import OmegaConf
from rich.console import Console
from rich.table import Table

from data.preparation import Prepared, Settings, prepare, settings, size
from dsv3.config.compose import hydra_flags, opened
from dsv3.config.part import part
from dsv3.runtime import quieten_libraries

if TYPE_CHECKING:
    from data.examples import ExampleModule

DATAMODULE = "data.datamodule.DataModule"
NAMED = 20
"""Files left out that are named in the table."""


def prepared(overrides: Sequence[str]) -> Prepared:
    """The corpus of a training configuration, prepared.

    Raises:
        ValueError: the configuration has a datamodule of another kind, or a source or a setting is at fault.
    """
    quieten_libraries()
    flags = hydra_flags(overrides)
    with opened("train", flags) as composer:
        config = composer.compose(flags.overrides)
        if config.data._target_ != DATAMODULE:
            raise ValueError(f"data._target_={config.data._target_}: these tools prepare the texts of {DATAMODULE}")
        plain = OmegaConf.to_container(config.data, resolve=True)
        assert isinstance(plain, dict)
        keys = {name: plain[name] for name in Settings._fields if name != "sources"}
        sources = {name: node and part(node) for name, node in config.data.sources.items()}
        return prepare(settings(sources=sources, **keys), part(config.tokenizer))


def examples(overrides: Sequence[str]) -> "ExampleModule | None":
    """The conversations, preferences or prompts of a training configuration, prepared; None where its data are texts.

    Raises:
        ValueError: a source or a setting is at fault.
    """
    quieten_libraries()
    flags = hydra_flags(overrides)
    with opened("train", flags) as composer:
        config = composer.compose(flags.overrides)
        if config.data._target_ == DATAMODULE:
            return None
        from data.examples import ExampleModule  # imports torch

        data = part(config.data)(tokenizer=part(config.tokenizer))
        if not isinstance(data, ExampleModule):
            return None
        data.setup()
        return data


def statistics(corpus: Prepared) -> dict[str, Any]:
    """Figures by domain; JSON-serialisable."""
    needed = corpus.rows().given(corpus.rows_needed())
    domains = {}
    for name, rows in zip(corpus.settings.sources, needed):
        found, kept = corpus.survey.domains[name], corpus.store.domains[name]
        of_training = found.bytes - found.held_out_bytes
        domains[name] = {
            "documents": found.documents,
            "bytes": found.bytes,
            "training_documents": kept.documents,
            "tokens": kept.tokens,
            "bytes_per_token": of_training / max(1, sum(len(s) for s in corpus.store.tokens(name).shards)),
            "held_out_documents": len(corpus.survey.held_out(name)),
            "held_out_share": found.held_out_bytes / found.bytes,
            "near_duplicates_dropped": kept.near_duplicates,
            "copies_of_held_out_dropped": kept.copies,
            "empty": found.empty,
            "left_out": found.left_out,
            "left_out_names": found.left_out_names,
            "epochs_of_the_run": rows * corpus.settings.sequence_length / kept.tokens,
        }
    return {"folder": str(corpus.store.folder), "domains": domains}


def show(found: dict[str, Any]) -> None:
    """Print the figures as a table, and what was left out."""
    console = Console(highlight=False)
    table = Table(box=None, header_style="bold")  # frames would cut numbers at 80 columns
    columns = ("domain", "documents", "text", "tokens", "B/token", "held out", "dropped", "epochs")
    for column in columns:
        table.add_column(column, justify="left" if column == "domain" else "right")
    for name, domain in found["domains"].items():
        table.add_row(
            name,
            f"{domain['documents']:,}",
            size(domain["bytes"]),
            f"{domain['tokens']:,}",
            f"{domain['bytes_per_token']:.2f}",
            f"{domain['held_out_share']:.2%}",
            f"{domain['near_duplicates_dropped'] + domain['copies_of_held_out_dropped']:,}",
            f"{domain['epochs_of_the_run']:.2f}",
        )
    console.print(table)
    console.print("dropped: training documents that repeat held-out ones; epochs: what the run's tokens come to")
    for name, domain in found["domains"].items():
        if domain["left_out"] or domain["empty"]:
            counts = [f"{count:,} {reason}" for reason, count in domain["left_out"].items()]
            counts += [f"{domain['empty']:,} empty"] * bool(domain["empty"])
            console.print(f"{name}: left out {', '.join(counts)}", soft_wrap=True)
        for file, reason in domain["left_out_names"][:NAMED]:
            console.print(f"  {file}: {reason}", soft_wrap=True, markup=False)
        if (more := sum(domain["left_out"].values()) - NAMED) > 0:
            console.print(f"  and {more:,} more")
