"""Functions that run as the ranks of a process group, for checks of what works over several.

A new Python forks the ranks before it computes anything: neither the caller's threads nor its script are in their way.
Functions and arguments travel by value, so that those of a script or a test will do.
"""

import multiprocessing
import multiprocessing.connection
import os
import pickle
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import cloudpickle

SECONDS = 120.0
"""That all of it may take, and that a rank waits for the others."""

START = (
    "import sys; sys.path[:] = {path!r}; from dsv3.testing.ranks import serve; serve({folder!r}, {ranks}, {seconds})"
)


def on_ranks(function: Callable[..., Any], *args: Any, ranks: int, seconds: float = SECONDS) -> list[Any]:
    """[function(*args) of every rank], on CPUs, with a process group of so many ranks.

    Raises:
        AssertionError: what the first rank to fail raised, or that they wait for each other.
    """
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "job").write_bytes(cloudpickle.dumps((function, args)))
        start = START.format(path=sys.path, folder=name, ranks=ranks, seconds=seconds)
        done = subprocess.run(
            [sys.executable, "-c", start], stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, check=False,
            env=os.environ | {"OMP_NUM_THREADS": "1"},
        )  # fmt: skip
        outcomes = [_read(folder / str(rank)) for rank in range(ranks)]
    failures = [(moment, rank, failure) for rank, (moment, _, failure) in enumerate(outcomes) if failure]
    if failures:
        _, rank, failure = min(failures)
        raise AssertionError(f"on rank {rank} of {ranks}: {failure}")
    silent = [str(rank) for rank, (moment, _, _) in enumerate(outcomes) if moment is None]
    if silent:
        raise AssertionError(
            f"rank {', '.join(silent)} of {ranks} did not finish within {seconds:g} s, or its process was ended: every "
            f"rank must call the same collectives in the same order, whatever its tokens. {done.stderr[-1000:]}"
        )
    return [result for _, result, _ in outcomes]


def _read(file: Path) -> tuple[float | None, Any, str]:
    """When a rank ended, its result, what it failed by."""
    return cloudpickle.loads(file.read_bytes()) if file.exists() else (None, None, "")


def serve(folder: str, ranks: int, seconds: float) -> None:
    """Fork the ranks, and end all of them when one fails or the time is over."""
    function, args = pickle.loads(Path(folder, "job").read_bytes())
    context = multiprocessing.get_context("fork")
    processes = [
        context.Process(target=_rank, args=(function, args, folder, rank, ranks, seconds)) for rank in range(ranks)
    ]
    for process in processes:
        process.start()
    running, deadline = {process.sentinel: process for process in processes}, time.monotonic() + seconds
    while running and (left := deadline - time.monotonic()) > 0:
        ended = [running.pop(one) for one in multiprocessing.connection.wait(list(running), left)]  # type: ignore[arg-type]
        for process in ended:
            process.join()
        if any(process.exitcode for process in ended):
            break
    for process in running.values():
        process.kill()


def _rank(
    function: Callable[..., Any], args: tuple[Any, ...], folder: str, rank: int, ranks: int, seconds: float
) -> None:
    import torch
    import torch.distributed as dist

    torch.set_num_threads(1)
    store = dist.FileStore(str(Path(folder, "store")), ranks)
    result, failure = None, ""
    try:
        dist.init_process_group("gloo", store=store, rank=rank, world_size=ranks, timeout=timedelta(seconds=seconds))
        result = function(*args)
        dist.barrier()  # nobody leaves while another one still receives
    except AssertionError as error:
        failure = str(error)
    except Exception as error:  # whatever it is, the caller is to see it
        failure = f"{type(error).__name__}: {error}"
    moment = time.monotonic()  # one clock for all processes
    part = Path(folder, f"{rank}.part")
    part.write_bytes(cloudpickle.dumps((moment, result, failure)))
    part.rename(Path(folder, str(rank)))
    os._exit(1 if failure else 0)  # without waiting for the others, as an orderly end of the process group does
