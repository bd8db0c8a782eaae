"""What the tools that sample answers have in common: prompts in, rows of JSON out."""

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from rich.progress import track

from dsv3.checkpoint.loading import load_run
from dsv3.checkpoint.run_folder import write_atomically
from dsv3.config.compose import hydra_flags, opened
from dsv3.contracts import Prompt
from dsv3.rollout.judged import Judged, judged_answers
from dsv3.runtime import device_named

Rows = Callable[[Prompt, Sequence[Judged]], dict[str, Any] | None]


def write_rows(options: Any, row_of: Rows) -> dict[str, Any]:
    """Write what `row_of` makes of each prompt and its answers, and return how many rows there are, and why not more.

    Raises:
        ValueError, FileNotFoundError: as the tools say.
    """
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
        )
        rows, earned, ended = [], 0.0, 0
        for prompt, answers in track(found, description="sampling", total=options.count):
            earned += sum(one.reward for one in answers)
            ended += sum(one.rollout.ended for one in answers)
            if (row := row_of(prompt, answers)) is not None:
                rows.append(row)
    text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    write_atomically(Path(options.out), lambda temporary: temporary.write_text(text, encoding="utf-8"))
    answers_drawn = options.count * options.samples
    figures = {"rows": len(rows), "mean_reward": earned / answers_drawn, "ended": ended / answers_drawn}
    print(f"{len(rows):,} rows of {options.count:,} prompts written to {options.out}")
    print(f"mean reward {figures['mean_reward']:.3f}, ended by themselves {figures['ended']:.1%}")
    return {**figures, "out": options.out}
