"""Extraction: right text out of wrong heads, every lost page counted, and the same result on any machine."""

import contextlib
import json
import time
from pathlib import Path

import pytest
from conftest import run_data_stages
from test_archive import bomb, record

from kit.data import archive, extract
from kit.data.extract import DOCUMENT, FAILURE, decode, doc_id, extract_page, extract_rows
from kit.lake import Lake
from kit.params import ExtractText


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
    return extract_page(row(**values), page(html.encode(errors="surrogatepass")), "resiliparse")


def reviews(data: object, raw: str = "") -> list[dict]:
    """Reviews found on a page whose JSON-LD is `data`."""
    script = f'<script type="application/ld+json">{raw or json.dumps(data)}</script>'
    return extracted(f"<html><head>{script}</head><body><p>Some text to keep.</p></body></html>")["reviews"]


def review(**values) -> dict:
    return {
        "@type": "Review",
        "reviewBody": "Good.",
        "itemReviewed": {"@type": "Movie", "name": "Fog"},
    } | values


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


@pytest.mark.parametrize(
    "data, claim, text",
    [
        ("čeština".encode("cp1250"), "windows-1250", "čeština"),
        ("naïve café".encode(), "iso-8859-1", "naïve café"),
        (b"\xef\xbb\xbfabc", None, "abc"),
        ("día".encode("utf-16"), None, "día"),
        ("日本語".encode("iso-2022-jp"), "iso-2022-jp", "日本語"),
        ("слово за словом, строка за строкой".encode("cp1251"), None, "слово за словом, строка за строкой"),
        (b"<meta charset=koi8-r>" + "да".encode("koi8-r"), "no-such-charset", "<meta charset=koi8-r>да"),
        (b"", "utf-8", ""),
    ],
)
def test_charsets(data: bytes, claim: str | None, text: str) -> None:
    assert decode(data, claim)[0] == text


@pytest.mark.timeout(30)
@pytest.mark.parametrize("data", [bytes(range(256)) * 50, b"\xff\xfe\xd8", b"\xff" * 9, b"\x1b$" * 5000])
@pytest.mark.parametrize("claim", [None, "utf-8", "x-user-defined", "utf-7", "rot13", "zip", "idna", "\x00"])
def test_decode_never_raises(data: bytes, claim: str | None) -> None:
    text, charset = decode(data, claim)
    assert isinstance(text, str)
    assert charset
    text.encode()


def test_the_sample_reviews_are_read_as_planted(documents: dict, crawl_planted: dict) -> None:
    for planted in crawl_planted["review"]:
        (found,) = documents[planted["url"]]["reviews"]
        assert (found["item"], found["item_type"]) == (planted["film"], "Movie")
        assert (found["rating"], found["rating_max"]) == (planted["stars"], 5)
        assert (found["helpful"], found["votes"]) == (planted["helpful"], planted["votes"])
    titles = {(u, r["title"], r["rating"]) for u, d in documents.items() for r in d["reviews"]}
    assert {(x["url"], x["title"], x["stars"]) for x in crawl_planted["product_review"]} <= titles


def test_reviews_are_found_however_deep_and_take_their_subject_from_above() -> None:
    nested = {
        "@type": "Product",
        "name": "Saw",
        "review": [review(itemReviewed=None), review(reviewBody="B")],
    }
    found = reviews({"@graph": [{"a": [nested]}]})
    assert [(r["item"], r["body"]) for r in found] == [("Saw", "Good."), ("Fog", "B")]
    assert reviews(review(**{"@type": ["Review", "Thing"]}))[0]["item"] == "Fog"
    assert reviews(review(itemReviewed={"@type": ["Movie"], "name": "Fog"}))[0]["item_type"] == "Movie"


@pytest.mark.parametrize(
    "raw",
    ["{broken", "[" * 100_000, '{"a":' * 50_000, "", "null", '"Review"', '[{"@type": "Review"}]', "\ud800"],
)
def test_json_that_holds_no_review_yields_none_and_loses_no_page(raw: str) -> None:
    assert reviews(None, raw or " ") == []


@pytest.mark.parametrize("value", [1e30, -3, "many", None, [], {}, float("nan"), float("inf"), 10**400, True])
def test_odd_numbers_in_a_review_fit_the_schema(value: object) -> None:
    count = {"interactionType": "https://schema.org/LikeAction", "userInteractionCount": value}
    data = review(reviewRating={"ratingValue": value, "bestRating": value}, interactionStatistic=[count, 7])
    (found,) = reviews(data)
    assert found["body"] == "Good."
    table([extracted("<p>text</p>") | {"reviews": [found]}])


def test_halves_of_surrogate_pairs_in_json_do_not_reach_the_parts() -> None:
    found = reviews(None, r'{"@type": "Review", "reviewBody": "Good\ud83d.", "name": "\udc00x\u0000"}')
    assert [(r["body"], r["title"]) for r in found] == [("Good.", "x")]
    table([extracted("<p>text</p>") | {"reviews": found}])


def table(rows: list[dict]):
    """What a part is written from."""
    import pyarrow as pa

    return pa.Table.from_pylist(rows, schema=DOCUMENT)


def test_planted_images_have_their_captions(documents: dict, crawl_planted: dict) -> None:
    found = {(u, i["alt"], i["caption"]) for u, d in documents.items() for i in d["images"]}
    wanted = {(x["url"], x["alt"], x["caption"]) for x in crawl_planted["image_caption"]}
    print(f"images with caption: recall {len(wanted & found) / len(wanted):.2f} of {len(wanted)}")
    assert wanted <= found


def test_images_have_the_text_beside_them() -> None:
    (image,) = extracted("<p>before</p><br><img src='a.png' alt=' x '><p>after</p>")["images"]
    assert image == {"src": "a.png", "alt": "x", "caption": "", "context": "before … after"}


def test_a_plain_text_page_is_its_own_text() -> None:
    found = extract_page(row(), page(b"one < two\n\nthree", kind="text/plain"), "resiliparse")
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


@pytest.fixture
def two_pages(tmp_path: Path) -> list[dict]:
    """Index rows of an archive of three pages."""
    records = [record(i, b"<p>Page number %d has a text.</p>" % i) for i in range(3)]
    (tmp_path / "x.warc").write_bytes(b"".join(records))
    starts = [sum(map(len, records[:i])) for i in range(3)]
    return [
        row(url=f"http://site.example/{i}", warc_record_offset=start, warc_record_length=len(records[i]))
        for i, start in enumerate(starts)
    ]


def lost(tmp_path: Path, rows: list[dict], **values) -> list[tuple[str, str]]:
    """Reason and kind of every page lost; what is not lost must be a document."""
    documents, failures = extract_rows(str(tmp_path), rows, ExtractText(**values))
    assert len(documents) + len(failures) == len(rows)
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


def test_an_extractor_that_breaks_or_hangs_takes_no_other_page_along(
    tmp_path: Path, two_pages: list[dict], monkeypatch: pytest.MonkeyPatch
) -> None:
    def moody(html: str, tree: object) -> str:
        if "number 0" in html:
            raise ZeroDivisionError
        if "number 1" in html:
            with contextlib.suppress(Exception):  # as libraries do: the first alarm is lost
                time.sleep(30)
            time.sleep(30)
        return html

    monkeypatch.setitem(extract.EXTRACTORS, "resiliparse", moody)
    reasons = lost(tmp_path, two_pages, page_timeout_s=0.1)
    assert reasons == [("extractor ZeroDivisionError", "failed"), ("timeout", "failed")]


def test_files_of_two_wrappings_are_each_read_as_they_are(tmp_path: Path) -> None:
    import gzip

    records = [record(i, b"<p>Page number %d has a text.</p>" % i) for i in range(4)]
    parts = [gzip.compress(records[0]), gzip.compress(records[1] + records[2]), gzip.compress(records[3])]
    (tmp_path / "x.warc.gz").write_bytes(b"".join(parts))
    rows = [
        vars(e) | {"content_languages": None} for e in archive.scan(str(tmp_path / "x.warc.gz"), "x.warc.gz")
    ]
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


def test_the_same_documents_in_small_and_large_parts(data_lake: Lake, tmp_path: Path) -> None:
    lake = Lake(str(tmp_path))
    run_data_stages(lake, "small", "20", part_mb=0.1, cores=2)
    few, many = (one.need(run, "20_extract_text") for one, run in ((data_lake, "sample"), (lake, "small")))
    assert len(many.outputs) > 2 * len(few.outputs)
    assert data_lake.table(few).to_pylist() == lake.table(many).to_pylist()
    assert few.counts == many.counts


def test_real_pages_are_all_accounted_for(real_data: Path, tmp_path: Path) -> None:
    lake = Lake(str(tmp_path))
    paths = [str(real_data / "pages.warc.gz"), str(real_data / "warcs")]
    run_data_stages(lake, "real", "20", archive_paths=paths, max_pages=300, cores=2)
    counts = lake.need("real", "20_extract_text").counts
    assert counts.records_in == 300
    assert counts.records_out > 250
    table = lake.table(lake.need("real", "20_extract_text"))
    assert len(set(table["doc_id"].to_pylist())) == counts.records_out
