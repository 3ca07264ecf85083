"""Web archives: where records begin and end in WARC, WAT, WET and ARC files, plain, gzip or zstd.

    for item in archive.records("s3://…/CC-MAIN-….warc.gz"):
        print(item if isinstance(item, archive.Damage) else item.url)

One pass from front to back, over a disk, HTTPS or S3. Framing is done here, because the libraries stop at the
first damage, some without a word: here reading goes on at the next gzip member or record head, and every byte
of a file is in a record, in a `Damage`, or padding. What a record says is `kit.data.read.record`'s business.
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

from kit import resolve_path
from kit.data.read import polite  # noqa: F401 (makes https:// polite)
from kit.data.read.record import HEAD_BYTES, PAGE_RECORDS, START, Head, Page, Record, find_head, parse_page
from kit.data.read.unpack import GZIP, Break, Piece, pieces, zlib
from kit.errors import ArchiveError, RecordError

__all__ = [
    "PAGE_RECORDS",
    "ArchiveError",
    "Damage",
    "Entry",
    "Page",
    "Record",
    "RecordError",
    "list_archives",
    "parse_page",
    "read_bytes",
    "records",
    "scan_archive",
    "unpacked",
]

SUFFIX = re.compile(r"\.(warc|wat|wet|arc)(\.(warc|wat|wet|txt))*(\.gz|\.zst)?(\.open)?$", re.IGNORECASE)
NEXT_HEAD = re.compile(
    rb"\n(?=WARC/\d|[a-z][\w+.-]{0,20}:\S* [\d.]+ \d{14} \S+ \d{1,18}\r?\n)", re.IGNORECASE
)
ROWS = re.compile(r"\.(csv|tsv|txt|jsonl|ndjson)(\.gz|\.zst)?$", re.IGNORECASE)
"""Files of rows, which `kit.data.read.rows` reads."""
# a head's line that a piece's end cuts in two is seen whole the next time, if it is no longer than this
OVERLAP = 1 << 12
BLANK = re.compile(rb"[\r\n]*")
BLANK_LINES = re.compile(rb"\r{0,2}\n\r{0,2}\n")
READ_AHEAD = 8 << 20
"""Bytes asked for at a time where each question costs: over HTTPS and from S3."""
KEEP = 64 << 20
"""Bytes of a record that are kept at most; of longer ones the start is, and the digest of the whole."""
# both mean that nothing can be unpacked here: where one ends and the other begins says nothing to a reader
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
    archives: list[str] = []
    for path in paths:
        fs, root = fsspec.core.url_to_fs(resolve_path(path))
        if fs.isdir(root):
            files = fs.find(root)
            # beside archives, text files are lists and notes
            inside = [f for f in files if SUFFIX.search(f)] or [f for f in files if ROWS.search(f)]
            if not inside:
                raise ArchiveError(
                    f"no WARC, WAT, WET or ARC file and no CSV, TSV, text or JSON Lines in '{path}'"
                )
            archives += [fs.unstrip_protocol(f) if "://" in path else f for f in inside]
        elif fs.exists(root):
            archives.append(resolve_path(path))
        else:
            raise ArchiveError(f"archive '{path}' does not exist")
    # a folder and a file in it may both be named: its pages must not come twice
    return sorted(set(archives))


def records(path: str, name: str = "") -> Iterator[Record | Damage]:
    """Every record of one archive in file order, and every stretch that could not be read; raises `ArchiveError`.

    `name` becomes the file's identity (`warc_filename`), by default the last part of `path`. A file that holds no
    record is one `Damage`. What breaks while reading, such as a connection, is no damage of the archive and raised.
    """
    name = name or path.rpartition("/")[2]
    with opened(path) as f:
        framer = _Framer(name, *pieces(f))
        holds_any = False
        for record_or_damage in _merged(framer):
            holds_any = True
            yield record_or_damage
        if not holds_any:
            size = framer.start
            yield Damage(name, 0, size, "none", "no record in file" if size else "empty file")


def opened(path: str) -> BinaryIO:
    """A file to be read from front to back; raises `ArchiveError`."""
    try:
        fs, root = fsspec.core.url_to_fs(resolve_path(path))
        return fs.open(root, "rb", block_size=READ_AHEAD)
    except OSError as error:
        raise ArchiveError(f"archive '{path}' cannot be opened: {error.strerror or error}") from None


def scan_archive(path: str, name: str) -> Iterator[Entry | Damage]:
    """`records` as index rows; the digest is that of the whole block, for want of the crawler's own."""
    for r in records(path, name):
        yield (
            r
            if isinstance(r, Damage)
            else Entry(
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
            )
        )


def read_bytes(f: BinaryIO, offset: int, length: int, wrapping: str, max_bytes: int) -> bytes:
    """One record's plain bytes out of an open archive; raises `RecordError`.

    `max_bytes` bounds a record and what a gzip member may unpack to. `stream` wrapping takes the unpacked file as `f`.
    """
    # before reading: an index may claim any length
    if length > max_bytes:
        raise RecordError("record too large")
    f.seek(offset)
    data = f.read(length)
    if len(data) < length:
        raise RecordError("range past end of file")
    if wrapping == "member" or (wrapping == "" and data[:3] == GZIP):
        # 31: zlib's largest window, with gzip's head and checksum; bounded, as a page of zeros packs a thousandfold
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


def _merged(items: Iterator[Record | Damage]) -> Iterator[Record | Damage]:
    """The same with neighbouring stretches of one kind of damage told as one."""
    held: Damage | None = None
    for item in items:
        if held and isinstance(item, Damage):
            same = held.reason == item.reason or {held.reason, item.reason} <= MUTE
            # only where the bytes follow each other, counted the same way: else a whole record lies between
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
    """A gzip member: where it lies among the unpacked bytes and in the file, and how many whole records it gave.

    An end is None until it has been read.
    """

    unpacked_start: int
    file_start: int
    unpacked_end: int | None = None
    file_end: int | None = None
    whole_records: int = 0


class _Framer:
    """Records out of pieces: a window moves over the unpacked bytes, and what lies at its front is a record or damage.

    A head says how long its record is. Often it is wrong, so what follows is looked at, and two other things tell where
    a record begins: a gzip member that starts with a head (nearly all writers give each record a member of its own),
    and a line that looks like a head. Where they disagree, this is believed, the first row that fits:

    | the record should end        | and before that there is        | it ends         | told as               |
    |------------------------------|---------------------------------|-----------------|-----------------------|
    | anywhere                     | a member that starts with a head | at the member   | record cut short      |
    | at blank lines, a head, or the last byte | –                   | there           | whole                 |
    | at anything else             | –                               | at the next head | wrong Content-Length |
    | behind the last byte that could be read | a line like a head   | at that line    | wrong Content-Length  |
    | behind the last byte that could be read | –                    | at the last byte | record cut short     |
    | nowhere: it names no length  | –                               | at the next head | no valid Content-Length |

    A record that ends where bytes could not be unpacked is told by that break's reason instead, if it is not whole, or
    if the member is corrupt: then what was unpacked before the break is not sure either.

    `window` begins at the unpacked byte `start`. Once `stop` is set, nothing comes behind the window: `"end"`, or a
    break, in the member `failed` or between two members. `members` are those that reach into the window.
    """

    def __init__(self, name: str, source: Iterator[Piece], most_bytes: float, packed: bool) -> None:
        self.name, self.source = name, source
        self.most_bytes = most_bytes
        """What the file can unpack to at most: no record is longer, whatever its head says."""
        self.packed = packed
        self.window = bytearray()
        self.start = 0
        self.members: deque[_Member] = deque()
        self.stop: Break | str | None = None
        self.failed: _Member | None = None

    def __iter__(self) -> Iterator[Record | Damage]:
        while True:
            if self.window:
                yield from self._next()
            elif isinstance(self.stop, Break):
                yield self._cross(self.stop)
            elif self.stop or (piece := next(self.source, None)) is None:
                return
            elif record := self._alone(piece):
                self.start += len(piece.data)
                yield record
            else:
                self._push(piece)
            self._skip_blank()

    def _alone(self, piece: Piece) -> Record | None:
        """The record that is a gzip member of its own, as nearly all are; anything else goes through the window."""
        data = piece.data
        # in one piece, from its first to its last byte
        if piece.start is None or piece.end is None or piece.broken:
            return None
        head = find_head(data)
        if isinstance(head, str) or head.length is None:
            return None
        end = head.size + head.length
        # longer than said, or something behind it: then the table in the class's docstring has to decide
        if end > len(data) or data[end:].strip(b"\r\n"):
            return None
        place = piece.start, piece.end - piece.start, "member"
        return Record(head, data[head.size : end], self.name, *place)

    def _push(self, piece: Piece) -> None:
        """A piece behind the window; what it says of its member and of a break is noted."""
        if piece.start is not None:
            self.members.append(_Member(self.start + len(self.window), piece.start))
        self.window += piece.data
        ended = None
        if piece.end is not None:
            ended = self.members[-1]
            ended.unpacked_end = self.start + len(self.window)
            ended.file_end = piece.end
        self.stop = piece.broken
        # a break between members ends none, and then no member has failed
        self.failed = ended if piece.broken else None

    def _fill(self, size: int) -> bool:
        """Whether the window holds `size` bytes, as far as they come before a break or the end."""
        while len(self.window) < size and not self.stop:
            piece = next(self.source, None)
            if piece:
                self._push(piece)
            else:
                self.stop = "end"
        return len(self.window) >= size

    def _drop(self, size: int) -> None:
        """Move the window on by `size` bytes, and let go of the members that lie before it."""
        del self.window[:size]
        self.start += size
        while self.members:
            end = self.members[0].unpacked_end
            if end is None or end > self.start:
                break
            self.members.popleft()

    def _skip_blank(self) -> None:
        blank = BLANK.match(self.window).end()
        if blank:
            if self.members and self.members[0].unpacked_start == self.start:
                # so that a record behind blank lines still begins its member
                self.members[0].unpacked_start += blank
            self._drop(blank)

    def _cross(self, broken: Break) -> Damage:
        """The damage that a break is told as; reading goes on behind it."""
        # of a member that gave whole records only the rest is damaged
        nothing_whole = self.failed and not self.failed.whole_records
        offset = self.failed.file_start if nothing_whole else broken.offset
        self.members.clear()
        self.stop = self.failed = None
        return Damage(self.name, offset, broken.end - offset, "member", broken.reason)

    def _next(self) -> Iterator[Record | Damage]:
        """The record or the damage at the front of the window, where no blank line is; see the table above."""
        head = self._head()
        if isinstance(head, str):
            yield from self._without_head(head)
            return
        end = head.size + (head.length or 0)
        reason = None
        if KEEP < end <= self.most_bytes - self.start:
            yield from self._long(head)
            return
        if head.length is None:
            reason = "no valid Content-Length"
        elif self.start + end > self.most_bytes or not self._fill(end):
            reason = "record cut short"
        elif not self._ends(end):
            reason = "wrong Content-Length"
        if inner := self._member_head(1, min(end, len(self.window))):
            end, reason = inner, "record cut short"
        elif reason:
            end = self._next_head(head.size)
            # a head behind it says that the file went on: not the record is short, its length is wrong
            if end < len(self.window) and reason == "record cut short":
                reason = "wrong Content-Length"
        yield from self._record(head, end, reason)

    def _head(self) -> Head | str:
        """The head at the front of the window, which may have to grow for it, or why there is none."""
        head = find_head(self.window)
        tried = 0
        # twice as much each time: the window is searched from its front again, so single pieces would cost the square
        while isinstance(head, str) and tried < len(self.window) < HEAD_BYTES:
            tried = len(self.window)
            self._fill(2 * tried)
            head = find_head(self.window)
        return head

    def _without_head(self, reason: str) -> Iterator[Record | Damage]:
        """What has no head up to the next one: damage, or a record whose head has lost its end but says something."""
        end = self._next_head(1)
        raw = bytes(self.window[: min(end, HEAD_BYTES)])
        # one line alone may be any line of a text; with a second one it has been the head of something
        has_fields = raw.strip().count(b"\n")
        if reason == "record head without end" and has_fields and end <= HEAD_BYTES:
            yield from self._record(Head(raw, end, 0), end, reason)
        else:
            yield from self._lost(end, reason)

    def _record(self, head: Head, end: int, reason: str | None) -> Iterator[Record | Damage]:
        """The record that the window holds up to `end`, its damage behind it; the window moves on."""
        # where only line ends are left before the break, this record is the last that the member gave
        at_break = isinstance(self.stop, Break) and BLANK.match(self.window, end).end() == len(self.window)
        if at_break and (reason or self.stop.reason == "gzip member corrupt"):
            reason = self.stop.reason
        length = head.length if head.length is not None else end
        # by a view: slicing the window itself would copy the block twice
        with memoryview(self.window) as window:
            block = bytes(window[head.size : min(end, head.size + length)])
        member = self.members[0] if self.members else None
        # before the window moves on, since both look at what lies in it
        place = self._place(member, self.start, end)
        if member and not reason:
            member.whole_records += 1
        self._drop(end)
        yield Record(head, block, self.name, *place, damage=reason)
        # where it broke, the break itself comes next and tells of the same bytes
        if reason and not at_break:
            yield Damage(self.name, *place, reason)

    def _long(self, head: Head) -> Iterator[Record | Damage]:
        """A record too long to keep: its block is read and let go, up to where a member begins with a head."""
        self._fill(head.size + HEAD_BYTES)
        start = self.start
        block = bytes(self.window[head.size : head.size + HEAD_BYTES])
        member = self.members[0] if self.members else None
        self._drop(head.size)
        digest = hashlib.sha1()
        left = head.length
        # a head may lie: where a member begins with another head, this record has ended
        while left and self._fill(1) and self._member_head(0, 1) is None:
            size = min(left, len(self.window))
            size = self._member_head(1, size) or size
            digest.update(bytes(self.window[:size]))
            self._drop(size)
            left -= size
        # whole, if its length was read and something that can follow a record follows
        reason = None
        if left:
            reason = self.stop.reason if isinstance(self.stop, Break) else "record cut short"
        elif not self._ends(0):
            reason = "wrong Content-Length"
        place = self._place(member, start, 0)
        if member and not reason:
            member.whole_records += 1
        long_digest = b32encode(digest.digest()).decode()
        yield Record(head, block, self.name, *place, damage=reason, long_digest=long_digest)
        if reason and not isinstance(self.stop, Break):
            yield Damage(self.name, *place, reason)

    def _lost(self, end: int, reason: str) -> Iterator[Damage]:
        """The window up to `end` as damage, unless it is of a broken member that is told from its start on."""
        # dropping moves `start`, and the window is looked at afterwards
        failed, start = self.failed, self.start
        self._drop(end)
        told_by_break = (
            failed and not failed.whole_records and failed.unpacked_start <= start and not self.window
        )
        if not told_by_break:
            yield Damage(self.name, start, end, "stream" if self.packed else "none", reason)

    def _place(self, member: _Member | None, start: int, end: int) -> tuple[int, int, str]:
        """Offset, length and wrapping of the record from `start` up to the window's `end`; it may fill `member`."""
        # a member of its own can be read alone later: worth looking whether it ends where the record does
        if member and member.unpacked_start == start:
            blank = BLANK.match(self.window, end).end()
            # blank lines may go on in the next piece of the same member
            while member.unpacked_end is None and blank == len(self.window) and self._fill(blank + 1):
                blank = BLANK.match(self.window, blank).end()
            if member.unpacked_end is not None and end <= member.unpacked_end - self.start <= blank:
                return member.file_start, member.file_end - member.file_start, "member"
        return start, self.start + end - start, "stream" if self.packed else "none"

    def _ends(self, end: int) -> bool:
        """Whether a record that should end at `end` does: blank lines, another head or nothing follow."""
        self._fill(end + 6)  # two line ends of three bytes are what `BLANK_LINES` can need
        if BLANK_LINES.match(self.window, end):
            return True
        # one line end, or none, as some writers leave: then a head must follow, which may be long
        self._fill(end + HEAD_BYTES)
        blank = BLANK.match(self.window, end).end()
        return blank == len(self.window) or bool(START.match(self.window, blank))

    def _member_head(self, low: int, high: int) -> int | None:
        """Where in the window, from `low` to before `high`, a member begins with a record head."""
        for member in self.members:
            place = member.unpacked_start - self.start
            if place >= high:
                break
            if place >= low and START.match(self.window, place):
                return place
        return None

    def _next_head(self, begin: int) -> int:
        """Where in the window the next head is, at `begin` or behind; else how far the window goes."""
        searched = begin - 1  # the line end before a head belongs to what is searched for
        while True:
            match = NEXT_HEAD.search(self.window, searched)
            nearest = match.end() if match else len(self.window)
            # the window may hold very many members: only those are looked at that came with the last piece
            for member in reversed(self.members):
                place = member.unpacked_start - self.start
                if place < max(begin, searched):
                    break
                if place < nearest and START.match(self.window, place):
                    nearest = place
            if nearest < len(self.window):
                return nearest
            size = len(self.window)
            # a head that begins in the last bytes is not whole yet, so they are searched again
            searched = max(size - OVERLAP, searched)
            self._fill(size + OVERLAP)
            # nothing more came, or so much without a head that what is there goes as one damage
            if size >= KEEP or size == len(self.window):
                return len(self.window)
