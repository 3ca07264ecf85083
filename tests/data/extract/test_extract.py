"""Extraction: right text out of wrong heads, every lost page counted, and the same result on any machine."""

import faulthandler
import hashlib
import itertools
import os
import re
import signal
import threading
from http.server import ThreadingHTTPServer
from pathlib import Path

import pyarrow as pa
import pytest
from conftest import run_data_stages
from support import (
    bomb,
    record,
)

from kit.data.extract import extract
from kit.data.extract.extract import Html, extract_page, extract_rows, extract_text
from kit.data.extract.schema import FAILURE
from kit.data.read import archive
from kit.data.select.index import doc_id, explore_index
from kit.errors import LakeError, RecordError
from kit.lake.store import Lake
from kit.params import ExploreIndex, ExtractText
from kit.pipeline import state


def page(body: bytes, charset: str | None = None, kind: str = "text/html") -> archive.Page:
    """A page that a crawler fetched from http://site.example/0."""
    head = kind.encode() + (f"; charset={charset}".encode() if charset else b"")
    raw = record(0, body).replace(b"text/html; charset=utf-8", head)
    size = raw.index(b"\r\n\r\n", raw.index(b"HTTP/1.1")) + 4 + len(body) - raw.index(b"HTTP/1.1")
    start = raw.index(b"Content-Length: ")
    raw = raw[:start] + b"Content-Length: %d" % size + raw[raw.index(b"\r\n", start) :]
    return archive.parse_page(raw, 1 << 24)


def row(**values) -> dict:
    """An index row."""
    return {
        "doc_id": "0" * 20,
        "url": "http://site.example/0",
        "warc_filename": "x.warc",
        "warc_record_offset": 0,
        "warc_record_length": 1,
        "wrapping": "none",
        "content_digest": None,
        "content_languages": None,
        "content_truncated": None,
    } | values


def extracted(html: str, **values) -> dict:
    return extract_page(row(**values), page(html.encode(errors="surrogatepass")), ExtractText())


def test_pages_with_wrong_or_hidden_charsets_have_the_text_of_the_clean_page(
    documents: dict, crawl_planted: dict
) -> None:
    for kind in ("wrong_charset", "meta_charset"):
        right = [
            _words(documents[x["of"]]["text"]) == _words(documents[x["url"]]["text"])
            for x in crawl_planted[kind]
        ]
        print(f"{kind}: recall {sum(right) / len(right):.2f} of {len(right)}")
        assert all(right)


def _words(text: str) -> list[str]:
    """The words of the longest paragraph: skeletons of copies differ, the article does not."""
    return max(text.split("\n"), key=len).split()


def test_the_sample_reviews_are_read_as_planted(documents: dict, crawl_planted: dict) -> None:
    for planted in crawl_planted["review"]:
        (found,) = documents[planted["url"]]["reviews"]
        assert (found["item"], found["item_type"]) == (planted["film"], "Movie")
        assert (found["rating"], found["rating_max"]) == (planted["stars"], 5)
        assert (found["helpful"], found["votes"]) == (planted["helpful"], planted["votes"])
    titles = {(u, r["title"], r["rating"]) for u, d in documents.items() for r in d["reviews"]}
    assert {(x["url"], x["title"], x["stars"]) for x in crawl_planted["product_review"]} <= titles


def test_planted_images_have_their_captions(documents: dict, crawl_planted: dict) -> None:
    found = {(u, i["alt"], i["caption"]) for u, d in documents.items() for i in d["images"]}
    wanted = {(x["url"], x["alt"], x["caption"]) for x in crawl_planted["image_caption"]}
    print(f"images with caption: recall {len(wanted & found) / len(wanted):.2f} of {len(wanted)}")
    assert wanted <= found


def test_a_plain_text_page_is_its_own_text() -> None:
    found = extract_page(row(), page(b"one < two\n\nthree", kind="text/plain"), ExtractText())
    assert (found["text"], found["extractor"], found["mime"]) == ("one < two\n\nthree", "none", "text/plain")


def test_truncation_is_carried_along(documents: dict, crawl_planted: dict) -> None:
    for planted in crawl_planted["truncated"]:
        assert documents[planted["url"]]["truncated"] == "length"
    assert extracted("<p>text</p>", content_truncated="time")["truncated"] == "time"


def test_doc_id_depends_on_the_place_of_the_bytes_only() -> None:
    assert doc_id("a.warc.gz", 17) == doc_id("a.warc.gz", 17)
    assert len({doc_id("a", 1), doc_id("a", 11), doc_id("a:1", 1), doc_id("b", 1)}) == 4
    assert doc_id("a", 1, "stream") != doc_id("a", 1, "member") == doc_id("a", 1, "none")
    assert doc_id("crawl-data/x.warc.gz", 4096) == "f4da8e010f5e910a0ff0"


def test_the_id_that_a_page_was_selected_with_is_its_documents(data_lake: Lake) -> None:
    selected, extracted = (
        data_lake.table(data_lake.need("sample", stage)).to_pylist()
        for stage in ("10_explore_index", "20_extract_text")
    )
    ids = {(r["warc_filename"], r["warc_record_offset"]): r["doc_id"] for r in selected}
    assert len(set(ids.values())) == len(ids) == len(selected)
    assert all(r["doc_id"] == doc_id(r["warc_filename"], r["warc_record_offset"]) for r in selected)
    assert all(d["doc_id"] == ids[d["warc_filename"], d["warc_record_offset"]] for d in extracted)
    # whoever selects a page names its document: nothing is hashed again
    assert (
        extracted
        and extract_page(row(doc_id="mine"), page(b"<p>Hello</p>"), ExtractText())["doc_id"] == "mine"
    )


def test_a_selection_of_an_older_kit_is_refused_in_one_line(data_lake: Lake, tmp_path: Path) -> None:
    lake, first = Lake(str(tmp_path)), data_lake.need("sample", "10_explore_index")
    with lake.stage(ExploreIndex(lake=lake.uri)) as out:
        out.table("part-00000", data_lake.table(first).drop_columns("doc_id"))
        out.commit(first.counts, first.metrics)
    with pytest.raises(LakeError, match="run stage 10 again"):
        extract_text(ExtractText(lake=lake.uri), lake)


def write_pages(folder: Path, n: int) -> list[dict]:
    """An archive of `n` pages in `folder`, and its index rows."""
    records = [record(i, b"<p>Page number %d has a text.</p>" % i) for i in range(n)]
    (folder / "x.warc").write_bytes(b"".join(records))
    starts = [sum(map(len, records[:i])) for i in range(n)]
    return [
        row(url=f"http://site.example/{i}", warc_record_offset=start, warc_record_length=len(records[i]))
        for i, start in enumerate(starts)
    ]


@pytest.fixture
def two_pages(tmp_path: Path) -> list[dict]:
    """Index rows of an archive of three pages."""
    return write_pages(tmp_path, 3)


def lost(tmp_path: Path, rows: list[dict], **values) -> list[tuple[str, str]]:
    """Reason and kind of every page lost; what is not lost must be a document."""
    documents, failures = extract_rows(str(tmp_path), rows, ExtractText(**values))
    assert documents.num_rows + len(failures) == len(rows)
    return [(f["reason"], f["kind"]) for f in failures]


def test_lost_pages_are_named(tmp_path: Path, two_pages: list[dict]) -> None:
    one, two, _ = two_pages
    assert lost(tmp_path, two_pages) == []
    assert lost(tmp_path, [one | {"url": "http://other.example/"}, two]) == [
        ("URL is not the index's", "failed")
    ]
    assert lost(tmp_path, [one | {"content_digest": "X" * 32}, two]) == [
        ("digest is not the index's", "failed")
    ]
    assert lost(tmp_path, [one | {"warc_filename": "no"}, two]) == [("archive file missing", "failed")]
    assert lost(tmp_path, [one | {"warc_record_offset": 3}, two]) == [("no record head", "failed")]
    assert lost(tmp_path, [one | {"warc_record_offset": -9}, two])[0][1] == "failed"
    assert lost(tmp_path, two_pages, max_page_mb=1e-5) == [("record too large", "failed")] * 3
    (tmp_path / "bomb.gz").write_bytes(bomb(64 << 20))
    size = (tmp_path / "bomb.gz").stat().st_size
    big = one | {"warc_filename": "bomb.gz", "wrapping": "member", "warc_record_length": size}
    assert lost(tmp_path, [big, two]) == [("record too large", "failed")]
    (tmp_path / "empty.warc").write_bytes(record(0, b"<html><script>x()</script></html>"))
    empty = one | {
        "warc_filename": "empty.warc",
        "warc_record_length": (tmp_path / "empty.warc").stat().st_size,
    }
    assert lost(tmp_path, [empty, two]) == [("no text", "dropped")]


def test_a_page_that_breaks_hangs_or_crashes_the_extractor_takes_no_other_along(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def moody(html: Html) -> str:
        if "number 1 " in html.source:
            raise ZeroDivisionError
        if "number 2 " in html.source:
            re.match(r"(a+)+$", "a" * 60 + "b")  # hours, inside C
        if "number 3 " in html.source:
            faulthandler.disable()  # it would tell the whole stack
            os.kill(os.getpid(), signal.SIGSEGV)
        if "number 4 " in html.source:
            return "x" * (2 << 30)
        return html.source

    monkeypatch.setitem(extract.EXTRACTORS, "resiliparse", moody)
    rows = write_pages(tmp_path, 6)
    reasons = lost(tmp_path, rows, extractor="resiliparse", page_timeout_s=1, page_memory_mb=500)
    assert reasons == [
        (reason, "failed")
        for reason in ("extractor ZeroDivisionError", "timeout", "crash (signal 11)", "out of memory")
    ]


GERMAN = "<p>Der Fischer ging am frühen Morgen zum Hafen, weil das Boot nicht mehr warten konnte.</p>" * 5


@pytest.mark.parametrize(
    "html, values, reason",
    [
        ("<nav>Home</nav><p>Only four words here</p>", {}, "prefilter: words"),
        (GERMAN, {"keep_languages": ["en"]}, "prefilter: language"),
        (GERMAN, {"keep_languages": ["en", "de"]}, None),
        (GERMAN, {"min_words": 500}, "prefilter: words"),
        ("<p>12 345 678 90 1 2 3</p>", {"keep_languages": ["en"], "min_words": 1}, None),  # no sure language
    ],
)
def test_the_prefilter_drops_what_all_text_of_a_page_rules_out(
    html: str, values: dict, reason: str | None
) -> None:
    made = page(html.encode())
    assert extract_page(row(), made, ExtractText(**values))["text"]  # off unless asked for
    if reason is None:
        kept = extract_page(row(), made, ExtractText(prefilter=True, **values))
        assert kept == extract_page(row(), made, ExtractText())
    else:
        with pytest.raises(RecordError, match=reason):
            extract_page(row(), made, ExtractText(prefilter=True, **values))


def test_a_prefiltered_page_is_dropped_and_not_failed(tmp_path: Path, two_pages: list[dict]) -> None:
    assert lost(tmp_path, two_pages, prefilter=True) == [("prefilter: words", "dropped")] * 3


def test_files_of_two_wrappings_are_each_read_as_they_are(tmp_path: Path) -> None:
    import gzip

    records = [record(i, b"<p>Page number %d has a text.</p>" % i) for i in range(4)]
    parts = [gzip.compress(records[0]), gzip.compress(records[1] + records[2]), gzip.compress(records[3])]
    (tmp_path / "x.warc.gz").write_bytes(b"".join(parts))
    rows = [row(**vars(entry)) for entry in archive.scan_archive(str(tmp_path / "x.warc.gz"), "x.warc.gz")]
    assert [r["wrapping"] for r in rows] == ["member", "stream", "stream", "member"]
    assert lost(tmp_path, rows) == []


def test_every_lost_page_of_the_sample_is_in_the_failures(data_lake: Lake, crawl_planted: dict) -> None:
    manifest = data_lake.need("sample", "20_extract_text")
    failures = data_lake.table(manifest, "failures")
    assert failures.schema.names == FAILURE.names
    told = {f["url"]: f["reason"] for f in failures.to_pylist()}
    assert told == {
        crawl_planted["broken_gzip"][0]["url"]: "gzip corrupt",
        crawl_planted["broken_cut"][0]["url"]: "range past end of file",
        crawl_planted["broken_offset"][0]["url"]: "no gzip member here",
        crawl_planted["broken_digest"][0]["url"]: "digest is not the index's",
    }
    lost_pages = sum(manifest.counts.dropped.values()) + sum(manifest.counts.failed.values())
    assert lost_pages == len(told)


def test_the_same_bytes_on_one_core_and_two_in_one_part_and_forty(data_lake: Lake, tmp_path: Path) -> None:
    selected = data_lake.need("sample", "10_explore_index").metrics["selected_bytes"]
    lake, found = Lake(str(tmp_path)), set()
    for cores in (1, 2):
        for parts in (1, 40):
            run = f"{cores}-{parts}"
            run_data_stages(lake, run, "20", part_mb=selected / 1e6 / parts * 1.05, cores=cores)
            manifest = lake.need(run, "20_extract_text")
            assert manifest.metrics["parts"] in range(parts, parts + 6)
            table = lake.table(manifest).combine_chunks()
            sink = pa.BufferOutputStream()
            with pa.ipc.new_stream(sink, table.schema) as stream:
                stream.write_table(table)
            found.add((hashlib.sha256(sink.getvalue()).hexdigest(), manifest.counts.model_dump_json()))
    assert len(found) == 1
    assert lake.table(lake.need("2-40", "20_extract_text")).equals(
        data_lake.table(data_lake.need("sample", "20_extract_text"))
    )


def test_pages_lost_to_the_network_are_named_and_a_rerun_fetches_those_alone(
    server: ThreadingHTTPServer,
    data_lake: Lake,
    tmp_path: Path,
) -> None:
    def refuse(path: str, start: int, end: int) -> int | None:
        return 403 if asked and "00001" in path else None

    asked, server.faults, server.seen, server.etag = True, itertools.repeat(refuse), [], '"1"'
    server.let_go = threading.Event()
    lake = Lake(str(tmp_path))
    p = ExtractText(lake=lake.uri, requests_per_s=1000, retries=0, part_mb=0.1)
    explore_index(ExploreIndex(lake=lake.uri, archive_base=server.uri), lake)
    first = extract_text(p, lake)
    selected = lake.table(lake.need("sample", "10_explore_index"))["warc_filename"].to_pylist()
    refused = sum("00001" in name for name in selected)
    assert 0 < refused == first.counts.failed["fetch: HTTP 403"] == first.metrics["retry"] < len(selected)
    now = state(lake, p)
    assert (now.status, now.why) == ("stale", f"{refused} pages to fetch again")

    asked, server.seen = False, []
    second = extract_text(p, lake)
    assert {"00001" in path for path, *_ in server.seen} == {True}
    here = data_lake.need("sample", "20_extract_text")
    assert lake.table(second).equals(data_lake.table(here))
    assert second.counts == here.counts
    assert lake.table(second, "failures").equals(data_lake.table(here, "failures"))


def test_real_pages_are_all_accounted_for(real_data: Path, tmp_path: Path) -> None:
    lake = Lake(str(tmp_path))
    paths = [str(real_data / "pages.warc.gz"), str(real_data / "warcs")]
    run_data_stages(lake, "real", "20", archive_paths=paths, max_pages=300, cores=2)
    counts = lake.need("real", "20_extract_text").counts
    assert counts.records_in == 300
    assert counts.records_out > 250
    table = lake.table(lake.need("real", "20_extract_text"))
    assert len(set(table["doc_id"].to_pylist())) == counts.records_out
