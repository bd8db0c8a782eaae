"""Complete a prompt, or fill the gap between a prompt and a suffix, with a trained model."""

import codecs
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch

from dsv3.cli import REQUIRED, option


@dataclass
class Options:
    checkpoint: str = option(REQUIRED, "a run folder, or one of its checkpoint files")
    prompt: str = option("", "the text to continue; with a suffix, the text before the gap")
    suffix: str = option("", "the text after the gap; given, the middle is filled in")
    weights: str = option(
        "live", "live, or ema: their average over the last steps of training", choices=("live", "ema")
    )
    max_tokens: int = option(128, "the longest continuation")
    temperature: float = option(0.0, "0: always the likeliest token; 1: sample from the model's distribution")
    top_p: float = option(1.0, "nucleus sampling: cumulative probability kept")
    seed: int = option(0, "of the sampling")
    speculative: bool = option(
        False, "let multi-token prediction draft tokens: the same text (or, sampled, distribution) in fewer passes"
    )
    drafts: int = option(2, "tokens drafted for each pass of the model, with speculative=true")


def run(options: Options) -> dict[str, Any]:
    """Stream the text to stdout and its figures to stderr, and return both.

    Raises:
        ValueError: an option is out of its range.
        FileNotFoundError: `checkpoint` is not a run's.
    """
    from dsv3.checkpoint.loading import load_run, set_weights
    from dsv3.inference.generation import generate
    from dsv3.inference.speculation import Speculation
    from dsv3.prompts.infilling import infilling_prompt

    check(options)
    loaded = load_run(options.checkpoint)
    if options.weights == "ema":
        set_weights(loaded.model, loaded.ema_weights)
    tokenizer = loaded.tokenizer()
    if options.suffix:
        prompt = infilling_prompt(tokenizer, options.prompt, options.suffix, loaded.config.data.fim.order)
    else:
        prompt = [tokenizer.bos, *tokenizer.encode(options.prompt)]
    ids: list[int] = []
    speculation = Speculation(drafts=options.drafts) if options.speculative else None

    def remember(stream: Iterator[int]) -> Iterator[bytes]:
        for token in stream:
            ids.append(token)
            yield tokenizer.decode_bytes([token])

    stream = generate(
        loaded.model,
        prompt,
        max_tokens=options.max_tokens,
        stop=tokenizer.eos,
        temperature=options.temperature,
        top_p=options.top_p,
        generator=torch.Generator().manual_seed(options.seed),
        speculation=speculation,
    )
    started = time.perf_counter()
    print(options.prompt, end="", flush=True)
    for text in characters(remember(stream)):
        print(text, end="", flush=True)
    seconds = time.perf_counter() - started
    print(options.suffix)
    figures = {"tokens": len(ids), "seconds": seconds, "tokens_per_second": len(ids) / seconds}
    if speculation is not None:
        figures |= {
            "drafts_made": speculation.made,
            "acceptance": speculation.acceptance,
            "tokens_per_pass": len(ids) / speculation.passes,
        }
    print("  ".join(f"{name} {value:.4g}" for name, value in figures.items()), file=sys.stderr)
    return {
        "prompt": options.prompt,
        "suffix": options.suffix,
        "text": tokenizer.decode(ids),
        **figures,
    }


def check(options: Options) -> None:
    if options.max_tokens < 1:
        raise ValueError(f"max_tokens={options.max_tokens}: at least 1")
    if options.drafts < 1:
        raise ValueError(f"drafts={options.drafts}: at least 1")
    if options.temperature < 0:
        raise ValueError(f"temperature={options.temperature}: at least 0")
    if not 0 < options.top_p <= 1:
        raise ValueError(f"top_p={options.top_p}: above 0 and at most 1")


def characters(pieces: Iterator[bytes]) -> Iterator[str]:
    """Text as soon as its characters are whole: a token may end in the middle of one."""
    decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
    for piece in pieces:
        yield decoder.decode(piece)
    yield decoder.decode(b"", final=True)
