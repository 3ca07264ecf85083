"""81: what the data half does per core, side by side with its peers in one run, and what a whole crawl would take.

The full table (about 15 minutes; peers as an extra in an environment of their own, see `PEERS_INSTALL`):

    kit run params/demo.yaml --until 10
    kit run params/demo.yaml --only 81 -p extractor=auto -p part_mb=2 -p benchmark_archive=pages.warc.gz \\
        -p gold=pages_gold.jsonl -p benchmark_pages=1000 -p benchmark_rounds=3 -p spark_archive=debian.warc.gz \\
        -p count_index=cc-index/table/cc-main/warc/crawl=CC-…
"""

from __future__ import annotations

import json
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import median
from typing import Any

from kit import process, resolve_path
from kit.lake.manifest import Counts, Manifest
from kit.lake.store import Lake
from kit.measure.data import data_jobs, near_jobs, process_tree
from kit.measure.data.benchmark_rows import NEAR_DEDUP, Row, plan_rows, sampled_pages
from kit.measure.data.process_tree import Measured
from kit.params import BenchmarkData
from kit.progress import progress

PEERS_INSTALL = "python -m venv .cache/peers && .cache/peers/bin/pip install -c constraints.txt -e '.[peers]'"
"""In an environment of its own: datatrove wants fasttext-numpy2-wheel, which overwrites the module that the
kit's language detector uses, and the detector then refuses to work."""
TRAINED = (
    "flattering on pages it was trained on: cross-validated scores are in kit/data/extract/blocks_card.md"
)
NOT_INSTALLED = "not installed: pip install '.[peers]'"
HUNDREDS_TB = 300.0
"""Beside a whole crawl: the reference system processed "hundreds of TB within a week"."""


def benchmark_data(p: BenchmarkData, lake: Lake) -> Manifest:
    """Commit `rows` (measured), `quality` (where there is gold), `spark` and `extrapolation`.

    Every row is a process of its own whose whole tree is measured; rounds alternate their order, ratios are
    taken within a round, and medians are told. CPU seconds of one thread each: pages per CPU-second of the
    tree are pages per second and core, whatever else the machine does.
    """
    with lake.stage(p) as out, tempfile.TemporaryDirectory() as work:
        pages, spots = sampled_pages(p, lake, out, Path(work))
        rows = plan_rows(p, pages, spots, Path(work))
        with progress(len(rows) * p.benchmark_rounds, "benchmark", "runs") as bar:
            for turn in range(p.benchmark_rounds):
                for row in rows if turn % 2 == 0 else rows[::-1]:
                    bar.note(row.name)
                    row.runs.append(_run(row, p, Path(work)))
                    bar.update()
        table = [tell(row, rows) for row in rows]
        out.rows("rows", table, measured=True)
        if p.gold and (scores := quality(rows, p.gold, {s[0] for s in spots})):
            out.read_outside(p.gold)
            out.rows("quality", scores)
        bytes_per_page = pages.stat().st_size / len(spots)
        crawl = [e for t in table for e in whole_crawl(t, p, bytes_per_page)]
        out.rows("extrapolation", crawl, measured=True)
        missing = sum(t["error"] == NOT_INSTALLED for t in table)
        broken = sum(t["error"] is not None for t in table) - missing
        counts = Counts(
            records_in=len(rows),
            records_out=len(rows) - missing - broken,
            dropped={"peer not installed": missing} if missing else {},
            failed={"row": broken} if broken else {},
        )
        metrics = {"pages": len(spots), "bytes_per_page": bytes_per_page, "spark": spark_against_loop(rows)}
        return out.commit(counts, metrics | {"cores": p.cores or process.cores()})


def _run(row: Row, p: BenchmarkData, work: Path) -> Measured:
    """One run of a row, in a new folder."""
    python = f"{resolve_path(p.peers_venv)}/bin/python" if row.peer else sys.executable
    if row.peer and not Path(python).exists():
        return Measured(error=NOT_INSTALLED)
    with tempfile.TemporaryDirectory(dir=work) as folder:
        arguments = {k: folder if v == "{work}" else v for k, v in row.arguments.items()}
        jobs = near_jobs if row.group == NEAR_DEDUP else data_jobs
        measurement = process_tree.measure_tree(f"{jobs.__name__}:{row.job}", arguments, python)
    if row.peer and measurement.error and measurement.error.startswith("ModuleNotFoundError"):
        return Measured(error=NOT_INSTALLED)
    return measurement


def _times(row: Row, base: Row, of: int) -> float | None:
    """How many times the wall (`of` 0) or CPU (1) seconds of `row` does `base` take: median of the rounds' ratios."""
    pairs = [
        (a.span("start", "end"), b.span("start", "end"))
        for a, b in zip(row.runs, base.runs, strict=True)
        if not a.error and not b.error
    ]
    return median(b[of] / a[of] for a, b in pairs) if pairs else None


def tell(row: Row, rows: Sequence[Row]) -> dict[str, Any]:
    """A row's medians: seconds of start and work, units per CPU-second with and without the start, times its base."""
    good = [r for r in row.runs if not r.error]
    base = next(r for r in rows if (r.group, r.name) == (row.group, row.base))
    units, alike = row.read, row.read == base.read

    def middle(value: Any) -> float | None:
        return median(value(r) for r in good) if good else None

    return {
        "group": row.group,
        "row": row.name,
        "units": units,
        "read": good[0].result["units"] if good else None,
        "kept": good[0].result["kept"] if good else None,
        "start_cpu_s": middle(lambda r: r.marks["start"][1]),
        "cpu_s": middle(lambda r: r.span("start", "end")[1]),
        "wall_s": middle(lambda r: r.span("start", "end")[0]),
        "per_cpu_s": middle(lambda r: units / r.span("start", "end")[1]),
        "per_cpu_s_with_start": middle(lambda r: units / r.marks["exit"][1]),
        "base": row.base,
        "times_base": _times(row, base, 1) if alike else None,
        "times_base_wall": _times(row, base, 0) if alike else None,
        "worker_mb": None if row.job == "count_languages" else middle(lambda r: r.worker_mb),
        "steps_cpu_s": json.dumps(good[-1].steps()) if good else None,
        "rounds": len(good),
        "error": row.runs[0].error,
    }


def spark_against_loop(rows: Sequence[Row]) -> dict[str, Any]:
    """What Spark costs and brings past the session's start, on the larger archive where there is one.

    `cpu_overhead` 0.1 means 10 % more CPU seconds, `wall_speedup` how often faster on all cores, `worker_mb` the
    largest Python worker (`…_of_a_twentieth` of the pages), `same_bytes` whether both made the same documents.
    """
    group = "spark" if any(r.group == "spark" for r in rows) else "whole way"
    rows_by_engine = {r.name.rpartition(", ")[2]: r for r in rows if r.group == group and r.job == "kit_way"}
    loop = rows_by_engine["plain loop"]
    engine = next(r for name, r in rows_by_engine.items() if name.startswith("Spark on"))
    if not _times(engine, loop, 1):
        return {}
    good = [r for r in (*loop.runs, *engine.runs) if not r.error]
    few = rows_by_engine.get("a twentieth of it")
    return {
        "pages": loop.read,
        "cpu_overhead": 1 / _times(engine, loop, 1) - 1,
        "wall_speedup": _times(engine, loop, 0),
        "start_cpu_s": median(r.marks["start"][1] for r in engine.runs if not r.error),
        "worker_mb": max(r.worker_mb for r in engine.runs),
        "same_bytes": len({r.result["content"] for r in good}) == 1,
    } | ({"worker_mb_of_a_twentieth": max(r.worker_mb for r in few.runs)} if few else {})


def quality(rows: Sequence[Row], path: str, record_ids: set[str]) -> list[dict[str, Any]]:
    """Word and snippet scores of every extractor that ran, defined as in the model card of `auto`.

    `path` is a gold file (lines with `record_id`, `text`, `with`, `without`); only pages that are measured count.
    """
    from kit.measure.data.scores import score_texts

    lines = Path(resolve_path(path)).read_text(encoding="utf-8").splitlines()
    gold = [g for g in map(json.loads, lines) if g["record_id"] in record_ids]
    score_rows = []
    for row in (r for r in rows if gold and r.group == "extractor" and not r.runs[-1].error):
        texts = json.loads(Path(row.arguments["texts"]).read_text(encoding="utf-8"))
        scores = score_texts([texts[g["record_id"]] for g in gold], gold)
        score_rows.append({"extractor": row.name, **scores, "note": TRAINED if row.name == "auto" else ""})
    return score_rows


def extrapolate(units: float, per_core_s: float, p: BenchmarkData) -> dict[str, float]:
    """Core-hours, dollars and the cores that do `units` within `p.within_days`, at a rate for each core.

    EMR Serverless bills vCPU-hours and GB-hours of its workers (aws.amazon.com/emr/pricing, x86, us-east-1: $0.052624
    and $0.0057785, looked up 2026-11; 20 GB of disk a worker are free). Reading Common Crawl's bucket from
    us-east-1 costs nothing, and writing a part for each 64 MB some $20 a crawl. Not covered: workers that wait
    for the last task, the driver, and that this machine's core may be faster than a vCPU there.
    """
    core_hours = units / per_core_s / 3600
    return {
        "core_hours": core_hours,
        "cores": core_hours / (p.within_days * 24),
        "usd": core_hours * (p.usd_per_vcpu_hour + p.memory_gb_per_core * p.usd_per_gb_hour),
    }


def whole_crawl(row: Mapping[str, Any], p: BenchmarkData, bytes_per_page: float) -> list[dict[str, Any]]:
    """What a whole crawl and `HUNDREDS_TB` take with a row of the `whole way`, by pages and by bytes; else nothing.

    The pages measured may be smaller or larger than a crawl's: the two figures are the range. The default is
    CC-MAIN-2025-43: 2.617 billion pages (huggingface.co/datasets/commoncrawl/statistics), 100,000 WARC files of
    97.73 TiB together (the crawl's own list of files, as quoted by others).
    """
    if row["group"] != "whole way" or row["error"]:
        return []
    amounts = {
        "whole crawl, by pages": p.crawl_pages,
        "whole crawl, by bytes": p.crawl_tb * 1e12 / bytes_per_page,
        f"{HUNDREDS_TB:.0f} TB of WARC": HUNDREDS_TB * 1e12 / bytes_per_page,
    }
    rate = row["per_cpu_s"]
    return [{"row": row["row"], "what": what} | extrapolate(n, rate, p) for what, n in amounts.items()]
