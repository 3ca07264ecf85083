"""The crawl index: which pages there are, and the selection that the rest of the chain reads.

DuckDB reads the cc-index table (Parquet, partitioned by `crawl` and `subset`) where it lies: on a disk, on S3, or
over HTTPS by file list. Someone who brings archives instead of an index gets one made of them first, so everything
after is the same.
"""

from __future__ import annotations

import functools
import os
import time
from collections import Counter
from dataclasses import replace
from typing import Any
from urllib.parse import urlsplit

import duckdb
import pyarrow as pa
import pyarrow.compute as pc

from kit.data import archive
from kit.data.questions import (
    NOT_IN_TABLE,
    count_query,
    find_query,
    reasons_query,
    select_query,
    sites_query,
    text,
)
from kit.data.table import (
    AHEAD_BYTES,
    Files,
    Scan,
    athena_usd,
    columns_and_values,
    crawls_beside,
    table_files,
)
from kit.lake import Counts, Lake, LakeError, Manifest
from kit.params import ExploreIndex, ParamError
from kit.show import progress

ENTRY = pa.schema(
    [
        ("warc_filename", pa.string()),
        ("warc_record_offset", pa.int64()),
        ("warc_record_length", pa.int64()),
        ("wrapping", pa.string()),
        ("record_type", pa.string()),
        ("url", pa.string()),
        ("fetch_time", pa.timestamp("ms")),
        ("fetch_status", pa.int16()),
        ("content_mime_detected", pa.string()),
        ("content_digest", pa.string()),
        ("content_truncated", pa.string()),
        ("url_host_name", pa.string()),
        ("url_host_registered_domain", pa.string()),
        ("content_charset", pa.string()),
        ("content_languages", pa.string()),
        ("subset", pa.string()),
        ("url_host_tld", pa.string()),
    ]
)


class Index:
    """An opened index: a DuckDB view `ccindex`, what each query cost, and the damage found if it was made here."""

    def __init__(self, p: ExploreIndex) -> None:
        """Open the table of `p.crawl`, or index `p.archive_paths`; raises `ParamError`, `ArchiveError`, `FetchError`."""
        self.p = p
        self.damage: list[archive.Damage] = []
        self.scans: list[Scan] = []
        """What each query was to read and did read, in order."""
        self.files: Files | None = None
        self.con = duckdb.connect()
        self.con.execute("SET enable_progress_bar = false")
        if p.archive_paths:
            self.base, paths = _common_base(archive.list_archives(p.archive_paths))
            self.sources = p.archive_paths
            self.con.register("scanned", self._scan(paths))
            self.con.execute(f"CREATE VIEW ccindex AS SELECT *, {text(p.crawl)} AS crawl FROM scanned")
        else:
            self.base = p.archive_base
            self._open_table()

    def _open_table(self) -> None:
        fs, paths, self.sources = table_files(self.p)
        self.files = Files(fs, paths)
        self.con.register_filesystem(self.files)
        # page by page, the footers from memory; how columns are read is decided for each query
        self.con.execute("SET disable_parquet_prefetching = true; SET parquet_metadata_cache = true")
        # not con.read_parquet: it keeps Python's lock while DuckDB's threads wait for it to read through fsspec
        self.con.execute(
            f"CREATE VIEW raw AS FROM read_parquet([{', '.join(map(text, self.files.paths))}], "
            "hive_partitioning = true, hive_types_autocast = false, union_by_name = true)"
        )
        # columns came over the years (languages in 2018, truncation in 2019): absent ones read as NULL
        have = {*self.con.table("raw").columns, *NOT_IN_TABLE}
        columns = "".join(f", NULL::VARCHAR AS {name}" for name in ENTRY.names if name not in have)
        columns += "" if "crawl" in have else f", {text(self.p.crawl)} AS crawl"
        self.con.execute(f"CREATE VIEW ccindex AS SELECT *{columns} FROM raw")

    def _scan(self, paths: list[str]) -> pa.Table:
        """Index the archives themselves; what cannot be read lands in `damage`."""
        rows: list[dict[str, Any]] = []
        with progress(len(paths), "indexing", "archives") as bar:
            for path in paths:
                for found in archive.scan(path, _identity(path, self.base)):
                    if isinstance(found, archive.Damage):
                        self.damage.append(found)
                    else:
                        rows.append(_row(found))
                bar.update()
        return pa.Table.from_pylist(rows, schema=ENTRY)

    @property
    def rows(self) -> int:
        """Rows of the whole index; of a table, the footers know without reading a row."""
        return self.files.rows if self.files else self.con.table("ccindex").shape[0]

    @functools.cached_property
    def crawls(self) -> list[str]:
        """Crawls beside this one; over HTTPS, where nothing can be listed, only this one."""
        return crawls_beside(self.p) or [self.p.crawl]

    @functools.cache  # noqa: B019  an index lives as long as its notebook
    def at(self, crawl: str) -> Index:
        """The index of another crawl of the same table, opened once."""
        return self if crawl == self.p.crawl else Index(self.p.model_copy(update={"crawl": crawl}))

    def estimate(self, query: str, title: str = "", **values: Any) -> Scan:
        """What `query` will read: the columns it uses, in the row groups whose smallest and largest values fit."""
        explained = self.con.execute(f"EXPLAIN (FORMAT json) {query}", values or None).fetchall()[0][1]
        planned, groups, of = self.files.plan(*columns_and_values(explained)) if self.files else (0, 0, 0)
        return Scan(
            title or " ".join(query.split())[:80],
            groups,
            of,
            planned,
            athena_usd(planned, self.p.athena_usd_per_tb),
        )

    def table(self, query: str, title: str = "", **values: Any) -> pa.Table:
        """The answer to any SELECT over `ccindex`, its cost in `scans`; `$name` in the query takes a value."""
        scan = self.estimate(query, title, **values)
        if scan.planned_bytes > self.p.max_scan_gb * 1e9:
            raise ParamError(
                f"'{scan.query}' would read {scan.planned_bytes / 1e9:,.3g} GB of the index, and max_scan_gb allows "
                f"{self.p.max_scan_gb:g}: name domains, or some index_files as a sample, or allow more"
            )
        files, started = self.files, time.perf_counter()
        before = (files.bytes, files.requests) if files else (0, 0)
        # few row groups: page by page, most are skipped; many: whole column chunks, for that is fewer requests
        narrow = scan.row_groups * 4 <= scan.row_groups_in_all
        self.con.execute(f"SET disable_parquet_prefetching = {str(narrow).lower()}")
        if files:
            files.ahead_bytes, files.error = AHEAD_BYTES if narrow else 0, None
        try:
            found = self.con.execute(query, values or None).to_arrow_table()
        except duckdb.Error:
            if files and files.error:
                raise files.error from None
            raise
        after = (files.bytes, files.requests) if files else (0, 0)
        self.scans.append(
            replace(
                scan,
                read_bytes=after[0] - before[0],
                requests=after[1] - before[1],
                seconds=time.perf_counter() - started,
            )
        )
        return found

    def sql(self, query: str, title: str = "", **values: Any) -> list[dict[str, Any]]:
        """The same as rows."""
        return self.table(query, title, **values).to_pylist()

    def count_by(self, column: str, limit: int = 20) -> list[dict[str, Any]]:
        """Pages and compressed MB by one of `COUNTABLE`, largest first."""
        return self.sql(count_query(self.p.crawl, column, limit), f"count by {column}")

    def find(self, site: str, limit: int = 0) -> list[dict[str, Any]]:
        """Pages of a registered domain, a host, or below a URL; 0 = all."""
        return self.sql(find_query(self.p.crawl, site, limit), f"find {site}")

    def sites(self, language: str, limit: int = 20) -> list[dict[str, Any]]:
        """The sites with most pages in a language, by the first of each page's."""
        return self.sql(sites_query(self.p.crawl, language, limit), f"sites in {language}")

    def reasons(self) -> Counter[str]:
        """How many records are `kept`, and dropped for each reason; together all rows of the index.

        With `domains`, rows of other domains are not read: what the footers count beyond those that fit is `domain`.
        """
        found = Counter(
            {r["reason"] or "kept": r["records"] for r in self.sql(reasons_query(self.p), "reasons")}
        )
        found["domain"] = self.rows - found.total()
        if self.p.max_pages:
            found["over max_pages"] = max(0, found["kept"] - self.p.max_pages)
            found["kept"] -= found["over max_pages"]
        return +found

    def select(self) -> pa.Table:
        """The selected records, in the order in which archives are read."""
        return self.table(select_query(self.p), "select")


def explore_index(p: ExploreIndex, lake: Lake) -> Manifest:
    """Index → selection: `part` (one row a selected page), `archives.txt`, `damage` where there is any.

    Every record of the index is selected or dropped for a reason; a stretch of an archive that cannot be
    read counts as failed. Raises `ParamError`, `ArchiveError`, `LakeError`.
    """
    with lake.stage(p) as out:
        index = Index(p)
        for source in index.sources:
            out.read_outside(source)
        reasons = index.reasons()
        failed = Counter(f"archive: {d.reason}" for d in index.damage)
        counts = Counts(
            records_in=index.rows + len(index.damage),
            records_out=reasons.pop("kept", 0),
            dropped=dict(sorted(reasons.items())),
            failed=dict(sorted(failed.items())),
        )
        if counts.records_out == 0:
            raise LakeError(
                f"{p.stage}: no page selected out of {counts.records_in} records: {dict(reasons + failed)}"
            )
        selected = index.select()
        out.table("part-00000", selected)
        names = sorted(set(selected["warc_filename"].to_pylist()))
        out.bytes("archives.txt", "".join(f"{n}\n" for n in names).encode(), rows=len(names))
        if index.damage:
            out.table("damage", pa.Table.from_pylist([vars(d) for d in index.damage]))
        metrics = {
            "archive_base": index.base,
            "archives": len(names),
            "selected_bytes": pc.sum(selected["warc_record_length"]).as_py(),
            "index_bytes": index.files.table_bytes if index.files else 0,
            "index_bytes_read": index.files.bytes if index.files else 0,
        }
        return out.commit(counts, metrics)


def _row(entry: archive.Entry) -> dict[str, Any]:
    try:
        host = urlsplit(entry.url).hostname or ""
    except ValueError:  # a URL such as http://[broken
        host = ""
    labels = host.split(".")
    more = {
        "url_host_name": host,
        "url_host_registered_domain": ".".join(labels[-2:]),
        "url_host_tld": labels[-1],
    }
    return vars(entry) | more | {"subset": "warc"}


def _common_base(files: list[str]) -> tuple[str, list[str]]:
    """Deepest folder or URL above all `files`: what their identities are relative to, on any machine."""
    scheme = files[0].rpartition("://")[0]
    same_store = all(f.rpartition("://")[0] == scheme for f in files)
    base = (
        os.path.commonpath([f.rpartition("://")[2].rpartition("/")[0] for f in files]) if same_store else ""
    )
    if not base:
        raise archive.ArchiveError("archives of one run must lie on one store, below one folder")
    return f"{scheme}://{base}" if scheme else base, files


def _identity(path: str, base: str) -> str:
    return path.removeprefix(base).lstrip("/")
