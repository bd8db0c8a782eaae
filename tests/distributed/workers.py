"""Processes that run functions as the ranks of a process group (gloo), kept from one call to the next.

A rank costs seconds of imports; these are forked from a process that has done them (tests/commands.py), once for all
tests of a module. Functions, arguments and results travel by pickle: a function is one of a module, not of a test.
"""

import faulthandler
import math
import multiprocessing.connection
import os
import pickle
import tempfile
import time
import traceback
from collections.abc import Callable
from datetime import timedelta
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from tests.commands import FORKED

LONGEST = 120.0
"""Seconds that one call may take; a process that needs longer prints its stack and ends, or is killed where a run's
watchdog has taken faulthandler's timer."""


class Workers:
    """`count` processes with a thread each."""

    def __init__(self, count: int) -> None:
        self.count = count
        self._start()

    def run(self, function: Callable[..., Any], *args: Any, ranks: int | None = None, timeout: float = LONGEST) -> Any:
        """[function(*args) of every rank], with a process group of its own of `ranks` ranks (None: of all workers).

        What a rank raises is raised here once all have ended: that of the first one to fail, with its traceback.
        """
        if not all(process.is_alive() for process in self.processes):  # an earlier call took some of them along
            self.close()
            self._start()
        ranks = self.count if ranks is None else ranks
        with tempfile.TemporaryDirectory() as folder:
            job = pickle.dumps((function, args))
            for rank, pipe in enumerate(self.pipes[:ranks]):
                pipe.send_bytes(pickle.dumps((job, rank, ranks, str(Path(folder, "store")), timeout)))
            return self._answers(self.pipes[:ranks], timeout + 10)

    def _answers(self, pipes: list[Connection], timeout: float) -> list[Any]:
        answers: dict[int, Any] = {}
        failures: list[tuple[float, BaseException]] = []
        while len(answers) < len(pipes):
            left = [rank for rank in range(len(pipes)) if rank not in answers]
            done = multiprocessing.connection.wait([pipes[rank] for rank in left], timeout)
            for rank in left if not done else ():
                self.processes[rank].kill()
            for pipe in done:
                rank = pipes.index(pipe)  # type: ignore[arg-type]
                try:
                    answers[rank], failure, moment = pickle.loads(pipes[rank].recv_bytes())
                except (EOFError, ConnectionResetError):
                    self.processes[rank].join()
                    failure, moment = RuntimeError("the process ended; its standard error says why"), math.inf
                    answers[rank] = None
                if failure is not None:
                    failure.add_note(f"on rank {rank} of {len(pipes)}")
                    failures.append((moment, failure))
        if failures:
            raise min(failures, key=lambda failed: failed[0])[1]
        return [answers[rank] for rank in range(len(pipes))]

    def _start(self) -> None:
        self.pipes: list[Connection] = []
        self.processes: list[Any] = []
        for _ in range(self.count):
            ours, theirs = FORKED.Pipe()
            process = FORKED.Process(target=_serve, args=(theirs,), daemon=True)
            process.start()
            theirs.close()
            self.pipes.append(ours)
            self.processes.append(process)

    def close(self) -> None:
        for pipe, process in zip(self.pipes, self.processes):
            pipe.close()
            process.kill()
            process.join()


def _serve(pipe: Connection) -> None:
    import torch

    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    torch.set_num_threads(1)
    while True:
        try:
            job, rank, ranks, store, timeout = pickle.loads(pipe.recv_bytes())
        except (EOFError, ConnectionResetError):
            return
        pipe.send_bytes(_answer(job, rank, ranks, store, timeout))


def _answer(job: bytes, rank: int, ranks: int, store: str, timeout: float) -> bytes:
    """(result, None, 0.0) or (None, what was raised, when), as bytes."""
    import torch.distributed as dist

    faulthandler.dump_traceback_later(timeout, exit=True)
    try:
        dist.init_process_group(
            "gloo", store=dist.FileStore(store, ranks), rank=rank, world_size=ranks, timeout=timedelta(seconds=timeout)
        )
        function, args = pickle.loads(job)
        return pickle.dumps((function(*args), None, 0.0))
    except BaseException as error:  # whatever it is, the test is to see it
        moment = time.monotonic()  # one clock for all processes
        error.add_note(traceback.format_exc())
        try:
            return pickle.dumps((None, error.with_traceback(None), moment))
        except Exception:  # not every exception can be sent
            return pickle.dumps((None, RuntimeError("".join(traceback.format_exception(error))), moment))
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()
        faulthandler.cancel_dump_traceback_later()
