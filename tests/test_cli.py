"""The command line of the tools, on tools of the tests' own and on the shipped ones."""

import gc
import json
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
from hydra.errors import InstantiationException
from hydra.utils import instantiate

from dsv3.cli import main, user_errors
from dsv3.paths import CONF
from dsv3.runtime import set_up_process
from dsv3.strict_json import text_of

ROOT = CONF.parent

ECHO = '''"""Say the options back.

More about it.
"""
from dataclasses import dataclass, field
from pathlib import Path

from dsv3.cli import REQUIRED, option


@dataclass
class Options:
    source: Path = option(REQUIRED, "what to read")
    count: int = option(3, "how many")
    rate: float = option(0.5, "how often")
    loud: bool = option(False, "whether to shout")
    prompt: str = option("", "a text")
    name: str | None = option(None, "a name")
    items: list[str] = option(["a"], "some words")
    unit: str = option("token", "of what", choices=("token", "byte"))


def run(options):
    print("said aloud")
    if options.prompt == "fail":
        raise ValueError("prompt=fail: it\\nfailed")
    if options.prompt == "defect":
        raise KeyError("defect")
    if options.prompt == "interrupt":
        raise KeyboardInterrupt
    return {"format": options.format, "loss": float("nan"), "source": str(options.source), "count": options.count,
            "rate": options.rate, "loud": options.loud, "prompt": options.prompt, "name": options.name,
            "items": options.items, "unit": options.unit}
'''
PLAN = '''"""Take the keys of a training run."""
from dataclasses import dataclass

from dsv3.cli import option


@dataclass
class Options:
    context: int = option(4096, "positions")
    overrides: list[str] = option([], "of conf/train.yaml")


def run(options):
    return {"context": options.context, "overrides": options.overrides}
'''


@dataclass
class Said:
    status: int
    out: str
    err: str


@pytest.fixture
def dsv3(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[..., Said]:
    """dsv3(*arguments): what the command says, with the tools `echo`, `import`, `plan` and `slow`."""
    package = f"tools_{tmp_path.name}"
    folder = tmp_path / package
    folder.mkdir()
    (folder / "__init__.py").write_text("")
    (folder / "echo.py").write_text(ECHO)
    (folder / "import_.py").write_text(PLAN.replace("Take the keys", "Bring in the keys"))
    (folder / "plan.py").write_text(PLAN)
    (folder / "slow.py").write_text('"""Must not be imported by a list."""\nraise RuntimeError\n')
    monkeypatch.syspath_prepend(str(tmp_path))

    def call(*arguments: str) -> Said:
        try:
            status = main(arguments, package=package)
        except SystemExit as left:
            status = int(str(left.code))
        return Said(status, *capsys.readouterr())

    return call


@pytest.mark.parametrize("arguments", [(), ("--help",), ("-h",)])
def test_tools_are_listed_without_importing_them(dsv3: Callable[..., Said], arguments: tuple[str, ...]) -> None:
    said = dsv3(*arguments)
    assert said.status == 0
    lines = [line.split(maxsplit=1) for line in said.out.splitlines()]
    assert ["echo", "Say the options back."] in lines
    assert ["import", "Bring in the keys of a training run."] in lines
    assert ["slow", "Must not be imported by a list."] in lines


def test_a_name_that_is_a_keyword_of_python_is_a_tool(dsv3: Callable[..., Said]) -> None:
    assert json.loads(dsv3("import", "format=json").out) == {"context": 4096, "overrides": []}


def test_an_unknown_tool_is_named_with_the_nearest(dsv3: Callable[..., Said]) -> None:
    said = dsv3("ecko", "count=3")
    assert said.status == 2
    assert "Did you mean 'echo'?" in said.err
    assert "echo, import, plan, slow" in said.err


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["picture", "run=somewhere"], "picture: this tool is now called plot: write python -m dsv3 plot"),
        (["plan", "zero=0"], "zero=0: this key is now called zero_stage: write zero_stage=0"),
        (["plan", "sequence=64"], "sequence=64: this key is now called seq_len: write seq_len=64"),
        (["plan", "micro_batches=4"], "this key is now called num_microbatches: write num_microbatches=4"),
    ],
)
def test_an_old_name_of_a_tool_or_an_option_is_answered_with_the_new_one(
    arguments: list[str], told: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(arguments) == 2
    assert told in capsys.readouterr().err


def test_help_explains_each_key(dsv3: Callable[..., Said]) -> None:
    page = dsv3("echo", "count=x", "--help").out
    assert page.startswith("Say the options back.")
    for line in [
        "source: Path (required)  # what to read",
        "count: int = 3  # how many",
        "prompt: str = ''  # a text",
        "name: str | None = null  # a name",
        "items: list[str] = [a]  # some words",
        "unit: str = token  # of what One of: token, byte.",
        "format: str = text",
    ]:
        assert f"  {line}" in page


def test_text_is_printed_and_json_is_one_object(dsv3: Callable[..., Said]) -> None:
    arguments = ("echo", "source=here", "count=7", "rate=2e-3", "loud=true", "name=me", "items=[x, y]", "unit=byte")
    text = dsv3(*arguments)
    assert (text.status, text.out, text.err) == (0, "said aloud\n", "")
    said = dsv3(*arguments, "format=json")
    assert (said.status, said.err) == (0, "said aloud\n")
    assert json.loads(said.out) == {
        "format": "json",
        "loss": None,
        "source": "here",
        "count": 7,
        "rate": 0.002,
        "loud": True,
        "prompt": "",
        "name": "me",
        "items": ["x", "y"],
        "unit": "byte",
    }


@pytest.mark.parametrize(
    "prompt", ["def f(x, y): return {x: [y]}", "a=b", "null", "3", "${HOME} \\n", "'quoted'", "# no"]
)
def test_text_options_are_taken_as_they_stand(dsv3: Callable[..., Said], prompt: str) -> None:
    assert json.loads(dsv3("echo", "source=here", f"prompt={prompt}", "format=json").out)["prompt"] == prompt


def test_null_unsets_an_optional_text(dsv3: Callable[..., Said]) -> None:
    assert json.loads(dsv3("echo", "source=here", "name=null", "format=json").out)["name"] is None


def test_all_mistakes_are_reported_together(dsv3: Callable[..., Said]) -> None:
    wrong = ["cuont=3", "count=many", "rate=[", "loud=maybe", "unit=bytes", "items=x", "format=xml", "bare"]
    said = dsv3("echo", *wrong)
    assert (said.status, said.out) == (2, "")
    assert "9 problems" in said.err
    for message in [
        "cuont=3: unknown key. Did you mean 'count'?",
        "count=many: must be of type int, such as the default 3",
        "rate=[: must be of type float",
        "loud=maybe: must be of type bool",
        "unit=bytes: must be one of token, byte. Did you mean 'byte'?",
        "items=x: must be of type list[str]",
        "format=xml: must be one of text, json",
        "bare: must be key=value",
        "source: required: what to read",
    ]:
        assert message in said.err


def test_overrides_go_to_a_tool_that_declares_them(dsv3: Callable[..., Said]) -> None:
    said = dsv3("plan", "model=tiny", "context=8", "model.top_k=1", "~callbacks.ema", "format=json")
    assert json.loads(said.out) == {"context": 8, "overrides": ["model=tiny", "model.top_k=1", "~callbacks.ema"]}


def test_overrides_are_checked_with_the_options(dsv3: Callable[..., Said]) -> None:
    said = dsv3("plan", "contxt=8", "context=x", "modle=tiny", "model.top_k=999")
    assert said.status == 2
    assert "4 problems" in said.err
    assert "Did you mean 'context'?" in said.err
    assert "Did you mean 'model'?" in said.err
    assert "model.top_k=999: must be between 1 and" in said.err


def test_a_users_mistake_is_told_without_a_traceback(
    dsv3: Callable[..., Said], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("DSV3_TRACEBACK", raising=False)
    said = dsv3("echo", "source=here", "prompt=fail", "format=json")
    assert (said.status, said.out, said.err) == (2, "", "said aloud\nerror: prompt=fail: it\nfailed\n")
    monkeypatch.setenv("DSV3_TRACEBACK", "1")
    with pytest.raises(ValueError, match="failed"):
        dsv3("echo", "source=here", "prompt=fail")


def test_a_mistake_found_while_a_part_is_made_is_told_alone(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("DSV3_TRACEBACK", raising=False)
    with pytest.raises(SystemExit), user_errors():
        instantiate({"_target_": "ast.literal_eval", "_args_": ["1 + x"]})
    assert capsys.readouterr().err.startswith("error: malformed node")
    with pytest.raises(SystemExit) as left, user_errors():
        instantiate({"_target_": "tests.test_cli.Said", "statos": 1})
    assert left.value.code == 2
    told = capsys.readouterr().err
    assert "statos" in told
    assert len(told.splitlines()) == 1
    monkeypatch.setenv("DSV3_TRACEBACK", "1")
    with pytest.raises(InstantiationException), user_errors():
        instantiate({"_target_": "operator.truediv", "_args_": [1, 0]})


@pytest.mark.parametrize("place", ["state", "run folder"])
def test_a_defect_is_one_line_and_a_file_with_the_traceback(
    tmp_path: Path, place: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    folder = tmp_path / "run"
    if place == "run folder":
        folder.mkdir()
    with pytest.raises(SystemExit) as left, user_errors(folder):
        raise KeyError("a defect\nof two lines")
    assert left.value.code == 1
    expected = folder if place == "run folder" else tmp_path / "state" / "dsv3"
    (file,) = expected.glob("traceback-*.txt")
    assert 'raise KeyError("a defect' in file.read_text()
    told = capsys.readouterr().err.splitlines()
    assert told[0].startswith("error: KeyError: ")
    assert told[1].startswith(f"Raised in {__file__}, line "), "a file of the user's"
    assert told[1].endswith(str(file))
    assert len(told) == 2


def test_a_defect_of_ours_is_called_ours(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path))
    with pytest.raises(SystemExit), user_errors():
        text_of([1], indent=[])  # type: ignore[arg-type]  # raised in the standard library, called by ours
    assert "This is a defect of dsv3; " in capsys.readouterr().err


def test_an_option_out_of_its_range_is_found_before_the_tool_runs(capsys: pytest.CaptureFixture[str]) -> None:
    for argument, message in {
        "temperature=nan": "must be a finite number",
        "top_p=1.5": "must be between 0 and 1",
        "max_tokens=0": "must be above 0",
        "seed=1180591620717411303424": "must be between 0 and 4,294,967,295",
    }.items():
        assert main(["generate", "checkpoint=/nowhere", argument]) == 2
        assert f"{argument}: {message}" in capsys.readouterr().err


def test_an_interrupt_has_its_own_status(dsv3: Callable[..., Said]) -> None:
    said = dsv3("echo", "source=here", "prompt=interrupt")
    assert (said.status, said.err) == (130, "interrupted\n")


def test_the_module_lists_the_shipped_tools_and_imports_nothing_slow() -> None:
    code = (
        "import sys; sys.argv = ['dsv3']; import runpy\n"
        "try: runpy.run_module('dsv3', run_name='__main__')\n"
        "finally: print([name for name in ('torch', 'lightning', 'transformers') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    listed = {line.split()[0] for line in done.stdout.splitlines() if line.startswith("  ")}
    shipped = {path.stem.rstrip("_") for path in (ROOT / "dsv3" / "tools").glob("[!_]*.py")}
    assert listed == shipped
    assert done.stdout.rstrip().endswith("[]")


def test_garbage_is_looked_for_seldom_until_the_process_is_set_up() -> None:
    usual = gc.get_threshold()
    with user_errors():
        assert gc.get_threshold()[0] > 10 * usual[0]
        set_up_process()
        assert gc.get_threshold() == usual
    with pytest.raises(SystemExit), user_errors():
        raise ValueError("a mistake")
    assert gc.get_threshold() == usual
