"""Preflight as a user meets it: the commands and their help."""

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from omegaconf import OmegaConf

from dsv3.config.preflight import check_or_exit
from dsv3.paths import CONF
from tests.config.looking import OPTIONS

ROOT = CONF.parent


def run_script(tmp_path: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """A script with the entry of train.py, which says whether anything slow was imported."""
    script = tmp_path / "entry.py"
    script.write_text(
        "import atexit, sys\n"
        "slow = ('torch', 'lightning', 'transformers', 'datasets')\n"
        "atexit.register(lambda: print('slow:', [name for name in slow if name in sys.modules]))\n"
        "from dsv3.config import preflight\n"
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
