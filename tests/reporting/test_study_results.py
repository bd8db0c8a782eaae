"""Results of a study: which runs count, which layers are compared, and known values of its figures."""

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from omegaconf import OmegaConf

from dsv3.checkpoint.run_folder import RunFolder
from dsv3.cli import main
from dsv3.config.study_metrics import Figure
from dsv3.reporting.study_figures import curves as draw_curves
from dsv3.reporting.study_figures import gap
from dsv3.reporting.study_figures import gaps as draw_gaps
from dsv3.reporting.study_results import at_equal, common_budget, curve, metrics, read_study, specialisation
from dsv3.reporting.study_verdict import answered
from dsv3.study.report import sections, write_study_report

LOADS = {"layers.1": [[4, 4], [4, 4]], "layers.2": [[4, 4], [4, 4]], "mtp.0": [[8, 0], [0, 8]]}  # domain x expert


def made(root: Path, arm: str, seed: int, *, finished: bool = True, name: str | None = None, **changed: Any) -> None:
    """A run of two validations. changed: `bpb` at the end, `tokens`, `layers`, `arms` and `baseline` of its config, and
    other `settings`."""
    folder = RunFolder(root / (name or f"{arm}/seed{seed}"))
    folder.path.mkdir(parents=True)
    study = {"arm": arm, "arms": changed.get("arms", {"a": [], "b": []}), "baseline": changed.get("baseline", "a")}
    study |= {"question": None, "finding": None, "metric": None}
    run = {"experiment": "made_up", "name": name or f"{arm}/seed{seed}", "init_from": changed.get("init_from")}
    run |= {"dir": str(folder.path)}
    study |= {"stage": changed["stage"]} if "stage" in changed else {}
    settings = changed.get("settings", {})
    OmegaConf.save({"seed": seed, "study": study, "run": run, **settings}, folder.config_path)
    tokens, bpb = changed.get("tokens", 100), changed.get("bpb", 2.0)
    for at, value in ((0, 8.0), (tokens, bpb)):
        row = {"tokens": at, "weights": "live", "domain": "all", "loss": value, "bpb": value}
        folder.table("metrics/validation").append(row)
    folder.table("metrics/train").append({"tokens": tokens, "loss": bpb})
    folder.table("timing/train").append({"tokens": tokens, "seconds": 1.0})
    for layer in changed.get("layers", ["layers.1"]):
        load = np.array(LOADS[layer]).flatten().tolist()
        routing = {"tokens": tokens, "layer": layer, "nodes": 1.0, "dispatch_bytes": 64.0, "domains": ["x", "y"]}
        routing |= {"max_vio_interval": 1.0}
        folder.table("metrics/routing").append(routing | {"domain_load": load})
    folder.flush(tokens)
    if finished:
        scores = {"after": {"all": {"bpb": bpb}}, "ema": {"all": {"bpb": bpb}}}
        folder.write_summary(
            {"tokens": tokens, "steps": 1, "validation": scores, "git_commit": f"c{seed}", "versions": {}}
        )


def sentences(root: Path, title: str) -> str:
    return " ".join(next(section for section in sections(read_study(root)) if section.title == title).sentences)


def test_specialisation_of_known_loads() -> None:
    """Each of two experts serves one of two domains alone: 2 or 0 times an even share, where 1 is that of all."""
    rows = pd.DataFrame({"domains": [["x", "y"]] * 2, "domain_load": [[8, 0, 0, 8], [4, 4, 4, 4]]})
    assert specialisation(rows[:1]) == 1.0
    assert specialisation(rows[1:]) == 0.0
    assert specialisation(rows) == 0.5
    assert specialisation(rows[:0]) is None


def test_experts_are_compared_over_the_layers_that_all_arms_have(tmp_path: Path) -> None:
    made(tmp_path, "a", 1)
    made(tmp_path, "b", 1, layers=["layers.1", "mtp.0"])
    study = read_study(tmp_path)
    found = {metric.name: study.values(metric, "b", [1]) for metric in metrics(study)}
    assert found["specialisation"] == [0.0], "that of mtp.0 is 1"


def test_runs_are_read_where_the_shortest_ends(tmp_path: Path) -> None:
    made(tmp_path, "a", 1, tokens=100)
    made(tmp_path, "b", 1, tokens=80)
    assert common_budget(read_study(tmp_path), "tokens") == 80


def test_budgets_count_all_stages_of_an_arm(tmp_path: Path) -> None:
    made(tmp_path, "a", 1, tokens=100, stage=1)
    made(tmp_path, "b", 1, tokens=30, stage=2, init_from=str(tmp_path / "a" / "seed1"))
    runs = read_study(tmp_path).runs
    assert [curve(runs[arm][1], "tokens")[0].tolist() for arm in "ab"] == [[0, 100], [100, 130]]
    assert [curve(runs[arm][1], "seconds")[0].tolist() for arm in "ab"] == [[0, 1], [1, 2]]
    (tmp_path / "elsewhere").mkdir()
    for arm in "ab":
        (tmp_path / arm).rename(tmp_path / "elsewhere" / arm)
    runs = read_study(tmp_path / "elsewhere").runs
    assert curve(runs["b"][1], "tokens")[0].tolist() == [100, 130], "a study that was moved"
    shutil.rmtree(tmp_path / "elsewhere" / "a")
    with pytest.raises(FileNotFoundError, match=r"the stage before .* is not there any more"):
        curve(runs["b"][1], "tokens")


def test_an_arm_that_was_added_later_counts(tmp_path: Path) -> None:
    made(tmp_path, "a", 1)
    made(tmp_path, "c", 1, arms={"a": [], "c": []})
    assert list(read_study(tmp_path).runs) == ["a", "c"]


def test_an_unfinished_baseline_is_named(tmp_path: Path) -> None:
    made(tmp_path, "a", 1, finished=False)
    made(tmp_path, "b", 1)
    text = sentences(tmp_path, "Verdict")
    assert "a, the baseline, has no finished run: the others are compared with b." in text
    assert "Unfinished, not included: a/seed1." in text
    assert "There is no second arm to compare." in text


def test_two_runs_of_one_arm_and_seed_are_refused(tmp_path: Path) -> None:
    made(tmp_path, "a", 1)
    made(tmp_path, "a", 1, name="a/other")
    with pytest.raises(ValueError, match="a/other and a/seed1 are both a with seed 1"):
        read_study(tmp_path)


def test_the_report_says_what_was_run_and_by_which_code(tmp_path: Path) -> None:
    for arm in ("a", "b"):
        for seed in (1, 2):
            made(tmp_path, arm, seed)
    text = sentences(tmp_path, "Runs")
    assert "4 finished runs of 2 arms, with seeds 1, 2, of 100 tokens (1 steps) each" in text
    assert "Commit: c1, or c2." in text


def test_the_verdict_is_on_the_metric_that_is_asked_for(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for arm, bpb in (("a", 2.0), ("b", 1.5)):
        for seed in (1, 2):
            made(tmp_path, arm, seed, bpb=bpb + 0.01 * seed)
    assert main(["report", str(tmp_path), "metric=held-out all", "format=json"]) == 0
    sections = {section["title"]: section for section in json.loads(capsys.readouterr().out)["sections"]}
    assert list(sections)[:3] == ["Arms", "Verdict", "Results"]
    (answer, *_) = sections["Verdict"]["sentences"]
    assert answer.startswith("**By held-out all, b is better than a by 0.5000 bits per byte (95% interval -0.5")
    with pytest.raises(SystemExit):
        main(["report", str(tmp_path), "metric=held out"])
    assert "study.metric=held out: must be one of held-out all" in capsys.readouterr().err


def test_the_verdict_says_which_differences_are_excluded(tmp_path: Path) -> None:
    noise = {"a": (0.0, 0.0, 0.0), "b": (0.01, -0.02, 0.03), "c": (0.0, 0.002, -0.004)}
    for arm, values in noise.items():
        for seed, value in enumerate(values):
            made(tmp_path, arm, seed, bpb=2.0 + value)
    study = read_study(tmp_path)
    (metric,) = (metric for metric in metrics(study) if metric.name == "held-out all")
    intervals = [study.difference(metric, arm) for arm in "bc"]
    widest = max(max(-interval.low, interval.high) for interval in intervals if interval is not None)
    answer, clear = answered(study, metric)
    assert not clear
    assert f"b and c: no significant difference from a; more than {widest:.4f} is excluded" in answer


def test_the_plotted_interval_at_the_end_is_that_of_the_verdict(tmp_path: Path) -> None:
    for arm, noise in (("a", 0.0), ("b", 0.01)):
        for seed in range(5):
            made(tmp_path, arm, seed, bpb=2.0 + noise * (seed - 1))
    until = {"half_width": 0.001, "most_seeds": 8, "most_hours": None}
    for study in (read_study(tmp_path), read_study(tmp_path)._replace(until=until)):
        _, differences = gap(study, "b", "tokens", common_budget(study, "tokens"))
        assert differences[-1] == study.difference(at_equal(study, "tokens"), "b")
    assert differences[-1].high - differences[-1].low > 2 * 0.0196, "wider than Student's, for repeated looks"


def test_a_layer_that_no_token_came_to_has_no_violation(tmp_path: Path) -> None:
    made(tmp_path, "a", 1, layers=["layers.1", "layers.2"])
    folder = RunFolder(tmp_path / "a" / "seed1")
    folder.write_summary((folder.summary() or {}) | {"max_violation": {"layers.1": 0.5, "layers.2": None}})
    study = read_study(tmp_path)
    (metric,) = (metric for metric in metrics(study) if metric.name == Figure.MAX_VIO)
    assert study.values(metric, "a", [1]) == [0.5]


def test_figures_of_other_held_out_text_or_another_objective_are_not_compared(tmp_path: Path) -> None:
    """Conversations and prompts are not the same text; the loss of one objective says nothing of another's."""

    def settings(data: str, objective: str) -> dict[str, Any]:
        return {"data": {"_target_": data}, "objective": {"_target_": objective}}

    for arm, data, objective in (("a", "A", "sft"), ("b", "B", "sft"), ("c", "A", "dpo"), ("d", "A", "sft")):
        for seed in (1, 2):
            arms = {name: [] for name in "abcd"}
            made(tmp_path, arm, seed, arms=arms, bpb=2.0 + 0.1 * seed, settings=settings(data, objective))
    study = read_study(tmp_path)
    by_name = {metric.name: metric for metric in [at_equal(study, "tokens"), *metrics(study)]}
    text = ["held-out text at equal tokens", "held-out all", Figure.EMA, Figure.SPECIALISATION]
    for arm, missing in (("b", text), ("c", [Figure.LOSS]), ("d", [])):
        found = {name for name, metric in by_name.items() if study.values(metric, arm, [1, 2])}
        assert found - {name for name in found if study.difference(by_name[name], arm)} == set(missing)
    assert len(draw_curves(study, "tokens").data) == len(draw_gaps(study, "tokens").data) * 2 + 2 == 6
    page = " ".join(" ".join(map(str, row)) for section in sections(study) for row in section.rows)
    assert "held-out all (bits per byte) 2.1500 2.1500 2.1500 (+0) 2.1500 (+0)" in page
    assert any(section.title == "Held-out text" for section in sections(study))
    alone = study._replace(runs={arm: study.runs[arm] for arm in "ab"})
    content = list(sections(alone))
    assert not any(section.title == "Held-out text" for section in content), "no empty plots"
    assert "png" not in write_study_report(alone, content, tmp_path)
