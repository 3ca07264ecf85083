"""Work on hostile items in a child process: one that hangs, explodes or crashes costs itself and nothing else.

A library written in C cannot be interrupted from Python, so a limit that always holds is another process that
can be killed. One fork serves a whole batch: the child inherits the items, says through shared memory which one
it is at, and sends all results at the end. After a kill, the rest of the batch is done again without the culprit.
"""

from __future__ import annotations

import contextlib
import gc
import mmap
import os
import resource
import select
import signal
import struct
import time
import traceback
from collections.abc import Callable, Sequence
from typing import Any

from kit.errors import GuardError

BEAT = struct.Struct("=qd")
POLL_S = 0.25
BETWEEN_S = 600.0
"""Time for what is no item: before the first, and packing up the results after the last."""
OK, BROKEN = b"+", b"!"


def in_child(
    work: Callable[[Sequence[tuple[int, Any]], Callable[[int], None]], bytes],
    items: Sequence[Any],
    seconds: float,
    memory_mb: float,
) -> tuple[bytes, dict[int, str]]:
    """`work([(0, item), …], beat)` in a child process: what it returned, and why each item that is not in it died.

    `work` calls `beat(i)` before it starts on item `i` and `beat(-1)` after the last. An item may take `seconds` of wall time and the child
    `memory_mb` MB more than this process has; the reasons are `timeout`, `out of memory` and `crash (signal n)`.
    Raises `GuardError`.
    """
    dead: dict[int, str] = {}
    while True:
        todo = [(i, item) for i, item in enumerate(items) if i not in dead]
        data, culprit, reason = _attempt(work, todo, seconds, memory_mb)
        if culprit is None:
            return data, dead
        dead[culprit] = reason


def _attempt(
    work: Callable[..., bytes], todo: Sequence[tuple[int, Any]], seconds: float, memory_mb: float
) -> tuple[bytes, int | None, str]:
    """Results of one child, or the item that it died of and the reason."""
    beat = mmap.mmap(-1, BEAT.size)
    BEAT.pack_into(beat, 0, -1, time.monotonic())
    reader, writer = os.pipe()
    gc.freeze()  # pages of memory that a collection would touch stay shared with the child
    child = os.fork()
    if child == 0:
        os.close(reader)
        _child(work, todo, beat, writer, memory_mb)
    gc.unfreeze()
    os.close(writer)
    with os.fdopen(reader, "rb", buffering=0) as results:
        data, late = _receive(results, beat, seconds)
    if late:
        os.kill(child, signal.SIGKILL)
    status = os.waitpid(child, 0)[1]
    if not late and data[:1] == OK and status == 0:
        return data[1:], None, ""
    culprit = BEAT.unpack_from(beat)[0]
    if data[:1] == BROKEN or culprit < 0:
        raise GuardError(data[1:].decode("utf-8", "replace").strip() or f"child ended with status {status}")
    if late:
        return b"", culprit, "timeout"
    number = os.WTERMSIG(status) if os.WIFSIGNALED(status) else 0
    # the kernel's own out-of-memory killer sends SIGKILL; C++ gives up with SIGABRT where malloc fails
    return b"", culprit, "out of memory" if number == signal.SIGKILL else f"crash (signal {number})"


def _receive(results: Any, beat: mmap.mmap, seconds: float) -> tuple[bytes, bool]:
    """All that the child sends until it closes the pipe, and whether an item took longer than `seconds`."""
    parts = []
    poll = min(POLL_S, seconds)
    while True:
        if select.select([results], [], [], poll)[0]:
            part = results.read(1 << 20)
            if not part:
                return b"".join(parts), False
            parts.append(part)
        elif not parts:
            index, since = BEAT.unpack_from(beat)
            if time.monotonic() - since > (seconds if index >= 0 else BETWEEN_S):
                return b"", True


def _child(
    work: Callable[..., bytes],
    todo: Sequence[tuple[int, Any]],
    beat: mmap.mmap,
    writer: int,
    memory_mb: float,
) -> None:
    """The child's whole life; never returns."""
    status = 1
    try:
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, signal.SIG_DFL)
        _limit_memory(memory_mb)
        data = OK + work(todo, lambda i: BEAT.pack_into(beat, 0, i, time.monotonic()))
        status = 0
    except BaseException:  # whatever it is, the parent must hear of it and this process must end here
        data = BROKEN + traceback.format_exc(limit=-3).encode("utf-8", "replace")
    with contextlib.suppress(OSError), os.fdopen(writer, "wb") as pipe:
        BEAT.pack_into(beat, 0, BEAT.unpack_from(beat)[0], time.monotonic())
        pipe.write(data)
    os._exit(status)


def _limit_memory(memory_mb: float) -> None:
    """Let this process take `memory_mb` MB more data than it has; where the system cannot, there is no limit."""
    with contextlib.suppress(OSError, ValueError, StopIteration):
        with open("/proc/self/status") as f:
            now_kb = next(int(line.split()[1]) for line in f if line.startswith("VmData"))
        most = resource.getrlimit(resource.RLIMIT_DATA)[1]
        resource.setrlimit(resource.RLIMIT_DATA, (now_kb * 1024 + int(memory_mb * 1e6), most))
