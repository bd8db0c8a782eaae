"""Composed configs, skeletons and built models for the tests of planning."""

from functools import cache
from pathlib import Path

import torch
from hydra import compose, initialize_config_dir
from omegaconf import DictConfig

from dsv3.build import build_model
from dsv3.model.decoder import Decoder
from dsv3.planning.skeleton import Skeleton, read_skeleton

CONF = Path(__file__).resolve().parents[2] / "conf"
PRESETS = sorted(path.stem for path in (CONF / "model").glob("*.yaml"))


@cache
def config(*overrides: str) -> DictConfig:
    with initialize_config_dir(str(CONF), version_base="1.3"):
        return compose("train", overrides=list(overrides))


@cache
def skeleton(*overrides: str) -> Skeleton:
    return read_skeleton(config(*overrides))


@cache
def on_meta(*overrides: str) -> Decoder:
    """The whole model, every layer of it, without memory."""
    return built_on_meta(config(*overrides))


def built_on_meta(config: DictConfig) -> Decoder:
    with torch.device("meta"):
        return build_model(config, init=False)
