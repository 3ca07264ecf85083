"""The unpacked bytes of an archive file, in pieces that say where compressed members begin, end and break.

Reads from front to back; only behind damage it goes back, to look for the next gzip member.
"""

from __future__ import annotations

import io
import re
from collections.abc import Generator, Iterator
from itertools import chain
from typing import BinaryIO, NamedTuple

import pyarrow as pa

try:
    from isal import isal_zlib as zlib  # the same interface at twice the speed
except ImportError:
    import zlib

GZIP, ZSTD = b"\x1f\x8b\x08", re.compile(rb"\x28\xb5\x2f\xfd|[\x50-\x5f]\x2a\x4d\x18")
MEMBER_START = re.compile(rb"\x1f\x8b\x08[\x00-\x1f]")
CHUNK, PIECE = 1 << 16, 1 << 20
"""Bytes read and unpacked at a time; a member that unpacks to less than `PIECE` comes whole."""
MOST_DEFLATE = 1032
"""Deflate cannot pack tighter (zlib's technical notes), so no record can be longer than the file times this."""


class Break(NamedTuple):
    """Compressed bytes, from `offset` to `end` of the file, that could not be unpacked."""

    offset: int
    end: int
    reason: str


class Piece(NamedTuple):
    """Unpacked bytes. `start` and `end`: where in the file the gzip member lies that starts or ends with them."""

    data: bytes
    start: int | None = None
    end: int | None = None
    broken: Break | None = None


def pieces(f: BinaryIO) -> tuple[Iterator[Piece], float, bool]:
    """An open file's unpacked bytes, how many there can be at most, and whether the file is compressed."""
    try:
        size: float = f.seek(0, io.SEEK_END)
        f.seek(0)
    except (OSError, ValueError):  # a server that does not tell
        size = float("inf")
    start = f.read(CHUNK)
    # by the first bytes, not by the name: files of either kind have the other's ending
    if start[:3] == GZIP:
        return _gzip(f, start), size * MOST_DEFLATE, True
    if ZSTD.match(start):
        return _zstd(f), float("inf"), True
    return (Piece(data) for data in chain([start], iter(lambda: f.read(PIECE), b""))), size, False


def _gzip(f: BinaryIO, data: bytes) -> Iterator[Piece]:
    """The members of a gzip file; `data` are its first bytes, already read."""
    position = 0
    while True:
        # the head of the next member may lie across the end of what was read
        if len(data) < 4:
            data += f.read(CHUNK)
        if not data:
            return
        behind = data.lstrip(b"\0")
        if behind != data and (not behind or behind[:3] == GZIP):  # zeros between members are padding
            position, data = position + len(data) - len(behind), behind
        elif data[:3] == GZIP:
            position, data = yield from _member(f, position, data)
        else:
            end = _next_member(f, position)
            yield Piece(b"", broken=Break(position, end, "not gzip"))
            position, data = f.seek(end), b""


def _member(f: BinaryIO, start: int, data: bytes) -> Generator[Piece, None, tuple[int, bytes]]:
    """One member, whose first bytes are `data`; returns where the next begins and what is read of that."""
    unzip, fed, given = zlib.decompressobj(31), 0, 0
    first: int | None = start
    parts: list[bytes] = []
    held = 0
    while True:
        try:
            out = unzip.decompress(data, PIECE)
        except zlib.error:
            out, wrong = _up_to_error(f, start, fed, given, data)
            # the decoder may have run on into the next member before it noticed
            end = _next_member(f, max(start + 1, wrong - CHUNK))
            broken = Break(min(wrong, end), end, "gzip member corrupt")
            yield Piece(b"".join([*parts, out]), first, end, broken)
            return f.seek(end), b""
        parts.append(out)
        # the member has ended, its checksum was right
        if unzip.eof:
            rest = unzip.unused_data
            end = start + fed + len(data) - len(rest)
            yield Piece(out if len(parts) == 1 else b"".join(parts), first, end)
            return end, rest
        fed += len(data) - len(unzip.unconsumed_tail)
        given, held = given + len(out), held + len(out)
        # a member of a gigabyte is handed on in pieces, so that none holds it all
        if held >= PIECE:
            yield Piece(b"".join(parts), first)
            first, parts, held = None, [], 0
        data = unzip.unconsumed_tail
        if not data and len(out) < PIECE:  # else more may come out of what was fed
            data = f.read(CHUNK)
            if not data:
                end = start + fed
                yield Piece(b"".join(parts), first, end, Break(end, end, "gzip member cut short"))
                return end, b""


def _up_to_error(f: BinaryIO, start: int, fed: int, given: int, data: bytes) -> tuple[bytes, int]:
    """What a member still gives before the error somewhere in `data`, and where in the file that error is.

    A decoder that failed cannot be asked: the `fed` bytes before `data` are unpacked again (`given` bytes of what
    they hold are known), then `data` byte by byte.
    """
    unzip = zlib.decompressobj(31)
    seen = 0  # unpacked bytes so far
    out = bytearray()
    position = start
    f.seek(start)
    again = iter(lambda: f.read(min(CHUNK, start + fed - position)), b"")
    for piece in chain(again, (data[i : i + 1] for i in range(len(data)))):
        try:
            got = unzip.decompress(piece)
        except zlib.error:
            break
        out += got[max(given - seen, 0) :]
        seen, position = seen + len(got), position + len(piece)
    return bytes(out), position


def _next_member(f: BinaryIO, position: int) -> int:
    """Where a gzip member seems to start, at `position` or later, or the end of the file."""
    f.seek(position)
    block = b""
    while more := f.read(CHUNK):
        # three bytes of the block before: a start is four bytes long
        block = block[-3:] + more
        position += len(more)
        if match := MEMBER_START.search(block):
            return position - len(block) + match.start()
    return position


def _zstd(f: BinaryIO) -> Iterator[Piece]:
    """A zstd file as one stream; what was packed with a dictionary cannot be read, and is told as damage."""
    f.seek(0)
    stream, sure = pa.CompressedInputStream(pa.PythonFile(f, "r"), "zstd"), 0
    try:
        while data := stream.read(1 << 12):  # what is asked for where the stream breaks is lost
            yield Piece(data)
            sure = max(sure, f.tell() - 2 * CHUNK)  # Arrow reads ahead by no more than that
    except OSError as error:
        yield Piece(b"", broken=Break(sure, f.seek(0, io.SEEK_END), f"zstd: {str(error).splitlines()[0]}"))
