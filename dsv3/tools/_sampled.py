"""Options and output of the tools that sample answers: prompts in, rows of JSON out."""

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dsv3.bounds import PositiveFloat, PositiveInt, Seed
from dsv3.cli import ENGINE_HELP, ENGINES, REQUIRED, option


@dataclass
class Sampling:
    """Options of both."""

    checkpoint: str = option(REQUIRED, "a run folder, or one of its checkpoint files: the model that answers")
    out: str = option(REQUIRED, "the JSON lines to write")
    prompts: str | None = option(None, "a file or folder of prompts (data/prompts.py); null: generated questions")
    count: PositiveInt = option(1000, "number of prompts")
    samples: PositiveInt = option(8, "answers sampled for each prompt")
    max_tokens: PositiveInt = option(32, "of an answer")
    temperature: PositiveFloat = option(1.0, "of sampling")
    weights: str = option("live", "live (current), or ema (exponential moving average)", choices=("live", "ema"))
    seed: Seed = option(0, "sampling seed")
    allow: list[str] = option([], "classes outside conf/ that the run's config.yaml may name: [package.Class]")
    device: str = option("auto", "auto: cuda where torch sees a GPU, else cpu", choices=("auto", "cpu", "cuda"))
    engine: str = option("auto", ENGINE_HELP, choices=ENGINES)
    overrides: list[str] = option([], "keys of conf/train.yaml, such as reward=math_verify")


def write_rows(options: Any, row_of: Callable[..., dict[str, Any] | None]) -> dict[str, Any]:
    """Write what `row_of(prompt, answers)` makes of each prompt and its judged answers; None makes no row. Returns
    figures of what was sampled.

    Raises:
        ValueError, FileNotFoundError: as the tools say.
    """
    from rich.progress import track

    from dsv3.checkpoint.loading import load_run
    from dsv3.checkpoint.run_folder import write_text_atomically
    from dsv3.config.compose import hydra_flags, opened
    from dsv3.rollout.judged import judged_answers
    from dsv3.runtime import device_named

    loaded = load_run(options.checkpoint, device=device_named(options.device), allow=options.allow)
    loaded.use(options.weights)
    path = [f"data.path={json.dumps(options.prompts)}"] if options.prompts else []
    flags = hydra_flags(["objective=grpo", "data=prompts", f"objective.max_tokens={options.max_tokens}", *path])
    flags.overrides.extend(options.overrides)
    with opened("train", flags) as composer:
        config = composer.compose(flags.overrides)
        found = judged_answers(
            loaded,
            config,
            count=options.count,
            samples=options.samples,
            max_tokens=options.max_tokens,
            temperature=options.temperature,
            seed=options.seed,
            engine=options.engine,
        )
        rows, prompts, earned, ended = [], 0, 0.0, 0
        for prompt, answers in track(found, description="sampling", total=options.count):
            prompts += 1
            earned += sum(one.reward for one in answers)
            ended += sum(one.rollout.ended for one in answers)
            if (row := row_of(prompt, answers)) is not None:
                rows.append(row)
    text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    write_text_atomically(Path(options.out), text)
    drawn = prompts * options.samples
    figures = {"rows": len(rows), "prompts": prompts, "mean_reward": earned / drawn, "ended": ended / drawn}
    print(f"{len(rows):,} rows of {prompts:,} prompts written to {options.out}")
    print(f"mean reward {figures['mean_reward']:.3f}, ended by themselves {figures['ended']:.1%}")
    return {**figures, "out": options.out}
