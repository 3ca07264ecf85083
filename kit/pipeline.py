"""The chain: which stages are done, which are stale and why, and running the rest through papermill.

A stage is done when its committed manifest was made with the same parameters, the same inputs (by content)
and the same code. Nothing else is remembered, so a run can be killed anywhere and started again.
"""

from __future__ import annotations

import contextlib
import logging
import os
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kit import ROOT, process
from kit.errors import LakeError, ParamError, StageFailed
from kit.lake.code import code_identity
from kit.lake.files import fingerprint, store_errors
from kit.lake.manifest import Input, Manifest, counts_line
from kit.lake.store import Lake
from kit.params import NOTEBOOKS, STAGES, Stage, did_you_mean, for_stage
from kit.progress import PROGRESS_FILE

FOLDER = ROOT / "notebooks"
POLL_S, QUIET_LINE_S = 0.5, 20.0


@dataclass(frozen=True)
class State:
    """One stage of a run: `done`, `stale`, `failed` or `missing`, and why."""

    stage: str
    status: str
    why: str
    manifest: Manifest | None


def state(lake: Lake, p: Stage) -> State:
    """Compare a stage's committed manifest with what would go in and come out of it now."""
    manifest = lake.manifest(p.run, p.stage)
    failure = lake.execution(p.run, p.stage).error
    if manifest is None:
        return State(p.stage, "failed" if failure else "missing", failure or "", None)
    changed = sorted(k for k, v in p.identity().items() if manifest.params.get(k, object()) != v)
    if changed:
        why = "parameter " + ", ".join(changed)
    elif manifest.code["source_sha256"] != code_identity(p.stage)["source_sha256"]:
        why = "code"
    else:
        other = [i.uri for i in manifest.inputs if _content(lake, i) != i.content_sha256]
        why = f"input {other[0]}" if other else ""
    if failure:
        return State(p.stage, "failed", failure, manifest)
    if not why and manifest.metrics.get("retry"):
        return State(p.stage, "stale", f"{manifest.metrics['retry']} pages to fetch again", manifest)
    return State(p.stage, "stale" if why else "done", f"changed: {why}" if why else "", manifest)


def _content(lake: Lake, source: Input) -> str | None:
    """Content hash that an input has now, None when it is gone."""
    if source.manifest_sha256 is None:
        with contextlib.suppress(ParamError, OSError):
            return fingerprint(source.uri)
        return None
    _, run, stage = source.uri.split("/")
    manifest = lake.manifest(run, stage)
    return manifest.content_sha256 if manifest else None


def states(lake: Lake, values: Mapping[str, Any]) -> list[State]:
    """State of every stage of the chain, and of the side trips that were made; what comes after one that must
    run again is stale, too."""
    by_stage: dict[str, State] = {}
    for name, cls in NOTEBOOKS.items():
        now = state(lake, for_stage(cls, values))
        if name not in STAGES and now.status == "missing":
            continue
        behind = [n for n in cls.needs if by_stage[n].status != "done"]
        if now.status == "done" and behind:
            now = State(name, "stale", f"after {behind[0]}", now.manifest)
        by_stage[name] = now
    return list(by_stage.values())


def pick(first: str | None, last: str | None, only: str | None) -> list[str]:
    """Names of the stages from `first` until `last` (or `only` one, a side trip too), by number or name."""
    names = list(NOTEBOOKS if only else STAGES)

    def find(word: str) -> int:
        match = [i for i, n in enumerate(names) if n == word or n[:2] == word]
        if not match:
            numbers = ", ".join(n[:2] for n in names)
            raise ParamError(f"no stage '{word}'{did_you_mean(word, names)}; stages are {numbers}")
        return match[0]

    if only:
        return [names[find(only)]]
    start, end = find(first) if first else 0, find(last) if last else len(names) - 1
    if start > end:
        raise ParamError(f"--from {first} comes after --until {last}")
    return names[start : end + 1]


def run_stages(values: Mapping[str, Any], stages: list[str], force: bool = False) -> Lake:
    """Run `stages` in order, skipping what is done; raises `StageFailed` at the first that fails."""
    models = {name: for_stage(NOTEBOOKS[name], values) for name in stages}
    lake = Lake(models[stages[0]].lake)
    lake.check_writable()
    for name in stages:
        p = models[name]
        now = state(lake, p)
        if now.status == "done" and not force:
            print(f"{name:24} done before · {counts_line(now.manifest.counts)}")
            continue
        manifest = run_stage(lake, p)
        seconds = lake.execution(p.run, name).seconds
        print(f"{name:24} {seconds:6.1f} s · {counts_line(manifest.counts)}", flush=True)
    return lake


def run_stage(lake: Lake, p: Stage) -> Manifest:
    """Execute one notebook with papermill; its executed copy goes into the lake, result or error included."""
    import papermill
    from papermill.exceptions import PapermillExecutionError

    logging.getLogger("papermill").setLevel(logging.ERROR)
    target = f"{lake.root}/reports/{p.run}/notebooks/{p.stage}.ipynb"
    before = lake.manifest(p.run, p.stage)
    error: str | None = None
    with (
        tempfile.TemporaryDirectory() as folder,
        _followed(p.stage, folder) as follower,
        process.stderr_to(Path(folder) / "kernel.log") as log,
    ):
        local = Path(folder) / f"{p.stage}.ipynb"
        try:
            papermill.execute_notebook(
                str(FOLDER / f"{p.stage}.ipynb"),
                str(local),
                parameters=p.model_dump(),
                kernel_name="python3",
                cwd=str(FOLDER),
                progress_bar=False,
            )
        except PapermillExecutionError as problem:
            error = f"{problem.ename}: {problem.evalue}".strip().replace("\n", " ")
        except Exception as problem:  # nbclient raises its own kinds when a kernel dies or cannot start
            error = f"{type(problem).__name__}: {str(problem).splitlines()[0] if str(problem) else 'the kernel died'}"
        with store_errors(f"cannot write {target}"):
            lake.fs.makedirs(target.rpartition("/")[0], exist_ok=True)
            for written, to in ((local, target), (log, target.replace(".ipynb", ".log"))):
                if written.exists() and written.stat().st_size:
                    lake.fs.put_file(str(written), to)
    after = lake.manifest(p.run, p.stage)
    if error is None and (after is None or after == before):
        error = "the notebook ended without a new result"
    if error:
        try:
            lake.record_execution(p.run, p.stage, error=error)
        except LakeError as problem:  # the error itself matters more
            print(f"(the failure could not be noted in the lake: {problem})", file=sys.stderr)
        raise StageFailed(f"{p.stage} failed: {error} (executed notebook: {target})")
    lake.record_execution(
        p.run, p.stage, seconds=round(follower.seconds, 1), peak_memory_mb=round(follower.peak_mb)
    )
    return after


class _Follower:
    """While a stage runs: its progress and seconds on the terminal, and the peak memory of its processes."""

    def __init__(self, stage: str, progress_file: Path) -> None:
        self.stage, self.progress_file = stage, progress_file
        self.started = time.perf_counter()
        self.peak_mb = 0.0
        self.quiet_until_s = QUIET_LINE_S

    @property
    def seconds(self) -> float:
        """Seconds since the stage was started, its kernel included."""
        return time.perf_counter() - self.started

    def look(self) -> None:
        """Note the memory, and say what the stage last said of its progress."""
        self.peak_mb = max(self.peak_mb, process.family_bytes() / 1e6)
        said = self.progress_file.read_text("utf-8") if self.progress_file.exists() else "starting"
        line = f"{self.stage:24} {self.seconds:6.1f} s · {said}"
        if sys.stdout.isatty():
            print(f"\r\x1b[K{line}", end="", flush=True)
        elif self.seconds > self.quiet_until_s:  # a log gets a line now and then, not an animation
            self.quiet_until_s = self.seconds + QUIET_LINE_S
            print(line, flush=True)


@contextlib.contextmanager
def _followed(stage: str, folder: str) -> Iterator[_Follower]:
    """Follow `stage`, which leaves its progress in a file in `folder`, while the block runs."""
    follower = _Follower(stage, Path(folder) / "progress")
    os.environ[PROGRESS_FILE] = str(follower.progress_file)
    try:
        with process.watching(follower.look, POLL_S):
            yield follower
    finally:
        os.environ.pop(PROGRESS_FILE, None)
        if sys.stdout.isatty():
            print("\r\x1b[K", end="", flush=True)


def open_lake(p: Stage) -> Lake:
    """The lake of a notebook; what the notebook reads is made first where it is missing, and that is said.

    This is what lets every notebook run alone, by Run All, in a fresh checkout. Parameters that the missing
    stages share with `p` are taken from it, the others are their defaults.
    """
    lake = Lake(p.lake)
    lake.check_writable()
    for name in p.reads():
        if lake.manifest(p.run, name) is None:
            shared = for_stage(NOTEBOOKS[name], p.model_dump())
            open_lake(shared)
            if lake.manifest(p.run, name) is None:  # a stage above may have made it on its way
                print(f"{name} has no result for run '{p.run}' yet: running it first", file=sys.stderr)
                run_stage(lake, shared)
    return lake
