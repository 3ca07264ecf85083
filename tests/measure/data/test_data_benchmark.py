"""The data benchmark: CPU nobody waits for is seen, scores and sums are right, the stage runs without its peers."""

import json
import resource
import subprocess
import sys
import textwrap

import pytest
from conftest import run_data_stages

from kit.lake.store import Lake
from kit.measure.data import data_benchmark, process_tree
from kit.measure.data.benchmark_rows import Row
from kit.measure.data.data_benchmark import extrapolate, quality, spark_against_loop, tell, whole_crawl
from kit.measure.data.data_jobs import datatrove_counts
from kit.measure.data.process_tree import Measured, measure_tree
from kit.params import BenchmarkData

BURN = """
import time
def burn(seconds):
    while time.process_time() < seconds: pass
"""
FAMILY = BURN + textwrap.dedent("""
    import os, signal, sys
    from kit.measure.data.process_tree import mark
    def grandchild(seconds):
        signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # so that nobody ever waits, as with Spark's workers
        mark("start")
        if os.fork() == 0:
            if os.fork() == 0:
                burn(seconds)
                os._exit(0)
            os._exit(0)
        time.sleep(seconds * 4 + 2)
        mark("end")
        return {"units": 1}
    def alone(seconds):
        burn(seconds)
        return [1, "two"]
    def broken():
        raise ValueError("no such page")
""")


@pytest.fixture
def family(tmp_path, monkeypatch):
    (tmp_path / "family.py").write_text(FAMILY)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    return "family"


def test_the_cpu_of_a_grandchild_that_nobody_waits_for_is_seen(family):
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    found = measure_tree(f"{family}:grandchild", {"seconds": 1.0})
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert found.result == {"units": 1} and found.error is None
    told = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    _, seen = found.span("start", "end")
    assert seen > 0.5, "the orphan's second is missing"
    assert found.marks["exit"][1] > told + 0.5, "getrusage knew it already: this test proves nothing"


def test_a_program_without_children_is_measured_exactly_and_returns_its_result(family):
    found = measure_tree(f"{family}:alone", {"seconds": 0.6})
    assert found.result == [1, "two"]
    assert 0.6 <= found.marks["exit"][1] < 2 and found.worker_mb > 5


def test_an_error_is_its_last_line(family):
    assert measure_tree(f"{family}:broken", {}).error == "ValueError: no such page"


def test_words_and_snippets_of_what_an_extractor_found(tmp_path):
    lines = [
        {"record_id": "1", "text": "one two two", "with": ["one  two", "three"], "without": ["menu"]},
        {"record_id": "2", "text": None, "with": ["kept"], "without": ["ads", "cookie"]},
        {"record_id": "4", "text": "a page that is not measured", "with": [], "without": []},
    ]
    gold = tmp_path / "gold.jsonl"
    gold.write_text("\n".join(map(json.dumps, lines)))
    texts = tmp_path / "auto.json"
    texts.write_text('{"1": "one\\ntwo menu", "2": "kept cookies", "3": "no gold"}')
    row = Row(
        "extractor",
        "auto",
        "extract_pages",
        {"extractor": "auto", "texts": str(texts)},
        "auto",
        runs=[Measured()],
    )
    (found,) = quality([row], str(gold), {"1", "2", "3"})
    assert found["pages"] == 1 and "blocks_card.md" in found["note"]
    assert found["word P"] == found["word R"] == found["word F1"] == pytest.approx(2 / 3)
    # two of three wanted are in; of the four found, two are not wanted
    assert found["snippet P"] == 0.5 and found["snippet R"] == pytest.approx(2 / 3)
    assert found["snippet F"] == pytest.approx(4 / 7)


def test_extrapolation():
    p = BenchmarkData(within_days=10, usd_per_vcpu_hour=0.05, usd_per_gb_hour=0.005, memory_gb_per_core=2)
    found = extrapolate(3600 * 100 * 240, 100, p)
    assert found == {"core_hours": 240, "cores": 1, "usd": pytest.approx(240 * 0.06)}


def run(start_s, work_s, units=100, wall_s=None, **more):
    """A run whose start took `start_s` CPU seconds and whose work `work_s`."""
    wall = work_s if wall_s is None else wall_s
    marks = {"start": (start_s, start_s), "end": (start_s + wall, start_s + work_s)}
    return Measured(marks | {"exit": marks["end"]}, {"units": units, "kept": units, "content": "x"}, **more)


def rows_of(**runs):
    rows = [
        Row("whole way", name.replace("_", " "), "kit_way", {}, "peer", 100, runs=r)
        for name, r in runs.items()
    ]
    return {r.name: r for r in rows}, rows


def test_medians_and_ratios_are_taken_within_a_round():
    named, rows = rows_of(peer=[run(1, 10), run(1, 40), run(1, 20)], kit=[run(3, 1), run(3, 8), run(3, 2)])
    told = tell(named["kit"], rows)
    assert (told["start_cpu_s"], told["cpu_s"], told["times_base"]) == (3, 2, 10)
    assert told["per_cpu_s"] == 50 and told["per_cpu_s_with_start"] == 20


def test_a_peer_that_is_not_there_is_told_and_nothing_else_suffers():
    missing = Measured(error=data_benchmark.NOT_INSTALLED)
    named, rows = rows_of(peer=[missing, missing], kit=[run(3, 1), run(3, 1)])
    assert tell(named["peer"], rows)["error"] == data_benchmark.NOT_INSTALLED
    told = tell(named["kit"], rows)
    assert told["times_base"] is None and told["per_cpu_s"] == 100
    assert whole_crawl(tell(named["peer"], rows), BenchmarkData(), 1e4) == []


def test_by_pages_and_by_bytes():
    p = BenchmarkData(crawl_pages=36_000_000, crawl_tb=1.0)
    named, rows = rows_of(peer=[run(0, 10)])
    found = {e["what"]: e["core_hours"] for e in whole_crawl(tell(named["peer"], rows), p, 20_000)}
    assert found["whole crawl, by pages"] == pytest.approx(1000)
    # pages of 20 kB at 10 a second: 0.2 MB a second
    assert found["whole crawl, by bytes"] == pytest.approx(1e12 / 2e5 / 3600)
    assert found["300 TB of WARC"] == pytest.approx(300 * found["whole crawl, by bytes"])


def test_spark_against_the_loop():
    _, rows = rows_of(
        **{"kit, plain loop": [run(1, 10)], "kit, Spark on 2 cores": [run(9, 11, wall_s=5, worker_mb=300)]}
    )
    found = spark_against_loop(rows)
    assert found["cpu_overhead"] == pytest.approx(0.1) and found["wall_speedup"] == 2
    assert (found["start_cpu_s"], found["worker_mb"], found["pages"]) == (9, 300, 100) and found["same_bytes"]


@pytest.mark.slow  # two Spark sessions; nbval runs the notebook in make test
def test_the_stage_runs_on_the_sample_without_peers(tmp_path):
    lake = Lake(str(tmp_path / "lake"))
    run_data_stages(lake, "sample", until="10")
    p = BenchmarkData(
        lake=lake.uri, benchmark_pages=8, benchmark_rounds=1, cores=1, extractor="resiliparse",
        peers_venv=str(tmp_path / "none"),
    )  # fmt: skip
    manifest = data_benchmark.benchmark_data(p, lake)
    rows = {r["row"]: r for r in lake.table(manifest, "rows").to_pylist()}
    assert manifest.counts.dropped == {"peer not installed": 6} and not manifest.counts.failed
    assert rows["datatrove: FineWeb's rules"]["error"] == data_benchmark.NOT_INSTALLED
    assert {"auto", "resiliparse", "trafilatura", "DuckDB", "Spark SQL"} <= set(rows)
    loop, spark = rows["kit, plain loop"], rows["kit, Spark on 1 cores"]
    assert manifest.metrics["spark"]["same_bytes"]
    assert loop["units"] == spark["units"] == loop["read"] == 8 and loop["kept"] == spark["kept"]
    assert rows["DuckDB"]["kept"] == rows["Spark SQL"]["kept"] == 797
    assert all(o.measured for o in manifest.outputs)


def test_the_measurer_needs_nothing_of_the_data_half():
    """So that it runs in the peers' environment, where the kit's libraries are not."""
    block = "".join(
        f"sys.modules[{m!r}] = None\n" for m in ("duckdb", "pyspark", "resiliparse", "torch", "warcio")
    )
    code = f"import sys\n{block}import kit.measure.data.data_jobs"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
    assert process_tree.ONE_THREAD["OMP_NUM_THREADS"] == "1"


@pytest.mark.parametrize("read", [7, {"total": 7, "mean": 3.5}])
def test_datatroves_own_counts_are_read_in_either_form(tmp_path, read):
    stats = [{"stats": {"documents": read}}, {"stats": {}}, {"stats": {"total": 5}}]
    (tmp_path / "stats.json").write_text(json.dumps(stats), encoding="utf-8")
    assert datatrove_counts(tmp_path) == {"units": 7, "kept": 5}
