"""A run folder as training leaves one, without the training."""

from functools import cache
from pathlib import Path

import torch
from omegaconf import DictConfig, OmegaConf

from data.tokenizer import ByteLevelBPE, train_bpe
from dsv3.checkpoint.run_folder import RunFolder
from dsv3.model.decoder import Decoder

VOCABULARY = 300
TEXTS = {"code": ["def f(x):\n    return x + 1\n" * 9], "prose": ["It was a bright cold day in April. " * 9]}


@cache
def tokenizer(folder: Path) -> ByteLevelBPE:
    return train_bpe(vocab_size=VOCABULARY, sample_characters=10**6, texts=TEXTS, cache_dir=str(folder))


def write_run(path: Path, config: DictConfig, model: Decoder, *, tokens: int = 4096) -> Path:
    """The EMA's weights are the live ones minus a hundredth."""
    folder = RunFolder(path)
    checkpoint = {
        "state_dict": {f"model.{name}": tensor for name, tensor in model.state_dict().items()},
        "dsv3": {"tokens_seen": tokens, "data_state": {}},
        "callbacks": {"EMA": {"weights": {name: p.detach() - 0.01 for name, p in model.named_parameters()}}},
    }
    folder.checkpoint_path(tokens).parent.mkdir(parents=True)
    torch.save(checkpoint, folder.checkpoint_path(tokens))
    OmegaConf.save(config, folder.config_path, resolve=True)
    tokenizer(path.parent).save(str(folder.tokenizer_path))
    return path
