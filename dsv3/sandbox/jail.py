"""The jail: bubblewrap (github.com/containers/bubblewrap), limits, a seccomp filter.

What a program sees: its interpreter with the standard library, and the shared libraries it needs, read-only; a small
private /tmp; three devices; its own process; nothing else. No packages, no home, no other file of the machine, no
network. It may start no process and no thread. Where bubblewrap runs as root it makes no user namespace; the program
gives up root before anything else (limits on processes do not bind root).

A limit on the address space does not bind what the kernel holds for a process. Every such kind of memory is therefore
either bounded (bytes and files of /tmp, open files, pending signals) or refused by the filter (sockets, queues,
semaphores, shared memory, watches, file locks).
"""

import json
import os
import shutil
import sys
import sysconfig
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

GUEST = Path(__file__).with_name("guest.py")
OWN = Path(__file__).parents[1]  # the package dsv3, for services
NOBODY = 65534
MIB = 1024 * 1024


class Limits(NamedTuple):
    """What one program, its tests included, may use."""

    seconds: int = 5  # of processor time
    deadline: float = 30.0  # seconds by the clock, from start to verdict, for those that wait; a busy machine is slow
    memory: int = 512 * MIB  # bytes: address space of program and tests, and what the kernel holds for them
    file_bytes: int = 1 * MIB  # of one file
    scratch_bytes: int = 4 * MIB  # of /tmp
    scratch_files: int = 512  # of /tmp

    def address_space(self, role: str) -> int:
        """Bytes for one guest of a program; what they leave is the kernel's. A service has all for itself."""
        return self.memory * {"worker": 9, "checker": 4, "helper": 2, "service": 16}[role] // 16


def command(
    role: str, settings: Mapping[str, Any], limits: Limits, *, jailed: bool, fds: Mapping[str, int]
) -> list[str]:
    """The command line of a guest. Without a jail: the same program under its limits alone.

    `settings`: of the role, for guest.py. `fds`: options of bubblewrap that take a file descriptor.
    """
    service = role == "service"
    settings = {
        "uid": NOBODY if jailed and os.geteuid() == 0 else 0,
        "scratch": f"size={limits.scratch_bytes},nr_inodes={limits.scratch_files},mode=1777" if jailed else "",
        "limits": resource_limits(limits, role),
        "imports": (["/own", *installed().values()] if jailed else [str(OWN.parent), *installed()]) if service else [],
    } | dict(settings)
    flags = ["-I", "-S", "-B"]
    if not jailed:
        return [os.path.realpath(sys.executable), *flags, str(GUEST), role, json.dumps(settings)]
    walls = ["bwrap", *namespaces(), *files({str(OWN): f"/own/{OWN.name}"} | installed() if service else {})]
    walls += [part for name, fd in fds.items() for part in (f"--{name}", str(fd))]
    return [*walls, "--", f"/python/bin/{_interpreter().name}", *flags, "/guest.py", role, json.dumps(settings)]


def resource_limits(limits: Limits, role: str) -> dict[str, int]:
    """Names of setrlimit(2) -> limits. A service limits the time of each request instead."""
    memory = limits.address_space(role)
    result = {"AS": memory, "DATA": memory, "FSIZE": limits.file_bytes, "CORE": 0, "NOFILE": 32, "NPROC": 0}
    result |= {"MSGQUEUE": 0, "MEMLOCK": 0, "SIGPENDING": 64}
    return result if role == "service" else result | {"CPU": limits.seconds}


def namespaces() -> list[str]:
    """The guest itself mounts /tmp and then drops the capabilities that it is given here."""
    common = ["--unshare-ipc", "--unshare-pid", "--unshare-net", "--unshare-uts", "--unshare-cgroup-try"]
    common += ["--die-with-parent", "--new-session", "--clearenv", "--setenv", "LD_LIBRARY_PATH", "/python/lib"]
    common += ["--cap-drop", "ALL", "--cap-add", "CAP_SYS_ADMIN", "--cap-add", "CAP_SETPCAP"]
    if os.geteuid() == 0:
        return [*common, "--cap-add", "CAP_SETUID", "--cap-add", "CAP_SETGID"]
    return [*common, "--unshare-user"]


def installed() -> dict[str, str]:
    """Folders of installed packages -> where a service sees them."""
    folders = [path for path in sys.path if Path(path).name in ("site-packages", "dist-packages")]
    return {path: f"/packages/{i}" for i, path in enumerate(folders) if os.path.isdir(path)}


def files(more: Mapping[str, str]) -> list[str]:
    """Mounts of the system, the interpreter and `more`, all read-only.

    The interpreter is seen in another place than its own, so that no path of the machine shows.
    """
    interpreter, library = _interpreter(), Path(sysconfig.get_path("stdlib"))
    shared = sorted(Path(sys.base_prefix, "lib").glob("libpython*.so*"))
    system = ["/usr/lib", "/usr/lib64", "/lib", "/lib64", "/etc/ld.so.cache"]
    devices = [f"/dev/{name}" for name in ("null", "zero", "urandom")]
    seen = {path: path for path in system if os.path.exists(path)}
    seen |= {str(library): f"/python/lib/{library.name}", str(interpreter): f"/python/bin/{interpreter.name}"}
    seen |= {str(path): f"/python/lib/{path.name}" for path in shared} | {str(GUEST): "/guest.py"}
    seen |= more
    mounts = [part for path, place in seen.items() for part in ("--ro-bind", path, place)]
    mounts += [part for path in devices for part in ("--dev-bind", path, path)]
    for hidden in ("site-packages", "dist-packages"):
        if (library / hidden).is_dir():
            mounts += _empty(f"/python/lib/{library.name}/{hidden}")
    if os.path.isdir("/usr/lib/python3/dist-packages"):
        mounts += _empty("/usr/lib/python3/dist-packages")
    mounts += ["--proc", "/proc"]
    mounts += ["--perms", "0755", "--dir", "/tmp", "--remount-ro", "/", "--chdir", "/"]
    return [*folders([*seen.values(), *devices]), *mounts]


def _empty(folder: str) -> list[str]:
    return ["--tmpfs", folder, "--remount-ro", folder]


def folders(paths: list[str]) -> list[str]:
    """The folders that lead to the paths, open to whom a program becomes; bubblewrap alone would close them."""
    above = {str(parent) for path in paths for parent in Path(path).parents if str(parent) != "/"}
    return [part for folder in sorted(above) for part in ("--perms", "0755", "--dir", folder)]


def _interpreter() -> Path:
    return Path(os.path.realpath(sys.executable))


def missing() -> str | None:
    """Why there can be no jail here, or None."""
    if sys.platform != "linux":
        return "the sandbox needs Linux"
    if shutil.which("bwrap") is None:
        return "the sandbox needs bubblewrap: apt-get install bubblewrap"
    return None
