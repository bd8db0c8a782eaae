"""Folders that transformers opens: damaged ones, and those whose files belong to different models, are named."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

from dsv3.checkpoint.shards import INDEX, SINGLE
from dsv3.evaluation.benchmarks.models import HFModel


def cut(folder: Path) -> None:
    weights = folder / SINGLE
    weights.write_bytes(weights.read_bytes()[:5000])


def fields(**changed: object) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        file = folder / "config.json"
        file.write_text(json.dumps(json.loads(file.read_text()) | changed))

    return change


def no_json(folder: Path) -> None:
    (folder / "config.json").write_text("{cut")


def larger_tokenizer(folder: Path) -> None:
    file = folder / "tokenizer.json"
    content = json.loads(file.read_text())
    content["model"]["vocab"]["another"] = 400
    file.write_text(json.dumps(content))


def outside(folder: Path) -> None:
    """Index that leads to a file which is there, and whole."""
    (folder / SINGLE).rename(folder.parent / "x.safetensors")
    where = dict.fromkeys(load_file(folder.parent / "x.safetensors"), "../x.safetensors")
    (folder / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": where}))


def lacking(folder: Path) -> None:
    tensors = load_file(folder / SINGLE)
    tensors.pop("model.layers.1.mlp.up_proj.weight")
    save_file(tensors, folder / SINGLE, metadata={"format": "pt"})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (cut, "cannot be read as safetensors"),
        (no_json, "cannot be read as JSON"),
        (fields(hidden_size="wide"), "transformers cannot open it: .*hidden_size"),
        (fields(num_hidden_layers=3), r"do not fit its config\.json; .*model\.layers\.2"),
        (fields(num_hidden_layers=10**9), "num_hidden_layers=1000000000: the weights beside it are .* tensors"),
        (fields(intermediate_size=64), r"do not fit its config\.json; .*model\.layers\.0\.mlp"),
        (lacking, r"lacking or of another shape: model\.layers\.1\.mlp\.up_proj\.weight"),
        (larger_tokenizer, "ids up to 400, and the model's embedding 400 tokens"),
        (outside, "only name files in its own folder"),
    ],
)
def test_a_folder_that_is_not_one_model_is_named_in_one_line(
    hugging_face_folder: Path,
    tmp_path: Path,
    change: Callable[[Path], None],
    message: str,
    capfd: pytest.CaptureFixture[str],
) -> None:
    folder = tmp_path / "hf"
    shutil.copytree(hugging_face_folder, folder)
    HFModel(folder)
    change(folder)
    with pytest.raises(ValueError, match=message) as raised:
        HFModel(folder)
    assert "\n" not in str(raised.value)
    assert capfd.readouterr().err == "", "no report of transformers's own"
