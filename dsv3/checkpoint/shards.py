"""Sharded safetensors, written and read with one shard in memory.

FP8: a matrix stored as E4M3 has a companion `<name>_scale_inv`, one FP32 factor for each block of 128 x 128 (as the
config's `weight_block_size` says; the blocks at the right and lower edges may be partial). The value is
E4M3 * factor.
"""

import contextlib
import json
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from huggingface_hub.serialization._base import parse_size_to_int
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from dsv3.strict_json import read_json

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
SCALE = "_scale_inv"


def parse_size(text: str) -> int:
    """Bytes of a size such as 500MB or 5GB."""
    try:
        size = parse_size_to_int(text)
    except (ValueError, OverflowError):  # not a number; infinity
        size = 0
    if size < 1:
        raise ValueError(f"max_shard_size={text}: must be a number with KB, MB, GB or TB, such as 5GB")
    return size


def stored_dtype(name: str, dtype: torch.dtype) -> torch.dtype:
    """The routing bias stays FP32: it moves by less than BF16 resolves."""
    return torch.float32 if name.endswith("e_score_correction_bias") else dtype


def write_shards(folder: Path, tensors: Mapping[str, Tensor], *, dtype: torch.dtype, max_bytes: int) -> None:
    """Write the tensors, cast to `dtype`, as files of at most `max_bytes` (a larger tensor has one of its own).

    One file is `model.safetensors`; several are numbered, with an index of what lies where.
    """
    sizes = {name: tensor.numel() * stored_dtype(name, dtype).itemsize for name, tensor in tensors.items()}
    shards: list[list[str]] = [[]]
    filled = 0
    for name, size in sizes.items():
        if shards[-1] and filled + size > max_bytes:
            shards.append([])
            filled = 0
        shards[-1].append(name)
        filled += size
    files = (
        [SINGLE]
        if len(shards) == 1
        else [f"model-{number:05d}-of-{len(shards):05d}.safetensors" for number in range(1, len(shards) + 1)]
    )
    for file, names in zip(files, shards, strict=True):
        # Copies: a file holds no two tensors of one storage, and ours are slices of stacked ones.
        contents = {name: tensors[name].to(stored_dtype(name, dtype), copy=True).contiguous() for name in names}
        save_file(contents, str(folder / file), metadata={"format": "pt"})
        (folder / file).chmod((folder / file).stat().st_mode | folder.stat().st_mode & 0o044)  # safetensors: 0600
    if len(shards) > 1:
        where = {name: file for file, names in zip(files, shards, strict=True) for name in names}
        index = {"metadata": {"total_size": sum(sizes.values())}, "weight_map": where}
        (folder / INDEX).write_text(json.dumps(index, indent=2) + "\n")


@contextlib.contextmanager
def opened(file: Path) -> Iterator[Any]:
    """A safetensors file.

    Raises:
        ValueError: it is cut or damaged.
    """
    try:
        with safe_open(str(file), framework="pt") as shard:
            yield shard
    except SafetensorError as error:
        raise ValueError(f"{file} cannot be read as safetensors: {error}") from None


def weight_map(index: Path) -> dict[str, str]:
    """Tensor -> file.

    Raises:
        ValueError: it is not the index of a sharded checkpoint.
    """
    content = read_json(index)
    where = content.get("weight_map") if isinstance(content, dict) else None
    if not isinstance(where, dict) or not all(isinstance(file, str) for file in where.values()):
        raise ValueError(f"{index} is not an index of safetensors: weight_map must say which file each tensor is in")
    return where


class Shards:
    """The tensors of a folder, read one at a time; at most one file is open."""

    def __init__(self, folder: Path, *, block: tuple[int, int] | None) -> None:
        """`block`: rows and columns that one factor of an FP8 matrix is for; None where nothing is FP8.

        Raises:
            FileNotFoundError: the folder holds no safetensors, or not all that its index names.
            ValueError: a file is damaged, or the index names one elsewhere.
        """
        self.folder = folder
        self.block = block
        if (folder / INDEX).exists():
            self.where: dict[str, str] = weight_map(folder / INDEX)
        elif (folder / SINGLE).exists():
            with opened(folder / SINGLE) as file:
                self.where = dict.fromkeys(file.keys(), SINGLE)
        else:
            raise FileNotFoundError(f"{folder}: {SINGLE} or {INDEX} is missing")
        outside = sorted(file for file in self.where.values() if Path(file).name != file)
        if outside:
            raise ValueError(f"{folder / INDEX} names {outside[0]}: it may only name files in its own folder")
        absent = sorted({file for file in self.where.values() if not (folder / file).exists()})
        if absent:
            raise FileNotFoundError(f"{folder} lacks {', '.join(absent)}")

    def names(self) -> list[str]:
        """Names of the tensors, without the factors of FP8 matrices."""
        return [name for name in self.where if not name.endswith(SCALE)]

    def read(self, names: Iterable[str]) -> Iterator[tuple[str, Tensor]]:
        """Each of these tensors with its name, file by file; FP8 as FP32, everything else as it is stored."""
        by_file: dict[str, list[str]] = {}
        for name in names:
            by_file.setdefault(self.where[name], []).append(name)
        for file, held in by_file.items():
            with opened(self.folder / file) as shard:
                for name in held:
                    yield name, self._value(name, shard)

    def _value(self, name: str, shard: Any) -> Tensor:
        tensor = shard.get_tensor(name)
        if tensor.element_size() > 1:
            return tensor
        if tensor.dtype != torch.float8_e4m3fn or self.block is None or name + SCALE not in self.where:
            raise ValueError(f"{name} is stored as {tensor.dtype}; only E4M3 with factors by block can be read")
        return from_blocks(tensor, self._scale(name, shard), self.block)

    def _scale(self, name: str, shard: Any) -> Tensor:
        """The factors of an FP8 matrix, which may have come to lie in the file after it."""
        if self.where[name + SCALE] == self.where[name]:
            return shard.get_tensor(name + SCALE)
        with opened(self.folder / self.where[name + SCALE]) as other:
            return other.get_tensor(name + SCALE)


def from_blocks(stored: Tensor, scale_inv: Tensor, block: tuple[int, int]) -> Tensor:
    """E4M3 [rows, columns] times its block's factor, FP32; `scale_inv` has one for each block, whole or partial."""
    rows, columns = stored.shape
    expected = [-(-rows // block[0]), -(-columns // block[1])]
    if list(scale_inv.shape) != expected:
        raise ValueError(f"factors of {list(scale_inv.shape)} blocks for {rows} x {columns}: {expected} are needed")
    factors = scale_inv.float().repeat_interleave(block[0], 0).repeat_interleave(block[1], 1)
    return stored.float() * factors[:rows, :columns]
