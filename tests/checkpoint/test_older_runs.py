"""A run, its checkpoint and its export from before the packages were in layers still open.

`tests/golden/run_of_before.tar.gz` was made at commit 1fc46de: six steps of a tiny model on twelve small files, and the
texts and scores that it gave there.
"""

import json
import tarfile
from pathlib import Path
from typing import Any

import pytest
import torch
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf

from dsv3.checkpoint.loading import load_run
from dsv3.checkpoint.run_folder import RunFolder
from dsv3.cli import main
from dsv3.evaluation.evaluate import evaluate
from dsv3.paths import CONF
from dsv3.training.resume import refuse_other_settings
from tests.conftest import ROOT

SETTINGS = {
    "greedy": [],
    "filled": ["suffix=return"],
    "sampled": ["temperature=0.9", "seed=4", "top_p=0.9"],
    "drafted": ["speculative=true"],
    "averaged": ["weights=ema"],
}


@pytest.fixture(scope="module")
def before(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder with `run`, `export`, `texts` and `expected.json`."""
    folder = tmp_path_factory.mktemp("before")
    with tarfile.open(ROOT / "tests" / "golden" / "run_of_before.tar.gz") as archive:
        archive.extractall(folder, filter="data")
    for name in ("config.yaml", "summary.json"):
        path = folder / "run" / name
        text = path.read_text()
        for mark, place in {"TEXTS": "texts", "CACHE": "cache", "RUN": "run"}.items():
            text = text.replace(f" {mark}\n", f" {folder / place}\n").replace(f'"{mark}"', f'"{folder / place}"')
        path.write_text(text)
    return folder


@pytest.fixture(scope="module")
def expected(before: Path) -> dict[str, Any]:
    return json.loads((before / "expected.json").read_text())


@pytest.mark.parametrize("name", SETTINGS)
def test_generate_writes_the_same_text(
    before: Path, expected: dict[str, Any], name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    call = ["generate", f"checkpoint={before / 'run'}", "prompt=def ", "max_tokens=24", "format=json"]
    assert main([*call, *SETTINGS[name]]) == 0
    assert json.loads(capsys.readouterr().out)["text"] == expected["texts"][name]


def test_evaluate_gives_the_same_scores(before: Path, expected: dict[str, Any]) -> None:
    out = before / "scores.json"
    with initialize_config_dir(str(CONF), version_base="1.3"):
        evaluate(compose("evaluate", overrides=[f"checkpoint={before / 'run'}", f"out={out}"]))
    now, then = json.loads(out.read_text()), expected["scores"]
    for weights in ("live", "ema"):
        for domain, scores in then["weights"][weights]["domains"].items():
            assert now["weights"][weights]["domains"][domain] == pytest.approx(scores, rel=1e-5)
    assert now["expert_load"] == then["expert_load"]


def test_report_is_written(before: Path) -> None:
    assert main(["report", str(before / "run")]) == 0
    page = (before / "run" / "report.html").read_text()
    assert "Training loss" in page
    assert "mtp1_loss" in page


def test_its_export_is_read_back(before: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["import", f"path={before / 'export'}", f"out={before / 'imported'}", "format=json"]) == 0
    ours, theirs = load_run(before / "run").model, load_run(before / "imported").model
    live = ours.state_dict()
    for name, tensor in theirs.state_dict().items():
        if name in live and not name.endswith("counts"):
            torch.testing.assert_close(tensor, live[name], rtol=0, atol=0, msg=name)


def test_its_settings_are_those_of_todays_keys(before: Path) -> None:
    """What `guard`, `ema`, `monitor` and `diagnostics` said counts for `callbacks`; another value is refused."""
    folder = RunFolder(before / "run")
    with initialize_config_dir(str(CONF), version_base="1.3"):
        today = compose("train", overrides=["callbacks.monitor.every_tokens=512"])
    asked = OmegaConf.create(OmegaConf.to_container(OmegaConf.load(folder.config_path)))
    for part in ("objective", "callbacks"):
        asked[part] = today[part]
    asked.model.n_groups = today.model.n_groups = 2  # what callbacks interpolate
    asked = OmegaConf.create(OmegaConf.to_container(asked, resolve=True))
    for key in ("guard", "ema", "monitor", "diagnostics"):
        del asked[key]
    refuse_other_settings(asked, folder)
    asked.callbacks.ema.decay = 0.5
    with pytest.raises(ValueError, match=r"callbacks\.ema\.decay: 0\.99 there, 0\.5 now"):
        refuse_other_settings(asked, folder)
