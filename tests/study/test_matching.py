"""Sizes solved for equal budgets: every pair of attention options and expert counts, and what cannot be matched."""

import copy
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from hydra import compose, initialize_config_dir
from hypothesis import given, settings
from hypothesis import strategies as st
from omegaconf import DictConfig

from dsv3.config.declared import Match
from dsv3.config.preflight import check
from dsv3.paths import CONF
from dsv3.study import evidence, matching
from dsv3.study.matching import matched, quantity_of, read_matching, solve, with_overrides
from tests.study.test_evidence import study_in

ATTENTION = {
    "mla": ["attention=mla"],
    "gqa": ["attention=gqa", "model.n_kv_heads=1"],
    "mha": ["attention=gqa"],
}
TINY = ["model=tiny"]


def composed(job: list[str]) -> DictConfig:
    return copy.deepcopy(_composed(tuple(job)))


@cache
def _composed(job: tuple[str, ...]) -> DictConfig:
    with initialize_config_dir(str(CONF), version_base="1.3"):
        return compose("train", overrides=list(job), return_hydra_config=True)


def study(arms: dict[str, list[str]], **match: Any) -> dict[str, Any]:
    return {"arms": arms, "baseline": None, "match": {"quantity": "parameters", "by": "model.inter_dim", **match}}


@pytest.mark.slow
@pytest.mark.timeout(900)
@settings(max_examples=25, deadline=None)
@given(
    st.sampled_from(sorted(ATTENTION)),
    st.sampled_from(sorted(ATTENTION)),
    st.sampled_from([(8, 2), (16, 2), (16, 4), (32, 4)]),
    st.sampled_from(["parameters", "active_parameters", "flops_per_token"]),
)
def test_every_pair_of_attentions_and_expert_counts_is_matched_or_none_is_nearer(
    ours: str, theirs: str, experts: tuple[int, int], quantity: str
) -> None:
    """Where the tolerance is not reached, neither neighbour of the size is nearer: steps of the size are too coarse,
    or it is 1 already."""
    changed = [f"model.n_routed_experts={experts[0]}", f"model.top_k={experts[1]}"]
    match = Match(quantity, "model.inter_dim", 0.005, "nearest")  # type: ignore[arg-type]
    target = quantity_of(composed([*TINY, *ATTENTION[theirs]]), quantity)
    config = composed([*TINY, *ATTENTION[ours], *changed])
    found = solve("arm", config, match, target)
    assert found.value is not None
    reached = {
        size: quantity_at(config, size, quantity) for size in (found.value - 1, found.value, found.value + 1) if size
    }
    assert reached[found.value] == found.reached
    assert abs(found.error(target)) <= match.tolerance or all(
        abs(value - target) >= abs(found.reached - target) for value in reached.values()
    )


def quantity_at(config: DictConfig, size: int, quantity: str) -> float:
    config.model.inter_dim = size
    return quantity_of(config, quantity)


def test_an_arm_that_is_as_large_already_keeps_its_size() -> None:
    match, config = Match("parameters", "model.inter_dim", 0.005), composed([*TINY, *ATTENTION["gqa"]])
    found = solve("arm", config, match, quantity_of(config, "parameters"))
    assert (found.value, found.reached) == (config.model.inter_dim, quantity_of(config, "parameters"))


@pytest.mark.slow
def test_a_size_keeps_to_the_multiples_that_the_kernel_of_its_layer_needs() -> None:
    """Experts are as wide as a multiple of 8 for the grouped GEMM."""
    match = Match("active_parameters", "model.moe_inter_dim", 0.2)
    arms = {"few": ["model.top_k=1"], "many": ["model.top_k=4"]}
    target = quantity_of(composed([*TINY, *arms["few"]]), match.quantity)
    found = solve("many", composed([*TINY, *arms["many"]]), match, target)
    assert found.value is not None
    assert found.value % 8 == 0


def test_what_was_solved_is_kept_and_shown(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    arms = {name: ATTENTION[name] for name in ("mha", "mla")}
    solved, found = matched(study(arms), TINY, composed, tmp_path)
    (added,) = [override for override in solved["arms"]["mla"] if override not in arms["mla"]]
    assert added == f"model.inter_dim={found.arms[1].value}"
    assert solved["arms"]["mha"] == arms["mha"], "the baseline keeps its size"
    assert found.lines()[0].startswith("mha: as it is, parameters ")
    assert read_matching(tmp_path) == found
    monkeypatch.setattr(matching, "solved_arms", None)
    assert matched(study(arms), TINY, composed, tmp_path) == (solved, found), "and is not solved again"
    (section,) = evidence.matching(study_in(tmp_path))
    assert [(row[0], row[-1]) for row in section.rows] == [("mha", "baseline"), ("mla", "yes")]


def test_stages_of_an_arm_have_one_size() -> None:
    assert with_overrides([["a=1"], ["b=2"]], {"size": 3, "other": None}) == [["a=1", "size=3"], ["b=2", "size=3"]]
    assert with_overrides(["a=1"], {"size": 3}) == ["a=1", "size=3"]


def test_what_cannot_be_matched_is_refused_by_name_before_any_work(tmp_path: Path) -> None:
    arms = {"small": [], "large": ["model.dim=256"]}
    with pytest.raises(
        ValueError, match=r"study\.match\.tolerance=0\.005: large comes no nearer .* model\.inter_dim=1;"
    ):
        matched(study(arms), TINY, composed, tmp_path)
    assert not (tmp_path / "matching.json").exists()
    _, found = matched(study(arms, unreachable="nearest"), TINY, composed, tmp_path)
    assert found.arms[1].error(found.target) > 1
    (section,) = evidence.matching(study_in(tmp_path))
    assert section.rows[1][-1] == "no"
    with pytest.raises(
        ValueError, match=r"study\.match\.by=model\.inter_dim: cache_bytes of large does not depend on it"
    ):
        matched(study(arms, quantity="cache_bytes"), TINY, composed, tmp_path)


@pytest.mark.slow
def test_seconds_of_a_step_are_measured() -> None:
    seconds = quantity_of(composed([*TINY, "precision=fp32", "data.micro_batch_size=1"]), "step_seconds")
    assert 0 < seconds < 60


@pytest.mark.parametrize(
    ("setting", "key", "message"),
    [
        ("study.match={quantity:speed,by:model.inter_dim}", "study.match.quantity", "must be one of parameters"),
        ("study.match={quantity:parameters,by:model.inter}", "study.match.by", "must be the key of a size"),
        ("study.match={quantity:parameters}", "study.match.by", "needs this argument"),
        ("study.until={half_width:0.005,most_seeds:2}", "study.until.most_seeds", "must be at least 3"),
        ("study.until={half_width:0}", "study.until.half_width", "must be above 0"),
        ("study.until={half_width:0.01,most_seeds:50}", "study.until.most_seeds", "must be between 2 and 12"),
        ("study.tune={schedule.peak:[1e-3]}", "study.tune", "has 1 combinations"),
        ("study.tune={schedule.peek:[1e-3,2e-3]}", "study.tune.schedule.peek", "must be a key of every arm"),
        ("study.tune={schedule.peak:1e-3}", "study.tune.schedule.peak", "must be a list of values"),
    ],
)
def test_mistakes_in_settings_are_found_before_any_work(setting: str, key: str, message: str) -> None:
    problems = check("train", ["experiment=table4_mtp", setting])
    assert [problem.key for problem in problems] == [key]
    assert message in problems[0].message


@pytest.mark.parametrize(
    ("setting", "given", "key"),
    [
        ("study.match={quantity:parameters,by:model.inter_dim}", "model.inter_dim=64", "study.match.by"),
        ("study.tune={schedule.peak:[1e-3,2e-3]}", "schedule.peak=1e-3", "study.tune.schedule.peak"),
    ],
)
def test_a_key_that_is_solved_or_tuned_is_not_set_on_the_command_line(setting: str, given: str, key: str) -> None:
    (problem,) = check("train", ["experiment=table4_mtp", setting, given])
    assert problem.key == key
    assert "command line" in problem.message
