"""Bytes of the selected pages: from the archives that hold them, in order, checked against the index."""

from __future__ import annotations

import io
from collections.abc import Iterable, Iterator
from itertools import groupby
from typing import Any, BinaryIO

import fsspec

from kit.data.read import archive, fetch
from kit.data.read import rows as row_files
from kit.data.read.archive import Page
from kit.errors import RecordError

# the first two bound what one child works on, the third a single page that a person looks at
BATCH_PAGES, BATCH_BYTES, MOST_BYTES = 256, 32 << 20, 64 << 20


def verified_page(row: dict[str, Any], raw: bytes, max_page_mb: float) -> Page:
    """The page in the bytes an index row points at, its URL and digest verified; raises `RecordError`."""
    limit = int(max_page_mb * 1e6)
    plain = archive.read_bytes(io.BytesIO(raw), 0, len(raw), row["wrapping"], 2 * limit)
    is_row = row["wrapping"] in row_files.WRAPPINGS
    # a record may be twice as long as its page: heads, and chunks that are undone
    page = row_files.row_page(plain, row["url"]) if is_row else archive.parse_page(plain, limit)
    if page.url != row["url"]:
        raise RecordError("URL is not the index's")
    # an index may write sha1: before the digest, or know none
    digest = (row["content_digest"] or "").removeprefix("sha1:")
    if digest and digest not in page.digests:
        raise RecordError("digest is not the index's")
    return page


def read_rows(
    base: str, rows: Iterable[dict[str, Any]], max_bytes: int
) -> Iterator[tuple[dict[str, Any], bytes | RecordError]]:
    """Every row with its bytes in the archive, or with why they cannot be read; nothing raises."""

    def way(row: dict[str, Any]) -> str:
        if row["warc_record_length"] > max_bytes:
            return "too large"
        return row["warc_filename"] if row["wrapping"].endswith("stream") else "ranges"

    for how, group in groupby(rows, way):
        if how == "too large":
            yield from ((row, RecordError("record too large")) for row in group)
        elif how == "ranges":
            yield from fetch.read_ranges(base, list(group))
        else:
            yield from _read_stream(f"{base}/{how}", group, max_bytes)


def _read_stream(
    uri: str, rows: Iterable[dict[str, Any]], max_bytes: int
) -> Iterator[tuple[dict[str, Any], bytes | RecordError]]:
    """Rows of an archive that has to be unpacked as a whole."""
    f: BinaryIO | None = None
    for row in rows:
        place = row["warc_record_offset"], row["warc_record_length"]
        # opened at the first row and not before the loop, so that what goes wrong there is this row's error
        try:
            f = f or open_archive(uri, "stream")
            yield row, archive.read_bytes(f, *place, "stream", max_bytes)
        except RecordError as error:
            yield row, error
    if f:
        f.close()


def in_batches(pairs: Iterable[tuple[dict[str, Any], Any]]) -> Iterator[list[tuple[dict[str, Any], Any]]]:
    """Groups of pages for one child: few enough to do again after a kill, many enough to be worth a fork."""
    batch, size = [], 0
    for pair in pairs:
        batch.append(pair)
        size += len(pair[1]) if isinstance(pair[1], bytes) else 0
        if len(batch) == BATCH_PAGES or size > BATCH_BYTES:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


def open_archive(uri: str, wrapping: str) -> BinaryIO:
    """An archive for `archive.read_bytes`; raises `RecordError` when it is not there."""
    try:
        f = fsspec.open(uri, "rb").open()
    except OSError:
        raise RecordError("archive file missing") from None
    return archive.unpacked(f) if wrapping.endswith("stream") else f
