"""The crawl index: which pages there are, and the selection that the rest of the chain reads.

DuckDB reads the cc-index table (Parquet, partitioned by `crawl` and `subset`) where it lies: on a disk, on S3, or
over HTTPS by file list. Someone who brings archives instead of an index gets one made of them first, so everything
after is the same.
"""

from __future__ import annotations

import functools
import hashlib
import os
import time
from collections import Counter
from typing import Any

import duckdb
import pyarrow as pa
import pyarrow.compute as pc

from kit.data.read import archive, polite, record
from kit.data.read import rows as row_files
from kit.data.select import questions
from kit.data.select.table import Files, Scan, athena_usd, columns_and_values, crawls_beside, table_files
from kit.errors import ArchiveError, LakeError, ParamError
from kit.lake.manifest import Account, Manifest
from kit.lake.store import Lake
from kit.params import ExploreIndex
from kit.progress import progress

SCANNED = 1 << 16
"""Rows of a scan that are held as Python objects."""
KINDS = {
    "warc_record_offset": pa.int64(),
    "warc_record_length": pa.int64(),
    "fetch_time": pa.timestamp("ms"),
    "fetch_status": pa.int16(),
}
ENTRY = pa.schema(
    [(name, KINDS.get(name, pa.string())) for name in (*questions.SELECTED, "subset", "url_host_tld")]
)


def doc_id(warc_filename: str, offset: int, wrapping: str = "member") -> str:
    """Identity of a document: a hash of where its bytes lie, so partitioning and retries never change it.

    Made once, when a page is selected, and carried from there. In a `stream` the offset counts unpacked bytes, which a
    member of the same file could have as its own. 20 hexadecimal digits (80 bits).
    """
    place = f"{warc_filename}:{'unpacked:' if wrapping == 'stream' else ''}{offset}"
    return hashlib.blake2b(place.encode(), digest_size=10).hexdigest()


class Index:
    """An opened index: a DuckDB view `ccindex`, what each query cost, and the damage found if it was made here."""

    def __init__(self, p: ExploreIndex) -> None:
        """Open the table of `p.crawl`, or index `p.archive_paths`; raises `ParamError`, `ArchiveError`, `FetchError`."""
        self.p = p
        self.damage: list[archive.Damage] = []
        self.scans: list[Scan] = []
        """What each query was to read and did read, in order."""
        polite.configure(contact=p.contact)
        self.con = duckdb.connect()
        # footers come from memory
        self.con.execute("SET enable_progress_bar = false; SET parquet_metadata_cache = true")
        if p.archive_paths:
            self.files, self.sources = Files(None, []), p.archive_paths
            archives = archive.list_archives(p.archive_paths)
            self.base = _common_base(archives)
            scanned = self._scan(archives)
            self.rows = len(scanned)
            self.con.register("raw", scanned)
        else:
            self.base = p.archive_base
            fs, paths, self.sources = table_files(p)
            self.files = Files(fs, paths)
            self.rows = self.files.rows
            self.con.register_filesystem(self.files)
            # not con.read_parquet: it keeps Python's lock while DuckDB's threads wait for it to read through fsspec
            self.con.execute(
                f"CREATE VIEW raw AS FROM read_parquet([{', '.join(map(questions.text, self.files.paths))}], "
                "hive_partitioning = true, hive_types_autocast = false, union_by_name = true)"
            )
        # columns came over the years (languages in 2018, truncation in 2019): absent ones read as NULL
        have = {*self.con.table("raw").columns, *questions.NOT_IN_TABLE}
        absent = dict.fromkeys(ENTRY.names, "NULL::VARCHAR") | {"crawl": questions.text(p.crawl)}
        columns = "".join(f", {value} AS {name}" for name, value in absent.items() if name not in have)
        self.con.execute(f"CREATE VIEW ccindex AS SELECT *{columns} FROM raw")

    def _scan(self, paths: list[str]) -> pa.Table:
        """Index the archives themselves; what cannot be read lands in `damage`."""
        tables: list[pa.Table] = []
        entries: list[dict[str, Any]] = []
        with progress(len(paths), "indexing", "archives") as bar:
            for path in paths:
                scan = row_files.scan_rows if archive.ROWS.search(path) else archive.scan_archive
                for record in scan(path, path.removeprefix(self.base).lstrip("/")):
                    if isinstance(record, archive.Damage):
                        self.damage.append(record)
                    else:
                        entries.append(_row(record))
                    if len(entries) == SCANNED:
                        tables.append(pa.Table.from_pylist(entries, schema=ENTRY))
                        entries = []
                bar.update()
        return pa.concat_tables([*tables, pa.Table.from_pylist(entries, schema=ENTRY)])

    @functools.cached_property
    def crawls(self) -> list[str]:
        """Crawls beside this one; over HTTPS, where nothing can be listed, only this one."""
        return crawls_beside(self.p) or [self.p.crawl]

    @functools.cache  # noqa: B019  an index lives as long as its notebook
    def at(self, crawl: str) -> Index:
        """The index of another crawl of the same table, opened once."""
        return self if crawl == self.p.crawl else Index(self.p.model_copy(update={"crawl": crawl}))

    def estimate(self, query: str, title: str = "") -> Scan:
        """What `query` will read: the columns it uses, in the row groups whose smallest and largest values fit."""
        explained = self.con.execute(f"EXPLAIN (FORMAT json) {query}").fetchall()[0][1]
        planned, groups, of = self.files.plan(*columns_and_values(explained))
        usd = athena_usd(planned, self.p.athena_usd_per_tb)
        return Scan(title or " ".join(query.split())[:80], groups, of, planned, usd)

    def table(self, query: str, title: str = "") -> pa.Table:
        """The answer to any SELECT over `ccindex`, its cost in `scans`; raises `ParamError` above `max_scan_gb`."""
        scan, files = self.estimate(query, title), self.files
        if scan.planned_bytes > self.p.max_scan_gb * 1e9:
            raise ParamError(
                f"'{scan.query}' would read {scan.planned_bytes / 1e9:,.3g} GB of the index, and max_scan_gb allows "
                f"{self.p.max_scan_gb:g}: name domains, or some index_files as a sample, or allow more"
            )
        # few row groups: page by page, most are skipped; many: whole column chunks, for that is fewer requests
        narrow = scan.row_groups * 4 <= scan.row_groups_in_all
        self.con.execute(f"SET disable_parquet_prefetching = {str(narrow).lower()}")
        files.narrow, files.error = narrow, None
        started, read, requests = time.perf_counter(), files.bytes, files.requests
        try:
            selected = self.con.execute(query).to_arrow_table()
        except duckdb.Error as error:
            raise files.error or error from None
        scan.read_bytes, scan.requests = files.bytes - read, files.requests - requests
        scan.seconds = time.perf_counter() - started
        self.scans.append(scan)
        return selected

    def sql(self, query: str, title: str = "") -> list[dict[str, Any]]:
        """The same as rows."""
        return self.table(query, title).to_pylist()

    def count_by(self, column: str, limit: int = 20) -> list[dict[str, Any]]:
        """Pages and compressed MB by one of `COUNTABLE`, largest first."""
        return self.sql(questions.count_query(self.p.crawl, column, limit), f"count by {column}")

    def find(self, site: str, limit: int = 0) -> list[dict[str, Any]]:
        """Pages of a registered domain, a host, or below a URL; 0 = all."""
        return self.sql(questions.find_query(self.p.crawl, site, limit), f"find {site}")

    def sites(self, language: str, limit: int = 20) -> list[dict[str, Any]]:
        """The sites with most pages in a language, by the first of each page's."""
        return self.sql(questions.sites_query(self.p.crawl, language, limit), f"sites in {language}")

    def reasons(self) -> Counter[str]:
        """How many records are `kept`, and dropped for each reason; together all rows of the index.

        With `domains`, rows of other domains are not read: what the footers count beyond those that fit is `domain`.
        """
        rows = self.sql(questions.reasons_query(self.p), "reasons")
        counts = Counter({r["reason"] or "kept": r["records"] for r in rows})
        counts["domain"] = self.rows - counts.total()
        if self.p.max_pages:
            counts["over max_pages"] = max(0, counts["kept"] - self.p.max_pages)
            counts["kept"] -= counts["over max_pages"]
        return +counts

    def select(self) -> pa.Table:
        """The selected records, `doc_id` and `questions.SELECTED`, in the order in which archives are read."""
        selected = self.table(questions.select_query(self.p), "select")
        places = (selected[name].to_pylist() for name in ("warc_filename", "warc_record_offset", "wrapping"))
        ids = [doc_id(*place) for place in zip(*places, strict=True)]
        return selected.add_column(0, "doc_id", pa.array(ids, pa.string()))


def explore_index(p: ExploreIndex, lake: Lake) -> Manifest:
    """Index → selection: `part` (one row a selected page, with the `doc_id` that it keeps), `archives.txt`, `damage` where there is any.

    Every record of the index is selected or dropped for a reason; a stretch of an archive that cannot be
    read counts as failed. Raises `ParamError`, `ArchiveError`, `LakeError`.
    """
    with lake.stage(p) as out:
        index = Index(p)
        for source in index.sources:
            out.read_outside(source)
        reasons = index.reasons()
        failed = Counter(f"archive: {d.reason}" for d in index.damage)
        counts = Account(index.rows + len(index.damage), 0, reasons.pop("kept", 0), reasons, failed).counts()
        if counts.records_out == 0:
            why = dict(reasons + failed)
            raise LakeError(f"{p.stage}: no page selected out of {counts.records_in} records: {why}")
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
            "index_bytes": index.files.table_bytes,
            "index_bytes_read": index.files.bytes,
        }
        return out.commit(counts, metrics)


def _row(entry: archive.Entry) -> dict[str, Any]:
    host = record.host_name(entry.url)
    labels = host.split(".")
    names = {"url_host_name": host, "url_host_registered_domain": ".".join(labels[-2:])}
    return vars(entry) | names | {"url_host_tld": labels[-1], "subset": "warc"}


def _common_base(files: list[str]) -> str:
    """Deepest folder or URL above all `files`: what their identities are relative to, on any machine."""
    scheme, *others = {f.rpartition("://")[0] for f in files}
    folders = [f.rpartition("://")[2].rpartition("/")[0] for f in files]
    base = "" if others else os.path.commonpath(folders)
    if not base:
        raise ArchiveError("archives of one run must lie on one store, below one folder")
    return f"{scheme}://{base}" if scheme else base
