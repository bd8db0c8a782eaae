"""`python -m dsv3 eplb`: what it prints and writes, on which intervals, and how it takes mistakes."""

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from omegaconf import OmegaConf

from dsv3.checkpoint.run_folder import RunFolder
from dsv3.cli import main

DEPLOYMENT = ("gpus=4", "nodes=2", "redundant=4")
EVEN = [[5] * 8, [5] * 8]
EARLY = [[9, 1, 1, 1, 1, 1, 1, 1], [0] * 8]  # by domain: code, prose
LATE = [[9, 1, 1, 1, 1, 1, 1, 1], [1, 1, 1, 1, 1, 1, 1, 17]]


def made(path: Path, *loads: Any, experts: int = 8) -> Path:
    """A run with one interval of 100 tokens for each of these loads, the same in two layers."""
    folder = RunFolder(path)
    folder.path.mkdir()
    router = {"n_groups": 4} if experts else {}
    OmegaConf.save(OmegaConf.create({"router": router}), folder.config_path)
    for number, load_XE in enumerate(loads, 1):
        for layer in ("layers.1", "mtp.0"):
            row = {"tokens": 100 * number, "layer": layer, "domains": ["code", "prose"]}
            folder.table("metrics/routing").append(row | {"domain_load": np.array(load_XE).flatten().tolist()})
        folder.flush(100 * number)
    return path


def test_is_fitted_to_the_third_quarter_and_tested_on_the_last(tmp_path: Path, capsys: Any) -> None:
    run = made(tmp_path / "run", EVEN, EVEN, EARLY, LATE)
    assert main(["eplb", f"run={run}", *DEPLOYMENT, "format=json"]) == 0
    printed = capsys.readouterr()
    result = json.loads(printed.out)
    assert result["intervals"] == {
        "fit": {"number": 1, "from_tokens": 200, "to_tokens": 300},
        "test": {"number": 1, "from_tokens": 300, "to_tokens": 400},
    }
    assert (result["policy"], result["slots_per_gpu"], list(result["layers"])) == (
        "hierarchical", 3, ["layers.1", "mtp.0"],
    )  # fmt: skip
    layer = result["layers"]["layers.1"]
    assert layer["peak"]["fit"]["before"] == 10 / 4, "experts 0 and 1 of 16 tokens on 4 GPUs"
    assert layer["peak"]["test"]["before"] == 20 / 10, "experts 6 and 7, 2 + 18 of 40"
    assert layer["replicas"][0] == 3, "hot in the third quarter"
    assert layer["replicas"][7] < 3, "hot in the last quarter alone"
    assert sorted({expert for experts in layer["experts"] for expert in experts}) == list(range(8))
    assert layer["peak"]["test"]["after"] == max(layer["gpu_load"]["test"]["after"])
    assert result["mean_peak"]["fit"]["after"] == pytest.approx(layer["peak"]["fit"]["after"])

    written = json.loads((run / "placement.json").read_text())
    assert written == {key: value for key, value in result.items() if key not in ("files", "format")}
    assert (run / "placement.png").read_bytes().startswith(b"\x89PNG")
    assert not list(run.glob(".*.tmp"))
    assert "layers.1" in printed.err
    assert "Fit: training tokens 200 to 300; test: 300 to 400; all domains." in printed.err


def test_a_domain_counts_alone_and_the_files_go_where_they_are_asked_for(tmp_path: Path, capsys: Any) -> None:
    run, out = made(tmp_path / "run", *[LATE] * 8), tmp_path / "a" / "b"
    assert main(["eplb", f"run={run}", "gpus=4", "nodes=4", "redundant=0", "domain=prose", f"out={out}"]) == 0
    assert "domain prose" in capsys.readouterr().out
    found = json.loads((out / "placement.json").read_text())
    assert found["layers"]["mtp.0"]["peak"]["test"]["before"] == pytest.approx(18 / 6)
    assert not (run / "placement.json").exists()


@pytest.mark.parametrize(
    ("arguments", "messages"),
    [
        (["gpus=4", "nodes=3", "redundant=2"], ["nodes=3: must divide gpus=4", "redundant=2: 8 experts", "0 or 4"]),
        (["gpus=4", "nodes=2"], ["redundant: required"]),
        (["gpus=0", "nodes=2", "redundant=-1"], ["gpus=0: must be above 0", "redundant=-1: must be 0 or more"]),
        ([*DEPLOYMENT, "domain=maths"], ["domain=maths: must be one of code, prose"]),
        ([*DEPLOYMENT, "domain=prose"], ["domain=prose: has no tokens in the intervals to fit"]),
    ],
)
def test_mistakes_are_named_before_anything_is_written(
    arguments: list[str], messages: list[str], tmp_path: Path, capsys: Any
) -> None:
    run = made(tmp_path / "run", EVEN, EVEN, EARLY, LATE)
    assert status(f"run={run}", *arguments) == 2
    told = capsys.readouterr().err
    assert all(message in told for message in messages), told
    assert not list(run.glob("placement*"))


def test_runs_without_load_to_place_by_are_named(tmp_path: Path, capsys: Any) -> None:
    for run, message in (
        (tmp_path / "nowhere", "must be a run folder; it has no config.yaml"),
        (made(tmp_path / "dense", experts=0), "has no metrics/routing; take a run of a model with experts"),
        (made(tmp_path / "short", EVEN, EVEN, EVEN), "has 3 monitoring intervals, must have 4 or more"),
    ):
        assert status(f"run={run}", *DEPLOYMENT) == 2
        assert f"run={run}: {message}" in capsys.readouterr().err


def status(*arguments: str) -> int:
    with pytest.raises(SystemExit) as ended:
        sys.exit(main(["eplb", *arguments]))
    assert isinstance(ended.value.code, int)
    return ended.value.code
