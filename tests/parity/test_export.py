"""`python -m dsv3 export`: what it writes opens in transformers and computes the same; what cannot be is refused."""

import json
import math

import pytest
import torch
from huggingface_hub import split_torch_state_dict_into_shards
from safetensors import safe_open
from transformers import AutoModelForCausalLM, AutoTokenizer

from dsv3.checkpoint.huggingface import import_folder
from dsv3.checkpoint.loading import load_run, set_weights
from dsv3.checkpoint.shards import write_shards
from dsv3.cli import main
from dsv3.inference.generation import generate
from dsv3.inference.sampling import Settings
from dsv3.tools.export import Options, run
from tests.parity.runs import VOCABULARY, write_run
from tests.parity.twins import configured, distance, micro_batch, our_loss, random_model

SMALL = {
    "vocab_size": VOCABULARY,
    "dim": 32,
    "n_layers": 3,
    "inter_dim": 24,
    "moe_inter_dim": 8,
    "n_routed_experts": 8,
    "n_heads": 2,
    "n_kv_heads": 1,
    "head_dim": 16,
    "q_lora_rank": 16,
    "kv_lora_rank": 16,
    "qk_nope_head_dim": 8,
    "qk_rope_head_dim": 8,
    "v_head_dim": 8,
}


def exported(tmp_path, *options, name="out", config_changes=None, **keys):
    config = configured(*options, **(SMALL | (config_changes or {})))
    source = tmp_path / "run"
    if not source.exists():
        write_run(source, config, random_model(config, seed=5))
    run(Options(checkpoint=str(source), out=str(tmp_path / name), **keys))
    return source, tmp_path / name


def opened(folder):
    return AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)


@pytest.mark.parametrize("mtp", [True, False])
def test_keys(tmp_path, mtp):
    _, out = exported(tmp_path, mtp=mtp)
    model, info = opened(out)
    assert not info["missing_keys"]
    assert not info["mismatched_keys"]
    assert bool(info["unexpected_keys"]) == mtp
    assert all(key.startswith("model.layers.3.") for key in info["unexpected_keys"])
    assert model.config.num_nextn_predict_layers == int(mtp)


def test_the_mtp_layer_is_in_the_published_layout(tmp_path):
    source, out = exported(tmp_path)
    ours = load_run(source).model
    with safe_open(out / "model.safetensors", framework="pt") as file:
        layer = {name.removeprefix("model.layers.3."): name for name in file.keys() if "layers.3." in name}  # noqa: SIM118
        for name in ("enorm.weight", "hnorm.weight", "eh_proj.weight", "input_layernorm.weight", "mlp.gate.weight"):
            assert name in layer
        assert torch.equal(file.get_tensor(layer["shared_head.head.weight"]), ours.lm_head.weight)
        assert torch.equal(file.get_tensor(layer["embed_tokens.weight"]), ours.embed_tokens.weight)
        assert torch.equal(file.get_tensor(layer["shared_head.norm.weight"]), ours.mtp.depths[0].norm.weight)


def test_trap_13_a_small_copy_keeps_its_bias(tmp_path):
    """The published gate has a bias only at the width of 7168."""
    source, out = exported(tmp_path)
    theirs = opened(out)[0].state_dict()
    for name, moe in load_run(source).model.moe_layers():
        if name.startswith("layers."):
            assert moe.balancing.bias.any()
            assert torch.equal(theirs[f"model.{name}.mlp.gate.e_score_correction_bias"], moe.balancing.bias)


@pytest.mark.parametrize("weights", ["live", "ema"])
@pytest.mark.parametrize("tied", [False, True])
def test_live_or_averaged_weights(tmp_path, weights, tied):
    source, out = exported(tmp_path, weights=weights, config_changes={"tie_embeddings": tied})
    loaded = load_run(source)
    if weights == "ema":
        set_weights(loaded.model, loaded.ema_weights)
    tokens = torch.randint(VOCABULARY, (2, 16), generator=torch.Generator().manual_seed(0))
    theirs, _ = opened(out)
    with torch.no_grad():
        _, logits = our_loss(loaded.model, micro_batch(tokens, tokens))
        assert distance(logits, theirs(tokens).logits) <= 1e-5
    with safe_open(out / "model.safetensors", framework="pt") as file:
        for name, weight in (
            ("embed_tokens", loaded.model.embed_tokens.weight),
            ("shared_head.head", loaded.model.lm_head.weight),
        ):
            assert torch.equal(file.get_tensor(f"model.layers.3.{name}.weight"), weight)


def test_same_text_and_same_loss(tmp_path):
    source, out = exported(tmp_path)
    loaded = load_run(source)
    ours, tokenizer = loaded.model, loaded.tokenizer()
    theirs, their_tokenizer = AutoModelForCausalLM.from_pretrained(out), AutoTokenizer.from_pretrained(out)
    text = "def f(x):\n    return"
    ids = [tokenizer.bos, *tokenizer.encode(text)]
    assert their_tokenizer(text)["input_ids"] == ids
    prompt = torch.tensor([ids])
    expected = theirs.generate(prompt, max_new_tokens=10, do_sample=False)[0, len(ids) :].tolist()
    mine = list(generate(ours, ids, Settings(max_tokens=10, eos=(tokenizer.eos,))))
    assert mine == [token for token in expected if token != tokenizer.eos]
    assert tokenizer.decode(mine) == their_tokenizer.decode(mine)
    tokens = torch.randint(VOCABULARY, (4, 33), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        loss, _ = our_loss(ours, micro_batch(tokens[:, :-1], tokens[:, 1:]))
        assert math.isclose(loss.item(), theirs(tokens, labels=tokens).loss.item(), abs_tol=1e-4)


def test_plain_rope_is_yarn_of_factor_1(tmp_path):
    """vLLM reads the one rightly and not the other; to transformers they are the same, to the bit."""
    source, out = exported(tmp_path)
    written = json.loads((out / "config.json").read_text())
    assert (written["rope_scaling"]["type"], written["rope_scaling"]["factor"]) == ("yarn", 1.0)
    assert written["rope_scaling"]["original_max_position_embeddings"] == written["max_position_embeddings"]
    tokens = torch.randint(VOCABULARY, (2, 50), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        found = opened(out)[0](tokens).logits
        (out / "config.json").write_text(json.dumps(written | {"rope_scaling": None}))
        assert torch.equal(found, opened(out)[0](tokens).logits)
    config = load_run(source).config
    assert config.attention.yarn is None
    assert import_folder(out, tmp_path / "back", precision="fp32").model.yarn is None


def test_shards(tmp_path):
    _, whole = exported(tmp_path, name="whole")
    _, parts = exported(tmp_path, name="parts", max_shard_size="20KB")
    assert not (whole / "model.safetensors.index.json").exists()
    index = json.loads((parts / "model.safetensors.index.json").read_text())
    files = sorted(path.name for path in parts.glob("*.safetensors"))
    assert len(files) > 3
    assert sorted(set(index["weight_map"].values())) == files
    sizes = []
    for name in files:
        with safe_open(parts / name, framework="pt") as file:
            held = [file.get_tensor(key) for key in file.keys()]  # noqa: SIM118
        sizes.append(sum(t.nbytes for t in held))
        assert sizes[-1] <= 20_000 or len(held) == 1
    assert index["metadata"]["total_size"] == sum(sizes)
    one, other = opened(whole)[0].state_dict(), opened(parts)[0].state_dict()
    assert all(torch.equal(one[name], other[name]) for name in one)


def test_bfloat16_keeps_the_bias_in_float32(tmp_path):
    _, out = exported(tmp_path, dtype="bfloat16")
    with safe_open(out / "model.safetensors", framework="pt") as file:
        for name in file.keys():  # noqa: SIM118
            expected = torch.float32 if name.endswith("e_score_correction_bias") else torch.bfloat16
            assert file.get_tensor(name).dtype == expected
    assert opened(out)[0].dtype == torch.bfloat16


def test_a_full_folder_is_left_alone(tmp_path):
    _, out = exported(tmp_path)
    before = {path.name: path.read_bytes() for path in out.iterdir()}
    with pytest.raises(FileExistsError, match="must be a new or empty folder"):
        exported(tmp_path)
    assert before == {path.name: path.read_bytes() for path in out.iterdir()}
    (tmp_path / "empty").mkdir()
    exported(tmp_path, name="empty")
    assert sorted(path.name for path in tmp_path.iterdir() if path.name.startswith(".")) == []


def test_others_may_read_what_they_may_read_of_the_folder(tmp_path):
    _, out = exported(tmp_path)
    assert {path.stat().st_mode & 0o044 for path in out.rglob("*.*")} == {out.stat().st_mode & 0o044}


def test_a_failed_export_leaves_nothing(tmp_path, monkeypatch):
    def fails(*args, **kwargs):
        raise OSError("the disk is full")

    monkeypatch.setattr("dsv3.checkpoint.shards.save_file", fails)
    with pytest.raises(OSError, match="disk is full"):
        exported(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["run", "tokenizers"]


SOFTMAX = ("router=softmax_group_limited", "balancing=none", "mtp=none")


@pytest.mark.parametrize(
    ("options", "changes", "words"),
    [
        (("memory=ngram",), {}, "memory._target_=plugins.memory.ngram.NGramMemory"),
        (("router=hash",), {}, "router._target_=plugins.router.fixed.HashRouter"),
        (("router.biased_groups=false",), {}, "router.biased_groups=false"),
        (("router.group_score_top=1",), {}, "router.group_score_top=1"),
        ((), {"n_groups": 8, "topk_groups": 4}, "too small"),
        (("mtp.concat=hidden_embedding",), {}, "mtp.concat=hidden_embedding.*mtp=false"),
        (("mtp.after_final_norm=false",), {}, "mtp.after_final_norm=false.*mtp=false"),
        (("attention=gqa",), {}, "attention=gqa goes with dense layers only"),
        (("attention=gqa",), {"n_dense_layers": 3}, "llama has no MTP layers"),
        (SOFTMAX[:2], {}, "deepseek_v2 has no MTP layers"),
        ((*SOFTMAX, "router.normalise_gates=true"), {}, "router.normalise_gates=true"),
        ((*SOFTMAX,), {"n_heads": 3}, "model.dim=32 is not a multiple of model.n_heads=3"),
        ((), {"norm_eps": 1e-5}, "model.norm_eps=1e-05"),
    ],
)
def test_what_cannot_be_held_is_refused(tmp_path, options, changes, words):
    with pytest.raises(ValueError, match=words):
        exported(tmp_path, *options, config_changes=changes)
    assert not (tmp_path / "out").exists()


def test_all_reasons_at_once(tmp_path):
    with pytest.raises(ValueError, match=r"(?s)norm_eps.*router\.biased_groups.*mtp\.concat"):
        exported(
            tmp_path, "router.biased_groups=false", "mtp.concat=hidden_embedding", config_changes={"norm_eps": 1e-5}
        )


def test_a_bias_that_v2_lacks_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"layers\.1 has a routing bias"):
        exported(tmp_path, "router=softmax_group_limited", "balancing=loss_free", "mtp=none")


def test_mtp_that_cannot_be_held_is_left_out_on_request(tmp_path):
    _, out = exported(tmp_path, "mtp.concat=hidden_embedding", mtp=False)
    assert not opened(out)[1]["unexpected_keys"]


def test_without_balancing_the_bias_is_zero(tmp_path):
    _, out = exported(tmp_path, "balancing=sequence_aux")
    assert not opened(out)[0].state_dict()["model.layers.1.mlp.gate.e_score_correction_bias"].any()


def status(arguments):
    try:
        return main(arguments)
    except SystemExit as ended:
        return ended.code


def test_from_the_command_line(tmp_path, capsys):
    config = configured(**SMALL)
    write_run(tmp_path / "run", config, random_model(config, seed=5))
    arguments = ["export", f"checkpoint={tmp_path / 'run'}", f"out={tmp_path / 'out'}", "mtp=false", "format=json"]
    assert status(arguments) == 0
    assert json.loads(capsys.readouterr().out)["config"]["model_type"] == "deepseek_v3"
    assert status(arguments) == 2
    assert "must be a new or empty folder" in capsys.readouterr().err
    for size in ("5", "0MB", "-1GB", "infGB", "nanGB"):
        assert status([*arguments[:2], f"out={tmp_path / 'other'}", f"max_shard_size={size}"]) == 2
        assert f"max_shard_size={size}: must be" in capsys.readouterr().err


@pytest.mark.parametrize("limit", [1, 700, 1000, 4096, 10**6])
def test_tensors_are_divided_among_files_as_by_hugging_face(tmp_path, limit):
    generator = torch.Generator().manual_seed(limit)
    sizes = torch.randint(1, 300, (40,), generator=generator).tolist()
    tensors = {f"t{i}": torch.zeros(size) for i, size in enumerate(sizes)}
    write_shards(tmp_path, tensors, dtype=torch.bfloat16, max_bytes=limit)
    halved = {name: tensor.bfloat16() for name, tensor in tensors.items()}
    theirs = split_torch_state_dict_into_shards(halved, max_shard_size=limit)
    assert {path.name for path in tmp_path.glob("*.safetensors")} == set(theirs.filename_to_tensors)
    for file, names in theirs.filename_to_tensors.items():
        with safe_open(tmp_path / file, framework="pt") as opened_file:
            assert set(opened_file.keys()) == set(names)
    index = tmp_path / "model.safetensors.index.json"
    assert index.exists() == theirs.is_sharded
    if theirs.is_sharded:
        written = json.loads(index.read_text())
        assert written["weight_map"] == theirs.tensor_to_filename
        assert written["metadata"]["total_size"] == theirs.metadata["total_size"]
