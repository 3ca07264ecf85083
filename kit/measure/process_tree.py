"""CPU and memory of a program and of all that it starts, also of those that nobody waits for.

`getrusage` counts children only once somebody has waited for them. Nobody waits for Spark's Python workers: it
told 12 CPU seconds of a job that took 27. So every process of the tree is looked at while it lives.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import threading
import time
from contextlib import suppress
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

import psutil

from kit import ROOT

INTERVAL_S, TICK_S = 0.2, 0.01
ONE_THREAD = {f"{library}_NUM_THREADS": "1" for library in ("OMP", "OPENBLAS", "MKL", "ARROW")}


class Tree:
    """The processes below `pid` and in its session, so that orphans stay; followed from `sample` to `sample`.

    What a process used after its last sample is lost unless its parent waits for it, so `seconds` is a floor.
    """

    def __init__(self, pid: int) -> None:
        self.root = root = psutil.Process(pid)
        self.parent: dict[psutil.Process, psutil.Process | None] = {root: None}
        self.cpu = {root: (0.0, 0.0)}
        self.rss_mb = {root: 0.0}
        self.alive, self.below_java = {root}, set()
        self.lock = threading.Lock()

    def sample(self) -> None:
        """Look at every process of the tree once."""
        with self.lock:
            followed = {p.pid: p for p in self.alive}
            self.alive = set()
            for p in psutil.process_iter(["ppid", "name"]):
                try:
                    ours = p in self.parent or p.info["ppid"] in followed
                    if not ours and os.getsid(p.pid) != self.root.pid:
                        continue
                    t, rss = p.cpu_times(), p.memory_info().rss / 1e6
                except (psutil.Error, OSError):  # gone meanwhile: what it had at the last sample stays
                    continue
                self.parent.setdefault(p, followed.get(p.info["ppid"], self.root))
                self.cpu[p] = t.user + t.system, t.children_user + t.children_system
                self.rss_mb[p] = max(self.rss_mb.get(p, 0.0), rss)
                if p.info["name"] == "java" or self.parent[p] in self.below_java:
                    self.below_java.add(p)
                self.alive.add(p)
                followed[p.pid] = p

    def seconds(self) -> float:
        """CPU seconds so far. Of dead children counts what the parent was told, or what was seen if that is more."""

        def of(p: psutil.Process) -> float:
            own, waited = self.cpu[p]
            children = [c for c, parent in self.parent.items() if parent == p]
            dead = sum(of(c) for c in children if c not in self.alive)
            return own + max(waited, dead) + sum(of(c) for c in children if c in self.alive)

        return of(self.root)

    def worker_mb(self) -> float:
        """Largest resident memory of one of Spark's Python workers; of any process where there is no Spark."""
        workers = [p for p in self.below_java if self.parent[p] in self.below_java]
        return max(self.rss_mb[p] for p in workers or self.rss_mb)


@dataclass
class Measured:
    """One run: `(wall, CPU)` seconds at each mark since it began and at its end, what it returned, or its error."""

    marks: dict[str, tuple[float, float]] = field(default_factory=dict)
    result: Any = None
    worker_mb: float = 0.0
    error: str | None = None

    def span(self, first: str, last: str) -> tuple[float, float]:
        """Wall and CPU seconds between two marks; the kernel counts CPU in ticks, so one is the least."""
        (wall_a, cpu_a), (wall_b, cpu_b) = self.marks[first], self.marks[last]
        return wall_b - wall_a, max(cpu_b - cpu_a, TICK_S)

    def steps(self) -> dict[str, float]:
        """CPU seconds between neighbouring marks, named by the later one."""
        return {b: round(self.span(a, b)[1], 2) for a, b in pairwise(self.marks)}


def mark(name: str) -> None:
    """Said by the program that is measured: here is a point to take the time at."""
    print(f"MARK {name}", flush=True)


def measure(function: str, arguments: dict[str, Any], python: str = sys.executable) -> Measured:
    """Run `function` ("package.module:name") with `arguments` (JSON) in a Python of its own, and measure its tree.

    One thread for each numeric library, so that CPU seconds are those of one core. The function may call `mark`.
    """
    module, _, name = function.partition(":")
    code = f"import json, sys; from {module} import {name} as f; print('RESULT', json.dumps(f(**json.loads(sys.argv[1]))))"
    env = {k: v for k, v in os.environ.items() if k != "KIT_PROGRESS_FILE"} | ONE_THREAD
    found, started, stop = Measured(), time.perf_counter(), threading.Event()
    with tempfile.TemporaryFile("w+", errors="replace") as errors:
        child = subprocess.Popen(
            [python, "-c", code, json.dumps(arguments)],
            stdout=subprocess.PIPE, stderr=errors, env=env, cwd=ROOT, text=True, start_new_session=True,
        )  # fmt: skip
        tree = Tree(child.pid)

        def watch() -> None:
            while not stop.wait(INTERVAL_S):
                tree.sample()

        watcher = threading.Thread(target=watch, daemon=True)
        watcher.start()
        try:
            for line in child.stdout:
                word, _, rest = line.strip().partition(" ")
                if word == "MARK":
                    tree.sample()
                    found.marks[rest] = time.perf_counter() - started, tree.seconds()
                elif word == "RESULT":
                    found.result = json.loads(rest)
            _, status, usage = os.wait4(child.pid, 0)
        except BaseException:  # interrupted: a session of its own does not hear of it
            for p in tree.alive:
                with suppress(psutil.Error):
                    p.kill()
            raise
        finally:
            stop.set()
            watcher.join()
        child.returncode = os.waitstatus_to_exitcode(status)
        waited = usage.ru_utime + usage.ru_stime
        found.marks["exit"] = time.perf_counter() - started, max(tree.seconds(), waited)
        found.worker_mb = tree.worker_mb()
        if child.returncode:
            errors.seek(0)
            said = errors.read().strip().splitlines() or [f"exit status {child.returncode}"]
            found.error = said[-1][:300]
    return found
