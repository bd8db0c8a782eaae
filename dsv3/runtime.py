"""Process setup: interrupts, device, allocator, garbage collector, log and warning filters."""

import _thread
import ctypes
import gc
import logging
import os
import resource
import signal
import sys
import threading
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

M_TRIM_THRESHOLD, M_TOP_PAD, M_MMAP_MAX = -1, -2, -4
"""Of glibc's mallopt(3)."""

OUT_OF_TIME = 75
"""Exit status that asks for the same command again: sysexits.h calls it EX_TEMPFAIL."""

OBJECTS_WHILE_IMPORTING = 50_000
"""New ones, before Python looks for garbage among them: at its own 700, that is a seventh of `import lightning`."""
USUAL_THRESHOLDS = gc.get_threshold()

_sigint_came = threading.Event()  # within `interruptible`


class _Interrupt(KeyboardInterrupt):
    """What Ctrl-C raises. A library may catch it, most often while it is imported, and go on; then it is sent again."""

    def __del__(self) -> None:
        if _sigint_came.is_set():
            _thread.start_new_thread(_send_again, ())  # what is raised within __del__ goes nowhere


def _send_again() -> None:
    time.sleep(0.1)
    if _sigint_came.is_set():
        os.kill(os.getpid(), signal.SIGINT)


def interrupt(number: int, frame: FrameType | None) -> None:
    """Handler of SIGINT."""
    _sigint_came.set()
    raise _Interrupt


@contextmanager
def interruptible() -> Iterator[None]:
    """End the process with one line and exit status 130 where Ctrl-C ends the block, or what a library made of it."""
    is_outermost = threading.current_thread() is threading.main_thread()
    is_outermost = is_outermost and signal.getsignal(signal.SIGINT) is signal.default_int_handler
    if is_outermost:
        signal.signal(signal.SIGINT, interrupt)
    try:
        yield
    except (KeyboardInterrupt, Exception) as error:
        if isinstance(error, KeyboardInterrupt) or _sigint_came.is_set():
            print("interrupted", file=sys.stderr)
            sys.exit(128 + signal.SIGINT)
        raise
    finally:
        if is_outermost:
            _sigint_came.clear()
            signal.signal(signal.SIGINT, signal.default_int_handler)


@contextmanager
def imports_uncollected() -> Iterator[None]:
    """Look for garbage seldom, within this block or until `set_up_process`."""
    before = gc.get_threshold()
    gc.set_threshold(OBJECTS_WHILE_IMPORTING, *before[1:])
    try:
        yield
    finally:
        gc.set_threshold(*before)


def set_up_process() -> None:
    """Plain log lines, memory that is kept when tensors are freed, and no garbage collection of what imports made."""
    quieten_libraries()
    keep_freed_memory()
    gc.collect()
    gc.freeze()  # a full collection looks at a million objects of imported modules; there is nothing to find
    gc.set_threshold(*USUAL_THRESHOLDS)


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
