"""What the data benchmark times, each in a process of its own: extractors, the whole way, counts over the index.

A job marks `start` when everything it needs is loaded, so that starting an engine and doing the work are told
apart. It returns what it made, never a time.
"""

from __future__ import annotations

import gc
import gzip
import json
import time
from pathlib import Path
from typing import Any

from kit.measure.data.process_tree import mark

WARM_QUERIES = 5


def extract_pages(archive: str, spots: list[list[Any]], extractor: str, texts: str) -> dict[str, int]:
    """Decode and extract the pages at `spots` (record id, offset, length), no images, no checks; `texts` is written.

    All extractors run with the garbage collector off, as pages do in the kit.
    """
    from kit.data.extract.extract import EXTRACTORS, Html
    from kit.data.read.archive import parse_page
    from kit.data.read.charset import decode

    with open(archive, "rb") as f:
        members = [(f.seek(offset), f.read(length))[1] for _, offset, length in spots]
    pages = [parse_page(gzip.decompress(m), 1 << 30) for m in members]
    EXTRACTORS[extractor](Html("<p>what is loaded at the first page is no part of a page's time</p>"))
    text_by_record = {}
    gc.disable()
    mark("start")
    for (record_id, *_), page in zip(spots, pages, strict=True):
        try:
            html = Html(decode(page.payload, page.charset)[0].replace("\x00", ""))
            text_by_record[record_id] = EXTRACTORS[extractor](html)
        except Exception:  # a page that breaks a parser scores as a page without text
            text_by_record[record_id] = ""
    mark("end")
    Path(texts).write_text(json.dumps(text_by_record), encoding="utf-8")
    return {"units": len(text_by_record), "kept": sum(bool(t.strip()) for t in text_by_record.values())}


def kit_way(
    archive: str,
    lake: str,
    max_pages: int,
    cores: int,
    part_mb: float,
    extractor: str,
    mask_pii: bool,
    index_first: bool,
) -> dict[str, Any]:
    """Stages 10, 20 and 30 over an archive, on Spark (`cores` > 0) or with a plain loop in Spark's place (0).

    The stages are the same to the byte; only `run_tasks` differs. `index_first` leaves stage 10 out of the clock.
    """
    from kit.data.engine import spark
    from kit.data.extract import extract
    from kit.data.refine import refine
    from kit.data.select.index import explore_index
    from kit.lake.store import Lake
    from kit.params import Cores, ExploreIndex, ExtractText, RefineText

    common = {"run": "benchmark", "lake": lake}
    if cores:
        spark.run_tasks(Cores(cores=cores), _load, [(1, extractor)] * 2 * cores, "start", "tasks")
    else:
        _load(extractor)
        extract.run_at_rate = refine.run_tasks = _plain_loop
    to = Lake(lake)
    mark("start")
    explore_index(ExploreIndex(archive_paths=[archive], max_pages=max_pages, **common), to)
    mark("start" if index_first else "index")
    common |= {"cores": cores, "part_mb": part_mb}
    extract.extract_text(ExtractText(extractor=extractor, **common), to)
    mark("extract")
    refined = refine.refine_documents(RefineText(mask_pii=mask_pii, features=[], **common), to)
    mark("refine")
    mark("end")
    pages = to.need("benchmark", "10_explore_index").counts.records_out
    if not cores and spark.SparkSession.getActiveSession():
        raise RuntimeError("the plain loop started Spark")
    return {"units": pages, "kept": refined.counts.records_out, "content": refined.content_sha256}


def _load(extractor: str) -> dict[str, int]:
    """What a process loads once (a worker is used again by the next stage), so that it counts as start."""
    import kit.data.refine.refine  # noqa: F401
    from kit.data.extract.extract import EXTRACTORS, Html
    from kit.data.text.language import detect_language

    EXTRACTORS[extractor](Html(f"<p>{_load.__doc__}</p>"))
    detect_language(_load.__doc__)
    time.sleep(0.5)  # so that no worker takes two of these tasks
    return {"done": 1}


def _plain_loop(p: Any, work: Any, tasks: Any, *_: Any) -> list[dict[str, Any]]:
    return [work(task) for _, task in tasks]


def datatrove_way(archive: str, work: str, lid_model: str, fineweb: bool) -> dict[str, int]:
    """datatrove: WARC → Trafilatura → language → Gopher, as FineWeb does it (with C4's and its own rules) or not.

    Its defaults, one process, Parquet out. The language model is the one that the kit uses.
    """
    from datatrove.executor import LocalPipelineExecutor
    from datatrove.pipeline import filters
    from datatrove.pipeline.extractors import Trafilatura
    from datatrove.pipeline.readers import WarcReader
    from datatrove.pipeline.writers import ParquetWriter
    from datatrove.utils.lid import FT176LID

    FT176LID.MODEL_URL = lid_model
    path = Path(archive)
    steps = [
        WarcReader(str(path.parent), glob_pattern=path.name, recursive=False),
        Trafilatura(),
        filters.LanguageFilter(language_threshold=0.65),
        filters.GopherRepetitionFilter(),
        filters.GopherQualityFilter(),
    ]
    if fineweb:
        steps += [filters.C4QualityFilter(filter_no_terminal_punct=False), filters.FineWebQualityFilter()]
    steps.append(ParquetWriter(f"{work}/kept"))
    mark("start")
    LocalPipelineExecutor(steps, tasks=1, workers=1, logging_dir=f"{work}/logs").run()
    mark("end")
    return datatrove_counts(Path(work, "logs"))


def datatrove_counts(logs: Path) -> dict[str, int]:
    """What datatrove says that its first step read and its last one kept, in the folder of its logs."""
    stats = json.loads((logs / "stats.json").read_text(encoding="utf-8"))
    counts = stats[0]["stats"].get("documents", 0), stats[-1]["stats"].get("total", 0)
    # datatrove writes a number, or a dictionary where it knows more than the total
    read, kept = (count["total"] if isinstance(count, dict) else count for count in counts)
    return {"units": read, "kept": kept}


def kit_filters(texts: str) -> dict[str, int]:
    """Repair, language and every rule of the kit on texts (a file as `extract_pages` writes it); no masks, no features."""
    from kit.data.refine.refine import refine_rows
    from kit.data.text.rules import RULE_SETS
    from kit.params import RefineText

    p = RefineText(quality_rules=list(RULE_SETS), tag_rules=[], pii_types=[], features=[])
    bare = {"url": "", "title": "", "reviews": [], "images": []}
    documents = [
        bare | {"text": t} for t in json.loads(Path(texts).read_text(encoding="utf-8")).values() if t
    ]
    refine_rows([bare | {"text": kit_filters.__doc__}], p)
    mark("start")
    batches = (documents[start : start + 64] for start in range(0, len(documents), 64))
    kept = sum(row["drop_reason"] is None for batch in batches for row in refine_rows(batch, p))
    mark("end")
    return {"units": len(documents), "kept": kept}


def datatrove_filters(texts: str, lid_model: str) -> dict[str, int]:
    """The same rules by datatrove's filters, in FineWeb's order until one drops a text; no URL rules."""
    from datatrove.data import Document
    from datatrove.pipeline import filters
    from datatrove.utils.lid import FT176LID

    FT176LID.MODEL_URL = lid_model
    steps = [
        filters.LanguageFilter(language_threshold=0.65),
        filters.GopherRepetitionFilter(),
        filters.GopherQualityFilter(),
        filters.C4QualityFilter(filter_no_terminal_punct=False),
        filters.FineWebQualityFilter(),
    ]

    def passes(text: str) -> bool:
        document = Document(text=text, id="", metadata={})
        return all(step.filter(document) is True for step in steps)

    page_texts = [t for t in json.loads(Path(texts).read_text(encoding="utf-8")).values() if t]
    passes(datatrove_filters.__doc__)
    mark("start")
    kept = sum(map(passes, page_texts))
    mark("end")
    return {"units": len(page_texts), "kept": kept}


def count_languages(files: list[str], engine: str, cores: int) -> dict[str, int]:
    """Pages by language over Parquet files of an index, `WARM_QUERIES` times after a first; `units` are rows read."""
    column = "content_languages"
    if engine == "duckdb":
        import duckdb

        con = duckdb.connect(config={"threads": cores})
        query = f"SELECT {column}, count(*) FROM read_parquet({files!r}, union_by_name=true) GROUP BY 1"
        ask = lambda: con.execute(query).fetchall()  # noqa: E731
    else:
        from kit.data.engine.spark import session
        from kit.params import Cores

        table = session(Cores(cores=cores), java_options="").read.parquet(*files)  # a JVM as Spark starts it
        # a new plan each time: Spark keeps the shuffle of an old one
        ask = lambda: table.groupBy(column).count().collect()  # noqa: E731
    total = sum(row[1] for row in ask())
    mark("start")
    for _ in range(WARM_QUERIES):
        ask()
    mark("end")
    return {"units": total * WARM_QUERIES, "kept": total}
