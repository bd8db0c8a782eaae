"""From a composed config to model and data."""

from functools import partial
from pathlib import Path
from typing import Any

import torch
from omegaconf import DictConfig, OmegaConf
from torch import Tensor

from dsv3.config.part import part
from dsv3.contracts import (
    MTP,
    Attention,
    Balancing,
    Data,
    Dispatch,
    Experts,
    Memory,
    Precision,
    Router,
    Tokenizer,
)
from dsv3.model.decoder import Block, Decoder
from dsv3.model.initialisation import init_weights
from dsv3.model.layers import SwiGLU
from dsv3.model.moe import MoE
from dsv3.paths import CONF

CONTRACTS = {
    "attention": Attention,
    "balancing": Balancing,
    "dispatch": Dispatch,
    "experts": Experts,
    "memory": Memory,
    "mtp": MTP,
    "precision": Precision,
    "router": Router,
}


def build_model(config: DictConfig, *, init: bool = True) -> Decoder:
    """Assemble the decoder that the config describes, with weights drawn from `seed` (or unset: `init=False`)."""
    shapes = config.model
    torch.manual_seed(config.seed)  # what plugins draw when they are built, such as a hash table
    precision = fitting(config, "precision", part(config.precision))
    dispatch = fitting(config, "dispatch", part(config.dispatch))
    factories = {kind: part(config[kind]) for kind in CONTRACTS if kind not in ("precision", "dispatch")}

    def made(kind: str, **arguments: Any) -> Any:
        return fitting(config, kind, factories[kind](**arguments))

    def mlp(layer: int) -> MoE | SwiGLU:
        if layer < shapes.n_dense_layers:
            return SwiGLU(dim=shapes.dim, inter_dim=shapes.inter_dim, precision=precision)
        shared = shapes.n_shared_experts * shapes.moe_inter_dim
        return MoE(
            router=made("router"),
            balancing=made("balancing"),
            dispatch=dispatch,
            experts=made("experts", precision=precision),
            shared_experts=SwiGLU(dim=shapes.dim, inter_dim=shared, precision=precision) if shared else None,
        )

    def block(layer: int) -> Block:
        attention = made("attention", precision=precision)
        return Block(dim=shapes.dim, norm_eps=shapes.norm_eps, attention=attention, mlp=mlp(layer))

    model = Decoder(
        vocab_size=shapes.vocab_size,
        dim=shapes.dim,
        n_layers=shapes.n_layers,
        norm_eps=shapes.norm_eps,
        tie_embeddings=shapes.tie_embeddings,
        isolate_documents=config.data.isolate_documents,
        memory=partial(made, "memory"),
        block=block,
        mtp=partial(made, "mtp"),
        precision=precision,
    )
    if init:
        init_weights(model, std=shapes.init_std, seed=config.seed)
    return model


def fitting(config: DictConfig, kind: str, made: Any) -> Any:
    """`made`, a part of this kind.

    Raises:
        ValueError: it lacks what the kind's contract states; its class, which `allow` may name, is of no such kind.
    """
    contract = CONTRACTS[kind]
    members = {*contract.__annotations__, *(name for name in vars(contract) if name == "__call__" or name[0] != "_")}
    if lacking := sorted(name for name in members if not hasattr(made, name)):
        raise ValueError(f"{kind}._target_={config[kind]._target_}: is no {kind}; it lacks {', '.join(lacking)}")
    return made


def build_data(config: DictConfig, *, tokenizer: Tokenizer | None = None) -> Data:
    """The datamodule, set up; with the tokenizer that is given (a trained model's own), or else the config's."""
    factory = part(config.tokenizer) if tokenizer is None else lambda **_: tokenizer
    data = part(config.data)(tokenizer=factory)
    data.setup("fit")
    return data


def load_tokenizer(directory: str | Path) -> Tokenizer:
    """The tokenizer that a run keeps in a folder, read by what conf/saved_tokenizer.yaml names."""
    return part(OmegaConf.load(CONF / "saved_tokenizer.yaml"), directory=str(directory))


def token_bytes(tokenizer: Tokenizer, vocab_size: int) -> Tensor:
    """Bytes that each token stands for, 0 for special and unused ones, int64 [V]."""
    lengths = [len(tokenizer.decode_bytes([i])) if i < tokenizer.vocab_size else 0 for i in range(vocab_size)]
    return torch.tensor(lengths)
