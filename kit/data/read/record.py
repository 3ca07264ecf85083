"""What one record of a web archive says: its head, its HTTP head, and its page with chunks and encodings undone.

Where records lie in a file is `kit.data.read.archive`'s business. Nothing is worked out before it is asked for: a job
that counts one header never decodes a page. Content encodings are undone here, because warcio hands on what it
cannot unpack.
"""

from __future__ import annotations

import base64
import hashlib
import io
import re
import zlib
from dataclasses import dataclass
from datetime import datetime
from functools import cached_property
from typing import NamedTuple
from urllib.parse import urlsplit

import brotli
from warcio.bufferedreaders import ChunkedDataReader

from kit.errors import RecordError

START = re.compile(rb"WARC/\d|filedesc:\S* |[a-z][\w+.-]{0,20}:\S* (?:\S+ ){2,8}\d{1,18}\r?\n", re.IGNORECASE)
"""How a record begins: a WARC version, or an ARC line `URL IP date mime length` (version 2 has more between)."""
HEAD_END = re.compile(rb"\n\r{0,2}\n")
CONTENT_LENGTH = re.compile(rb"\ncontent-length[ \t]*:[ \t]*(\d{1,18})[ \t\r]*(?:\n|\Z)", re.IGNORECASE)
STATUS = re.compile(rb"HTTP/\S*\s+(\d{3})\b")
CHARSET = re.compile(r"charset\s*=\s*[\"']?([\w.:-]+)", re.IGNORECASE)
# control characters that no text holds (tab, line ends and escape, which ISO-2022 needs, are left out)
BINARY = re.compile(rb"[\x00-\x08\x0e-\x1a\x1c-\x1f]")
ZLIB_BITS = {"gzip": (31,), "x-gzip": (31,), "deflate": (15, -15)}
"""Window bits to try for each content encoding that zlib knows; servers send `deflate` with and without a head."""
HEAD_BYTES, PAGE_BYTES = 1 << 16, 64 << 20
PAGE_RECORDS = ("response", "conversion", "resource")
"""Record types that can hold a page; the rest of an archive (request, metadata, …) is about them."""


class Head(NamedTuple):
    """A record's head as it stands: its bytes, where the block begins behind it, and how long that should be."""

    raw: bytes
    size: int
    length: int | None
    arc: bool = False


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


def find_head(window: bytes | bytearray) -> Head | str:
    """The record head at the start of `window`, or why there is none."""
    if not START.match(window):
        return "no record head"
    # an ARC head is one line, whose last word is the length
    if window[:5].upper() != b"WARC/":
        line = bytes(window[: window.find(b"\n", 0, HEAD_BYTES) + 1])
        last_word = line.rsplit(None, 1)[-1] if line else b""
        length = int(last_word) if last_word.isdigit() and len(last_word) <= 18 else None
        return Head(line, len(line), length, arc=True) if line else "record head without end"
    # where the next record's head begins first, this one has no end; looked for near first: heads may be all there is
    end = HEAD_END.search(window, 0, 1 << 10) or HEAD_END.search(window, 0, _next_version(window))
    raw = bytes(window[: end.start() + 1]) if end else b""
    if not end or b"\nWARC/" in raw:
        return "record head without end"
    return Head(raw, end.end(), content_length(raw))


def _next_version(window: bytes | bytearray) -> int:
    position = window.find(b"\nWARC/", 0, HEAD_BYTES)
    return HEAD_BYTES if position < 0 else position


def content_length(raw: bytes) -> int | None:
    """What a WARC head says of the length of its block, None where that is no number."""
    match = CONTENT_LENGTH.search(raw)
    if match:
        return int(match[1])
    value = parse_fields(raw).get("content-length", "")  # a folded line, or none that counts
    return int(value) if re.fullmatch("[0-9]{1,18}", value) else None


def parse_fields(head: bytes) -> dict[str, str]:
    """The fields of a WARC or HTTP head by lower-case name; of a name that comes twice, the first."""
    # heads are ASCII by the letter; servers send UTF-8 and anything else, and Latin-1 decodes every byte
    try:
        text = head.decode()
    except UnicodeDecodeError:
        text = head.decode("latin-1")
    if "\n " in text or "\n\t" in text:  # folded lines belong to the one before
        text = re.sub(r"\r?\n[ \t]+", " ", text)
    fields: dict[str, str] = {}
    # the first line is the version or the status
    for line in text.split("\n")[1:]:
        key, colon, value = line.partition(":")
        if colon:
            fields.setdefault(key.strip().lower(), value.strip())
    return fields


class Record:
    """One record of an archive. `offset` and `length` are those of its bytes, as `wrapping` counts them.

    `wrapping`: `member` (a gzip member of its own), `none` (plain), or `stream` (several records in one
    compressed stream: offset and length count unpacked bytes, so reading one means unpacking the file).
    `damage` is None, or why this record is not whole; `block` holds what there is of it.
    """

    def __init__(
        self,
        head: Head,
        block: bytes,
        name: str = "",
        offset: int = 0,
        length: int = 0,
        wrapping: str = "",
        damage: str | None = None,
        long_digest: str | None = None,
    ) -> None:
        self.raw_head, self.block = head, block
        self.warc_filename, self.offset, self.length, self.wrapping = name, offset, length, wrapping
        self.damage = damage
        self.long_digest = long_digest
        """Digest of a block that is too large to keep, of which `block` holds the start only; else None."""

    def __repr__(self) -> str:
        return f"<Record {self.type} {self.url} at {self.warc_filename}:{self.offset}>"

    @cached_property
    def head(self) -> dict[str, str]:
        """Fields of the WARC head by lower-case name; those of an ARC line under the names WARC has for them."""
        if not self.raw_head.arc:
            return parse_fields(self.raw_head.raw)
        # version 1 has five words; of version 2 only those are read that both have in the same place
        words = self.raw_head.raw.decode("latin-1").strip().split(" ")
        url, date, mime = [*words, "", "", "", ""][0], *[*words, "", "", "", ""][2:4]
        kind = "warcinfo" if url.startswith("filedesc:") else "response"
        return {"warc-type": kind, "warc-target-uri": url, "warc-date": date, "content-type": mime}

    @property
    def type(self) -> str:
        """`response`, `request`, `warcinfo`, `metadata`, `conversion` (WET), …; `unknown` where it says none."""
        return self.head.get("warc-type", "").lower() or "unknown"

    @property
    def url(self) -> str:
        """What the record is about, empty for records about the archive."""
        # WARC 1.0 showed addresses in angle brackets, and wget still writes them
        return self.head.get("warc-target-uri", "").strip("<>")

    @property
    def time(self) -> datetime | None:
        """When it was fetched, naive UTC."""
        # naive, as Parquet's timestamps without a zone are, which the index has
        return parse_time(self.head.get("warc-date"))

    @cached_property
    def _http_end(self) -> int | None:
        """Where the HTTP body begins in the block; None where the block is no HTTP answer."""
        # an ARC line does not say what it holds: the address must; Gemini's answers come as `response`, too
        if self.raw_head.arc:
            is_http = self.url.startswith("http")
        else:
            is_http = self.type == "response" and "gemini" not in self.head.get("content-type", "")
        if not is_http or not self.block.startswith(b"HTTP/"):
            return 0 if is_http else None
        # a head without an end is all head: what follows it was lost
        end = HEAD_END.search(self.block)
        return end.end() if end else len(self.block)

    @cached_property
    def http(self) -> dict[str, str]:
        """Fields of the HTTP head of an answer by lower-case name; empty where there is none."""
        return parse_fields(self.block[: self._http_end]) if self._http_end else {}

    @property
    def status(self) -> int | None:
        """HTTP status; 200 for a page that came by other ways, None for records that hold no page."""
        match = STATUS.match(self.block) if self._http_end else None
        return int(match[1]) if match else 200 if self.type in PAGE_RECORDS else None

    @property
    def content_type(self) -> str:
        """What was said of the payload: by HTTP, else by the record's head."""
        if self._http_end is None:
            return self.head.get("content-type", "")
        return self.http.get("content-type", "")

    @property
    def charset(self) -> str | None:
        """Charset named in the content type."""
        match = CHARSET.search(self.content_type)
        return match[1] if match else None

    @property
    def stored(self) -> bytes:
        """The HTTP body as it is stored, chunks and encodings included; other records' whole block."""
        return self.block[self._http_end :] if self._http_end else self.block

    @property
    def payload(self) -> bytes:
        """The body decoded, at most `PAGE_BYTES`; raises `RecordError` with the reason to count."""
        return self.page(PAGE_BYTES).payload

    @property
    def mime(self) -> str:
        """MIME type: what the crawler identified, else the content type, else a look at the bytes."""
        claimed = self.head.get("warc-identified-payload-type") or self.content_type
        return sniffed(claimed, self.stored[:1024])

    @property
    def digest(self) -> str:
        """SHA-1 of the block, for want of the crawler's own."""
        return self.long_digest or sha1(self.block)

    @property
    def truncated(self) -> str | None:
        """Why the crawler cut the page off (`length`, `time`, …), or that the archive lost its end; None if whole."""
        # of a record too long to keep, the block here is short on purpose
        length = self.raw_head.length
        cut = self.long_digest is None and length is not None and len(self.block) < length
        return self.head.get("warc-truncated") or ("record cut short" if cut else None)

    def page(self, max_bytes: int) -> Page:
        """The record's page, up to `max_bytes` of it; raises `RecordError` with the reason to count."""
        if self.long_digest:
            raise RecordError("record too large")
        if self.damage and self.damage.startswith("gzip"):  # such bytes may be anything
            raise RecordError(self.damage)
        payload, cut = _decoded(self.stored, self.http, max_bytes)
        return Page(
            url=self.url,
            record_type=self.type,
            status=self.status or 0,
            mime=sniffed(self.content_type, payload),
            charset=self.charset,
            fetch_time=self.time,
            payload=payload,
            digests=(sha1(self.stored), sha1(self.block)),
            truncated=self.truncated or ("encoding cut short" if cut else None),
        )


def parse_page(raw: bytes, max_bytes: int) -> Page:
    """The page in one record's plain bytes; raises `RecordError` with the reason to count.

    HTTP chunks and content encodings are undone, up to `max_bytes` of page.
    """
    head = find_head(raw)
    if isinstance(head, str):
        raise RecordError(head)
    if head.length is None:
        raise RecordError("no valid Content-Length")
    return Record(head, raw[head.size : head.size + head.length]).page(max_bytes)


def sniffed(content_type: str, body: bytes) -> str:
    """MIME type; content wins over a head that claims nothing or something vague (a tenth of real pages does)."""
    mime = content_type.split(";")[0].strip().lower()
    if mime in ("", "application/octet-stream", "text/plain", "unk", "no-type", "application/http"):
        start = body[:1024].lower()
        if b"<html" in start or b"<!doctype html" in start:
            return "text/html"
    return mime


def sha1(data: bytes) -> str:
    """SHA-1 in base 32, as WARC digests and the index write it."""
    return base64.b32encode(hashlib.sha1(data).digest()).decode()


def parse_time(text: str | None) -> datetime | None:
    """WARC-Date (ISO 8601) or ARC date (14 digits) as naive UTC, or None."""
    if not text:
        return None
    # fractions of a second are cut off: an index has none, and the same page must not have two times
    digits = re.sub(r"\D", "", text.split(".")[0])[:14]
    try:
        return datetime.strptime(digits.ljust(14, "0"), "%Y%m%d%H%M%S")
    except ValueError:
        return None


def _decoded(body: bytes, fields: dict[str, str], max_bytes: int) -> tuple[bytes, bool]:
    """An HTTP body without chunks and content encodings, and whether an encoding broke off; raises `RecordError`."""
    cut = False
    # chunks are the transfer's, so they come off first; then the codings, the last one that was put on first
    if "chunked" in fields.get("transfer-encoding", "").lower():
        body = ChunkedDataReader(io.BytesIO(body)).read()
    for coding in reversed(re.findall(r"[\w-]+", fields.get("content-encoding", "").lower())):
        # one byte more than allowed shows that there is more, without unpacking it
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


def host_name(url: str) -> str:
    """The host of `url`; empty where there is none, or a broken one such as `http://[broken`."""
    try:
        return urlsplit(url).hostname or ""
    except ValueError:
        return ""
