"""The index: what is selected, what is dropped for which reason, and the same identities wherever files lie."""

import shutil
from collections import Counter
from pathlib import Path

import fsspec
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from conftest import CRAWL, SAMPLE
from support import FORMS, record

from kit.data.select.index import Index, explore_index
from kit.errors import ArchiveError, LakeError, ParamError
from kit.lake.store import Lake
from kit.params import ExploreIndex

ARCHIVE = {"archive_paths": [str(SAMPLE / "crawl-data" / CRAWL)]}


def explored(tmp_path: Path, **values) -> tuple:
    """Manifest and selected rows of stage 10 in a lake of its own."""
    lake = Lake(str(tmp_path / "lake"))
    manifest = explore_index(ExploreIndex(lake=lake.uri, **values), lake)
    return manifest, lake.table(manifest).to_pylist()


def reasons(**values) -> dict[str, int]:
    return dict(Index(ExploreIndex(**values)).reasons())


def test_counts_by_language_are_those_of_the_table() -> None:
    index = Index(ExploreIndex())
    told = {r["content_languages"]: r["pages"] for r in index.count_by("content_languages", limit=99)}
    plain: dict[str, int] = {}
    for path in SAMPLE.glob(f"cc-index/table/cc-main/warc/crawl={CRAWL}/*/*.parquet"):
        for language in pq.ParquetFile(path).read(["content_languages"])["content_languages"].to_pylist():
            plain[language or "(none)"] = plain.get(language or "(none)", 0) + 1
    assert told == plain
    assert len(told) > 8
    with pytest.raises(ParamError, match="content_languages"):
        index.count_by("1; DROP VIEW ccindex")


def test_every_record_is_selected_or_dropped_for_a_reason(data_lake: Lake, crawl_planted: dict) -> None:
    counts = data_lake.need("sample", "10_explore_index").counts
    assert counts.dropped["redirect"] == len(crawl_planted["redirect"])
    assert counts.dropped["robots.txt"] == len(crawl_planted["robots"])
    assert counts.dropped["MIME type"] == len(crawl_planted["pdf"]) + len(crawl_planted["image_file"])
    assert sum(n for r, n in counts.dropped.items() if r.startswith("status")) == len(
        crawl_planted["error_page"]
    )
    assert counts.records_in == 797


@pytest.mark.parametrize(
    "values, reason",
    [
        ({"domains": ["reelnotes.example"]}, "domain"),
        ({"languages": ["deu", "pol"]}, "index language"),
        ({"mimes": ["application/pdf"]}, "MIME type"),
        ({"max_record_mb": 0.002}, "record too long"),
        ({"min_record_kb": 1.2}, "record too short"),
        ({"keep_truncated": False}, "truncated"),
        ({"statuses": ["200", "404"]}, "status 410"),
        ({"max_pages": 10}, "over max_pages"),
    ],
)
def test_each_filter_drops_under_its_name(tmp_path: Path, values: dict, reason: str) -> None:
    manifest, rows = explored(tmp_path, **values)
    assert manifest.counts.dropped[reason] > 0
    for row in rows:
        assert row["url_host_registered_domain"] in values.get("domains", [row["url_host_registered_domain"]])
        assert row["content_mime_detected"] in values.get("mimes", [row["content_mime_detected"]])
        assert row["warc_record_length"] <= values.get("max_record_mb", 8) * 1e6
        assert row["warc_record_length"] >= values.get("min_record_kb", 0) * 1e3
        assert str(row["fetch_status"]) in values.get("statuses", ["200"])
        assert values.get("keep_truncated", True) or row["content_truncated"] is None
        if "languages" in values:
            assert {"deu", "pol"} & set(row["content_languages"].split(","))
    if "max_pages" in values:
        assert len(rows) == 10


def test_empty_lists_of_statuses_and_types_keep_all() -> None:
    assert set(reasons(statuses=[], mimes=[])) == {"kept", "robots.txt"}


def test_a_site_is_found_by_domain_host_or_beginning_of_a_url() -> None:
    index = Index(ExploreIndex())
    every = index.sql("SELECT url, url_host_name AS host FROM ccindex")

    def found(site: str) -> list[str]:
        return sorted(r["url"] for r in index.find(site))

    def having(start: str) -> list[str]:
        return sorted(r["url"] for r in every if r["url"].startswith(start))

    whole = sorted(r["url"] for r in every if r["host"].endswith("reelnotes.example"))
    assert (
        found("reelnotes.example")
        == found("www.reelnotes.example")
        == found("WWW.Reelnotes.example.")
        == whole
    )
    films = having("https://www.reelnotes.example/film/")
    assert found("https://www.reelnotes.example/film/") == films
    either = sorted(films + having("http://www.reelnotes.example/film/"))
    assert found("www.reelnotes.example/film/") == either != films
    assert 0 < len(films) < len(whole) and len(index.find("reelnotes.example", limit=3)) == 3
    assert found("otes.example") == found("example") == found("o'hara.example") == []
    for nonsense in ("", "https://", "http://[broken"):
        with pytest.raises(ParamError, match="is no site"):
            index.find(nonsense)


def test_time_and_type_are_counted_as_plain_code_counts_them() -> None:
    index = Index(ExploreIndex())
    rows = index.sql("SELECT fetch_time, fetch_status, content_languages AS spoken FROM ccindex")
    told = {
        by: {r[by]: r["pages"] for r in index.count_by(by, 999)}
        for by in ("fetch_day", "fetch_status", "language")
    }
    assert told["fetch_day"] == Counter(r["fetch_time"].date().isoformat() for r in rows)
    assert told["fetch_status"] == Counter(str(r["fetch_status"]) for r in rows)
    assert told["language"] == Counter((r["spoken"] or "(none)").split(",")[0] for r in rows)


def test_other_crawls_are_opened_beside_this_one() -> None:
    index = Index(ExploreIndex())
    assert index.crawls == ["CC-SAMPLE-2025-51", CRAWL]
    other = index.at("CC-SAMPLE-2025-51")
    assert other.rows == 45 and other is index.at("CC-SAMPLE-2025-51") and index.at(CRAWL) is index


def test_an_unknown_crawl_names_those_there_are(tmp_path: Path) -> None:
    with pytest.raises(ParamError, match=r"CC-MAIN-2099-01.*CC-SAMPLE-2025-51, CC-SAMPLE-2026-05"):
        explored(tmp_path, crawl="CC-MAIN-2099-01")
    with pytest.raises(ParamError, match="nowhere"):
        explored(tmp_path, index_path="/nowhere")


def test_nothing_selected_is_a_failure_that_says_why(tmp_path: Path) -> None:
    with pytest.raises(LakeError, match="domain"):
        explored(tmp_path, domains=["nobody.example"])


def test_an_older_table_without_some_columns_is_read(tmp_path: Path) -> None:
    old = tmp_path / f"crawl={CRAWL}" / "subset=warc"
    old.mkdir(parents=True)
    for path in SAMPLE.glob(f"cc-index/table/cc-main/warc/crawl={CRAWL}/subset=warc/*.parquet"):
        table = pq.ParquetFile(path).read()
        pq.write_table(table.drop_columns(["content_languages", "content_truncated"]), old / path.name)
    rows = Index(ExploreIndex(index_path=str(tmp_path))).sql(
        "SELECT count(*) AS n, count(content_languages) AS with_language FROM ccindex"
    )
    assert rows[0]["n"] > 700
    assert rows[0]["with_language"] == 0
    assert reasons(index_path=str(tmp_path), languages=["deu"]).get("kept", 0) == 0


def test_a_record_of_unknown_type_is_not_taken_for_a_page(tmp_path: Path) -> None:
    part = tmp_path / f"crawl={CRAWL}" / "subset=warc" / "part.parquet"
    part.parent.mkdir(parents=True)
    path = next(SAMPLE.glob(f"cc-index/table/cc-main/warc/crawl={CRAWL}/subset=warc/*.parquet"))
    table = pq.ParquetFile(path).read()
    at = table.schema.get_field_index("content_mime_detected")
    pq.write_table(table.set_column(at, table.schema[at], pa.nulls(table.num_rows, pa.string())), part)
    assert reasons(index_path=str(tmp_path)) == {"MIME type": table.num_rows}


def test_archives_make_the_same_selection_as_their_index(tmp_path: Path, data_lake: Lake) -> None:
    manifest, rows = explored(tmp_path, **ARCHIVE)
    indexed = data_lake.table(data_lake.need("sample", "10_explore_index")).to_pylist()
    spans = {(r["url"], r["warc_record_offset"], r["warc_record_length"]) for r in rows}
    # a WET record tells of each page too, and the damaged records cannot be found by scanning
    missing = {
        r["url"] for r in indexed if (r["url"], r["warc_record_offset"], r["warc_record_length"]) not in spans
    }
    assert missing == {f"https://attic.example/box/{what}" for what in ("cut", "offset")}
    assert sum(manifest.counts.failed.values()) == 2


def test_identity_of_archives_does_not_depend_on_where_they_lie(tmp_path: Path) -> None:
    for place in ("one/deep/place", "two"):
        for name in ("a/x.warc", "b/y.warc.gz"):
            path = tmp_path / place / name
            path.parent.mkdir(parents=True)
            path.write_bytes(FORMS["plain.warc" if name.endswith("warc") else "members.warc.gz"])
    first = explored(tmp_path / "1", archive_paths=[str(tmp_path / "one/deep/place")])
    second = explored(tmp_path / "2", archive_paths=[str(tmp_path / "two/b"), str(tmp_path / "two/a/x.warc")])
    assert first[0].content_sha256 == second[0].content_sha256
    assert {r["warc_filename"] for r in first[1]} == {"a/x.warc", "b/y.warc.gz"}
    shutil.rmtree(tmp_path / "two")


def test_archives_on_an_object_store_are_indexed() -> None:
    fs = fsspec.filesystem("memory")
    for name in ("one", "two"):
        fs.pipe_file(f"/bucket/crawl/{name}.warc", record(1))
    index = Index(ExploreIndex(archive_paths=["memory://bucket/crawl"]))
    assert index.base == "memory://bucket/crawl" or index.base == "memory:///bucket/crawl"
    assert [r["warc_filename"] for r in index.sql("SELECT warc_filename FROM ccindex ORDER BY 1")] == [
        "one.warc",
        "two.warc",
    ]
    with pytest.raises(ArchiveError, match="one store"):
        Index(ExploreIndex(archive_paths=["memory://bucket/crawl", str(SAMPLE / "crawl-data" / CRAWL)]))


def test_damage_and_missing_archives_are_told(tmp_path: Path) -> None:
    path = tmp_path / "x.warc"
    path.write_bytes(FORMS["plain.warc"] + b"garbage\r\n" + FORMS["plain.warc"])
    manifest, _ = explored(tmp_path, archive_paths=[str(path)])
    assert manifest.counts.failed == {"archive: no record head": 1}
    assert "damage.parquet" in [o.name for o in manifest.outputs]
    with pytest.raises(ArchiveError, match="missing.warc"):
        explored(tmp_path, archive_paths=[str(tmp_path / "missing.warc")])
    path.write_bytes(b"")
    with pytest.raises(LakeError, match="empty file"):
        explored(tmp_path, archive_paths=[str(path)])
