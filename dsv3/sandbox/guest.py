"""Programs of the jail, in one file without imports from this project: `guest.py worker|checker|service SETTINGS`.

Worker and checker are joined by pipes, a JSON line each way for every call. The worker trusts nobody's code but limits
itself first; the checker takes what the worker says for data, never for code. A service answers requests with a module
of this project.
"""

import ast
import builtins
import contextlib
import ctypes
import gc
import importlib
import json
import os
import pickle
import resource
import signal
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


def restrain(settings: dict[str, Any]) -> None:
    """Give up every privilege, then the right to more memory, time, files and any process or thread."""
    if settings["scratch"]:
        _give_up_privileges(settings["scratch"], settings["uid"])
    for name, limit in settings["limits"].items():
        if hasattr(resource, f"RLIMIT_{name}"):  # some are Linux's alone
            resource.setrlimit(getattr(resource, f"RLIMIT_{name}"), (limit, limit))


def _give_up_privileges(scratch: str, uid: int) -> None:
    """Mount /tmp, then empty every capability set and, with a `uid`, become that user.

    bubblewrap's own tmpfs limits bytes but not files, and files take the kernel's memory.
    """
    libc = ctypes.CDLL(None, use_errno=True)
    nosuid_nodev, drop_from_bounding_set, version_3 = 2 | 4, 24, 0x20080522
    if libc.mount(b"tmpfs", b"/tmp", b"tmpfs", nosuid_nodev, scratch.encode()):
        raise OSError(ctypes.get_errno(), "/tmp cannot be mounted")
    os.chdir("/tmp")
    for capability in range(64):
        libc.prctl(drop_from_bounding_set, capability, 0, 0, 0)
    if uid:
        os.setgroups([])
        os.setresgid(uid, uid, uid)
        os.setresuid(uid, uid, uid)
    header, empty = (ctypes.c_uint32 * 2)(version_3, 0), (ctypes.c_uint32 * 6)()
    if libc.capset(header, empty):
        raise OSError(ctypes.get_errno(), "capabilities cannot be dropped")


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


def free_names(trusted: str) -> set[str]:
    """Names that a test uses and that neither it nor Python defines; none where it is no Python."""
    try:
        nodes = list(ast.walk(ast.parse(trusted)))
    except SyntaxError:
        return set()
    names = [node for node in nodes if isinstance(node, ast.Name)]
    bound = {node.id for node in names if not isinstance(node.ctx, ast.Load)} | set(dir(builtins))
    for node in nodes:
        if isinstance(node, ast.arg):
            bound.add(node.arg)
        elif isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            bound.add(node.name)
        elif isinstance(node, ast.alias):
            bound.add(node.asname or node.name.partition(".")[0])
        elif isinstance(node, ast.ExceptHandler) and node.name:
            bound.add(node.name)
    return {node.id for node in names} - bound


def needs_helpers(job: dict[str, Any]) -> bool:
    """Whether the test calls functions besides the entry point, which its setup does not define."""
    return bool(job["entry_point"] and free_names(f"{job['setup']}\n{job['test']}") - {job["entry_point"]})


def opening(code: str, entry_point: str) -> str:
    """What comes before the entry point is defined: the prompt's part, which the model's comes after."""
    for node in ast.parse(code).body:
        if isinstance(node, ast.FunctionDef) and node.name == entry_point:
            first = min([node.lineno, *(decorator.lineno for decorator in node.decorator_list)])
            return "\n".join(code.split("\n")[: first - 1])
    return ""


def check(job: dict[str, Any], workers: list[tuple[Any, Any]]) -> str:
    """Run the job's test against the program; "" if it passes, else why not.

    Functions of the program stand for the entry point, or without one for the free names of the test. No other name of
    the test means what the program says. Helpers of a prompt run in a second worker, which has nothing of the model's.
    """
    try:
        setup, test, entry = job["setup"], job["test"], job["entry_point"]
        names = free_names(f"{setup}\n{test}")
        namespace: dict[str, Any] = {"__name__": "test"}
        if entry and needs_helpers(job):
            helpers = Worker(*workers[1], opening(job["code"], entry))
            namespace |= {name: helpers.function(name) for name in names}
        worker = Worker(*workers[0], job["code"])
        exec(compile(setup, "setup", "exec"), namespace)
        namespace |= {name: worker.function(name) for name in ([entry] if entry else names)}
        exec(compile(test, "test", "exec"), namespace)
        if entry:
            namespace["check"](namespace[entry])
    except BaseException as error:
        return describe(error) or "failed"
    return ""


def serve(settings: dict[str, Any], requests: Any, replies: Any) -> None:
    """Answer pickled requests with the module's `answer`, a JSON line each; the first line says that it is ready.

    A request that takes more than its processor time ends the process, also inside a library written in C.
    """
    answer = importlib.import_module(settings["module"]).answer
    signal.signal(signal.SIGPROF, signal.SIG_DFL)  # which ends the process, whatever was inherited
    gc.freeze()  # a collection need not look at what imports made
    replies.write(json.dumps({"ready": True}) + "\n")
    while True:
        replies.flush()
        try:
            request = pickle.load(requests)
        except EOFError:
            return
        signal.setitimer(signal.ITIMER_PROF, settings["seconds_per_request"])
        reply = answer(request)
        signal.setitimer(signal.ITIMER_PROF, 0)
        replies.write(json.dumps(reply) + "\n")


def text(fd: int, mode: str) -> Any:
    return os.fdopen(fd, mode, encoding="utf-8", errors="surrogatepass")


def main() -> None:
    role, settings = sys.argv[1], json.loads(sys.argv[2])
    incoming, outgoing = os.dup(0), os.dup(1)
    null = os.open(os.devnull, os.O_RDWR)
    for standard in (0, 1, 2):
        os.dup2(null, standard)
    if role == "service":
        sys.path += settings["imports"]
        os.environ["OPENBLAS_NUM_THREADS"] = "1"  # there can be no second thread
        restrain(settings)
        serve(settings, os.fdopen(incoming, "rb"), text(outgoing, "w"))
        return
    sys.set_int_max_str_digits(0)
    if role in ("worker", "helper"):
        restrain(settings)
        work(text(incoming, "r"), text(outgoing, "w"))
        return
    with text(settings["job_fd"], "r") as file:
        job = json.load(file)
    with os.fdopen(settings["verdict_fd"], "w", encoding="utf-8", errors="replace") as verdict:
        workers = [(text(replies, "r"), text(requests, "w")) for replies, requests in settings["workers"]]
        restrain(settings)
        json.dump({"failure": check(job, workers)}, verdict)


if __name__ == "__main__":
    with contextlib.suppress(BrokenPipeError):
        main()
    os._exit(0)  # threads and exit handlers of a program have no say
