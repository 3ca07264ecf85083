"""Pages → documents: charset, main text, language, images, links and reviews of each selected page.

`extract_page` is a plain function of one index row and its page; Spark, a notebook and a test call the same
one. A page that cannot become a document is counted under a named reason, never skipped. Pages are parsed in a
child process (`guard`), so one that hangs, explodes or crashes a parser costs itself alone.
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from functools import cached_property, partial
from typing import Any
from urllib.parse import urlsplit

import pyarrow as pa
from selectolax.lexbor import LexborHTMLParser

from kit import resolve_path
from kit.data.engine import guard
from kit.data.engine.spark import plan_parts
from kit.data.extract import blocks, reviews, walk
from kit.data.extract import page as pages
from kit.data.extract.schema import DOCUMENT, DROPPED, FAILURE, PLACE
from kit.data.extract.source import MOST_BYTES, in_batches, read_rows, verified_page
from kit.data.read import fetch
from kit.data.read import rows as row_files
from kit.data.read.archive import Page
from kit.data.read.charset import decode
from kit.data.read.rate import run_at_rate
from kit.data.text import rules
from kit.data.text.language import detect_language
from kit.errors import ArchiveError, LakeError, RecordError
from kit.lake.files import PartWriter
from kit.lake.manifest import Account, Manifest, Output
from kit.lake.store import Lake, StageWriter
from kit.params import ExtractText

PREFILTER_SCORE = 0.8
"""How sure the language of a page's whole text must be before the main text is not even looked for."""


class Html:
    """One page's HTML; it is parsed and cut into blocks at most once, and only if somebody asks."""

    def __init__(self, source: str) -> None:
        self.source = source

    @cached_property
    def tree(self) -> LexborHTMLParser:
        """The parsed page; `blocks` may take nodes out of it, so look for images and the like before."""
        return walk.parse(self.source)

    @cached_property
    def blocks(self) -> blocks.Blocks:
        """The page's text blocks."""
        return walk.walk(self.tree)


def _resiliparse(html: Html) -> str:
    from resiliparse.extract.html2text import extract_plain_text

    return extract_plain_text(html.source, main_content=True, preserve_formatting=True, alt_texts=False)


def _trafilatura(html: Html) -> str:
    import trafilatura

    # no deduplicate=True: it remembers earlier pages of the process, so results would depend on partitioning
    return trafilatura.extract(html.source, include_comments=True, include_tables=True) or ""


EXTRACTORS: dict[str, Callable[[Html], str]] = {
    "auto": lambda html: blocks.main_text(html.blocks),
    "resiliparse": _resiliparse,
    "trafilatura": _trafilatura,
}
"""Main-text extractors by name; one takes a page and returns its plain text."""


def extract_page(
    row: dict[str, Any], page: Page, p: ExtractText, layout: row_files.Layout | None = None
) -> dict[str, Any]:
    """One document out of one page, as a row of `DOCUMENT`; raises `RecordError` with the reason to count.

    The page may be a row of a person's file of that `layout`.
    """
    text, charset = decode(page.payload, page.charset)
    text = text.replace("\x00", "")  # `walk` marks line breaks with it, `block_features` where a block begins
    extractor = p.extractor
    fields = {"title": "", "images": [], "links": [], "reviews": []}
    # what the index detected is better than what the page claims, where there is an index
    language = (row["content_languages"] or "").split(",")[0]
    if layout:
        fields |= reviews.document(text, layout, p.text_column, p.rating_column)
        text, extractor = fields["text"], "row"
    elif page.record_type == "conversion" or page.mime == "text/plain":
        extractor = "none"
    else:
        # before the main text: cutting into blocks takes nodes out of the tree
        html = Html(text)
        language = language or pages.html_language(html.tree)
        fields = {
            "title": pages.title(html.tree),
            "images": pages.images(html.tree),
            "links": pages.links(html.tree, row["url"]) if p.keep_links else [],
            "reviews": reviews.reviews(html.tree),
        }
        if p.prefilter:
            _prefilter(blocks.all_text(html.blocks), p)
        text = EXTRACTORS[extractor](html)
    if not text.strip():
        raise RecordError("no text")
    return fields | {
        "doc_id": row["doc_id"],
        "url": row["url"],
        "host": fields.get("host") or urlsplit(row["url"]).hostname,
        "fetch_time": page.fetch_time,
        "status": page.status,
        "mime": page.mime,
        "charset": charset,
        "language": language or None,
        "text": text.strip(),
        "warc_filename": row["warc_filename"],
        "warc_record_offset": row["warc_record_offset"],
        "warc_record_length": row["warc_record_length"],
        "payload_digest": page.digests[0],
        "truncated": page.truncated or row["content_truncated"],
        "extractor": extractor,
    }


def _prefilter(cheap: str, p: ExtractText) -> None:
    """Raise `RecordError` where all the text of a page already says that its main text will not be kept.

    A main text has no more words than the page; the language must be sure, because furniture has one, too.
    """
    if rules.too_few_words(cheap, dict(p)):
        raise RecordError("prefilter: words")
    if p.keep_languages:
        language, score = detect_language(cheap)
        if language not in p.keep_languages and score >= PREFILTER_SCORE:
            raise RecordError("prefilter: language")


def extract_rows(base: str, rows: Sequence[dict[str, Any]], p: ExtractText) -> tuple[pa.Table, list[dict]]:
    """Documents (`DOCUMENT`) and failures (rows of `FAILURE`) of index rows sorted by file and offset."""
    EXTRACTORS[p.extractor](Html("<p>what is loaded here need not be loaded in every child</p>"))
    tables: list[pa.Table] = [DOCUMENT.empty_table()]
    failures: list[dict[str, Any]] = []
    layouts: dict[str, row_files.Layout] = {}
    for name in {r["warc_filename"] for r in rows if r["wrapping"] in row_files.WRAPPINGS}:
        with suppress(ArchiveError):  # each of its rows will say so
            layouts[name] = row_files.layout(f"{base}/{name}", p.rating_column)
    for batch in in_batches(read_rows(base, rows, int(p.max_page_mb * 2e6))):
        packed, dead = guard.in_child(
            partial(_work, p=p, layouts=layouts), batch, p.page_timeout_s, p.page_memory_mb
        )
        # as an Arrow stream: what a child says is read, never unpickled
        with pa.ipc.open_stream(packed) as stream:
            lost = stream.schema.metadata or {}
            tables.append(stream.read_all().replace_schema_metadata(None))
        reasons = dead | {int(i): reason.decode() for i, reason in lost.items()}
        failures += [_failure(batch[i][0], reasons[i]) for i in sorted(reasons)]
    return pa.concat_tables(tables), failures


def _work(
    items: Sequence[tuple[int, Any]],
    beat: Callable[[int], None],
    p: ExtractText,
    layouts: dict[str, row_files.Layout],
) -> bytes:
    """Documents of a batch as an Arrow stream; its metadata says why the others are none. Runs in a child."""
    gc.disable()  # the child is gone in a moment, and trees hold no cycles
    documents, lost = [], {}
    for i, (row, raw) in items:
        beat(i)
        try:
            if isinstance(raw, RecordError):
                raise raw
            page, layout = verified_page(row, raw, p.max_page_mb), layouts.get(row["warc_filename"])
            documents.append(extract_page(row, page, p, layout))
        except RecordError as error:
            lost[str(i)] = error.reason
        except MemoryError:
            lost[str(i)] = "out of memory"
        except Exception as error:  # a page may break a parser in any way; it must not take the others along
            lost[str(i)] = f"extractor {type(error).__name__}"
    beat(-1)
    sink = pa.BufferOutputStream()
    schema = DOCUMENT.with_metadata(lost) if lost else DOCUMENT
    with pa.ipc.new_stream(sink, schema) as stream:
        stream.write_table(pa.Table.from_pylist(documents, schema=schema))
    return sink.getvalue().to_pybytes()


def _place(row: Mapping[str, Any]) -> tuple[Any, ...]:
    return tuple(row[name] for name in PLACE)


def _failure(row: dict[str, Any], reason: str) -> dict[str, Any]:
    kind = "dropped" if reason in DROPPED else "retry" if fetch.may_retry(reason) else "failed"
    return {k: row[k] for k in ("url", *PLACE)} | {"reason": reason, "kind": kind}


def by_each(selection: Manifest, row: dict[str, Any]) -> dict[str, str]:
    """The main text of one selected page by every extractor, to look at side by side; raises `RecordError`."""
    ((_, raw),) = read_rows(resolve_path(selection.metrics["archive_base"]), [row], MOST_BYTES)
    if isinstance(raw, RecordError):
        raise raw
    page = verified_page(row, raw, MOST_BYTES / 1e6)
    source = decode(page.payload, page.charset)[0].replace("\x00", "")
    return {name: extractor(Html(source)).strip() for name, extractor in EXTRACTORS.items()}


def extract_text(p: ExtractText, lake: Lake) -> Manifest:
    """Pages → documents on Spark: `part-…` (rows of `DOCUMENT`) and `failures` (pages lost, each with why).

    Tasks are planned by bytes of input, not by files or cores. Where the last result of the same work lost pages
    to the network, only those are fetched again. Raises `LakeError` when no page could be read.
    """
    with lake.stage(p) as out:
        selection = out.read("10_explore_index")
        rows = lake.table(selection)
        # an id is made once, in stage 10; made anew here it could be another one
        if "doc_id" not in rows.column_names:
            raise LakeError("the selection has no doc_id, it was made by an older kit: run stage 10 again")
        base = resolve_path(selection.metrics["archive_base"])
        if "://" not in base:
            for name in sorted(set(rows["warc_filename"].to_pylist())):
                out.read_outside(f"{selection.metrics['archive_base']}/{name}")

        # what an earlier attempt lost to the network is fetched, what it has is kept
        old_parts, failures = _unfinished(lake, out)
        again = {_place(f) for f in failures if f["kind"] == "retry"}
        writer = out.parts

        def work(task: tuple[str, pa.Table]) -> dict[str, Any]:
            name, part = task
            old = old_parts.get(name)
            if old:
                output, lost = _complete_part(base, part, p, lake, writer, old, again)
            else:
                documents, lost = extract_rows(base, part.to_pylist(), p)
                output = writer.table(name, documents)
            return {"done": part.num_rows, "output": output, "failures": lost}

        # parts hang on the input's bytes alone, so any number of cores writes the same ones
        shares = plan_parts(rows["warc_record_length"].to_pylist(), p.part_mb * 1e6)
        parts = [rows.slice(s.start, len(s)).combine_chunks() for s in shares]
        tasks = [(part.num_rows, (f"part-{i:05d}", part)) for i, part in enumerate(parts)]
        results = run_at_rate(p, work, tasks, "extract", "pages", [base])
        for result in results:
            out.add(result["output"])
        failures = [f for f in failures if f["kind"] != "retry"] + [f for r in results for f in r["failures"]]
        # in the order of the archives, whichever task came first
        if failures:
            failures.sort(key=_place)
            out.table("failures", pa.Table.from_pylist(failures, schema=FAILURE))
        account = Account(rows.num_rows, records_out=sum(r["output"].rows for r in results))
        for failure in failures:
            (account.dropped if failure["kind"] == "dropped" else account.failed)[failure["reason"]] += 1
        retry = sum(f["kind"] == "retry" for f in failures)
        return out.commit(account.counts(), {"parts": len(tasks), "extractor": p.extractor, "retry": retry})


def _unfinished(lake: Lake, out: StageWriter) -> tuple[dict[str, Output], list[dict[str, Any]]]:
    """Parts by name and failures of the last result, if all that is left to do there is to fetch pages again."""
    last = lake.manifest(out.p.run, out.p.stage)
    if last is None or not last.metrics.get("retry") or not out.same_work(last):
        return {}, []
    parts = {o.name.removesuffix(".parquet"): o for o in last.outputs if o.name.startswith("part")}
    return parts, lake.table(last, "failures").to_pylist()


def _complete_part(
    base: str,
    part: pa.Table,
    p: ExtractText,
    lake: Lake,
    writer: PartWriter,
    old: Output,
    again: set[tuple[Any, ...]],
) -> tuple[Output, list[dict[str, Any]]]:
    """The part `old` of an earlier attempt with its pages at the places `again` fetched; itself if it has none there."""
    rows = part.to_pylist()
    lost_before = [row for row in rows if _place(row) in again]
    if not lost_before:
        return old, []
    documents, failures = extract_rows(base, lost_before, p)
    before = lake.read_part(f"{writer.folder}/{old.path}").cast(DOCUMENT)
    documents = pa.concat_tables([before, documents])
    # in the order of the selection, as if nothing had ever been lost
    order = {row["doc_id"]: i for i, row in enumerate(rows)}
    places = [order[key] for key in documents["doc_id"].to_pylist()]
    documents = documents.take(sorted(range(len(places)), key=places.__getitem__))
    return writer.table(old.name.removesuffix(".parquet"), documents), failures
