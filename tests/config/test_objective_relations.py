"""Data and models that an objective lacks are refused before any work, by the key that is wrong."""

from pathlib import Path

import pytest

from dsv3.config.objective_relations import DATA_OF
from dsv3.config.preflight import check
from dsv3.paths import CONF
from tests.config.looking import BASE, keys_of

BEGUN = "run.init_from=conf"  # any path that is there
ROOT = Path(__file__).parents[2]


def test_the_table_has_every_objective_and_all_data_of_conf() -> None:
    assert DATA_OF.keys() == {path.stem for path in (CONF / "objective").glob("*.yaml")}
    fitting = {name for names in DATA_OF.values() for name in names}
    assert fitting == {path.stem for path in (CONF / "data").glob("*.yaml")}


@pytest.mark.parametrize(
    ("arguments", "keys"),
    [
        (["objective=sft", "data=conversations"], []),
        (["objective=sft"], ["data"]),
        (["objective=dpo", "data=preferences", BEGUN], []),
        (["objective=dpo", "data=preferences"], ["run.init_from"]),
        (["objective=dpo", BEGUN], ["data"]),
        (["objective=grpo", "data=prompts"], []),
        (["objective=grpo", "data=conversations"], ["data"]),
        (["objective=grpo", "data=prompts", "objective.kl=0.1"], ["run.init_from"]),
        (["objective=grpo", "data=prompts", "objective.kl=0.1", BEGUN], []),
        (["objective=grpo", "data=prompts", "objective.group=1"], ["objective.group"]),
        (["objective=grpo", "data=prompts", "objective.max_tokens=512"], ["objective.max_tokens"]),
        (["objective=grpo", "data=prompts", "objective.max_tokens=511"], []),
        (["objective=grpo", "data=prompts", "objective.replay_routing=true"], []),
        (
            ["objective=grpo", "data=prompts", "objective.replay_routing=true", "router=hash"],
            ["objective.replay_routing"],
        ),
        (["objective=distill", "data=conversations", BEGUN], []),
        (["objective=distill", "data=prompts"], ["run.init_from"]),
        (["objective=distill", "data=prompts", "objective.teachers=[conf]"], []),
        (["objective=distill", "data=prompts", "objective.teachers=[conf,nowhere]"], ["objective.teachers"]),
        (["objective=distill", "data=preferences", BEGUN], ["data"]),
        (["data=preferences"], ["data"]),
        (["experiment=chat", BEGUN], []),
        (["experiment=babyai_grpo", BEGUN], []),
    ],
    ids=" ".join,
)
def test_an_objective_without_what_it_needs(
    arguments: list[str], keys: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(ROOT)
    assert keys_of(check("train", BASE + arguments)) == keys
