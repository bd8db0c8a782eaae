"""Episodes of BabyAI and Crafter as documents of lm-eval: a request of the kind `play` is one episode."""

from typing import Any

from datasets import Dataset
from lm_eval.api.instance import Instance
from lm_eval.api.task import ConfigurableTask

from dsv3.environments import EVALUATION_SEEDS, check_name

SETTINGS = ("steps", "history", "actions", "temperature")
"""Of `generation_kwargs`, to which lm-eval adds its own: the most steps of an episode, earlier steps in the prompt, how
an action is taken from the model (likelihood or text), and the temperature of sampling."""


def load(*, environment: str, episodes: int, **_: Any) -> dict[str, Dataset]:
    """Seeds of evaluation, the same for every model."""
    check_name(environment)
    rows = [{"environment": environment, "seed": EVALUATION_SEEDS + i} for i in range(episodes)]
    return {"test": Dataset.from_list(rows)}


def score(doc: dict[str, Any], results: list[dict[str, Any]]) -> dict[str, float]:
    """`random` and `expert`: the progress of random legal actions and of the expert in the same episode."""
    (played,) = results
    return {
        "progress": played["progress"],
        "random": played["random"],
        "expert": played["expert"],
        "invalid_actions": played["invalid"] / played["steps"],
        "steps": float(played["steps"]),
    }


class Episodes(ConfigurableTask):
    """A task whose documents are played."""

    def __init__(self, config: dict[str, Any]) -> None:
        super().__init__(config={key: value for key, value in config.items() if key != "class"})
        self.OUTPUT_TYPE: Any = "play"  # the name of the model's method

    def construct_requests(self, doc: dict[str, Any], ctx: str, **settings: Any) -> Instance:
        given = self.config.generation_kwargs or {}
        how = {key: given[key] for key in SETTINGS if key in given}
        return Instance("play", doc, (ctx, doc["seed"], how), 0, settings["metadata"])  # type: ignore[arg-type]
