"""Complete a prompt, or fill the gap between a prompt and a suffix, with a trained model."""

import sys
import time
from dataclasses import dataclass, replace
from typing import Any

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
    top_k: int = option(0, "sample among this many likeliest tokens; 0: all")
    min_p: float = option(0.0, "sample among tokens at least this share as likely as the likeliest one")
    repetition_penalty: float = option(1.0, "above 1: tokens of the prompt and the text become less likely")
    presence_penalty: float = option(0.0, "subtracted from the logits of tokens that the text holds already")
    frequency_penalty: float = option(0.0, "subtracted from them for each time that the text holds them")
    stop: list[str] = option([], r'strings that end the text and are not printed, such as stop=["\n\n"]')
    seed: int = option(0, "of the sampling")
    speculative: bool = option(
        False, "let multi-token prediction draft tokens: the same text (or, sampled, distribution) in fewer passes"
    )
    device: str = option("auto", "auto: cuda where torch sees a GPU, else cpu", choices=("auto", "cpu", "cuda"))
    drafts: int = option(2, "tokens drafted for each pass of the model, with speculative=true")


def run(options: Options) -> dict[str, Any]:
    """Stream the text to stdout and its figures to stderr, and return both.

    Raises:
        ValueError: an option is out of its range.
        FileNotFoundError: `checkpoint` is not a run's.
    """
    from dsv3.checkpoint.loading import load_run
    from dsv3.inference.generation import stream
    from dsv3.inference.sampling import Settings
    from dsv3.inference.speculation import Speculation
    from dsv3.prompts.infilling import infilling_prompt
    from dsv3.runtime import device_named

    if options.drafts < 1:
        raise ValueError(f"drafts={options.drafts}: at least 1")
    settings = Settings(
        max_tokens=options.max_tokens,
        temperature=options.temperature,
        top_p=options.top_p,
        top_k=options.top_k,
        min_p=options.min_p,
        repetition_penalty=options.repetition_penalty,
        presence_penalty=options.presence_penalty,
        frequency_penalty=options.frequency_penalty,
        stop=tuple(options.stop),
        seed=options.seed,
        drafts=options.drafts if options.speculative else 0,
    )
    loaded = load_run(options.checkpoint, device=device_named(options.device))
    loaded.use(options.weights)
    tokenizer = loaded.tokenizer()
    if options.suffix:
        prompt = infilling_prompt(tokenizer, options.prompt, options.suffix, loaded.config.data.fim.order)
    else:
        prompt = [tokenizer.bos, *tokenizer.encode(options.prompt)]
    settings, speculation = replace(settings, eos=(tokenizer.eos,)), Speculation()
    events = stream(loaded.model, prompt, settings, decode=tokenizer.decode, speculation=speculation)
    ids: list[int] = []
    text = ""
    started = time.perf_counter()
    print(options.prompt, end="", flush=True)
    for event in events:
        ids += event.ids
        text += event.text
        print(event.text, end="", flush=True)
    seconds = time.perf_counter() - started
    print(options.suffix)
    figures = {"tokens": len(ids), "seconds": seconds, "tokens_per_second": len(ids) / seconds}
    if options.speculative:
        figures |= {
            "drafts_made": speculation.made,
            "acceptance": speculation.acceptance,
            "tokens_per_pass": len(ids) / speculation.passes,
        }
    print("  ".join(f"{name} {value:.4g}" for name, value in figures.items()), file=sys.stderr)
    return {
        "prompt": options.prompt,
        "suffix": options.suffix,
        "text": text,
        **figures,
    }
