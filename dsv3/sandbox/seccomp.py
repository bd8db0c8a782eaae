"""A seccomp filter: system calls by which a program could widen its jail or take memory outside its limits."""

import errno
import functools
import platform
import struct

# Names of system calls -> numbers, of the two architectures whose numbers are written down here.
_AUDIT = {"x86_64": 0xC000003E, "aarch64": 0xC00000B7}
_REFUSED = {
    "x86_64": {"ptrace": 101, "umount2": 166, "unshare": 272, "setns": 308, "perf_event_open": 298, "bpf": 321,
               "userfaultfd": 323, "keyctl": 250, "add_key": 248, "io_uring_setup": 425, "clone3": 435,
               "io_setup": 206, "memfd_create": 319, "memfd_secret": 447, "shmget": 29, "semget": 64, "msgget": 68,
               "mq_open": 240, "inotify_init": 253, "inotify_init1": 294, "fanotify_init": 300, "socket": 41,
               "vmsplice": 278, "request_key": 249, "landlock_create_ruleset": 444},
    "aarch64": {"ptrace": 117, "umount2": 39, "unshare": 97, "setns": 268, "perf_event_open": 241, "bpf": 280,
                "userfaultfd": 282, "keyctl": 219, "add_key": 217, "io_uring_setup": 425, "clone3": 435,
                "io_setup": 0, "memfd_create": 279, "memfd_secret": 447, "shmget": 194, "semget": 190, "msgget": 186,
                "mq_open": 180, "inotify_init1": 26, "fanotify_init": 262, "socket": 198,
                "vmsplice": 75, "request_key": 218, "landlock_create_ruleset": 444},
}  # fmt: skip
_CLONE = {"x86_64": 56, "aarch64": 220}
_CLONE_NEWUSER = 0x10000000
_FCNTL = {"x86_64": 72, "aarch64": 25}
_F_SETFL, _F_DUPFD_CLOEXEC = 4, 1030
"""The last of fcntl's plain commands, and one more that is needed. The rest: locks, leases, the size of pipes."""

_LOAD, _EQUAL, _GREATER, _AT_LEAST, _BITS, _STOP = 0x20, 0x15, 0x25, 0x35, 0x45, 0x06
_KILL, _ALLOW, _REFUSE = 0x80000000, 0x7FFF0000, 0x00050000 | errno.ENOSYS
_NUMBER, _ARCHITECTURE, _FIRST, _SECOND = 0, 4, 16, 24  # offsets in struct seccomp_data
_X32 = 0x40000000  # numbers of x86_64's other calling convention begin here


@functools.cache
def seccomp_filter() -> bytes | None:
    """A BPF program; refused calls fail with ENOSYS, new user namespaces by clone likewise.

    None on an architecture not listed.
    """
    machine = platform.machine()
    if machine not in _AUDIT:
        return None
    checks = [
        (_LOAD, 0, 0, _NUMBER),
        (_AT_LEAST, "refuse", 0, _X32),
        *((_EQUAL, "refuse", 0, number) for number in sorted(_REFUSED[machine].values())),
        (_EQUAL, 0, 2, _CLONE[machine]),
        (_LOAD, 0, 0, _FIRST),
        (_BITS, "refuse", "allow", _CLONE_NEWUSER),
        (_EQUAL, 0, "allow", _FCNTL[machine]),
        (_LOAD, 0, 0, _SECOND),
        (_EQUAL, "allow", 0, _F_DUPFD_CLOEXEC),
        (_GREATER, "refuse", "allow", _F_SETFL),
    ]
    start = [(_LOAD, 0, 0, _ARCHITECTURE), (_EQUAL, 1, 0, _AUDIT[machine]), (_STOP, 0, 0, _KILL)]
    program = [*start, *checks, (_STOP, 0, 0, _ALLOW), (_STOP, 0, 0, _REFUSE)]
    ends = {"allow": len(program) - 2, "refuse": len(program) - 1}
    return b"".join(
        struct.pack("<HBBI", code, *(ends[to] - i - 1 if isinstance(to, str) else to for to in (then, other)), operand)
        for i, (code, then, other, operand) in enumerate(program)
    )
