"""The sandbox: right programs pass, wrong and hostile ones fail, and nothing gets out or hangs."""

import ast
import contextlib
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Set
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from dsv3.sandbox import Program, Sandbox, Verdict
from dsv3.sandbox.confined import held_by
from dsv3.sandbox.guest import pack, unpack
from dsv3.sandbox.jail import Limits
from dsv3.sandbox.seccomp import seccomp_filter
from tests.sandbox.hostile import PROGRAMS, WAITING

TEST = """
def check(candidate):
    for x in (1, 21, 0.5):
        answer = candidate(x)
        assert answer == 2 * x, answer
"""
LIMITS = Limits(seconds=1, deadline=15.0)

GREEDY = {
    "memory bomb": "MemoryError",
    "memory here and at the checker": "AssertionError",
    "page tables": "more memory than there is",
}
"""Programs that hold as much as they can, and how they end."""

needs_jail = pytest.mark.skipif(Sandbox().refusal is not None, reason=str(Sandbox().refusal))


def program(code: str) -> Program:
    return Program(code=code, test=TEST, entry_point="double")


def descendants(ancestor: int) -> set[int]:
    """Processes on the machine that come from this one."""
    parents = {}
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = path.read_text().rpartition(")")[2].split()
        except OSError:
            continue
        parents[int(path.parent.name)] = int(fields[1])
    found = {ancestor}
    while more := {pid for pid, parent in parents.items() if parent in found} - found:
        found |= more
    return found - {ancestor}


def command_line(pid: int) -> bytes:
    return Path(f"/proc/{pid}/cmdline").read_bytes()


def judged(names: Set[str], limits: Limits) -> dict[str, Verdict]:
    """Verdicts on hostile programs; many at once, for most of them wait."""
    return dict(zip(names, Sandbox(limits, workers=8).run([program(PROGRAMS[name]) for name in names]), strict=True))


@needs_jail
def test_hostile_programs_fail_leave_nothing_behind_and_never_hang(tmp_path: Path) -> None:
    witness = tmp_path / "witness"  # under /tmp, where programs have a /tmp of their own
    witness.write_text("untouched")
    assert len(PROGRAMS) >= 25
    before = descendants(os.getpid())
    verdicts = judged(PROGRAMS.keys() - WAITING - GREEDY.keys(), LIMITS)
    verdicts |= judged(WAITING, LIMITS._replace(deadline=4.0))
    assert verdicts.keys() == PROGRAMS.keys() - GREEDY.keys()
    assert {name: v.detail for name, v in verdicts.items() if v.passed or "escaped" in v.detail} == {}
    assert all(v.detail for v in verdicts.values())
    assert {name for name, v in verdicts.items() if v.detail == "timed out"} >= WAITING
    assert descendants(os.getpid()) <= before
    assert witness.read_text() == "untouched"
    assert not any(Path(folder, "escaped").exists() for folder in ("/", "/usr/lib", "/lib", "/root", "/var/tmp"))


@needs_jail
@pytest.mark.parametrize(("name", "end"), GREEDY.items())
def test_program_tests_and_page_tables_together_hold_no_more_than_the_limit(name: str, end: str) -> None:
    before, own = descendants(os.getpid()), command_line(os.getpid())
    limits = LIMITS._replace(seconds=10, deadline=60.0)  # memory ends them, also on a busy machine
    peak, jailed = 0, set()
    with ThreadPoolExecutor(1) as pool:
        judging = pool.submit(Sandbox(limits).run, [program(PROGRAMS[name])])
        while not judging.done():
            jailed |= (running := descendants(os.getpid()) - before)
            with contextlib.suppress(OSError):
                # A child shares this process's memory until it executes another program.
                peak = max(peak, sum(held_by(str(pid)) for pid in running if command_line(pid) != own))
            time.sleep(0.02)
    assert [pid for pid in jailed if Path(f"/proc/{pid}/exe").exists()] == []  # not even one that is being ended
    assert end in judging.result()[0].detail
    assert 0 < peak <= 1.1 * LIMITS.memory  # a look at them comes every twentieth of a second


@needs_jail
def test_right_programs_pass_among_hostile_ones() -> None:
    right = program("def double(x):\n    return 2 * x")
    mixed = [right, program(PROGRAMS["infinite loop"]), right, program(PROGRAMS["huge output"]), right]
    assert [v.passed for v in Sandbox(LIMITS, workers=2).run(mixed)] == [True, False, True, False, True]


@needs_jail
def test_an_escape_would_be_seen() -> None:
    """What a program answers is in its verdict, so the word that hostile ones answer with would be found there."""
    (verdict,) = Sandbox(LIMITS).run(
        [Program("def f():\n    return 'escaped'", "def check(f):\n    assert False, f()", entry_point="f")]
    )
    assert not verdict.passed
    assert "escaped" in verdict.detail


@needs_jail
def test_the_jail_is_what_stops_them() -> None:
    """What the jail forbids, the same programs can do outside: otherwise the suite would show nothing."""
    for code in (PROGRAMS["other answers read"], PROGRAMS["packages imported"]):
        source = f"{code}\nimport sys\nsys.exit(7 if double(1) == 'escaped' else 0)"
        assert subprocess.run([sys.executable, "-c", source], check=False).returncode == 7


def test_without_a_jail_only_a_waiver_runs_programs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("dsv3.sandbox.pool.refusal", lambda: "no jail here")
    with pytest.raises(RuntimeError, match="no jail here; confirm_run_unsafe_code=true"):
        Sandbox(LIMITS).run([program("")])
    waived = Sandbox(LIMITS, unsafe=True)
    right, wrong = "def double(x):\n    return 2 * x", "def double(x):\n    return x"
    assert [v.passed for v in waived.run([program(right), program(wrong)])] == [True, False]


@needs_jail
def test_functions_without_an_entry_point_are_called_by_name() -> None:
    """As in MBPP: the test is a list of assertions about names that the program defines."""
    code = "import math\ndef area(r):\n    return math.pi * r * r\ndef twice(s):\n    return s + s"
    tests = "assert round(area(1), 2) == 3.14\nassert twice((1, 2)) == (1, 2, 1, 2)"
    verdicts = Sandbox(LIMITS).run([Program(code, tests), Program(code, "assert twice('a') == 'a'")])
    assert [v.passed for v in verdicts] == [True, False]


@pytest.mark.parametrize(
    "value",
    [
        None,
        True,
        3,
        -(10**400),
        2.5,
        float("inf"),
        "äöü\n",
        b"\0\xff",
        1 + 2j,
        [1, [2, (3,)]],
        {"a": {1, 2}, (1, 2): None},
    ],
)
def test_plain_data_crosses_unchanged(value: object) -> None:
    sys.set_int_max_str_digits(0)
    crossed = unpack(pack(value))
    assert crossed == value
    assert type(crossed) is type(value)


def test_what_is_no_plain_data_does_not_cross() -> None:
    with pytest.raises(TypeError, match="a object is no plain data"):
        pack([object()])


@pytest.mark.skipif(seccomp_filter() is None, reason="no seccomp filter for this architecture")
def test_the_filter_kills_no_ordinary_program() -> None:
    """Instructions of eight bytes; every jump lands inside the program."""
    rules = seccomp_filter()
    assert rules is not None
    count = len(rules) // 8
    assert len(rules) == 8 * count
    for i in range(count):
        code, if_true, if_false = int.from_bytes(rules[8 * i : 8 * i + 2], "little"), *rules[8 * i + 2 : 8 * i + 4]
        if code & 0x07 == 0x05:
            assert i + 1 + max(if_true, if_false) < count


@needs_jail
@needs_jail
def test_one_thread_alone_parses_python(monkeypatch: pytest.MonkeyPatch) -> None:
    """CPython 3.11 up to 3.11.7 raises SystemError now and then where two threads parse at once."""
    threads: set[int] = set()
    parse = ast.parse

    def parsing(*args: Any, **kwargs: Any) -> ast.AST:
        threads.add(threading.get_ident())
        return parse(*args, **kwargs)

    monkeypatch.setattr(ast, "parse", parsing)
    program = Program(code="def f(x):\n    return x", test="def check(f):\n    assert f(1) == 1", entry_point="f")
    assert all(verdict.passed for verdict in Sandbox(workers=2).run([program] * 4))
    assert threads == {threading.get_ident()}


def test_interruption_leaves_no_processes() -> None:
    """A run that is killed takes its jails with it."""
    source = (
        "from dsv3.sandbox import Program, Sandbox\n"
        "Sandbox(workers=2).run([Program('while True: pass', '', entry_point='f')] * 2)"
    )
    process = subprocess.Popen([sys.executable, "-c", source])
    deadline = time.monotonic() + 60
    while len(descendants(process.pid)) < 5 and time.monotonic() < deadline:
        time.sleep(0.05)
    jailed = descendants(process.pid)
    process.send_signal(signal.SIGKILL)
    process.wait()
    while any(Path(f"/proc/{pid}").exists() for pid in jailed) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert [pid for pid in jailed if Path(f"/proc/{pid}").exists()] == []
