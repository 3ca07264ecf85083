"""Web archives: WARC, WAT, WET and ARC, plain or gzipped, scanned whole or read by (offset, length).

Damage is never silent: a scan reports it by file, offset and reason and goes on at the next gzip member or
record head; a single record that cannot be read raises `RecordError` with a named reason.

Framing (where records begin and end) is done here, because the libraries stop at the first damage and lose
the rest of the file. Content encodings are undone here too: warcio hands on what it cannot unpack.
"""

from __future__ import annotations

import base64
import hashlib
import io
import re
import tempfile
import zlib
from collections.abc import Iterator
from dataclasses import dataclass, replace
from datetime import datetime
from typing import BinaryIO

import brotli
import fsspec
from warcio.bufferedreaders import ChunkedDataReader

from kit import KitError, resolve

GZIP = b"\x1f\x8b\x08"
SUFFIX = re.compile(r"\.(warc|wat|wet|arc)(\.(warc|wat|wet|txt))*(\.gz)?(\.open)?$", re.IGNORECASE)
HEAD_START = re.compile(rb"WARC/\d|[a-z][\w+.-]*:\S* (?:\S+ ){2,8}\d{1,18}\r?\n", re.IGNORECASE)
NEXT_HEAD = re.compile(rb"\n(?=WARC/\d|[a-z][\w+.-]*:\S* [\d.]+ \d{14} \S+ \d{1,18}\r?\n)", re.IGNORECASE)
HEAD_END = re.compile(rb"\r?\n\r?\n")
BINARY = re.compile(rb"[\x00-\x08\x0e-\x1a\x1c-\x1f]")
ZLIB_BITS = {"gzip": (31,), "x-gzip": (31,), "deflate": (15, -15)}
"""Window bits to try for each content encoding that zlib knows; servers send `deflate` with and without a head."""
HEAD_BYTES = 1 << 16
IN_MEMORY_BYTES = 64 << 20
PAGE_RECORDS = ("response", "conversion", "resource")
"""Record types that can hold a page; the rest of an archive (request, metadata, …) is about them."""


class ArchiveError(KitError):
    """An archive that cannot be opened at all."""


class RecordError(Exception):
    """One record that cannot be read; `reason` is the name it is counted under."""

    def __init__(self, reason: str) -> None:
        super().__init__(reason)
        self.reason = reason


@dataclass(frozen=True)
class Entry:
    """One record as an index row sees it; offset and length in bytes of the file.

    `wrapping`: `member` (a gzip member of its own), `none` (plain), or `stream` (several records in one gzip
    member: offset and length count decompressed bytes, so reading one means unpacking the file).
    """

    warc_filename: str
    warc_record_offset: int
    warc_record_length: int
    wrapping: str
    record_type: str
    url: str
    fetch_time: datetime | None
    fetch_status: int | None
    content_mime_detected: str
    content_digest: str
    content_truncated: str | None


@dataclass(frozen=True)
class Damage:
    """Where reading broke off; bytes from `offset` up to the next record are not read."""

    warc_filename: str
    offset: int
    reason: str


@dataclass(frozen=True)
class Page:
    """A record's page: HTTP body decoded, with what its heads say about it."""

    url: str
    record_type: str
    status: int
    mime: str
    charset: str | None
    fetch_time: datetime | None
    payload: bytes
    digests: tuple[str, str]
    """SHA-1 of the HTTP body as stored (an index's digest) and of the record's block (a scan's)."""
    truncated: str | None


@dataclass(frozen=True)
class _Frame:
    start: int
    end: int
    head: dict[str, str]
    body: int
    """Where the block after the record's head begins."""


def list_archives(paths: list[str]) -> list[str]:
    """Absolute paths of the archive files among `paths`, folders searched through; raises `ArchiveError`."""
    found: list[str] = []
    for path in paths:
        fs, root = fsspec.core.url_to_fs(resolve(path))
        if fs.isdir(root):
            inside = [f for f in fs.find(root) if SUFFIX.search(f)]
            if not inside:
                raise ArchiveError(f"no WARC, WAT, WET or ARC file in folder '{path}'")
            found += [fs.unstrip_protocol(f) if "://" in path else f for f in inside]
        elif fs.exists(root):
            found.append(resolve(path))
        else:
            raise ArchiveError(f"archive '{path}' does not exist")
    return sorted(set(found))


def scan(path: str, name: str) -> Iterator[Entry | Damage]:
    """Every record of one archive in file order, and every place where reading broke off.

    `name` becomes the file's identity in the index (`warc_filename`). An empty file yields one `Damage`.
    """
    with fsspec.open(resolve(path), "rb") as f:
        head = f.read(3)
        size = f.seek(0, io.SEEK_END)
        found = None
        for found in _scan_gzip(f, size, name) if head == GZIP else _scan_plain(f, size, name):
            yield found
        if found is None:
            yield Damage(name, 0, "no record in file" if head else "empty file")


def _scan_plain(f: BinaryIO, size: int, name: str) -> Iterator[Entry | Damage]:
    for found in _frames(f, size):
        yield (
            replace(found, warc_filename=name)
            if isinstance(found, Damage)
            else _entry(f, found, name, "none")
        )


def _scan_gzip(f: BinaryIO, size: int, name: str) -> Iterator[Entry | Damage]:
    position, unpacked = 0, 0
    while position < size:
        with tempfile.SpooledTemporaryFile(IN_MEMORY_BYTES) as member:
            length, problem = _unpack_member(f, position, member)
            inside = member.tell()
            found = list(_frames(member, inside))
            alone = sum(isinstance(x, _Frame) for x in found) == 1
            for item in found:
                if isinstance(item, Damage):
                    # the zlib error below is the cause of a record cut short; telling it once is enough
                    if problem is None:
                        yield Damage(name, position, item.reason)
                    continue
                entry = _entry(member, item, name, "member" if alone else "stream")
                if alone:
                    yield replace(entry, warc_record_offset=position, warc_record_length=length)
                else:
                    yield replace(entry, warc_record_offset=unpacked + item.start)
            unpacked += inside
        if problem:
            yield Damage(name, position, problem)
            length = _find(f, position + 1, size, GZIP) - position
        position += length


def _unpack_member(f: BinaryIO, start: int, out: BinaryIO) -> tuple[int, str | None]:
    """Decompress the gzip member at `start` into `out`; returns its compressed length and what went wrong."""
    f.seek(start)
    unzip, read = zlib.decompressobj(31), 0
    try:
        while not unzip.eof:
            block = f.read(1 << 16)
            if not block:
                return read, "gzip member cut short"
            read += len(block)
            out.write(unzip.decompress(block))
    except zlib.error as error:
        return read, "not gzip" if "header" in str(error) else "gzip member corrupt"
    return read - len(unzip.unused_data), None


def _frames(f: BinaryIO, size: int) -> Iterator[_Frame | Damage]:
    """Records of plain bytes: head, `Content-Length`, end; resynchronises at the next head after damage."""
    position = 0
    while position < size:
        f.seek(position)
        window = f.read(HEAD_BYTES)
        blank = len(window) - len(window.lstrip(b"\r\n"))
        if blank == len(window):
            position += blank
            continue
        position += blank
        frame = _frame(window[blank:], position)
        if isinstance(frame, Damage):
            yield frame
            position = _find_head(f, position, size)
            continue
        if frame.end > size or not _after(f, frame.end, size):
            # a wrong Content-Length: the record ends where the next head begins, or the file does
            found = _find_head(f, frame.body - 1, size)
            yield Damage("", position, "record cut short" if found == size else "wrong Content-Length")
            yield replace(frame, end=found)
            position = found
            continue
        yield frame
        position = frame.end


def _frame(window: bytes, position: int) -> _Frame | Damage:
    """Parse one record's head at the start of `window`."""
    if not HEAD_START.match(window):
        return Damage("", position, "no record head")
    if window[:5].upper() != b"WARC/":
        line, _, _ = window.partition(b"\n")
        url, *_, date, mime, length = _arc_fields(line)
        head = {"warc-type": "response", "warc-target-uri": url, "warc-date": date, "content-type": mime}
        if url.startswith("filedesc:"):
            head["warc-type"] = "warcinfo"
        body = position + len(line) + 1
        return _Frame(position, body + int(length), head | {"content-length": length, "arc": "1"}, body)
    end = HEAD_END.search(window)
    if not end:
        return Damage("", position, "record head without end")
    head = _fields(window[: end.start()])
    length = head.get("content-length", "")
    if not re.fullmatch("[0-9]{1,18}", length):
        return Damage("", position, "no valid Content-Length")
    body = position + end.end()
    return _Frame(position, body + int(length), head, body)


def _fields(head: bytes) -> dict[str, str]:
    """The fields of a WARC or HTTP head by lower-case name; of a name that comes twice, the first."""
    try:
        text = head.decode()
    except UnicodeDecodeError:
        text = head.decode("latin-1")
    found: dict[str, str] = {}
    for line in re.sub(r"\r?\n[ \t]+", " ", text).split("\n")[1:]:  # folded lines belong to the one before
        key, colon, value = line.partition(":")
        if colon:
            found.setdefault(key.strip().lower(), value.strip())
    return found


def _arc_fields(line: bytes) -> tuple[str, str, str, str]:
    """URL, date, MIME and length of an ARC head: `URL IP date mime length`, or version 2 with more between."""
    fields = line.decode("latin-1").strip().split(" ")
    return fields[0], fields[2], fields[3], fields[-1]


def _after(f: BinaryIO, end: int, size: int) -> bool:
    """Whether a record that ends at `end` does end there: the two line ends, another head or nothing follow."""
    if end >= size:
        return True
    f.seek(end)
    tail = f.read(HEAD_BYTES)
    rest = tail.lstrip(b"\r\n")
    return not rest or bool(HEAD_END.match(tail) or HEAD_START.match(rest))


def _find_head(f: BinaryIO, start: int, size: int) -> int:
    """Position of the next record head after `start`, or `size`."""
    return _search(f, start, size, NEXT_HEAD)


def _find(f: BinaryIO, start: int, size: int, needle: bytes) -> int:
    """Position of the next `needle` at or after `start`, or `size`."""
    return _search(f, start, size, re.compile(re.escape(needle)))


def _search(f: BinaryIO, start: int, size: int, pattern: re.Pattern[bytes]) -> int:
    overlap = 256
    position = start
    while position < size:
        f.seek(position)
        block = f.read(HEAD_BYTES)
        found = pattern.search(block)
        if found:
            return position + found.end() if pattern is NEXT_HEAD else position + found.start()
        position += max(len(block) - overlap, 1) if len(block) > overlap else overlap
    return size


def _entry(f: BinaryIO, frame: _Frame, name: str, wrapping: str) -> Entry:
    """Index row of one record; its digest is that of the whole block, for want of the crawler's own."""
    end = min(frame.end, frame.body + int(frame.head["content-length"]))
    f.seek(frame.body)
    start = f.read(min(end - frame.body, HEAD_BYTES))
    status, mime, body = _content(frame.head, start)[:3]
    record_type = _record_type(frame.head)
    mime = frame.head.get("warc-identified-payload-type") or mime
    return Entry(
        warc_filename=name,
        warc_record_offset=frame.start,
        warc_record_length=frame.end - frame.start,
        wrapping=wrapping,
        record_type=record_type,
        url=_url(frame.head),
        fetch_time=parse_time(frame.head.get("warc-date")),
        fetch_status=status,
        content_mime_detected=_sniffed(mime, body),
        content_digest=_sha1_of(f, frame.body, end),
        content_truncated=frame.head.get("warc-truncated"),
    )


def _record_type(head: dict[str, str]) -> str:
    return head.get("warc-type", "unknown").lower()


def _url(head: dict[str, str]) -> str:
    return head.get("warc-target-uri", "").strip("<>")


def _content(head: dict[str, str], block: bytes) -> tuple[int | None, str, bytes, dict[str, str]]:
    """Status, content type, body (still chunked or encoded) and HTTP fields of a record's block."""
    record_type = _record_type(head)
    if head.get("arc"):
        is_http = head["warc-target-uri"].startswith("http")
    else:
        is_http = record_type == "response" and "gemini" not in head.get("content-type", "")
    status = 200 if record_type in PAGE_RECORDS else None
    if not is_http:
        return status, head.get("content-type", ""), block, {}
    if not block.startswith(b"HTTP/"):
        return status, "", block, {}
    end = HEAD_END.search(block)
    lines, body = (block[: end.start()], block[end.end() :]) if end else (block, b"")
    told = re.search(rb"\s(\d{3})\b", lines.partition(b"\n")[0])
    fields = _fields(lines)
    return int(told[1]) if told else status, fields.get("content-type", ""), body, fields


def _sniffed(content_type: str, body: bytes) -> str:
    """MIME type; content wins over a head that claims nothing or something vague (a tenth of real pages does)."""
    mime = content_type.split(";")[0].strip().lower()
    if mime in ("", "application/octet-stream", "text/plain", "unk", "no-type", "application/http"):
        start = body[:1024].lower()
        if b"<html" in start or b"<!doctype html" in start:
            return "text/html"
    return mime


def _sha1_of(f: BinaryIO, start: int, end: int) -> str:
    """`sha1` of a stretch of a file, read piece by piece."""
    f.seek(start)
    digest = hashlib.sha1()
    while start < end and (block := f.read(min(end - start, 1 << 20))):
        digest.update(block)
        start += len(block)
    return base64.b32encode(digest.digest()).decode()


def sha1(data: bytes) -> str:
    """SHA-1 in base 32, as WARC digests and the index write it."""
    return base64.b32encode(hashlib.sha1(data).digest()).decode()


def parse_time(text: str | None) -> datetime | None:
    """WARC-Date (ISO 8601) or ARC date (14 digits) as naive UTC, or None."""
    if not text:
        return None
    digits = re.sub(r"\D", "", text.split(".")[0])[:14]
    try:
        return datetime.strptime(digits.ljust(14, "0"), "%Y%m%d%H%M%S")
    except ValueError:
        return None


def read_bytes(f: BinaryIO, offset: int, length: int, wrapping: str, max_bytes: int) -> bytes:
    """One record's plain bytes out of an open archive; raises `RecordError`.

    `max_bytes` bounds a record and what a gzip member may unpack to. `stream` wrapping takes the unpacked file as `f`.
    """
    if length > max_bytes:
        raise RecordError("record too large")
    f.seek(offset)
    data = f.read(length)
    if len(data) < length:
        raise RecordError("range past end of file")
    if wrapping == "member" or (wrapping == "" and data[:3] == GZIP):
        unzip = zlib.decompressobj(31)
        try:
            plain = unzip.decompress(data, max_bytes)
        except zlib.error as error:
            raise RecordError("no gzip member here" if "header" in str(error) else "gzip corrupt") from None
        if not unzip.eof:
            raise RecordError("record too large" if len(plain) >= max_bytes else "gzip cut short")
        return plain
    return data


def unpacked(f: BinaryIO) -> BinaryIO:
    """The whole file decompressed into a temporary one, as far as it goes, for `stream` wrapping."""
    size = f.seek(0, io.SEEK_END)
    out, position = tempfile.TemporaryFile(), 0  # noqa: SIM115 (the caller closes it)
    while position < size:
        length, problem = _unpack_member(f, position, out)
        position = _find(f, position + 1, size, GZIP) if problem else position + length
    return out


def parse_page(raw: bytes, max_bytes: int) -> Page:
    """The page in one record's plain bytes; raises `RecordError` with the reason to count.

    HTTP chunks and content encodings are undone, up to `max_bytes` of page.
    """
    frame = _frame(raw[:HEAD_BYTES], 0)
    if isinstance(frame, Damage):
        raise RecordError(frame.reason)
    block = raw[frame.body : frame.end]
    status, content_type, body, fields = _content(frame.head, block)
    payload, cut = _decoded(body, fields, max_bytes)
    charset = re.search(r"charset\s*=\s*[\"']?([\w.:-]+)", content_type, re.IGNORECASE)
    return Page(
        url=_url(frame.head),
        record_type=_record_type(frame.head),
        status=status or 0,
        mime=_sniffed(content_type, payload),
        charset=charset[1] if charset else None,
        fetch_time=parse_time(frame.head.get("warc-date")),
        payload=payload,
        digests=(sha1(body), sha1(block)),
        truncated=frame.head.get("warc-truncated") or ("encoding cut short" if cut else None),
    )


def _decoded(body: bytes, fields: dict[str, str], max_bytes: int) -> tuple[bytes, bool]:
    """An HTTP body without chunks and content encodings, and whether an encoding broke off; raises `RecordError`."""
    cut = False
    if "chunked" in fields.get("transfer-encoding", "").lower():
        body = ChunkedDataReader(io.BytesIO(body)).read()
    for coding in reversed(re.findall(r"[\w-]+", fields.get("content-encoding", "").lower())):
        body, broke_off = _unpack(body, coding, max_bytes + 1)
        cut = cut or broke_off
    if len(body) > max_bytes:
        raise RecordError("page too large")
    return body, cut


def _unpack(body: bytes, coding: str, max_bytes: int) -> tuple[bytes, bool]:
    """Undo one content encoding as far as it goes and `max_bytes` allow: `(bytes, broke off)`; raises `RecordError`.

    Many crawlers store a page unpacked and leave its head as it was, so what looks like text is passed on.
    """
    for bits in ZLIB_BITS.get(coding, ()):
        try:
            unzip = zlib.decompressobj(bits)
            plain = unzip.decompress(body, max_bytes)
            return plain, not unzip.eof
        except zlib.error:
            pass
    if coding == "br":
        try:
            unpack = brotli.Decompressor()
            plain = unpack.process(body, output_buffer_limit=max_bytes)
            return plain, not unpack.is_finished()
        except brotli.error:
            pass
    if BINARY.search(body[:1024]):
        raise RecordError(f"content encoding {coding}")
    return body, False
