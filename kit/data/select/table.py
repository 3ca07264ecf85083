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

import fsspec
import pyarrow as pa
import pyarrow.parquet as pq
from fsspec.spec import AbstractBufferedFile, AbstractFileSystem

import kit.data.read.polite  # noqa: F401  registers http(s)
from kit import resolve_path
from kit.errors import ParamError
from kit.params import ExploreIndex
from kit.progress import progress

TAIL_BYTES = 64 << 10
"""How much of a file's end is fetched at once; a footer of ten row groups of cc-index is about 50 KB."""
AHEAD_BYTES = 16 << 10
"""What is fetched beyond a narrow read: DuckDB asks for page heads in 256 bytes, each of which would be a request."""
TEXT = r"'((?:[^']|'')*)'"
ONLY = re.compile(rf"(\w+) ?(?:= ?|IN \()({TEXT}(?:, {TEXT})*)")


@dataclass
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

    Each file's end is held in memory, so that a footer is read once.
    """

    protocol = "counted"
    cachable = False

    def __init__(self, fs: AbstractFileSystem | None, paths: list[str]) -> None:
        """Read all footers; raises `ParamError` for a file that is no Parquet."""
        super().__init__()
        self.fs = fs
        self.paths = {f"counted://{p.partition('://')[2] or p}": p for p in paths}
        self.lock = threading.Lock()
        self.requests = self.bytes = self.rows = self.table_bytes = 0
        self.narrow = False
        """Whether files opened next are read page by page, or else in whole column chunks."""
        self.error: Exception | None = None
        """What went wrong below DuckDB, which hides it behind an error of its own."""
        self.tails: dict[str, tuple[int, bytes]] = {}
        self.footers: dict[str, pq.FileMetaData] = {}
        many = progress(len(paths), "reading footers", "files") if len(paths) > 8 else nullcontext()
        with many as bar, ThreadPoolExecutor(8) as pool:
            for (name, path), (start, tail) in zip(self.paths.items(), pool.map(self._tail, paths)):
                try:
                    self.footers[name] = pq.read_metadata(pa.BufferReader(tail))
                except pa.ArrowException as error:
                    why = str(error).splitlines()[0]
                    raise ParamError(f"'{path}' is no Parquet file ({why})") from None
                self.tails[name] = start, tail
                self.rows += self.footers[name].num_rows
                self.table_bytes += start + len(tail)
                if bar:
                    bar.update()

    def _tail(self, path: str) -> tuple[int, bytes]:
        size = self.fs.info(path)["size"]
        data = self.fetch(path, max(0, size - TAIL_BYTES), size)
        footer = int.from_bytes(data[-8:-4], "little") + 8
        if len(data) < footer <= size:
            data = self.fetch(path, size - footer, size - len(data)) + data
        return size - len(data), data

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
            parts = dict(p.split("=", 1) for p in name.split("/") if "=" in p)
            fits = all(parts[c] in values for c, values in only.items() if c in parts)
            paths = [footer.schema.column(i).path for i in range(footer.num_columns)]
            used = [i for i, path in enumerate(paths) if path in columns or path in only]
            seen += footer.num_row_groups
            for g in range(footer.num_row_groups if fits else 0):
                chunks = [footer.row_group(g).column(i) for i in used]
                if all(_may_hold(c, only[c.path_in_schema]) for c in chunks if c.path_in_schema in only):
                    groups += 1
                    planned += sum(c.total_compressed_size for c in chunks if c.path_in_schema in columns)
        return planned, groups, seen

    def open(self, path: str, mode: str = "rb", **_: Any) -> _Handle:
        ahead = AHEAD_BYTES if self.narrow else 0
        return _Handle(self, path, block_size=ahead, size=self.info(path)["size"])

    def info(self, path: str, **_: Any) -> dict[str, Any]:
        start, tail = self.tails[path]
        return {"name": path, "size": start + len(tail), "type": "file"}

    def glob(self, path: str, **_: Any) -> list[str]:
        return [path]

    def modified(self, path: str) -> datetime:
        return datetime(2000, 1, 1, tzinfo=UTC)  # a table is what it was when it was opened


class _Handle(AbstractBufferedFile):
    """A file of `Files` as DuckDB reads it; each of its threads opens one of its own."""

    def _fetch_range(self, start: int, end: int) -> bytes:
        first, tail = self.fs.tails[self.path]
        kept = tail[max(0, start - first) : max(0, end - first)]
        far = self.fs.fetch(self.fs.paths[self.path], start, min(end, first)) if start < first else b""
        return far + kept


def _may_hold(chunk: pq.ColumnChunkMetaData, values: Collection[str]) -> bool:
    statistics = chunk.statistics
    if statistics is None or not statistics.has_min_max or not isinstance(statistics.min, str):
        return True
    return any(statistics.min <= value <= statistics.max for value in values)


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
        details = node["extra_info"] if "PARQUET" in node["name"] else {}
        filters = [f for key in ("Filters", "File Filters") for f in _strings(details.get(key))]
        columns |= set(_strings(details.get("Projections")))
        for text in filters:
            bare = re.sub(TEXT, "", text)
            columns |= set(re.findall(r"\w+", bare))
            if " OR " not in bare and "NOT " not in bare:
                for column, values, *_ in ONLY.findall(text):
                    only[column] = [v.replace("''", "'") for v in re.findall(TEXT, values)]
    return columns, only


def _strings(value: Any) -> list[str]:
    return value if isinstance(value, list) else [value] if value else []


def table_files(p: ExploreIndex) -> tuple[AbstractFileSystem, list[str], list[str]]:
    """File system and Parquet files of one crawl of the table, and what tells which they are (folder or lists).

    Without `index_files`: all below `index_path`, or over HTTP(S), where nothing can be listed, those of the list
    that Common Crawl keeps for each crawl. Raises `ParamError` where there are none.
    """
    table = resolve_path(p.index_path).rstrip("/")
    sources = p.index_files
    if not sources and table.startswith(("http://", "https://")):
        sources = [f"{_root(table)}/crawl-data/{p.crawl}/cc-index-table.paths.gz"]
    if sources:
        uris = [uri for entry in sources for uri in _listed(resolve_path(entry), table)]
        uris = [u for u in uris if "/crawl=" not in u or f"/crawl={p.crawl}/" in u]
        fs = fsspec.core.url_to_fs((uris or [table])[0])[0]
        paths = [fs._strip_protocol(u) for u in uris]
    else:
        fs, folder = fsspec.core.url_to_fs(f"{table}/crawl={p.crawl}")
        paths = sorted(f for f in fs.find(folder) if f.endswith(".parquet"))
        sources = [f"{p.index_path.rstrip('/')}/crawl={p.crawl}"]
    if not paths:
        others = f"; there are {', '.join(crawls)}" if (crawls := crawls_beside(p)) else ""
        raise ParamError(f"no index of crawl '{p.crawl}' in {', '.join(sources)}{others}")
    return fs, paths, sources


def _listed(entry: str, table: str) -> list[str]:
    """One of `index_files` as Parquet files: itself, or the lines of a list, relative to their host or bucket."""
    if entry.endswith(".parquet"):
        return [entry]
    try:
        with fsspec.open(entry, "rt", compression="infer", encoding="utf-8") as f:
            lines = f.read().splitlines()
    except FileNotFoundError:
        raise ParamError(f"there is no list of index files '{entry}'") from None
    root = _root(entry if "://" in entry else table)
    inside = table.removeprefix(root).strip("/") + "/"
    return [
        line if "://" in line else f"{root}/{line}"
        for line in lines
        if line.endswith(".parquet") and inside in line
    ]


def _root(uri: str) -> str:
    """What Common Crawl's lists of paths are relative to: host, bucket, or on a disk the folder above `cc-index`."""
    return "/".join(uri.split("/")[:3]) if "://" in uri else uri.partition("/cc-index/")[0]


def crawls_beside(p: ExploreIndex) -> list[str]:
    """All crawls below `index_path`; none where that cannot be listed."""
    if p.archive_paths or p.index_files or p.index_path.startswith(("http://", "https://")):
        return []
    fs, path = fsspec.core.url_to_fs(resolve_path(p.index_path))
    return sorted(f.rstrip("/").rpartition("crawl=")[2] for f in fs.glob(f"{path}/crawl=*"))


def athena_usd(scanned_bytes: int, usd_per_tb: float) -> float:
    """Athena's charge for a query: whole MB, 10 at least (https://aws.amazon.com/athena/pricing/)."""
    return max(10, math.ceil(scanned_bytes / 1e6)) / 1e6 * usd_per_tb
