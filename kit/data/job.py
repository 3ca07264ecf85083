"""Your own job: one function of a record, run over whole archives, from a notebook or by `spark-submit`.

    # my_job.py: rows for Parquet …
    SCHEMA = {"url": "string", "bytes": "int64"}
    def record(r):
        if r.type == "response":
            yield {"url": r.url, "bytes": len(r.payload)}

    python -m kit.data.job --job my_job.py --archives archives.txt --base s3://commoncrawl --out s3://bucket/lake
    spark-submit --master spark://host:7077 --py-files kit.zip kit/data/job.py --job my_job.py …

`record(r)` takes a `kit.data.read.record.Record` and gives a row (a dict), rows, or None. `COUNT_BY = ["column"]` in
place of `SCHEMA` counts rows by columns. A record whose function fails is counted by the error's name; not
bounded is the time it may take.
"""

from __future__ import annotations

import argparse
import functools
import importlib
import json
import os
import sys
import traceback
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import fsspec
import pyarrow as pa

from kit import resolve_path
from kit.data.engine.spark import plan_parts
from kit.data.read import archive
from kit.data.read.archive import Record
from kit.data.read.rate import run_at_rate
from kit.errors import JobError, KitError, RecordError
from kit.lake.manifest import Account, Counts, Manifest
from kit.lake.store import Lake
from kit.params import WriteYourOwnJob

MAX_EXAMPLES = 100
"""Failures of one task that are told in full; all are counted."""
FAILURE = pa.schema(
    [("warc_filename", pa.string()), ("offset", pa.int64()), ("url", pa.string()),
     ("reason", pa.string()), ("message", pa.string())]
)  # fmt: skip


@dataclass(frozen=True)
class OwnJob:
    """A person's function, and what becomes of its rows."""

    record: Callable[[Record], Any]
    schema: pa.Schema | None
    count_by: list[str]


@dataclass
class Tally:
    """What one task made of its archives, and where every record went."""

    tables: list[pa.Table] = field(default_factory=list)
    groups: Counter[tuple[Any, ...]] = field(default_factory=Counter)
    read: int = 0
    lost: int = 0
    """Stretches of archives that could not be read; each counts as one failed record."""
    rows: int = 0
    created: int = 0
    dropped: Counter[str] = field(default_factory=Counter)
    failed: Counter[str] = field(default_factory=Counter)
    examples: list[dict[str, Any]] = field(default_factory=list)

    def fail(self, where: tuple[str, int, str], reason: str, message: str = "") -> None:
        """One record failed; it is told of in full while there are few."""
        self.failed[reason] += 1
        if len(self.examples) < MAX_EXAMPLES:
            self.examples.append(dict(zip(FAILURE.names, (*where, reason, message[:500]), strict=True)))


@functools.cache
def load_job(source: str, path: str) -> OwnJob:
    """The job in a Python file's text; raises `JobError`. Its code runs with this process's rights."""
    names: dict[str, Any] = {"__name__": "kit_job", "__file__": path}
    try:
        exec(compile(source, path, "exec"), names)
        schema = names.get("SCHEMA")
        if isinstance(schema, dict):
            schema = pa.schema([(k, pa.type_for_alias(v)) for k, v in schema.items()])
    except Exception as error:
        raise JobError(f"job '{path}': {_line(error, path)}") from None
    count_by = names.get("COUNT_BY", [])
    count_by = [count_by] if isinstance(count_by, str) else list(count_by)
    if "n" in count_by:
        raise JobError(f"job '{path}': COUNT_BY cannot have a column 'n', that is the count's own")
    if not callable(names.get("record")):
        raise JobError(f"job '{path}' has no function `record(r)`")
    if not count_by and not isinstance(schema, pa.Schema):
        raise JobError(
            f'job \'{path}\' sets neither SCHEMA = {{"column": "string", …}} nor COUNT_BY = ["column"]'
        )
    return OwnJob(names["record"], schema, count_by)


def run_archives(
    job: OwnJob, files: Sequence[tuple[str, str]], path: str = "", max_records: int = 0
) -> Tally:
    """Apply a job to archives, `(path, name)` each, one after the other, up to `max_records` records (0 = all)."""
    tally = Tally()
    for record in _records(files, tally):
        tally.read += 1
        where = record.warc_filename, record.offset, record.url
        try:
            rows = job.record(record)
            rows = [rows] if isinstance(rows, dict) else list(rows or ())
            if job.count_by:
                tally.groups.update([tuple(row[c] for c in job.count_by) for row in rows])
            elif unknown := {c for row in rows for c in row} - set(job.schema.names):
                raise KeyError(f"{', '.join(sorted(unknown))} not in SCHEMA")
            elif rows:
                tally.tables.append(pa.Table.from_pylist(rows, schema=job.schema))
            tally.rows += len(rows)
            tally.created += max(len(rows) - 1, 0)
            tally.dropped["no row"] += not rows
        except RecordError as error:
            tally.fail(where, error.reason)
        except Exception as error:  # whatever the person's function does, it does to this record only
            tally.fail(where, type(error).__name__, _line(error, path))
        if tally.read == max_records:
            break
    return tally


def _records(files: Sequence[tuple[str, str]], tally: Tally) -> Iterator[Record]:
    """The records of archives; what cannot be read is counted, and reading goes on behind it."""
    for path, name in files:
        offset = 0
        try:
            for record in archive.records(path, name):
                offset = record.offset
                if isinstance(record, Record):
                    yield record
                    continue
                tally.lost += 1
                tally.fail(
                    (name, offset, ""),
                    f"archive: {record.reason}",
                    f"{record.length} bytes, {record.wrapping}",
                )
        except Exception as error:  # the file is not there, or the connection broke for good
            tally.lost += 1
            tally.fail(
                (name, offset, ""), f"archive: {type(error).__name__}", f"not read from here on: {error}"
            )


def run_job(p: WriteYourOwnJob, lake: Lake, archives: Sequence[tuple[str, str]] | None = None) -> Manifest:
    """Run `p.job` on Spark over whole archives, `(path, name)` each: those of the selection where none are given.

    Writes `part-…` (rows of `SCHEMA`, or the counts as one) and `failures`, the first of each task. Every record is
    in a row, dropped under `no row`, or failed; of a record with several rows the others count as created; rows
    that are counted together leave one. A damaged stretch of an archive counts as a failed record. With
    `max_records` one task reads the archives in their order, so the limit is exact. Raises `JobError`, `LakeError`.
    """
    with lake.stage(p) as out:
        with fsspec.open(out.read_outside(p.job), "rt", encoding="utf-8") as f:
            source = f.read()
        job = load_job(source, p.job)
        if archives is None:
            archives = selected_archives(lake, out.read("10_explore_index"))
        for path, _ in archives:
            if "://" not in path:
                out.read_outside(path)
        sizes = [_size(path, p.part_mb * 1e6) for path, _ in archives]
        shares = [range(len(archives))] if p.max_records else plan_parts(sizes, p.part_mb * 1e6)
        writer, name, most = out.parts, p.job, p.max_records

        def work(task: tuple[int, list[tuple[str, str]]]) -> dict[str, Any]:
            number, files = task
            tally = run_archives(load_job(source, name), files, name, most)
            output = None
            if tally.tables:
                table = pa.concat_tables(tally.tables).combine_chunks()
                output = writer.table(f"part-{number:05d}", table)
            return {"done": len(files), "tally": replace(tally, tables=[]), "output": output}

        tasks = [(len(s), (i, [archives[k] for k in s])) for i, s in enumerate(shares)]
        results = run_at_rate(p, work, tasks, "job", "archives", [path for path, _ in archives])
        tallies = [r["tally"] for r in results]
        total = sum((t.groups for t in tallies), Counter())
        for r in results:
            if r["output"]:
                out.add(r["output"])
        if total:
            out.table("part-00000", _counted(job, total))
        examples = [example for tally in tallies for example in tally.examples]
        if examples:
            out.table("failures", pa.Table.from_pylist(examples, schema=FAILURE))
        return out.commit(_accounts(tallies, len(total)), {"archives": len(archives), "tasks": len(tasks)})


def selected_archives(lake: Lake, selection: Manifest) -> list[tuple[str, str]]:
    """`(path, name)` of every archive that a selection of stage 10 has pages in."""
    base = resolve_path(selection.metrics["archive_base"])
    listed = lake.fs.cat_file(lake.paths(selection, "archives.txt")[0]).decode().splitlines()
    return [(f"{base}/{name}", name) for name in listed]


def _accounts(tallies: list[Tally], groups: int) -> Counts:
    """Where every record went; `groups` is how many rows the counted ones became, 0 where rows were written."""
    whole = Account.total(Account(t.read + t.lost, t.created, t.rows, t.dropped, t.failed) for t in tallies)
    if groups:
        whole.dropped["counted with others"] = whole.records_out - groups
        whole.records_out = groups
    return whole.counts()


def _counted(job: OwnJob, groups: Counter[tuple[Any, ...]]) -> pa.Table:
    """Groups as rows, largest first, `n` behind the columns they are counted by; raises `JobError`."""
    counts = sorted(groups.items(), key=lambda item: (-item[1], str(item[0])))
    try:
        return pa.Table.from_pylist([dict(zip(job.count_by, k, strict=True)) | {"n": n} for k, n in counts])
    except (pa.ArrowException, TypeError) as error:
        raise JobError(f"what COUNT_BY counts is no column of one type: {error}") from None


def _size(path: str, unknown: float) -> float:
    """Bytes of an archive; over HTTP, where each question is a request, and where there is none, `unknown`."""
    try:
        return unknown if path.startswith("http") else fsspec.core.url_to_fs(path)[0].size(path)
    except OSError:
        return unknown


def _line(error: BaseException, path: str) -> str:
    """An error in one line, with the line of the job file where it happened."""
    lines = [f.lineno for f in traceback.extract_tb(error.__traceback__) if f.filename == path]
    number = error.lineno if isinstance(error, SyntaxError) else lines[-1] if lines else None
    where = f" (line {number})" if number else ""
    message = error.msg if isinstance(error, SyntaxError) else " ".join(str(error).split())
    return f"{type(error).__name__}: {message}{where}"


def main(words: Sequence[str] | None = None) -> int:
    """The command line; returns the exit status."""
    ask = argparse.ArgumentParser(
        prog="kit.data.job", description="Run one function of a record over archives."
    )
    ask.add_argument("--job", required=True, help="Python file with `record(r)`")
    ask.add_argument(
        "--archives", required=True, help="text file with an archive a line, as stage 10 writes it"
    )
    ask.add_argument("--base", default="", help="what the archives' names are relative to: folder or URL")
    ask.add_argument("--out", required=True, help="lake for the result: folder or URL that all workers reach")
    ask.add_argument("--run", default="job", help="name of the run in it")
    for name in ("cores", "part_mb", "max_records", "requests_per_s", "retries", "contact"):
        about = WriteYourOwnJob.model_fields[name]
        option = f"--{name.replace('_', '-')}"
        ask.add_argument(option, dest=name, default=about.default, help=about.description)
    said = vars(ask.parse_args(words))
    listed, base, out = (_here(said.pop(word)) for word in ("archives", "base", "out"))
    try:
        with fsspec.open(listed, "rt", encoding="utf-8") as f:
            names = f.read().splitlines()
        p = WriteYourOwnJob.parse({**said, "job": _here(said["job"]), "lake": out})
        lake = Lake(out)
        manifest = run_job(p, lake, [(n if "://" in n else os.path.join(base, n), n) for n in names])
    except (KitError, OSError) as error:
        print(f"kit: {error}", file=sys.stderr)
        return getattr(error, "exit_status", 1)
    print(json.dumps({"counts": manifest.counts.model_dump(), "parts": lake.paths(manifest)}, indent=1))
    return 0


def _here(path: str) -> str:
    """A path from the working directory made absolute; URLs pass unchanged."""
    return path if "://" in path else os.path.abspath(path)


if __name__ == "__main__":
    # under its own name, so that workers find what is sent to them by import
    sys.exit(importlib.import_module("kit.data.job").main())
