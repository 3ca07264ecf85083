"""The guard: an item that hangs in C, takes all memory or crashes the process is named, and costs no other."""

import ctypes
import faulthandler
import json
import os
import re
import resource
import signal
import time
from collections.abc import Callable, Sequence

import psutil
import pytest

from kit.data.engine.guard import in_child
from kit.errors import GuardError


def work(items: Sequence[tuple[int, object]], beat: Callable[[int], None]) -> bytes:
    """Run every item that is a function and collect what it returns."""
    found = {}
    for i, item in items:
        beat(i)
        found[i] = item() if callable(item) else item
    beat(-1)
    return json.dumps(found).encode()


def done(items: list, seconds: float = 5, memory_mb: float = 500) -> tuple[dict, dict]:
    data, dead = in_child(work, items, seconds, memory_mb)
    return {int(k): v for k, v in json.loads(data).items()}, dead


def endless() -> None:
    re.match(r"(a+)+$", "a" * 60 + "b")  # inside C: no signal handler of Python gets a word in


def crash() -> None:
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    faulthandler.disable()  # it would tell the whole stack
    ctypes.string_at(0)


def explode() -> int:
    return sum(len(bytearray(64 << 20)) for _ in [bytearray(64 << 20) for _ in range(8)])


def memory_refused() -> str:
    try:
        explode()
    except MemoryError:
        return "refused"
    return "taken"


def test_results_of_all_items_come_back() -> None:
    assert done([1, "two", None]) == ({0: 1, 1: "two", 2: None}, {})
    assert done([]) == ({}, {})
    big = "x" * (5 << 20)  # more than a pipe holds
    assert done([big, 1])[0] == {0: big, 1: 1}


def test_an_endless_call_into_c_is_killed_and_the_rest_is_done() -> None:
    started = time.monotonic()
    assert done([1, endless, 3], seconds=1) == ({0: 1, 2: 3}, {1: "timeout"})
    assert time.monotonic() - started < 20


def test_a_crash_of_the_process_is_named_by_its_signal() -> None:
    assert done([crash, 2, crash]) == (
        {1: 2},
        {0: f"crash (signal {signal.SIGSEGV.value})", 2: f"crash (signal {signal.SIGSEGV.value})"},
    )


def test_the_kernels_out_of_memory_killer_is_named() -> None:
    assert done([lambda: os.kill(os.getpid(), signal.SIGKILL), 2]) == ({1: 2}, {0: "out of memory"})


@pytest.mark.skipif(not os.path.exists("/proc/self/status"), reason="no memory limit without /proc")
def test_memory_of_the_child_is_limited_and_that_of_this_process_is_not() -> None:
    before = resource.getrlimit(resource.RLIMIT_DATA)
    assert done([memory_refused, 2], memory_mb=300) == ({0: "refused", 1: 2}, {})
    assert done([memory_refused], memory_mb=3000) == ({0: "taken"}, {})
    assert resource.getrlimit(resource.RLIMIT_DATA) == before


def test_time_is_counted_for_each_item_alone() -> None:
    slow = [lambda: time.sleep(0.4) or 1] * 5
    assert done(slow, seconds=1.5) == (dict.fromkeys(range(5), 1), {})


def test_a_bug_in_the_work_itself_is_told_and_blames_no_item() -> None:
    def broken(items: object, beat: object) -> bytes:
        raise ZeroDivisionError("by nought")

    def silent(items: object, beat: object) -> bytes:
        os._exit(7)

    with pytest.raises(GuardError, match="by nought"):
        in_child(broken, [1], 1, 100)
    with pytest.raises(GuardError, match="status"):
        in_child(silent, [1], 1, 100)


def test_no_child_is_left_behind() -> None:
    before = {c.pid for c in psutil.Process().children()}  # Spark's, when other tests ran before
    done([1, endless, crash], seconds=0.5)
    assert {c.pid for c in psutil.Process().children()} <= before
