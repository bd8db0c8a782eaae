"""Writes a checkpoint folder (`dsv3.checkpoint.checkpoint_folder`): every rank its parts of the tensors, at once.

The tensors are written by torch.distributed.checkpoint as safetensors; its own format would keep a pickle beside them.
"""

import json
import os
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.tensor import DTensor

from dsv3.checkpoint.checkpoint_folder import MANIFEST, META, described, map_named
from dsv3.checkpoint.run_folder import delete, put_in_place, temporary_of
from dsv3.distributed.agree import gathered, of_rank_zero, rank, several

STORABLE = {
    *(torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.float8_e4m3fn, torch.float8_e5m2),
    *(torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8, torch.bool),
}
"""dtypes that safetensors has; a tensor of another one stays in meta.pt."""


def outline(content: Any) -> Any:
    """The content with a tensor of the meta device in place of each sharded one."""
    return map_named(lambda _, tensor: _empty(tensor) if isinstance(tensor, DTensor) else tensor, content)


def shards_of(content: Any) -> dict[str, Tensor]:
    """The sharded tensors of a nested content, by name."""
    return _collected(content, lambda tensor: isinstance(tensor, DTensor))


def save_folder(path: Path, content: Any, shards: Mapping[str, Tensor]) -> None:
    """Write a checkpoint, which is there under its name when it is whole. All ranks call this together.

    content: nested; that of rank 0 counts. A tensor of the meta device stands for one that ranks have between them.
    shards: this rank's parts of those, by name.

    Raises:
        OSError: a rank could not write; all ranks raise what the first such rank did.
    """
    temporary = of_rank_zero(temporary_of(path))
    tensors = {**shards, **(_collected(content, _is_storable) if rank() == 0 else {})}
    try:
        _write_shards(temporary, tensors)
        own = {file.name: described(file) for file in temporary.glob(f"shard-{rank() + 1:05d}-*.safetensors")}
        files = {name: entry for part in gathered(own) for name, entry in part.items()}
        on_rank_zero(lambda: _finish(temporary, path, content, files))
    finally:
        if rank() == 0:
            delete(temporary)


def on_rank_zero(act: Callable[[], None]) -> None:
    """Rank 0 acts, and the others wait for it; what it raises, all raise."""
    error: Exception | None = None
    if rank() == 0:
        try:
            act()
        except Exception as raised:
            error = raised
    told = of_rank_zero(error)
    if told is not None:
        raise error or told


def _write_shards(folder: Path, tensors: Mapping[str, Tensor]) -> None:
    writer = dcp.HuggingFaceStorageWriter(str(folder), save_distributed=True)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is disabled")
        try:
            dcp.save(_apart(tensors), storage_writer=writer, no_dist=not several())
        except dcp.CheckpointException as error:  # of all ranks, and no Exception: a run's last words would be lost
            failed, (cause, _) = next(iter(error.failures.items()))
            cause.add_note(f"on rank {failed}, while saving a checkpoint")
            raise cause from None


def _apart(tensors: Mapping[str, Tensor]) -> dict[str, Any]:
    """The tensors, each contiguous with a storage of its own, as safetensors needs them: tied weights share one."""
    seen: set[int] = set()
    found = {}
    for name, tensor in tensors.items():
        tensor = tensor.detach().contiguous()
        part = tensor.to_local() if isinstance(tensor, DTensor) else tensor
        storage = part.untyped_storage().data_ptr()
        found[name] = tensor.clone() if storage in seen else tensor
        seen |= {storage} - {0}  # 0: nothing of it is here
    return found


def _finish(temporary: Path, path: Path, content: Any, files: Mapping[str, tuple[int, int]]) -> None:
    """Write what is not in shards, and give the folder its name."""
    rest = map_named(lambda _, tensor: _empty(tensor) if _is_storable(tensor) else tensor, content)
    torch.save(rest, temporary / META)
    entries = {
        name: {"bytes": size, "crc32": crc}
        for name, (size, crc) in (*files.items(), (META, described(temporary / META)))
    }
    (temporary / MANIFEST).write_text(json.dumps({"files": entries}, indent=1) + "\n")
    for written in (temporary / META, temporary / MANIFEST, temporary):  # torch has done so with the shards
        _flush_to_disk(written)
    put_in_place(temporary, path)


def _flush_to_disk(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _is_storable(tensor: Tensor) -> bool:
    """Whether safetensors holds it as it is; others, such as subclasses, stay in meta.pt."""
    plain = type(tensor) in (Tensor, torch.nn.Parameter) and tensor.layout == torch.strided
    return plain and not tensor.is_meta and tensor.numel() > 0 and tensor.dtype in STORABLE


def _empty(tensor: Tensor) -> Tensor:
    return torch.empty(tensor.shape, dtype=tensor.dtype, device="meta")


def _collected(content: Any, wanted: Callable[[Tensor], bool]) -> dict[str, Tensor]:
    found: dict[str, Tensor] = {}

    def note(name: str, tensor: Tensor) -> None:
        if wanted(tensor):
            found[name] = tensor

    map_named(note, content)
    return found
