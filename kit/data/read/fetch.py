"""Index rows → the bytes of their records, from a disk, HTTP(S) or S3 alike: few reads, every failure named.

Rows that lie close together are read together. What comes back belongs to a row or is an error with a short
reason that becomes a count; `may_retry` says which of them a rerun should ask for again.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import fsspec
from fsspec.asyn import sync
from fsspec.spec import AbstractFileSystem

from kit import resolve_path
from kit.data.read import polite
from kit.data.read.polite import GIVE_UP_AFTER, may_retry
from kit.errors import Missing, RecordError

__all__ = ["Read", "may_retry", "plan_ranges", "read_ranges"]

Row = dict[str, Any]
# failures that hang on how long a read is: of these, each row is asked for by itself
SMALLER_MAY_WORK = ("timeout", "connection reset", "short body", "wrong Content-Range", "unreadable")


@dataclass
class Read:
    """One read for several rows of one file: bytes `start` to `end` (not included)."""

    file: str
    start: int
    end: int
    rows: list[Row]


def plan_ranges(rows: Iterable[Row], gap_bytes: int = 1 << 20, max_bytes: int = 16 << 20) -> Iterator[Read]:
    """Reads that cover `rows` in their order; neighbours no more than `gap_bytes` apart are read together.

    Rows should be sorted by file and offset; others are read right, but in more reads. A read of several rows is no
    longer than `max_bytes`; a longer record is a read of its own. A row without a valid range becomes an empty read.
    """
    read: Read | None = None
    for row in rows:
        start, length = row["warc_record_offset"], row["warc_record_length"]
        end = start + length if start >= 0 and length > 0 else start
        if read and read.file == row["warc_filename"] and read.start <= start <= read.end + gap_bytes:
            both = max(read.end, end)
            # an empty range stays a read of its own, so that its error falls on its row alone
            if read.start < read.end and start < end and both - read.start <= max_bytes:
                read.end = both
                read.rows.append(row)
                continue
        if read:
            yield read
        read = Read(row["warc_filename"], start, end, [row])
    if read:
        yield read


def read_ranges(base: str, rows: Iterable[Row], **limits: int) -> Iterator[tuple[Row, bytes | RecordError]]:
    """Every row with its record's bytes as stored, or with the error that names why not; in the rows' order.

    `base` is where the `warc_filename`s lie: a folder, http(s):// or s3://; `limits` are `plan_ranges`'s. One read is
    in memory at a time, a record longer than `max_bytes` as a whole. Raises nothing for a record; `ValueError` or `ImportError` where
    nothing here can read `base`. Whether the bytes are the right ones is checked by URL and digest afterwards.
    """
    fs, root = fsspec.core.url_to_fs(resolve_path(base))
    if "s3" in fs.protocol:
        fs = _patient_s3(fs)  # botocore's own retries would multiply with those here
    for read in plan_ranges(rows, **limits):
        result = _fetch(fs, root, read)
        if len(read.rows) == 1 or isinstance(result, bytes) or not result.reason.endswith(SMALLER_MAY_WORK):
            yield from _shares(read, result)
            continue
        failed = 0
        for one in plan_ranges(read.rows, max_bytes=0):
            # some in a row: it is no single record's fault, and asking for hundreds more would not be polite
            result = _fetch(fs, root, one) if failed < GIVE_UP_AFTER else result
            failed = 0 if isinstance(result, bytes) else failed + 1
            yield from _shares(one, result)


def _shares(read: Read, result: bytes | RecordError) -> Iterator[tuple[Row, bytes | RecordError]]:
    """Each row's own bytes out of what a read found; a failure is shared by all."""
    for row in read.rows:
        if not isinstance(result, bytes):
            yield row, result
            continue
        start = row["warc_record_offset"] - read.start
        share = result[start : start + row["warc_record_length"]]
        whole = len(share) == row["warc_record_length"]
        yield row, share if whole else RecordError("range past end of file")


def _fetch(fs: AbstractFileSystem, root: str, read: Read) -> bytes | RecordError:
    """The bytes of one read, fewer where the file ends before, or the error by its name."""
    if read.start >= read.end:
        return RecordError("no valid range")
    path = f"{root}/{read.file}"
    try:
        if "s3" not in fs.protocol:
            return fs.cat_file(path, start=read.start, end=read.end)
        bucket = "s3://" + path.partition("/")[0]
        return polite.persist(bucket, lambda: _s3_range(fs, bucket, path, read.start, read.end))
    except Exception as error:
        named = polite.named(error, path)
        return RecordError("archive file missing" if isinstance(named, Missing) else named.reason)


def _patient_s3(fs: Any) -> Any:
    """The same S3 file system without retries of its own: there is one policy for all that is fetched."""
    # fsspec caches file systems by their options: changing the cached one would change it for the lake, too
    fs = type(fs)(*fs.storage_args, skip_instance_cache=True, **fs.storage_options)
    limits = dict.fromkeys(("connect_timeout", "read_timeout"), polite.policy.timeout_s)
    fs.config_kwargs = limits | fs.config_kwargs | {"retries": {"max_attempts": 0}}
    fs.retries = 1
    return fs


def _s3_range(fs: Any, bucket: str, path: str, start: int, end: int) -> bytes:
    """A range of an S3 object; back-off and time-outs are HTTP's, the rate is not: a bucket serves thousands a second."""
    polite.gate.wait(bucket, limited=False)
    limit = polite.policy.timeout_s + (end - start) / polite.policy.min_bytes_per_s
    try:
        return sync(fs.loop, asyncio.wait_for, fs._cat_file(path, start=start, end=end), limit)
    except Exception as error:
        named = polite.named(error, "s3://" + path)
        if named.reason == "fetch: HTTP 416":
            return b""
        raise named from None
