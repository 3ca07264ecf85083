"""Archives: what is there is found, what is damaged is told, and reading goes on behind it."""

import gzip
import io
import random
import tracemalloc
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from conftest import SAMPLE
from warcio.statusandheaders import StatusAndHeaders
from warcio.warcwriter import WARCWriter

from kit.data import archive
from kit.data.archive import ArchiveError, Damage, Entry, RecordError

SITE = "http://site.example/"


def page(number: int, size: int = 300) -> bytes:
    """A page of `size` letters that do not compress to nothing."""
    return b"<html>" + bytes(random.Random(number).choices(b"abcdefghij ", k=size)) + b"</html>"


def record(number: int, body: bytes | None = None, head: bytes = b"") -> bytes:
    """One WARC response, written out by hand so that a test can break it."""
    http = b"HTTP/1.1 200 OK\r\nContent-Type: text/html; charset=utf-8\r\n" + head + b"\r\n"
    block = http + (page(number) if body is None else body)
    return (
        b"WARC/1.0\r\nWARC-Type: response\r\nWARC-Date: 2026-01-02T03:04:05Z\r\n"
        b"WARC-Target-URI: %s%d\r\nContent-Type: application/http; msgtype=response\r\n"
        b"Content-Length: %d\r\n\r\n%s\r\n\r\n" % (SITE.encode(), number, len(block), block)
    )


def arc(number: int) -> bytes:
    """One ARC record."""
    block = b"HTTP/1.1 200 OK\r\nContent-Type: text/html\r\n\r\n" + page(number)
    return b"%s%d 192.0.2.1 20260102030405 text/html %d\n%s\n" % (SITE.encode(), number, len(block), block)


def scanned(path: Path, data: bytes | None = None) -> tuple[list[Entry], list[Damage]]:
    """Entries and damage of an archive; `data` is written to `path` first."""
    if data is not None:
        path.write_bytes(data)
    found = list(archive.scan(str(path), path.name))
    return [x for x in found if isinstance(x, Entry)], [x for x in found if isinstance(x, Damage)]


def read(path: Path, entry: Entry, max_bytes: int = 1 << 24) -> archive.Page:
    """The page of a scanned entry."""
    with path.open("rb") as raw:
        f = archive.unpacked(raw) if entry.wrapping == "stream" else raw
        data = archive.read_bytes(
            f, entry.warc_record_offset, entry.warc_record_length, entry.wrapping, max_bytes
        )
    return archive.parse_page(data, max_bytes)


def numbers(entries: list[Entry]) -> list[int]:
    return [int(e.url.removeprefix(SITE)) for e in entries]


MEMBERS = [gzip.compress(record(i)) for i in range(4)]
FORMS = {
    "plain.warc": b"".join(record(i) for i in range(4)),
    "members.warc.gz": b"".join(MEMBERS),
    "whole.warc.gz": gzip.compress(b"".join(record(i) for i in range(4))),
    "plain.arc": b"".join(arc(i) for i in range(4)),
    "members.arc.gz": b"".join(gzip.compress(arc(i)) for i in range(4)),
    "whole.arc.gz": gzip.compress(b"".join(arc(i) for i in range(4))),
    "bare-lf.warc": b"".join(record(i).replace(b"\r\n", b"\n", 6) for i in range(4)),
}


@pytest.mark.parametrize("name", FORMS)
def test_every_form_is_scanned_and_read_back(tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    entries, damage = scanned(path, FORMS[name])
    assert not damage
    assert numbers(entries) == [0, 1, 2, 3]
    for number, entry in enumerate(entries):
        assert (entry.fetch_status, entry.content_mime_detected) == (200, "text/html")
        assert entry.fetch_time.isoformat() == "2026-01-02T03:04:05"
        found = read(path, entry)
        assert found.payload == page(number)
        assert found.url == entry.url
        assert entry.content_digest in found.digests


@pytest.mark.parametrize("kind", ["warcinfo", "request", "response", "conversion", "metadata", "revisit"])
def test_what_warcio_writes_is_scanned(tmp_path: Path, kind: str) -> None:
    path = tmp_path / "x.warc.gz"
    with path.open("wb") as f:
        writer = WARCWriter(f, gzip=True)
        http = StatusAndHeaders("200 OK", [("Content-Type", "text/html")], protocol="HTTP/1.1")
        needs_http = kind in ("response", "revisit", "request")
        if kind == "warcinfo":
            made = writer.create_warcinfo_record("x.warc.gz", {"software": "test"})
        else:
            made = writer.create_warc_record(
                SITE + "7",
                kind,
                payload=io.BytesIO(b"" if kind == "revisit" else page(7)),
                http_headers=http if needs_http else None,
            )
        writer.write_record(made)
    ([entry], damage) = scanned(path)
    assert not damage
    assert entry.record_type == kind
    assert entry.url == ("" if kind == "warcinfo" else SITE + "7")


def test_flipped_bytes_in_a_member_lose_that_member_only(tmp_path: Path) -> None:
    broken = bytearray(MEMBERS[1])
    broken[60:64] = bytes(b ^ 0xFF for b in broken[60:64])
    entries, damage = scanned(tmp_path / "x.warc.gz", MEMBERS[0] + bytes(broken) + MEMBERS[2] + MEMBERS[3])
    assert {0, 2, 3} <= set(numbers(entries))
    assert damage[0].offset == len(MEMBERS[0])
    assert "gzip" in damage[0].reason


def test_garbage_between_members_is_told_by_offset(tmp_path: Path) -> None:
    entries, damage = scanned(tmp_path / "x.warc.gz", MEMBERS[0] + b"\x00garbage" * 9 + MEMBERS[1])
    assert numbers(entries) == [0, 1]
    assert [(d.offset, d.reason) for d in damage] == [(len(MEMBERS[0]), "not gzip")]


def test_garbage_between_plain_records_is_told_by_offset(tmp_path: Path) -> None:
    entries, damage = scanned(tmp_path / "x.warc", record(0) + b"no head at all\r\n" * 9 + record(1))
    assert numbers(entries) == [0, 1]
    assert [(d.offset, d.reason) for d in damage] == [(len(record(0)), "no record head")]
    assert read(tmp_path / "x.warc", entries[0]).payload == page(0)


@pytest.mark.parametrize("name", ["plain.warc", "members.warc.gz", "whole.warc.gz", "plain.arc"])
def test_a_file_cut_at_the_end_keeps_what_came_before(tmp_path: Path, name: str) -> None:
    entries, damage = scanned(tmp_path / name, FORMS[name][:-150])
    assert numbers(entries)[:3] == [0, 1, 2]
    assert len(damage) == 1
    assert "cut short" in damage[0].reason


@pytest.mark.parametrize("said", [b"5", b"777", b"99999999999999999999"])
def test_a_wrong_content_length_is_told_and_the_next_record_read(tmp_path: Path, said: bytes) -> None:
    length = b"Content-Length: %d" % (len(record(1)) - record(1).index(b"HTTP") - 4)
    assert length in record(1)
    wrong = record(1).replace(length, b"Content-Length: " + said)
    entries, damage = scanned(tmp_path / "x.warc", record(0) + wrong + record(2) + record(3))
    assert {0, 2, 3} <= set(numbers(entries))
    assert damage and damage[0].offset == len(record(0))


@pytest.mark.parametrize("length", [b"", b"-5", "²".encode(), b"9" * 5000, b"12x"])
def test_a_content_length_that_is_no_number_is_damage(tmp_path: Path, length: bytes) -> None:
    head = b"WARC/1.0\r\nWARC-Type: response\r\nContent-Length: " + length + b"\r\n\r\nbody\r\n\r\n"
    entries, damage = scanned(tmp_path / "x.warc", record(0) + head + record(1))
    assert {0, 1} <= {int(e.url.removeprefix(SITE)) for e in entries if e.url}
    assert damage[0].offset == len(record(0))


@pytest.mark.parametrize("data", [b"", b"\r\n\r\n", b"no archive at all", b"\x1f\x8b\x08", b"WARC/1.0"])
def test_a_file_without_a_record_is_damage_at_its_start(tmp_path: Path, data: bytes) -> None:
    entries, damage = scanned(tmp_path / "x.warc.gz", data)
    assert not entries
    assert damage[0].offset == 0


@pytest.mark.timeout(30)
@pytest.mark.parametrize("data", [b"\x1f\x8b\x08" * 30_000, b"WARC/1.0\r\n" * 3_000, b"WARC/1" * 10_000])
def test_a_file_of_nothing_but_heads_ends_in_bounded_time(tmp_path: Path, data: bytes) -> None:
    _, damage = scanned(tmp_path / "x.warc", data)
    assert damage


@contextmanager
def memory_below(limit: float) -> Iterator[None]:
    """Fails when the block needs more than `limit` bytes at once."""
    tracemalloc.start()
    try:
        yield
        assert tracemalloc.get_traced_memory()[1] < limit
    finally:
        tracemalloc.stop()


def bomb(size: int) -> bytes:
    """A gzip member of one response whose page is `size` zero bytes."""
    pack = zlib.compressobj(9, zlib.DEFLATED, 31)
    head = record(0, b"").replace(b"Content-Length: 59", b"Content-Length: %d" % (size + 59))
    assert b"%d" % (size + 59) in head
    parts = [pack.compress(head.removesuffix(b"\r\n\r\n"))]
    parts += [pack.compress(bytes(1 << 20)) for _ in range(size >> 20)]
    return b"".join([*parts, pack.compress(b"\r\n\r\n"), pack.flush()])


@pytest.mark.timeout(60)
def test_a_gzip_bomb_is_refused_within_memory(tmp_path: Path) -> None:
    path = tmp_path / "x.warc.gz"
    path.write_bytes(bomb(400 << 20))
    with memory_below(200e6):
        entries, damage = scanned(path)
        assert len(entries) == 1 and not damage
        with pytest.raises(RecordError, match="record too large"):
            read(path, entries[0], max_bytes=8_000_000)


def encoded(coding: bytes, body: bytes) -> bytes:
    return record(0, body, b"Content-Encoding: " + coding + b"\r\n")


def packed(body: bytes, coding: str) -> bytes:
    import brotli

    raw = zlib.compressobj(wbits=-15)
    return {
        "gzip": lambda: gzip.compress(body),
        "deflate": lambda: zlib.compress(body),
        "br": lambda: brotli.compress(body, quality=4),
        "raw deflate": lambda: raw.compress(body) + raw.flush(),
        "identity": lambda: body,
    }[coding]()


@pytest.mark.parametrize("coding", ["gzip", "deflate", "br", "raw deflate", "identity"])
def test_content_encodings_are_undone(coding: str) -> None:
    head = coding.removeprefix("raw ").encode()
    assert archive.parse_page(encoded(head, packed(page(0, 50_000), coding)), 1 << 20).payload == page(
        0, 50_000
    )
    # many crawlers store the page unpacked and leave the head as it was
    assert archive.parse_page(encoded(head, page(0, 50_000)), 1 << 20).payload == page(0, 50_000)


@pytest.mark.parametrize("coding", ["gzip", "deflate", "br", "raw deflate"])
def test_an_encoding_bomb_is_refused_within_memory(coding: str) -> None:
    body = packed(bytes(200 << 20), coding)
    raw = encoded(coding.removeprefix("raw ").encode(), body)
    with memory_below(30e6), pytest.raises(RecordError, match="page too large"):
        archive.parse_page(raw, 4_000_000)


@pytest.mark.parametrize("coding", ["gzip", "br"])
def test_a_damaged_encoding_is_an_error_and_no_text(coding: str) -> None:
    body = bytearray(packed(page(0, 50_000), coding))
    body[9_000:9_040] = bytes(b ^ 0xFF for b in body[9_000:9_040])
    with pytest.raises(RecordError, match="content encoding"):
        archive.parse_page(encoded(coding.encode(), bytes(body)), 1 << 20)


@pytest.mark.parametrize("coding", ["gzip", "br"])
def test_an_encoding_that_breaks_off_gives_what_it_holds_and_says_so(coding: str) -> None:
    body = packed(page(0, 50_000), coding)
    whole = archive.parse_page(encoded(coding.encode(), body), 1 << 20)
    cut = archive.parse_page(encoded(coding.encode(), body[: len(body) // 2]), 1 << 20)
    assert whole.truncated is None and cut.truncated == "encoding cut short"
    assert cut.payload and page(0, 50_000).startswith(cut.payload)


def test_an_unknown_encoding_is_an_error_and_no_text() -> None:
    with pytest.raises(RecordError, match="content encoding zstd"):
        archive.parse_page(encoded(b"zstd", b"\x28\xb5\x2f\xfd\x04\x58" + bytes(90)), 1 << 20)


def test_chunks_are_undone() -> None:
    body = b"".join(b"%x\r\n%s\r\n" % (len(x), x) for x in (page(0)[:100], page(0)[100:])) + b"0\r\n\r\n"
    for name in (b"chunked", b"Chunked"):
        raw = record(0, body, b"Transfer-Encoding: " + name + b"\r\n")
        assert archive.parse_page(raw, 1 << 20).payload == page(0)


def test_a_page_larger_than_allowed_is_refused() -> None:
    with pytest.raises(RecordError, match="page too large"):
        archive.parse_page(record(0, page(0, 5000)), 4999)


@pytest.mark.parametrize("raw", [b"", b"x", b"WARC/1.0\r\n", b"HTTP/1.1 200 OK\r\n\r\n", bytes(100)])
def test_bytes_that_are_no_record_are_a_named_error(raw: bytes) -> None:
    with pytest.raises(RecordError):
        archive.parse_page(raw, 1 << 20)


def test_folders_are_searched_and_missing_paths_named(tmp_path: Path) -> None:
    for name in ("a.warc.gz", "sub/b.arc", "c.txt", "d.cdx.gz", "e.warc.gz.cdx", "f.warc.wat.gz"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(b"")
    found = archive.list_archives([str(tmp_path), str(tmp_path / "a.warc.gz")])
    assert [Path(f).name for f in found] == ["a.warc.gz", "f.warc.wat.gz", "b.arc"]
    with pytest.raises(ArchiveError, match="nowhere"):
        archive.list_archives(["/nowhere/x.warc"])
    (tmp_path / "empty").mkdir()
    with pytest.raises(ArchiveError, match="no WARC"):
        archive.list_archives([str(tmp_path / "empty")])


def test_the_sample_scans_as_its_index_says(crawl_planted: dict) -> None:
    for path in sorted(SAMPLE.glob("crawl-data/CC-SAMPLE-2026-05/segments/*/*/*.gz")):
        entries, damage = scanned(path)
        name = str(path.relative_to(SAMPLE))
        broken = [
            x["warc_record_offset"]
            for key in ("broken_gzip", "broken_cut")
            for x in crawl_planted[key]
            if x["warc_filename"] == name
        ]
        assert [d.offset for d in damage] == broken
        assert entries


@pytest.mark.timeout(120)
def test_real_archives_never_crash_the_scan(real_data: Path) -> None:
    for path in sorted((real_data / "warcs").iterdir()):
        if archive.SUFFIX.search(path.name):
            entries, damage = scanned(path)
            assert entries or damage, path.name
            for entry in entries[:5]:
                try:
                    assert entry.content_digest in read(path, entry).digests
                except RecordError as error:
                    assert error.reason, path.name
