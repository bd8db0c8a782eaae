"""Process setup: device, allocator, garbage collector, log and warning filters."""

import ctypes
import gc
import logging
import os
import resource
import sys
import warnings
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

M_TRIM_THRESHOLD, M_TOP_PAD, M_MMAP_MAX = -1, -2, -4
"""Of glibc's mallopt(3)."""

OUT_OF_TIME = 75
"""Exit status that asks for the same command again: sysexits.h calls it EX_TEMPFAIL."""


def set_up_process() -> None:
    """Plain log lines, memory that is kept when tensors are freed, and no garbage collection of what imports made."""
    quieten_libraries()
    keep_freed_memory()
    gc.collect()
    gc.freeze()  # a full collection looks at a million objects of imported modules; there is nothing to find


def device_named(choice: str, *, key: str = "device") -> "torch.device":
    """The device for `auto` (cuda where torch sees a GPU, else cpu), `cpu` or `cuda`; `key` is where it was chosen.

    Raises:
        ValueError: cuda is asked for and torch sees no GPU, or mps, which was never tested.
    """
    import torch

    if choice == "mps":
        raise ValueError(f"{key}=mps: must be auto, cpu or cuda; nobody has tested mps yet")
    found = torch.cuda.is_available()
    if choice == "cuda" and not found:
        raise ValueError(f"{key}=cuda: torch sees no GPU here; {key}=cpu does without one")
    return torch.device("cuda" if choice != "cpu" and found else "cpu")


def keep_freed_memory() -> None:
    """Have glibc reuse the memory of freed tensors instead of returning it to the system.

    A training step allocates and frees the same large tensors again and again. Returned memory comes back as pages that
    the kernel must first fill with zeros: writing to it runs at 6 GB/s instead of 29. Other C libraries are left alone.
    """
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError):
        return
    mallopt(M_MMAP_MAX, 0)
    mallopt(M_TRIM_THRESHOLD, 2**31 - 1)
    mallopt(M_TOP_PAD, 64 * 2**20)


def resident(field: str) -> int:
    """Bytes, on Linux: `VmRSS`, the resident set now, or `VmHWM`, its peak."""
    lines = Path("/proc/self/status").read_text().splitlines()
    (line,) = (line for line in lines if line.startswith(f"{field}:"))
    return int(line.split()[1]) * 1024


def peak_resident_bytes() -> int:
    """Peak of the resident set. getrusage on Linux may count a parent's, so it is asked elsewhere only."""
    if sys.platform == "linux":
        return resident("VmHWM")
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss  # bytes on macOS


def launched_rank() -> int:
    """This process's number among those that torchrun or SLURM started; 0 where nothing did."""
    return int(os.environ.get("RANK") or os.environ.get("SLURM_PROCID") or 0)


def quieten_libraries() -> None:
    """Plain lines on stderr; Lightning's advertisements and its warnings about itself stay off the console. Of several
    ranks the first speaks."""
    logging.basicConfig(level=logging.INFO if launched_rank() == 0 else logging.ERROR, format="%(message)s")
    logging.getLogger("torch.distributed.tensor._redistribute").setLevel(logging.ERROR)  # how it gathers experts
    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)
    logging.getLogger("lightning.fabric").setLevel(logging.WARNING)
    warnings.filterwarnings("ignore", module=r"lightning\..*", category=FutureWarning)
    warnings.filterwarnings("ignore", module=r"lightning\..*", category=DeprecationWarning)
    warnings.filterwarnings("ignore", message=r".*(num_workers|isinstance\(treespec).*")
