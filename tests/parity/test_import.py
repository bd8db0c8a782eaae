"""`python -m dsv3 import`: back from an export bit for bit, and from DeepSeek's and transformers' folders."""

import shutil

import pytest
import torch
from hydra.utils import instantiate
from omegaconf import OmegaConf
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from dsv3.build import build_model
from dsv3.checkpoint.huggingface import run_config
from dsv3.checkpoint.loading import load_run
from dsv3.checkpoint.shards import Shards
from dsv3.model.parameters import count_parameters
from dsv3.tools import export, generate, import_
from tests.parity.runs import write_run
from tests.parity.test_export import SMALL
from tests.parity.twins import configured, distance, load_twin, micro_batch, our_loss, random_model

DENSE = {"n_dense_layers": 3, "n_routed_experts": 0, "n_shared_experts": 0}
MODELS = {
    "v3": ((), {}),
    "v3 without MTP": (("mtp=none",), {"n_shared_experts": 0, "q_lora_rank": None}),
    "v3, two depths, tied": (("mtp.depth=2", "attention.decode=naive"), {"tie_embeddings": True}),
    "v3, loss-free alone": (("balancing=loss_free",), {"n_groups": 1, "topk_groups": 1}),
    "v3, dense, YaRN": (
        ("mtp=none",),
        DENSE | {"yarn": {"factor": 40.0, "original_length": 64, "beta_fast": 32, "beta_slow": 1, "mscale": 0.7}},
    ),
    "v3, odd widths": (("experts=loop",), {"moe_inter_dim": 7}),
    "v2": (("router=softmax_group_limited", "balancing=none", "mtp=none"), {}),
    "v2 lite": (("router=softmax", "balancing=sequence_aux", "mtp=none"), {"n_groups": 1, "topk_groups": 1}),
    "llm": (("attention=gqa", "balancing=none", "mtp=none"), DENSE),
    "llm, YaRN": (
        ("attention=gqa", "balancing=none", "mtp=none"),
        DENSE | {"yarn": {"factor": 4.0, "original_length": 64, "beta_fast": 16, "beta_slow": 2, "mscale": 0.9}},
    ),
}


@pytest.fixture
def source(tmp_path, request):
    options, changes = MODELS[getattr(request, "param", "v3")]
    config = configured(*options, **(SMALL | changes))
    return write_run(tmp_path / "run", config, random_model(config, seed=5))


def through(tmp_path, source, **keys):
    """The run after an export and an import."""
    export.run(export.Options(checkpoint=str(source), out=str(tmp_path / "hf"), **keys))
    import_.run(import_.Options(path=str(tmp_path / "hf"), out=str(tmp_path / "back"), precision="fp32"))
    return load_run(tmp_path / "back")


@pytest.mark.parametrize("source", MODELS, indirect=True)
def test_export_and_import_are_bitwise(tmp_path, source):
    before, after = load_run(source), through(tmp_path, source, max_shard_size="30KB")
    routing_bias = "mlp.balancing."
    old, new = (
        {name: t for name, t in loaded.model.state_dict().items() if routing_bias not in name}
        for loaded in (before, after)
    )
    assert old.keys() == new.keys()
    assert all(torch.equal(old[name], new[name]) for name in old)
    for (name, moe), (_, other) in zip(before.model.moe_layers(), after.model.moe_layers(), strict=True):
        assert torch.equal(moe.balancing.bias, other.balancing.bias), name
    assert after.tokens == before.tokens
    assert after.ema_weights.keys() == before.ema_weights.keys()
    drop = {"init_std"}  # a training setting
    shapes, others = (
        {key: value for key, value in OmegaConf.to_container(loaded.config.model).items() if key not in drop}
        for loaded in (before, after)
    )
    assert shapes == others
    assert OmegaConf.to_container(before.config.attention) == OmegaConf.to_container(after.config.attention)
    tokens = torch.randint(SMALL["vocab_size"], (2, 9), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        one, other = (our_loss(loaded.model, micro_batch(tokens, tokens))[1] for loaded in (before, after))
    assert torch.equal(one, other)


def test_the_tokenizer_comes_along(tmp_path, source):
    before, loaded = load_run(source).tokenizer(), through(tmp_path, source)
    for_data = instantiate(loaded.config.tokenizer)(texts={"code": ["other"]}, cache_dir=str(tmp_path))
    text = "def f(x): return 1"
    for after in (loaded.tokenizer(), for_data):
        assert after.encode(text) == before.encode(text)
        assert after.eos == before.eos


def test_an_imported_run_generates(tmp_path, source):
    through(tmp_path, source)
    one, other = (
        generate.run(generate.Options(checkpoint=str(run), prompt="def f(x):", max_tokens=8))
        for run in (source, tmp_path / "back")
    )
    assert one["text"] == other["text"]
    assert one["tokens"] > 0


@pytest.mark.parametrize("source", ["v3", "v2", "llm, YaRN"], indirect=True)
def test_what_transformers_saves(tmp_path, source):
    """transformers keeps neither the MTP layer nor our section, and writes RoPE's settings otherwise."""
    export.run(export.Options(checkpoint=str(source), out=str(tmp_path / "hf")))
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "hf")
    del theirs.config.dsv3
    theirs.save_pretrained(tmp_path / "theirs")
    import_.run(import_.Options(path=str(tmp_path / "theirs"), out=str(tmp_path / "back"), precision="fp32"))
    tokens = torch.randint(SMALL["vocab_size"], (2, 9), generator=torch.Generator().manual_seed(0))
    ours = load_run(tmp_path / "back").model
    assert ours.mtp.depth == 0
    with torch.no_grad():
        _, logits = our_loss(ours, micro_batch(tokens, tokens))
        assert distance(logits, load_twin(tmp_path / "theirs")(tokens).logits) <= 1e-5


def test_one_file_is_open_at_a_time(tmp_path, source, monkeypatch):
    """So that memory stays under one shard plus the model."""
    export.run(export.Options(checkpoint=str(source), out=str(tmp_path / "hf"), max_shard_size="10KB"))
    from dsv3.checkpoint import shards

    original, held, most = shards.safe_open, [0], [0]

    class Counted:
        def __init__(self, *args, **kwargs):
            self.file = original(*args, **kwargs)

        def __enter__(self):
            held[0] += 1
            most[0] = max(most[0], held[0])
            return self.file.__enter__()

        def __exit__(self, *args):
            held[0] -= 1
            return self.file.__exit__(*args)

    monkeypatch.setattr(shards, "safe_open", Counted)
    import_.run(import_.Options(path=str(tmp_path / "hf"), out=str(tmp_path / "back")))
    assert most == [1]


PUBLISHED = {
    "model_type": "deepseek_v3",
    "attention_bias": False,
    "aux_loss_alpha": 0.0,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "first_k_dense_replace": 3,
    "hidden_act": "silu",
    "hidden_size": 7168,
    "initializer_range": 0.5,
    "intermediate_size": 18432,
    "kv_lora_rank": 512,
    "max_position_embeddings": 163840,
    "moe_intermediate_size": 2048,
    "moe_layer_freq": 1,
    "n_group": 8,
    "n_routed_experts": 256,
    "n_shared_experts": 1,
    "norm_topk_prob": True,
    "num_attention_heads": 128,
    "num_experts_per_tok": 8,
    "num_hidden_layers": 61,
    "num_nextn_predict_layers": 1,
    "q_lora_rank": 1536,
    "qk_nope_head_dim": 128,
    "qk_rope_head_dim": 64,
    "rms_norm_eps": 1e-06,
    "rope_scaling": {
        "beta_fast": 32,
        "beta_slow": 1,
        "factor": 40,
        "mscale": 1.0,
        "mscale_all_dim": 1.0,
        "original_max_position_embeddings": 4096,
        "type": "yarn",
    },
    "rope_theta": 10000,
    "routed_scaling_factor": 2.5,
    "scoring_func": "sigmoid",
    "tie_word_embeddings": False,
    "topk_group": 4,
    "topk_method": "noaux_tc",
    "v_head_dim": 128,
    "vocab_size": 129280,
}
"""DeepSeek-V3's config.json, with two training settings that must not be believed."""


def imported_config(tmp_path, **changes):
    hf = {key: value for key, value in (PUBLISHED | changes).items() if value != "absent"}
    return run_config(hf, mtp_layers=1, out=tmp_path / "run", precision="bf16")


def test_the_published_config(tmp_path):
    config = imported_config(tmp_path)
    with torch.device("meta"):
        model = build_model(config, init=False)
    assert count_parameters(model) == (671_026_419_200, 37_552_282_624, 11_610_068_224)
    attention = model.attention(0)
    assert abs(attention.scale - 0.13523) < 1e-5
    assert next(model.moe_layers())[1].router.group_score_top == 2


def test_trap_09_training_settings_never_come_from_an_hf_config(tmp_path):
    read, ours = (OmegaConf.to_container(config) for config in (imported_config(tmp_path), configured()))
    for section in ("balancing", "optimizer", "schedule", "callbacks", "objective", "grad_clip"):
        assert read[section] == ours[section]
    assert read["run"]["tokens"] == ours["run"]["tokens"]
    assert read["model"]["init_std"] == ours["model"]["init_std"]


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"model_type": "mixtral"}, "model_type=mixtral"),
        ({"hidden_act": "gelu"}, "hidden_act=gelu"),
        ({"norm_topk_prob": False}, "norm_topk_prob=False"),
        ({"rope_interleave": False}, "rope_interleave=False"),
        ({"rms_norm_eps": 1e-5}, "rms_norm_eps=1e-05"),
        ({"kv_lora_rank": "absent"}, "lacks kv_lora_rank"),
        ({"rope_scaling": {"type": "linear", "factor": 2}}, "type linear"),
        ({"rope_scaling": PUBLISHED["rope_scaling"] | {"mscale": 0.5}}, "scales cos and sin"),
    ],
)
def test_configs_that_no_option_builds(tmp_path, changes, words):
    with pytest.raises(ValueError, match=words):
        imported_config(tmp_path, **changes)


def edit(folder, change):
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors")


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda t: t.pop("model.norm.weight"), "lacks 1 weights, such as model.norm.weight"),
        (lambda t: t.update({"model.layers.0.self_attn.q_proj.bias": torch.zeros(2)}), "q_proj.bias is a weight that"),
        (lambda t: t.update({"model.norm.weight": torch.zeros(3)}), r"model.norm.weight is \[3\]"),
        (lambda t: t.update({"model.norm.weight": torch.zeros(32).to(torch.float8_e5m2)}), "float8_e5m2"),
    ],
)
def test_weights_that_do_not_fit(tmp_path, source, change, words):
    export.run(export.Options(checkpoint=str(source), out=str(tmp_path / "hf")))
    edit(tmp_path / "hf", change)
    with pytest.raises(ValueError, match=words):
        import_.run(import_.Options(path=str(tmp_path / "hf"), out=str(tmp_path / "back")))
    assert not (tmp_path / "back").exists()


def test_missing_files(tmp_path, source):
    export.run(export.Options(checkpoint=str(source), out=str(tmp_path / "hf"), max_shard_size="30KB"))
    options = import_.Options(path=str(tmp_path / "hf"), out=str(tmp_path / "back"))
    shard = min((tmp_path / "hf").glob("*.safetensors"))
    shard.rename(tmp_path / "away")
    with pytest.raises(FileNotFoundError, match=shard.name):
        import_.run(options)
    for file in (tmp_path / "hf").glob("*.safetensors*"):
        file.unlink()
    with pytest.raises(FileNotFoundError, match="is missing"):
        import_.run(options)
    shutil.rmtree(tmp_path / "hf")
    with pytest.raises(FileNotFoundError, match=r"config\.json is missing"):
        import_.run(options)
    with pytest.raises(FileExistsError, match="must be a new or empty folder"):
        import_.run(import_.Options(path=str(tmp_path / "hf"), out=str(source)))


def test_unknown_precision(tmp_path, source):
    export.run(export.Options(checkpoint=str(source), out=str(tmp_path / "hf")))
    with pytest.raises(ValueError, match="precision=fp3: must be one of"):
        import_.run(import_.Options(path=str(tmp_path / "hf"), out=str(tmp_path / "back"), precision="fp3"))


def test_shards_of_a_folder_without_index(tmp_path, source):
    export.run(export.Options(checkpoint=str(source), out=str(tmp_path / "hf")))
    read = dict(Shards(tmp_path / "hf", block=None).read(["model.norm.weight"]))
    assert torch.equal(read["model.norm.weight"], load_run(source).model.norm.weight)
