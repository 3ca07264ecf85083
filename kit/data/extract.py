"""Pages → documents: charset, main text, language, images and reviews of each selected page.

`extract_page` is a plain function of one index row and its page; Spark, a notebook and a test call the same
one. A page that cannot become a document is counted under a named reason, never skipped.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
import signal
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, BinaryIO
from urllib.parse import urlsplit

import fsspec
import pyarrow as pa
from resiliparse.extract.html2text import extract_plain_text
from resiliparse.parse.encoding import bytes_to_str, detect_encoding, map_encoding_to_html5
from resiliparse.parse.html import DOMNode, HTMLTree

from kit import resolve
from kit.data import archive
from kit.data.archive import Page, RecordError
from kit.data.spark import plan, run_tasks
from kit.lake import Counts, Lake, Manifest, Output, write_table
from kit.params import ExtractText

IMAGE = pa.struct([(n, pa.string()) for n in ("src", "alt", "caption", "context")])
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
        ("reason", pa.string()),
        ("kind", pa.string()),
    ]
)
CYRILLIC = frozenset(
    map_encoding_to_html5(c) for c in ("windows-1251", "koi8-r", "koi8-u", "ibm866", "iso-8859-5")
)
META_CHARSET = re.compile(rb"<meta[^>]{0,200}charset\s*=\s*[\"']?\s*([\w:-]+)", re.IGNORECASE)
MAX_IMAGES, MAX_REVIEWS, MAX_JSON_BYTES, CONTEXT_CHARS = 50, 500, 1 << 20, 300
MAX_COUNT = 2**31 - 1


def doc_id(warc_filename: str, offset: int, wrapping: str = "member") -> str:
    """Identity of a document: a hash of where its bytes lie, so partitioning and retries never change it.

    In a `stream` the offset counts unpacked bytes, which a member of the same file could have as its own.
    """
    place = f"{warc_filename}:{'unpacked:' if wrapping == 'stream' else ''}{offset}"
    return hashlib.blake2b(place.encode(), digest_size=10).hexdigest()


def decode(payload: bytes, http_charset: str | None) -> tuple[str, str]:
    """Text of a page and the charset that was used: `(text, charset)`; never raises.

    Bytes that are valid UTF-8 are UTF-8, whatever the heads claim (by chance they would not be). Otherwise the
    first claim that decodes without error wins: HTTP head, `<meta>`, a guess from the bytes.
    """
    if payload[:2] in (b"\xff\xfe", b"\xfe\xff"):
        return payload.decode("utf-16", "replace").lstrip("\ufeff"), "utf-16"
    escapes = b"\x1b$" in payload[:4096]  # ISO-2022-JP is ASCII to a UTF-8 decoder
    if not escapes:
        try:
            return payload.decode("utf-8-sig"), "utf-8"
        except UnicodeDecodeError:
            pass
    meta = META_CHARSET.search(payload[:4096])
    guess = _codec(detect_encoding(payload[:65536]) or "utf-8")
    claims = [_codec(c) for c in (http_charset, meta[1].decode("latin-1") if meta else None) if c]
    # any Cyrillic charset decodes any other's bytes without an error: there the letters tell more than the heads
    first = [guess] if CYRILLIC.issuperset({guess, *claims[:1]}) else []
    for charset in [*first, *claims, guess]:
        try:
            return payload.decode(charset), charset
        except (UnicodeDecodeError, LookupError):
            continue
    return bytes_to_str(payload, guess, errors="replace"), guess


def _codec(charset: str) -> str:
    """Python's name of a charset as browsers understand it, or what was said if they do not know it."""
    return map_encoding_to_html5(charset) or charset


def _resiliparse(html: str, tree: HTMLTree) -> str:
    return extract_plain_text(tree, main_content=True, preserve_formatting=True, alt_texts=False)


def _trafilatura(html: str, tree: HTMLTree) -> str:
    import trafilatura

    # no deduplicate=True: it remembers earlier pages of the process, so results would depend on partitioning
    return trafilatura.extract(html, include_comments=True, include_tables=True) or ""


EXTRACTORS: dict[str, Callable[[str, HTMLTree], str]] = {
    "resiliparse": _resiliparse,
    "trafilatura": _trafilatura,
}
"""Main-text extractors by name; one takes the page's HTML and its parsed tree and returns plain text."""


def extract_page(row: dict[str, Any], page: Page, extractor: str) -> dict[str, Any]:
    """One document out of one page, as a row of `DOCUMENT`; raises `RecordError` with the reason to count."""
    text, charset = decode(page.payload, page.charset)
    text = text.replace("\x00", "")
    title, language, images, reviews = "", (row["content_languages"] or "").split(",")[0], [], []
    if page.record_type == "conversion" or page.mime == "text/plain":
        extractor = "none"
    else:
        tree = HTMLTree.parse(text)
        title = (tree.title or "").strip()
        # what the index detected is better than what the page claims, where there is an index
        language = language or (tree.document.query_selector("html").getattr("lang") or "")[:35]
        images, reviews = list(_images(tree)), _reviews(tree)
        text = EXTRACTORS[extractor](text, tree)
    if not text.strip():
        raise RecordError("no text")
    return {
        "doc_id": doc_id(row["warc_filename"], row["warc_record_offset"], row["wrapping"]),
        "url": row["url"],
        "host": urlsplit(row["url"]).hostname,
        "fetch_time": page.fetch_time,
        "status": page.status,
        "mime": page.mime,
        "charset": charset,
        "language": language or None,
        "title": title,
        "text": text.strip(),
        "images": images,
        "reviews": reviews,
        "warc_filename": row["warc_filename"],
        "warc_record_offset": row["warc_record_offset"],
        "warc_record_length": row["warc_record_length"],
        "payload_digest": page.digests[0],
        "truncated": page.truncated or row["content_truncated"],
        "extractor": extractor,
    }


def _images(tree: HTMLTree) -> Iterator[dict[str, str]]:
    """Images with alternative text, caption and the text beside them."""
    for image in tree.document.query_selector_all("img[src]")[:MAX_IMAGES]:
        figure = image.parent
        while figure is not None and figure.tag not in ("figure", "body"):
            figure = figure.parent
        figure = figure if figure is not None and figure.tag == "figure" else None
        caption = figure.query_selector("figcaption") if figure else None
        yield {
            "src": image.getattr("src"),
            "alt": (image.getattr("alt") or "").strip(),
            "caption": caption.text.strip() if caption else "",
            "context": _beside(figure or image),
        }


def _beside(node: DOMNode) -> str:
    """Text of the nearest elements before and after `node`."""
    found = []
    for step in ("prev", "next"):
        other = getattr(node, step)
        while other is not None and not (other.text or "").strip():
            other = getattr(other, step)
        if other is not None:
            found.append(" ".join(other.text.split())[:CONTEXT_CHARS])
    return " … ".join(found)


def _reviews(tree: HTMLTree) -> list[dict[str, Any]]:
    """Reviews that the page marks up as schema.org JSON-LD, however deep; broken JSON yields none."""
    found: list[dict[str, Any]] = []
    for script in tree.document.query_selector_all('script[type="application/ld+json"]'):
        source = script.text or ""
        if len(source) > MAX_JSON_BYTES:
            continue
        try:
            todo: list[tuple[Any, dict[str, Any]]] = [(json.loads(source), {})]
        except (ValueError, RecursionError):
            continue
        while todo and len(found) < MAX_REVIEWS:
            node, about = todo.pop()
            if isinstance(node, list):
                todo += [(x, about) for x in reversed(node)]
            elif isinstance(node, dict):
                if _type(node) == "Review":
                    found.append(_review(node, about))
                else:
                    todo += [(v, node) for v in node.values() if isinstance(v, (dict, list))]
    return [r for r in found if r["body"]]


def _review(node: dict[str, Any], about: dict[str, Any]) -> dict[str, Any]:
    """One schema.org Review; `about` is the thing it was found under, used when it names no subject."""
    item = node.get("itemReviewed") if isinstance(node.get("itemReviewed"), dict) else about
    rating = node.get("reviewRating") if isinstance(node.get("reviewRating"), dict) else {}
    counters = node.get("interactionStatistic")
    counters = counters if isinstance(counters, list) else [counters] if isinstance(counters, dict) else []
    likes = {
        str(c.get("interactionType")).rpartition("/")[2]: _number(c.get("userInteractionCount"))
        for c in counters
        if isinstance(c, dict)
    }
    helpful = likes.get("LikeAction")
    return {
        "item": _string(item.get("name")),
        "item_type": _type(item),
        "rating": _number(rating.get("ratingValue")),
        "rating_max": _number(rating.get("bestRating")) or 5.0,
        "title": _string(node.get("name")),
        "body": _string(node.get("reviewBody")),
        "helpful": None if helpful is None else int(min(helpful, MAX_COUNT)),
        "votes": None
        if helpful is None
        else int(min(helpful + (likes.get("DislikeAction") or 0), MAX_COUNT)),
    }


def _type(node: dict[str, Any]) -> str:
    """The schema.org type of a thing, the first where it has several."""
    kind = node.get("@type")
    return _string(kind[0] if isinstance(kind, list) and kind else kind)


def _string(value: Any) -> str:
    """Text out of JSON, without the halves of surrogate pairs that JSON may escape and Parquet cannot hold."""
    return str(value or "").encode("utf-8", "ignore").decode().replace("\x00", "").strip()


def _number(value: Any) -> float | None:
    """A finite, non-negative number, or None; JSON in the wild holds words, NaN and 1e999."""
    try:
        number = float(value)
    except (TypeError, ValueError, OverflowError):
        return None
    return number if 0 <= number < math.inf else None


@contextmanager
def time_limit(seconds: float) -> Iterator[None]:
    """Raise `RecordError("timeout")` when the block takes longer.

    Works between Python instructions of the main thread: one call into C that never returns is not stopped.
    """

    def late(*_: Any) -> None:
        raise RecordError("timeout")

    before = signal.signal(signal.SIGALRM, late)
    # again every second: a library may swallow the first alarm with an `except Exception` of its own
    signal.setitimer(signal.ITIMER_REAL, seconds, 1.0)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def read_page(f: BinaryIO, row: dict[str, Any], max_page_mb: float) -> Page:
    """The page an index row points at, its URL and digest verified; raises `RecordError`."""
    limit = int(max_page_mb * 1e6)
    raw = archive.read_bytes(
        f, row["warc_record_offset"], row["warc_record_length"], row["wrapping"], 2 * limit
    )
    page = archive.parse_page(raw, limit)
    if page.url != row["url"]:
        raise RecordError("URL is not the index's")
    # an index may write sha1: before the digest, or know none
    digest = (row["content_digest"] or "").removeprefix("sha1:")
    if digest and digest not in page.digests:
        raise RecordError("digest is not the index's")
    return page


def extract_rows(
    base: str, rows: list[dict[str, Any]], p: ExtractText
) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Documents and failures of index rows, which are sorted by file and offset."""
    documents, failures = [], []
    opened: dict[tuple[str, str], BinaryIO] = {}
    for row in rows:
        key = row["warc_filename"], row["wrapping"]
        try:
            if key not in opened:
                for f in opened.values():
                    f.close()
                opened = {}
                opened[key] = open_archive(f"{base}/{key[0]}", key[1])
            with time_limit(p.page_timeout_s):
                documents.append(extract_page(row, read_page(opened[key], row, p.max_page_mb), p.extractor))
        except RecordError as error:
            kind = "dropped" if error.reason == "no text" else "failed"
            failures.append({k: row[k] for k in FAILURE.names[:3]} | {"reason": error.reason, "kind": kind})
        except Exception as error:  # a page may break a parser in any way; it must not take the others along
            reason = f"extractor {type(error).__name__}"
            failures.append({k: row[k] for k in FAILURE.names[:3]} | {"reason": reason, "kind": "failed"})
    for f in opened.values():
        f.close()
    return documents, failures


def open_archive(uri: str, wrapping: str) -> BinaryIO:
    """An archive for `archive.read_bytes`; raises `RecordError` when it is not there."""
    try:
        f = fsspec.open(uri, "rb").open()
    except OSError:
        raise RecordError("archive file missing") from None
    return archive.unpacked(f) if wrapping == "stream" else f


def extract_text(p: ExtractText, lake: Lake) -> Manifest:
    """Pages → documents on Spark: `part-…` (rows of `DOCUMENT`) and `failures` (pages lost, each with why).

    Tasks are planned by bytes of input, not by files or cores; raises `LakeError` when no page could be read.
    """
    with lake.stage(p) as out:
        selection = out.read("10_explore_index")
        rows = lake.table(selection).to_pylist()
        base = resolve(selection.metrics["archive_base"])
        if "://" not in base:
            for name in sorted({r["warc_filename"] for r in rows}):
                out.read_outside(f"{selection.metrics['archive_base']}/{name}")
        shares = plan([r["warc_record_length"] for r in rows], p.part_mb * 1e6)
        lake_uri, folder, attempt = lake.uri, out.base, out.attempt

        def work(task: tuple[int, list[dict[str, Any]]]) -> dict[str, Any]:
            number, share = task
            documents, failures = extract_rows(base, share, p)
            table = pa.Table.from_pylist(documents, schema=DOCUMENT)
            output = write_table(lake_uri, folder, attempt, f"part-{number:05d}", table)
            return {"done": len(share), "output": output.model_dump(), "failures": failures}

        tasks = [(len(s), (i, rows[s.start : s.stop])) for i, s in enumerate(shares)]
        results = run_tasks(p, work, tasks, "extract", "pages")
        for result in results:
            out.add(Output(**result["output"]))
        failures = [f for r in results for f in r["failures"]]
        if failures:
            out.table("failures", pa.Table.from_pylist(failures, schema=FAILURE))
        by_kind = {k: Counter(f["reason"] for f in failures if f["kind"] == k) for k in ("dropped", "failed")}
        counts = Counts(
            records_in=len(rows),
            records_out=sum(o.rows for o in out.outputs if o.name.startswith("part")),
            dropped=dict(sorted(by_kind["dropped"].items())),
            failed=dict(sorted(by_kind["failed"].items())),
        )
        return out.commit(counts, {"parts": len(tasks), "extractor": p.extractor})
