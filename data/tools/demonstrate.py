"""Write demonstrations of BabyAI's bot or the scripted Crafter policy, as conversations for objective=sft or prompts
for objective=grpo.
"""

from dataclasses import dataclass
from typing import Any, cast

from dsv3.bounds import NonNegativeInt, PositiveInt
from dsv3.cli import option

FORMS = ("steps", "plans", "prompts", "turns")


@dataclass
class Options:
    env: str = option("babyai", "environment: babyai (five task types in turn), babyai/goto, ..., crafter")
    episodes: PositiveInt = option(1000, "number of episodes")
    out: str = option("demonstrations.jsonl", "file to write")
    form: str = option(
        "steps", "a row per step, a plan per episode, or GRPO's prompts of plans or turns", choices=FORMS
    )
    steps: PositiveInt = option(64, "steps per episode, at most")
    history: NonNegativeInt = option(0, "earlier steps in each prompt")
    first_seed: NonNegativeInt = option(0, "seed of the first episode; evaluation's begin at 2,000,000,000")


def run(options: Options) -> dict[str, Any]:
    """Write the rows, and print how many there are.

    Raises:
        ValueError: there is no such environment, or a seed is one of evaluation.
        OSError: the file cannot be written.
    """
    import json
    from pathlib import Path

    from data.demonstrations import Form, demonstrations

    source = demonstrations(
        environment=options.env,
        episodes=options.episodes,
        first_seed=options.first_seed,
        steps=options.steps,
        history=options.history,
        form=cast(Form, options.form),
        weight=1.0,
    )
    out, written = Path(options.out), 0
    out.parent.mkdir(parents=True, exist_ok=True)
    unfinished = out.with_name(f".{out.name}.unfinished")
    with unfinished.open("w", encoding="utf-8") as file:
        for _, row in source.rows():
            file.write(json.dumps(row, ensure_ascii=False) + "\n")
            written += 1
    unfinished.replace(out)
    print(f"{written:,} rows of {options.episodes:,} episodes in {out}")
    return {"path": str(out), "rows": written, "episodes": options.episodes}
