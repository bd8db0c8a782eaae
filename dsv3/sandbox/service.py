"""A module of this project that answers requests in a jail of its own, for work on what a model wrote."""

import contextlib
import json
import os
import pickle
import select
import threading
import time
from typing import Any

from dsv3.sandbox.confined import Confined
from dsv3.sandbox.jail import MIB, Limits
from dsv3.sandbox.pool import refusal

START_DEADLINE = 120.0
"""Seconds by the clock until the module is imported; a busy machine is slow."""
LONGEST_REPLY = 100_000  # bytes


class ServiceError(Exception):
    """A request ended the service or was not answered in time; the next one gets a new process."""


class Service:
    """Asks `module.answer(request)`, in one process that is started at the first request and kept.

    The module is trusted, what it works on is not: a request that takes more than `seconds` of processor time,
    `deadline` by the clock, or the memory, ends the process. Where no jail can be made, the same limits hold in a
    process without one: the module itself must see to it that nothing of the request is executed.
    """

    def __init__(self, module: str, *, seconds: float = 3.0, deadline: float = 30.0, memory: int = 1024 * MIB) -> None:
        self.module, self.seconds, self.deadline, self.memory = module, seconds, deadline, memory
        self._lock = threading.Lock()
        self._guest: Confined | None = None

    def ask(self, request: Any) -> Any:
        """The module's answer, plain data.

        Raises:
            ServiceError: this request ended the service, or it did not answer in time.
            RuntimeError: the service does not start.
        """
        with self._lock:
            if self._guest is None or self._guest.ended:
                self._start()
            try:
                pickle.dump(request, self._requests, pickle.HIGHEST_PROTOCOL)
                self._requests.flush()
                return self._reply(self.deadline)
            except (BrokenPipeError, ServiceError) as error:
                self._end()
                reason = str(error) if isinstance(error, ServiceError) else "it ended"
                raise ServiceError(reason) from None

    def _start(self) -> None:
        self._end()
        stdin, requests = os.pipe()
        self._replies, stdout = os.pipe()
        self._requests = os.fdopen(requests, "wb")
        settings = {"module": self.module, "seconds_per_request": self.seconds}
        jailed = refusal() is None
        try:
            limits = Limits(memory=self.memory)
            self._guest = Confined("service", settings, limits, jailed=jailed, stdin=stdin, stdout=stdout)
        finally:
            os.close(stdin)
            os.close(stdout)
        try:
            self._reply(START_DEADLINE)
        except ServiceError as error:
            self._end()
            raise RuntimeError(f"{self.module} does not start in its jail: {error}") from None

    def _reply(self, seconds: float) -> Any:
        """The next line."""
        content, deadline = b"", time.monotonic() + seconds
        while not content.endswith(b"\n"):
            ready, _, _ = select.select([self._replies], [], [], max(0.0, deadline - time.monotonic()))
            if not ready:
                raise ServiceError(f"no answer in {seconds:g} s")
            piece = os.read(self._replies, LONGEST_REPLY)
            content += piece
            if not piece or len(content) > LONGEST_REPLY:
                raise ServiceError(f"it took more than {self.seconds:g} s of processor time, or its memory")
        return json.loads(content)

    def _end(self) -> None:
        if self._guest is not None:
            with contextlib.suppress(BrokenPipeError):
                self._requests.close()
            os.close(self._replies)
            self._guest.end()
            self._guest = None
