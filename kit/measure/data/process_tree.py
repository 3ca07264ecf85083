"""CPU and memory of a program and of all that it starts, also of those that nobody waits for: `kit.process.Tree`."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

from kit import ROOT, process

INTERVAL_S, TICK_S = 0.2, 0.01
ONE_THREAD = {f"{library}_NUM_THREADS": "1" for library in ("OMP", "OPENBLAS", "MKL", "ARROW")}


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


def measure_tree(function: str, arguments: dict[str, Any], python: str = sys.executable) -> Measured:
    """Run `function` ("package.module:name") with `arguments` (JSON) in a Python of its own, and measure its tree.

    One thread for each numeric library, so that CPU seconds are those of one core. The function may call `mark`.
    """
    module, _, name = function.partition(":")
    code = f"import json, sys; from {module} import {name} as f; print('RESULT', json.dumps(f(**json.loads(sys.argv[1]))))"
    env = {k: v for k, v in os.environ.items() if k != "KIT_PROGRESS_FILE"} | ONE_THREAD
    measured = Measured()
    started = time.perf_counter()
    with tempfile.TemporaryFile("w+", errors="replace") as errors:
        child = subprocess.Popen(
            [python, "-c", code, json.dumps(arguments)],
            stdout=subprocess.PIPE,
            stderr=errors,
            env=env,
            cwd=ROOT,
            text=True,
            start_new_session=True,
        )
        tree = process.Tree(child.pid)
        try:
            with process.watching(tree.sample, INTERVAL_S):
                for line in child.stdout:
                    word, _, rest = line.strip().partition(" ")
                    if word == "MARK":
                        tree.sample()
                        measured.marks[rest] = time.perf_counter() - started, tree.seconds()
                    elif word == "RESULT":
                        measured.result = json.loads(rest)
                _, status, usage = os.wait4(child.pid, 0)
        except BaseException:  # interrupted: a session of its own does not hear of it
            tree.kill()
            raise
        child.returncode = os.waitstatus_to_exitcode(status)
        waited = usage.ru_utime + usage.ru_stime
        measured.marks["exit"] = time.perf_counter() - started, max(tree.seconds(), waited)
        measured.worker_mb = tree.worker_mb()
        if child.returncode:
            errors.seek(0)
            said = errors.read().strip().splitlines() or [f"exit status {child.returncode}"]
            measured.error = said[-1][:300]
    return measured
