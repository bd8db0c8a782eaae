"""Checkpoint folders, read without a process group. Nothing in one is executed.

    shard-00001-....safetensors     parts of tensors, those that one rank had, each with its place in the whole tensor
    meta.pt                         the nested content; an empty tensor of the meta device stands for one of the shards
    manifest.json                   sizes and checksums of these files, written last

A tensor is named by its path in the content, such as `state_dict/model.norm.weight`. Other files are not looked at.
"""

import json
import math
import zlib
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import safe_open
from torch import Tensor
from torch.utils._pytree import KeyPath, tree_map_with_path

from dsv3.strict_json import read_json

MANIFEST, META = "manifest.json", "meta.pt"
LARGE = ("state_dict/", "optimizer_states/", "callbacks/EMA/")
"""What may stay on disk until it is used: all that grows with the model. Everything else is read at once."""


class Piece(NamedTuple):
    """A part of a tensor in one file."""

    file: Any  # an open safetensors file
    place: tuple[slice, ...]


class Stored:
    """A tensor that stays on disk until `read`."""

    def __init__(self, name: str, shape: torch.Size, dtype: torch.dtype, pieces: list[Piece]) -> None:
        self.name, self.shape, self.dtype, self.pieces = name, shape, dtype, pieces

    def read(self) -> Tensor:
        """All of it.

        Raises:
            ValueError: the shards hold another dtype.
        """
        full = torch.empty(self.shape, dtype=self.dtype)
        for piece in self.pieces:
            part = piece.file.get_tensor(self.name)
            if part.dtype != self.dtype:
                raise ValueError(f"{self.name} is {part.dtype} in its shard and {self.dtype} in {META}")
            full[piece.place] = part
        return full

    def __deepcopy__(self, memo: Any) -> "Stored":
        return self  # Lightning copies what it gives to callbacks


def read(value: Any) -> Any:
    """A stored tensor's content; anything else as it is."""
    return value.read() if isinstance(value, Stored) else value


def name_of(path: KeyPath) -> str:
    """The name of what lies at a path of a nested content."""
    return "/".join(str(getattr(key, "key", getattr(key, "idx", key))) for key in path)


def map_named(change: Callable[[str, Tensor], Any], content: Any) -> Any:
    """A copy of the content with `change(name, tensor)` in place of each tensor."""
    return tree_map_with_path(
        lambda path, leaf: change(name_of(path), leaf) if isinstance(leaf, Tensor) else leaf, content
    )


def read_folder(folder: Path, *, lazy: bool) -> Any:
    """The nested content. `lazy`: with a `Stored` in place of each tensor whose name begins as `LARGE` has it.

    Raises:
        OSError: a file cannot be opened. Others, by what is damaged: it is not a whole checkpoint.
    """
    files = manifest(folder)
    for name, (size, _) in files.items():
        if not (folder / name).is_file() or (folder / name).stat().st_size != size:
            raise ValueError(f"{folder / name} is missing or cut")
    shards = [folder / name for name in files if name.endswith(".safetensors")]
    pieces = _pieces(shards)

    def found(name: str, leaf: Tensor) -> Any:
        if not leaf.is_meta:
            return leaf
        stored = Stored(name, leaf.shape, leaf.dtype, pieces.get(name, []))
        sizes = [math.prod(part.stop - part.start for part in piece.place) for piece in stored.pieces]
        if sum(sizes) != leaf.numel():
            raise ValueError(f"{folder} lacks a part of {name}")
        return stored if lazy and name.startswith(LARGE) else stored.read()

    return map_named(found, torch.load(folder / META, map_location="cpu", weights_only=True))


def manifest(folder: Path) -> Mapping[str, tuple[int, int]]:
    """File name -> its size and checksum.

    Raises:
        OSError: it cannot be opened. ValueError, TypeError, KeyError: it is none.
    """
    entries = read_json(folder / MANIFEST)["files"]
    files = {name: (int(entry["bytes"]), int(entry["crc32"])) for name, entry in entries.items()}
    if META not in files or any(Path(name).name != name for name in files):
        raise ValueError(f"{folder / MANIFEST} is not a checkpoint's")
    return files


def is_whole(folder: Path) -> bool:
    """Whether all files that the manifest names have its sizes and checksums."""
    return all(
        (folder / name).is_file() and described(folder / name) == expected
        for name, expected in manifest(folder).items()
    )


def described(file: Path) -> tuple[int, int]:
    """Size and CRC32."""
    size = checksum = 0
    with file.open("rb") as content:
        while block := content.read(1 << 20):
            size, checksum = size + len(block), zlib.crc32(block, checksum)
    return size, checksum


def _pieces(shards: list[Path]) -> dict[str, list[Piece]]:
    """Name -> where its parts are. Torch's writer notes their offsets in each file's header."""
    found: dict[str, list[Piece]] = {}
    for path in shards:
        file = safe_open(str(path), framework="pt")
        offsets = json.loads(file.metadata()["DCP_SHARDING_INFO"])
        for name in file.keys():  # noqa: SIM118 - not a dict
            place = tuple(_places(offsets[name]["saved_offsets"], file.get_slice(name).get_shape()))
            found.setdefault(name, []).append(Piece(file, place))
    return found


def _places(offsets: list[int], shape: list[int]) -> Iterator[slice]:
    for offset, size in zip(offsets, shape, strict=True):
        yield slice(offset, offset + size)
