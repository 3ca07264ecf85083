"""The sample crawl is what its README says: rebuildable, indexed right, and planted as listed."""

import gzip
import html
import io
import json
import re
import subprocess
import sys
import zlib
from base64 import b32encode
from collections import Counter, defaultdict
from hashlib import sha1
from importlib.metadata import version
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from warcio.archiveiterator import ArchiveIterator

DATA = Path(__file__).resolve().parents[1] / "data_samples"
NOW, EARLIER = "CC-SAMPLE-2026-05", "CC-SAMPLE-2025-51"
BROKEN = ("broken_gzip", "broken_digest", "broken_offset", "broken_cut")
STRINGS = (
    "url_surtkey url url_host_name url_host_tld url_host_2nd_last_part url_host_3rd_last_part"
    " url_host_4th_last_part url_host_5th_last_part url_host_registry_suffix"
    " url_host_registered_domain url_host_private_suffix url_host_private_domain"
    " url_host_name_reversed url_protocol url_port:int32 url_path url_query"
    " fetch_time:timestamp[ms] fetch_status:int16 fetch_redirect content_digest content_mime_type"
    " content_mime_detected content_charset content_languages content_truncated warc_filename"
    " warc_record_offset:int32 warc_record_length:int32 warc_segment"
)


def built(root: Path) -> dict[str, Path]:
    """Every built file below a folder, by its relative path."""
    files = [p for part in ("crawl-data", "cc-index") for p in (root / part).rglob("*")]
    found = {str(p.relative_to(root)): p for p in files if p.is_file()}
    return found | {"planted.jsonl": root / "planted.jsonl"}


def tables() -> list[Path]:
    """The parquet files of the index."""
    return sorted(DATA.glob("cc-index/table/**/*.parquet"))


def members(data: bytes) -> list[bytes]:
    """The gzip members of a file, one by one; an error for anything after the last."""
    out = []
    while data:
        part = zlib.decompressobj(31)
        out.append(part.decompress(data))
        assert part.eof
        data = part.unused_data
    return out


def parse(raw: bytes):
    """The one WARC record in these bytes, with its HTTP head and its payload."""
    (record,) = [(r, r.raw_stream.read()) for r in ArchiveIterator(io.BytesIO(raw))]
    return record


def digest(data: bytes) -> str:
    """SHA-1 in base 32."""
    return b32encode(sha1(data).digest()).decode()


def main_text(body: bytes, codec: str = "utf-8") -> str:
    """The paragraphs of the main part, which is all that may be compared between skeletons."""
    source = re.sub(r'<div class="ad inline">[^<]*</div>\n', "", body.decode(codec))
    box = r"<div class=['\"](?:review-body|entry-content|article-text)['\"]>\n(.*?)</div>"
    parts = re.findall(box, source, re.S)
    return "\n\n".join(html.unescape(p) for p in re.findall(r"<p>(.*?)</p>", "".join(parts), re.S))


def jaccard(one: str, other: str) -> float:
    """Jaccard similarity over lower-cased word 5-grams."""
    a, b = (re.findall(r"\w+", t.lower()) for t in (one, other))
    a, b = ({tuple(w[i : i + 5]) for i in range(len(w) - 4)} for w in (a, b))
    return len(a & b) / len(a | b)


@pytest.fixture(scope="session")
def index() -> dict[tuple[str, str], dict]:
    """All rows of the index table, by crawl and URL."""
    rows = {}
    for path in tables():
        crawl, subset = (p.split("=")[1] for p in path.parts[-3:-1])
        for row in pq.ParquetFile(path).read().to_pylist():
            assert (crawl, row["url"]) not in rows
            rows[crawl, row["url"]] = row | {"subset": subset}
    return rows


@pytest.fixture(scope="session")
def planted() -> list[dict]:
    """All lines of planted.jsonl."""
    return [json.loads(line) for line in (DATA / "planted.jsonl").open(encoding="utf-8")]


@pytest.fixture(scope="session")
def by_property(planted: list[dict]) -> dict[str, list[dict]]:
    """The planted lines, by property."""
    out = defaultdict(list)
    for line in planted:
        out[line["property"]].append(line)
    return out


@pytest.fixture(scope="session")
def captures(index: dict, by_property: dict) -> dict[tuple[str, str], tuple]:
    """Every readable response: (record, payload), by crawl and URL, read by its index row."""
    out = {}
    bad = {(r["crawl"], r["url"]) for name in BROKEN for r in by_property[name]}
    for key, row in index.items():
        if key not in bad:
            start, size = row["warc_record_offset"], row["warc_record_length"]
            piece = (DATA / row["warc_filename"]).read_bytes()[start : start + size]
            assert len(piece) == size
            (raw,) = members(piece)
            out[key] = parse(raw)
    return out


def test_rebuild_gives_the_same_bytes(tmp_path: Path) -> None:
    some = next(iter(DATA.glob("crawl-data/*/segments/*/wet/*.gz"))).read_bytes()
    first = members(some)[0]
    deflate = zlib.compressobj(9, zlib.DEFLATED, -15)
    if not some[10:].startswith(deflate.compress(first) + deflate.flush()):
        pytest.skip(f"this zlib ({zlib.ZLIB_RUNTIME_VERSION}) compresses otherwise")
    if f"resiliparse {version('resiliparse')}\r\n" not in first.decode():
        pytest.skip("the WET files come from another version of resiliparse")
    script = [sys.executable, DATA / "build.py", "--out", tmp_path]
    subprocess.run(script, check=True, capture_output=True)
    old, new = built(DATA), built(tmp_path)
    assert sorted(old) == sorted(new)
    for name in old:
        if old[name].read_bytes() == new[name].read_bytes():
            continue
        assert name.endswith(".parquet"), name
        one, other = pq.ParquetFile(old[name]), pq.ParquetFile(new[name])
        assert one.metadata.created_by != other.metadata.created_by, name  # another pyarrow
        assert one.read().equals(other.read()), name


def test_index_has_common_crawls_columns() -> None:
    names = {"timestamp[ms]": pa.timestamp("ms"), "int16": pa.int16(), "int32": pa.int32()}
    fields = [f.partition(":") for f in STRINGS.split()]
    schema = pa.schema([(name, names.get(kind, pa.string())) for name, _, kind in fields])
    assert len(tables()) == 4
    for path in tables():
        file = pq.ParquetFile(path)
        assert file.schema_arrow.equals(schema)
        keys = file.read(["url_surtkey"])["url_surtkey"].to_pylist()
        assert keys == sorted(keys)
        for n in range(file.num_row_groups):
            group = file.metadata.row_group(n)
            assert group.num_rows <= 200
            assert group.column(0).compression == "GZIP"
    assert max(pq.ParquetFile(p).num_row_groups for p in tables()) > 2


def test_index_rows_lead_to_their_records(index: dict, captures: dict) -> None:
    assert len(captures) == len(index) - len(BROKEN)
    for key, (record, payload) in captures.items():
        row, head, http = index[key], record.rec_headers, record.http_headers
        assert record.rec_type == "response"
        assert head.get_header("WARC-Target-URI") == row["url"]
        assert head.get_header("WARC-Payload-Digest") == f"sha1:{digest(payload)}"
        assert row["content_digest"] == digest(payload)
        assert head.get_header("WARC-Identified-Payload-Type") == row["content_mime_detected"]
        assert head.get_header("WARC-Truncated") == row["content_truncated"]
        stamp = row["fetch_time"].strftime("%Y-%m-%dT%H:%M:%SZ")
        assert head.get_header("WARC-Date") == stamp
        assert int(http.get_statuscode()) == row["fetch_status"]
        assert http.get_header("Location") == row["fetch_redirect"]
        assert http.get_header("Content-Length") == str(len(payload))
        assert http.get_header("Content-Encoding") is None
        assert not payload.startswith(b"\x1f\x8b")
        assert (row["subset"] == "crawldiagnostics") == (row["fetch_status"] != 200)


def test_captures_are_request_response_metadata(index: dict) -> None:
    lost = [f"https://attic.example/box/{what}" for what in ("gzip", "cut")]
    damaged = {index[NOW, url]["warc_filename"] for url in lost}
    checked = 0
    for path in sorted(DATA.glob("crawl-data/*/segments/*/*/*.warc.gz")):
        if str(path.relative_to(DATA)) in damaged:
            continue
        with path.open("rb") as stream:
            records = [(r.rec_type, r.rec_headers) for r in ArchiveIterator(stream)]
        kinds = [kind for kind, _ in records]
        assert kinds == ["warcinfo", *["request", "response", "metadata"] * (len(kinds) // 3)]
        ids = [head.get_header("WARC-Record-ID") for _, head in records]
        assert len(set(ids)) == len(ids)
        for n in range(2, len(records), 3):
            assert records[n][1].get_header("WARC-Concurrent-To") == ids[n - 1]
            assert records[n + 1][1].get_header("WARC-Concurrent-To") == ids[n]
            checked += 1
    assert checked > 300


def test_block_digests_hold() -> None:
    for path in sorted(DATA.glob("crawl-data/*/segments/*/w*t/*.gz")):  # WAT and WET
        for raw in members(path.read_bytes()):
            head, block = raw.split(b"\r\n\r\n", 1)
            said = re.search(rb"WARC-Block-Digest: sha1:(\w+)", head)
            if said:
                assert said[1].decode() == digest(block[:-4])


def test_cdx_says_what_the_table_says(index: dict) -> None:
    seen = 0
    for crawl in (NOW, EARLIER):
        path = DATA / f"cc-index/collections/{crawl}/indexes/cdx-00000.gz"
        lines = gzip.decompress(path.read_bytes()).decode().splitlines()
        assert lines == sorted(lines)
        for line in lines:
            key, stamp, fields = line.split(" ", 2)
            c = json.loads(fields)
            row = index[crawl, c["url"]]
            assert (key, stamp) == (row["url_surtkey"], f"{row['fetch_time']:%Y%m%d%H%M%S}")
            assert c["filename"] == row["warc_filename"]
            assert c["offset"] == str(row["warc_record_offset"])
            assert c["length"] == str(row["warc_record_length"])
            assert (c["digest"], c["status"]) == (row["content_digest"], str(row["fetch_status"]))
            assert c.get("languages") == row["content_languages"]
            assert c.get("encoding") == row["content_charset"]
            assert c.get("redirect") == row["fetch_redirect"]
            assert c.get("truncated") == row["content_truncated"]
            seen += 1
    assert seen == len(index)


def test_broken_records_are_broken_as_said(index: dict, by_property: dict) -> None:
    pieces = {}
    for name in BROKEN:
        (line,) = by_property[name]
        row = index[line["crawl"], line["url"]]
        data = (DATA / line["warc_filename"]).read_bytes()
        pieces[name] = data, line["warc_record_offset"], row

    data, start, row = pieces["broken_gzip"]
    assert data[start : start + 2] == b"\x1f\x8b"
    with pytest.raises(zlib.error):
        zlib.decompressobj(31).decompress(data[start : start + row["warc_record_length"]])
    # All that follows is whole: a reader that looks for the next member loses one record only.
    assert len(members(data[start + row["warc_record_length"] :])) > 100

    data, start, row = pieces["broken_digest"]
    (raw,) = members(data[start : start + row["warc_record_length"]])
    record, payload = parse(raw)
    assert record.rec_headers.get_header("WARC-Payload-Digest")[5:] == row["content_digest"]
    assert digest(payload) != row["content_digest"]

    data, start, row = pieces["broken_offset"]
    assert row["warc_record_offset"] == start + 7
    (raw,) = members(data[start : start + row["warc_record_length"]])
    assert digest(parse(raw)[1]) == row["content_digest"]

    data, start, row = pieces["broken_cut"]
    assert row["warc_filename"].endswith("-00002.warc.gz")
    assert start < len(data) < start + row["warc_record_length"]
    cut = zlib.decompressobj(31)
    assert cut.decompress(data[start:]).startswith(b"WARC/1.0\r\nWARC-Type: response")
    assert not cut.eof


def test_wat_and_wet_describe_their_warc(index: dict, captures: dict) -> None:
    files = sorted(DATA.glob("crawl-data/*/segments/*/warc/*.warc.gz"))
    assert len(files) == 4
    titles = texts = 0
    for path in files:
        name = str(path.relative_to(DATA))
        rows = {r["url"]: (k, r) for k, r in index.items() if r["warc_filename"] == name}
        lost = {f"https://attic.example/box/{what}" for what in ("gzip", "cut")}
        readable = set(rows) - lost
        ids = {
            u: captures[k][0].rec_headers.get_header("WARC-Record-ID")
            for u, (k, _) in rows.items()
            if k in captures
        }
        wat = Path(str(path).replace("/warc/", "/wat/").replace(".gz", ".wat.gz"))
        seen = set()
        with wat.open("rb") as stream:
            for record in ArchiveIterator(stream):
                data = record.content_stream().read()
                if record.rec_type == "warcinfo":
                    continue
                doc = json.loads(data)
                payload = doc["Envelope"]["Payload-Metadata"]
                if "HTTP-Response-Metadata" not in payload:
                    continue
                url = record.rec_headers.get_header("WARC-Target-URI")
                key, row = rows[url]
                seen.add(url)
                if key not in captures:
                    continue
                assert record.rec_headers.get_header("WARC-Refers-To") == ids[url]
                assert doc["Container"]["Offset"] == str(row["warc_record_offset"])
                response = payload["HTTP-Response-Metadata"]
                assert response["Response-Message"]["Status"] == str(row["fetch_status"])
                assert response["Entity-Digest"] == f"sha1:{row['content_digest']}"
                if row["content_mime_type"] == "text/html":
                    title = response["HTML-Metadata"]["Head"]["Title"]
                    body = captures[key][1].decode(row["content_charset"], "replace")
                    assert f"<title>{title}</title>" in html.unescape(body)
                    links = {link["url"] for link in response["HTML-Metadata"]["Links"]}
                    assert len(links) > 3 or "smallnotes" in url or "gone-missing" in url
                    assert all(html.escape(link) in body for link in links)
                    titles += 1
        assert seen == readable
        wet = Path(str(path).replace("/warc/", "/wet/").replace(".gz", ".wet.gz"))
        pages = {u for u in readable if rows[u][1]["content_mime_type"] == "text/html"}
        with wet.open("rb") as stream:
            for record in ArchiveIterator(stream):
                text = record.content_stream().read().decode("utf-8")
                if record.rec_type == "warcinfo":
                    continue
                assert record.rec_type == "conversion"
                assert record.rec_headers.get_header("Content-Type") == "text/plain"
                url = record.rec_headers.get_header("WARC-Target-URI")
                pages.remove(url)
                language = record.rec_headers.get_header("WARC-Identified-Content-Language")
                assert language == rows[url][1]["content_languages"]
                assert "<div" not in text and "dataLayer" not in text
                texts += len(text) > 200
        assert not pages
    assert titles > 600 and texts > 600


def test_planted_lines_are_in_the_index(planted: list[dict], index: dict) -> None:
    order = [p["url"] for p in planted]
    assert order == sorted(order)
    for line in planted:
        row = index[line["crawl"], line["url"]]
        assert line["warc_filename"] == row["warc_filename"]
        shift = 7 if line["url"] == "https://attic.example/box/offset" else 0
        assert line["warc_record_offset"] == row["warc_record_offset"] - shift
    kept = {k: r["content_mime_type"] for k, r in index.items() if r["subset"] == "warc"}
    html_pages = {key for key, mime in kept.items() if mime == "text/html"}
    named = {(p["crawl"], p["url"]) for p in planted if p["property"] == "language"}
    spam = {(p["crawl"], p["url"]) for p in planted if p.get("kind") in ("lorem", "symbols")}
    assert named | spam == html_pages and not named & spam


def test_enough_of_everything(captures: dict, by_property: dict) -> None:
    pages = {k: v for k, v in captures.items() if k[0] == NOW}
    bodies = {
        main_text(payload)
        for (_, url), (_, payload) in pages.items()
        if url.startswith("https://www.reelnotes.example/film/") and "/review/" in url
    }
    assert len(bodies) >= 240
    assert len({r["film"] for r in by_property["review"]}) >= 60
    shop = {(r["product"], r["title"]) for r in by_property["product_review"]}
    assert len(shop) >= 120
    sites = [p for p in by_property["language"] if p["crawl"] == NOW]
    own = ("reelnotes", "bramblegate", "mirror", "filmdigest", "tradesnear", "smallnotes", "attic")
    counts = Counter(p["language"] for p in sites if not any(name in p["url"] for name in own))
    assert len([lang for lang, n in counts.items() if n >= 8]) >= 6
    exact = {
        "exact_duplicate": 30, "near_duplicate": 40, "boilerplate_host": 10, "short": 10,
        "mojibake": 6, "wrong_charset": 8, "meta_charset": 3, "redirect": 12, "soft_404": 3,
        "error_page": 6, "truncated": 2, "escape_attempt": 2, "bidi_control": 1, "pdf": 1,
        "image_file": 3, "earlier_capture": 45,
    }  # fmt: skip
    assert {name: len(by_property[name]) for name in exact} == exact
    for name in ("pii", "decoy", "image_caption", "spam", "robots"):
        assert len(by_property[name]) >= 10, name


def test_size() -> None:
    files = [p for p in DATA.rglob("*") if p.is_file() and "__pycache__" not in p.parts]
    assert 2_000_000 < sum(p.stat().st_size for p in files) < 15_000_000
    crawl = f"crawl-data/{NOW}/segments/*/warc/*.gz"
    sizes = [p.stat().st_size for p in DATA.glob(crawl)]
    assert len(sizes) == 3 and max(sizes) < 1.5 * min(sizes)


def test_no_two_reviews_share_a_run_of_twelve_words(captures: dict) -> None:
    owner: dict[tuple, str] = {}
    for (crawl, url), (_, payload) in captures.items():
        if crawl == NOW and "www.reelnotes.example/film/" in url and "/review/" in url:
            if "?" in url or captures[crawl, url][0].http_headers.get_statuscode() != "200":
                continue
            words = re.findall(r"\w+", main_text(payload).lower())
            assert len(words) > 40, url
            for n in range(len(words) - 11):
                run = tuple(words[n : n + 12])
                assert owner.setdefault(run, url) == url, (url, owner[run], run)
    assert len(set(owner.values())) >= 240


def test_review_data_is_on_the_page(captures: dict, by_property: dict) -> None:
    script = re.compile(r'<script type="application/ld\+json">(.*?)</script>', re.S)
    for line in by_property["review"]:
        body = captures[line["crawl"], line["url"]][1].decode()
        (raw,) = script.findall(body)
        data = json.loads(raw)
        assert data["itemReviewed"]["name"] == line["film"]
        assert data["reviewRating"]["ratingValue"] == line["stars"]
        likes, dislikes = (c["userInteractionCount"] for c in data["interactionStatistic"])
        assert (likes, likes + dislikes) == (line["helpful"], line["votes"])
        assert data["reviewBody"] == main_text(body.encode())
        assert f"{line['stars']} out of 5 stars" in body
        assert f"{line['helpful']} of {line['votes']} readers found this" in body
    products = defaultdict(list)
    for line in by_property["product_review"]:
        products[line["crawl"], line["url"]].append(line)
    for key, lines in products.items():
        (raw,) = script.findall(captures[key][1].decode())
        data = json.loads(raw)
        said = {(r["name"], r["reviewRating"]["ratingValue"]) for r in data["review"]}
        assert said == {(line["title"], line["stars"]) for line in lines}
        assert data["aggregateRating"]["reviewCount"] == len(lines)


def test_duplicates_are_as_near_as_said(captures: dict, by_property: dict) -> None:
    for line in by_property["exact_duplicate"]:
        one, other = (captures[line["crawl"], line[key]][1] for key in ("url", "of"))
        assert main_text(one) == main_text(other) != ""
        assert (one == other) is line["same_bytes"]
    found = []
    for line in by_property["near_duplicate"]:
        one, other = (captures[line["crawl"], line[key]][1] for key in ("url", "of"))
        found.append(jaccard(main_text(one), main_text(other)))
        assert found[-1] == pytest.approx(line["jaccard"], abs=1e-4)
    assert 0.60 <= min(found) < 0.66 and 0.95 < max(found) < 0.985
    assert all(sum(low <= j < low + 0.1 for j in found) >= 5 for low in (0.6, 0.7, 0.8, 0.9))
    boiler = [captures[NOW, r["url"]][1] for r in by_property["boilerplate_host"]]
    texts = {main_text(b) for b in boiler}
    assert len(texts) == 10
    assert len({t.split("\n\n")[0] for t in texts} | {t.split("\n\n")[2] for t in texts}) == 2
    for line in by_property["earlier_capture"]:
        old, new = (captures[crawl, line["url"]][1] for crawl in (EARLIER, NOW))
        assert (old == new) is line["same"]
        if not line["same"]:
            assert main_text(new).startswith(main_text(old))


def test_charsets_are_wrong_as_said(captures: dict, index: dict, by_property: dict) -> None:
    for line in by_property["wrong_charset"] + by_property["meta_charset"]:
        record, body = captures[NOW, line["url"]]
        source = main_text(captures[NOW, line["of"]][1])
        assert main_text(body, line["true_charset"]) == source
        if line["property"] == "meta_charset":
            assert f'<meta charset="{line["true_charset"]}">'.encode() in body
            assert "charset" not in record.http_headers.get_header("Content-Type")
            assert index[NOW, line["url"]]["content_charset"].lower() == line["true_charset"]
        else:
            said = line["header_charset"]
            sent = record.http_headers.get_header("Content-Type")
            assert sent == "text/html" + (f"; charset={said}" if said else "")
        with pytest.raises(UnicodeDecodeError):
            body.decode("utf-8")
    for line in by_property["mojibake"]:
        source = main_text(captures[NOW, line["of"]][1])
        text = main_text(captures[NOW, line["url"]][1])
        back = b"".join(
            c.encode("latin-1" if ord(c) in (0x81, 0x8D, 0x8F, 0x90, 0x9D) else "cp1252")
            for c in text.replace("\n", "")
        )
        assert back.decode("utf-8") == source.replace("\n", "") != text.replace("\n", "")


def test_values_are_on_their_pages(captures: dict, index: dict, by_property: dict) -> None:
    for name in ("pii", "decoy"):
        for line in by_property[name]:
            key = line["crawl"], line["url"]
            codec = index[key]["content_charset"]
            source = re.sub(r"<[^>]+>", "", captures[key][1].decode(codec, "replace"))
            assert line["value"] in html.unescape(source), line
    for line in by_property["image_caption"]:
        body = captures[line["crawl"], line["url"]][1].decode()
        assert f'alt="{html.escape(line["alt"])}"' in body
        assert f"<figcaption>{html.escape(line['caption'])}</figcaption>" in body
    for line in by_property["short"]:
        text = main_text(captures[NOW, line["url"]][1])
        assert len(re.findall(r"\w+", text)) == line["words"] < 25
    for line in by_property["escape_attempt"]:
        body = captures[NOW, line["url"]][1].decode()
        assert "<script>alert(1)</script>" in body
        assert "&lt;script&gt;alert(1)&lt;/script&gt;" in body.split("</head>")[1]
        (raw,) = re.findall(r'<script type="application/ld\+json">(.*?)</script>', body, re.S)
        assert "<script>alert(1)</script>" in json.loads(raw)["headline"]
    (line,) = by_property["bidi_control"]
    text = main_text(captures[NOW, line["url"]][1])
    assert all(chr(int(c[2:], 16)) in text for c in line["characters"]) and line["characters"]
    for line in by_property["truncated"]:
        row, body = index[NOW, line["url"]], captures[NOW, line["url"]][1]
        assert row["content_truncated"] == "length" and b"</html>" not in body
        assert len(body) == line["kept_bytes"] < line["of_bytes"]


def test_files_redirects_and_robots(captures: dict, index: dict, by_property: dict) -> None:
    for line in by_property["image_file"]:
        body = captures[NOW, line["url"]][1]
        assert body.startswith(b"\x89PNG")
        assert index[NOW, line["url"]]["content_mime_type"] == "image/png"
        path = re.sub(r"^https://[^/]+", "", line["url"])
        assert f'src="{path}"'.encode() in captures[NOW, line["page"]][1]
    (line,) = by_property["pdf"]
    body = captures[NOW, line["url"]][1]
    assert body.startswith(b"%PDF-") and body.endswith(b"%%EOF\n")
    assert body[int(body.split(b"startxref\n")[1].split()[0]) :].startswith(b"xref")
    for line in by_property["redirect"]:
        row = index[NOW, line["url"]]
        assert row["fetch_status"] == line["status"] in (301, 302)
        assert (NOW, row["fetch_redirect"]) in index
    for line in by_property["error_page"]:
        assert index[NOW, line["url"]]["fetch_status"] == line["status"] >= 404
    for line in by_property["soft_404"]:
        assert index[NOW, line["url"]]["fetch_status"] == 200
    hosts = {r["url_host_name"] for (crawl, _), r in index.items() if crawl == NOW}
    assert {r["url"] for r in by_property["robots"]} == {f"https://{h}/robots.txt" for h in hosts}
    for line in by_property["robots"]:
        body = captures[NOW, line["url"]][1].decode()
        assert re.findall(r"Disallow: (\S+)", body) == line["disallow"]


def test_readme_counts_are_true(planted: list[dict]) -> None:
    table = re.findall(r"^\| `(\w+)` \| (\d+) \|", (DATA / "README.md").read_text("utf-8"), re.M)
    counts = Counter(p["property"] for p in planted)
    assert {name: int(n) for name, n in table} == counts
