"""Run folders that a stranger made: nothing in them is executed, and what is wrong with them is said in one line."""

import json
import pickle
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from omegaconf import DictConfig, OmegaConf
from safetensors.torch import save_file

from dsv3.build import build_model
from dsv3.checkpoint.config_in import Fields
from dsv3.checkpoint.huggingface import import_folder, run_config
from dsv3.checkpoint.loading import load_run
from dsv3.checkpoint.run_folder import RunFolder, is_valid, load_checkpoint
from dsv3.checkpoint.shards import INDEX, Shards
from dsv3.config.known_parts import refuse_unknown_parts, targets
from dsv3.training.settle import kept_choices
from tests.parity.runs import write_run

CALLABLES: dict[str, dict[str, Any]] = {
    "torch.load": {"f": "evil.pkl", "weights_only": False},
    "pandas.read_pickle": {"filepath_or_buffer": "evil.pkl"},
    "joblib.load": {"filename": "evil.pkl"},
    "sympy.sympify": {"a": "__import__('pathlib').Path('touched').touch()"},
    "shutil.copyfile": {"src": "evil.pkl", "dst": "touched"},
    "logging.FileHandler": {"filename": "touched"},
    "pathlib.Path.touch": {"self": {"_target_": "pathlib.Path", "_args_": ["touched"]}},
    "plugins.logger.weights_and_biases.wandb_logger": {},
    "dsv3.config.known_parts.CONF": {},
}


class Touch:
    """Unpickled, it makes a file."""

    def __reduce__(self) -> Any:
        return Path.touch, (Path("touched"),)


@pytest.fixture
def run(composed: Callable[..., DictConfig], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "evil.pkl").write_bytes(pickle.dumps(Touch()))
    config = composed("tokenizer=bpe", "tokenizer.vocab_size=300", "model.vocab_size=300", "precision=fp32")
    config.data._target_ = "data.datamodule.DataModule"
    return write_run(tmp_path / "run", config, build_model(config))


def rewrite(run: Path, change: Callable[[dict[str, Any]], None]) -> None:
    path = RunFolder(run).config_path
    config: Any = OmegaConf.to_container(OmegaConf.load(path))
    change(config)
    path.write_text(json.dumps(config))


@pytest.mark.parametrize("place", ["precision", "inside of a part"])
def test_a_config_that_names_a_foreign_callable_calls_nothing(run: Path, place: str) -> None:
    for target, arguments in CALLABLES.items():
        node = {"_target_": target, **arguments}

        def plant(config: dict[str, Any], node: dict[str, Any] = node) -> None:
            config["precision"] = node if place == "precision" else {**config["precision"], "head": [{"x": node}]}

        rewrite(run, plant)
        with pytest.raises(ValueError, match=rf"(?s)names what no option in conf/ names.*_target_={target}") as raised:
            load_run(run)
        assert f"allow=[{target}" in str(raised.value)
        assert not Path("touched").exists()


def test_an_allowed_class_of_another_kind_is_the_users_mistake(run: Path) -> None:
    rewrite(run, lambda config: config.update(precision={"_target_": "logging.FileHandler", "filename": "log"}))
    with pytest.raises(
        ValueError, match=r"precision\._target_=logging\.FileHandler: is no precision; it lacks .*linear"
    ):
        load_run(run, allow=["logging.FileHandler"])


def test_what_the_user_allows_is_built(run: Path) -> None:
    rewrite(run, lambda config: config["precision"].update(_target_="tests.test_build.FP32"))
    with pytest.raises(ValueError, match=r"allow=\[tests.test_build.FP32\]"):
        load_run(run)
    with pytest.raises(Exception, match=r"FP32"):  # there is no such class: it was looked up
        load_run(run, allow=["tests.test_build.FP32"])


def test_every_option_of_conf_is_known_for_its_kind(composed: Callable[..., DictConfig]) -> None:
    config = OmegaConf.to_container(composed("data=default", "tokenizer=bpe"), resolve=True)
    assert len(list(targets(config))) > 20
    refuse_unknown_parts(config, source=Path("config.yaml"))


def test_a_format_settled_by_a_strangers_run_cannot_be_a_callable(
    run: Path, composed: Callable[..., DictConfig]
) -> None:
    config = composed("precision=auto", f"run.dir={run}")
    key = next(key for key, value in config.precision.items() if value is None)
    evil = {"_target_": "pathlib.Path.touch", "self": {"_target_": "pathlib.Path", "_args_": ["touched"]}}
    rewrite(run, lambda before: before.update(precision={**OmegaConf.to_container(config.precision), key: evil}))
    with pytest.raises(ValueError, match=r"pathlib\.Path\.touch"):
        kept_choices(config, RunFolder(run))
    assert not Path("touched").exists()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("seed: ${oc.env:HOME}\n", "holds an interpolation"),
        ("a: &a [1]\nb: [*a, *a]\n", "holds an alias"),
        ("[" * 5000, "not the configuration of a run"),
        ("- 1\n", "must be a mapping"),
        ("a: !!python/object/apply:os.getcwd []\n", "not the configuration of a run"),
        ("{not yaml", "not the configuration of a run"),
    ],
)
def test_a_config_that_is_more_than_data_is_refused_by_name(run: Path, text: str, message: str) -> None:
    RunFolder(run).config_path.write_text(text)
    with pytest.raises(ValueError, match=rf"config\.yaml: .*{message}"):
        load_run(run)


def test_a_malicious_pickle_is_not_run_and_nobody_is_told_to(run: Path) -> None:
    checkpoint = RunFolder(run).checkpoints()[0]
    torch.save({"state_dict": Touch(), "dsv3": {}, "callbacks": {}}, checkpoint)
    with pytest.raises(ValueError, match="not a checkpoint of this project") as raised:
        load_run(checkpoint)
    assert "weights_only" not in str(raised.value)
    assert "\n" not in str(raised.value)
    checkpoint.write_bytes(pickle.dumps(Touch()))
    with pytest.raises(ValueError, match="not a checkpoint of this project"):
        load_run(checkpoint)
    assert not Path("touched").exists()


def test_an_index_that_leads_out_of_its_folder_is_refused(tmp_path: Path) -> None:
    (tmp_path / "hf").mkdir()
    save_file({"w": torch.ones(1)}, tmp_path / "x.safetensors")
    for outside in ("../x.safetensors", str(tmp_path / "x.safetensors")):
        (tmp_path / "hf" / INDEX).write_text(json.dumps({"weight_map": {"w": outside}}))
        with pytest.raises(ValueError, match="only name files in its own folder"):
            Shards(tmp_path / "hf", block=None)


def test_a_checkpoint_with_one_bit_flipped_is_either_passed_over_or_loads(run: Path) -> None:
    """Anywhere in the archive: names, checksums and offsets of its directory too."""
    path = RunFolder(run).checkpoints()[0]
    content = path.read_bytes()
    directory = content.rindex(b"PK\x01\x02") - 400
    generator = random.Random(0)
    places = [generator.randrange(directory, len(content)) for _ in range(120)]
    flipped, intact, passed_over = path.with_name("flipped.ckpt"), load_checkpoint(path)["state_dict"], 0
    for place in [*places, *(generator.randrange(len(content)) for _ in range(20))]:
        damaged = bytearray(content)
        damaged[place] ^= 1 << generator.randrange(8)
        flipped.write_bytes(damaged)
        if is_valid(flipped):
            assert load_checkpoint(flipped)["state_dict"].keys() == intact.keys()
        else:
            passed_over += 1
    assert passed_over > 20


def test_a_folder_in_place_of_a_checkpoint_is_passed_over(run: Path) -> None:
    folder = RunFolder(run)
    folder.checkpoint_path(9999).mkdir()
    (folder.path / "checkpoints" / "tokens-best.ckpt").touch()
    assert folder.newest_valid_checkpoint() == folder.checkpoint_path(4096)


def test_another_tokenizer_than_the_weights_is_named(run: Path) -> None:
    rewrite(run, lambda config: config["model"].update(vocab_size=280))
    checkpoint = RunFolder(run).checkpoints()[0]
    with pytest.raises(ValueError, match=rf"{checkpoint} does not fit .*config\.yaml: size mismatch"):
        load_run(run)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{cut", "config.json cannot be read as JSON"),
        ('{"model_type": "llama", "rope_theta": NaN}', r"config.json cannot be read as JSON \(it holds NaN\)"),
        ("[1]", "must hold an object"),
        (
            '{"model_type": "llama", "hidden_size": "wide", "vocab_size": 9, "rms_norm_eps": 1e-6, '
            '"num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 8}',
            "hidden_size=wide",
        ),
    ],
)
def test_a_config_json_that_describes_no_model_is_named(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "config.json").write_text(text)
    save_file({"w": torch.ones(1)}, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match=message):
        import_folder(tmp_path, tmp_path / "out", precision="fp32")
    assert not (tmp_path / "out").exists()


LLAMA: dict[str, Any] = {
    "model_type": "llama", "hidden_size": 8, "vocab_size": 9, "rms_norm_eps": 1e-6, "num_hidden_layers": 1,
    "num_attention_heads": 2, "intermediate_size": 8, "max_position_embeddings": 64, "hidden_act": "silu",
}  # fmt: skip


@pytest.mark.parametrize(("layers", "message"), [(10**9, "num_hidden_layers=1000000000: the weights .* have fewer")])
def test_a_model_larger_than_its_weights_is_not_built(tmp_path: Path, layers: int, message: str) -> None:
    (tmp_path / "config.json").write_text(json.dumps(LLAMA | {"num_hidden_layers": layers}))
    save_file({"w": torch.ones(1)}, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match=message):
        import_folder(tmp_path, tmp_path / "out", precision="fp32")


def test_an_import_with_the_tokenizer_of_another_model_is_refused(run: Path, tmp_path: Path) -> None:
    for file in RunFolder(run).tokenizer_path.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    (tmp_path / "config.json").write_text(json.dumps(LLAMA | {"vocab_size": 280}))
    with pytest.raises(ValueError, match=r"its tokenizer has 300 tokens, and vocab_size is 280"):
        import_folder(tmp_path, tmp_path / "out", precision="fp32")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("content", [[], {"weight_map": []}, {"weight_map": {"w": 1}}, {}])
def test_an_index_that_is_none_is_named(tmp_path: Path, content: Any) -> None:
    (tmp_path / INDEX).write_text(json.dumps(content))
    with pytest.raises(ValueError, match="is not an index of safetensors"):
        Shards(tmp_path, block=None)


def test_a_cut_safetensors_file_is_named(tmp_path: Path) -> None:
    file = tmp_path / "model.safetensors"
    save_file({"w": torch.ones(1000)}, file)
    file.write_bytes(file.read_bytes()[:200])
    with pytest.raises(ValueError, match=r"model\.safetensors cannot be read as safetensors"):
        Shards(tmp_path, block=None)


def test_an_import_whose_tokenizer_cannot_be_used_is_refused_before_it_is_written(tmp_path: Path) -> None:
    """Without fill-in-the-middle or padding tokens the run could be made, and not generate."""
    tokenizer = {"added_tokens": [], "model": {"type": "BPE", "vocab": {}, "merges": []}}
    (tmp_path / "tokenizer.json").write_text(json.dumps(tokenizer))
    (tmp_path / "tokenizer_config.json").write_text("{}")
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(ValueError, match="lacks special tokens"):
        import_folder(tmp_path, tmp_path / "out", precision="fp32")


def test_an_import_of_a_long_context_has_rows_of_the_length_of_training(tmp_path: Path) -> None:
    """Rows of 163,840 tokens made an evaluation of a few lines last for half an hour."""
    hf = LLAMA | {"max_position_embeddings": 163_840}
    config = run_config(Fields(hf), mtp_layers=0, out=tmp_path / "run", precision="fp32")
    assert config.data.sequence_length == 4096
