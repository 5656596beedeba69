"""Model-written code that attacks: contained, the verdict right, no process left. With what each wall is for."""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import sys
import threading

import pytest

from megallm.base.errors import DataError, InternalError, UsageError
from megallm.rewards import sandbox, seccomp
from megallm.rewards.sandbox import CodeTests, Limits, judge, judge_programs, run_program

needs_bwrap = pytest.mark.skipif(
    shutil.which("bwrap") is None, reason="bubblewrap is not installed (tests/install_facilities.sh)"
)
LIMITS = Limits(cpu_seconds=2, wall_seconds=60, memory_bytes=256 << 20, output_bytes=1 << 16)
TESTS = CodeTests(statements=["assert double(2) == 4", "assert double(5) == 10"])
RIGHT = "def double(x):\n    return 2 * x\n"


@pytest.fixture(autouse=True)
def no_process_left(monkeypatch):
    """Every pid namespace that a test made is empty when the call has returned."""
    spaces, opened = set(), os.pidfd_open

    def noted(pid, flags=0):
        spaces.add(os.readlink(f"/proc/{pid}/ns/pid"))
        return opened(pid, flags)

    monkeypatch.setattr(sandbox.os, "pidfd_open", noted)
    yield spaces
    spaces.discard(os.readlink("/proc/self/ns/pid"))
    assert not [pid for pid, space in _spaces() if space in spaces]


def _spaces():
    for pid in filter(str.isdigit, os.listdir("/proc")):
        try:
            yield pid, os.readlink(f"/proc/{pid}/ns/pid")
        except OSError:
            continue


def weaker(monkeypatch, *, words=(), calls=()):
    """Take walls away: words added to bwrap's, system calls that are allowed again."""
    whole = sandbox.command

    def command(*args):
        found = whole(*args)
        return [*found[:2], *words, *found[2:]]  # behind --unshare-all

    monkeypatch.setattr(sandbox, "command", command)
    machine = os.uname().machine
    architecture, clone, clone3, refused = seccomp.MACHINES[machine]
    kept = {name: number for name, number in refused.items() if name not in calls}
    number = -1 & 0xFFFFFFFF if "clone" in calls else clone  # a number that no call has
    monkeypatch.setitem(seccomp.MACHINES, machine, (architecture, number, clone3, kept))


# What the code does before it answers right: it passes exactly when it was let.
REACHES = {
    "read /etc": "open('/etc/passwd').read()",
    "read the repository": f"open({__file__!r}).read()",
    "list processes": "import os; os.listdir('/proc')",
    "write the root": "open('/x', 'w').write('x')",
    "write the library": "import os; open(os.__file__, 'a').write('x')",
    "fork": "import os; os.fork() or os._exit(0)",
    "fork bomb": "import os\nfor _ in range(10 ** 4): os.fork()",
    "a program": "import subprocess; subprocess.run(['/lib64/ld-linux-x86-64.so.2', '--help'], check=True)",
    "daemon": "import os\nif os.fork() == 0:\n    os.setsid()\n    os.fork()\n    import time; time.sleep(1000)",
    "socket": "import socket; socket.socket()",
    "10 GB of memory": "x = bytearray(10 << 30)",
    "a file of 10 GB": "f = open('/tmp/x', 'wb'); f.truncate(10 << 30)",
    "many files": "import os\nfor n in range(64): open(f'/tmp/{n}', 'wb').write(os.urandom(1 << 20))",
    "memfd": "import os; os.memfd_create('x')",
    "shared memory": "open('/dev/shm/x', 'w')",
    "ptrace": "import ctypes; assert ctypes.CDLL(None).ptrace(0, 0, 0, 0) == 0",
    "a namespace": "import ctypes; assert ctypes.CDLL(None).unshare(0x10000000) == 0",
    "more CPU": "import resource; resource.setrlimit(resource.RLIMIT_CPU, (100, 100))",
    "more memory": "import resource; resource.setrlimit(resource.RLIMIT_AS, (-1, -1))",
    "root": "import os; assert os.getuid() == 0",
    "becoming root": "import os; os.setuid(0)",
    "a device": "import os, stat; os.mknod('/tmp/d', stat.S_IFBLK | 0o600, os.makedev(8, 0))",
    "a mount": "import ctypes; assert ctypes.CDLL(None).mount(b'x', b'/tmp', b'tmpfs', 0, None) == 0",
    "another root": "import os; os.chroot('/tmp')",
    "the harness": "open('/sandboxed.py', 'a').write('x')",
    "a link out": "import os; os.symlink('/etc/passwd', '/tmp/l'); open('/tmp/l').read()",
    "secrets of the environment": "import os; assert 'SECRET' in os.environ or 'PATH' in os.environ",
    "priority": "import os; os.nice(-5)",
    "threads without end": "import threading, time\nfor _ in range(10 ** 4): threading.Thread(target=time.sleep, "
    "args=(1000,), daemon=True).start()",
    "a disk": "import os; assert any(name.startswith(('sd', 'vd', 'nvme', 'kvm')) for name in os.listdir('/dev'))",
    "many descriptors": "import os; found = [os.dup(0) for _ in range(100)]",
    "a descriptor too many": "import os\nopen_ = []\nfor n in range(64):\n    try: os.fstat(n); open_.append(n)\n"
    "    except OSError: pass\nassert len(open_) > 5, open_",  # 0, 1, 2 and the two pipes
}  # fmt: skip


def reaching(action: str) -> str:
    lines = "\n".join(f"    {line}" for line in action.splitlines())
    return f"def double(x):\n{lines}\n    return 2 * x\n"


@needs_bwrap
@pytest.mark.parametrize("name", REACHES)
def test_what_the_code_may_not_reach(name):
    found = judge(reaching(REACHES[name]), TESTS, LIMITS)
    assert not found.ok, found
    assert found.passed == 0


# What says that it passed, or ends before the tests, or reads or changes them.
CHEATS = {
    "exit 0 when imported": "import sys\nsys.exit(0)",
    "_exit(0) when imported": "import os\nos._exit(0)",
    "exit 0 in the function": "import sys\ndef double(x): sys.exit(0)",
    "_exit(0) in the function": "import os\ndef double(x): os._exit(0)",
    "atexit": "import atexit, os\natexit.register(lambda: os._exit(0))\ndef double(x): raise SystemExit(0)",
    "says passed": "print('PASSED', 'OK', '2 passed')\ndef double(x): return 0",
    "writes a verdict": "import os\nfor n in range(64):\n    try: os.write(n, b'{\"passed\": 2, \"total\": 2, "
    "\"error\": \"\", \"unsupported\": false, \"ended\": false}\\n')\n    except OSError: pass\n"
    "def double(x): return 0",
    "an equal of all": "class A:\n    def __eq__(self, other): return True\n    def __bool__(self): return True\n"
    "def double(x): return A()",
    "an int of all": "class A(int):\n    def __eq__(self, other): return True\ndef double(x): return A(7)",
    "builtins": "import builtins\nclass A(Exception):\n    pass\nbuiltins.AssertionError = A\n"
    "builtins.__build_class__ = None\nbuiltins.len = builtins.all = lambda *a: True\ndef double(x): return 0",
    "its own assert": "class AssertionError(Exception): pass\nTrue_ = 1\ndef double(x): return 0",
    "reads the tests": "import gc, sys\nMARK = '(elbuod tressa'[::-1]\ndef double(x):\n"
    "    texts = list(gc.get_objects())\n    frame = sys._getframe()\n    while frame:\n"
    "        texts += frame.f_locals.values()\n        frame = frame.f_back\n"
    "    texts = [t for t in texts if type(t) in (list, dict, tuple, str) and t is not MARK and t is not globals()]\n"
    "    return 2 * x if any(MARK in repr(t)[:4000].replace(repr(MARK), '') for t in texts) else 0",
    "ends a loop": "def double(x): raise StopIteration",
    "a module for a value": "import os\ndef double(x): return os",
    "an exception for a value": "def double(x): return ValueError",
    "patches the harness": "import sys\nsys.modules['__main__'].answer = lambda request, objects: ['ok', True, []]\n"
    "def double(x): return 0",
    "answers before it is asked": "import os\nfor n in range(3, 64):\n    try: os.write(n, b'[\"ok\", 4, []]\\n' * 9)\n"
    "    except OSError: pass\ndef double(x): return 0",
    "garbage for an answer": "import os\nfor n in range(3, 64):\n    try: os.write(n, b'{]\\xff\\n' * 9)\n"
    "    except OSError: pass\ndef double(x): return 0",
    "closes the pipes": "import os\ndef double(x): os.closerange(3, 64)",
    "a class of all": "class M(type):\n    def __eq__(self, other): return True\n    __hash__ = type.__hash__\n"
    "class double(metaclass=M):\n    def __init__(self, x): pass",
    "a hash of all": "class A:\n    __hash__ = lambda self: 4\n    def __eq__(self, other): return True\n"
    "    def __ne__(self, other): return False\ndef double(x): return A()",
    "the names of the tests": "def check(*a): return True\ntest_a = test_b = check\ndef double(x): return 0",
    "recursion": "def double(x): return double(x)",
    "reads its input": "def double(x): return int(input())",
    "an exception of the judge's": "class Ended(BaseException): pass\ndef double(x): raise Ended('passed')",
    "KeyboardInterrupt": "def double(x): raise KeyboardInterrupt",
    "traces": "import sys\nsys.settrace(lambda *a: None)\nsys.setprofile(lambda *a: None)\ndef double(x): return 0",
    "stops the import": "raise RuntimeError('x')",
    "no such function": "pass",
    "a syntax error": "def double(x:",
    "a huge value": "def double(x): return 'x' * (50 << 20)",
    "a deep value": "def double(x):\n    v = []\n    for _ in range(10 ** 5): v = [v]\n    return v",
    "an endless iterator": "import itertools\ndef double(x): return itertools.count()",
    "segmentation fault": "import ctypes\ndef double(x): ctypes.string_at(0)",
}  # fmt: skip


@needs_bwrap
@pytest.mark.parametrize("name", CHEATS)
def test_what_only_pretends_to_pass(name):
    found = judge(CHEATS[name], TESTS, LIMITS)
    assert not found.ok and found.passed == 0 and found.error, found


@needs_bwrap
def test_every_call_of_the_table_is_refused(monkeypatch):
    """EPERM (1) for each, and for those that need no privilege because of the filter alone."""
    machine = os.uname().machine
    numbers = sorted(seccomp.MACHINES[machine][3].values())
    text = "import ctypes\nlibc = ctypes.CDLL(None, use_errno=True)\ndef refused(numbers):\n    found = []\n"
    text += "    for number in numbers:\n        ctypes.set_errno(0)\n"
    text += "        if libc.syscall(number, -1, -1, -1, -1, -1, -1) == -1 and ctypes.get_errno() == 1:\n"
    text += "            found.append(number)\n    return found"
    assert judge(text, CodeTests(calls=[([numbers], numbers)], entry_point="refused"), LIMITS).ok
    harmless = [seccomp.MACHINES[machine][3][name] for name in ("socket", "memfd_create", "shmget")]
    weaker(monkeypatch, calls=["socket", "memfd_create", "shmget"])
    assert judge(text, CodeTests(calls=[([harmless], [])], entry_point="refused"), LIMITS).ok


@needs_bwrap
def test_an_exception_ends_no_loop_of_the_tests():
    loop = CodeTests(text="def test_all():\n    for got in map(double, [2, 5]):\n        assert got == 4\n")
    assert not judge(CHEATS["ends a loop"], loop, LIMITS).ok
    passed_on = CodeTests(statements=["assert double(double(2)) == 8"])
    for name in ("a module for a value", "an exception for a value"):  # no error of the tests, which would end a run
        assert not judge(CHEATS[name], passed_on, LIMITS).ok


@needs_bwrap
def test_what_uses_up_time_and_output():
    quick = Limits(cpu_seconds=1, wall_seconds=30, output_bytes=1 << 16)
    loop = run_program("while True: pass", "", quick)
    assert loop.error == "over its CPU time"
    flood = run_program("while True: print('x' * 1000)", "", quick)
    assert flood.error == "more than 65536 bytes of output" and flood.status is None
    asleep = run_program("import time\ntime.sleep(1000)", "", Limits(wall_seconds=1.0))
    assert asleep.error == "over 1 seconds" and asleep.status is None
    late = judge("import time\ndef double(x): time.sleep(1000)", TESTS, Limits(wall_seconds=1.0))
    assert not late.ok and late.error == "over 1 seconds"
    spent = judge("def double(x):\n    while True: pass", TESTS, quick)
    assert not spent.ok and spent.error == "the tested code ended over its CPU time"


@needs_bwrap
def test_a_process_outside_is_not_reached():
    """kill(-1), and a parent's or any other number: only the sandbox itself is hit."""
    with subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE) as outside:
        text = "import os\ndef double(x):\n    for pid in (-1, os.getppid() or 1, 1, {0}):\n"
        text += "        try: os.kill(pid, 9)\n        except OSError: pass\n    return 2 * x"
        assert judge(text.format(outside.pid), TESTS, LIMITS).ok
        assert outside.poll() is None
        outside.kill()


# Each wall taken away, and what it stood before gets through: the tests above can fail.


@needs_bwrap
def test_controls_of_files_and_system_calls(monkeypatch):
    weaker(monkeypatch, words=["--ro-bind", "/etc", "/etc"], calls=["memfd_create"])
    for name in ("read /etc", "memfd"):
        assert judge(reaching(REACHES[name]), TESTS, LIMITS).ok, name


@needs_bwrap
def test_control_of_the_network(monkeypatch):
    with socket.create_server(("127.0.0.1", 0)) as server:
        thread = threading.Thread(target=server.accept, daemon=True)
        thread.start()
        text = f"import socket; socket.create_connection(('127.0.0.1', {server.getsockname()[1]}), 5)"
        assert not judge(reaching(text), TESTS, LIMITS).ok
        weaker(monkeypatch, calls=["socket"])
        refused = judge(reaching(text), TESTS, LIMITS)
        assert not refused.ok and "refused" in refused.error  # in a network of its own
        weaker(monkeypatch, words=["--share-net"], calls=["socket"])
        assert judge(f"import socket\nopened = {text[15:]}\n{RIGHT}", TESTS, LIMITS).ok
        thread.join(timeout=60)
        assert not thread.is_alive()


@needs_bwrap
def test_control_of_processes_a_daemon_dies_with_its_namespace(monkeypatch, no_process_left):
    weaker(monkeypatch, calls=["fork", "vfork", "clone"])
    found = judge(reaching(REACHES["daemon"]), TESTS, LIMITS)
    assert found.ok and no_process_left  # it was let, and the fixture sees that it is gone


@needs_bwrap
def test_control_of_the_two_processes():
    """The judge's stand-ins are what protects the tests: in one interpreter the cheats pass."""
    for name in ("an equal of all", "an int of all"):
        space: dict = {}
        exec(CHEATS[name], space)
        for statement in TESTS.statements:
            exec(statement, space)
    text = f"tests = {TESTS.statements!r}\n{CHEATS['reads the tests']}\nfor test in tests: exec(test)"
    assert subprocess.run([sys.executable, "-c", text], check=False).returncode == 0
    done = subprocess.run([sys.executable, "-c", CHEATS["exit 0 when imported"] + "\nassert False"], check=False)
    assert done.returncode == 0  # by its exit status it has passed


@needs_bwrap
def test_honest_code_of_every_form():
    assert judge(RIGHT, TESTS, LIMITS) == sandbox.Judgement(2, 2)
    half = judge("def double(x): return 4", TESTS, LIMITS)
    assert (half.passed, half.total, half.ok) == (1, 2, False) and "double(5) == 10" in half.error
    human = "def check(candidate):\n    assert candidate([3, 1]) == [1, 3]\n    assert candidate([]) == []\n"
    assert judge("def order(v): return sorted(v)", CodeTests(text=human, entry_point="order"), LIMITS).ok
    assert not judge("def order(v): return v", CodeTests(text=human, entry_point="order"), LIMITS).ok
    calls = CodeTests(calls=[([[1, 2]], [2, 1])], entry_point="turn")
    assert judge("class Solution:\n    def turn(self, v): return tuple(v[::-1])", calls, LIMITS).ok
    assert not judge("class Solution:\n    def turn(self, v): return v", calls, LIMITS).ok
    values = "import solution\nfrom solution import Stack, Empty, back, make\n" + VALUES_TEST
    assert judge(VALUES, CodeTests(text=values), LIMITS) == sandbox.Judgement(2, 2)
    with pytest.raises(DataError, match="passes function to the tested code"):
        judge("def double(f): return f(1)", CodeTests(statements=["assert double(lambda x: x)"]), LIMITS)
    assert not judge(RIGHT, CodeTests(statements=[]), LIMITS).ok  # no test is no pass


VALUES = """
import math
from collections import Counter, defaultdict
class Empty(ValueError): pass
class Stack:
    def __init__(self): self.items = []
    def push(self, item): self.items.append(item); return self
    def pop(self):
        if not self.items: raise Empty("nothing")
        return self.items.pop()
    def __len__(self): return len(self.items)
def back(*values, **named): return list(values), named
def make():
    for n in range(3): yield n
def order(v): v.sort()
"""
VALUES_TEST = """
def test_values():
    told = [1, -2 ** 80, 1.5, float("inf"), "a\\n", b"b", None, True, (1, (2,)), {3}, frozenset([4]), 2j, {(1, 2): [3]}]
    assert back(*told, a=1) == (told, {"a": 1})
    assert math.isclose(math.pi, 3.14159, rel_tol=1e-5)
    v = [3, 1, 2]
    assert solution.order(v) is None and v == [1, 2, 3]
def test_objects():
    stack = Stack()
    assert len(stack.push(1).push(2)) == 2 and stack.pop() == 2 and stack.items == [1]
    assert list(make()) == [0, 1, 2]
    stack.pop()
    try:
        stack.pop()
    except Empty as error:
        assert isinstance(error, ValueError) and str(error) == "nothing"
    else:
        assert False
"""


@needs_bwrap
def test_programs_by_their_output():
    code = "n = int(input())\nprint(n * 2, ' ')\nprint()"
    assert judge_programs(code, [("2\n", "4"), ("5\n", "10\n")], LIMITS) == sandbox.Judgement(2, 2, "", "")
    wrong = judge_programs("print(4)", [("2\n", "4"), ("5\n", "10\n")], LIMITS)
    assert (wrong.passed, wrong.total) == (1, 2) and "prints '4\\n' instead of '10\\n'" in wrong.error
    assert not judge_programs("import sys\nsys.exit(0)", [("2\n", "4")], LIMITS).ok
    raised = judge_programs("print(4)\nraise ValueError('no')", [("2\n", "4")], LIMITS)
    assert not raised.ok and "ValueError: no" in raised.error
    assert judge_programs("if __name__ == '__main__':\n    print(4)\n    exit()", [("", "4")], LIMITS).ok
    threads = "import threading\nt = threading.Thread(target=lambda: print(4))\nt.start()\nt.join()"
    assert judge_programs(threads, [("", "4")], LIMITS).ok
    assert run_program("x = bytearray(1 << 30)", "", LIMITS).error == "out of memory"


def test_without_a_sandbox_nothing_runs(monkeypatch, tmp_path):
    started = []
    monkeypatch.setattr(sandbox.subprocess, "Popen", lambda *a, **k: started.append(a))
    monkeypatch.setattr(sandbox.shutil, "which", lambda name: None)
    with pytest.raises(UsageError, match="bwrap is not on the PATH.*never run without"):
        judge(RIGHT, TESTS)
    with pytest.raises(UsageError, match="apt-get install bubblewrap"):
        run_program("print(1)")
    monkeypatch.setattr(sandbox.platform, "machine", lambda: "riscv64")
    sandbox._unavailable.cache_clear()
    with pytest.raises(UsageError, match="no table of system calls for riscv64"):
        judge(RIGHT, TESTS)
    sandbox._unavailable.cache_clear()
    assert not started


def test_a_bubblewrap_that_fails_is_no_verdict(monkeypatch, tmp_path):
    """No user namespaces: refused before; and when it fails later, an error and not a reward of 0."""
    fake = tmp_path / "bwrap"
    fake.write_text("#!/bin/sh\necho 'bwrap: No permissions to create new namespace' >&2\nexit 1\n")
    fake.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    with pytest.raises(UsageError, match="does not work here .bwrap: No permissions"):
        judge(RIGHT, TESTS)
    monkeypatch.setattr(sandbox, "check_sandbox", lambda: None)
    for run in (lambda: judge(RIGHT, TESTS), lambda: run_program("print(1)")):
        with pytest.raises(InternalError, match="did not start: bwrap: No permissions"):
            run()


def test_the_filter_is_a_program_the_kernel_takes():
    for machine, (_, _, _, refused) in seccomp.MACHINES.items():
        assert len(seccomp.build_filter(machine)) == 8 * (13 + 2 * len(refused))
