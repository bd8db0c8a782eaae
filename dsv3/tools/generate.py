"""Complete a prompt, fill the gap between a prompt and a suffix, or answer a message, with a trained model."""

import sys
import time
from dataclasses import dataclass, replace
from typing import Any

from dsv3.bounds import (
    FiniteFloat,
    Fraction,
    NonNegativeFloat,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    Seed,
)
from dsv3.cli import ENGINE_HELP, ENGINES, REQUIRED, option


@dataclass
class Options:
    checkpoint: str = option(REQUIRED, "a run folder, one of its checkpoint files, or an export by format=onnx")
    prompt: str = option("", "the text to continue; with a suffix, the text before the gap")
    suffix: str = option("", "the text after the gap; if given, fills in the middle")
    chat: bool = option(False, "the prompt is a user's message; the model answers in DeepSeek's chat template")
    weights: str = option("live", "live (current), or ema (exponential moving average)", choices=("live", "ema"))
    max_tokens: PositiveInt = option(128, "maximum number of new tokens")
    temperature: NonNegativeFloat = option(0.0, "0: greedy decoding; 1: sample from the model's distribution")
    top_p: Fraction = option(1.0, "nucleus sampling: cumulative probability kept")
    top_k: NonNegativeInt = option(0, "sample from the top-k tokens; 0: all")
    min_p: Fraction = option(0.0, "minimum probability relative to the most likely token")
    repetition_penalty: PositiveFloat = option(1.0, "above 1: penalises tokens of the prompt and the text")
    presence_penalty: FiniteFloat = option(0.0, "subtracted from the logits of tokens in the text")
    frequency_penalty: FiniteFloat = option(0.0, "subtracted from these logits per occurrence")
    stop: list[str] = option([], r'strings that end the text and are not printed, such as stop=["\n\n"]')
    seed: Seed = option(0, "sampling seed")
    speculative: bool = option(
        False, "speculative decoding with MTP drafts: the same text (or, sampled, distribution) in fewer passes"
    )
    allow: list[str] = option([], "classes outside conf/ that the run's config.yaml may name: [package.Class]")
    device: str = option("auto", "auto: cuda where torch sees a GPU, else cpu", choices=("auto", "cpu", "cuda"))
    engine: str = option("auto", ENGINE_HELP, choices=ENGINES)
    drafts: PositiveInt | None = option(
        None, "draft tokens per pass, with speculative=true; null: one, as long as drafts make the text faster"
    )


def run(options: Options) -> dict[str, Any]:
    """Stream the text to stdout and its statistics to stderr, and return both.

    Raises:
        ValueError: an option is out of its range.
        FileNotFoundError: `checkpoint` is neither a run's nor an exported folder.
    """
    from dsv3.inference.engines import backend_of, writer_of
    from dsv3.inference.generation import stream
    from dsv3.inference.sampling import Settings
    from dsv3.inference.speculation import Speculation
    from dsv3.planning.draft_costs import USUAL
    from dsv3.prompts.chat import prompt_ids
    from dsv3.prompts.infilling import infilling_prompt

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
    writer = writer_of(
        options.checkpoint,
        engine=options.engine,
        device=options.device,
        weights=options.weights,
        allow=options.allow,
        drafts=options.speculative,
    )
    costs = backend_of(writer.source).draft_costs
    if options.speculative and options.drafts is None and costs is None:
        settings = replace(settings, drafts=1)  # is refused where the model has no MTP
    tokenizer = writer.tokenizer
    if options.chat and options.suffix:
        raise ValueError("chat=true: leave suffix= out; a gap is filled in a text, not in a conversation")
    if options.suffix:
        prompt = infilling_prompt(tokenizer, options.prompt, options.suffix, writer.fim_order)
    else:
        prompt = prompt_ids(tokenizer, options.prompt, chat=options.chat)
    trained = writer.sequence_length
    if len(prompt) + options.max_tokens > trained:
        reach = f"warning: the text may reach {len(prompt) + options.max_tokens:,} tokens"
        print(f"{reach}; this model was trained on sequences of {trained:,}", file=sys.stderr)
    settings, speculation = replace(settings, eos=(tokenizer.eos,)), Speculation()
    events = stream(writer.source, prompt, settings, decode=tokenizer.decode, speculation=speculation)
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
        figures |= fared(speculation, len(ids))
        if costs is not None and options.drafts is None and not speculation.made:
            said = f"no drafts: this text would be {costs.gain(USUAL):.2f} times as fast with one per pass"
            print(f"{said}; drafts=1 makes them", file=sys.stderr)
    print("  ".join(f"{name} {value:.4g}" for name, value in figures.items()), file=sys.stderr)
    return {
        "prompt": options.prompt,
        "suffix": options.suffix,
        "text": text,
        **figures,
    }


def fared(speculation: Any, tokens: int) -> dict[str, float]:
    """Figures of the drafts of a text."""
    return {
        "drafts_made": speculation.made,
        "acceptance": speculation.acceptance,
        "tokens_per_pass": tokens / speculation.passes,
    }
