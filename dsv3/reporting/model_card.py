"""Model card of an exported run: README.md as the Hugging Face Hub reads it.

What the run folder does not hold is left out, or said to be unknown. No path of this machine is written.
"""

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from omegaconf import DictConfig

from dsv3.checkpoint.run_folder import RunFolder
from dsv3.evaluation.benchmarks.statistics import uncertainty

ON_HUB = re.compile(r"[\w-][\w.-]*(/[\w.-]+)?")
"""Names of data sets; what else a source of the Hub may name is a folder."""

PUBLIC = ("name", "config", "revision", "split")
"""Arguments of a source that say which data set of the Hub it reads; others may be paths of one machine."""


def model_card(folder: RunFolder, fields: Mapping[str, Any], *, license: str | None, repository: str | None) -> str:
    """The card's text.

    fields: the exported config.json. license: identifier of the Hub, of the weights. repository: user/name on the Hub.
    """
    config, summary = folder.config(), folder.summary() or {}
    title = repository or config.run.name
    parts = [header(license), f"# {plain(title)}", "\n".join(about(config, fields, summary, license))]
    parts += ["## Training data", *data(config)]
    parts += ["## Scores", *scores(fields, summary)]
    parts += ["## Use", *use(repository or "FOLDER", str(fields["architectures"][0]))]
    return "\n\n".join(parts) + "\n"


def header(license: str | None) -> str:
    """The YAML block that the Hub reads."""
    lines = [f"license: {json.dumps(license)}"] * (license is not None)
    lines += ["library_name: transformers", "pipeline_tag: text-generation", "tags: [dsv3]"]
    return "\n".join(["---", *lines, "---"])


def about(
    config: DictConfig, fields: Mapping[str, Any], summary: Mapping[str, Any], license: str | None
) -> Iterator[str]:
    """One line each."""
    tokens, counts = fields["dsv3"]["tokens_seen"], summary.get("parameters", {})
    weights = "averaged (EMA)" if fields["dsv3"]["weights"] == "ema" else "current"
    commit = summary.get("git_commit") or "unknown"
    yield f"A {fields['architectures'][0]} trained with dsv3.\n"
    if counts:
        yield f"- parameters: {counts['total']:,}, {counts['active']:,} active per token"
    yield f"- training: {tokens:,} tokens in sequences of {config.data.sequence_length}, seed {config.seed}"
    yield f"- weights: {weights}"
    yield f"- commit of the code: {commit}{' (+: with changes)' * commit.endswith('+')}"
    if versions := summary.get("versions"):
        yield f"- software: {', '.join(f'{name} {version}' for name, version in versions.items())}"
    yield f"- licence of the weights: {plain(license) if license else 'none was given'}"


def data(config: DictConfig) -> Iterator[str]:
    """A table of the sources and their shares."""
    sources = {name: node for name, node in (config.data.get("sources") or {}).items() if node is not None}
    if not sources:
        yield f"`{plain(str(config.data._target_))}`."
        return
    total = sum(float(node.get("weight", 1)) for node in sources.values())
    shares = {name: f"{float(node.get('weight', 1)) / total:.0%}" for name, node in sources.items()}
    rows = [(name, source(node), shares[name]) for name, node in sources.items()]
    yield table(("domain", "source", "share of tokens"), rows)


def source(node: DictConfig) -> str:
    """The function that reads it and, of the Hub, the data set."""
    kind = node._target_.rpartition(".")[2]
    is_public = kind == "hub" and ON_HUB.fullmatch(str(node.get("name")))
    return " ".join([kind, *(str(node[key]) for key in PUBLIC if is_public and node.get(key))])


def scores(fields: Mapping[str, Any], summary: Mapping[str, Any]) -> Iterator[str]:
    """Bits per byte and benchmarks, where they are those of the exported weights."""
    averaged = fields["dsv3"]["weights"] == "ema"
    if summary.get("tokens") != fields["dsv3"]["tokens_seen"]:
        yield "None: these weights are not those of the end of a run."
        return
    found = summary["validation"]["ema" if averaged else "after"]
    if found:
        rows = [(domain, f"{score['bpb']:.3f}") for domain, score in found.items()]
        yield table(("held-out text", "bits per byte"), rows)
    benchmarks = [
        (
            row["task"],
            row["metric"],
            f"{row['after']:.3f} {uncertainty(row['after'], row['after_stderr'], row['n'])}",
            row["n"],
        )
        for row in summary["benchmarks"]
        if row["after"] is not None
    ]
    if benchmarks:
        yield table(("benchmark", "metric", "score, with its error", "n"), benchmarks)
        if averaged:
            yield "The benchmarks are of the current weights, not of the averaged ones."


def use(place: str, architecture: str) -> Iterator[str]:
    quoted = json.dumps(place)
    yield "transformers:"
    yield f"""```python
from transformers import AutoModelForCausalLM, AutoTokenizer

tokenizer = AutoTokenizer.from_pretrained({quoted})
model = AutoModelForCausalLM.from_pretrained({quoted})
ids = tokenizer("def read(path):", return_tensors="pt").input_ids
print(tokenizer.decode(model.generate(ids, max_new_tokens=48)[0]))
```"""
    yield f"vLLM, which has {architecture} (not tried with these weights):"
    yield f"```\nvllm serve {quoted}\n```"
    yield "ONNX Runtime, by way of dsv3, from a local folder:"
    yield """```
python -m dsv3 import path=FOLDER out=run
python -m dsv3 export checkpoint=run out=graphs format=onnx
```"""


def table(headers: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    lines = [headers, ["-"] * len(headers), *rows]
    return "\n".join(f"| {' | '.join(plain(str(cell)) for cell in line)} |" for line in lines)


def plain(text: str) -> str:
    """Text that ends no line, cell or block of the card."""
    return " ".join(text.split()).replace("|", "/").replace("`", "'").replace("<", "(").replace(">", ")")
