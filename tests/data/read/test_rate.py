"""One polite rate for a whole job: as many tasks as Spark runs at once, on whatever machines, ask no faster together."""

import itertools
import subprocess
import threading
from collections.abc import Callable
from http.server import ThreadingHTTPServer
from pathlib import Path

import pytest
from conftest import SAMPLE

from kit import ROOT
from kit.data.engine import spark
from kit.data.extract.extract import extract_text
from kit.data.job import run_job
from kit.data.read import polite
from kit.data.select.index import explore_index
from kit.errors import ParamError
from kit.lake.store import Lake
from kit.params import Cores, ExploreIndex, ExtractText, WriteYourOwnJob
from kit.params.data import Fetching

NAMES = sorted(str(f.relative_to(SAMPLE)) for f in SAMPLE.rglob("*.warc.gz"))
RATE = 8.0
TASKS_AT_ONCE = 3


@pytest.fixture
def quiet_server(server: ThreadingHTTPServer) -> ThreadingHTTPServer:
    """The server of the sample crawl without faults, which notes when each request came."""
    server.faults, server.seen, server.etag, server.let_go = iter(()), [], '"1"', threading.Event()
    return server


def largest_burst(times: list[float], rate: float) -> float:
    """How many more requests came in some stretch of time than `rate` allows there."""
    times = sorted(times)
    stretches = itertools.combinations(range(len(times)), 2)
    return max(j - i - rate * (times[j] - times[i]) for i, j in stretches)


def extract(p: dict, lake: Lake, uri: str) -> None:
    extract_text(ExtractText(part_mb=0.03, **p), lake)


def own_job(p: dict, lake: Lake, uri: str) -> None:
    copies = [(f"{uri}/{name}?{copy}", f"{copy} {name}") for copy in range(4) for name in NAMES]
    run_job(WriteYourOwnJob(part_mb=0.001, **p), lake, copies)


@pytest.mark.parametrize("stage", [extract, own_job])
def test_tasks_of_other_machines_share_the_rate_of_the_job(
    stage: Callable, quiet_server: ThreadingHTTPServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lake = Lake(str(tmp_path))
    explore_index(ExploreIndex(lake=lake.uri, archive_base=quiet_server.uri, max_pages=200), lake)
    # as under spark-submit, where Spark runs more tasks at once than the parameters or this machine's cores say
    spark.session(Cores(cores=TASKS_AT_ONCE))
    monkeypatch.setenv("PYSPARK_GATEWAY_PORT", "1")
    monkeypatch.setattr(polite, "policy", polite.policy)
    p = {"lake": lake.uri, "cores": 1, "requests_per_s": RATE, "retries": 0, "contact": "me@example.org"}
    stage(p, lake, quiet_server.uri)
    times = [seen[3] for seen in quiet_server.seen]
    assert len(times) >= 6 * TASKS_AT_ONCE, f"{len(times)} are too few to tell rates apart"
    assert largest_burst(times, RATE) < TASKS_AT_ONCE
    agents = {seen[4]["User-Agent"] for seen in quiet_server.seen}
    assert len(agents) == 1 and agents.pop().endswith("; contact me@example.org)")


def test_no_more_tasks_run_at_the_same_time_than_there_are_lanes() -> None:
    def work(number: int) -> dict:
        import os

        return {"done": 1, "number": number, "process": os.getpid()}

    tasks = [(1, number) for number in range(7)]
    results = spark.run_tasks(Cores(cores=TASKS_AT_ONCE), work, tasks, "count", "tasks", 2)
    assert [r["number"] for r in results] == list(range(7)), "in the order of the tasks"
    assert len({r["process"] for r in results}) <= 2
    assert spark.slots(Cores(cores=TASKS_AT_ONCE)) == TASKS_AT_ONCE


def test_without_a_contact_the_user_agent_is_whole_and_the_person_is_told_of_it(
    quiet_server: ThreadingHTTPServer, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    lake = Lake(str(tmp_path))
    explore_index(ExploreIndex(lake=lake.uri, archive_base=quiet_server.uri, max_pages=5), lake)
    extract_text(ExtractText(lake=lake.uri, cores=TASKS_AT_ONCE, requests_per_s=1000), lake)
    assert "contact=" in capsys.readouterr().out
    assert all(seen[4]["User-Agent"].endswith("(polite range reader)") for seen in quiet_server.seen)


@pytest.mark.parametrize("contact", ["two words", "a\nb", "you (me)", "back\\slash", "ü@example.org"])
def test_a_contact_that_no_header_can_hold_is_refused(contact: str) -> None:
    with pytest.raises(ParamError, match="parameter 'contact'"):
        Fetching.parse({"contact": contact})


def test_whom_one_asks_as_and_how_fast_is_no_part_of_the_result() -> None:
    asked = {"contact": "https://example.org/about?us=1", "requests_per_s": 1, "retries": 2}
    for cls in (ExtractText, WriteYourOwnJob):
        assert cls(**asked).identity() == cls().identity()
    assert ExploreIndex(contact="me@example.org").identity() == ExploreIndex().identity()


@pytest.mark.slow
def test_on_a_cluster_the_job_keeps_its_rate(
    quiet_server: ThreadingHTTPServer,
    tmp_path: Path,
    cluster: tuple[str, dict[str, str]],
) -> None:
    master, here = cluster
    (tmp_path / "archives.txt").write_text("".join(f"{name}\n" for name in NAMES))
    words = ["--job", str(ROOT / "notebooks" / "jobs" / "server_header.py"), "--archives", "archives.txt"]
    words += ["--base", quiet_server.uri, "--out", "far", "--part-mb", "0.001", "--requests-per-s", "3"]
    command = [f"{here['SPARK_HOME']}/bin/spark-submit", "--master", master]
    done = subprocess.run(
        [*command, str(ROOT / "kit" / "data" / "job.py"), *words, "--contact", "me@example.org"],
        env=here, cwd=tmp_path, capture_output=True, text=True, check=False, timeout=240,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    times = [seen[3] for seen in quiet_server.seen]
    assert len(times) >= 2 * len(NAMES)
    assert largest_burst(times, 3) < 2
