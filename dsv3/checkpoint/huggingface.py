"""Export of a run to a Hugging Face checkpoint, and import of one as a run folder.

Both are written beside their place and renamed into it, so that a folder of that name is whole.
"""

import json
import logging
import os
import shutil
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from hydra import compose, initialize_config_dir
from hydra.errors import InstantiationException
from omegaconf import DictConfig, OmegaConf, open_dict
from torch import Tensor

from dsv3.bounds import PositiveInt
from dsv3.build import build_model, load_tokenizer
from dsv3.checkpoint.config_in import Fields, hf_to_choices
from dsv3.checkpoint.config_out import config_to_hf
from dsv3.checkpoint.layout import Target, to_huggingface
from dsv3.checkpoint.run_folder import RunFolder, find_run, load_checkpoint, temporary_of
from dsv3.checkpoint.shards import Shards, write_shards
from dsv3.contracts import Tokenizer
from dsv3.paths import CONF
from dsv3.strict_json import read_json

log = logging.getLogger(__name__)

LONGEST_SEQUENCE = 4096
"""Of what an imported model is evaluated and trained on, unless told otherwise: the report's, before YaRN."""

TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "chat_template.jinja")


def export_run(
    checkpoint: str | Path,
    out: Path,
    *,
    weights: Literal["live", "ema"],
    mtp: bool,
    dtype: torch.dtype,
    max_shard_bytes: int,
    card: Callable[[RunFolder, dict[str, Any]], str] | None = None,
) -> dict[str, Any]:
    """Write the run's model and tokenizer to `out`, which must be new or empty; return its config.json.

    card: text of README.md, from the run and the config.json.

    Raises:
        ValueError: Hugging Face's format cannot hold the model.
        FileNotFoundError: `checkpoint` is not a run's. FileExistsError: `out` holds something.
    """
    check_free(out)
    folder, file = find_run(checkpoint)
    config = folder.config()
    special = special_ids(folder.tokenizer_path)
    fields = config_to_hf(config, special, mtp=mtp)
    saved = load_checkpoint(file)
    fields["torch_dtype"] = str(dtype).removeprefix("torch.")
    fields["dsv3"] |= {"tokens_seen": saved["dsv3"]["tokens_seen"], "weights": weights}
    tensors = to_huggingface(
        model_state(saved, weights, tied=config.model.tie_embeddings),
        n_layers=config.model.n_layers,
        tied=config.model.tie_embeddings,
        mtp=mtp,
        routing_bias=fields["model_type"] == "deepseek_v3",
    )

    def write(path: Path) -> None:
        write_shards(path, tensors, dtype=dtype, max_bytes=max_shard_bytes)
        write_json(path / "config.json", fields)
        write_json(path / "generation_config.json", {"do_sample": False, **special})
        copy_tokenizer(folder.tokenizer_path, path)
        if card is not None:
            (path / "README.md").write_text(card(folder, fields), encoding="utf-8")

    write_folder(out, write)
    return fields


def model_state(saved: Mapping[str, Any], weights: Literal["live", "ema"], *, tied: bool) -> dict[str, Tensor]:
    """The Decoder's state_dict in a checkpoint; the average replaces weights only, never the live routing bias."""
    prefix = "model."
    state = {k.removeprefix(prefix): v for k, v in saved["state_dict"].items() if k.startswith(prefix)}
    if weights == "ema":
        state |= saved["callbacks"]["EMA"]["weights"]
        if tied:
            state["lm_head.weight"] = state["embed_tokens.weight"]
    return state


def import_folder(path: Path, out: Path, *, precision: str) -> DictConfig:
    """Write the model of a Hugging Face folder to the run folder `out`, and return its config.

    Only shapes and options come from the folder; training settings are those of conf/train.yaml, and the run has no
    optimiser state. precision: an option of conf/precision, for computing; the weights are FP32.

    Raises:
        ValueError: our options build no such model, or its weights do not fit its config.json.
        FileNotFoundError: `path` lacks config.json or weights. FileExistsError: `out` holds something.
    """
    check_free(out)
    if not (path / "config.json").exists():
        raise FileNotFoundError(f"path={path}: config.json is missing")
    hf = read_fields(path / "config.json")
    refuse_foreign_tokenizer(path, hf)
    shards = Shards(path, block=fp8_block(hf))
    config = run_config(hf, mtp_layers=count_mtp_layers(hf, shards), out=out, precision=precision)
    refuse_other_sizes(hf, shards)
    model = build_model(config, init=False)
    read_weights(shards, Target(model.state_dict(), n_layers=config.model.n_layers, tied=config.model.tie_embeddings))
    tokens = hf.get("dsv3", {}).get("tokens_seen", 0)
    contents = {
        "state_dict": {f"model.{name}": tensor for name, tensor in model.state_dict().items()},
        "dsv3": {"tokens_seen": tokens, "data_state": {}},
        "callbacks": {"EMA": {"weights": {name: p.detach() for name, p in model.named_parameters()}}},
    }

    def write(temporary: Path) -> None:
        folder = RunFolder(temporary)
        folder.checkpoint_path(tokens).parent.mkdir(parents=True)
        torch.save(contents, folder.checkpoint_path(tokens))
        OmegaConf.save(config, folder.config_path, resolve=True)
        folder.tokenizer_path.mkdir()
        copy_tokenizer(path, folder.tokenizer_path)

    write_folder(out, write)
    return config


def refuse_foreign_tokenizer(path: Path, hf: Mapping[str, Any]) -> None:
    """Or the run could be written and not be used.

    Raises:
        ValueError: the folder's tokenizer cannot be read, or has tokens that the model's embedding has not.
    """
    if not (path / "tokenizer.json").exists():
        return
    try:
        size = load_tokenizer(path).vocab_size
    except InstantiationException as error:
        raise ValueError(f"path={path}: {error.__cause__}") from None
    known = hf["vocab_size"]
    if isinstance(known, int) and size > known:
        raise ValueError(
            f"path={path}: its tokenizer has {size} tokens, and vocab_size is {known}: it is another model's"
        )


def refuse_other_sizes(hf: Fields, shards: Shards) -> None:
    """Before a model of a mistaken size is built, which may take longer and need more memory than there is.

    Raises:
        ValueError: the weights have fewer layers or experts than config.json says.
    """
    names = set(shards.names())
    layer = hf.size("num_hidden_layers") - 1
    last = {"num_hidden_layers": f"model.layers.{layer}.input_layernorm.weight"}
    if hf.get("n_routed_experts") and hf.get("first_k_dense_replace", 0) <= layer:
        last["n_routed_experts"] = f"model.layers.{layer}.mlp.experts.{hf.size('n_routed_experts') - 1}.up_proj.weight"
    for key, name in last.items():
        if name not in names:
            raise ValueError(f"config.json: {key}={hf[key]}: the weights in {shards.folder} have fewer, no {name}")


def read_fields(file: Path) -> Fields:
    """A config.json.

    Raises:
        ValueError: it is not JSON or not an object.
    """
    content = read_json(file)
    if not isinstance(content, dict):
        raise ValueError(f"{file} is not a model's config.json: it must hold an object")
    return Fields(content)


def run_config(hf: Mapping[str, Any], *, mtp_layers: int, out: Path, precision: str) -> DictConfig:
    """The configuration of conf/train.yaml with the model of a config.json."""
    known = sorted(file.stem for file in (CONF / "precision").glob("*.yaml"))
    if precision not in known:
        raise ValueError(f"precision={precision}: must be one of {', '.join(known)}")
    choices = hf_to_choices(hf, mtp_layers=mtp_layers)
    with initialize_config_dir(str(CONF), version_base="1.3"):
        config = compose("train", [*choices.overrides, f"precision={precision}"])
    with open_dict(config):
        config.model.update(choices.model)
        config.tokenizer = {
            "_target_": f"{saved_tokenizer.__module__}.{saved_tokenizer.__qualname__}",
            "_partial_": True,
            "directory": str(RunFolder(out).tokenizer_path),
            "vocab_size": config.model.vocab_size,
        }
    config.data.sequence_length = min(hf["max_position_embeddings"], LONGEST_SEQUENCE)
    config.run.update({"name": out.name, "dir": str(out)})
    return config


def saved_tokenizer(
    *, directory: str, vocab_size: PositiveInt, texts: Mapping[str, Sequence[str]], cache_dir: str
) -> Tokenizer:
    """The tokenizer in a folder, such as an imported model's, whatever texts it is to encode."""
    tokenizer = load_tokenizer(directory)
    if tokenizer.vocab_size != vocab_size:
        raise ValueError(
            f"tokenizer.vocab_size={vocab_size}: {directory} has {tokenizer.vocab_size} tokens; write that"
        )
    return tokenizer


def count_mtp_layers(hf: Mapping[str, Any], shards: Shards) -> int:
    """MTP layers among the weights; config.json may promise some that transformers did not save."""
    names = set(shards.names())
    layer = hf["num_hidden_layers"]
    while f"model.layers.{layer}.eh_proj.weight" in names:
        layer += 1
    return layer - hf["num_hidden_layers"]


def read_weights(shards: Shards, target: Target) -> None:
    """Copy every weight of the shards into its place.

    Raises:
        ValueError: some are left over or lacking.
    """
    for name, tensor in shards.read([name for name in shards.names() if target.needs(name)]):
        target.copy(name, tensor)
    if target.missing:
        raise ValueError(f"{shards.folder} lacks {len(target.missing)} weights, such as {min(target.missing)}")


def fp8_block(hf: Mapping[str, Any]) -> tuple[int, int] | None:
    """Rows and columns of a block of the FP8 format, if the weights are stored in it."""
    quantization = hf.get("quantization_config")
    if quantization is None:
        return None
    if quantization.get("quant_method") != "fp8" or quantization.get("weight_block_size") is None:
        raise ValueError(f"config.json: quantization_config={quantization}; only block-wise fp8 can be read")
    rows, columns = quantization["weight_block_size"]
    return rows, columns


def special_ids(tokenizer: Path) -> dict[str, int]:
    """`bos_token_id` and the like of a saved tokenizer, as far as it has them."""
    if not (tokenizer / "tokenizer.json").exists() or not (tokenizer / "tokenizer_config.json").exists():
        return {}
    config = read_json(tokenizer / "tokenizer_config.json")
    added = read_json(tokenizer / "tokenizer.json")["added_tokens"]
    ids = {token["content"]: token["id"] for token in added}
    named = {f"{name}_id": config.get(name) for name in ("bos_token", "eos_token", "pad_token")}
    texts = {key: text["content"] if isinstance(text, dict) else text for key, text in named.items()}
    return {key: ids[text] for key, text in texts.items() if text in ids}


def copy_tokenizer(source: Path, destination: Path) -> None:
    present = [name for name in TOKENIZER_FILES if (source / name).exists()]
    if "tokenizer.json" not in present:
        log.warning("%s holds no tokenizer.json: the copy has no tokenizer", source)
    for name in present:
        shutil.copyfile(source / name, destination / name)


def write_json(path: Path, content: Any) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def check_free(out: Path) -> None:
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise FileExistsError(f"out={out}: must be a new or empty folder")


def write_folder(out: Path, write: Callable[[Path], None]) -> None:
    """Call `write(temporary)` with a new folder beside `out`, flush its files to disk and rename it to `out`."""
    check_free(out)
    out = out.absolute()
    temporary = temporary_of(out)
    temporary.mkdir(parents=True)
    try:
        write(temporary)
        for path in [path for path in temporary.rglob("*") if path.is_file()]:
            with path.open("rb") as file:
                os.fsync(file.fileno())
        temporary.replace(out)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
