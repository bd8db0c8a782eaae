"""The command line of the tools: `python -m dsv3 <tool> key=value ...`.

A tool is a module `dsv3/tools/<name>.py` (`<name>_.py` where the name is a keyword of Python) with

    a docstring, whose first line is the tool's summary;
    a dataclass `Options`, each field made by `option(default, help)`, with REQUIRED for a default that must be given;
    `run(options) -> dict | None`, which prints text to stdout and returns what `format=json` prints instead (what `run`
    prints then goes to stderr; `options.format` tells which it is).

Only the tool that runs is imported, and it imports what is slow inside `run`, so that mistakes show at once. A tool
with a field `overrides: list[str]` takes the keys of conf/train.yaml too, such as `model=small`. A constant FIRST names
the option that the first argument sets where it is not of the form key=value; a constant FORMATS holds further values
of `format`. Every tool takes `--config-dir DIR`, a folder of configurations of one's own: modules that lie in it or
next to it can then be imported. A tool that reads run folders has a field `allow: list[str]`; it also holds the
`_target_`s that the files in `--config-dir` name.

Exit status: 0 done; 2 a user's mistake, in the options or found while running (ValueError or OSError: its message); 130
interrupted; 1 a defect, ours or a plugin's: two lines, and a file with the traceback. DSV3_TRACEBACK=1 shows tracebacks
instead.
"""

import ast
import contextlib
import dataclasses
import importlib
import os
import sys
import sysconfig
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import ModuleType, UnionType
from typing import Annotated, Any, Union, get_args, get_origin

from hydra.errors import InstantiationException
from omegaconf import MISSING, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError

from dsv3.bounds import problem_of
from dsv3.config.compose import make_importable
from dsv3.config.known_parts import targets_in
from dsv3.config.moved import answer, moved
from dsv3.config.preflight import check
from dsv3.config.problems import NO_VALUE, Problem, did_you_mean, one_of, print_page, report, shown
from dsv3.paths import ROOT
from dsv3.runtime import imports_uncollected, interruptible, launched_rank
from dsv3.strict_json import text_of

REQUIRED: Any = MISSING
"""In place of the default of an option that must be given."""

SECONDS_FOR_RANK_ZERO = 3

ENGINES = ("auto", "eager", "onnx")
"""Choices of the option `engine` of tools that write text: see `dsv3.inference.engines`."""
ENGINE_HELP = "eager (PyTorch), or onnx (a graph, in FP32); auto: onnx on a CPU where the graph has the model's parts"

FORMATS = ("text", "json")
_FORMAT_HELP = "text, or one JSON object on stdout (everything else then goes to stderr)"


def option(default: Any, help: str, *, choices: Sequence[Any] = ()) -> Any:
    """A field of a tool's `Options`: its default (or REQUIRED), one line of help, and the values allowed, if few."""
    metadata = {"help": help, "choices": tuple(choices)}
    if isinstance(default, list | dict):
        return dataclasses.field(default_factory=lambda: type(default)(default), metadata=metadata)
    return dataclasses.field(default=default, metadata=metadata)


def main(arguments: Sequence[str], *, package: str = "dsv3.tools") -> int:
    """Run one tool and return the exit status; a mistake or defect found while it runs exits with its own.

    package: where the tools' modules lie.
    """
    with user_errors():
        return _main(arguments, package)


def _main(arguments: Sequence[str], package: str) -> int:
    tools = {path.stem.rstrip("_"): path for path in _modules(package)}
    program = f"python -m {package.partition('.')[0]}"
    if not arguments or arguments[0] in ("-h", "--help"):
        print_page(_overview(program, tools))
        return 0
    name, *rest = arguments
    rest, folder, problems = _config_dir(rest)
    if name not in tools:
        now = moved(name)
        renamed = f"this tool is now called {now}: write {program} {now}"
        message = renamed if now in tools else f"unknown tool.{did_you_mean(name, tools)}"
        report([Problem(name, NO_VALUE, message)], hint=f"Tools: {', '.join(sorted(tools))}.")
        return 2
    tool = importlib.import_module(f"{package}.{tools[name].stem}")
    if any(argument in ("-h", "--help") for argument in rest):
        print_page(_tool_help(program, name, tool))
        return 0
    options, found = _read(tool, rest, folder)
    problems += found
    if problems:
        report(problems, hint=f"{program} {name} --help explains every key.")
        return 2
    return _run(lambda: tool.run(options), as_json=options.format == "json")


def _config_dir(arguments: Sequence[str]) -> tuple[list[str], Path | None, list[Problem]]:
    """The arguments without `--config-dir DIR`, and the folder."""
    flag, rest = "--config-dir", list(arguments)
    given = [argument for argument in rest if argument == flag or argument.startswith(f"{flag}=")]
    if not given:
        return rest, None, []
    place = rest.index(given[0])
    _, equals, text = rest.pop(place).partition("=")
    if not equals:
        text = rest.pop(place) if place < len(rest) else ""
    folder = Path(text)
    if not text or not folder.is_dir():
        return rest, None, [Problem(flag, text or NO_VALUE, "must be a folder of configurations; there is none")]
    make_importable(folder)
    return rest, folder.resolve(), []


def _modules(package: str) -> list[Path]:
    folders = importlib.import_module(package).__path__
    return sorted(path for folder in folders for path in Path(folder).glob("*.py") if not path.name.startswith("_"))


def _run(call: Callable[[], dict[str, Any] | None], *, as_json: bool) -> int:
    with contextlib.redirect_stdout(sys.stderr if as_json else sys.stdout):
        result = call()
    if as_json:
        print(text_of(result or {}, indent=None))
    return 0


@contextlib.contextmanager
def user_errors(folder: Path | None = None) -> Iterator[None]:
    """Turn what ends a command early into a line on stderr and an exit status (see the top of this file).

    folder: the run folder of this process, for the traceback of a defect; without one it goes to $XDG_STATE_HOME/dsv3.
    """
    try:
        with interruptible(), imports_uncollected():
            yield
    except Exception as error:
        if os.environ.get("DSV3_TRACEBACK") == "1":
            raise
        if launched_rank():  # a mistake that all ranks find is told by the first: it ends the others while they wait
            time.sleep(SECONDS_FOR_RANK_ZERO)
            print(f"rank {launched_rank()}:", file=sys.stderr)
        mistake = error.__cause__ if isinstance(error, InstantiationException) else error
        if isinstance(mistake, ValueError | OSError):
            print(f"error: {mistake}", file=sys.stderr)
            sys.exit(2)
        if isinstance(error, InstantiationException) and isinstance(mistake, TypeError):  # a part's arguments
            print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
            sys.exit(2)
        file = _write_traceback(folder)
        what = f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
        print(f"error: {what}\n{_whose(error)}; the traceback is in {file}", file=sys.stderr)
        sys.exit(1)


def _whose(error: BaseException) -> str:
    """Whether a defect is ours or a plugin's of the user's: the last code in its traceback that is no library's."""
    libraries = (*map(sysconfig.get_path, ("stdlib", "purelib", "platlib")), "<")
    frames = [frame for frame in traceback.extract_tb(error.__traceback__) if not frame.filename.startswith(libraries)]
    ours = tuple(str(ROOT / name) for name in ("dsv3", "plugins", "data", "hydra_plugins", "train.py", "evaluate.py"))
    if frames and not frames[-1].filename.startswith(ours):
        return f"Raised in {frames[-1].filename}, line {frames[-1].lineno}, which is no part of dsv3"
    return "This is a defect of dsv3"


def _write_traceback(folder: Path | None) -> Path:
    """The current exception in full, in a file of its own."""
    state = Path(os.environ.get("XDG_STATE_HOME") or Path.home() / ".local" / "state") / "dsv3"
    place = folder if folder is not None and folder.is_dir() else state
    place.mkdir(parents=True, exist_ok=True)
    file = place / f"traceback-{time.strftime('%Y%m%d-%H%M%S')}-{os.getpid()}.txt"
    file.write_text(f"{' '.join(sys.argv)}\n{traceback.format_exc()}")
    return file


def _fields(tool: ModuleType) -> dict[str, dataclasses.Field[Any]]:
    own = ("overrides", "format")
    return {field.name: field for field in dataclasses.fields(tool.Options) if field.name not in own}


def _takes_overrides(tool: ModuleType) -> bool:
    return any(field.name == "overrides" for field in dataclasses.fields(tool.Options))


def _read(tool: ModuleType, arguments: Sequence[str], folder: Path | None) -> tuple[Any, list[Problem]]:
    """The tool's Options, with the output format in `format`, and every mistake in the arguments."""
    fields = _fields(tool)
    config = OmegaConf.structured(tool.Options)
    output = FORMATS[0]
    overrides: list[str] = []
    problems: list[Problem] = []
    for place, argument in enumerate(arguments):
        key, equals, text = argument.partition("=")
        if place == 0 and not equals and hasattr(tool, "FIRST"):
            key, equals, text = tool.FIRST, "=", argument
        if key == "format" and equals:
            output, allowed = text, (*FORMATS, *getattr(tool, "FORMATS", ()))
            problems += [] if text in allowed else [Problem(key, text, one_of(allowed, text))]
        elif key in fields and equals:
            problems += _set(config, fields[key], text)
        elif message := answer(key, text, fields):
            problems.append(Problem(key, text, message))
        elif _takes_overrides(tool) and (equals or key.startswith("~")):
            overrides.append(argument)
        elif not equals:
            problems.append(Problem(argument, NO_VALUE, "must be key=value"))
        else:
            problems.append(Problem(key, text, f"unknown key.{did_you_mean(key, [*fields, 'format'])}"))
    failed = {problem.key for problem in problems}
    for key, field in fields.items():
        if OmegaConf.is_missing(config, key) and key not in failed:
            problems.append(Problem(key, NO_VALUE, f"required: {field.metadata['help']}"))
    if folder is not None and _takes_overrides(tool):
        overrides = ["--config-dir", str(folder), *overrides]
    if overrides:
        problems += check("train", overrides, also=[*fields, "format"])
    if problems:
        return None, problems
    options: Any = OmegaConf.to_object(config)
    options.format = output
    if folder is not None and hasattr(options, "allow"):
        options.allow += targets_in(folder)
    if overrides:  # set as they stand: they may hold interpolations that only Hydra resolves
        options.overrides = overrides
    return options, []


def _set(config: Any, field: dataclasses.Field[Any], text: str) -> list[Problem]:
    """Set one option from its text. Text options take it as it stands; all others are read as YAML."""
    is_text = _type(field).startswith("str") and not (text == "null" and "None" in _type(field))
    try:
        value = text.replace("${", r"\${") if is_text else OmegaConf.create(f"value: {text}").value
        OmegaConf.update(config, field.name, value)
    except (OmegaConfBaseException, YAMLError):
        return [Problem(field.name, text, f"must be of type {_type(field)}{_example(field)}")]
    if problem := problem_of(field.type, config[field.name]):
        return [Problem(field.name, text, problem)]
    choices = field.metadata["choices"]
    if choices and config[field.name] not in choices:
        return [Problem(field.name, text, one_of(choices, text))]
    return []


def _type(field: dataclasses.Field[Any]) -> str:
    """An option's type without its range, e.g. `int` or `str | None`."""
    if get_origin(field.type) in (Union, UnionType):
        return " | ".join(_name(kind) for kind in get_args(field.type))
    return _name(field.type)


def _name(kind: Any) -> str:
    plain = kind.__origin__ if get_origin(kind) is Annotated else kind
    return "None" if plain is type(None) else plain.__name__ if type(plain) is type else str(plain)


def _default(field: dataclasses.Field[Any]) -> Any:
    made = field.default_factory
    return field.default if made is dataclasses.MISSING else made()


def _example(field: dataclasses.Field[Any]) -> str:
    default = _default(field)
    return "" if default is None or default == REQUIRED else f", such as the default {shown(default)}"


def _overview(program: str, tools: dict[str, Path]) -> Iterator[str]:
    yield from (f"{program} <tool> [key=value ...]", "", "TOOLS")
    width = max((len(name) for name in tools), default=0)
    for name, path in sorted(tools.items()):
        docstring = ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or ""
        yield f"  {name:<{width}}  {docstring.partition(chr(10))[0]}"
    yield from ("", f"{program} <tool> --help explains the tool's keys.")
    yield "Training and evaluation have scripts of their own: python train.py --help, python evaluate.py --help."


def _tool_help(program: str, name: str, tool: ModuleType) -> Iterator[str]:
    yield from (tool.__doc__ or "").strip().splitlines()
    first = f" [{tool.FIRST}]" if hasattr(tool, "FIRST") else ""
    yield from ("", "USAGE", f"  {program} {name}{first} [key=value ...]", "", "KEYS")
    for field in _fields(tool).values():
        default = _default(field)
        given = "(required)" if default == REQUIRED else f"= {shown(default) or repr(default)}"
        allowed = f" One of: {', '.join(map(shown, field.metadata['choices']))}." if field.metadata["choices"] else ""
        yield f"  {field.name}: {_type(field)} {given}  # {field.metadata['help']}{allowed}"
    more = "".join(f"; or {name}: see above" for name in getattr(tool, "FORMATS", ()))
    yield f"  format: str = text  # {_FORMAT_HELP}{more}"
    yield "  --config-dir DIR  # a folder of configurations of one's own, for parts that lie outside the project"
    if _takes_overrides(tool):
        yield "  Any group=option or key=value of `python train.py --help`, too."
