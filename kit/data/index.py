"""The crawl index: which pages there are, and the selection that the rest of the chain reads.

DuckDB reads the cc-index table (Parquet, partitioned by `crawl` and `subset`) where it lies. Someone who
brings archives instead of an index gets one made of them first, so everything after is the same.
"""

from __future__ import annotations

import os
from collections import Counter
from typing import Any
from urllib.parse import urlsplit

import duckdb
import fsspec
import pyarrow as pa

from kit import resolve
from kit.data import archive
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
    ]
)
SELECTED = [name for name in ENTRY.names if name != "subset"]
COUNTABLE = (
    "content_languages",
    "url_host_registered_domain",
    "content_mime_detected",
    "fetch_status",
    "subset",
)
"""Columns that `Index.count_by` takes."""


class Index:
    """An opened index: a DuckDB view `ccindex`, and the damage found while making it, if it was made here."""

    def __init__(self, p: ExploreIndex) -> None:
        """Open the table of `p.crawl`, or index `p.archive_paths`; raises `ParamError`, `ArchiveError`."""
        self.p = p
        self.damage: list[archive.Damage] = []
        self.con = duckdb.connect()
        self.con.execute("SET enable_progress_bar = false")
        if p.archive_paths:
            self.base, self.files = _common_base(archive.list_archives(p.archive_paths))
            self.con.register("ccindex", self._scan())
        else:
            self.base = p.archive_base
            self._open_table()

    def _open_table(self) -> None:
        root = f"{resolve(self.p.index_path)}/crawl={self.p.crawl}"
        fs, path = fsspec.core.url_to_fs(root)
        self.files = sorted(f for f in fs.find(path) if f.endswith(".parquet"))
        if not self.files:
            crawls = sorted(
                {
                    f.split("crawl=")[1].split("/")[0]
                    for f in fs.find(path.rpartition("/")[0])
                    if "crawl=" in f
                }
            )
            raise ParamError(
                f"no index of crawl '{self.p.crawl}' under '{self.p.index_path}'"
                + (f"; there are {', '.join(crawls)}" if crawls else "")
            )
        if "://" in root:
            self.con.register_filesystem(fs)
            self.files = [fs.unstrip_protocol(f) for f in self.files]
        self.con.read_parquet(self.files, hive_partitioning=True, union_by_name=True).create_view("raw")
        have = set(self.con.table("raw").columns)
        # columns came over the years (languages in 2018, truncation in 2019): absent ones read as NULL
        columns = [
            name if name in have else f"NULL::VARCHAR AS {name}"
            for name in ENTRY.names
            if name not in ("wrapping", "record_type")
        ]
        self.con.execute(
            f"CREATE VIEW ccindex AS SELECT {', '.join(columns)}, 'member' AS wrapping, 'response' AS record_type FROM raw"
        )

    def _scan(self) -> pa.Table:
        """Index the archives themselves; what cannot be read lands in `damage`."""
        rows: list[dict[str, Any]] = []
        with progress(len(self.files), "indexing", "archives") as bar:
            for path in self.files:
                for found in archive.scan(path, _identity(path, self.base)):
                    if isinstance(found, archive.Damage):
                        self.damage.append(found)
                    else:
                        rows.append(_row(found))
                bar.update()
        return pa.Table.from_pylist(rows, schema=ENTRY)

    def sql(self, query: str, **values: Any) -> list[dict[str, Any]]:
        """Rows of any SELECT over `ccindex`; `$name` in the query takes a value."""
        return self.con.execute(query, values or None).to_arrow_table().to_pylist()

    def count_by(self, column: str, limit: int = 20) -> list[dict[str, Any]]:
        """Pages and compressed MB by one of `COUNTABLE`, largest first."""
        if column not in COUNTABLE:
            raise ParamError(f"cannot count by '{column}', only by {', '.join(COUNTABLE)}")
        return self.sql(
            f"""SELECT coalesce({column}::VARCHAR, '(none)') AS "{column}", count(*) AS pages,
                       count(DISTINCT url_host_name) AS hosts, round(sum(warc_record_length) / 1e6, 2) AS mb
                FROM ccindex GROUP BY 1 ORDER BY pages DESC, 1 LIMIT {int(limit)}"""
        )

    def select(self) -> pa.Table:
        """Every record of the index with `dropped`: NULL if selected, else the first reason that fits."""
        p = self.p
        return self.con.execute(
            f"""WITH judged AS (
                  SELECT *, CASE
                    WHEN record_type NOT IN {archive.PAGE_RECORDS} THEN 'record type ' || record_type
                    WHEN fetch_status BETWEEN 300 AND 399 THEN 'redirect'
                    WHEN fetch_status IS DISTINCT FROM 200 THEN 'status ' || coalesce(fetch_status::VARCHAR, 'none')
                    WHEN subset = 'robotstxt' THEN 'robots.txt'
                    WHEN NOT coalesce(list_contains($mimes, content_mime_detected), false) THEN 'MIME type'
                    WHEN len($domains) > 0 AND NOT coalesce(list_contains($domains, url_host_registered_domain), false)
                      THEN 'domain'
                    WHEN len($languages) > 0
                      AND NOT list_has_any($languages, string_split(coalesce(content_languages, ''), ','))
                      THEN 'index language'
                    WHEN warc_record_length > $max_bytes THEN 'record too long'
                  END AS reason FROM ccindex)
                SELECT {", ".join(SELECTED)}, CASE WHEN reason IS NULL AND $max_pages > 0 AND
                    row_number() OVER (PARTITION BY reason IS NULL ORDER BY warc_filename, warc_record_offset)
                    > $max_pages THEN 'over max_pages' ELSE reason END AS dropped
                FROM judged ORDER BY warc_filename, warc_record_offset""",
            {
                "mimes": p.mimes,
                "domains": p.domains,
                "languages": p.languages,
                "max_bytes": int(p.max_record_mb * 1e6),
                "max_pages": p.max_pages,
            },
        ).to_arrow_table()


def explore_index(p: ExploreIndex, lake: Lake) -> Manifest:
    """Index → selection: `part` (one row a selected page), `archives.txt`, `damage` where there is any.

    Every record of the index is selected or dropped for a reason; a stretch of an archive that cannot be
    read counts as failed. Raises `ParamError`, `ArchiveError`, `LakeError`.
    """
    with lake.stage(p) as out:
        index = Index(p)
        for path in p.archive_paths or [f"{p.index_path.rstrip('/')}/crawl={p.crawl}"]:
            out.read_outside(path)
        judged = index.select()
        reasons = Counter(r for r in judged["dropped"].to_pylist() if r)
        selected = judged.filter(pa.compute.is_null(judged["dropped"])).drop_columns(["dropped"])
        failed = Counter(f"archive: {d.reason}" for d in index.damage)
        counts = Counts(
            records_in=judged.num_rows + len(index.damage),
            records_out=selected.num_rows,
            dropped=dict(sorted(reasons.items())),
            failed=dict(sorted(failed.items())),
        )
        if selected.num_rows == 0:
            raise LakeError(
                f"{p.stage}: no page selected out of {counts.records_in} records: {dict(reasons + failed)}"
            )
        out.table("part-00000", selected)
        names = sorted(set(selected["warc_filename"].to_pylist()))
        out.bytes("archives.txt", "".join(f"{n}\n" for n in names).encode(), rows=len(names))
        if index.damage:
            out.table("damage", pa.Table.from_pylist([vars(d) for d in index.damage]))
        bytes_selected = pa.compute.sum(selected["warc_record_length"]).as_py()
        return out.commit(
            counts, {"archive_base": index.base, "archives": len(names), "selected_bytes": bytes_selected}
        )


def _row(entry: archive.Entry) -> dict[str, Any]:
    try:
        host = urlsplit(entry.url).hostname or ""
    except ValueError:  # a URL such as http://[broken
        host = ""
    domain = ".".join(host.split(".")[-2:])
    return vars(entry) | {"url_host_name": host, "url_host_registered_domain": domain, "subset": "warc"}


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
