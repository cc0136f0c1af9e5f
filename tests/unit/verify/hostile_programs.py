"""Programs that a student paid for passing tests might write. Needs the standard library only."""

# ruff: noqa: E501 -- lines of other programs
from __future__ import annotations

CHEATS_TESTS = "assert solve(2) == 4\nassert solve(3) == 9\n"
"""No program in CHEATS computes this."""

CHEATS = {
    "empty": "",
    "wrong": "def solve(n):\n    return 4",
    "does not parse": "def solve(n:\n",
    "other name": "def resolve(n):\n    return n * n",
    "sys.exit at once": "import sys\nsys.exit(0)",
    "sys.exit in the call": "import sys\ndef solve(n):\n    sys.exit(0)",
    "os._exit at once": "import os\nos._exit(0)",
    "os._exit in the call": "import os\ndef solve(n):\n    os._exit(0)",
    "prints that it passed": "print('passed')\nprint('{\"right\": true}')\ndef solve(n):\n    print('passed')",
    "writes a verdict to everything open": (
        "import os, json\n"
        "def solve(n):\n"
        "    for fd in range(64):\n"
        "        try:\n"
        '            os.write(fd, b\'{"nonce": "", "right": true, "calls": 2, "ended": false}\\n\')\n'
        "        except OSError:\n"
        "            pass\n"
        "    os._exit(0)"
    ),
    "patches assert": (
        "import builtins, sys\n"
        "class Calm(BaseException):\n"
        "    def __new__(cls, *a): sys.exit(0)\n"
        "builtins.AssertionError = Calm\n"
        "sys.excepthook = lambda *a: None\n"
        "def solve(n):\n    return 0"
    ),
    "raises nothing that anybody expects": "class E(BaseException): pass\ndef solve(n):\n    raise E('passed')",
    "an error whose text fails": (
        "class E(Exception):\n    def __str__(self): raise self\ndef solve(n):\n    raise E()"
    ),
    "equals everything": (
        "class All:\n"
        "    def __eq__(self, other): return True\n"
        "    def __ne__(self, other): return False\n"
        "def solve(n):\n    return All()"
    ),
    "a number that equals everything": (
        "class All(int):\n    def __eq__(self, other): return True\n    __hash__ = int.__hash__\n"
        "def solve(n):\n    return All(7)"
    ),
    "edits the tests": (
        "import os, sys\n"
        "for folder, _, names in [*os.walk('.'), *os.walk('..'), *os.walk('/tmp')]:\n"
        "    for name in names:\n"
        "        try:\n"
        "            open(os.path.join(folder, name), 'w').write('')\n"
        "        except OSError:\n"
        "            pass\n"
        "for module in list(sys.modules.values()):\n"
        "    if hasattr(module, 'run_tests'):\n"
        "        module.run_tests = lambda *a: True\n"
        "def solve(n):\n    return 0"
    ),
    "patches its own jail": (
        "import sys, gc\n"
        "for thing in gc.get_objects():\n"
        "    if type(thing) is dict and 'encode' in thing and 'decode' in thing:\n"
        "        thing['encode'] = lambda value: {'set': []}\n"
        "        thing['decode'] = lambda value: ((), {})\n"
        "def solve(*n):\n    return 0"
    ),
    "looks for the nonce": (
        "import gc, glob, os\n"
        "def solve(n):\n"
        "    found = [o for o in gc.get_objects() if isinstance(o, dict) and 'nonce' in o]\n"
        "    for path in glob.glob('/proc/[0-9]*/fd/*') + glob.glob('/proc/[0-9]*/mem'):\n"
        "        try:\n"
        "            with open(path, 'wb') as file: file.write(b'{\"right\": true}')\n"
        "        except OSError:\n"
        "            pass\n"
        "    return found[0]['nonce'] if found else None"
    ),
    "answers before it is asked": (
        "import os\n"
        "for fd in range(3, 64):\n"
        "    try:\n"
        "        os.write(fd, b'{\"value\": true}\\n' * 2)\n"
        "    except OSError:\n"
        "        pass\n"
        "def solve(n):\n    return 0"
    ),
    "an answer without end": (
        "import os\n"
        "def solve(n):\n"
        "    for fd in range(3, 64):\n"
        "        try:\n"
        "            os.fstat(fd)\n"
        "            while True: os.write(fd, b'[' * 65536)\n"
        "        except OSError:\n"
        "            pass"
    ),
    "a deep answer": (
        "import os\n"
        "def solve(n):\n"
        "    for fd in range(3, 64):\n"
        "        try:\n"
        "            os.write(fd, b'{\"value\": ' + b'[' * 30000 + b']' * 30000 + b'}\\n')\n"
        "        except OSError:\n"
        "            pass"
    ),
    "kills its neighbours": (
        "import os, signal\n"
        "def solve(n):\n"
        "    for pid in [-1, 0, 1, os.getppid(), *range(2, 2000)]:\n"
        "        try:\n"
        "            os.kill(pid, signal.SIGKILL)\n"
        "        except OSError:\n"
        "            pass\n"
        "    return 0"
    ),
    "recursion": "def solve(n):\n    return solve(n)",
    "crash": "import ctypes\ndef solve(n):\n    return ctypes.string_at(0)",
}
"""Name -> program; all of them must fail."""

SLOW = {
    "infinite loop": "while True:\n    pass",
    "infinite loop that catches all": (
        "import signal\n"
        "for number in range(1, 64):\n"
        "    try:\n"
        "        signal.signal(number, signal.SIG_IGN)\n"
        "    except (OSError, ValueError):\n"
        "        pass\n"
        "def solve(n):\n"
        "    while True:\n"
        "        try:\n"
        "            while True: pass\n"
        "        except BaseException:\n"
        "            pass"
    ),
    "inside one multiplication": "def solve(n):\n    return str(7 ** (3 ** 20))[0]",
    "sleeps": "import time\ndef solve(n):\n    time.sleep(3600)",
    "a list without end": "import itertools\ndef solve(n):\n    return (0 for _ in itertools.count())",
}
"""Name -> program; all of them must run out of time, or of memory."""

PROBES_TESTS = "assert probe() == 'refused'\n"
"""The probe reports what it could do, so a test that passes shows that it ran and was refused."""

_TRY = (
    "import os\n"
    "def refused(action):\n"
    "    try:\n"
    "        result = action()\n"
    "    except (OSError, MemoryError, ValueError, RuntimeError) as error:\n"
    "        return True\n"
    "    return False\n"
    "def verdict(*actions):\n"
    "    done = [number for number, action in enumerate(actions) if not refused(action)]\n"
    "    return 'refused' if not done else f'possible: {done}'\n"
)

PROBES = {
    "fork": "def probe():\n    return verdict(os.fork, lambda: os.posix_spawn('/bin/true', ['true'], {}))",
    "fork bomb": "def probe():\n    return verdict(*[os.fork] * 1000)",
    "another program": (
        "import subprocess\n"
        "def probe():\n"
        "    return verdict(lambda: subprocess.run(['/bin/true']), lambda: os.execv('/bin/true', ['true']),\n"
        "                   lambda: os.execv('/proc/self/exe', ['python']))"
    ),
    "threads without end": (
        "import threading, time\n"
        "def probe():\n"
        "    def many():\n"
        "        for _ in range(200):\n"
        "            threading.Thread(target=time.sleep, args=(60,), daemon=True).start()\n"
        "    return verdict(many)"
    ),
    "10 GB": "def probe():\n    return verdict(lambda: bytearray(10 * 2**30), lambda: [0] * (10 * 2**27))",
    "10 GB in pieces": (
        "def probe():\n"
        "    def many():\n"
        "        kept = []\n"
        "        for _ in range(10 * 2**10):\n"
        "            kept.append(bytearray(2**20))\n"
        "    return verdict(many)"
    ),
    "memory by other names": (
        "import mmap\n"
        "def probe():\n"
        "    return verdict(lambda: os.memfd_create('x'), lambda: mmap.mmap(-1, 10 * 2**30))"
    ),
    "sockets": (
        "import socket\n"
        "def probe():\n"
        "    return verdict(socket.socket, lambda: socket.socket(socket.AF_INET6), lambda: socket.socket(socket.AF_UNIX),\n"
        "                   lambda: socket.socket(40, socket.SOCK_STREAM), lambda: socket.socketpair(),\n"
        "                   lambda: socket.socket(16, socket.SOCK_RAW), lambda: socket.create_connection(('1.1.1.1', 53), 1))"
    ),
    "/proc/1/environ": (
        "def probe():\n"
        "    return verdict(lambda: open('/proc/1/environ').read(), lambda: open('/proc/1/mem').read())"
    ),
    "the tests' memory and pipes": (
        "import glob\n"
        "def probe():\n"
        "    me = os.getpid()\n"
        "    others = [p for p in glob.glob('/proc/[0-9]*') if p != f'/proc/{me}']\n"
        "    def look(path):\n"
        "        if b'jail_inside' in open(path + '/cmdline', 'rb').read():\n"
        "            open(path + '/mem', 'rb')\n"
        "        else:\n"
        "            raise OSError\n"
        "    def own_pipes(path):\n"
        "        if b'jail_inside' not in open(path + '/cmdline', 'rb').read(): raise OSError\n"
        "        os.listdir(path + '/fd')\n"
        "    return verdict(*[lambda p=p: look(p) for p in others], *[lambda p=p: own_pipes(p) for p in others])"
    ),
    "write outside": (
        "def probe():\n"
        "    path = OUTSIDE\n"
        "    return verdict(lambda: open(path, 'w'), lambda: open(path, 'a').write('x'), lambda: os.unlink(path),\n"
        "                   lambda: os.truncate(path, 0), lambda: os.rename(path, path + '2'), lambda: os.chmod(path, 0),\n"
        "                   lambda: os.mkdir(path + '3'), lambda: os.symlink('/', path + '4'),\n"
        "                   lambda: os.link(path, path + '5'), lambda: os.utime(path),\n"
        "                   lambda: open('/usr/lib/canary', 'w'), lambda: open(os.__file__, 'a'),\n"
        "                   lambda: os.mkfifo('fifo'))"
    ),
    "files without end": (
        "def probe():\n"
        "    def large():\n"
        "        with open('large', 'wb') as file:\n"
        "            for _ in range(100): file.write(bytes(2**20))\n"
        "    def many():\n"
        "        for n in range(5000): open(f'f{n}', 'w').close()\n"
        "    return verdict(large, many)"
    ),
    "another's secrets": "def probe():\n    return verdict(lambda: open(SECRET).read(), lambda: open('/etc/shadow').read())",
    "the environment": "def probe():\n    return 'refused' if not os.environ else str(dict(os.environ))",
    "tracing, namespaces and mounts": (
        "import ctypes\n"
        "libc = ctypes.CDLL(None, use_errno=True)\n"
        "def call(name, *args):\n"
        "    if getattr(libc, name)(*args) < 0: raise OSError(ctypes.get_errno())\n"
        "def probe():\n"
        "    return verdict(lambda: call('ptrace', 16, os.getppid(), 0, 0), lambda: call('unshare', 0x10000000),\n"
        "                   lambda: call('mount', b'tmpfs', b'/tmp', b'tmpfs', 0, None), lambda: call('chroot', b'.'),\n"
        "                   lambda: call('setns', 0, 0), lambda: call('syscall', 101, 16, 1, 0, 0),\n"
        "                   lambda: call('syscall', 0x40000000 + 39), lambda: call('syscall', 321, 0, 0, 0),\n"
        "                   lambda: call('syscall', 425, 8, 0), lambda: call('setuid', 0), lambda: call('prctl', 4, 1))"
    ),
    "higher limits": (
        "import resource as r\n"
        "def probe():\n"
        "    inf = (r.RLIM_INFINITY, r.RLIM_INFINITY)\n"
        "    kinds = (r.RLIMIT_CPU, r.RLIMIT_AS, r.RLIMIT_NPROC, r.RLIMIT_NOFILE, r.RLIMIT_CORE)\n"
        "    others = [lambda: r.prlimit(os.getppid() or 1, r.RLIMIT_CPU, (0, 0))]\n"
        "    return verdict(*[lambda k=k: r.setrlimit(k, inf) for k in kinds], *others)"
    ),
    "a new session": "def probe():\n    return verdict(os.setsid, lambda: os.setpgid(0, 0), lambda: os.nice(-5))",
}  # fmt: skip


def probe(name: str, outside: str, secret: str) -> str:
    """The program of a probe."""
    return f"OUTSIDE, SECRET = {outside!r}, {secret!r}\n" + _TRY + PROBES[name]


HONEST = {
    "square": ("def solve(n):\n    return n * n", "assert solve(2) == 4\nassert solve(3) == 9"),
    "kinds": (
        "from collections import Counter, namedtuple\n"
        "P = namedtuple('P', 'x y')\n"
        "def same(x): return x\n"
        "def counted(x): return Counter(x)\n"
        "def point(): return P(1, 2.5)\n"
        "def lazily(n):\n    yield from range(n)",
        "for value in (None, True, 0, -1, 10**5000, 1.5, 'é\\n', b'\\x00', [1, [2]], (1, (2,)), {1: (2,), 'a': []},\n"
        "              {1, 2}, frozenset({3}), 1j, float('inf'), '', {'tuple': [1]}):\n"
        "    assert same(value) == value and type(same(value)) is type(value), value\n"
        "assert same(float('nan')) != same(float('nan'))\n"
        "assert counted('aab') == {'a': 2, 'b': 1}\nassert point() == (1, 2.5)\nassert list(lazily(3)) == [0, 1, 2]",
    ),
    "errors": (
        "class Own(Exception): pass\n"
        "def check(n):\n    if n < 0: raise ValueError('below zero')\n    raise Own('own')",
        "try:\n    check(-1)\nexcept ValueError as error:\n    assert 'below zero' in str(error)\nelse:\n    assert False\n"
        "try:\n    check(1)\nexcept Exception as error:\n    assert str(error) == 'own'",
    ),
    "a script": (
        "import sys\nn = int(input())\nprint(n + int(sys.stdin.readline()))\nsys.exit()",
        "assert run_program('2\\n3\\n') == '5\\n'\nassert run_program(stdin='7\\n-7\\n').strip() == '0'",
    ),
    "a script with a main": (
        "import sys\ndef add(a, b): return a + b\n"
        "if __name__ == '__main__':\n    print(add(*map(int, sys.stdin.buffer.read().split())))",
        "assert add(1, 2) == 3\nassert run_program('2 3') == '5\\n'",
    ),
    "libraries": (
        "import math, re, heapq, itertools, functools, decimal, random, json, datetime, statistics, hashlib, zlib\n"
        "from dataclasses import dataclass\n"
        "@functools.cache\ndef f(n): return 1 if n < 2 else f(n - 1) + f(n - 2)",
        "import math\ndef check(candidate):\n    assert candidate(80) == 37889062373143906\n    assert math.pi > 3\ncheck(f)",
    ),
    "prints on its way": ("def solve(n):\n    print('working', n)\n    return n", "assert solve(1) == 1"),
    "state between calls": ("seen = []\ndef add(x):\n    seen.append(x)\n    return len(seen)", "add(1)\nassert add(1) == 2"),
}  # fmt: skip
"""Name -> program and tests that it passes."""
NEEDS_NAMESPACES = {
    "writes a file": (
        "import os\ndef solve(n):\n    assert os.listdir('.') == []\n    with open('x', 'w') as file: file.write('1' * n)\n"
        "    size = os.path.getsize('x')\n    os.unlink('x')\n    return size",
        "assert solve(5) == 5\nassert solve(6) == 6",
    ),
    "threads": (
        "from concurrent.futures import ThreadPoolExecutor\n"
        "def solve(n):\n    with ThreadPoolExecutor(4) as pool: return sum(pool.map(abs, range(n)))",
        "assert solve(5) == 10",
    ),
}
"""The same, for what a jail without namespaces forbids or may forbid."""
