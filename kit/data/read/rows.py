"""Reviews that a person brings as CSV, TSV, text or JSON Lines: where each row lies, and the document it becomes.

To the chain a row is what a record of an archive is, bytes at an offset of a file, so ids, accounts and the way
back need nothing of their own. CSV is read as Python's csv module and Spark do (RFC 4180, any line end).
"""

from __future__ import annotations

import csv
import io
import json
import re
from collections.abc import Iterable, Iterator
from contextlib import suppress
from typing import NamedTuple
from urllib.parse import quote

from kit.data.read.archive import ROWS, Damage, Entry, Page, opened
from kit.data.read.charset import decode
from kit.data.read.record import sha1
from kit.data.read.unpack import Break, Piece, pieces
from kit.errors import ArchiveError, RecordError

WRAPPINGS = ROW, PACKED = "row", "row stream"
"""Wrappings of a row: its offset counts bytes of the file, or of what the file unpacks to."""
BYTE_ORDER_MARK = b"\xef\xbb\xbf"
MAX_ROW, HEAD_BYTES = 4 << 20, 1 << 18
"""Longest row, and how much of a file is looked at for its columns and its ratings."""
LINE_END = rb"(?:\r\n|\n|\r(?!\Z))"
LINE = re.compile(rb"[^\r\n]*+" + LINE_END)
ONE_LINE = rb'"[^"\r\n]*+(?:""[^"\r\n]*+)*+"[^D\r\n]*+'
MORE_LINES = rb'"[^"]*+(?:""[^"]*+)*+" *+(?=[D\r\n])'
FIELD = rb"(?:" + ONE_LINE + b"|" + MORE_LINES + rb'|[^"D\r\n][^D\r\n]*+)?+'
"""A field before a delimiter D. As in the csv module, only its first sign can be an opening quote, and what follows
the closing one on the same line is text, too; over several lines it means that the first was never to open."""


NAMES = {
    "text": "text reviewtext reviewbody review body content comment comments verifiedreviews",
    "rating": "rating starrating stars score overall reviewrating sentiment label polarity",
    "item": "movietitle movie filmtitle film producttitle productname product item parentasin asin title",
    "title": "reviewtitle reviewheadline headline summary subject title",
    "site": "site source host domain",
    "helpful": "helpfulvotes helpfulvote helpful",
    "votes": "totalvotes totalvote votes",
}
"""Usual names of columns, the surest first, without case and signs: `Review Text` and `review_text` are one."""
STARS = {"positive": 5.0, "pos": 5.0, "neutral": 3.0, "negative": 1.0, "neg": 1.0}
# the csv module's own limit of 128 KiB is shorter than long reviews are
csv.field_size_limit(MAX_ROW)


class Layout(NamedTuple):
    """What a file says of its rows: `csv`, `jsonl` or `txt`, a CSV's delimiter and columns, the best rating."""

    kind: str
    delimiter: str = ","
    columns: tuple[str, ...] = ()
    rating_max: float = 5.0


def scan_rows(path: str, name: str) -> Iterator[Entry | Damage]:
    """The rows of a file, whose identity is `name`, as rows of the index; raises `ArchiveError`."""
    file_layout = layout(path)
    breaks: list[Break] = []
    n_rows = 0
    with opened(path) as f:
        source, _, packed = pieces(f)
        rows = cut_rows(_unpacked(source, breaks), file_layout)
        if file_layout.kind == "csv":
            next(rows, None)  # the names of the columns
        wrapping = PACKED if packed else ROW
        # the file is the host, so that it is a site; no fragment, for that would not tell pages apart
        site = f"file://{quote(name, safe='').lower()}/"
        for offset, data, reason in rows:
            n_rows += 1
            if reason:
                yield Damage(name, offset, len(data), wrapping, reason)
                continue
            yield Entry(
                warc_filename=name,
                warc_record_offset=offset,
                warc_record_length=len(data),
                wrapping=wrapping,
                record_type="resource",
                url=f"{site}{offset}",
                fetch_time=None,
                fetch_status=200,
                content_mime_detected="text/plain",
                content_digest=sha1(data),
                content_truncated=None,
            )
    for broken in breaks:
        yield Damage(name, broken.offset, broken.end - broken.offset, "member", broken.reason)
    if not n_rows and not breaks:
        yield Damage(name, 0, 0, ROW, "no row in file")


def _unpacked(source: Iterable[Piece], breaks: list[Break]) -> Iterator[bytes]:
    """The bytes of pieces, those before a break included; the breaks are put into `breaks`."""
    for piece in source:
        if piece.broken:
            breaks.append(piece.broken)
        yield piece.data


def cut_rows(chunks: Iterable[bytes], file_layout: Layout) -> Iterator[tuple[int, bytes, str | None]]:
    """Offset and bytes of each row, its line end left off, and None, or why it is none; blank lines are skipped.

    `MAX_ROW` and two chunks are in memory at most. A quote that is not closed, or not at the end of a field, costs
    its own line, and reading goes on at the next; of a line that is too long the beginning is told.
    """
    row = _row_pattern(file_layout)
    source = iter(chunks)
    window, start = b"", 0  # unpacked bytes from the `start`-th on, …
    position = 0  # … of which those before this one are done
    at_end = False
    too_long: tuple[int, bytes] | None = None  # offset and beginning of a row whose end is still looked for
    while True:
        match = (LINE if too_long else row).match(window, position)
        reason = None
        if not match and not too_long and (at_end or len(window) - position > MAX_ROW):
            if position == len(window):
                return
            # no row, however much more comes: a quote in its first line is never closed
            match = LINE.match(window, position)
            reason = "unclosed quote"
            if not match:
                too_long = start + position, window[position : position + MAX_ROW]
        if match:
            data = match[0].rstrip(b"\r\n")
            if too_long:
                yield *too_long, "row too long"
            elif len(data) > MAX_ROW:
                yield start + position, data, "row too long"
            elif data:
                yield start + position, data, reason
            too_long = None
            position = match.end()
        else:
            if too_long:
                position = len(window) - 1  # the last byte may be half of a line end
            chunk = next(source, None)
            at_end = chunk is None
            # the last row has a line end, too, so that the pattern fits it
            window = window[position:] + (b"\n" if at_end else chunk)
            start += position
            position = len(BYTE_ORDER_MARK) if start == 0 and window.startswith(BYTE_ORDER_MARK) else 0


def _row_pattern(file_layout: Layout) -> re.Pattern[bytes]:
    """What a whole row looks like, its line end included: in a CSV it may go over several lines."""
    if file_layout.kind != "csv":
        return LINE
    delimiter = re.escape(file_layout.delimiter.encode())
    return re.compile((FIELD + rb"(?:D" + FIELD + rb")*+" + LINE_END).replace(b"D", delimiter))


def layout(uri: str, rating_column: str = "") -> Layout:
    """What a file's beginning says; a rating above 5 means a scale up to 10, or 100. Raises `ArchiveError`."""
    with opened(uri) as f:
        source, head = pieces(f)[0], b""
        while len(head) < HEAD_BYTES and (piece := next(source, None)):
            head += piece.data
    # rows are cut at single bytes, and in UTF-16 a line end has two
    if head[:2] in (b"\xff\xfe", b"\xfe\xff"):
        raise ArchiveError(f"'{uri}' is UTF-16: save it as UTF-8")
    kind = ROWS.search(uri)[1].lower()
    file_layout = Layout({"tsv": "csv", "ndjson": "jsonl"}.get(kind, kind))
    if file_layout.kind == "csv":
        # the sign that the first line holds most often, quoted names left out
        names = re.sub(rb'"[^"]*"', b"", LINE.match(head.lstrip() + b"\n")[0]).decode("latin-1")
        file_layout = file_layout._replace(delimiter="\t" if kind == "tsv" else max(",;\t|", key=names.count))
    lines = [decode(data, None)[0] for _, data, reason in cut_rows([head], file_layout) if not reason]
    if file_layout.kind == "csv" and lines:
        file_layout = file_layout._replace(columns=tuple(map(column_key, _cells(lines.pop(0), file_layout))))
    # a scale is told by the best rating among the first rows
    best = 5.0
    for line in lines:
        with suppress(RecordError):
            best = max(best, rating_of(row_fields(line, file_layout), rating_column, file_layout)[0] or 0)
    return file_layout._replace(rating_max=next((m for m in (5.0, 10.0, 100.0) if best <= m), best))


def row_page(raw: bytes, url: str) -> Page:
    """A row as a page, to be verified like any other."""
    return Page(url, "resource", 200, "text/plain", None, None, raw, (sha1(raw),) * 2, None)


def first_value(row: dict[str, str], names: str) -> str:
    return next((row[c] for c in names.split() if row.get(c)), "")


def row_fields(line: str, file_layout: Layout) -> dict[str, str]:
    """A row's values by column; raises `RecordError` where it is no row of its file."""
    if file_layout.kind == "txt":
        return {"text": line}
    if file_layout.kind == "csv":
        cells = _cells(line, file_layout)
        # empty ones at the end are what spreadsheets write
        if any(cells[len(file_layout.columns) :]):
            raise RecordError("more fields than columns")
        return dict(zip(file_layout.columns, cells, strict=False))
    try:
        values = json.loads(line)
    except (ValueError, RecursionError):  # a line of a hundred thousand brackets ends in the second
        values = None
    if not isinstance(values, dict):
        raise RecordError("not a JSON object")
    texts = {k: v if isinstance(v, str) else "" if v is None else json.dumps(v) for k, v in values.items()}
    # without the halves of surrogate pairs that JSON can hold and Parquet cannot
    return {column_key(k): v.encode("utf-8", "ignore").decode() for k, v in texts.items()}


def _cells(line: str, file_layout: Layout) -> list[str]:
    return next(csv.reader(io.StringIO(line, newline=""), delimiter=file_layout.delimiter), [])


def column_key(name: str) -> str:
    return re.sub(r"[\W_]", "", name).casefold()


def rating_of(row: dict[str, str], rating_column: str, file_layout: Layout) -> tuple[float | None, float]:
    """The rating (`4`, `4,5`, `7/10` or one of `STARS`) or None, and the best that can be."""
    value = first_value(row, column_key(rating_column) or NAMES["rating"]).strip().casefold()
    if value in STARS:
        return STARS[value], 5.0
    number = re.match(r"(\d{1,9}(?:[.,]\d+)?)(?: ?/ ?(\d{1,9}))?", value)
    if not number:
        return None, file_layout.rating_max
    rating = float(number[1].replace(",", "."))
    return rating, max(rating, float(number[2] or file_layout.rating_max))
