"""Web archives: where records begin and end in WARC, WAT, WET and ARC files, plain, gzip or zstd.

    for found in archive.records("s3://…/CC-MAIN-….warc.gz"):
        print(found if isinstance(found, archive.Damage) else found.url)

One pass from front to back, over a disk, HTTPS or S3. Framing is done here, because the libraries stop at the
first damage, some without a word: here reading goes on at the next gzip member or record head, and every byte
of a file is in a record, in a `Damage`, or padding. What a record says is `kit.data.record`'s business.
"""

from __future__ import annotations

import hashlib
import re
import tempfile
from base64 import b32encode
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass, replace
from datetime import datetime
from typing import BinaryIO

import fsspec

from kit import resolve
from kit.data import polite  # noqa: F401 (makes https:// polite)
from kit.data.record import (
    HEAD_BYTES,
    PAGE_RECORDS,
    START,
    Head,
    Page,
    Record,
    RecordError,
    find_head,
    parse_page,
)
from kit.data.unpack import GZIP, Break, Piece, pieces, zlib
from kit.errors import ArchiveError

__all__ = [
    "PAGE_RECORDS", "ArchiveError", "Damage", "Entry", "Page", "Record", "RecordError",
    "list_archives", "parse_page", "read_bytes", "records", "scan", "unpacked",
]  # fmt: skip

SUFFIX = re.compile(r"\.(warc|wat|wet|arc)(\.(warc|wat|wet|txt))*(\.gz|\.zst)?(\.open)?$", re.IGNORECASE)
NEXT_HEAD = re.compile(
    rb"\n(?=WARC/\d|[a-z][\w+.-]{0,20}:\S* [\d.]+ \d{14} \S+ \d{1,18}\r?\n)", re.IGNORECASE
)
ROWS = re.compile(r"\.(csv|tsv|txt|jsonl|ndjson)(\.gz|\.zst)?$", re.IGNORECASE)
"""Files of rows, which `kit.data.rows` reads."""
OVERLAP = 1 << 12
BLANK = re.compile(rb"[\r\n]*")
BLANK_LINES = re.compile(rb"\r{0,2}\n\r{0,2}\n")
READ_AHEAD = 8 << 20
"""Bytes asked for at a time where each question costs: over HTTPS and from S3."""
KEEP = 64 << 20
"""Bytes of a record that are kept at most; of longer ones the start is, and the digest of the whole."""
MUTE = {"gzip member corrupt", "not gzip"}


@dataclass(frozen=True)
class Entry:
    """One record as an index row sees it; offset, length and wrapping as in `Record`."""

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
    """A stretch of an archive that was not read, or that is a record which is not whole (that is given, too).

    `wrapping` says what `offset` and `length` count, as in `Record`: bytes of the file, or unpacked ones for
    `stream`. A broken gzip member is told from its start on if it gave no whole record, else from where it broke
    (with length 0 where the file just ends too early).
    """

    warc_filename: str
    offset: int
    length: int
    wrapping: str
    reason: str


def list_archives(paths: list[str]) -> list[str]:
    """Absolute paths of the files among `paths`, folders searched through; raises `ArchiveError`.

    Of a folder without archives the files of rows are taken: beside archives they are lists and notes.
    """
    found: list[str] = []
    for path in paths:
        fs, root = fsspec.core.url_to_fs(resolve(path))
        if fs.isdir(root):
            files = fs.find(root)
            inside = [f for f in files if SUFFIX.search(f)] or [f for f in files if ROWS.search(f)]
            if not inside:
                raise ArchiveError(
                    f"no WARC, WAT, WET or ARC file and no CSV, TSV, text or JSON Lines in '{path}'"
                )
            found += [fs.unstrip_protocol(f) if "://" in path else f for f in inside]
        elif fs.exists(root):
            found.append(resolve(path))
        else:
            raise ArchiveError(f"archive '{path}' does not exist")
    return sorted(set(found))


def records(path: str, name: str = "") -> Iterator[Record | Damage]:
    """Every record of one archive in file order, and every stretch that could not be read; raises `ArchiveError`.

    `name` becomes the file's identity (`warc_filename`), by default the last part of `path`. A file that holds no
    record is one `Damage`. What breaks while reading, such as a connection, is no damage of the archive and raised.
    """
    name = name or path.rpartition("/")[2]
    with opened(path) as f:
        framer = _Framer(name, *pieces(f))
        found = None
        for found in _merged(framer):
            yield found
        if found is None:
            yield Damage(name, 0, framer.at, "none", "no record in file" if framer.at else "empty file")


def opened(path: str) -> BinaryIO:
    """A file to be read from front to back; raises `ArchiveError`."""
    try:
        fs, root = fsspec.core.url_to_fs(resolve(path))
        return fs.open(root, "rb", block_size=READ_AHEAD)
    except OSError as error:
        raise ArchiveError(f"archive '{path}' cannot be opened: {error.strerror or error}") from None


def scan(path: str, name: str) -> Iterator[Entry | Damage]:
    """`records` as index rows; the digest is that of the whole block, for want of the crawler's own."""
    for r in records(path, name):
        yield r if isinstance(r, Damage) else Entry(
            warc_filename=name,
            warc_record_offset=r.offset,
            warc_record_length=r.length,
            wrapping=r.wrapping,
            record_type=r.type,
            url=r.url,
            fetch_time=r.time,
            fetch_status=r.status,
            content_mime_detected=r.mime,
            content_digest=r.digest,
            content_truncated=r.head.get("warc-truncated"),
        )  # fmt: skip


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
        except zlib.error:
            raise RecordError("gzip corrupt" if data[:3] == GZIP else "no gzip member here") from None
        if not unzip.eof:
            raise RecordError("record too large" if len(plain) >= max_bytes else "gzip cut short")
        return plain
    return data


def unpacked(f: BinaryIO) -> BinaryIO:
    """The whole file unpacked into a temporary one, as far as it goes, for `stream` wrapping."""
    out = tempfile.TemporaryFile()  # noqa: SIM115 (the caller closes it)
    for piece in pieces(f)[0]:
        out.write(piece.data)
    return out


def _merged(found: Iterator[Record | Damage]) -> Iterator[Record | Damage]:
    """The same with neighbouring stretches of one kind of damage told as one."""
    held: Damage | None = None
    for item in found:
        if held and isinstance(item, Damage):
            same = held.reason == item.reason or {held.reason, item.reason} <= MUTE
            if same and (held.wrapping, held.offset + held.length) == (item.wrapping, item.offset):
                held = replace(held, length=held.length + item.length)
                continue
        if held:
            yield held
        held = item if isinstance(item, Damage) else None
        if not held:
            yield item
    if held:
        yield held


@dataclass
class _Member:
    """A gzip member: where it lies among the unpacked bytes and in the file, and how many whole records it gave."""

    at: int
    start: int
    end_at: int | None = None
    end: int | None = None
    whole: int = 0


class _Framer:
    """Records out of pieces: head, `Content-Length`, end.

    `buf` is a window on the unpacked bytes that begins at their `at`-th; `stop`, once set, is why nothing comes
    behind it: the end, or a break, in the member `failed` or between two. `members` are those in the window.
    """

    def __init__(self, name: str, source: Iterator[Piece], most: float, packed: bool) -> None:
        self.name, self.source, self.most, self.packed = name, source, most, packed
        self.buf, self.at = bytearray(), 0
        self.members: deque[_Member] = deque()
        self.stop: Break | str | None = None
        self.failed: _Member | None = None

    def __iter__(self) -> Iterator[Record | Damage]:
        while True:
            if self.buf:
                yield from self._next()
            elif isinstance(self.stop, Break):
                yield self._cross(self.stop)
            elif self.stop or (piece := next(self.source, None)) is None:
                return
            elif record := self._alone(piece):
                self.at += len(piece.data)
                yield record
            else:
                self._push(piece)
            self._skip_blank()

    def _alone(self, piece: Piece) -> Record | None:
        """The record that is a gzip member of its own, as nearly all are; anything else goes through the window."""
        data = piece.data
        if piece.start is None or piece.end is None or piece.broken:
            return None
        head = find_head(data)
        if isinstance(head, str) or head.length is None:
            return None
        end = head.size + head.length
        if end > len(data) or data[end:].strip(b"\r\n"):
            return None
        place = piece.start, piece.end - piece.start, "member"
        return Record(head, data[head.size : end], self.name, *place)

    def _push(self, piece: Piece) -> None:
        if piece.start is not None:
            self.members.append(_Member(self.at + len(self.buf), piece.start))
        self.buf += piece.data
        member = None
        if piece.end is not None:
            member = self.members[-1]
            member.end_at, member.end = self.at + len(self.buf), piece.end
        self.stop, self.failed = piece.broken, member if piece.broken else None

    def _fill(self, size: int) -> bool:
        """Whether the window holds `size` bytes, as far as they come before a break or the end."""
        while len(self.buf) < size and not self.stop:
            piece = next(self.source, None)
            if piece:
                self._push(piece)
            else:
                self.stop = "end"
        return len(self.buf) >= size

    def _drop(self, size: int) -> None:
        del self.buf[:size]
        self.at += size
        while self.members and (end := self.members[0].end_at) is not None and end <= self.at:
            self.members.popleft()

    def _skip_blank(self) -> None:
        if blank := BLANK.match(self.buf).end():
            if self.members and self.members[0].at == self.at:
                self.members[0].at += blank  # so that a record behind blank lines still begins its member
            self._drop(blank)

    def _cross(self, broken: Break) -> Damage:
        """Over a break: what it is told as."""
        offset = self.failed.start if self.failed and not self.failed.whole else broken.offset
        self.members.clear()
        self.stop = self.failed = None
        return Damage(self.name, offset, broken.end - offset, "member", broken.reason)

    def _next(self) -> Iterator[Record | Damage]:
        """The record or the damage at the front of the window, where no blank line is."""
        head, seen = find_head(self.buf), 0
        while isinstance(head, str) and seen < len(self.buf) < HEAD_BYTES:
            seen = len(self.buf)
            self._fill(2 * seen)
            head = find_head(self.buf)
        if isinstance(head, str):
            end = self._next_head(1)
            raw = bytes(self.buf[: min(end, HEAD_BYTES)])
            if head == "record head without end" and raw.strip().count(b"\n") and end <= HEAD_BYTES:
                yield from self._record(Head(raw, end, 0), end, head)
            else:
                yield from self._lost(end, head)
            return
        end, reason = head.size + (head.length or 0), None
        if KEEP < end <= self.most - self.at:
            yield from self._long(head)
            return
        if head.length is None:
            reason = "no valid Content-Length"
        elif self.at + end > self.most or not self._fill(end):
            reason = "record cut short"
        elif not self._ends(end):
            reason = "wrong Content-Length"
        if inner := self._member_head(1, min(end, len(self.buf))):
            end, reason = inner, "record cut short"
        elif reason:
            end = self._next_head(head.size)
            if end < len(self.buf) and reason == "record cut short":
                reason = "wrong Content-Length"
        yield from self._record(head, end, reason)

    def _record(self, head: Head, end: int, reason: str | None) -> Iterator[Record | Damage]:
        """The record that the window holds up to `end`, its damage behind it; the window moves on."""
        broke = isinstance(self.stop, Break) and BLANK.match(self.buf, end).end() == len(self.buf)
        if broke and (reason or self.stop.reason == "gzip member corrupt"):
            reason = self.stop.reason
        size = head.length if head.length is not None else end
        with memoryview(self.buf) as window:
            block = bytes(window[head.size : min(end, head.size + size)])
        member = self.members[0] if self.members else None
        place = self._place(member, self.at, end)
        if member and not reason:
            member.whole += 1
        self._drop(end)
        yield Record(head, block, self.name, *place, damage=reason)
        if reason and not broke:
            yield Damage(self.name, *place, reason)

    def _long(self, head: Head) -> Iterator[Record | Damage]:
        """A record too long to keep: its block is read and let go, up to where a member begins with a head."""
        self._fill(head.size + HEAD_BYTES)
        start, block = self.at, bytes(self.buf[head.size : head.size + HEAD_BYTES])
        member = self.members[0] if self.members else None
        self._drop(head.size)
        digest, left, reason = hashlib.sha1(), head.length, None
        while left and self._fill(1) and self._member_head(0, 1) is None:
            size = min(left, len(self.buf))
            size = self._member_head(1, size) or size
            digest.update(bytes(self.buf[:size]))
            self._drop(size)
            left -= size
        if left:
            reason = self.stop.reason if isinstance(self.stop, Break) else "record cut short"
        elif not self._ends(0):
            reason = "wrong Content-Length"
        place = self._place(member, start, 0)
        if member and not reason:
            member.whole += 1
        told = b32encode(digest.digest()).decode()
        yield Record(head, block, self.name, *place, damage=reason, long_digest=told)
        if reason and not isinstance(self.stop, Break):
            yield Damage(self.name, *place, reason)

    def _lost(self, end: int, reason: str) -> Iterator[Damage]:
        """The window up to `end` as damage, unless it is of a broken member that is told from its start on."""
        failed, at = self.failed, self.at
        self._drop(end)
        if not (failed and not failed.whole and failed.at <= at and not self.buf):
            yield Damage(self.name, at, end, "stream" if self.packed else "none", reason)

    def _place(self, member: _Member | None, start: int, end: int) -> tuple[int, int, str]:
        """Offset, length and wrapping of the record from `start` up to the window's `end`; it may fill `member`."""
        if member and member.at == start:
            blank = BLANK.match(self.buf, end).end()
            while member.end_at is None and blank == len(self.buf) and self._fill(blank + 1):
                blank = BLANK.match(self.buf, blank).end()
            if member.end_at is not None and end <= member.end_at - self.at <= blank:
                return member.start, member.end - member.start, "member"
        return start, self.at + end - start, "stream" if self.packed else "none"

    def _ends(self, end: int) -> bool:
        """Whether a record that should end at `end` does: blank lines, another head or nothing follow."""
        self._fill(end + 6)
        if BLANK_LINES.match(self.buf, end):
            return True
        self._fill(end + HEAD_BYTES)
        blank = BLANK.match(self.buf, end).end()
        return blank == len(self.buf) or bool(START.match(self.buf, blank))

    def _member_head(self, low: int, high: int) -> int | None:
        """Where in the window, from `low` to before `high`, a member begins with a record head."""
        for member in self.members:
            place = member.at - self.at
            if place >= high:
                break
            if place >= low and START.match(self.buf, place):
                return place
        return None

    def _next_head(self, begin: int) -> int:
        """Where in the window the next head is, at `begin` or behind; else how far the window goes."""
        seen = begin - 1
        while True:
            match = NEXT_HEAD.search(self.buf, seen)
            found = match.end() if match else len(self.buf)
            for member in reversed(
                self.members
            ):  # a window may hold very many: only the new ones are looked at
                place = member.at - self.at
                if place < max(begin, seen):
                    break
                if place < found and START.match(self.buf, place):
                    found = place
            if found < len(self.buf):
                return found
            size = len(self.buf)
            seen = max(size - OVERLAP, seen)
            self._fill(size + OVERLAP)
            if size >= KEEP or size == len(self.buf):
                return len(self.buf)
