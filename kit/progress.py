"""A line that says how far a piece of work is, in a notebook, under `kit run` and on a terminal."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager

PROGRESS_FILE = "KIT_PROGRESS_FILE"
"""Environment variable: where a stage under `kit run` leaves its progress for the terminal to show."""


class Progress:
    """A line that says how far, how fast and how long still; see `progress`."""

    def __init__(self, total: int, label: str, unit: str) -> None:
        self.total, self.label, self.unit = total, label, unit
        self.done, self.note_text = 0, ""
        self.shown = 0.0
        self.begin()
        self.file = os.environ.get(PROGRESS_FILE)
        self.handle = None
        if not self.file and _in_notebook():
            from IPython.display import display

            # a display updated by its id ends right under papermill; tqdm's bar freezes at 0 %
            self.handle = display({"text/plain": ""}, raw=True, display_id=True)

    def begin(self, done: int = 0, planned_seconds: float = 0.0) -> None:
        """The work itself starts now, `done` units having been done by an earlier process.

        Neither what an earlier process did nor loading and planning says how fast this one is. `planned_seconds`, for
        the units still to do, stand in until the first of them is done.
        """
        self.done = self.before = done
        self.planned_seconds = planned_seconds
        self.started = time.perf_counter()
        # (units, moment) of the first update: it has paid for caches and engines that later units find warm
        self.first: tuple[int, float] | None = None

    def update(self, n: int = 1) -> None:
        """Count `n` more units."""
        self.done += n
        if self.first is None and n:
            self.first = self.done, time.perf_counter()
        self._show()

    def note(self, text: str) -> None:
        """Add a few words, such as the loss."""
        self.note_text = text
        self._show()

    def line(self) -> str:
        """`extract 312/840 pages · 104 pages/s · 5 s left`."""
        now = time.perf_counter()
        rate = (self.done - self.before) / (now - self.started) if now > self.started else 0.0
        # as soon as there is a second unit, the first is left out of what is to be expected of the others
        steady = rate
        if self.first and self.done > self.first[0] and now > self.first[1]:
            steady = (self.done - self.first[0]) / (now - self.first[1])
        parts = [f"{self.label} {self.done:,}/{self.total:,} {self.unit}"]
        if rate:
            parts.append(f"{rate:,.0f} {self.unit}/s" if rate >= 10 else f"{rate:.2f} {self.unit}/s")
        if self.done < self.total and (steady or self.planned_seconds):
            left = (self.total - self.done) / steady if steady else self.planned_seconds
            parts.append(f"{left:,.0f} s left" + ("" if steady else " by the plan"))
        return " · ".join([*parts, self.note_text] if self.note_text else parts)

    def _show(self, last: bool = False) -> None:
        now = time.perf_counter()
        if not last and now - self.shown < 0.5:
            return
        self.shown = now
        if self.file:
            with open(self.file, "w", encoding="utf-8") as f:
                f.write(self.line())
        elif self.handle:
            # the last word is without times: committed notebooks and nbval want the same text every run
            text = f"{self.label}: {self.done:,} {self.unit}" if last else self.line()
            self.handle.update({"text/plain": text}, raw=True)
        elif sys.stderr.isatty():
            print(f"\r\x1b[K{self.line()}", end="\n" if last else "", file=sys.stderr, flush=True)


@contextmanager
def progress(total: int, label: str, unit: str = "rows") -> Iterator[Progress]:
    """Show progress of `total` units in a notebook, under `kit run`, or on a terminal."""
    bar = Progress(total, label, unit)
    try:
        yield bar
    finally:
        bar._show(last=True)


def _in_notebook() -> bool:
    shell = sys.modules.get("IPython") and sys.modules["IPython"].get_ipython()
    return bool(shell) and hasattr(shell, "kernel")
