"""A Parquet table in many files, wherever they lie: what a query will read of it, and what it really read.

DuckDB reads the files through `Files`, which counts. Every footer is read once, when the table is opened: from
it come the number of rows, the bytes of each column chunk and the smallest and largest value in each row group.
"""

from __future__ import annotations

import json
import math
import re
import threading
from collections.abc import Collection, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any
from urllib.parse import urlsplit

import fsspec
import pyarrow as pa
import pyarrow.parquet as pq
from fsspec.spec import AbstractFileSystem

import kit.data.polite  # noqa: F401  registers http(s)
from kit import resolve
from kit.params import ExploreIndex, ParamError
from kit.show import progress

TAIL_BYTES = 64 << 10
"""How much of a file's end is fetched at once; a footer of ten row groups of cc-index is about 50 KB."""
AHEAD_BYTES = 16 << 10
"""Least that is fetched at once: DuckDB asks for page heads in 256 bytes, each of which would be a request."""
TEXT = r"'((?:[^']|'')*)'"
ONLY = re.compile(rf"(\w+) ?(?:= ?|IN \()({TEXT}(?:, {TEXT})*)")


@dataclass(frozen=True)
class Scan:
    """One query in bytes: planned from the footers (an upper bound), and really read, footers not counted."""

    query: str
    row_groups: int
    row_groups_in_all: int
    planned_bytes: int
    athena_usd: float
    read_bytes: int = 0
    requests: int = 0
    seconds: float = 0.0

    def planned(self) -> dict[str, Any]:
        """What is known before, for `show.Table`."""
        return {
            "query": self.query,
            "row groups": f"{self.row_groups} of {self.row_groups_in_all}",
            "planned MB": round(self.planned_bytes / 1e6, 3),
            "Athena would charge $": f"{self.athena_usd:.6f}",
        }

    def row(self) -> dict[str, Any]:
        """What is known afterwards, for `show.Table`."""
        read = {"really read MB": round(self.read_bytes / 1e6, 3), "reads": self.requests}
        return self.planned() | read | {"s": round(self.seconds, 3)}


class Files(AbstractFileSystem):
    """The files of a table as DuckDB sees them, read by exact ranges from `fs`, and counted.

    Also holds each file's end in memory, so that a footer is read once.
    """

    protocol = "counted"
    cachable = False

    def __init__(self, fs: AbstractFileSystem, paths: list[str]) -> None:
        super().__init__()
        self.fs = fs
        self.paths = {f"counted://{p.partition('://')[2] or p}": p for p in paths}
        self.lock = threading.Lock()
        self.requests = self.bytes = 0
        self.ahead_bytes = 0
        self.error: Exception | None = None
        """What went wrong below DuckDB, which hides it behind an error of its own."""
        self.tails: dict[str, tuple[int, bytes]] = {}
        self.footers: dict[str, pq.FileMetaData] = {}
        many = progress(len(paths), "reading footers", "files") if len(paths) > 8 else nullcontext()
        with many as bar, ThreadPoolExecutor(8) as pool:
            for name, tail in zip(self.paths, pool.map(self._tail, self.paths.values())):
                self.tails[name] = tail
                self.footers[name] = _footer(self.paths[name], tail[1])
                if bar:
                    bar.update()

    @property
    def table_bytes(self) -> int:
        """Size of all files."""
        return sum(self.size(name) for name in self.paths)

    @property
    def rows(self) -> int:
        """Rows of all files."""
        return sum(f.num_rows for f in self.footers.values())

    def _tail(self, path: str) -> tuple[int, bytes]:
        size = self.fs.info(path)["size"]
        start = max(0, size - TAIL_BYTES)
        data = self.fetch(path, start, size)
        footer = int.from_bytes(data[-8:-4], "little") + 8
        if len(data) < footer <= size:
            start, data = size - footer, self.fetch(path, size - footer, start) + data
        return start, data

    def fetch(self, path: str, start: int, end: int) -> bytes:
        """Bytes from the store, counted."""
        try:
            data = self.fs.cat_file(path, start=start, end=end)
        except Exception as error:
            self.error = error
            raise
        with self.lock:
            self.requests += 1
            self.bytes += len(data)
        return data

    def plan(self, columns: Collection[str], only: Mapping[str, Collection[str]]) -> tuple[int, int, int]:
        """Bytes of `columns` in the row groups that can hold rows with `only` these values; those groups; all groups."""
        planned = groups = seen = 0
        for name, footer in self.footers.items():
            place = {footer.schema.column(i).path: i for i in range(footer.num_columns)}
            parts = dict(p.split("=", 1) for p in name.split("/") if "=" in p)
            for g in range(footer.num_row_groups):
                seen += 1
                group = footer.row_group(g)
                if all(
                    parts[c] in values if c in parts else c not in place or _may_hold(group, place[c], values)
                    for c, values in only.items()
                ):
                    groups += 1
                    planned += sum(
                        group.column(place[c]).total_compressed_size for c in columns if c in place
                    )
        return planned, groups, seen

    def open(self, path: str, mode: str = "rb", **_: Any) -> _Handle:
        return _Handle(self, path)

    def size(self, path: str) -> int:
        start, tail = self.tails[path]
        return start + len(tail)

    def info(self, path: str, **_: Any) -> dict[str, Any]:
        return {"name": path, "size": self.size(path), "type": "file"}

    def exists(self, path: str, **_: Any) -> bool:
        return path in self.paths

    def glob(self, path: str, **_: Any) -> list[str]:
        return [path]

    def modified(self, path: str) -> datetime:
        return datetime(2000, 1, 1, tzinfo=UTC)  # a table is what it was when it was opened


class _Handle:
    """A file of `Files` as DuckDB reads it; each of its threads opens one of its own."""

    def __init__(self, files: Files, name: str) -> None:
        self.files, self.name, self.size = files, name, files.size(name)
        self.at, self.ahead = 0, (0, b"")

    def seek(self, at: int, whence: int = 0) -> int:
        self.at = at + (0, self.at, self.size)[whence]
        return self.at

    def tell(self) -> int:
        return self.at

    def read(self, n: int = -1) -> bytes:
        start, end = self.at, self.size if n < 0 else min(self.at + n, self.size)
        self.at = end
        for first, kept in (self.files.tails[self.name], self.ahead):
            if first <= start < first + len(kept):
                have = kept[start - first : end - first]
                break
        else:
            have = b""
        if start + len(have) < end:
            start += len(have)
            got = self.files.fetch(
                self.files.paths[self.name], start, max(end, min(start + self.files.ahead_bytes, self.size))
            )
            self.ahead = (start, got)
            have += got[: end - start]
        return have

    def flush(self) -> None:
        pass

    def close(self) -> None:
        self.ahead = (0, b"")


def _footer(path: str, tail: bytes) -> pq.FileMetaData:
    try:
        return pq.read_metadata(pa.BufferReader(tail))
    except pa.ArrowException as error:
        raise ParamError(f"'{path}' is no Parquet file ({str(error).splitlines()[0]})") from None


def _may_hold(group: pq.RowGroupMetaData, column: int, values: Collection[str]) -> bool:
    told = group.column(column).statistics
    if told is None or not told.has_min_max or not isinstance(told.min, str):
        return True
    return any(told.min <= value <= told.max for value in values)


def columns_and_values(explained: str) -> tuple[set[str], dict[str, list[str]]]:
    """Columns that a query reads, and values that it asks for, from DuckDB's `EXPLAIN (FORMAT json)`.

    Only `column = 'x'` and `column IN ('x', …)` are understood; what else prunes makes the plan an upper bound.
    """
    columns: set[str] = set()
    only: dict[str, list[str]] = {}
    nodes = json.loads(explained)
    while nodes:
        node = nodes.pop()
        nodes += node["children"]
        told = node["extra_info"] if "PARQUET" in node["name"] else {}
        filters = [f for key in ("Filters", "File Filters") for f in _strings(told.get(key))]
        columns |= set(_strings(told.get("Projections")))
        for text in filters:
            bare = re.sub(TEXT, "", text)
            columns |= set(re.findall(r"\w+", bare))
            if " OR " not in bare and "NOT " not in bare:
                for column, values, *_ in ONLY.findall(text):
                    only[column] = [v.replace("''", "'") for v in re.findall(TEXT, values)]
    return columns, only


def _strings(value: Any) -> list[str]:
    return value if isinstance(value, list) else [value] if value else []


def table_files(p: ExploreIndex) -> tuple[Any, list[str], list[str]]:
    """File system and Parquet files of one crawl of the table, and what tells which they are (folder or lists).

    Without `index_files`: all below `index_path`, or over HTTP(S), where nothing can be listed, those of the list
    that Common Crawl keeps for each crawl. Raises `ParamError` where there are none.
    """
    table = resolve(p.index_path).rstrip("/")
    lists = p.index_files
    if not lists and table.startswith(("http://", "https://")):
        lists = [f"{_host_root(table)}/crawl-data/{p.crawl}/cc-index-table.paths.gz"]
    if not lists:
        fs, path = fsspec.core.url_to_fs(f"{table}/crawl={p.crawl}")
        paths = sorted(f for f in fs.find(path) if f.endswith(".parquet"))
        sources = [f"{p.index_path.rstrip('/')}/crawl={p.crawl}"]
    else:
        uris = [uri for entry in lists for uri in _listed(entry, table)]
        uris = [u for u in uris if "/crawl=" not in u or f"/crawl={p.crawl}/" in u]
        fs = fsspec.core.url_to_fs(uris[0])[0] if uris else None
        paths, sources = [fs._strip_protocol(u) for u in uris], lists
    if not paths:
        crawls = [] if lists else crawls_beside(p)
        raise ParamError(
            f"no index of crawl '{p.crawl}' in {', '.join(lists)}" if lists else
            f"no index of crawl '{p.crawl}' under '{p.index_path}'" + (f"; there are {', '.join(crawls)}" if crawls else "")
        )  # fmt: skip
    return fs, paths, sources


def _listed(entry: str, table: str) -> list[str]:
    """One of `index_files` as Parquet files: itself, or the lines of a list, relative to their host or bucket."""
    entry = resolve(entry)
    if entry.endswith(".parquet"):
        return [entry]
    root = _host_root(entry if "://" in entry else table)
    try:
        with fsspec.open(entry, "rt", compression="infer", encoding="utf-8") as f:
            lines = [line.strip() for line in f]
    except FileNotFoundError:
        raise ParamError(f"there is no list of index files '{entry}'") from None
    inside = table.removeprefix(root).strip("/") + "/"
    return [x if "://" in x else f"{root}/{x}" for x in lines if x.endswith(".parquet") and inside in x]


def _host_root(uri: str) -> str:
    """What Common Crawl's lists of paths are relative to: host, bucket, or on a disk the folder above `cc-index`."""
    if "://" not in uri:
        return uri.partition("/cc-index/")[0]
    parts = urlsplit(uri)
    return f"{parts.scheme}://{parts.netloc}"


def crawls_beside(p: ExploreIndex) -> list[str]:
    """All crawls below `index_path`; none where that cannot be listed."""
    if p.archive_paths or p.index_files or p.index_path.startswith(("http://", "https://")):
        return []
    fs, path = fsspec.core.url_to_fs(resolve(p.index_path))
    found = fs.glob(f"{path}/crawl=*")
    return sorted(f.rstrip("/").rpartition("crawl=")[2] for f in found)


def athena_usd(scanned_bytes: int, usd_per_tb: float) -> float:
    """Athena's charge for a query: whole MB, 10 at least (https://aws.amazon.com/athena/pricing/)."""
    return max(10, math.ceil(scanned_bytes / 1e6)) / 1e6 * usd_per_tb
