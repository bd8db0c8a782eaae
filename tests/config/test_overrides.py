"""Preflight of overrides: every mistake is found, all at once, and nothing sound is refused."""

import itertools
from pathlib import Path

import pytest
from omegaconf import OmegaConf

from dsv3.config import relations
from dsv3.config.preflight import check
from dsv3.paths import CONF
from tests.config.looking import BASE, OPTIONS, groups_of, keys_of, only


@pytest.fixture(scope="module")
def folder_with_a_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("folder")
    for run in ("default/seed1", "chat/seed1", "chat/short", "babyai_imitation/seed1"):  # experiments begin with these
        (folder / "runs" / run).mkdir(parents=True)
    return folder


REQUIRED = {
    ("data", "hub"): ["data.sources.text.name=org/texts"],
    ("data", "token_files"): ["data.sources.text.path=tokens", "data.sources.text.tokenizer=tokenizer.json"],
    ("tokenizer", "file"): ["tokenizer.path=tokenizer.json", "tokenizer.vocab_size=300"],
    ("tokenizer", "hub"): ["tokenizer.name=org/model", "tokenizer.vocab_size=300"],
}
"""What an option leaves to the user."""

BEGUN = "run.init_from=runs/default/seed1"
FITTING = {
    ("data", "conversations"): ["objective=sft"],
    ("data", "preferences"): ["objective=dpo", BEGUN],
    ("data", "prompts"): ["objective=grpo"],
    ("data", "babyai"): ["objective=sft"],
    ("data", "babyai_prompts"): ["objective=grpo"],
    ("data", "babyai_turns"): ["objective=grpo"],
    ("data", "competition"): ["objective=sft"],
    ("data", "competition_prompts"): ["objective=grpo"],
    ("objective", "sft"): ["data=conversations"],
    ("objective", "dpo"): ["data=preferences", BEGUN],
    ("objective", "grpo"): ["data=prompts"],
    ("objective", "distill"): ["data=prompts", BEGUN],
}
"""What else must be chosen with it."""


TOGETHER = (
    "attention",
    "dispatch",
    "experts",
    "memory",
    "mtp",
    "precision",
    "optimizer",
    "schedule",
    "logger",
    "reward",
)
"""Kinds that fit whatever is chosen of the others: an option of each is checked at once."""


def test_options_of_kinds_that_fit_together_are_sound(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(relations, "TRACKERS", ())  # packages that need not be installed
    kinds = [[f"{group}={option}" for group, option in OPTIONS if group == kind] for kind in TOGETHER]
    assert all(kinds)
    for chosen in itertools.zip_longest(*kinds):
        assert check("train", list(filter(None, chosen))) == [], chosen


@pytest.mark.parametrize(("group", "option"), [option for option in OPTIONS if option[0] not in TOGETHER])
def test_every_shipped_option_is_sound(
    group: str, option: str, folder_with_a_run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(folder_with_a_run)
    monkeypatch.setattr(relations, "TRACKERS", ())  # packages that need not be installed
    if group in groups_of("train"):
        given, chosen = REQUIRED.get((group, option), []), [f"{group}={option}", *FITTING.get((group, option), [])]
        assert check("train", [*chosen, *given]) == []
        if given:
            assert keys_of(check("train", chosen)) == [key.partition("=")[0] for key in given]
    elif group in groups_of("evaluate"):
        assert check("evaluate", [f"{group}={option}", "checkpoint=conf"]) == []
    else:
        assert check("train", [f"+{group}={option}"]) == []


@pytest.mark.parametrize(
    "arguments",
    [
        [],
        ["schedule.peak=2e-3"],
        ["model.q_lora_rank=null"],
        ["data.fim.max_characters=null"],
        ["data.fim={rate: 0.5}"],
        ["+model.extra=3", "model.extra=4", "run.name=of${model.extra}"],
        ["++model.dim=32"],
        ["~callbacks.ema"],
        ["~compile=false"],
        ["trainer.devices=auto"],
        ["trainer.devices=[0,1]"],
        ["+trainer.log_every_n_steps=5"],
        ["hydra.run.dir=elsewhere"],
        ["optimizer.weight_decay=0"],
        ["model.dim=${model.inter_dim}"],
        ["mtp.weight=${schedule}"],
        ["run.name='7'"],
        ["seed=1,2", "model.top_k=range(1,3)", "run.name='${model.top_k}of${seed}'", "--multirun"],
        ["optimizer=glob(*)", "run.dir='runs/${hydra:job.num}'", "-m"],
        ["hydra.mode=MULTIRUN", "seed=1,2"],
        ["model.n_routed_experts=0", "model.n_dense_layers=3", "mtp=none"],
    ],
    ids=" ".join,
)
def test_sound_arguments_pass(arguments: list[str]) -> None:
    assert check("train", BASE + arguments) == []


def test_three_mistakes_are_reported_together() -> None:
    problems = {
        problem.key: problem for problem in check("train", ["model.top_k=99", "attentoin=mla", "model.dim=abc"])
    }
    assert problems.keys() == {"model.top_k", "attentoin", "model.dim"}
    options = [option for group, option in OPTIONS if group == "attention"]
    assert "Did you mean 'attention'?" in problems["attentoin"].message
    assert all(option in problems["attentoin"].message for option in options)
    shipped = OmegaConf.load(CONF / "model" / "small.yaml")
    kept = shipped.n_routed_experts // shipped.n_groups * shipped.topk_groups
    assert problems["model.top_k"].value == 99
    assert f"between 1 and {kept}" in problems["model.top_k"].message
    assert "model.n_routed_experts" in problems["model.top_k"].message
    assert "must be an integer" in problems["model.dim"].message
    assert str(shipped.dim) in problems["model.dim"].message


@pytest.mark.parametrize(
    ("argument", "key", "message"),
    [
        ("model.top_kk=3", "model.top_kk", "Did you mean 'model.top_k'?"),
        ("top_k=3", "top_k", "Did you mean 'model.top_k'?"),
        ("zzzzzz=3", "zzzzzz", "write +zzzzzz=3"),
        ("model=tinny", "model", "Did you mean 'tiny'?"),
        ("model=null", "model", "one of"),
        ("modle=tiny", "modle", "Did you mean 'model'?"),
        ("+model=tiny", "+model", "chosen already"),
        ("model@other=tiny", "model@other", "write +model@other=tiny"),
        ("+model.dim=3", "+model.dim", "there is already such a key"),
        ("~seedd", "~seedd", "Did you mean 'seed'?"),
        ("guard.window=32", "guard.window", "write callbacks.guard.window=32"),
        ("ema.decay=0.9", "ema.decay", "write callbacks.ema.decay=0.9"),
        (
            "diagnostics.quantisation_tokens=5",
            "diagnostics.quantisation_tokens",
            "callbacks.quantisation.every_tokens=5",
        ),
        ("guard.most_rollbacks=1", "guard.most_rollbacks", "write callbacks.guard.max_rollbacks=1"),
        (
            "data.batch_sequences.peak=16",
            "data.batch_sequences.peak",
            "this key is now called data.global_batch_size.peak: write data.global_batch_size.peak=16",
        ),
        ("run.validation_tokens=9", "run.validation_tokens", "write run.validate_every_tokens=9"),
        ("data.held_out=0.2", "data.held_out", "write data.held_out_fraction=0.2"),
        ("+optimizer.rows_lr_scale=2", "optimizer.rows_lr_scale", "write optimizer.sparse_lr_scale=2"),
        (
            "attention.decode=absorbed",
            "attention.decode",
            "this value is now called absorb: write attention.decode=absorb",
        ),
        ("~callbacks.ema.decay=0.5", "~callbacks.ema.decay", "Could not delete"),
        ("~logger", "logger", "write logger=OPTION"),
        ("model.top_k=[1,", "model.top_k", "invalid Hydra override"),
        ("model.top_k", "model.top_k", "Write key=value"),
        ("model.top_k=1,2", "model.top_k", "--multirun"),
        ("hydra/launcher=nothing", "hydra/launcher", "one of"),
        ("run=3", "run", "must be a mapping"),
        ("mtp.weight=0.3", "mtp.weight", "must be a mapping"),
        ("grad_clip=null", "grad_clip", "must be a number"),
        ("model.dim=${model.dimm}", "model.dim", "Did you mean 'model.dim'?"),
    ],
)
def test_an_override_that_does_not_fit_is_explained(argument: str, key: str, message: str) -> None:
    problem = only(check("train", ["logger=none", argument]))
    assert problem.key == key
    assert message in problem.message


def test_an_old_key_of_evaluate_is_answered_with_the_new_one() -> None:
    old = {"shots": "num_fewshot", "results": "output_path", "allow_unsafe_code": "confirm_run_unsafe_code"}
    problems = check("evaluate", ["checkpoint=conf", *(f"{key}=1" for key in old)])
    answers = {problem.key: problem.message for problem in problems}
    assert answers == {key: f"this key is now called {now}: write {now}=1" for key, now in old.items()}


def test_old_keys_in_an_experiment_file_are_answered_with_the_new_ones(tmp_path: Path) -> None:
    (tmp_path / "experiment").mkdir()
    old = "run: {checkpoint_tokens: 5}\ndispatch: {row_multiple: 1}\nguard: {window: 9}\n"
    (tmp_path / "experiment" / "mine.yaml").write_text(f"# @package _global_\n{old}")
    found = {p.key: p.message for p in check("train", ["--config-dir", str(tmp_path), "experiment=mine"])}
    assert "write run.checkpoint_every_tokens=5" in found["run.checkpoint_tokens"]
    assert "write dispatch.pad_multiple=1" in found["dispatch.row_multiple"]
    assert "write callbacks.guard={window: 9}" in found["guard"]


def test_keys_that_another_option_has_are_not_blamed_for_the_option() -> None:
    arguments = ["model=tiny", "mtp=deepseeek", "mtp.depht=1", "router=sofmax", "router.normalise_gates=true"]
    assert keys_of(check("train", arguments)) == ["mtp", "mtp.depht", "router"]


NAMED = "run.name='k${model.top_k}-groups${model.topk_groups}-dim${model.dim}'"


def test_each_value_of_a_sweep_is_checked() -> None:
    problems = check("train", [*BASE, NAMED, "model.top_k=1,99,0", "model.dim=64,abc", "sed=1,2", "-m"])
    found = sorted((problem.key, str(problem.value)) for problem in problems)
    assert found == [("model.dim", "abc"), ("model.top_k", "0"), ("model.top_k", "99"), ("sed", "1"), ("sed", "2")]


def test_a_combination_of_a_sweep_is_checked() -> None:
    """tiny keeps 8 experts of 16 with two groups out of four, and 4 with one."""
    problem = only(check("train", [*BASE, NAMED, "model.top_k=1,8", "model.topk_groups=2,1", "-m"]))
    assert (problem.key, problem.value) == ("model.top_k", 8)


def test_a_mandatory_value_that_is_missing_is_named() -> None:
    assert keys_of(check("evaluate", [])) == ["checkpoint"]


def test_evaluation_does_not_choose_the_parts_of_a_run() -> None:
    arguments = ["checkpoint=conf", "precision=fp8_blockwise", "+router=softmax", "benchmarks=quick", "format=xml"]
    found = check("evaluate", arguments)
    assert [problem.key for problem in found] == ["precision", "+router", "format"]
    assert "a checkpoint fixes its components" in found[0].message
    assert check("evaluate", ["checkpoint=conf", "hydra/launcher=joblib"]) == []


def test_a_benchmark_is_added_by_its_name() -> None:
    added = "+benchmarks.tasks.capitals"
    assert check("train", [*BASE, f"{added}={{limit: 4}}"]) == []
    assert check("train", [*BASE, f"{added}={{}}"]) == []
    assert only(check("train", [*BASE, f"{added}={{limti: 4}}"])).key == "benchmarks.tasks.capitals.limti"
    assert "must be a mapping" in only(check("train", [*BASE, f"{added}=4"])).message
    assert f"write {added}=" in only(check("train", [*BASE, f"{added[1:]}={{limit: 4}}"])).message
    whole = "benchmarks.tasks={capitals: {limit: 4}}"
    assert "+benchmarks.tasks.NAME" in only(check("train", [*BASE, whole])).message


def test_unknown_keys_may_mean_a_tools_option() -> None:
    assert "Did you mean 'context'?" in only(check("train", ["contxt=3"], also=["context"])).message
