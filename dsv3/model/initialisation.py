"""Initial weights."""

import zlib

import torch
from torch import nn


def init_weights(model: nn.Module, *, std: float, seed: int) -> None:
    """Draw every matrix from normal(0, std); vectors keep what their modules set.

    Each parameter has its own generator, seeded by its name: models that share a name and a shape start from the
    same numbers there, whatever else differs, which pairs the arms of a study.
    """
    for name, parameter in model.named_parameters():
        if parameter.ndim >= 2:
            # One number below 2^32: a generator looks at no more of its seed.
            generator = torch.Generator().manual_seed(zlib.crc32(f"{seed}/{name}".encode()))
            nn.init.normal_(parameter, std=std, generator=generator)
