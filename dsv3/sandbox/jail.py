"""The jail: bubblewrap (github.com/containers/bubblewrap), limits, a seccomp filter.

What a program sees: its interpreter's standard library and the shared libraries it needs, read-only; a small private
/tmp; three devices; its own process; nothing else. No packages, no home, no other file of the machine, no network. It
may start no process and no thread. Where bubblewrap runs as root it makes no user namespace; the program gives
up root before anything else (limits on processes do not bind root).
"""

import errno
import functools
import os
import platform
import shutil
import struct
import sys
import sysconfig
from pathlib import Path
from typing import NamedTuple

GUEST = Path(__file__).with_name("guest.py")
NOBODY = 65534


class Limits(NamedTuple):
    """What one program may use."""

    seconds: int = 5  # of processor time
    deadline: float = 30.0  # seconds by the clock, from start to verdict, for those that wait; a busy machine is slow
    memory: int = 512 * 1024 * 1024  # bytes of address space
    file_bytes: int = 1024 * 1024  # of one file
    scratch_bytes: int = 4 * 1024 * 1024  # of /tmp


def command(role: str, limits: Limits, job_fd: int, verdict_fd: int, *, jailed: bool, seccomp_fd: int) -> list[str]:
    """The command line of a worker or a checker. Without a jail: the same program under its limits alone."""
    uid = NOBODY if os.geteuid() == 0 and jailed else 0
    numbers = (uid, limits.memory, limits.file_bytes, limits.seconds, job_fd, verdict_fd)
    interpreter = [os.path.realpath(sys.executable), "-I", "-S", "-B"]
    if not jailed:
        return [*interpreter, str(GUEST), role, *map(str, numbers)]
    walls = ["bwrap", *namespaces(), *files(limits)]
    if seccomp_fd >= 0:
        walls += ["--seccomp", str(seccomp_fd)]
    return [*walls, "--", *interpreter, "/guest.py", role, *map(str, numbers)]


def namespaces() -> list[str]:
    common = ["--unshare-ipc", "--unshare-pid", "--unshare-net", "--unshare-uts", "--unshare-cgroup-try"]
    common += ["--die-with-parent", "--new-session", "--clearenv", "--cap-drop", "ALL"]
    if os.geteuid() == 0:
        return [*common, "--cap-add", "CAP_SETUID", "--cap-add", "CAP_SETGID"]
    return [*common, "--unshare-user"]


def files(limits: Limits) -> list[str]:
    """Mounts: everything read-only but /tmp."""
    interpreter, library = os.path.realpath(sys.executable), sysconfig.get_path("stdlib")
    shared = [str(path) for path in sorted(Path(sys.base_prefix, "lib").glob("libpython*.so*"))]
    system = [path for path in ("/usr/lib", "/usr/lib64", "/lib", "/lib64", "/etc/ld.so.cache") if os.path.exists(path)]
    devices = [f"/dev/{name}" for name in ("null", "zero", "urandom")]
    seen = [*system, library, interpreter, *shared]
    mounts = [part for path in seen for part in ("--ro-bind", path, path)]
    for packages in (f"{library}/site-packages", f"{library}/dist-packages", "/usr/lib/python3/dist-packages"):
        if os.path.isdir(packages):
            mounts += ["--tmpfs", packages]
    mounts += [part for path in devices for part in ("--dev-bind", path, path)]
    mounts += ["--proc", "/proc", "--ro-bind", str(GUEST), "/guest.py"]
    mounts += ["--perms", "1777", "--size", str(limits.scratch_bytes), "--tmpfs", "/tmp", "--chdir", "/tmp"]
    return [*folders([*seen, *devices]), *mounts, "--remount-ro", "/"]


def folders(paths: list[str]) -> list[str]:
    """The folders that lead to the paths, open to whom a program becomes; bubblewrap alone would close them."""
    above = {str(parent) for path in paths for parent in Path(path).parents if str(parent) != "/"}
    return [part for folder in sorted(above) for part in ("--perms", "0755", "--dir", folder)]


# Names of system calls -> numbers, of the two architectures whose numbers are written down here.
_AUDIT = {"x86_64": 0xC000003E, "aarch64": 0xC00000B7}
_REFUSED = {
    "x86_64": {"ptrace": 101, "mount": 165, "umount2": 166, "unshare": 272, "setns": 308, "perf_event_open": 298,
               "bpf": 321, "userfaultfd": 323, "keyctl": 250, "add_key": 248, "io_uring_setup": 425, "clone3": 435,
               "memfd_create": 319, "shmget": 29},
    "aarch64": {"ptrace": 117, "mount": 40, "umount2": 39, "unshare": 97, "setns": 268, "perf_event_open": 241,
                "bpf": 280, "userfaultfd": 282, "keyctl": 219, "add_key": 217, "io_uring_setup": 425, "clone3": 435,
                "memfd_create": 279, "shmget": 194},
}  # fmt: skip
_CLONE = {"x86_64": 56, "aarch64": 220}
_CLONE_NEWUSER = 0x10000000


@functools.cache
def seccomp_filter() -> bytes | None:
    """A BPF program that refuses calls by which a program could widen its jail or take memory outside its limits.

    Refused calls fail with ENOSYS; new user namespaces by clone likewise. None on an architecture not listed.
    """
    machine = platform.machine()
    if machine not in _AUDIT:
        return None
    load, equal, at_least, bits, stop = 0x20, 0x15, 0x35, 0x45, 0x06
    refuse, allow, kill = 0x00050000 | errno.ENOSYS, 0x7FFF0000, 0x80000000
    numbers = sorted(_REFUSED[machine].values())
    last = len(numbers)
    program = [(load, 0, 0, 4), (equal, 1, 0, _AUDIT[machine]), (stop, 0, 0, kill)]  # another architecture's calls
    program += [(load, 0, 0, 0), (at_least, last + 4, 0, 0x40000000)]  # x32's numbers: to the last instruction
    program += [(equal, last + 3 - i, 0, number) for i, number in enumerate(numbers)]  # likewise
    program += [(equal, 0, 2, _CLONE[machine]), (load, 0, 0, 16), (bits, 1, 0, _CLONE_NEWUSER)]
    program += [(stop, 0, 0, allow), (stop, 0, 0, refuse)]
    return b"".join(struct.pack("<HBBI", *instruction) for instruction in program)


def missing() -> str | None:
    """Why there can be no jail here, or None."""
    if sys.platform != "linux":
        return "the sandbox needs Linux"
    if shutil.which("bwrap") is None:
        return "the sandbox needs bubblewrap: apt-get install bubblewrap"
    return None
