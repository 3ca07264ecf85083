"""The documents of a file that somebody dropped: HTML, text, JSON with `text`, WARC, WET or ARC; or an image.

What is no archive is made one beside it, so that everything after is the same for all kinds.
"""

from __future__ import annotations

import json
import os
import re
import string
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any
from urllib.parse import quote

import pyarrow as pa

from kit.data.engine import guard
from kit.data.extract import walk
from kit.data.extract.extract import extract_rows
from kit.data.extract.schema import DOCUMENT, DROPPED, PLACE
from kit.data.read import charset
from kit.data.read.archive import SUFFIX
from kit.data.read.unpack import GZIP, ZSTD
from kit.data.select.index import Index, doc_id
from kit.errors import RecordError
from kit.lake.manifest import Account, Counts
from kit.params import ExploreIndex, RefineOnArrival

IMAGE = re.compile(rb"\xff\xd8\xff|\x89PNG\r\n|GIF8[79]a|RIFF.{4}WEBP", re.DOTALL)
MARKUP = re.compile(rb"<(!doctype html|html|head|body|title|meta|div|p|h1|article)\b", re.IGNORECASE)
NO_TEXT = re.compile(rb"[\x00-\x08\x0e-\x1a\x1c-\x1f]")
BETWEEN, HTTP = re.compile(r"[\s,\[\]\x1e\ufeff]*"), re.compile(r"https?://[^\s<>]+$", re.IGNORECASE)
ROW = ("url", *PLACE, "warc_record_length", "content_digest", "content_truncated", "content_languages")
DECODER = json.JSONDecoder()
CHUNK = 64
"""Pages between two looks at the clock of their file."""


def documents_of(
    path: str, name: str, event_time: str, p: RefineOnArrival
) -> tuple[str, pa.Table | None, Counts]:
    """The kind of the local file `path`, its documents if there are any, and where all its records went.

    `name` is its path in the lake, for its documents the file that they come from; `event_time` is when it landed.
    """
    packed, dead = guard.in_child(
        partial(_open, p=p), [(path, name, event_time)], p.file_timeout_s, p.page_memory_mb
    )
    child_report = (
        {"kind": "unknown", "rows": [], "dropped": {}, "failed": {dead[0]: 1}} if dead else json.loads(packed)
    )
    rows, documents, until = child_report["rows"], [], time.monotonic() + p.file_timeout_s
    account = Account(dropped=Counter(child_report["dropped"]), failed=Counter(child_report["failed"]))
    places = {row["doc_id"]: row["place"] for row in rows}
    for i in range(0, len(rows), CHUNK):
        if time.monotonic() > until:
            account.failed["file timeout"] += len(rows) - i
            break
        table, lost = extract_rows(os.path.dirname(path), rows[i : i + CHUNK], p)
        for document in table.to_pylist():
            offset, length = places[document["doc_id"]]
            own_place = {"warc_filename": name, "warc_record_offset": offset, "warc_record_length": length}
            documents.append(document | own_place)
        for failure in lost:
            (account.dropped if failure["reason"] in DROPPED else account.failed)[failure["reason"]] += 1
    account.records_out = 1 if child_report["kind"] == "image" else len(documents)
    account.records_in = account.records_out + account.dropped.total() + account.failed.total()
    table = pa.Table.from_pylist(documents, schema=DOCUMENT) if documents else None
    return child_report["kind"], table, account.counts()


def _open(items: Sequence[tuple[int, Any]], beat: Callable[[int], None], p: RefineOnArrival) -> bytes:
    """Kind, rows and losses of one file as JSON; a row's `place` is offset and length in it. Runs in a child."""
    if not items:  # once more after the only one was killed
        return b""
    beat(0)
    path, name, event_time = items[0][1]
    kind, rows, places, dropped, failed = "unknown", [], {}, {}, Counter()
    try:
        with open(path, "rb") as f:
            kind = kind_of(name, f.read(1 << 16))
        if kind in ("html", "json", "text"):
            places = _as_archive(path, kind, name, event_time, int(p.max_page_mb * 1e6), failed)
        if places or kind == "archive":
            archive = f"{path}.warc" if places else path
            index = Index(ExploreIndex(archive_paths=[archive], max_record_mb=1e6))
            dropped = {why: n for why, n in index.reasons().items() if why != "kept"}
            failed.update(damage.reason for damage in index.damage)
            rows = [{k: r[k] for k in ROW} for r in index.select().to_pylist()]
        elif kind != "image" and not failed:
            failed["no record in file"] = 1
    except RecordError as error:
        failed[error.reason] += 1
    except MemoryError:
        failed["out of memory"] += 1
    except Exception as error:  # a file may break a library in any way; that is the file's fault
        failed[f"cannot be opened: {type(error).__name__}"] += 1
    for row in rows:
        offset = row["warc_record_offset"]
        row["place"] = places.get(offset) or (offset, row["warc_record_length"])
        # the identity of a document in the file that landed, not in the archive made of it
        row["doc_id"] = doc_id(name, row["place"][0], row["wrapping"])
    beat(-1)
    return json.dumps({"kind": kind, "rows": rows, "dropped": dropped, "failed": failed}).encode()


def kind_of(name: str, start: bytes) -> str:
    """`archive`, `image`, `html`, `json` or `text`: what the first bytes say, then the name; raises `RecordError`."""
    suffix, bare = os.path.splitext(name)[1].lower(), start.lstrip(b"\xef\xbb\xbf \t\r\n")
    if not start:
        raise RecordError("empty file")
    if start[:3] == GZIP or ZSTD.match(start) or re.match(rb"WARC/\d|filedesc:", start):
        return "archive"
    if IMAGE.match(start):
        return "image"
    if suffix in (".html", ".htm", ".xhtml") or (bare[:1] == b"<" and MARKUP.search(bare[:4096])):
        return "html"
    if suffix in (".json", ".jsonl", ".ndjson") or re.match(rb'[\s\[]*\{\s*"', bare):
        return "json"
    if SUFFIX.search(name):
        return "archive"
    if start[:2] not in (b"\xff\xfe", b"\xfe\xff") and len(NO_TEXT.findall(start)) * 20 > len(start):
        raise RecordError("not text")
    return "text"


def _as_archive(
    path: str, kind: str, name: str, event_time: str, most: int, failed: Counter[str]
) -> dict[int, tuple[int, int]]:
    """Write the pages of a file as WARC records into `….warc`: by each record's offset, where its page lies."""
    data, places = Path(path).read_bytes(), {}
    mime = "text/html" if kind == "html" else "text/plain"
    whole = [(0, len(data), data, page_url(data) if kind == "html" and len(data) <= most else None)]
    with open(f"{path}.warc", "wb") as out:
        for offset, length, text, url in json_texts(data) if kind == "json" else whole:
            if isinstance(text, RecordError):
                failed[text.reason] += 1
                continue
            url = quote(url or f"lake:///{name}{f'/{offset}' if kind == 'json' else ''}", string.punctuation)
            head = f"WARC/1.0\r\nWARC-Type: resource\r\nWARC-Target-URI: {url}\r\nWARC-Date: {event_time}\r\n"
            places[out.tell()] = offset, length
            out.write(
                f"{head}Content-Type: {mime}\r\nContent-Length: {len(text)}\r\n\r\n".encode()
                + text
                + b"\r\n\r\n"
            )
    return places


def json_texts(data: bytes) -> Iterator[tuple[int, int, bytes | RecordError, str | None]]:
    """Offset, length, `text` and `url` of every object of JSON Lines, a list or one object; broken ones as errors."""
    source, end, offset = data.decode("utf-8", "surrogateescape"), 0, 0
    while (start := BETWEEN.match(source, end).end()) < len(source):
        offset += len(source[end:start].encode("utf-8", "surrogateescape"))
        value = None
        try:
            value, end = DECODER.raw_decode(source, start)
            text = value["text"].encode("utf-8", "replace")
        except (KeyError, TypeError, AttributeError):
            text = RecordError("JSON without text")
        except (ValueError, RecursionError):
            end = source.find("\n", start) % (len(source) + 1)  # where no line follows, all that is left
            text = RecordError("not JSON")
        url = value.get("url") if isinstance(value, dict) else None
        length = len(source[start:end].encode("utf-8", "surrogateescape"))
        yield offset, length, text, url if isinstance(url, str) and HTTP.match(url) else None
        offset += length


def page_url(payload: bytes) -> str | None:
    """The address that a page claims for itself: its canonical link or its og:url."""
    tree = walk.parse(charset.decode(payload, None)[0])
    for query, attribute in (('link[rel="canonical"]', "href"), ('meta[property="og:url"]', "content")):
        node = tree.css_first(query)
        url = ((node.attributes.get(attribute) if node else None) or "").strip()
        if HTTP.match(url):
            return url
    return None
