"""The model card of an export, and its upload to a fake hub: an HTTP server that takes what the Hub's does."""

import base64
import json
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import huggingface_hub
import pytest
import yaml
from omegaconf import OmegaConf

from dsv3.checkpoint.run_folder import RunFolder
from dsv3.cli import main
from tests.parity.runs import write_run
from tests.parity.test_export import SMALL
from tests.parity.twins import configured, random_model
from tests.stand_in import JSONHandler, answering

SCORES = {"code": {"loss": 1.0, "bpb": 1.2345}, "all": {"loss": 1.0, "bpb": 1.5}}
SUMMARY = {
    "tokens": 4096, "steps": 2, "parameters": {"total": 12345, "active": 678, "mtp": 9}, "git_commit": "abc123+",
    "versions": {"torch": "2.13.0"},
    "validation": {"before": {}, "after": SCORES, "ema": {"all": {"loss": 1, "bpb": 9.5}}},
    "benchmarks": [{"task": "t|1", "metric": "acc", "n": 50, "after": 0.25, "after_stderr": 0.0625}],
}  # fmt: skip
SOURCES = {
    "text": {"_target_": "data.sources.local_files", "path": "/home/me/secret", "weight": 3.0},
    "web": {"_target_": "data.sources.hub", "name": "HuggingFaceFW/fineweb", "split": "train", "weight": 1.0},
    "code": None,
}


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    config = configured("mtp=none", **SMALL)
    path = write_run(tmp_path_factory.mktemp("runs") / "run", config, random_model(config, seed=5))
    saved = OmegaConf.load(path / "config.yaml")
    OmegaConf.update(saved, "data.sources", SOURCES, merge=False)
    OmegaConf.save(saved, path / "config.yaml")
    (path / "summary.json").write_text(json.dumps(SUMMARY))
    return path


def exported(run: Path, out: Path, *options: str) -> str:
    assert main(["export", f"checkpoint={run}", f"out={out}", *options]) == 0
    return (out / "README.md").read_text()


def test_the_card_has_data_scores_commit_licence_and_how_to_load_it(run: Path, tmp_path: Path) -> None:
    card = exported(run, tmp_path / "out", "license=apache-2.0")
    _, header, text = card.split("---\n", 2)
    assert yaml.safe_load(header) == {
        "license": "apache-2.0", "library_name": "transformers", "pipeline_tag": "text-generation", "tags": ["dsv3"],
    }  # fmt: skip
    for part in (
        "| text | local_files | 75% |", "| web | hub HuggingFaceFW/fineweb train | 25% |",
        "| code | 1.234 |", "| t/1 | acc | 0.250 ± 0.062 | 50 |", "12,345, 678 active per token", "4,096 tokens",
        "abc123+ (+: with changes)", "apache-2.0", 'from_pretrained("FOLDER")', "vllm serve", "ONNX",
    ):  # fmt: skip
        assert part in text, text
    assert "secret" not in card
    assert str(tmp_path) not in card
    assert "9.5" not in card, "of the averaged weights"


def test_scores_of_other_weights_are_not_shown(run: Path, tmp_path: Path) -> None:
    averaged = exported(run, tmp_path / "averaged", "weights=ema")
    assert "| all | 9.500 |" in averaged
    assert "1.234" not in averaged
    assert "not of the averaged ones" in averaged
    assert "license:" not in averaged
    assert "licence of the weights: none was given" in averaged
    other = tmp_path / "run"
    other.mkdir()
    for path in run.iterdir():
        (other / path.name).symlink_to(path)
    (other / "summary.json").unlink()
    assert "None: these weights are not those of the end of a run." in exported(other, tmp_path / "early")


def test_a_card_cannot_be_broken_by_a_run_folder(run: Path) -> None:
    from dsv3.reporting.model_card import model_card

    folder = RunFolder(run)
    fields = {"architectures": ["A"], "dsv3": {"tokens_seen": 4096, "weights": "live"}}
    card = model_card(folder, fields, license='x"\n---\nevil: 1', repository=None)
    assert len(card.split("\n---\n")) == 2, "its header ends once"
    assert yaml.safe_load(card.split("---\n")[1])["license"] == 'x"\n---\nevil: 1'


class Hub(JSONHandler):
    """Repositories and commits of the Hub, kept in `files`."""

    files: dict[str, bytes]
    asked: list[str]

    def do_POST(self) -> None:
        content = self.content()
        self.asked.append(self.path)
        if "Bearer good" not in self.headers.get("Authorization", ""):
            self.answer({"error": "Invalid username or password."}, 401)
        elif self.path == "/api/repos/create":
            assert json.loads(content)["visibility"] == "private"
            self.answer({"url": "https://huggingface.co/me/small", "name": "me/small"})
        elif "/preupload/" in self.path:
            files = [file["path"] for file in json.loads(content)["files"]]
            modes = [{"path": path, "uploadMode": "regular", "shouldIgnore": False} for path in files]
            self.answer({"files": modes})
        elif self.path == "/api/validate-yaml":
            self.answer({"errors": [], "warnings": []})
        else:
            assert self.path.startswith("/api/models/me/small/commit/main")
            for line in map(json.loads, content.splitlines()):
                if line["key"] == "file":
                    self.files[line["value"]["path"]] = base64.b64decode(line["value"]["content"])
            url = "https://huggingface.co/me/small/commit/123"
            self.answer({"commitUrl": url, "commitOid": "123", "success": True})

    def do_GET(self) -> None:
        self.asked.append(self.path)
        self.answer({"error": "Not found"}, 404)


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[type[Hub]]:
    """The fake hub, to which this process is logged in."""
    handler = type("FreshHub", (Hub,), {"files": {}, "asked": []})
    with answering(handler) as url:
        monkeypatch.setattr(huggingface_hub, "HfApi", partial(huggingface_hub.HfApi, endpoint=url, token="good"))
        monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
        yield handler


def test_push_uploads_what_was_exported(
    run: Path, tmp_path: Path, hub: type[Hub], capsys: pytest.CaptureFixture[str]
) -> None:
    card = exported(run, tmp_path / "out", "push=me/small")
    assert "uploaded: https://huggingface.co/me/small/commit/123" in capsys.readouterr().out
    assert hub.files == {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()}
    assert 'from_pretrained("me/small")' in card


def test_without_push_nothing_is_asked_of_the_hub(run: Path, tmp_path: Path, hub: type[Hub]) -> None:
    exported(run, tmp_path / "out")
    assert hub.asked == []


def test_a_refusal_is_one_line_and_the_export_stays(
    run: Path, tmp_path: Path, hub: type[Hub], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(huggingface_hub, "HfApi", partial(huggingface_hub.HfApi, token="stolen"))
    with pytest.raises(SystemExit) as end:
        main(["export", f"checkpoint={run}", f"out={tmp_path}/out", "push=me/small"])
    assert end.value.code == 2
    told = capsys.readouterr().err
    assert "error: push=me/small: " in told
    assert "401" in told
    assert f"`hf upload me/small {tmp_path}/out` tries again" in told
    assert (tmp_path / "out" / "config.json").exists()


@pytest.mark.parametrize("name", ["small", "me/../x", "a/b/c", "", "me/sm all", "http://hub/me/small"])
def test_what_is_no_repository_is_refused_before_the_export(run: Path, tmp_path: Path, name: str) -> None:
    with pytest.raises(SystemExit) as end:
        main(["export", f"checkpoint={run}", f"out={tmp_path}/out", f"push={name}"])
    assert end.value.code == 2
    assert not (tmp_path / "out").exists()
