"""What stage 20 writes, for all that read it: documents, pages that became none, a document's identity."""

from __future__ import annotations

import pyarrow as pa

IMAGE = pa.struct([(n, pa.string()) for n in ("src", "alt", "caption", "context")])
LINK = pa.struct([(n, pa.string()) for n in ("url", "text")])
REVIEW = pa.struct(
    [
        ("item", pa.string()),
        ("item_type", pa.string()),
        ("rating", pa.float32()),
        ("rating_max", pa.float32()),
        ("title", pa.string()),
        ("body", pa.string()),
        ("helpful", pa.int32()),
        ("votes", pa.int32()),
    ]
)
"""A review as schema.org marks it up; its author is left out on purpose."""
DOCUMENT = pa.schema(
    [
        ("doc_id", pa.string()),
        ("url", pa.string()),
        ("host", pa.string()),
        ("fetch_time", pa.timestamp("ms")),
        ("status", pa.int16()),
        ("mime", pa.string()),
        ("charset", pa.string()),
        ("language", pa.string()),
        ("title", pa.string()),
        ("text", pa.string()),
        ("images", pa.list_(IMAGE)),
        ("links", pa.list_(LINK)),
        ("reviews", pa.list_(REVIEW)),
        ("warc_filename", pa.string()),
        ("warc_record_offset", pa.int64()),
        ("warc_record_length", pa.int64()),
        ("payload_digest", pa.string()),
        ("truncated", pa.string()),
        ("extractor", pa.string()),
    ]
)
FAILURE = pa.schema(
    [
        ("url", pa.string()),
        ("warc_filename", pa.string()),
        ("warc_record_offset", pa.int64()),
        ("wrapping", pa.string()),
        ("reason", pa.string()),
        ("kind", pa.string()),
    ]
)
"""A page that became no document; `kind` is `dropped` (nothing wrong with it), `failed`, or `retry` (failed for now)."""
PLACE = ("warc_filename", "warc_record_offset", "wrapping")
DROPPED = ("no text", "prefilter: language", "prefilter: words")
