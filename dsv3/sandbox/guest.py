"""Programs of the jail, in one file without imports from this project: `guest.py checker|worker ...`.

The two are joined by pipes, a JSON line each way for every call. The worker trusts nobody's code but limits itself
first; the checker takes what the worker says for data, never for code.
"""

import ast
import json
import os
import resource
import sys
from typing import Any

LONGEST_LINE = 4_000_000
"""Characters of one reply. A longer one is a failure."""

_KINDS: dict[str, Any] = {"list": list, "tuple": tuple, "set": set, "frozenset": frozenset}


def pack(value: Any) -> Any:
    """Plain data as JSON that keeps its types.

    Raises:
        TypeError: the value is not plain data.
    """
    if value is None or isinstance(value, bool):
        return value
    for plain in (int, float, str):
        if isinstance(value, plain):
            return plain(value)
    if isinstance(value, dict):
        return ["dict", [[pack(key), pack(item)] for key, item in value.items()]]
    for kind, container in _KINDS.items():
        if isinstance(value, container):
            return [kind, [pack(item) for item in value]]
    if isinstance(value, complex):
        return ["complex", [value.real, value.imag]]
    if isinstance(value, bytes | bytearray):
        return ["bytes", value.hex()]
    raise TypeError(f"a {type(value).__name__} is no plain data")


def unpack(value: Any) -> Any:
    """What `pack` packed."""
    if not isinstance(value, list):
        return value
    kind, content = value
    if kind == "dict":
        return {unpack(key): unpack(item) for key, item in content}
    if kind == "complex":
        return complex(*content)
    if kind == "bytes":
        return bytes.fromhex(content)
    return _KINDS[kind](unpack(item) for item in content)


def restrain(uid: int, memory: int, file_bytes: int, seconds: int) -> None:
    """Give up root (`uid` 0: stay who we are), then the right to more memory, time, files and any process or thread."""
    if uid:
        os.setgroups([])
        os.setresgid(uid, uid, uid)
        os.setresuid(uid, uid, uid)
    for what, limit in (
        (resource.RLIMIT_AS, memory),
        (resource.RLIMIT_DATA, memory),
        (resource.RLIMIT_FSIZE, file_bytes),
        (resource.RLIMIT_CPU, seconds),
        (resource.RLIMIT_CORE, 0),
        (resource.RLIMIT_NOFILE, 32),
        (resource.RLIMIT_MSGQUEUE, 0),
        (resource.RLIMIT_NPROC, 0),
    ):
        resource.setrlimit(what, (limit, limit))


def work(requests: Any, replies: Any) -> None:
    """Define the program that comes first, then answer calls until there are no more."""

    def reply(message: dict[str, Any]) -> None:
        replies.write(json.dumps(message) + "\n")
        replies.flush()

    namespace: dict[str, Any] = {"__name__": "program"}
    calls = (json.loads(line) for line in requests)
    try:
        exec(compile(next(calls)["code"], "program", "exec"), namespace)
    except BaseException as error:
        return reply({"error": describe(error)})
    reply({"value": None})
    for call in calls:
        try:
            positional, named = unpack(call["args"]), unpack(call["kwargs"])
            reply({"value": pack(namespace[call["name"]](*positional, **named))})
        except BaseException as error:
            reply({"error": describe(error)})


def describe(error: BaseException) -> str:
    try:
        return f"{type(error).__name__}: {error}"[:300]
    except BaseException:
        return "an exception that cannot be shown"


class WorkerError(Exception):
    """The program raised, ended, or answered with something that is no plain data."""


class Worker:
    """The checker's end of the pipes."""

    def __init__(self, replies: Any, requests: Any, code: str) -> None:
        self.replies, self.requests = replies, requests
        self.ask({"code": code})

    def ask(self, message: dict[str, Any]) -> Any:
        try:
            self.requests.write(json.dumps(message) + "\n")
            self.requests.flush()
            line = self.replies.readline(LONGEST_LINE)
        except OSError:
            line = ""
        if not line.endswith("\n"):
            raise WorkerError("the program ended, or said too much")
        try:
            answer = json.loads(line)
            if "error" in answer:
                raise WorkerError(str(answer["error"]))
            return unpack(answer["value"])
        except (ValueError, TypeError, KeyError, RecursionError) as error:
            raise WorkerError("the program's answer makes no sense") from error

    def function(self, name: str) -> Any:
        def call(*args: Any, **kwargs: Any) -> Any:
            return self.ask({"name": name, "args": pack(args), "kwargs": pack(kwargs)})

        return call


def functions_of(code: str) -> list[str]:
    """Names that the code's top level defines as functions."""
    tree = ast.parse(code)
    return [node.name for node in tree.body if isinstance(node, ast.FunctionDef)]


def check(job: dict[str, Any], replies: Any, requests: Any) -> str:
    """Run the job's test against the worker; "" if it passes, else why not."""
    try:
        worker = Worker(replies, requests, job["code"])
        namespace: dict[str, Any] = {"__name__": "test"}
        exec(compile(job["setup"], "setup", "exec"), namespace)
        entry = job["entry_point"]
        for name in [entry] if entry else functions_of(job["code"]):
            namespace[name] = worker.function(name)
        exec(compile(job["test"], "test", "exec"), namespace)
        if entry:
            namespace["check"](namespace[entry])
    except BaseException as error:
        return describe(error) or "failed"
    return ""


def main() -> None:
    role, *numbers = sys.argv[1:]
    uid, memory, file_bytes, seconds, job_fd, verdict_fd = map(int, numbers)
    sys.set_int_max_str_digits(0)
    incoming = os.fdopen(os.dup(0), "r", encoding="utf-8", errors="surrogatepass")
    outgoing = os.fdopen(os.dup(1), "w", encoding="utf-8", errors="surrogatepass")
    null = os.open(os.devnull, os.O_RDWR)
    for standard in (0, 1, 2):
        os.dup2(null, standard)
    if role == "worker":
        restrain(uid, memory, file_bytes, seconds)
        work(incoming, outgoing)
        return
    with os.fdopen(job_fd, encoding="utf-8") as file:
        job = json.load(file)
    verdict = os.fdopen(verdict_fd, "w", encoding="utf-8", errors="replace")
    restrain(uid, memory, file_bytes, seconds)
    json.dump({"failure": check(job, incoming, outgoing)}, verdict)
    verdict.close()


if __name__ == "__main__":
    main()
    sys.stdout.flush()
    os._exit(0)  # threads and exit handlers of a program have no say
