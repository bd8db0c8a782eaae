"""Preflight of types: those of the defaults, and those of signatures where there are any."""

from collections.abc import Callable
from pathlib import Path

import pytest

from dsv3.config.preflight import check
from dsv3.config.problems import Problem
from tests.config.looking import keys_of, only

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
        ("integer=null", "must be an integer"),
        ("integer=4.5", "must be an integer"),
        ("integer=4e2", "write 400"),
        ("integer=true", "must be an integer"),
        ("integer='4'", "write 4 without quotes"),
        ("integer={a: 1}", "must be an integer"),
        ("number=1", None),
        ("number=1e-3", None),
        ("number=true", "must be a number"),
        ("number='1e-3'", "write 1e-3 without quotes"),
        ("truth=False", None),
        ("truth=1", "must be true or false"),
        ("truth=no", "must be true or false"),
        ("text=more words", None),
        ("text=1", "must be a text"),
        ("text=[a]", "must be a text"),
        ("items=[]", None),
        ("items=3", "must be a list"),
        ("nothing=3", None),
        ("nothing={a: b}", None),
        ("part=3", "must be a mapping"),
        ("part={inner: x}", "must be an integer"),
    ],
)
def test_type_table(types: list[str], argument: str, needed: str | None) -> None:
    problems = check("types", [*types, argument])
    if needed is None:
        assert problems == []
    else:
        assert needed in only(problems).message


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
        (["size=x"], "size", "must be an integer, such as the default 4 (node.size of Inherits)"),
        (["node.size=x"], "node.size", "must be an integer"),
        (["node.rate=fast"], "node.rate", "must be a number"),
        (["+node.limit=null"], None, ""),
        (["+node.limit=x"], "node.limit", "must be an integer or null"),
        (["+node.order=last"], None, ""),
        (["+node.order=lst"], "node.order", "Did you mean 'last'?"),
        (["+node.pair=[1,2.5]"], None, ""),
        (["+node.pair=[1]"], "node.pair", "a list"),
        (["+node.many=[1,x]"], "node.many", "a list"),
        (["+node.many=3"], "node.many", "a list"),
        (["+node.table={a: 1}"], None, ""),
        (["+node.table=3"], "node.table", "a mapping"),
        (["+node.maybe=3"], "node.maybe", "must be Optional[bool]"),
        (["+node.part={_target_: stranger.Renamed, depth: 1}"], None, ""),
        (["+node.part={_target_: stranger.Renamed}"], "node.part.depth", "needs this argument"),
        (["+node.part={_target_: stranger.Renamed, depth: x}"], "node.part.depth", "must be an integer"),
        (["+node.name={_target_: stranger.Renamed, depth: 1}"], "node.name", "must be a text"),
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


@pytest.mark.parametrize(
    ("argument", "key", "message"),
    [
        ("reward.terms.right.weight=0", "reward.terms.right.weight", "must be above 0"),
        ("reward.terms.right.weight=much", "reward.terms.right.weight", "must be a number"),
        ("+reward.terms.more={weight: 1}", "reward.terms.more.reward", "needs this argument"),
        ("+reward.terms.more={reward: null, wait: 1, weight: 1}", "reward.terms.more.wait", "It takes reward, weight."),
        ("reward.terms.form.reward.pattern=7", "reward.terms.form.reward.pattern", "must be a text"),
        ("reward.terms.right.reward.rewards.code_tests.seconds=0", None, "must be above 0"),
    ],
)
def test_mappings_of_arguments_by_name(argument: str, key: str | None, message: str) -> None:
    problem = only(check("train", ["reward=weighted_sum", argument]))
    assert problem.key == (key or argument.partition("=")[0])
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
