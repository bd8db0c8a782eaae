"""Preflight of relations between keys: refused exactly where the parts would refuse."""

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from omegaconf import OmegaConf

from dsv3.config.preflight import check
from dsv3.config.relations import check_relations
from dsv3.config.view import View
from dsv3.paths import CONF
from tests.config.looking import BASE, keys_of


@pytest.mark.parametrize(
    ("arguments", "keys"),
    [
        (["model.top_k=5"], ["model.top_k"]),
        (["model.top_k=4"], []),
        (["router.top_k=5"], ["router.top_k"]),
        (["model.n_groups=3"], ["model.n_groups"]),
        (["model.topk_groups=5"], ["model.topk_groups"]),
        (["model.qk_rope_head_dim=7"], ["model.qk_rope_head_dim"]),
        (["model.n_dense_layers=4"], ["model.n_dense_layers"]),
        (["model.n_dense_layers=-1"], ["model.n_dense_layers"]),
        (["model.n_routed_experts=0"], ["model.n_routed_experts"]),
        (["model.moe_inter_dim=0"], ["model.moe_inter_dim"]),
        (["model.dim=-64"], ["model.dim"]),
        (["model.q_lora_rank=0"], ["model.q_lora_rank"]),
        (["model.vocab_size=100"], ["model.vocab_size"]),
        (["data.micro_batch_size=0"], ["data.micro_batch_size"]),
        (["run.tokens=0"], ["run.tokens"]),
        (["data.fim.rate=1.5"], ["data.fim.rate"]),
        (["callbacks.ema.decay=-0.1"], ["callbacks.ema.decay"]),
        (["data.split_punctuation_newline=2"], ["data.split_punctuation_newline"]),
        (["mtp.depth=0"], ["mtp.depth"]),
        (["mtp.depth=512", "data.sequence_length=512"], ["mtp.depth"]),
        (["trainer.max_steps=0"], ["trainer.max_steps"]),
        (["trainer.devices=2"], ["trainer.devices"]),
        (["trainer.devices=4", "parallel=sharded"], []),
        (["parallel=pipeline", "parallel.stages=2"], ["parallel.stages"]),
        (["trainer.devices=4", "parallel=experts", "parallel.experts=3"], ["parallel.experts"]),
        (["trainer.devices=3", "parallel=experts"], ["parallel.experts"]),
        (["trainer.devices=4", "parallel=experts", "parallel.nodes=3"], ["parallel.nodes"]),
        (["trainer.devices=0"], ["trainer.devices"]),
        (["trainer.accelerator=tpu"], ["trainer.accelerator"]),
        (["trainer.max_time=00:00:00:00"], ["trainer.max_time"]),
        (["trainer.max_time=4h"], ["trainer.max_time"]),
        (["trainer.max_time=00:03:50:00", "~callbacks.interruption"], ["trainer.max_time"]),
        (["profile=true", "callbacks.profiling=null"], ["profile"]),
        (["trainer.max_time=3600"], ["trainer.max_time"]),
        (["trainer.max_time=00:03:50:00"], []),
        (["run.on_end=[no-such-program, now]"], ["run.on_end"]),
        (["run.on_end=[ls, -l]", "run.on_end=[]"], []),
        (["hydra/launcher=submitit_slurm"], ["precision"]),
        (["hydra/launcher=submitit_slurm", "precision=bf16"], []),
        (["hydra/launcher=submitit_slurm", "precision.choice=bf16"], []),
        (["data.fim.order=smp"], ["data.fim.order"]),
        (["optimizer.betas=[0.9]"], ["optimizer.betas"]),
        (["memory=ngram", "memory.rows=0"], ["memory.rows"]),
        (["precision=fp8_blockwise", "precision.tile=0"], ["precision.tile"]),
        (["precision=fp8_tensorwise", "precision.amax_history=-1"], ["precision.amax_history"]),
        (["schedule.segments=[]"], ["schedule.segments"]),
        (["run.init_from=nowhere"], ["run.init_from"]),
        (["resume=nowhere/at/all.ckpt"], ["resume"]),
        (["run.dir=pyproject.toml/run"], ["run.dir"]),
        (
            ["model.top_k=99", "model.dim=0", "callbacks.ema.decay=3", "seed=-1"],
            ["callbacks.ema.decay", "model.dim", "model.top_k", "seed"],
        ),
    ],
    ids=lambda value: " ".join(value),
)
def test_a_relation_that_does_not_hold_is_reported(arguments: list[str], keys: list[str]) -> None:
    """tiny: 3 layers, 16 experts in 4 groups of which 2 are kept, vocabulary of the tokenizer."""
    assert keys_of(check("train", BASE + arguments)) == keys


def test_source_weights_are_positive() -> None:
    name = next(iter(OmegaConf.load(CONF / "data" / "default.yaml").sources))
    assert keys_of(check("train", [*BASE, f"data.sources.{name}.weight=0"])) == [f"data.sources.{name}.weight"]


def test_schedule_segments_end_at_one_in_order() -> None:
    segments = "schedule.segments=[{until: %s, to: 1.0, shape: linear}, {until: %s, to: 0.0, shape: linear}]"
    assert check("train", [*BASE, segments % (0.5, 1.0)]) == []
    assert keys_of(check("train", [*BASE, segments % (0.5, 0.4)])) == ["schedule.segments.1.until"]
    assert keys_of(check("train", [*BASE, segments % (0.5, 0.9)])) == ["schedule.segments.1.until"]
    assert keys_of(check("train", [*BASE, segments % (1.5, 1.0)])) == ["schedule.segments.0.until"]


def relations(config: dict[str, Any]) -> list[str]:
    return keys_of(check_relations(View(OmegaConf.create({"hydra": {"runtime": {"choices": {}}}, **config})), skip=()))


sizes = st.integers(min_value=1, max_value=24)


@given(experts=sizes, top_k=sizes, groups=sizes, kept=sizes)
def test_routers_fit_exactly_when_the_kept_groups_hold_enough_experts(
    experts: int, top_k: int, groups: int, kept: int
) -> None:
    model = {"n_routed_experts": experts, "top_k": top_k, "n_groups": groups, "topk_groups": kept}
    router = {
        "n_experts": "${model.n_routed_experts}",
        "top_k": "${model.top_k}",
        "n_groups": "${model.n_groups}",
        "topk_groups": "${model.topk_groups}",
    }
    group_of_expert = [expert % groups for expert in range(experts)]
    even = len({group_of_expert.count(group) for group in range(groups)}) == 1
    available = sum(group < kept for group in group_of_expert)
    sound = even and kept <= groups and top_k <= available
    assert (relations({"model": model, "router": router}) == []) == sound


@given(experts=sizes, top_k=sizes)
def test_a_router_without_groups_is_bound_by_all_experts(experts: int, top_k: int) -> None:
    model = {"n_routed_experts": experts, "top_k": top_k, "n_groups": 7, "topk_groups": 9}
    router = {"n_experts": "${model.n_routed_experts}", "top_k": "${model.top_k}"}
    expected = [] if top_k <= experts else ["model.top_k"]
    assert relations({"model": model, "router": router}) == expected


@given(heads=sizes, shared=sizes)
def test_heads_share_keys_evenly_where_the_attention_has_them(heads: int, shared: int) -> None:
    model = {"n_heads": heads, "n_kv_heads": shared}
    grouped = {"n_heads": "${model.n_heads}", "n_kv_heads": "${model.n_kv_heads}"}
    assert relations({"model": model, "attention": {}}) == []
    expected = [] if heads % shared == 0 else ["model.n_kv_heads"]
    assert relations({"model": model, "attention": grouped}) == expected


def test_a_config_with_none_of_the_keys_has_no_relations() -> None:
    assert relations({"other": {"key": 1}}) == []
