"""Preflight: every mistake is found, all at once, and nothing sound is refused."""

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from omegaconf import OmegaConf

from dsv3.preflight import CONF, Problem, check, check_or_exit
from dsv3.preflight.relations import check_relations
from dsv3.preflight.view import View

ROOT = CONF.parent
OPTIONS = sorted(
    (path.parent.relative_to(CONF).as_posix(), path.stem) for path in CONF.rglob("*.yaml") if path.parent != CONF
)
BASE = ["model=tiny", "logger=none"]


def groups_of(config_name: str) -> set[str]:
    """The groups of which a primary config chooses an option."""
    defaults = OmegaConf.load(CONF / f"{config_name}.yaml").defaults
    return {str(group).removeprefix("override ") for default in defaults if default != "_self_" for group in default}


def keys_of(problems: list[Problem]) -> list[str]:
    return sorted(problem.key for problem in problems)


def only(problems: list[Problem]) -> Problem:
    assert len(problems) == 1, problems
    return problems[0]


# --- what is sound passes


@pytest.mark.parametrize(("group", "option"), OPTIONS)
def test_every_shipped_option_is_sound(group: str, option: str) -> None:
    if group in groups_of("train"):
        assert check("train", [f"{group}={option}"]) == []
    elif group in groups_of("evaluate"):
        assert check("evaluate", [f"{group}={option}", "checkpoint=runs"]) == []
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
        ["+model.extra=3", "model.extra=4"],
        ["++model.dim=32"],
        ["~ema"],
        ["~ema.decay=0.99"],
        ["~logger"],
        ["trainer.devices=auto"],
        ["trainer.devices=[0,1]"],
        ["+trainer.log_every_n_steps=5"],
        ["hydra.run.dir=elsewhere"],
        ["optimizer.weight_decay=0"],
        ["model.dim=${model.inter_dim}"],
        ["mtp.weight=${schedule}"],
        ["run.name='7'"],
        ["seed=1,2", "model.top_k=range(1,3)", "--multirun"],
        ["optimizer=glob(*)", "-m"],
        ["hydra.mode=MULTIRUN", "seed=1,2"],
        ["model.n_routed_experts=0", "model.n_dense_layers=3"],
    ],
    ids=" ".join,
)
def test_sound_arguments_pass(arguments: list[str]) -> None:
    assert check("train", BASE + arguments) == []


# --- overrides


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
    assert "an integer is needed" in problems["model.dim"].message
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
        ("~emaa", "~emaa", "Did you mean 'ema'?"),
        ("~ema.decay=0.5", "~ema.decay", "Could not delete"),
        ("model.top_k=[1,", "model.top_k", "not an override that Hydra can read"),
        ("model.top_k", "model.top_k", "Write key=value"),
        ("model.top_k=1,2", "model.top_k", "--multirun"),
        ("hydra/launcher=nothing", "hydra/launcher", "one of"),
        ("run=3", "run", "a mapping is needed"),
        ("mtp.weight=0.3", "mtp.weight", "a mapping is needed"),
        ("grad_clip=null", "grad_clip", "a number is needed"),
        ("model.dim=${model.dimm}", "model.dim", "Did you mean 'model.dim'?"),
    ],
)
def test_an_override_that_does_not_fit_is_explained(argument: str, key: str, message: str) -> None:
    problem = only(check("train", ["logger=none", argument]))
    assert problem.key == key
    assert message in problem.message


def test_keys_that_another_option_has_are_not_blamed_for_the_option() -> None:
    arguments = ["model=tiny", "mtp=deepseeek", "mtp.depht=1", "router=sofmax", "router.normalise_gates=true"]
    assert keys_of(check("train", arguments)) == ["mtp", "mtp.depht", "router"]


def test_each_value_of_a_sweep_is_checked() -> None:
    problems = check("train", [*BASE, "model.top_k=1,99,0", "model.dim=64,abc", "sed=1,2", "-m"])
    found = sorted((problem.key, str(problem.value)) for problem in problems)
    assert found == [("model.dim", "abc"), ("model.top_k", "0"), ("model.top_k", "99"), ("sed", "1"), ("sed", "2")]


def test_a_combination_of_a_sweep_is_checked() -> None:
    """tiny keeps 8 experts of 16 with two groups out of four, and 4 with one."""
    problem = only(check("train", [*BASE, "model.top_k=1,8", "model.topk_groups=2,1", "-m"]))
    assert (problem.key, problem.value) == ("model.top_k", 8)


def test_a_mandatory_value_that_is_missing_is_named() -> None:
    assert keys_of(check("evaluate", [])) == ["checkpoint"]


def test_unknown_keys_may_mean_a_tools_option() -> None:
    assert "Did you mean 'context'?" in only(check("train", ["contxt=3"], also=["context"])).message


# --- types: of the default where no signature says more


TYPES = """
integer: 3
number: 0.5
truth: true
text: words
items: [1, 2]
nothing: null
part:
  inner: 1
"""


@pytest.fixture
def types(tmp_path: Path) -> list[str]:
    (tmp_path / "types.yaml").write_text(TYPES)
    return ["--config-dir", str(tmp_path)]


@pytest.mark.parametrize(
    ("argument", "needed"),
    [
        ("integer=4", None),
        ("integer=null", "an integer is needed"),
        ("integer=4.5", "an integer is needed"),
        ("integer=4e2", "write 400"),
        ("integer=true", "an integer is needed"),
        ("integer='4'", "write 4 without quotes"),
        ("integer={a: 1}", "an integer is needed"),
        ("number=1", None),
        ("number=1e-3", None),
        ("number=true", "a number is needed"),
        ("number='1e-3'", "write 1e-3 without quotes"),
        ("truth=False", None),
        ("truth=1", "true or false is needed"),
        ("truth=no", "true or false is needed"),
        ("text=more words", None),
        ("text=1", "a text is needed"),
        ("text=[a]", "a text is needed"),
        ("items=[]", None),
        ("items=3", "a list is needed"),
        ("nothing=3", None),
        ("nothing={a: b}", None),
        ("part=3", "a mapping is needed"),
        ("part={inner: x}", "an integer is needed"),
    ],
)
def test_type_table(types: list[str], argument: str, needed: str | None) -> None:
    problems = check("types", [*types, argument])
    if needed is None:
        assert problems == []
    else:
        assert needed in only(problems).message


# --- types and names from signatures, of a stranger's module


MODULE = """
from __future__ import annotations
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Optional
raise RuntimeError("preflight must not import plugins")

Order = Literal["first", "last"]

class Base:
    def __init__(self, *, size: int, rate: float, name: str = "x", limit: int | None = None,
                 order: Order = "first", pair: tuple[float, float] = (0, 0), many: Sequence[int] = (),
                 table: Mapping[str, Any] = {}, maybe: Optional[bool] = None, part: Part = None, given_later=None):
        pass

class Inherits(Base):
    pass

@dataclass
class Part:
    depth: int
    width: int = 1

def anything(**options): ...

class Maker:
    @classmethod
    def make(cls, size: int): ...
"""
NODE = """
node:
  _target_: stranger.parts.Inherits
  _partial_: true
  size: ${size}
  rate: 0.5
size: 4
hydra: {output_subdir: null}
"""


@pytest.fixture
def stranger(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., list[Problem]]:
    """check_node(*arguments): the problems of a config with a stranger's plugin in it."""
    (tmp_path / "stranger").mkdir()
    (tmp_path / "stranger" / "__init__.py").write_text("from stranger.parts import Part as Renamed\n")
    (tmp_path / "stranger" / "parts.py").write_text(MODULE)
    (tmp_path / "stranger" / "broken.py").write_text("def f(:\n")
    (tmp_path / "strange.yaml").write_text(NODE)
    monkeypatch.syspath_prepend(str(tmp_path))
    return lambda *arguments: check("strange", ["--config-dir", str(tmp_path), *arguments])


@pytest.mark.parametrize(
    ("arguments", "key", "message"),
    [
        (["size=9"], None, ""),
        (["size=x"], "size", "an integer is needed, such as the default 4 (node.size of Inherits)"),
        (["node.size=x"], "node.size", "an integer is needed"),
        (["node.rate=fast"], "node.rate", "a number is needed"),
        (["+node.limit=null"], None, ""),
        (["+node.limit=x"], "node.limit", "an integer or null is needed"),
        (["+node.order=last"], None, ""),
        (["+node.order=lst"], "node.order", "Did you mean 'last'?"),
        (["+node.pair=[1,2.5]"], None, ""),
        (["+node.pair=[1]"], "node.pair", "a list"),
        (["+node.many=[1,x]"], "node.many", "a list"),
        (["+node.many=3"], "node.many", "a list"),
        (["+node.table={a: 1}"], None, ""),
        (["+node.table=3"], "node.table", "a mapping"),
        (["+node.maybe=3"], "node.maybe", "Optional[bool] is needed"),
        (["+node.part={_target_: stranger.Renamed, depth: 1}"], None, ""),
        (["+node.part={_target_: stranger.Renamed}"], "node.part.depth", "needs this argument"),
        (["+node.part={_target_: stranger.Renamed, depth: x}"], "node.part.depth", "an integer is needed"),
        (["+node.name={_target_: stranger.Renamed, depth: 1}"], "node.name", "a text is needed"),
        (["+node.nme=x"], "node.nme", "Did you mean 'name'?"),
        (["+node.given_later=3"], None, ""),
        (["node._target_=stranger.parts.Inherit"], "node._target_", "Inherits"),
        (["node._target_=stranger.part.Inherits"], "node._target_", "Did you mean 'parts'?"),
        (["node._target_=strangr.parts.Inherits"], "node._target_", "no package 'strangr'"),
        (["node._target_=stranger.parts"], "node._target_", "this is a module"),
        (["node._target_=stranger.broken.f"], "node._target_", "line 1, is not Python"),
        (["node._target_=stranger.parts.anything"], None, ""),
        (["node._target_=stranger.parts.Maker.make", "~node.rate"], None, ""),
        (["node._target_=stranger.parts.Maker.make"], "node.rate", "no such argument"),
        (["node._target_=lightning.NoSuchName"], None, ""),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_signatures(
    stranger: Callable[..., list[Problem]], arguments: list[str], key: str | None, message: str
) -> None:
    problems = stranger(*arguments)
    if key is None:
        assert problems == []
    else:
        problem = only(problems)
        assert problem.key == key
        assert message in problem.message


def test_an_experiment_file_is_checked_like_the_command_line(tmp_path: Path) -> None:
    (tmp_path / "experiment").mkdir()
    (tmp_path / "experiment" / "mine.yaml").write_text(
        "# @package _global_\ndefaults:\n  - override /model: tiny\nmodel: {topk: 2, dim: wide}\nrun: {tokens: 1e6}\n"
        "trainer: {log_every_n_steps: 5}\nbalancing: {parts: {sequence_aux: {alfa: 1.0}}}\n"
    )
    problems = check("train", ["--config-dir", str(tmp_path), "experiment=mine", "logger=none"])
    assert keys_of(problems) == ["balancing.parts.sequence_aux.alfa", "model.dim", "model.topk", "run.tokens"]
    messages = {problem.key: problem.message for problem in problems}
    assert "Did you mean 'model.top_k'?" in messages["model.topk"]
    assert "write 1000000" in messages["run.tokens"]


# --- relations


@pytest.mark.parametrize(
    ("arguments", "keys"),
    [
        (["model.top_k=9"], ["model.top_k"]),
        (["model.top_k=8"], []),
        (["router.top_k=9"], ["router.top_k"]),
        (["model.n_groups=3"], ["model.n_groups"]),
        (["model.topk_groups=5"], ["model.topk_groups"]),
        (["model.qk_rope_head_dim=7"], ["model.qk_rope_head_dim"]),
        (["model.n_dense_layers=4"], ["model.n_dense_layers"]),
        (["model.n_dense_layers=-1"], ["model.n_dense_layers"]),
        (["model.n_routed_experts=0"], ["model.n_routed_experts"]),
        (["model.moe_inter_dim=0"], ["model.moe_inter_dim"]),
        (["model.dim=-64"], ["model.dim"]),
        (["model.q_lora_rank=0"], ["model.q_lora_rank"]),
        (["model.vocab_size=100"], ["model.vocab_size"]),
        (["data.micro_batch_size=0"], ["data.micro_batch_size"]),
        (["run.tokens=0"], ["run.tokens"]),
        (["data.fim.rate=1.5"], ["data.fim.rate"]),
        (["ema.decay=-0.1"], ["ema.decay"]),
        (["data.split_punctuation_newline=2"], ["data.split_punctuation_newline"]),
        (["mtp.depth=0"], ["mtp.depth"]),
        (["mtp.depth=512", "data.sequence_length=512"], ["mtp.depth"]),
        (["trainer.max_steps=0"], ["trainer.max_steps"]),
        (["resume=nowhere/at/all.ckpt"], ["resume"]),
        (["run.dir=pyproject.toml/run"], ["run.dir"]),
        (
            ["model.top_k=99", "model.dim=0", "ema.decay=3", "seed=-1"],
            ["ema.decay", "model.dim", "model.top_k", "seed"],
        ),
    ],
    ids=lambda value: " ".join(value),
)
def test_a_relation_that_does_not_hold_is_reported(arguments: list[str], keys: list[str]) -> None:
    """tiny: 3 layers, 16 experts in 4 groups of which 2 are kept, vocabulary of the tokenizer."""
    assert keys_of(check("train", BASE + arguments)) == keys


def test_source_weights_are_positive() -> None:
    name = next(iter(OmegaConf.load(CONF / "data" / "default.yaml").sources))
    assert keys_of(check("train", [*BASE, f"data.sources.{name}.weight=0"])) == [f"data.sources.{name}.weight"]


def test_schedule_segments_end_at_one_in_order() -> None:
    segments = "schedule.segments=[{until: %s, to: 1.0, shape: linear}, {until: %s, to: 0.0, shape: linear}]"
    assert check("train", [*BASE, segments % (0.5, 1.0)]) == []
    assert keys_of(check("train", [*BASE, segments % (0.5, 0.4)])) == ["schedule.segments.1.until"]
    assert keys_of(check("train", [*BASE, segments % (0.5, 0.9)])) == ["schedule.segments.1.until"]
    assert keys_of(check("train", [*BASE, segments % (1.5, 1.0)])) == ["schedule.segments.0.until"]


def relations(config: dict[str, Any]) -> list[str]:
    return keys_of(check_relations(View(OmegaConf.create({"hydra": {"runtime": {"choices": {}}}, **config})), skip=()))


sizes = st.integers(min_value=1, max_value=24)


@given(experts=sizes, top_k=sizes, groups=sizes, kept=sizes)
def test_routers_fit_exactly_when_the_kept_groups_hold_enough_experts(
    experts: int, top_k: int, groups: int, kept: int
) -> None:
    model = {"n_routed_experts": experts, "top_k": top_k, "n_groups": groups, "topk_groups": kept}
    router = {
        "n_experts": "${model.n_routed_experts}",
        "top_k": "${model.top_k}",
        "n_groups": "${model.n_groups}",
        "topk_groups": "${model.topk_groups}",
    }
    group_of_expert = [expert % groups for expert in range(experts)]
    even = len({group_of_expert.count(group) for group in range(groups)}) == 1
    available = sum(group < kept for group in group_of_expert)
    sound = even and kept <= groups and top_k <= available
    assert (relations({"model": model, "router": router}) == []) == sound


@given(experts=sizes, top_k=sizes)
def test_a_router_without_groups_is_bound_by_all_experts(experts: int, top_k: int) -> None:
    model = {"n_routed_experts": experts, "top_k": top_k, "n_groups": 7, "topk_groups": 9}
    router = {"n_experts": "${model.n_routed_experts}", "top_k": "${model.top_k}"}
    expected = [] if top_k <= experts else ["model.top_k"]
    assert relations({"model": model, "router": router}) == expected


@given(heads=sizes, shared=sizes)
def test_heads_share_keys_evenly_where_the_attention_has_them(heads: int, shared: int) -> None:
    model = {"n_heads": heads, "n_kv_heads": shared}
    grouped = {"n_heads": "${model.n_heads}", "n_kv_heads": "${model.n_kv_heads}"}
    assert relations({"model": model, "attention": {}}) == []
    expected = [] if heads % shared == 0 else ["model.n_kv_heads"]
    assert relations({"model": model, "attention": grouped}) == expected


def test_a_config_with_none_of_the_keys_has_no_relations() -> None:
    assert relations({"other": {"key": 1}}) == []


# --- the command


def run_script(tmp_path: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """A script with the entry of train.py, which says whether anything slow was imported."""
    script = tmp_path / "entry.py"
    script.write_text(
        "import atexit, sys\n"
        "slow = ('torch', 'lightning', 'transformers', 'datasets')\n"
        "atexit.register(lambda: print('slow:', [name for name in slow if name in sys.modules]))\n"
        "from dsv3 import preflight\n"
        "preflight.check_or_exit('train', sys.argv[1:])\n"
        "print('started')\n"
    )
    return subprocess.run([sys.executable, script, *arguments], cwd=ROOT, capture_output=True, text=True, check=False)


def test_the_command_prints_all_mistakes_and_starts_nothing(tmp_path: Path) -> None:
    done = run_script(tmp_path, "model.top_k=99", "attentoin=mla", "model.dim=abc")
    assert done.returncode == 2
    assert "3 problems" in done.stderr
    assert all(given in done.stderr for given in ("model.top_k=99", "attentoin=mla", "model.dim=abc"))
    assert done.stdout == "slow: []\n"
    assert "\x1b" not in done.stderr


def test_the_command_goes_on_when_all_is_sound(tmp_path: Path) -> None:
    done = run_script(tmp_path, "model=tiny")
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout == "started\nslow: []\n"


@pytest.mark.parametrize("flags", [["--cfg", "job"], ["--hydra-help"], ["--info", "searchpath"]])
def test_flags_that_only_show_are_left_to_hydra(flags: list[str]) -> None:
    check_or_exit("train", [*flags, "no.such.key=1"])


def help_of(config_name: str, capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    with pytest.raises(SystemExit) as left:
        check_or_exit(config_name, [*arguments, "--help"])
    assert left.value.code == 0
    return capsys.readouterr().out


def leaves(tree: dict[str, Any], prefix: str = "") -> list[str]:
    return [
        key
        for name, value in tree.items()
        for key in (leaves(value, f"{prefix}{name}.") if isinstance(value, dict) else [f"{prefix}{name}"])
    ]


def test_help_names_every_group_option_and_key(capsys: pytest.CaptureFixture[str]) -> None:
    page = help_of("train", capsys)
    lines = [line.strip().removeprefix("* ") for line in page.splitlines()]
    groups = {
        group for default in OmegaConf.load(CONF / "train.yaml").defaults if default != "_self_" for group in default
    }
    for group, option in OPTIONS:
        if group in groups:
            assert group in lines
            assert any(line == option or line.startswith(f"{option} ") for line in lines), (group, option)
    for file in [CONF / "train.yaml", CONF / "model" / "small.yaml"]:
        prefix = "" if file.parent == CONF else f"{file.parent.name}."
        tree = OmegaConf.to_container(OmegaConf.load(file), resolve=False)
        assert isinstance(tree, dict)
        for key in leaves({str(name): value for name, value in tree.items() if name not in ("defaults", "hydra")}):
            assert any(line.startswith(f"{prefix}{key}=") for line in lines), key
    assert "model.dim=256  # model width d" in page
    assert "\x1b" not in page


def test_help_follows_the_options_chosen(capsys: pytest.CaptureFixture[str]) -> None:
    page = help_of("train", capsys, "model=tiny")
    assert "model.dim=64  # model width d" in page, "an option without its own comment takes that of another"
    assert "* tiny " in page


def test_help_of_evaluate_names_what_must_be_given(capsys: pytest.CaptureFixture[str]) -> None:
    assert "python evaluate.py checkpoint=..." in help_of("evaluate", capsys)
