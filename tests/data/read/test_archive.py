"""Archives: what is there is found, what is damaged is told, and reading goes on behind it."""

import gzip
import http.server
import io
import random
import threading
import tracemalloc
import zlib
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from conftest import SAMPLE
from support import FORMS, MEMBERS, SITE, arc, bomb, page, record
from warcio.statusandheaders import StatusAndHeaders
from warcio.warcwriter import WARCWriter

from kit.data.read import archive, unpack
from kit.data.read.archive import Damage, Entry, Record
from kit.errors import ArchiveError, RecordError


def scanned(path: Path, data: bytes | None = None) -> tuple[list[Entry], list[Damage]]:
    """Entries and damage of an archive; `data` is written to `path` first."""
    if data is not None:
        path.write_bytes(data)
    found = list(archive.scan_archive(str(path), path.name))
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


@pytest.fixture(params=["isal", "zlib"])
def decoder(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each of the two gzip decoders that the kit may find."""
    module = pytest.importorskip("isal.isal_zlib") if request.param == "isal" else zlib
    monkeypatch.setattr(unpack, "zlib", module)
    monkeypatch.setattr(archive, "zlib", module)


def covered(size: int, ranges: list[tuple[int, int]], what: str) -> None:
    """Fails when a byte of `size` is in none of `ranges`, or one of them is no range of the file."""
    position = 0
    for start, end in sorted(ranges):
        assert 0 <= start <= end <= size, f"{what}: no range: {start}-{end} of {size}"
        assert start <= position, f"{what}: nobody tells of {position}-{start} of {size}"
        position = max(position, end)
    assert position == size, f"{what}: nobody tells of {position}-{size}"


def blanks(data: bytes, padding: bytes, offset: int = 0) -> list[tuple[int, int]]:
    return [(offset + i, offset + i + 1) for i, byte in enumerate(data) if byte in padding]


def told_of(path: Path) -> list[Record | Damage]:
    """What is read of a file, after the proof that every one of its bytes is in a record, a damage or padding.

    For gzip in two steps: each byte of the file is in a member that a strict decoder unpacks, or in a damage (or
    before one, in a member that gave whole records before it broke); each unpacked byte of such members is in a
    record, in a damage told in unpacked bytes, or a line end.
    """
    data, found = path.read_bytes(), list(archive.records(str(path)))
    ranges = [(x.offset, x.offset + x.length, x.wrapping, isinstance(x, Damage)) for x in found]
    if data[:3] != b"\x1f\x8b\x08":
        assert {w for _, _, w, _ in ranges} == {"none"}
        covered(len(data), [(a, b) for a, b, _, _ in ranges] + blanks(data, b"\r\n"), path.name)
        return found
    file = [(a, b) for a, b, w, is_damage in ranges if w == "member" and is_damage]
    plain = [(a, b) for a, b, w, _ in ranges if w == "stream"]
    alone = [(a, b) for a, b, w, is_damage in ranges if w == "member" and not is_damage]
    at = 0
    members: list[list] = []  # start in the file, unpacked bytes so far, where they begin
    for piece in unpack.pieces(io.BytesIO(data))[0]:
        if piece.start is not None:
            members.append([piece.start, b"", at])
        at += len(piece.data)
        if not members or (piece.broken and piece.end is None):
            continue
        members[-1][1] += piece.data
        if piece.end is None:
            continue
        start, text, begin = members.pop()
        if piece.broken and any(a <= start and piece.broken.offset <= b for a, b in file):
            plain.append((begin, at))  # told as a whole
        elif piece.broken:
            file.append((start, piece.broken.offset))
        else:
            strict = zlib.decompressobj(31)
            assert strict.decompress(data[start : piece.end]) == text and strict.eof
            file.append((start, piece.end))
        plain += [
            (begin, begin + len(text.rstrip(b"\r\n"))) for a, b in alone if (a, b) == (start, piece.end)
        ]
        plain += blanks(text, b"\r\n", begin)
    covered(len(data), file + blanks(data, b"\0"), f"{path.name}, file")
    covered(at, plain, f"{path.name}, unpacked")
    return found


def broken(data: bytes, seed: int) -> bytes:
    """`data` with one to three kinds of harm done to it."""
    dice, made = random.Random(seed), bytearray(data)
    for _ in range(dice.randint(1, 3)):
        place = dice.randrange(len(made) + 1)
        stretch = slice(place, place + dice.choice((1, 3, 40, 400)))
        junk = dice.randbytes(dice.choice((1, 9, 90)))
        harm = dice.randrange(8)
        if harm == 0:
            made[stretch] = bytes(b ^ 0x55 for b in made[stretch])
        elif harm == 1:
            del made[stretch]
        elif harm == 2:
            made[place:place] = junk
        elif harm == 3:
            made[place:place] = bytes(made[stretch])
        elif harm == 4:
            made[stretch] = bytes(len(made[stretch]))
        elif harm == 5:
            made[place:place] = dice.choice((b"\n\n", b"\r\n", b"WARC/1.0\r\n", b"\x1f\x8b\x08", bytes(5)))
        elif harm == 6:
            made += made[: dice.randrange(len(made) + 1)]
        else:
            del made[max(place, 9) :]
    return bytes(made)


@pytest.mark.parametrize("name", FORMS)
def test_every_byte_of_a_broken_file_is_told_of(tmp_path: Path, name: str, decoder: None) -> None:
    for seed in range(120):
        path = tmp_path / f"{seed}-{name}"
        path.write_bytes(broken(FORMS[name], seed))
        told_of(path)


@pytest.mark.parametrize("name", ["plain.warc", "bare-lf.warc", "plain.arc"])
def test_how_a_file_is_cut_into_pieces_changes_nothing(
    tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / name
    for seed in range(60):
        path.write_bytes(broken(FORMS[name], seed))
        told = []
        for size in (1 << 16, 37):
            monkeypatch.setattr(unpack, "CHUNK", size)
            monkeypatch.setattr(unpack, "PIECE", size)
            told.append(
                [vars(x) if isinstance(x, Damage) else (x.offset, x.block, x.damage) for x in told_of(path)]
            )
        assert told[0] == told[1], seed


def test_what_packs_well_comes_out_whole(
    tmp_path: Path, decoder: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    body = b"a" * 300_000
    (tmp_path / "x.warc.gz").write_bytes(gzip.compress(record(0, body) + record(1)) + MEMBERS[2])
    for piece in (700, 1 << 12, 1 << 20):
        monkeypatch.setattr(unpack, "PIECE", piece)
        assert [r.payload for r in told_of(tmp_path / "x.warc.gz")] == [body, page(1), page(2)]


def test_a_member_without_its_end_costs_no_other(tmp_path: Path, decoder: None) -> None:
    for lost in range(1, 60):  # the decoder runs on into the next member before it notices
        data = MEMBERS[0] + MEMBERS[1][:-lost] + MEMBERS[2] + MEMBERS[3]
        (tmp_path / "x.warc.gz").write_bytes(data)
        found = [r for r in told_of(tmp_path / "x.warc.gz") if isinstance(r, Record)]
        assert {SITE + "0", SITE + "2", SITE + "3"} <= {r.url for r in found if not r.damage}, lost


def test_every_byte_of_every_real_file_is_told_of(real_data: Path, decoder: None) -> None:
    files = sorted((real_data / "warcs").iterdir())
    assert len(files) == 164
    for path in files:
        assert told_of(path), path.name


def of_warcio(path: Path) -> list[str]:
    """`identity` of what warcio reads before it stops."""
    from warcio.archiveiterator import ArchiveIterator

    found = []
    with path.open("rb") as f:
        try:
            for r in ArchiveIterator(f):
                if (
                    r.rec_headers is not None and r.rec_headers.headers
                ):  # warcio makes a record of two blank bytes
                    url = r.rec_headers.get_header("WARC-Target-URI") or r.rec_headers.get_header("uri")
                    found.append(identity(r.rec_type, r.rec_headers.get_header("WARC-Record-ID"), url))
        except Exception:  # where it stops is the point
            pass
    return found


def of_fastwarc(path: Path) -> list[str]:
    """`identity` of what FastWARC reads before it stops."""
    from fastwarc.warc import ArchiveIterator

    found = []
    with path.open("rb") as f:
        try:
            for r in ArchiveIterator(f, parse_http=False):
                h = r.headers
                found.append(identity(h.get("WARC-Type"), h.get("WARC-Record-ID"), h.get("WARC-Target-URI")))
        except Exception:
            pass
    return found


def identity(kind: str | None, record_id: str | None, url: str | None) -> str:
    """What two readers call the same record: its id, else type and URL, however they treat blanks in them."""
    kind = {"arc_header": "warcinfo", None: "unknown", "": "unknown"}.get(kind, kind)
    name = record_id or f"{kind} {url or ''}"
    return name.replace(" ", "").replace("%20", "").replace("\t", "").strip("<>").lower()


def test_no_real_file_gives_less_than_warcio_or_fastwarc_get(real_data: Path) -> None:
    more: Counter[str] = Counter()
    for path in sorted((real_data / "warcs").iterdir()):
        if not archive.SUFFIX.search(path.name) and ".warc" not in path.name:
            continue
        ours = Counter(
            identity(r.type, r.head.get("warc-record-id"), r.url)
            for r in archive.records(str(path))
            if isinstance(r, Record)
        )
        for reader, theirs in (("warcio", of_warcio(path)), ("FastWARC", of_fastwarc(path))):
            assert len(theirs) <= ours.total(), path.name
            # in bare-LF files FastWARC sees one field that goes on over all lines, or none
            read_well = Counter(x for x in theirs if "\n" not in x and x != "unknown")
            assert not read_well - ours, f"{path.name}: {reader} reads what the kit does not"
            more[reader] += ours.total() > len(theirs)
    assert more["warcio"] >= 15 and more["FastWARC"] >= 30, more


def test_real_records_are_read_back_by_offset(real_data: Path) -> None:
    for path in sorted((real_data / "warcs").iterdir()):
        entries, damage = scanned(path)
        assert entries or damage, path.name
        for entry in entries[:5]:
            try:
                assert entry.content_digest in read(path, entry).digests
            except RecordError as error:
                assert error.reason, path.name


def test_records_may_lie_across_gzip_members(tmp_path: Path) -> None:
    whole = b"".join(record(i) for i in range(4))
    cut = [gzip.compress(whole[i : i + 200]) for i in range(0, len(whole), 200)]  # as bgzip does
    entries, damage = scanned(tmp_path / "x.warc.gz", b"".join(cut))
    assert numbers(entries) == [0, 1, 2, 3] and not damage
    assert [read(tmp_path / "x.warc.gz", e).payload for e in entries] == [page(i) for i in range(4)]


def test_a_length_that_reaches_into_the_next_member_costs_no_record(tmp_path: Path) -> None:
    said = b"Content-Length: %d" % (len(record(1)) - record(1).index(b"HTTP") - 4)
    long = gzip.compress(record(1).replace(said, b"Content-Length: 5000"))
    entries, damage = scanned(tmp_path / "x.warc.gz", MEMBERS[0] + long + MEMBERS[2] + MEMBERS[3])
    assert numbers(entries) == [0, 1, 2, 3]
    assert {e.wrapping for e in entries} == {"member"}
    assert [(d.offset, d.length, d.reason) for d in damage] == [
        (len(MEMBERS[0]), len(long), "record cut short")
    ]


@pytest.mark.parametrize("name", ["plain.warc", "members.warc.gz", "whole.warc.gz"])
def test_records_too_long_to_keep_are_passed_over(
    tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = [record(0), record(1, page(1, 300_000)), record(2)]
    data = {
        "plain.warc": b"".join(made),
        "members.warc.gz": b"".join(gzip.compress(r) for r in made),
        "whole.warc.gz": gzip.compress(b"".join(made)),
    }[name]
    whole = [e.content_digest for e in scanned(tmp_path / name, data)[0]]
    monkeypatch.setattr(archive, "KEEP", 100_000)
    monkeypatch.setattr(unpack, "PIECE", 50_000)
    found = told_of(tmp_path / name)
    assert [r.digest for r in found] == whole
    assert [r.damage for r in found] == [None, None, None]
    assert {r.wrapping for r in found} == {{"m": "member", "p": "none", "w": "stream"}[name[0]]}
    with pytest.raises(RecordError, match="record too large"):
        found[1].payload  # noqa: B018
    assert found[2].payload == page(2)
    (tmp_path / name).write_bytes(data[: len(data) // 2])
    assert [r.damage is None for r in told_of(tmp_path / name) if isinstance(r, Record)] == [True, False]


def test_zstd_is_read_and_a_broken_one_told(tmp_path: Path) -> None:
    import pyarrow as pa

    bodies = [random.Random(i).randbytes(9000) for i in range(4)]
    packed = b"".join(pa.Codec("zstd").compress(record(i, b), asbytes=True) for i, b in enumerate(bodies))
    entries, damage = scanned(tmp_path / "x.warc.zst", packed)
    assert numbers(entries) == [0, 1, 2, 3] and not damage
    assert read(tmp_path / "x.warc.zst", entries[3]).payload == bodies[3]
    entries, damage = scanned(tmp_path / "x.warc.zst", packed[:-20])
    assert numbers(entries)[:3] == [0, 1, 2]
    assert damage[-1].reason.startswith("zstd") and damage[-1].offset + damage[-1].length == len(packed) - 20


def test_a_record_tells_what_its_heads_say(tmp_path: Path) -> None:
    body = gzip.compress(page(5))
    (tmp_path / "x.warc").write_bytes(record(5, body, b"Content-Encoding: gzip\r\nServer: Ours/1\r\n"))
    (tmp_path / "x.arc").write_bytes(arc(6))
    (r,) = archive.records(str(tmp_path / "x.warc"))
    assert (r.type, r.url, r.status, r.mime, r.charset) == ("response", SITE + "5", 200, "text/html", "utf-8")
    assert r.http["server"] == "Ours/1" and r.head["warc-date"] == "2026-01-02T03:04:05Z"
    assert (r.stored, r.payload, r.warc_filename, r.truncated) == (body, page(5), "x.warc", None)
    (r,) = archive.records(str(tmp_path / "x.arc"))
    assert (r.type, r.url, r.status, r.payload) == ("response", SITE + "6", 200, page(6))


def test_damage_of_a_record_is_on_the_record(tmp_path: Path) -> None:
    flipped = bytearray(MEMBERS[1])
    flipped[-8:-4] = bytes(b ^ 0xFF for b in flipped[-8:-4])  # nothing but the checksum tells
    (tmp_path / "x.warc.gz").write_bytes(MEMBERS[0] + bytes(flipped) + MEMBERS[2])
    good, bad, told, after = archive.records(str(tmp_path / "x.warc.gz"))
    assert (good.damage, bad.damage, after.damage) == (None, "gzip member corrupt", None)
    assert (told.offset, told.length) == (len(MEMBERS[0]), len(flipped))
    with pytest.raises(RecordError, match="gzip member corrupt"):
        bad.payload  # noqa: B018
    assert after.payload == page(2)
    (tmp_path / "x.warc").write_bytes(record(0) + record(1)[:-50])
    _, cut, told = archive.records(str(tmp_path / "x.warc"))
    assert (cut.damage, cut.truncated, told.reason) == ("record cut short",) * 3


def test_over_https_a_file_is_read_once_from_front_to_back(tmp_path: Path) -> None:
    data = b"".join(gzip.compress(record(i, random.Random(i).randbytes(40_000))) for i in range(60))
    asked: list[tuple[int, int]] = []

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            start, end = (int(x) for x in self.headers["Range"].removeprefix("bytes=").split("-"))
            part = data[start : end + 1]
            asked.append((start, len(part)))
            self.send_response(206)
            self.send_header("Content-Range", f"bytes {start}-{start + len(part) - 1}/{len(data)}")
            self.send_header("Content-Length", str(len(part)))
            self.end_headers()
            self.wfile.write(part)

        def log_message(self, *_: object) -> None:
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        found = list(archive.records(f"http://127.0.0.1:{server.server_port}/x.warc.gz"))
        server.shutdown()
    assert len(found) == 60 and not any(isinstance(x, Damage) for x in found)
    read_in = [x for x in asked if x[1] > 1]  # one byte is asked for the file's size
    assert len(read_in) <= 2 and sum(size for _, size in read_in) == len(data)


def test_a_file_that_is_not_there_is_a_clear_error(tmp_path: Path) -> None:
    with pytest.raises(ArchiveError, match="nowhere.warc' cannot be opened"):
        list(archive.records(str(tmp_path / "nowhere.warc")))
