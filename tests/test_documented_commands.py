"""Every command that a page shows is run, as it stands but for its size.

In a folder with runs, texts and rows of the names that pages use, each command of the project runs as a process of its
own, one after another in the order of the pages. What is cut:

- training: the tiny model, a small corpus where the default one is meant, two steps, no benchmarks unless they are
  named, one seed of a study, one run at a time, two ranks, no compiled kernels, a folder for each;
- evaluation: one document of each task; sampling: a few texts of a few tokens;
- servers are stopped when they have said where they are; `make` says what it would do.

Commands that need what is not here are marked in the page (tests/documented.py).
"""

import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.commands import attempt, call, start
from tests.conftest import ROOT
from tests.documented import Command, commands, write_files

pytestmark = pytest.mark.slow  # minutes

COMMANDS = list({command.line: command for command in commands() if not command.needs}.values())
SET_UP = ("source .venv/bin/activate",)

SIZES = ("model=tiny", "data.sequence_length=256", "data.micro_batch_size=2", "data.global_batch_size.peak=4")
TRAINING = (
    *SIZES,
    "tokenizer.vocab_size=320",
    "trainer.max_steps=2",
    "run.tokens=4096",
    "logger=none",
    "benchmarks=none",
)
DROPPED = ("precision.compile_quantiser", "hydra/launcher", "hydra.launcher.n_jobs", "study.arms.fp8_blockwise")
"""Keys that a tiny run does not keep."""
GRID = (
    "data.sequence_length=64",
    "data.micro_batch_size=1",
    "data.global_batch_size.peak=1",
    "study.grid.widths=[32,48,64]",
    "study.grid.steps=[40,300]",
    "run.validate_every_tokens=1_000_000",
)
"""Of a scaling law, which sets the tokens of its runs: as many runs as a law is fitted to, or, of two arms, fewer."""
TOOLS = {
    "generate": ("max_tokens=4",),
    "pairs": ("count=4", "samples=2", "max_tokens=4"),
    "answers": ("count=4", "samples=2", "max_tokens=4"),
    "demonstrate": ("episodes=2",),
    "serve": ("port=0",),
    "dashboard": ("port=0",),
}
EPISODES = {"babyai": ("goto", "pickup", "open", "putnext", "pick_up_seq_go_to"), "babyai_prompts": ("babyai",)}
"""Sources of demonstrations, of which a few will do."""
OWN_DATA = ("babyai", "chat", "grpo")
"""What the experiments begin with whose data is no text."""
SERVERS = ("serve", "dashboard")

RUNS = [
    "runs/default/seed1",
    "runs/default/sft",
    "runs/default/texts",
    "runs/default/square",
    "runs/default/grpo",
    "runs/chat/seed1",
    "runs/a",
    "runs/b",
    "runs/teacher",
    "runs/student",
    "runs/plans",
    "RUN",
    "OTHER",
]
PLACES = {
    "my_tasks": "my_tasks",
    "~/texts": "texts",
    "/home/me/src": "src",
    "/models/hf_checkpoint": "models/hf_checkpoint",
}
PAIR = '{"prompt": "a", "chosen": "b", "rejected": "c"}\n'
CHAT = '{"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}\n'


@pytest.fixture(scope="module")
def workspace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where a reader would be: a trained run under every name, its exports, texts, rows, and the tutorials' files."""
    folder = tmp_path_factory.mktemp("reader")
    for name, source in {"texts": ROOT / "docs", "src": ROOT / "plugins"}.items():
        shutil.copytree(source, folder / name, ignore=shutil.ignore_patterns("*.png", "*.pyc", "*.ipynb"))
    write_files(folder)
    (folder / "pairs.jsonl").write_text(PAIR * 200)
    (folder / "answers.jsonl").write_text(CHAT * 200)
    (folder / "demos.jsonl").write_text(CHAT * 200)
    first = folder / RUNS[0]
    intervals = ("trainer.max_steps=4", "callbacks.monitor.every_tokens=1024")  # as many as eplb asks for
    keys = ("router.group_score_top=2", searched(folder), f"run.dir={first}", *intervals)
    call(folder, "train.py", *small_corpus(folder), *set_keys([*TRAINING], *keys))
    for name in RUNS[1:]:
        shutil.copytree(first, folder / name)
    for peak in ("0.001", "0.002"):
        keys = (searched(folder), f"run.dir=runs/sweep/{peak}", f"schedule.peak={peak}", "balancing=loss_free")
        call(folder, "train.py", *small_corpus(folder), *TRAINING, *keys, "model.top_k=4")
    call(folder, "-m", "dsv3", "export", f"checkpoint={first}", "out=models/hf_checkpoint")
    call(folder, "-m", "dsv3", "export", f"checkpoint={first}", "out=DIR", "format=onnx")
    return folder


def here(word: str, folder: Path) -> str:
    """With the places that pages name as places of the workspace."""
    for name, place in PLACES.items():
        word = word.replace(name, str(folder / place))
    return word


def searched(folder: Path) -> str:
    return f"hydra.searchpath=[file://{ROOT}/tests/conf,file://{folder}/conf]"


def small_corpus(folder: Path) -> list[str]:
    source = "{{_target_: data.sources.local_files, path: {}, text_column: text, weight: 1.0}}"
    domains = {"code": folder / "src", "prose": folder / "texts"}
    sources = [f"+data.sources.{name}={source.format(place)}" for name, place in domains.items()]
    return ["data=small_files", *sources]


def key_of(word: str) -> str:
    return word.lstrip("+").partition("=")[0]


def set_keys(words: list[str], *overrides: str) -> list[str]:
    """The words with these overrides in place of others of the same keys."""
    keys = {*map(key_of, overrides), *DROPPED}
    return [*(word for word in words if key_of(word) not in keys), *overrides]


def cut_training(words: list[str], folder: Path, number: int) -> list[str]:
    """The keys of a training command, for a run of seconds."""
    given = {key_of(word): word.partition("=")[2] for word in words}
    sizes = [each for each in TRAINING if key_of(each) != "benchmarks" or "benchmarks" not in given]
    if "data" not in given and not given.get("experiment", "").startswith(OWN_DATA):
        sizes += small_corpus(folder)
    if "experiment" in given:
        sizes.append("study.seeds=[1]")
    else:
        sizes.append("seed=1" if "-m" in words else f"run.dir=runs/commands/{number}")
    if given.get("experiment") == "scaling_law":
        sizes = [each for each in sizes if key_of(each) not in ("trainer.max_steps", "run.tokens", *map(key_of, GRID))]
        sizes += [*GRID, f"study.grid.flops={'[3e9]' if 'study.baseline' in given else '[3e9,3.5e9,4e9]'}"]
    sizes += [f"{key}=2" for key in ("trainer.devices", "parallel.stages") if key in given]
    return set_keys(words, searched(folder), *sizes, *few_episodes(words))


def few_episodes(words: list[str]) -> list[str]:
    given = {key_of(word): word.partition("=")[2] for word in words}
    sources = EPISODES.get(given.get("data", given.get("experiment", "").removesuffix("_imitation")), ())
    return [f"data.sources.{name}.episodes=4" for name in sources if f"data.sources.{name}" not in given]


def prepared(command: Command, folder: Path, number: int) -> list[str]:
    """The words after `python`."""
    words = [here(word, folder) for word in shlex.split(command.line)]
    words = ["-m", *words] if words[0] == "dsv3" else words[1:]
    if words[0] == "train.py":
        return ["train.py", *cut_training(words[1:], folder, number)]
    if words[0] == "evaluate.py":
        return ["evaluate.py", *set_keys(words[1:], "limit=1", f"out={folder}/evaluation.json")]
    if words[1] == "data" and words[2] != "demonstrate":
        return [*words[:3], *set_keys(words[3:], "data.sequence_length=256", "run.tokens=4096", *few_episodes(words))]
    if words[2] == "work":  # the queue names options of the tests
        words += ["--config-dir", str(ROOT / "tests" / "conf")]
    if words[2] == "loss_error":
        words = [re.sub(r",[^,]*/seed[23]", "", word) for word in words]
    cut = TOOLS.get(words[2], ()) if len(words) > 2 else ()
    out = [f"out=out{number}"] if any(word.startswith("out=") for word in words) else []
    return [*words[:3], *set_keys(words[3:], *cut, *out)]


@pytest.mark.parametrize("number", range(len(COMMANDS)), ids=[f"{c.page}: {c.line[:90]}" for c in COMMANDS])
def test_a_command_of_a_page_runs(workspace: Path, number: int) -> None:
    command = COMMANDS[number]
    if command.line in SET_UP:
        return
    if command.line.startswith("make "):
        ended = run(["make", "--dry-run", *command.line.split()[1:]], ROOT)
    elif not command.is_ours:
        assert command.line.startswith("python my_folder/"), "unknown: mark its block, or make it one of `text`"
        ended = run([sys.executable, command.line.removeprefix("python ")], workspace)
    else:
        words = prepared(command, workspace, number)
        if words[2] in SERVERS and "wandb" not in words:
            return serves(workspace, words)
        with_password = words[2] == "accounts"
        ended = run([sys.executable, *words], workspace) if with_password else attempt(workspace, *words)
    assert ended.returncode == 0, f"{command.line}\n{ended.args}\n{ended.stdout[-2000:]}\n{ended.stderr[-3000:]}"


def run(words: list[str], folder: Path) -> subprocess.CompletedProcess[str]:
    """Of a new interpreter, with a password to read."""
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    return subprocess.run(words, cwd=folder, env=environment, input="a long password\n", capture_output=True, text=True)


def serves(folder: Path, words: list[str]) -> None:
    running = start(folder, *words)
    output = Path(running.output.name, "stderr")
    for _ in range(2400):
        if (output.exists() and "http://" in output.read_text()) or running.returncode is not None:
            break
        time.sleep(0.1)
    assert running.returncode is None, running.read("stderr")
    running.send_signal(signal.SIGINT)
    running.communicate()
    assert running.returncode in (0, 130), running.read("stderr")
