"""This machine and its processes: what of it may be used, and what a program and all that it starts take.

`kit doctor`, Spark, plans, threads and every measurement read the machine here and nowhere else, so they agree.
What is believed when sources differ is the least of:

| fact        | the system says                         | the control groups say, this process's own and each above it |
|-------------|-----------------------------------------|---------------------------------------------------------------|
| cores       | those this process may be scheduled on  | CPU quota over period, a part of a core counted as one        |
| memory      | what is built in                        | their limits                                                  |
| free memory | what it could give without swapping     | limit less use, files that it can drop not counted            |
"""

from __future__ import annotations

import contextlib
import math
import os
import platform
import re
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil

GROUPS = Path("/sys/fs/cgroup")
MEMBERSHIP = Path("/proc/self/cgroup")
PROCESSOR = Path("/proc/cpuinfo")


def cores() -> int:
    """Cores that this process may keep busy, at least 1.

    `taskset`, cpusets and Slurm narrow the affinity, containers set a quota; `os.cpu_count()` knows of neither.
    """
    allowed = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    # a quota of 1.5 keeps a second thread busy half of the time, so it is worth one
    quotas = [math.ceil(quota) for quota in _cpu_quotas()]
    return max(1, min([allowed, *quotas]))


def memory_bytes() -> int:
    """Memory that this process could ever have."""
    limits = [limit for limit, _ in _memory_limits()]
    return min([psutil.virtual_memory().total, *limits])


def free_bytes() -> int:
    """Memory that this process could have now beside what it has."""
    left = [limit - used for limit, used in _memory_limits()]
    return max(0, min([psutil.virtual_memory().available, *left]))


def resident_bytes() -> int:
    """Memory that this process holds now, pages shared with others included."""
    return psutil.Process().memory_info().rss


def processor() -> str:
    """Name of the processor as Linux has it, elsewhere its architecture."""
    for line in _lines(PROCESSOR):
        key, _, value = line.partition(":")
        if key.strip() == "model name":
            return value.strip()
    return platform.machine()


def _cpu_quotas() -> Iterator[float]:
    """Every quota that holds for this process, in cores."""
    for folder in _group_folders("cpu"):
        words = " ".join(_lines(folder / "cpu.max")).split()  # version 2: "150000 100000", or "max 100000"
        words = words or [*_lines(folder / "cpu.cfs_quota_us"), *_lines(folder / "cpu.cfs_period_us")]
        with contextlib.suppress(ValueError, ZeroDivisionError):
            quota, period = map(int, words)
            if quota > 0:  # version 1 says -1 where there is none
                yield quota / period


def _memory_limits() -> Iterator[tuple[int, int]]:
    """Every limit that holds for this process and what its group uses of it, in bytes."""
    names = (
        ("memory.max", "memory.current", "inactive_file"),
        ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
    )
    for folder in _group_folders("memory"):
        for limit_name, used_name, cache_name in names:
            with contextlib.suppress(OSError, ValueError):  # another version, or "max": no limit
                limit = int((folder / limit_name).read_text())
                used = int((folder / used_name).read_text())
                statistics = "\n".join(_lines(folder / "memory.stat"))
                cached = re.search(rf"^{cache_name} (\d+)$", statistics, re.MULTILINE)
                yield limit, used - int(cached[1] if cached else 0)


def _group_folders(controller: str) -> Iterator[Path]:
    """Folders of the control groups that hold for this process, innermost first; some may not be there.

    A container may see its path on the host, which is not mounted inside: what is mounted is its own group, as the root.
    """
    for line in _lines(MEMBERSHIP):
        _, controllers, path = line.split(":", 2)
        if not controllers:
            mounts = [GROUPS, GROUPS / "unified"]  # version 2, alone or beside version 1
        elif controller in controllers.split(","):
            mounts = [GROUPS / controller]
        else:
            continue
        inner = Path(path.strip("/"))
        yield from (mount / folder for mount in mounts for folder in [inner, *inner.parents])


def _lines(path: Path) -> list[str]:
    """Lines of a file of the system, none where it has no such file."""
    try:
        return path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError):
        return []


def family(pid: int | None = None) -> list[psutil.Process]:
    """The process `pid` (none given: this one) after all below it, so that nobody is orphaned before it is dealt with."""
    parent = psutil.Process(pid)
    return [*parent.children(recursive=True), parent]


def family_bytes(pid: int | None = None) -> int:
    """Memory of a process and all below it: proportional set sizes where the system has them, so shared pages count once."""
    total = 0
    for member in family(pid):
        with contextlib.suppress(psutil.Error):  # gone meanwhile
            memory = member.memory_full_info()
            total += getattr(memory, "pss", 0) or memory.rss
    return total


def kill_family(pid: int) -> None:
    """Kill a process and all below it, also those in sessions of their own, which a signal to a group does not reach."""
    with contextlib.suppress(psutil.NoSuchProcess):
        kill(family(pid))


def kill(processes: list[psutil.Process]) -> None:
    """Kill these processes; those that are gone already are no error."""
    for member in processes:
        with contextlib.suppress(psutil.Error):
            member.kill()


@contextlib.contextmanager
def watching(look: Callable[[], None], every_s: float) -> Iterator[None]:
    """Call `look` every `every_s` seconds, from a thread of its own, while the block runs; never after it."""
    done = threading.Event()

    def watch() -> None:
        while not done.wait(every_s):
            look()

    watcher = threading.Thread(target=watch, daemon=True)
    watcher.start()
    try:
        yield
    finally:
        done.set()
        watcher.join()


@contextlib.contextmanager
def stderr_to(path: Path) -> Iterator[Path]:
    """While the block runs, what this process and those it starts write to stderr goes to the file `path`."""
    path.parent.mkdir(parents=True, exist_ok=True)
    sys.stderr.flush()
    kept = os.dup(2)
    with path.open("wb") as log:
        os.dup2(log.fileno(), 2)
        try:
            yield path
        finally:
            os.dup2(kept, 2)
            os.close(kept)


class Tree:
    """The processes below `pid` and in its session, so that orphans stay; followed from `sample` to `sample`.

    `getrusage` counts children only once somebody has waited for them. Nobody waits for Spark's Python workers: it told
    12 CPU seconds of a job that took 27. So every process of the tree is looked at while it lives. What one used after
    its last sample is lost unless its parent waits for it, so `seconds` is a floor.
    """

    def __init__(self, pid: int) -> None:
        self.root = root = psutil.Process(pid)
        self.parent: dict[psutil.Process, psutil.Process | None] = {root: None}
        self.cpu = {root: (0.0, 0.0)}
        """CPU seconds of a process itself, and of those that it has waited for."""
        self.rss_mb = {root: 0.0}
        """Largest resident memory seen."""
        self.alive, self.below_java = {root}, set()
        self.lock = threading.Lock()

    def sample(self) -> None:
        """Look at every process of the tree once."""
        with self.lock:
            followed = {member.pid: member for member in self.alive}
            self.alive = set()
            for member in psutil.process_iter(["ppid", "name"]):
                try:
                    known = member in self.parent or member.info["ppid"] in followed
                    if not known and os.getsid(member.pid) != self.root.pid:
                        continue
                    times = member.cpu_times()
                    rss_mb = member.memory_info().rss / 1e6
                except (psutil.Error, OSError):  # gone meanwhile: what it had at the last sample stays
                    continue
                self.parent.setdefault(member, followed.get(member.info["ppid"], self.root))
                self.cpu[member] = times.user + times.system, times.children_user + times.children_system
                self.rss_mb[member] = max(self.rss_mb.get(member, 0.0), rss_mb)
                if member.info["name"] == "java" or self.parent[member] in self.below_java:
                    self.below_java.add(member)
                self.alive.add(member)
                followed[member.pid] = member

    def seconds(self) -> float:
        """CPU seconds so far. Of dead children counts what the parent was told, or what was seen if that is more."""

        def with_children(member: psutil.Process) -> float:
            own, waited = self.cpu[member]
            children = [child for child, parent in self.parent.items() if parent == member]
            dead = sum(with_children(child) for child in children if child not in self.alive)
            living = sum(with_children(child) for child in children if child in self.alive)
            return own + max(waited, dead) + living

        return with_children(self.root)

    def worker_mb(self) -> float:
        """Largest resident memory of one of Spark's Python workers; of any process where there is no Spark."""
        workers = [member for member in self.below_java if self.parent[member] in self.below_java]
        return max(self.rss_mb[member] for member in workers or self.rss_mb)

    def kill(self) -> None:
        """Kill what was alive at the last sample, orphans included."""
        kill(list(self.alive))
