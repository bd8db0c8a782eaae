"""A pool of processes that tokenise. They import NumPy and tokenizers, and neither torch nor what started them.

multiprocessing would import the main module of a training anew in every process; these run `python -m data.processes`
and take calls through a pipe.
"""

import contextlib
import os
import pickle
import queue
import subprocess
import sys
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import IO, Any, TypeVar

Task = TypeVar("Task")
Result = TypeVar("Result")

ALONE = {"TOKENIZERS_PARALLELISM": "false", "MALLOC_ARENA_MAX": "1", "MALLOC_TRIM_THRESHOLD_": "1000000"}
"""Environment of a process that tokenises: one thread, and freed memory goes back to the system."""


class Processes:
    """Applies functions of modules, in the order of their tasks, with few tasks waiting at a time."""

    def __init__(self, count: int) -> None:
        """`count`: processes, which start when they are needed; 1: everything runs in this one."""
        self.count = count
        self._idle: queue.SimpleQueue[subprocess.Popen[bytes]] = queue.SimpleQueue()
        self._started: list[subprocess.Popen[bytes]] = []
        self._threads: ThreadPoolExecutor | None = None

    def map(self, function: Callable[[Any, Task], Result], shared: Any, tasks: Iterable[Task]) -> Iterator[Result]:
        """`function(shared, task)` of every task, in order; `shared` is sent once to every process.

        Raises:
            RuntimeError: a process ended, such as one that was killed for its memory.
        """
        content = _pickled((function, shared)) if self.count > 1 else None
        waiting: deque[Future[Result]] = deque()
        for task in tasks:
            if content is not None:
                waiting.append(self._pool().submit(self._call, content, task))
                if len(waiting) > self.count:
                    yield waiting.popleft().result()
            else:
                yield function(shared, task)
        while waiting:
            yield waiting.popleft().result()

    def close(self) -> None:
        if self._threads is not None:
            self._threads.shutdown(cancel_futures=True)
        for process in self._started:
            for pipe in (process.stdin, process.stdout):
                if pipe is not None:
                    with contextlib.suppress(BrokenPipeError):  # what a process that ended did not read
                        pipe.close()
            process.wait()

    def __enter__(self) -> "Processes":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _pool(self) -> ThreadPoolExecutor:
        if self._threads is None:
            self._threads = ThreadPoolExecutor(self.count, "data")
            root = str(Path(__file__).resolve().parents[1])
            paths = os.pathsep.join([root, *filter(None, sys.path)])  # so that parts from elsewhere are found too
            environment = os.environ | {"PYTHONPATH": paths} | ALONE
            for _ in range(self.count):
                command = [sys.executable, "-m", "data.processes"]
                process = subprocess.Popen(
                    command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=environment, start_new_session=True
                )
                self._started.append(process)
                self._idle.put(process)
        return self._threads

    def _call(self, content: bytes, task: Any) -> Any:
        process = self._idle.get()
        assert process.stdin is not None
        assert process.stdout is not None
        try:
            if getattr(process, "content", None) is not content:
                process.content = content  # type: ignore[attr-defined]
                pickle.dump(content, process.stdin)
            else:
                pickle.dump(None, process.stdin)
            pickle.dump(task, process.stdin)
            process.stdin.flush()
            kind, value = pickle.load(process.stdout)
        except (EOFError, BrokenPipeError, pickle.UnpicklingError) as error:
            status = process.wait()
            ended = f"by signal {-status} (out of memory?)" if status < 0 else f"with status {status}"
            raise RuntimeError(f"a process that tokenises ended {ended}; fewer of them: data.processes=1") from error
        finally:
            self._idle.put(process)
        if kind == "error":
            raise value
        return value


def _pickled(value: Any) -> bytes | None:
    """None where it cannot be sent, such as a tokenizer that holds a function."""
    try:
        return pickle.dumps(value)
    except (pickle.PicklingError, AttributeError, TypeError):
        return None


def _arrives(error: Exception) -> bool:
    """Whether it can be sent: not where making one takes other arguments than its message."""
    try:
        pickle.loads(pickle.dumps(error))
    except Exception:
        return False
    return True


def serve(requests: IO[bytes], answers: IO[bytes]) -> None:
    """Answer calls until the pipe is closed."""
    function: Any = None
    shared: Any = None
    while True:
        try:
            content = pickle.load(requests)
        except EOFError:
            return
        if content is not None:
            function, shared = pickle.loads(content)
        task = pickle.load(requests)
        try:
            answer = ("value", function(shared, task))
        except Exception as error:
            answer = ("error", error if _arrives(error) else RuntimeError(repr(error)))
        pickle.dump(answer, answers, protocol=pickle.HIGHEST_PROTOCOL)
        answers.flush()


if __name__ == "__main__":
    with os.fdopen(os.dup(1), "wb") as stdout:
        os.dup2(2, 1)  # what a tokenizer prints is no answer
        try:
            serve(sys.stdin.buffer, stdout)
        except (BrokenPipeError, EOFError, pickle.UnpicklingError, KeyboardInterrupt):  # its parent is gone
            os._exit(1)
